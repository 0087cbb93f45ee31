"""pytest-benchmark suite of the engines that run here: `pytest bench --benchmark-only -k 'B1-V128256 and lm'`."""

from __future__ import annotations

import pytest
import torch

import fastsample as fs
from bench import gate
from bench.modes import MODES, make_logits, prepare

ENGINES = [name for name, reason in fs.engines().items() if reason is None]
VOCABS = (32_000, 50_257, 128_256, 151_936, 262_144)
BATCHES = (1, 8, 32, 64, 256)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
REFERENCE = 2**21  # logits: the reference is timed only up to here, it is no contender


def shapes(engine: str) -> list[tuple[int, int]]:
    most = REFERENCE if engine == "reference" else BATCHES[-1] * VOCABS[-1]
    return [(rows, vocab) for vocab in VOCABS for rows in BATCHES if rows * vocab <= most]


CASES = [
    pytest.param(rows, vocab, dtype, logits, mode, engine, id=f"B{rows}-V{vocab}-{dtype}-{logits}-{mode.name}-{engine}")
    for engine in ENGINES
    for rows, vocab in shapes(engine)
    for dtype in DTYPES
    for logits in ("lm", "flat", "peaked")  # one input's modes follow each other, so it is made once
    for mode in MODES
]


@pytest.mark.parametrize(("rows", "vocab", "dtype", "logits", "mode", "engine"), CASES)
def test_step(benchmark, rows, vocab, dtype, logits, mode, engine):
    device = "cuda" if engine in ("cuda", "triton") else "cpu"
    x = make_logits(logits, rows, vocab, DTYPES[dtype]).to(device)
    if engine != "reference":  # correct first, then timed
        assert gate.engine_differs(mode, x, engine) is None
    step = prepare(mode, x, engine)

    def finished() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{mode.name}, B = {rows}, V = {vocab}, {dtype}, {logits}"
    small = rows * vocab <= 2**18 and engine != "reference"
    benchmark.pedantic(finished, rounds=5, iterations=20 if small else 2, warmup_rounds=1)
