"""The CPU engine against one read of the row: `python -m bench cpu`.

Each mode alternates with torch.amax over the same logits in one process; medians, and the median of the ratios taken
pair by pair. Python's share of both is included.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastsample as fs
from bench.modes import MODES, Mode, make_logits, prepare
from fastsample.engines.cpu import native


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def against(call: Callable[[], Any], floor: Callable[[], Any], budget: float) -> tuple[float, float, float]:
    """Median seconds of a call and of the floor, and the median of their ratios, from pairs within a time budget."""
    for _ in range(3):
        call(), floor()
    pairs = []
    end = time.perf_counter() + budget
    while len(pairs) < 9 or (time.perf_counter() < end and len(pairs) < 2000):
        pairs.append((seconds(call), seconds(floor)))
    mine, other = zip(*pairs, strict=True)
    return statistics.median(mine), statistics.median(other), statistics.median(a / b for a, b in pairs)


def measure(mode: Mode, logits: torch.Tensor, budget: float) -> dict[str, Any]:
    rows, vocab = logits.shape
    step, floor, ratio = against(prepare(mode, logits, "cpu"), lambda: torch.amax(logits, -1), budget)
    return {
        "mode": mode.name,
        "rows": rows,
        "vocab": vocab,
        "dtype": str(logits.dtype).removeprefix("torch."),
        "us": step * 1e6,
        "amax_us": floor * 1e6,
        "ratio": ratio,
        "limit": mode.limits and mode.limits[0 if rows == 1 else 1],
    }


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "date": date.today().isoformat(),
        "cpu": model,
        "cores": os.cpu_count(),
        "isa": native().isa(),
        "threads": fs.get_num_threads(),
        "torch": torch.__version__,
        "fastsample": fs.__version__,
    }


def run(
    logits: str, vocab: int, batch_sizes: Iterable[int], dtype: str, threads: int, budget: float, out: Path | None
) -> None:
    """Measure every mode, print the table, and write it to `out` as JSON."""
    torch.set_num_threads(threads)
    fs.set_num_threads(threads)
    inputs = [make_logits(logits, rows, vocab, getattr(torch, dtype)) for rows in batch_sizes]
    work = [(mode, x) for x in inputs for mode in MODES]
    console = Console()
    results = [measure(mode, x, budget) for mode, x in track(work, "measuring", console=console, transient=True)]
    where = machine()
    title = f"{logits} logits, V = {vocab}, {dtype}, {where['isa']}, {threads} thread(s), {where['cpu']}"
    table = Table("mode", "B", "us / step", "us amax", "ratio", "aimed at", title=title)
    for r in results:
        limit = "" if r["limit"] is None else f"<= {r['limit']:g}"
        style = "red" if r["limit"] is not None and r["ratio"] > r["limit"] else None
        table.add_row(
            r["mode"], str(r["rows"]), f"{r['us']:.1f}", f"{r['amax_us']:.1f}", f"{r['ratio']:.2f}", limit, style=style
        )
    console.print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": where, "logits": logits, "results": results}, indent=1) + "\n")
        console.print(f"written to {out}")
