"""Step `counters`: what Nsight Compute counts in one launch of each engine's kernel, for three shapes."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.campaign.site import Site
from bench.campaign.steps import Outcome, Point

SAMPLE = Path(__file__).with_name("samples") / "ncu.csv"
SHAPES = ((1, 128256, "float32"), (64, 128256, "bfloat16"), (256, 128256, "float32"))
KERNELS = {"cuda": "regex:sample_kernel", "triton": "regex:^sample$"}
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = {
    "time_ns": "gpu__time_duration.sum",
    "read_bytes": "dram__bytes_read.sum",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "shared_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "registers": "launch__registers_per_thread",
    "warps_active_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "stalled_barrier": STALL.format("barrier"),
    "stalled_membar": STALL.format("membar"),
    "stalled_long_scoreboard": STALL.format("long_scoreboard"),
    "stalled_short_scoreboard": STALL.format("short_scoreboard"),
    "stalled_no_instruction": STALL.format("no_instruction"),
}
"""Ours: Nsight Compute's. Stalls are warps per issued instruction."""

STEP = """
import sys, torch, fastsample as fs
rows, vocab, dtype, engine = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3]), sys.argv[4]
logits = (torch.randn(rows, vocab, device="cuda") * 4).to(dtype)
sampler = fs.Sampler(batch_size=rows, seed=1, on_invalid="flag", backend=engine, temperature=0.8, top_k=50, top_p=0.95)
out = sampler(logits)
for _ in range(3):
    sampler(logits, out=out)
torch.cuda.synchronize()
"""


def points(site: Site) -> Iterator[Point]:
    for shape in SHAPES:
        for engine in site.engines:
            key = dict(zip(("rows", "vocab", "dtype"), shape, strict=True)) | {"engine": engine}
            yield key, partial(rehearsed if site.dry else measure, site, engine, shape)


def rehearsed(_site: Site, _engine: str, _shape: tuple[int, int, str]) -> Outcome:
    return parse(SAMPLE.read_text()) | {"replaced": "ncu by samples/ncu.csv, all of whose figures are 0"}


def measure(site: Site, engine: str, shape: tuple[int, int, str]) -> Outcome:
    if (ncu := shutil.which("ncu")) is None:
        return {"skipped": "ncu (Nsight Compute) is not on the path"}
    step = (sys.executable, "-c", STEP, *map(str, shape), engine)
    done = subprocess.run(
        [*command(ncu, KERNELS[engine]), *step],
        cwd=site.scratch,
        capture_output=True,
        text=True,
        timeout=site.left,
    )
    return parse(done.stdout) or {"failed": f"ncu: {(done.stdout + done.stderr)[-400:]}"}


def command(ncu: str, kernel: str) -> list[str]:
    """The fourth launch, with caches flushed before it, which is ncu's default, and the clocks left alone."""
    once = ("--kernel-name", kernel, "--launch-skip", "3", "--launch-count", "1")
    told = ("--metrics", ",".join(METRICS.values()), "--clock-control", "none")
    return [ncu, "--csv", "--print-units", "base", *once, *told]


def parse(text: str) -> Outcome:
    """The figures in ncu's CSV, whose lines follow its own messages; what it could not count is left out."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    counted = {row["Metric Name"]: row["Metric Value"] for row in csv.DictReader(lines)}
    found: Outcome = {}
    for name, metric in METRICS.items():
        try:
            found[name] = float(counted[metric].replace(",", ""))
        except (KeyError, ValueError):
            continue
    return found
