"""`python -m bench rows`: are the rows that the benchmarks make up like those of a model?

The maker `lm` of tests/support/cases.py against the recorded rows of bench/data, at the same vocabulary: the shape of
the distribution at temperature 1, and the time of each mode for one row, in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from rich.table import Table

import fastsample as fs
from bench import recorded
from bench.models import MODELS
from bench.modes import MODES, Mode, make_logits, prepare
from bench.record import Record, Results, console, machine
from bench.timing import Others, in_turns, spread

Tensor = torch.Tensor


def kept(**fields: Any) -> Callable[[Tensor], Tensor]:
    """How many tokens a filter keeps in each row [R]."""
    return lambda rows: fs.sample(rows, seed=0, kept="count", **fields).kept_count


def mass_of_50(rows: Tensor) -> Tensor:
    return fs.sample(rows, seed=0, top_k=50, kept_mass=True).log_kept_mass.exp()


SHAPE: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy, nats": lambda rows: fs.sample(rows, seed=0, entropy=True).entropy,
    "kept by top-p 0.9": kept(top_p=0.9),
    "kept by top-p 0.95": kept(top_p=0.95),
    "kept by min-p 0.05": kept(min_p=0.05),
    "mass of the first 50": mass_of_50,
    "from the maximum to the median": lambda rows: rows.amax(1) - rows.median(1).values,
    "standard deviation": lambda rows: rows.std(1),
}
"""What is compared of rows [R, V] in float32: a figure for each row [R]."""


def times(mode: Mode, ours: Tensor, made_up: Tensor, seconds: float) -> Record:
    """Microseconds for one recorded row and for one that was made up, in turns, over all rows; and their ratio."""
    others, found = Others(), []
    for real, fake in zip(ours.split(1), made_up.split(1), strict=True):
        pairs = in_turns(prepare(mode, real, "cpu"), prepare(mode, fake, "cpu"), seconds / len(ours))
        found.append(np.median(pairs, axis=0) * 1e6)
    us, lm_us = (spread(column) | {"max": round(float(column.max()), 2)} for column in np.transpose(found))
    ratio = round(us["median"] / lm_us["median"], 3)
    return {"mode": mode.name, "us": us, "lm_us": lm_us, "ratio": ratio, "others": others.cores()}


def tables(results: list[Record], title: str) -> tuple[Table, Table]:
    shape = Table("of a row", "recorded", "p10 - p90", "lm", "p10 - p90", title=f"{title}: shape at temperature 1")
    each = ("p10 - p90", "slowest")
    speed = Table("mode", "recorded", *each, "lm", *each, "recorded / lm", title=f"{title}: us for a row")
    for r in results:
        if "of" in r:
            shape.add_row(r["of"], *cells(r["recorded"], ".4g"), *cells(r["lm"], ".4g"))
        else:
            speed.add_row(r["mode"], *cells(r["us"], ".1f"), *cells(r["lm_us"], ".1f"), f"{r['ratio']:.2f}")
    return shape, speed


def cells(figure: dict[str, float], style: str) -> list[str]:
    low, middle, high, *most = (f"{figure[q]:{style}}" for q in ("p10", "median", "p90", "max") if q in figure)
    return [middle, f"{low} - {high}", *most]


def run(dtype: str, count: int | None, seconds: float, threads: int, out: Path | None) -> int:
    """Measure, print, write JSON."""
    torch.set_num_threads(threads)
    fs.set_num_threads(threads)
    real = recorded.rows()[:count].to(getattr(torch, dtype))
    lm = make_logits("lm", *real.shape, real.dtype)
    where, screen = machine(), console()
    results = Results(out, "rows", where)
    place = {"rows": len(real), "vocab": real.shape[1], "dtype": dtype, "threads": threads}
    for name, figure in SHAPE.items():
        mine, made_up = (spread(figure(rows.float()).double(), 4) for rows in (real, lm))
        results.add({"of": name, **place, "recorded": mine, "lm": made_up})
    for mode in track(MODES, "measuring", console=screen, transient=True):
        results.add({**place, **times(mode, real, lm, seconds)})
    title = f"{len(real)} rows, V = {real.shape[1]:,}, {dtype}"
    for table in tables(results.records, title):
        screen.print(table)
    screen.print(f"lm: the maker of tests/support/cases.py. {where['isa']}, {threads} thread(s), {where['cpu']}.")
    if out is not None:
        screen.print(f"written: {out}", markup=False)
    return 0


def record() -> int:
    """Make the recorded rows anew, which needs the model."""
    model, tokenizer = MODELS["smollm2"]()
    written = recorded.record(model, tokenizer)
    size = (recorded.DATA / recorded.ROWS).stat().st_size
    console().print(f"written: {written} rows, {size / 1e6:.1f} MB, in {recorded.DATA}", markup=False)
    return 0
