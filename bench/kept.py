"""`python -m bench kept`: what it costs to report kept sets, their mass and the entropy beside the tokens."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import fastsample as fs
from bench.modes import make_logits
from bench.record import machine
from bench.timing import duration, rounds, three_digits

MODES: dict[str, dict[str, Any]] = {
    "k50 p.95": {"top_k": 50, "top_p": 0.95},
    "min-p .05": {"min_p": 0.05},
    "p.95": {"top_p": 0.95},
}
ASKED: dict[str, dict[str, Any]] = {
    "count": {"kept": "count"},
    "ids": {"kept": "ids"},
    "bitmask": {"kept": "bitmask"},
    "kept mass": {"kept_mass": True},
    "entropy": {"entropy": True},
}


def run(vocab: int, batches: Iterable[int], logits: str, dtype: str, threads: int, seconds: float) -> None:
    """Steps of a Sampler in turns: without reports, and with each; medians of the ratios."""
    torch.set_num_threads(threads)
    fs.set_num_threads(threads)
    where = machine()
    title = f"V = {vocab:,}, {logits} {dtype} logits, {where['isa']}, {threads} thread(s), {where['cpu']}"
    table = Table("B", "mode", "tokens kept", "step", *(f"{name}" for name in ASKED), title=title)
    for batch in batches:
        rows = make_logits(logits, batch, vocab, getattr(torch, dtype))
        for mode, fields in MODES.items():
            samplers = [fs.Sampler(batch_size=batch, seed=1, **fields, **more) for more in ({}, *ASKED.values())]
            steps = [partial(sampler, rows) for sampler in samplers]
            times = np.array(rounds(steps, seconds))
            ratios = np.median(times[:, 1:] / times[:, :1], axis=0)
            kept = samplers[1](rows).kept_count
            assert kept is not None
            step = duration(three_digits(1e6 * float(np.median(times[:, 0]))))
            table.add_row(str(batch), mode, f"{float(kept.double().mean()):,.0f}", step, *(f"{r:.2f}x" for r in ratios))
    Console(width=120).print(table)
