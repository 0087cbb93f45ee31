"""GPU engines against torch's own operations and FlashInfer: `python -m bench gpu`.

First come the `gpu` tests and bench/gate.py. Then each mode is captured in a CUDA graph of several calls and timed with
events: cold, over inputs that together exceed the L2 cache, and hot, over one input.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fastsample as fs
from bench import gate, peers
from bench.modes import BY_NAME, Mode, make_logits, prepare
from bench.record import Results, console, packages
from fastsample.backends import engine

ROOT = Path(__file__).parents[1]
BATCHES, VOCABS, DTYPES = (1, 8, 64, 256), (32000, 128256, 262144), ("float32", "bfloat16")
NAMES = ("greedy", "k50 p.95", "p.95", "min_p", "T", "everything")
REPLAYS = 5
TEST_SHARE = 0.6  # of the time budget, at most
BANDWIDTH = 3.35e12  # bytes per second of an H100 SXM; only for the column of floors


@dataclass
class Budget:
    """A time budget: seconds since the start, and the limit."""

    seconds: float
    start: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.start)


def run_tests(budget: Budget, screen: Console) -> dict[str, Any]:
    """The gpu tests in a process of their own: (passed, last line)."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "gpu",
        "tests/engines/test_gpu.py",
        "-p",
        "no:cacheprovider",
    ]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, budget.left * TEST_SHARE)
        )
        passed, text = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as error:
        passed, text = False, f"{error.stdout or ''}\nout of time"
    screen.print(text if not passed else text.strip().splitlines()[-1], markup=False)
    return {"passed": passed, "summary": text.strip().splitlines()[-1] if text.strip() else ""}


def l2_bytes() -> int:
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 * 2**20))


def turns(row_bytes: int) -> int:
    """The number of inputs that exceeds twice the L2 cache; at least 2, at most 64."""
    return min(64, max(2, math.ceil(2 * l2_bytes() / row_bytes)))


