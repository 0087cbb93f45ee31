"""Filters against the definitions of their papers in float64, and XTC's draws against its mixture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import MAKERS
from definitions import judge, mixture
from goodness import LEAST_P, chi_square

import fastsample as fs

BACKEND = "reference"  # the engines equal it to the bit
KINDS = ["lm", "0.5", "2", "8"]
SHAPES = [
    *((64, vocab, kind) for vocab in (50, 1000) for kind in KINDS),
    *(pytest.param(4, 32000, kind, marks=pytest.mark.slow) for kind in KINDS),
]
FILTERS: list[dict[str, Any]] = [
    *({"p_less": True, "temperature": temperature} for temperature in (0.7, 1.0, 2.0)),
    *({"top_n_sigma": n} for n in (0.3, 1.0, 2.0, 3.5)),
    {"top_n_sigma": 1.0, "temperature": 1.7},
    *({"top_a": a} for a in (0.05, 0.2, 1.0)),
    {"top_a": 0.3, "temperature": 1.5},
    *({"eta_cutoff": e} for e in (3e-4, 4e-3, 0.1, 0.6)),
    {"top_n_sigma": 2.0, "top_p": 0.9, "top_a": 0.1, "temperature": 0.8},
    {"top_k": 40, "p_less": True, "temperature": 3.0},
    {"top_n_sigma": 1.5, "eta_cutoff": 0.01, "top_a": 0.02, "p_less": True, "temperature": 1.2},
]


def random_rows(rows: int, vocab: int, kind: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(vocab + 1)
    return MAKERS["lm"](rows, vocab, g) if kind == "lm" else torch.randn(rows, vocab, generator=g) * float(kind)


@pytest.mark.parametrize(("rows", "vocab", "kind"), SHAPES)
@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_kept_sets(fields: dict[str, Any], rows: int, vocab: int, kind: str) -> None:
    x = random_rows(rows, vocab, kind)
    kept = (fs.filter_logits(x, backend=BACKEND, **fields) > -torch.inf).numpy()
    certain = 0
    for row, mine in zip(x.numpy(), kept, strict=True):
        keep, edge = judge(row, fields)
        assert len(fields) > 2 or not ((mine != keep) & ~edge).any()  # one filter: only the edge's tokens may differ
        if not edge.any():
            np.testing.assert_array_equal(mine, keep)
            certain += 1
    assert certain >= rows / 2 or vocab == 32000


# XTC ------------------------------------------------------------------------------------------------------------------

DRAWS = 100_000
XTC: list[dict[str, Any]] = [
    {"xtc_threshold": 0.1},
    {"xtc_threshold": 0.05, "temperature": 1.5},
    {"xtc_threshold": 0.15, "min_p": 0.1, "temperature": 0.9},
    {"xtc_threshold": 0.02, "top_k": 12},
]
ROWS = torch.stack(
    [
        torch.tensor([0.3, 0.22, 0.05, 0.2, 0.13, 0.06, 0.04]).log(),
        torch.tensor([0.04, 0.1, 0.25, 0.03, 0.28, 0.2, 0.1]).log() + 3,
        torch.tensor([0.9, 0.04, 0.02, 0.01, 0.01, 0.01, 0.01]).log(),  # one top choice, which stays
    ]
)


def rows_of(vocab: int) -> torch.Tensor:
    if vocab == 7:
        return ROWS
    return torch.randn(3, vocab, generator=torch.Generator().manual_seed(9)) * 2.2


@pytest.mark.parametrize("rho", [0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("fields", XTC, ids=str)
@pytest.mark.parametrize("vocab", [7, 300])
def test_xtc_draws_from_its_mixture(fields: dict[str, Any], vocab: int, rho: float) -> None:
    x, fields = rows_of(vocab), fields | {"xtc_probability": rho}
    tokens = fs.sample(x, **fields, seed=[3, 4, 5], num_samples=DRAWS, backend=BACKEND).tokens.numpy()
    probs = fs.probabilities(x, **fields, backend=BACKEND).numpy()
    for row, drawn, mine in zip(x.numpy(), tokens, probs, strict=True):
        wanted, out = mixture(row, fields)
        np.testing.assert_allclose(mine, wanted, rtol=2e-6, atol=0)
        assert chi_square(np.bincount(drawn, minlength=vocab), wanted) > LEAST_P
        assert rho < 1 or not out[drawn].any()


def test_xtc_excludes_something_in_some_of_these_rows() -> None:
    out = [mixture(row, fields | {"xtc_probability": 1.0})[1].any() for fields in XTC for row in rows_of(7).numpy()]
    assert len(out) / 2 < sum(out) < len(out)


def coins(seed: int, rho: float, offset: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of draws in which it shows: whether XTC acted, and the tokens of the same bits without and with it."""
    x, same = ROWS[0], {"seed": [seed], "offset": offset, "num_samples": DRAWS, "backend": BACKEND}
    whole, rest, drawn = (
        fs.sample(x, **same, xtc_probability=value, xtc_threshold=0.1).tokens.numpy() for value in (0.0, 1.0, rho)
    )
    acted = drawn != whole
    assert (drawn == np.where(acted, rest, whole)).all()
    shows = whole != rest
    return acted[shows], whole[shows], rest[shows]


@pytest.mark.parametrize("rho", [0.3, 0.5, 0.9])
def test_xtc_coin_and_draw_are_independent(rho: float) -> None:
    acted, whole, rest = coins(11, rho)
    chance = np.array([1 - rho, rho])
    for tokens in (whole, rest, 7 * whole + rest):
        share = np.bincount(tokens, minlength=49) / len(tokens)
        assert chi_square(np.bincount(2 * tokens + acted, minlength=98), np.outer(share, chance).ravel()) > LEAST_P


def test_xtc_coins_are_independent_of_each_other() -> None:
    """Of one draw and the next, of one step and the next, and of another seed."""
    x = torch.tensor([0.5, 0.5, 0.0]).log()  # token 0 is excluded, 1 is not: without noise from the draw, at rho = 1

    def coin(seed: int, offset: int) -> np.ndarray:
        same = {"seed": [seed], "offset": offset, "num_samples": DRAWS, "backend": BACKEND, "xtc_threshold": 0.3}
        whole, drawn = (fs.sample(x, **same, xtc_probability=rho).tokens.numpy() for rho in (0.0, 0.5))
        return np.where(whole == 0, drawn, -1)  # 1: acted, 0: did not, -1: does not show

    one = coin(5, 0)
    for other in (np.roll(one, 1), coin(5, 1), coin(6, 0)):
        seen = (one >= 0) & (other >= 0)
        table = np.bincount(2 * one[seen] + other[seen], minlength=4)
        assert chi_square(table, np.full(4, 0.25)) > LEAST_P
