"""`python -m bench ranks`: rows over ranks against gathering the logits and then sampling, with Gloo on one machine."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import fastsample as fs
from bench.modes import make_logits
from bench.record import machine
from bench.timing import duration, three_digits
from fastsample.distributed import Split
from fastsample.distributed.wire import all_gather

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "k50 p.95": {"top_k": 50, "top_p": 0.95},
    "min-p .05": {"min_p": 0.05},
    "p.95": {"top_p": 0.95},
    "epsilon 3e-4": {"epsilon_cutoff": 3e-4},
    "typical .9": {"typical_p": 0.9},
    "T = 1": {},
    "T = 1, raw": {"logprobs": "raw"},
    "T = 1, processed": {"logprobs": "processed"},
    "p.95, reports": {"top_p": 0.95, "logprobs": "processed", "kept": "count", "entropy": True},
    "p.95, typical .9": {"top_p": 0.95, "typical_p": 0.9},
    "p.95, penalty, raw": {"top_p": 0.95, "repetition_penalty": 1.1, "logprobs": "raw"},
    "typical .9, DRY, raw": {"typical_p": 0.9, "dry_multiplier": 0.8, "logprobs": "raw"},
}
HISTORIES = {"repetition_penalty": 64, "dry_multiplier": 512}
"""How many ids each row has, where a mode looks at them."""


def run(vocab: int, batches: Iterable[int], ranks: int, logits: str, dtype: str, seconds: float) -> None:
    """Steps of both in turns, on ranks that start together; medians on the first rank."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, os.path.join(folder, "store"), theirs, vocab, tuple(batches), logits, dtype, seconds)
        processes = [spawn.Process(target=_rank, args=(rank, *given)) for rank in range(ranks)]
        for process in processes:
            process.start()
        theirs.close()
        where = machine()
        title = f"V = {vocab:,} over {ranks} ranks, {logits} {dtype} logits, Gloo, {where['isa']}, {where['cpu']}"
        table = Table("B", "mode", "gather, then sample", "split", "ratio", "rounds", "bytes a row", title=title)
        try:
            while (row := ours.recv()) is not None:
                table.add_row(*row)
        finally:
            for process in processes:
                process.kill()
                process.join()
    Console(width=120).print(table)


def _rank(
    rank: int,
    ranks: int,
    store: str,
    report: Connection,
    vocab: int,
    batches: tuple[int, ...],
    logits: str,
    dtype: str,
    seconds: float,
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    fs.set_num_threads(1)
    width = -(-vocab // ranks)
    for batch in batches:
        rows = torch.nn.functional.pad(
            make_logits(logits, batch, vocab, getattr(torch, dtype)), (0, ranks * width - vocab)
        )
        own = rows[:, rank * width : (rank + 1) * width].contiguous()
        split = Split(rank * width, vocab)
        for name, fields in MODES.items():
            for ids in (ids for field, ids in HISTORIES.items() if field in fields):
                apart = torch.arange(ids) * max(1, vocab // ids) % vocab  # so that all ranks have some of them
                fields = fields | {"output_ids": apart.expand(batch, ids)}
            steps = partial(_gathered, own, vocab, fields), partial(_split, split, own, fields)
            assert torch.equal(*(step().tokens for step in steps))
            before = split.rounds, split.sent
            steps[1]()
            rounds, sent = split.rounds - before[0], split.sent - before[1]
            times = _in_turns(steps, seconds)
            if rank == 0:
                shown = (duration(three_digits(1e6 * float(t))) for t in np.median(times, axis=0))
                ratio = float(np.median(times[:, 0] / times[:, 1]))
                report.send((str(batch), name, *shown, f"{ratio:.2f}x", str(rounds), f"{sent / batch:,.0f}"))
    dist.barrier()
    if rank == 0:
        report.send(None)
    os._exit(0)  # a thread of Gloo's that still frees a tensor would abort while the interpreter ends


def _gathered(own: torch.Tensor, vocab: int, fields: dict[str, Any]) -> fs.SampleOutput:
    found = own.new_empty(dist.get_world_size(), *own.shape)
    all_gather(found.view(-1), own.view(-1))
    return fs.sample(found.transpose(0, 1).reshape(len(own), -1)[:, :vocab], seed=1, **fields)


def _split(split: Split, own: torch.Tensor, fields: dict[str, Any]) -> fs.SampleOutput:
    return fs.sample(split.whole(own), seed=1, backend=split.engine, **fields)  # type: ignore[arg-type]


def _in_turns(steps: tuple[Callable[[], Any], ...], seconds: float) -> np.ndarray[Any, Any]:
    """Seconds of each step [n, steps]; all ranks begin each one together, and the first says when it is enough."""
    times: list[list[float]] = []
    start, more = perf_counter(), torch.ones(1)
    while more:
        row = []
        for step in steps:
            dist.barrier()
            begun = perf_counter()
            step()
            row.append(perf_counter() - begun)
        times.append(row)
        more[0] = float(perf_counter() - start < seconds or len(times) < 3)
        dist.broadcast(more, 0)
    return np.array(times)
