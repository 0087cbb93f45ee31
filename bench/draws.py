"""`python -m bench draws`: many draws of a row, against softmax and torch.multinomial with replacement."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.table import Table

import fastsample as fs
from bench.modes import make_logits
from bench.record import machine
from bench.timing import duration, factor, in_turns, three_digits


def run(vocabs: Iterable[int], counts: Iterable[int], rows: int, threads: int, seconds: float) -> None:
    """Alternate both in one process, for each vocabulary and number of draws; medians and their ratio."""
    torch.set_num_threads(threads)
    fs.set_num_threads(threads)
    where = machine()
    title = f"B = {rows}, flat float32 logits, {where['isa']}, {threads} thread(s), {where['cpu']}"
    table = Table("V", "draws", "fastsample", "torch.multinomial", "times ours", title=title)
    for vocab in vocabs:
        logits = make_logits("flat", rows, vocab, torch.float32)
        for count in counts:
            pairs = in_turns(
                lambda x=logits, n=count: fs.sample(x, seed=1, num_samples=n),
                lambda x=logits, n=count: torch.multinomial(torch.softmax(x, -1), n, replacement=True),
                seconds,
            )
            own, its = (three_digits(1e6 * statistics.median(times)) for times in zip(*pairs, strict=True))
            table.add_row(f"{vocab:,}", f"{count:,}", duration(own), duration(its), factor(its / own))
    Console(width=120).print(table)