def timed(calls: list[Callable[[], Any]]) -> tuple[float, bool]:
    """Microseconds per call (the median of several replays), and whether a graph could be captured."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for call in calls * 2:  # compiles the kernels, and gives the Sampler its own workspace
            call()
    torch.cuda.synchronize()

    def all_of_them() -> None:
        for call in calls:
            call()

    captured = True
    replay: Callable[[], Any] = all_of_them
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_them()
        replay = graph.replay
    except RuntimeError:
        captured = False
        torch.cuda.synchronize()
    replay()
    samples = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return sorted(samples)[REPLAYS // 2], captured


Make = Callable[[Mode, torch.Tensor], Callable[[], Any]]
Differs = Callable[[Mode, torch.Tensor, Callable[[], Any]], str | None]


def contenders() -> dict[str, tuple[Make, Differs, tuple[str, ...]]]:
    """Name -> a function that makes a step for a mode and logits, its gate, and the modes it offers."""
    found: dict[str, tuple[Make, Differs, tuple[str, ...]]] = {}
    probe = torch.zeros(1, 1, device="cuda")
    for name in ("cuda", "triton"):
        if engine(name).why_not(probe) is None:
            found[f"fastsample {name}"] = (
                partial(prepare, backend=name),
                lambda mode, logits, _, name=name: gate.engine_differs(mode, logits, name),
                tuple(BY_NAME),
            )
    for peer in peers.PEERS:
        if "cuda" in peer.devices and peer.why_not() is None:
            found[peer.name] = of_peer(peer)
    return found


def of_peer(peer: peers.Peer) -> tuple[Make, Differs, tuple[str, ...]]:
    return peer.make, partial(peer_differs, peer), peer.modes


def peer_differs(peer: peers.Peer, mode: Mode, logits: torch.Tensor, step: Callable[[], Any]) -> str | None:
    reason = gate.peer_differs(peer, mode.name, logits.device.type)
    return reason or gate.draws_differ(step, mode, logits, peer.fields)


def make_inputs(batch: int, vocab: int, dtype: str) -> list[torch.Tensor]:
    """Alternating logits [batch, vocab]: a few rows of a language model, rolled by different numbers of ids."""
    rows = make_logits("lm", min(batch, 8), vocab, getattr(torch, dtype)).cuda()
    first = torch.cat([rows.roll(977 * i, -1) for i in range(-(-batch // len(rows)))])[:batch].contiguous()
    return [first] + [first.roll(97 * i, -1) for i in range(1, turns(first.nbytes))]


def measure(mode: Mode, inputs: list[torch.Tensor], budget: Budget) -> Iterator[dict[str, Any]]:
    """One result per contender."""
    rows, vocab = inputs[0].shape
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    floor = inputs[0].nbytes / BANDWIDTH * 1e6
    for name, (make, differs, modes) in contenders().items():
        if mode.name not in modes:
            continue
        result = {"mode": mode.name, "rows": rows, "vocab": vocab, "dtype": dtype, "name": name, "floor_us": floor}
        if budget.left < 5:
            yield result | {"skipped": "out of time"}
            continue
        try:
            steps = [make(mode, logits) for logits in inputs]
            reason = differs(mode, inputs[0], steps[0])
            if reason:
                yield result | {"refused": reason}
                continue
            cold, captured = timed(steps)
            hot, _ = timed([steps[0]] * len(steps))
            yield result | {"cold_us": cold, "hot_us": hot, "graph": captured}
        except Exception as error:  # a peer's failure is a result and must not end the run
            yield result | {"skipped": f"{type(error).__name__}: {error}"[:200]}
    torch.cuda.empty_cache()


def machine() -> dict[str, Any]:
    names = ("torch", "triton", "flashinfer-python", "vllm", "fastsample")
    return {
        "gpu": torch.cuda.get_device_name(0),
        "l2_bytes": l2_bytes(),
        "cuda": torch.version.cuda,
        "packages": packages(names),
    }


def table(results: list[dict[str, Any]], title: str) -> Table:
    """A line per mode and shape, a column per contender: cold / hot microseconds."""
    names = list(dict.fromkeys(r["name"] for r in results))
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for r in results:
        cell = "refused" if "refused" in r else "-"
        if "cold_us" in r:
            cell = f"{r['cold_us']:.1f} / {r['hot_us']:.1f}" + ("" if r["graph"] else " *")
        lines.setdefault((r["mode"], r["rows"], r["vocab"], r["dtype"]), {})[r["name"]] = cell
    found = Table("mode", "B", "V", "dtype", *names, title=title, caption="us cold / hot; * without a CUDA graph")
    for key, cells in lines.items():
        found.add_row(*map(str, key), *(cells.get(name, "") for name in names))
    return found


def run(
    minutes: float, tests: bool, batches: list[int], vocabs: list[int], out: Path | None, names: Iterable[str] = NAMES
) -> None:
    """Test, measure, print, and write JSON to `out` after every figure."""
    screen = console()
    if not torch.cuda.is_available():
        screen.print("there is no GPU that torch can use: nothing to measure")
        sys.exit(1)
    budget = Budget(60 * minutes)
    tested = run_tests(budget, screen) if tests else {"passed": None, "summary": "not run"}
    modes = [BY_NAME[name] for name in names]
    results = Results(out, "gpu", machine())
    results.data["tests"] = tested
    try:
        for dtype, vocab, batch in itertools.product(DTYPES, vocabs, batches):
            inputs = make_inputs(batch, vocab, dtype)
            for mode in modes:
                for record in measure(mode, inputs, budget):
                    results.add(record)
    except KeyboardInterrupt:
        screen.print("interrupted: what was measured is kept")
    verdict = {True: "", None: " - NOT TESTED", False: " - TESTS FAILED: these times mean nothing"}[tested["passed"]]
    screen.print(table(results.records, f"{torch.cuda.get_device_name(0)}, fastsample {fs.__version__}{verdict}"))
    for r in results.records:
        if "refused" in r:
            screen.print(f"REFUSED, no figure: {r['name']}, {r['mode']}: {r['refused']}", markup=False, style="red")
    if out is not None:
        screen.print(f"written: {out}", markup=False)
    if tested["passed"] is False:
        sys.exit(1)
