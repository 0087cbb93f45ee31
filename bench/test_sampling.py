"""pytest-benchmark suite of the engines that run here: `pytest bench --benchmark-only`."""

import pytest
import torch

import fastsample as fs
from bench.modes import MODES, make_logits, prepare

ENGINES = [name for name, reason in fs.engines().items() if reason is None]
SIZES = [(1, 32_000), (1, 128_256), (8, 128_256)]


@pytest.mark.parametrize("logits", ["flat", "lm", "peaked"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize(("rows", "vocab"), SIZES)
@pytest.mark.parametrize("engine", ENGINES)
def test_step(benchmark, engine, rows, vocab, mode, logits):
    x = make_logits(logits, rows, vocab, torch.float32)
    step = prepare(mode, x, engine)
    tokens = step().tokens
    expected = fs.probabilities(x, **mode.fields) if not mode.extras else None
    if expected is not None:  # what is timed must be right first
        assert bool((expected.gather(1, tokens.view(rows, -1)) > 0).all())
    benchmark.group = f"{mode.name}, B = {rows}, V = {vocab}, {logits}"
    benchmark.pedantic(step, rounds=5, iterations=1 if engine == "reference" else 20, warmup_rounds=1)
