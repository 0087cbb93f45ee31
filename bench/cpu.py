"""The CPU engine against one read of the row: `python -m bench cpu`, with the target of each mode.

Each mode alternates with torch.amax over the same logits, or with another mode that tells what its filter adds, in one
process. Both times include Python's share.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

import fastsample as fs
from bench import gate
from bench.modes import BY_NAME, MODES, SAMPLERS, Mode, make_logits, prepare
from bench.record import Record, Results, console, machine
from bench.summary import AMAX, disturbed
from bench.timing import Others, in_turns, spread


def measure(mode: Mode, logits: torch.Tensor, budget: float) -> dict[str, Any]:
    """Microseconds per step, those of its contender, and the ratio turn by turn; or the reason why there is none."""
    own = [mode, *([BY_NAME[mode.beside]] if mode.beside else [])]
    reason = next(filter(None, (gate.engine_differs(each, logits, "cpu") for each in own)), None)
    if reason:
        return {"refused": reason}
    steps = [prepare(each, logits, "cpu") for each in own]
    others = Others()
    pairs = in_turns(steps[0], steps[1] if mode.beside else lambda: torch.amax(logits, -1), budget)
    return {
        **({"against": mode.beside} if mode.beside else {}),
        "us": spread([1e6 * a for a, _ in pairs]),
        "against_us": spread([1e6 * b for _, b in pairs]),
        "ratio": spread([a / b for a, b in pairs], 3),
        "limit": mode.limits and mode.limits[0 if logits.shape[0] == 1 else 1],
        "turns": len(pairs),
        "others": others.cores(),
    }


def table(records: list[Record], title: str) -> Table:
    found = Table("mode", "B", "us / step", "against", "its us", "ratio", "p10 - p90", "aimed at", title=title)
    for r in records:
        if "refused" in r:
            found.add_row(r["mode"], str(r["rows"]), f"REFUSED: {r['refused']}", style="red")
            continue
        ratio, limit = r["ratio"], r["limit"]
        its = (r.get("against", AMAX), f"{r['against_us']['median']:.1f}")
        figures = (f"{r['us']['median']:.1f}", *its, f"{ratio['median']:.2f}")
        found.add_row(
            *(r["mode"], str(r["rows"]), *figures, f"{ratio['p10']:.2f} - {ratio['p90']:.2f}"),
            "" if limit is None else f"<= {limit:g}",
            style="red" if limit is not None and ratio["median"] > limit else None,
        )
    return found


def run(
    logits: str,
    vocab: int,
    batch_sizes: Iterable[int],
    dtype: str,
    threads: int,
    budget: float,
    out: Path | None,
    names: Iterable[str] = (),
) -> int:
    """Measure every mode, or these; print a table, write it to `out` as JSON. The exit status is 1 after a refusal."""
    torch.set_num_threads(threads)
    fs.set_num_threads(threads)
    where, screen = machine(), console()
    results = Results(out, "cpu", where)
    modes = [BY_NAME[name] for name in names] or [*MODES, *SAMPLERS]
    work = [(mode, rows) for rows in batch_sizes for mode in modes]
    try:
        for mode, rows in track(work, "measuring", console=screen, transient=True):
            x = make_logits(logits, rows, vocab, getattr(torch, dtype))
            place = {"mode": mode.name, "logits": logits, "rows": rows, "vocab": vocab, "dtype": dtype}
            results.add(place | {"threads": threads} | measure(mode, x, budget))
    except KeyboardInterrupt:
        screen.print("interrupted: what was measured is kept")
    title = f"{logits} logits, V = {vocab}, {dtype}, {where['isa']}, {threads} thread(s), {where['cpu']}"
    screen.print(table(results.records, title))
    for line in disturbed(results.records):
        screen.print(line, markup=False)
    if out is not None:
        screen.print(f"written: {out}", markup=False)
    return int(any("refused" in r for r in results.records))
