"""Kept sets and bans against transformers' own processors, on random rows.

They compute in float32. Whoever differs from the definition in float64 (tests/support/definitions.py) may do so only in
tokens that lie next to a filter's edge.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import MAKERS
from definitions import Judged, judge
from transformers.generation import logits_process as lp

import fastsample as fs

BACKEND = "reference"  # the engines equal it to the bit
SEQUENCE = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")  # generate's order
WARPERS = {
    "temperature": lp.TemperatureLogitsWarper,
    "top_k": lp.TopKLogitsWarper,
    "top_p": lp.TopPLogitsWarper,
    "min_p": lp.MinPLogitsWarper,
    "typical_p": lp.TypicalLogitsWarper,
    "epsilon_cutoff": lp.EpsilonLogitsWarper,
    "eta_cutoff": lp.EtaLogitsWarper,
}


def random_rows(rows: int, vocab: int, kind: str) -> torch.Tensor:
    """float32 [rows, vocab]: like a language model's, or normal of some scale."""
    g = torch.Generator().manual_seed(vocab)
    return MAKERS["lm"](rows, vocab, g) if kind == "lm" else torch.randn(rows, vocab, generator=g) * float(kind)


KINDS = ["lm", "0.5", "2", "8"]
SHAPES = [
    *((64, vocab, kind) for vocab in (50, 1000) for kind in KINDS),
    (4, 32000, "lm"),
    *(pytest.param(8, 32000, kind, marks=pytest.mark.slow) for kind in KINDS[1:]),
]


def theirs(x: torch.Tensor, fields: dict[str, Any]) -> np.ndarray:
    """What transformers keeps, bool [rows, vocab]."""
    for name in ("temperature", *SEQUENCE):
        if name in fields:
            x = WARPERS[name](fields[name])(torch.zeros(len(x), 1, dtype=torch.int64), x)
    return (x > -torch.inf).numpy()


def ours(x: torch.Tensor, fields: dict[str, Any], **inputs: Any) -> np.ndarray:
    return (fs.filter_logits(x, ties="all", backend=BACKEND, **fields, **inputs) > -torch.inf).numpy()


def judged(x: torch.Tensor, fields: dict[str, Any]) -> list[Judged]:
    return [judge(row, fields, SEQUENCE) for row in x.numpy()]


def compared(x: torch.Tensor, fields: dict[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray, Judged]]:
    """What we keep of each row, what transformers keeps, and the definition."""
    return zip(ours(x, fields), theirs(x, fields), judged(x, fields), strict=True)


SINGLE = [("typical_p", value) for value in (0.2, 0.5, 0.9, 0.95)]
SINGLE += [("epsilon_cutoff", value) for value in (3e-4, 9e-4, 0.02, 0.3)]
SINGLE += [("eta_cutoff", value) for value in (3e-4, 4e-3, 0.1, 0.6)]
RARE = 2e-3
"""Of all tokens, so many may be next to an edge; otherwise the comparison would say nothing."""


@pytest.mark.parametrize(("rows", "vocab", "kind"), SHAPES)
@pytest.mark.parametrize(("name", "value"), SINGLE)
def test_one_filter(name: str, value: float, rows: int, vocab: int, kind: str) -> None:
    near = 0
    temperature = 0.7 if SINGLE.index((name, value)) % 2 else 1.0
    for mine, its, (keep, edge) in compared(random_rows(rows, vocab, kind), {"temperature": temperature, name: value}):
        for kept in (mine, its):
            assert not ((kept != keep) & ~edge).any()
        near += int(edge.sum())
    assert near <= RARE * rows * vocab


CHAINS: list[dict[str, Any]] = [
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "typical_p": 0.9},
    {"temperature": 1.3, "top_p": 0.9, "epsilon_cutoff": 3e-3},
    {"temperature": 0.7, "top_k": 200, "min_p": 0.02, "eta_cutoff": 0.02},
    {"temperature": 1.1, "top_p": 0.97, "typical_p": 0.8, "epsilon_cutoff": 0.01, "eta_cutoff": 0.05},
    {"temperature": 0.9, "top_k": 300, "top_p": 0.98, "min_p": 1e-3, "typical_p": 0.95, "epsilon_cutoff": 2e-3}
    | {"eta_cutoff": 4e-3},
]


@pytest.mark.parametrize(("rows", "vocab", "kind"), SHAPES)
@pytest.mark.parametrize("fields", CHAINS, ids=lambda fields: "+".join(list(fields)[1:]))
def test_chains(fields: dict[str, Any], rows: int, vocab: int, kind: str) -> None:
    """A token at the edge of one filter moves the edges of the next, so such a row may differ by a few tokens."""
    certain = 0
    for mine, its, (keep, edge) in compared(random_rows(rows, vocab, kind), fields):
        if not edge.any():
            np.testing.assert_array_equal(mine, keep)
            np.testing.assert_array_equal(its, keep)
            certain += 1
        assert (mine != keep).sum() <= 2 + 0.01 * keep.sum()
    dense = vocab == 32000 and kind in ("0.5", "2")  # every row of such has tokens at an edge
    assert certain >= rows / 2 or dense


@pytest.mark.parametrize(("name", "value"), SINGLE)
def test_a_small_error_would_be_noticed(name: str, value: float) -> None:
    """A twenty-fifth of the parameter, or a hundredth of the mass."""
    wrong, noticed = value * 1.04 if value < 0.9 else value + 0.01, False
    for x in (random_rows(64, 1000, kind) for kind in ("2", "8")):
        pairs = zip(ours(x, {name: wrong}), judged(x, {name: value}), strict=True)
        noticed |= any(((mine != keep) & ~edge).any() for mine, (keep, edge) in pairs)
    assert noticed


@pytest.mark.parametrize("alphabet", [1, 2, 3, 20])
@pytest.mark.parametrize("length", [1, 2, 5, 40, 300])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_repeated_ngrams(n: int, length: int, alphabet: int) -> None:
    g = torch.Generator().manual_seed(100 * n + length)
    x = torch.randn(16, 60, generator=g)
    history = torch.randint(alphabet, (16, length), generator=g) * 2 + 5
    its = lp.NoRepeatNGramLogitsProcessor(n)(history, x)
    prompt = history[:, : length // 3]
    mine = fs.filter_logits(
        x, no_repeat_ngram_size=n, prompt_ids=prompt, output_ids=history[:, length // 3 :], backend=BACKEND
    )
    assert torch.equal(mine, its)
