"""`python -m bench grammar`: a grammar's mask inside the fused pass, against applying it separately."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fastsample as fs
from bench.modes import make_logits
from bench.record import machine

FIELDS = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}


def make_mask(rows: int, vocab: int, share: float) -> torch.Tensor:
    """Random mask words, int32 [rows, words]; each bit is 1 with this probability."""
    bits = torch.rand(rows, (vocab + 31) // 32, 32, generator=torch.Generator().manual_seed(5)) < share
    return (bits.int() << torch.arange(32, dtype=torch.int32)).sum(-1).to(torch.int32)


def unpack(mask: torch.Tensor, vocab: int) -> torch.Tensor:
    """Which tokens are forbidden, bool [rows, vocab]."""
    return ((mask[:, :, None] >> torch.arange(32, dtype=torch.int32)) & 1).reshape(len(mask), -1)[:, :vocab] == 0


def ways(logits: torch.Tensor, mask: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Steps that draw the same tokens, and finally one without a mask."""
    rows, vocab = logits.shape
    fused, apart, ready, plain = (fs.Sampler(batch_size=rows, seed=1, on_invalid="flag", **FIELDS) for _ in range(4))
    forbidden = unpack(mask, vocab)
    steps: dict[str, Callable[[], Any]] = {
        "fused": lambda: fused(logits, bitmask=mask),
        "unpack, masked_fill, sample": lambda: apart(logits.masked_fill(unpack(mask, vocab), -torch.inf)),
        "masked_fill, sample": lambda: ready(logits.masked_fill(forbidden, -torch.inf)),
    }
    try:
        from xgrammar import apply_token_bitmask_inplace
    except ImportError:
        pass
    else:
        peer = fs.Sampler(batch_size=rows, seed=1, on_invalid="flag", **FIELDS)
        copy = logits.clone()

        def applied() -> Any:
            apply_token_bitmask_inplace(copy.copy_(logits), mask)
            return peer(copy)

        steps["xgrammar's kernel, sample"] = applied
    first = [step().tokens for step in steps.values()]
    assert all(torch.equal(tokens, first[0]) for tokens in first)
    return steps | {"no mask": lambda: plain(logits)}


def run(vocab: int, batch_sizes: Iterable[int], threads: int, seconds: float) -> None:
    """Alternate the ways in one process; medians, and the median of the ratios to the fused step round by round."""
    torch.set_num_threads(threads)
    fs.set_num_threads(threads)
    where = machine()
    title = f"V = {vocab}, float32, {where['isa']}, {threads} thread(s), {where['cpu']}"
    table = Table("B", "allowed", "step", "us", "ratio to fused", title=title)
    for rows in batch_sizes:
        for share in (0.5, 0.0005):
            steps = ways(make_logits("flat", rows, vocab, torch.float32), make_mask(rows, vocab, share))
            times: dict[str, list[float]] = {name: [] for name in steps}
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or len(times["fused"]) < 5:
                for name, step in steps.items():
                    start = time.perf_counter()
                    step()
                    times[name].append(time.perf_counter() - start)
            for name, taken in times.items():
                ratio = statistics.median(t / f for t, f in zip(taken, times["fused"], strict=True))
                table.add_row(str(rows), f"{share:.2%}", name, f"{statistics.median(taken) * 1e6:.0f}", f"{ratio:.2f}")
    Console(width=120).print(table)
