"""Probabilities as input on every instruction set: equal to the reference, to the bit."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from cases import DTYPES
from conformance import assert_agree, named
from probs import MAKERS, SETS, allowed, finish, invalid_probs, softmax

import fastsample as fs

pytestmark = pytest.mark.usefixtures("remembered")

Tensor = torch.Tensor


def check(p: Tensor, variant: str, **kwargs: Any) -> None:
    """Every output of an engine and of the reference."""
    rows, vocab = p.shape
    seeds = torch.arange(rows) - 2
    for mode, draws in ((None, 1), (None, 20), ("raw", 3), ("raw", 300), ("processed", 3), ("processed", 300)):
        more: dict[str, Any] = {"num_samples": draws, "logprobs": mode, "top_logprobs": min(9, vocab) if mode else 0}
        more |= {"seed": seeds, "offset": 3, "input": "probs", "on_invalid": "flag", **kwargs}
        assert_agree(*(named(fs.sample(p, backend=backend, **more)) for backend in (variant, "reference")))
    more = {"input": "probs", "on_invalid": "flag", **kwargs}
    got, want = (fs.probabilities(p, backend=backend, **more) for backend in (variant, "reference"))
    assert_agree({"probabilities": got}, {"probabilities": want})


@pytest.mark.parametrize("fields", SETS)
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_equals_the_reference(maker: Any, fields: str, variant: str) -> None:
    number = MAKERS.index(maker) * len(SETS) + list(SETS).index(fields)
    vocab = (1, 2, 17, 64, 100, 257, 1000, 1025, 2049, 4099)[number % 10]
    dtype = list(DTYPES.values())[number % 3]
    g = torch.Generator().manual_seed(number)
    check(finish(maker(5, vocab, g), dtype), variant, **SETS[fields])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("fields", ["plain", "greedy", "k-p", "m", "epsilon", "xtc"])
def test_masks(fields: str, dtype: torch.dtype, variant: str) -> None:
    """What is not allowed has no probability, whatever the row says of it."""
    g = torch.Generator().manual_seed(5)
    p = finish(softmax(5, 1000, g), dtype)
    words = torch.randint(-(2**31), 2**31, (5, 32), generator=g).to(torch.int32)
    words[1, :16], words[2, 16:], words[3] = 0, -1, 0
    p[0, ~allowed(words, 1000)[0]] = torch.nan
    p[4, ~allowed(words, 1000)[4]] = -1.0
    check(p, variant, bitmask=words, **SETS[fields])
    check(p, variant, bitmask=words[:, :9], **SETS[fields])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("vocab", [3, 300, 1030])
def test_invalid_rows(vocab: int, dtype: torch.dtype, variant: str) -> None:
    rows = invalid_probs(vocab, dtype)
    for fields in ({}, {"temperature": 0.0}, {"top_p": 0.9}):
        check(rows, variant, **fields)


LARGE = ((torch.float32, 128256), (torch.bfloat16, 2**20), (torch.float16, 50257))
LARGE_SETS: tuple[dict[str, Any], ...] = (
    *({}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.01}),
    *({"epsilon_cutoff": 1e-4}, {"p_less": True}),
)


def of_large(size: int, fields: int, backend: str) -> dict[str, Tensor]:
    dtype, vocab = LARGE[size]
    p = finish(softmax(2, vocab, torch.Generator().manual_seed(vocab)), dtype)
    more: dict[str, Any] = {"seed": 3, "input": "probs", "num_samples": 2, "logprobs": "processed"}
    return named(fs.sample(p, backend=backend, **more, **LARGE_SETS[fields]))


of_large_by_reference = cache(partial(of_large, backend="reference"))


@pytest.mark.parametrize("size", range(len(LARGE)), ids=lambda size: f"V{LARGE[size][1]}")
def test_large(size: int, variant: str) -> None:
    for fields in range(len(LARGE_SETS)):
        assert_agree(of_large(size, fields, variant), of_large_by_reference(size, fields))
