"""A call that repeats another costs less Python. Nothing else about it is different."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample import repeats
from fastsample.backends import Outputs, engine

PLAIN: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(fields: dict[str, Any], rows: int) -> dict[str, Any]:
    """The same parameters with a value per row: a call with those never repeats."""
    return {name: [value] * rows for name, value in fields.items()}


@pytest.fixture(autouse=True)
def _a_fresh_store() -> None:
    repeats.forget()


@pytest.mark.parametrize("wanted", [{}, {"num_samples": 3}, {"logprobs": "processed", "top_logprobs": 4}], ids=str)
@pytest.mark.parametrize("shape", [(50,), (1, 50), (4, 50)], ids=str)
def test_a_repeat_gives_what_a_first_call_gives(shape: tuple[int, ...], wanted: dict[str, Any], variant: str) -> None:
    rows = shape[0] if len(shape) > 1 else 1
    alone = spread(PLAIN, rows)
    more: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 1, "offset": 3},
        {"seed": 2**64 - 1, "offset": 2**64 - 1},
        {"seed": -5},
        {"seed": np.int64(6), "offset": np.int64(2)},
        {"seed": list(range(rows)), "offset": torch.arange(rows)},
        {"seed": 1, "bitmask": torch.full((2,), 0x0F0F0F0F, dtype=torch.int32)},
        {"seed": 1, "bias": {3: 9.0}, "allowed_ids": [3, 4, 5], "output_ids": [[1]] * rows, "presence_penalty": 1.0},
        {"seed": 1},
    ]
    for turn, given in enumerate(more * 2):
        x = logits(*shape, seed=turn)
        known = fs.sample(x, **PLAIN, **wanted, **given, backend=variant)
        assert known == fs.sample(x, **{**alone, **wanted, **given}, backend=variant)
        given = {name: value for name, value in given.items() if name not in ("seed", "offset")}
        for call in (fs.filter_logits, fs.probabilities):
            assert torch.equal(call(x, **PLAIN, **given), call(x, **{**alone, **given}))


def test_other_logits_in_between() -> None:
    shapes = [(1, 50), (3, 50), (50,), (2, 3, 50), (1, 9), (0, 50), (repeats.SMALL + 1, 2), (3, 50)]
    for turn, shape in enumerate(shapes * 2):
        for x in (logits(*shape, seed=turn), logits(*shape).half(), logits(*shape, 2)[..., 0].contiguous()):
            rows = x.numel() // x.shape[-1]
            alone = spread(PLAIN, rows)
            assert fs.sample(x, **PLAIN, seed=turn) == fs.sample(x, **alone, seed=turn)
            assert torch.equal(fs.filter_logits(x, **PLAIN), fs.filter_logits(x, **alone))


def test_params_repeat_too() -> None:
    params, x = fs.SamplingParams(**PLAIN), logits(2, 50)
    for turn in range(4):
        assert fs.sample(x, params, seed=turn) == fs.sample(x, **spread(PLAIN, 2), seed=turn)
        want = fs.sample(x, **spread({**PLAIN, "top_k": 3}, 2), seed=turn)
        assert fs.sample(x, params, top_k=3, seed=turn) == want


def test_fresh_seeds_are_those_of_torchs_generator() -> None:
    x = torch.zeros(2, 50)
    torch.manual_seed(3)
    want = [fs.sample(x, temperature=[1.0, 1.0]) for _ in range(4)]
    torch.manual_seed(3)
    assert [fs.sample(x) for _ in range(4)] == want


def test_equal_is_not_the_same() -> None:
    """1 == 1.0 == True, and only one of them is a number of samples."""
    x = logits(1, 50)
    for _ in range(2):
        fs.sample(x, top_k=1, num_samples=1, seed=1)
    for bad in ({"num_samples": True}, {"num_samples": 1.0}, {"num_samples": [1]}, {"top_logprobs": False}):
        with pytest.raises(TypeError):
            fs.sample(x, **{"top_k": 1, "num_samples": 1, **bad}, seed=1)
    for bad in ({"top_k": 1.0}, {"top_k": True}, {"top_k": "1"}):
        with pytest.raises(TypeError):
            fs.sample(x, **bad, num_samples=1, seed=1)
    with pytest.raises(ValueError, match="backend"):
        fs.sample(x, top_k=1, backend=["cpu"], seed=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"seed": 2**64}, "seed = 18446744073709551616"),
        ({"offset": -1}, "offset = -1"),
        ({"offset": 2**64}, "offset = 18446744073709551616"),
        ({"seed": True}, "seed"),
        ({"bitmask": torch.zeros(5, 2, dtype=torch.int32)}, "bitmask"),
    ],
    ids=str,
)
def test_errors_of_a_repeat(bad: dict[str, Any], words: str) -> None:
    x = logits(2, 50)
    want = fs.sample(x, **PLAIN, seed=1)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=f"^{words}"):
            fs.sample(x, **PLAIN, **{"seed": 1, **bad})
        with pytest.raises(ValueError, match="row 1 has a NaN logit"):
            fs.sample(x * torch.tensor([[1], [torch.nan]]), **PLAIN, seed=1)
        with pytest.raises(ValueError, match="expected at most V = 2"):
            fs.sample(x[:, :2], **PLAIN, logprobs="raw", top_logprobs=3)
        for _ in range(3):
            assert fs.sample(x, **PLAIN, seed=1) == want


def test_the_engine_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("cpu", "reference"):
        found = engine(name)

        def run(*arguments: Any, found: Any = found, run: Callable[..., Any] = found.run) -> Any:
            used.append(found.name)
            return run(*arguments)

        monkeypatch.setattr(found, "run", run)
    x = logits(1, 50)

    def call() -> str:
        for _ in range(3):
            fs.sample(x, **PLAIN, seed=1), fs.filter_logits(x, **PLAIN)
        (name,) = set(used)
        used.clear()
        return name

    monkeypatch.delenv("FASTSAMPLE_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert call() == "cpu"
    monkeypatch.setenv("FASTSAMPLE_BACKEND", "reference")
    assert call() == "reference"
    with monkeypatch.context() as inner:
        inner.setattr(os, "environ", {**os.environ, "FASTSAMPLE_BACKEND": "cpu"})
        assert call() == "cpu"
    monkeypatch.setenv("FASTSAMPLE_BACKEND", "abacus")
    with pytest.raises(ValueError, match="FASTSAMPLE_BACKEND = 'abacus'"):
        fs.sample(x, **PLAIN, seed=1)
    monkeypatch.delenv("FASTSAMPLE_BACKEND")
    assert call() == "cpu"


def test_nothing_of_a_callers_is_kept() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def call() -> None:
        x, mask = logits(2, 50), torch.full((2, 2), -1, dtype=torch.int32)
        seeds, out = torch.arange(2), fs.sample(x, **PLAIN, logprobs="raw")
        given: list[dict[str, Any]] = [{"seed": 1}, {"seed": seeds}, {"bitmask": mask}, {"out": out}, {}]
        found = [fs.sample(x, **PLAIN, logprobs="raw", **more) for more in given]
        full = [torch.empty(2, 50), fs.filter_logits(x, **PLAIN)]
        fs.filter_logits(x, **PLAIN, out=full[0], bitmask=mask)
        outputs = [getattr(o, name) for o in (out, *found) for name in ("tokens", "status", "logprobs", "ranks")]
        negative = torch._neg_view(x)
        fs.sample(negative, **PLAIN), fs.filter_logits(negative, **PLAIN)
        kept.extend(map(weakref.ref, (x, negative, mask, seeds, *full, *outputs)))

    for _ in range(3):
        call()
    assert [ref() for ref in kept] == [None] * len(kept)


def test_results_are_not_written_to_again() -> None:
    x = logits(2, 50)
    outs = [fs.sample(x, **PLAIN, seed=i) for i in range(5)]
    full = [fs.filter_logits(x + i, **PLAIN) for i in range(5)]
    assert len({out.tokens.data_ptr() for out in outs} | {out.status.data_ptr() for out in outs}) == 10
    for i in range(5):
        assert outs[i] == fs.sample(x, **spread(PLAIN, 2), seed=i)
        assert torch.equal(full[i], fs.filter_logits(x + i, **spread(PLAIN, 2)))


def test_threads_share_nothing() -> None:
    x = logits(2, 5000)
    want = [fs.sample(x, **spread(PLAIN, 2), seed=i, offset=i) for i in range(50)]

    def calls(thread: int) -> bool:
        return all(fs.sample(x, **PLAIN, seed=i, offset=i) == want[i] for i in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(calls, range(8)))


def test_a_call_inside_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a signal's handler: both have seeds of their own."""
    x, found = logits(2, 50), engine("cpu")
    run, depth = found.run, [0]

    def nested(table: torch.Tensor, rows: Any, out: Outputs) -> Any:
        depth[0] += 1
        if depth[0] == 1:
            fs.sample(x, **PLAIN, seed=99, offset=7, backend="cpu")
        depth[0] -= 1
        return run(table, rows, out)

    want = [fs.sample(x, **spread(PLAIN, 2), seed=i, offset=i) for i in range(4)]
    monkeypatch.setattr(found, "run", nested)
    assert [fs.sample(x, **PLAIN, seed=i, offset=i, backend="cpu") for i in range(4)] == want


def test_the_store_does_not_grow() -> None:
    x = logits(1, 50)
    for i in range(3 * repeats.LIMIT):
        fs.sample(x, temperature=0.5 + i / 1000, seed=1)
        assert len(repeats._store.repeats) <= repeats.LIMIT
