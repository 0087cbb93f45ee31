"""A million draws per case against softmax in float64, and independence of neighbouring seeds, offsets and draws."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from cases import MAKERS
from goodness import LEAST_P, chi_square

import fastsample as fs

DRAWS = 1_000_000
ENGINE = "cpu" if fs.engines()["cpu"] is None else "reference"  # the test's id says which one was used


def exact(x: torch.Tensor, fields: dict[str, Any]) -> np.ndarray:
    """The distribution of one row in float64: softmax at T, then top-k, top-p and min-p in the default order."""
    z = x.double().numpy() / fields.get("temperature", 1.0)
    p = np.exp(z - z.max())
    p /= p.sum()
    ranked = np.argsort(-p, kind="stable")
    keep = np.zeros(len(p), bool)
    keep[ranked[: fields.get("top_k") or len(p)]] = True
    within = np.where(keep, p, 0)[ranked] / p[keep].sum()
    keep[ranked[np.cumsum(within) - within >= fields.get("top_p", 1.0)]] = False
    keep &= p >= fields.get("min_p", 0.0) * p.max()
    return np.where(keep, p, 0) / p[keep].sum()


def row(maker: str, vocab: int) -> torch.Tensor:
    return MAKERS[maker](1, vocab, torch.Generator().manual_seed(vocab))[0]


ROWS = [("flat", 1000), ("lm", 5003), ("peaked", 300), ("equal", 1024), ("ties", 257)]
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 40},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"temperature": 1.7, "top_k": 100, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 0.6},
    {"temperature": 2.5},
]


@pytest.mark.parametrize("backend", [ENGINE])
@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize(("maker", "vocab"), ROWS)
def test_draws_of_one_row(maker: str, vocab: int, fields: dict[str, Any], backend: str) -> None:
    x = row(maker, vocab)
    tokens = fs.sample(x, **fields, seed=[vocab], num_samples=DRAWS, backend=backend).tokens
    p = exact(x, fields)
    assert chi_square(np.bincount(tokens.numpy(), minlength=vocab), p) > LEAST_P


@pytest.mark.parametrize("backend", [ENGINE])
@pytest.mark.parametrize("vary", ["offset", "seed", "slot"])
@pytest.mark.parametrize(("maker", "fields"), [("lm", {}), ("flat", {"temperature": 0.8, "top_p": 0.9})], ids=str)
def test_one_draw_of_many_rows(maker: str, fields: dict[str, Any], vary: str, backend: str) -> None:
    """As in generation: a step, a sequence or a slot differs, the draw index does not."""
    x, chunk = row(maker, 97), 50_000
    counts = np.zeros(97, np.int64)
    for start in range(0, DRAWS, chunk):
        number = torch.arange(start, start + chunk)
        seed = {"offset": [7] * chunk, "seed": number, "slot": start}[vary]
        offset = number if vary == "offset" else 3
        out = fs.sample(x.expand(chunk, -1), **fields, seed=seed, offset=offset, backend=backend)
        counts += np.bincount(out.tokens.numpy(), minlength=97)
    assert counts.sum() == DRAWS
    assert chi_square(counts, exact(x, fields)) > LEAST_P


@pytest.mark.parametrize("backend", [ENGINE])
def test_the_chi_square_would_notice(backend: str) -> None:
    """Two percent of temperature, a token that is never drawn and a tail twice as heavy are each rejected."""
    x, fields = row("lm", 5003), {"temperature": 2.0}
    tokens = fs.sample(x, **fields, seed=[1], num_samples=DRAWS, backend=backend).tokens.numpy()
    counts, p = np.bincount(tokens, minlength=5003), exact(x, fields)
    assert chi_square(counts, p) > LEAST_P
    assert chi_square(counts, exact(x, {"temperature": 2.04})) < LEAST_P
    ranked = np.argsort(p)
    missed = counts.copy()
    missed[ranked[-150]] = 0
    assert chi_square(missed, p) < LEAST_P
    heavy = p.copy()
    heavy[ranked[np.cumsum(p[ranked]) < 1e-2]] *= 2
    assert chi_square(counts, heavy / heavy.sum()) < LEAST_P


# Independence ---------------------------------------------------------------------------------------------------------

SMALL = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05]).log()
PAIRS = 500_000
EVEN = torch.arange(0, 2 * PAIRS, 2)
NEIGHBOURS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "seeds s, s + 1": ({"seed": EVEN}, {"seed": EVEN + 1}),
    "seeds s, s + 2^32": ({"seed": EVEN}, {"seed": EVEN + 2**32}),
    "seeds s, s + 2^63": ({"seed": EVEN}, {"seed": EVEN - 2**63}),
    "seeds s, offset": ({"seed": EVEN, "offset": 1}, {"seed": EVEN + 1, "offset": 0}),
    "scalar seeds": ({"seed": 1}, {"seed": 2**40}),
    "offsets t, t + 1": ({"seed": [9] * PAIRS, "offset": EVEN}, {"seed": [9] * PAIRS, "offset": EVEN + 1}),
    "offsets t, t + 2^32": ({"seed": [9] * PAIRS, "offset": EVEN}, {"seed": [9] * PAIRS, "offset": EVEN + 2**32}),
    "offset and seed swapped": ({"seed": EVEN, "offset": 1}, {"seed": [1] * PAIRS, "offset": EVEN}),
}


def independent(a: np.ndarray, b: np.ndarray) -> float:
    """p-value of the table of pairs against the product of the exact distributions."""
    p = exact(SMALL, {})
    return chi_square(np.bincount(5 * a + b, minlength=25), np.outer(p, p).ravel())


@pytest.mark.parametrize("backend", [ENGINE])
@pytest.mark.parametrize(("one", "other"), NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbours_are_independent(one: dict[str, Any], other: dict[str, Any], backend: str) -> None:
    x = SMALL.expand(PAIRS, -1)
    a, b = (fs.sample(x, **how, backend=backend).tokens.numpy() for how in (one, other))
    assert independent(a, b) > LEAST_P


@pytest.mark.parametrize("backend", [ENGINE])
@pytest.mark.parametrize("lag", [1, 2, 4, 32])
def test_draws_of_one_row_are_independent(lag: int, backend: str) -> None:
    draws = fs.sample(SMALL, seed=[5], num_samples=2 * PAIRS, backend=backend).tokens.numpy()
    blocks = draws.reshape(-1, 2, lag)  # each draw is in one pair only
    assert independent(blocks[:, 0].ravel(), blocks[:, 1].ravel()) > LEAST_P


@pytest.mark.parametrize("backend", [ENGINE])
def test_slots_of_one_call_are_independent(backend: str) -> None:
    tokens = fs.sample(SMALL.expand(2 * PAIRS, -1), seed=123, backend=backend).tokens.numpy()
    assert independent(tokens[::2], tokens[1::2]) > LEAST_P


# Large vocabularies, with as many draws as are asked for --------------------------------------------------------------

MANY = int(float(os.environ.get("FASTSAMPLE_DRAWS", DRAWS)))
"""10^6 here; `nox -s distribution` asks for 10^8."""

VOCAB, CHUNK, BINS = 128_256, 1_000_000, 16
FAMILY = 0.01
"""Chance of a false alarm of all the tests below together (Bonferroni). Seeds are fixed: it has been taken or not."""


def grouped(counts: np.ndarray, p: np.ndarray, least: float = 30) -> tuple[np.ndarray, np.ndarray]:
    """Observed and expected counts by rank; neighbours in the ranking are put together until they expect `least`."""
    ranked = np.argsort(-p, kind="stable")
    expected = p[ranked] * counts.sum()
    of = np.floor(np.cumsum(expected) / least).astype(np.int64)
    edges = np.flatnonzero(np.diff(of, prepend=-1))
    return np.add.reduceat(counts[ranked], edges), np.add.reduceat(expected, edges)


def tail_and_fit(counts: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """p-values: chi-square over all, the tokens that expect fewer than 30 as a whole, and the one nearest to 30."""
    n = int(counts.sum())
    observed, expected = grouped(counts, p)
    enough = expected >= 5  # but for the last group, which gets what is left
    found = {"fit": float(scipy.stats.chisquare(observed[enough], _scaled(expected, observed, enough)).pvalue)}
    rare = p * n < 30
    found["tail"] = float(scipy.stats.binomtest(int(counts[rare].sum()), n, float(p[rare].sum())).pvalue)
    token = int(np.abs(p * n - 30).argmin())
    seen, mean = int(counts[token]), float(p[token] * n)
    below, above = scipy.stats.poisson.cdf(seen, mean), scipy.stats.poisson.sf(seen - 1, mean)
    found["thirty"] = min(1.0, 2 * min(float(below), float(above)))
    return found


def _scaled(expected: np.ndarray, observed: np.ndarray, enough: np.ndarray) -> np.ndarray:
    return expected[enough] * (observed[enough].sum() / expected[enough].sum())


def chunks() -> Iterator[int]:
    """Offsets; each stands for a million draws."""
    return iter(range(-(-MANY // CHUNK)))


def fit(maker: str) -> dict[str, float]:
    """Draws of one row: num_samples of each of many offsets."""
    x = row(maker, VOCAB)
    x[VOCAB // 3] = x.double().logsumexp(0) + np.log(30 / MANY)  # a token that is to be seen 30 times
    counts = np.zeros(VOCAB, np.int64)
    for offset in chunks():
        tokens = fs.sample(x, seed=[31], offset=offset, num_samples=min(CHUNK, MANY), backend=ENGINE).tokens
        counts += np.bincount(tokens.numpy(), minlength=VOCAB)
    return tail_and_fit(counts, exact(x, {}))


def table_of_pairs(a: np.ndarray, b: np.ndarray, table: np.ndarray) -> None:
    table += np.bincount(BINS * a + b, minlength=BINS * BINS)


SIXTEEN = (torch.arange(1.0, BINS + 1) / (BINS * (BINS + 1) / 2)).log()


def correlation(neighbour: str) -> dict[str, float]:
    """Chi-square of the 16 x 16 table of pairs against the product of the exact distributions; pairs share no draw."""
    p = exact(SIXTEEN, {})
    table = np.zeros(BINS * BINS, np.int64)
    rows = 100_000 if neighbour in ("seeds", "offsets") else 1
    draws = min(CHUNK, MANY) // rows
    for chunk in chunks():
        if neighbour == "seeds":
            seed = torch.arange(rows) * 2 + 2 * rows * chunk
            pair = [fs.sample(SIXTEEN.expand(rows, -1), seed=seed + i, num_samples=draws).tokens for i in (0, 1)]
        elif neighbour == "offsets":
            offset = torch.arange(rows) * 2 + 2 * rows * chunk
            same = {"seed": [9] * rows, "num_samples": draws}
            pair = [fs.sample(SIXTEEN.expand(rows, -1), offset=offset + i, **same).tokens for i in (0, 1)]
        else:  # draws j, j + 1 of one row, or j and j + half
            tokens = fs.sample(SIXTEEN, seed=[77], offset=chunk, num_samples=2 * draws, backend=ENGINE).tokens
            pair = [tokens[::2], tokens[1::2]] if neighbour == "draws" else list(tokens.chunk(2))
        table_of_pairs(*(side.numpy().ravel() for side in pair), table)
    return {neighbour: float(scipy.stats.chisquare(table, np.outer(p, p).ravel() * table.sum()).pvalue)}


LARGE: dict[str, Callable[[], dict[str, float]]] = {
    **{maker: functools.partial(fit, maker) for maker in ("flat", "lm", "peaked")},
    **{f"pairs-{n}": functools.partial(correlation, n) for n in ("seeds", "offsets", "draws", "halves")},
}
NUMBER_OF_TESTS = 3 * 3 + 4


@pytest.mark.parametrize("measure", LARGE.values(), ids=LARGE)
def test_many_draws(measure: Callable[[], dict[str, float]]) -> None:
    found = measure()
    print(f"{MANY:.0e} draws: " + ", ".join(f"{name} p = {p:.3g}" for name, p in found.items()))
    assert min(found.values()) > FAMILY / NUMBER_OF_TESTS


def test_many_draws_would_notice() -> None:
    """What float32 Gumbel noise of 24-bit uniforms does: it spans -2.8 to 16.6, so that a token 19.4 below is lost."""
    rng = np.random.default_rng(5)
    p = exact(row("lm", VOCAB), {})
    lossy = np.where(p < p.max() * np.exp(-19.4), 0, p)
    for n in (10**7, 10**8):
        lost = tail_and_fit(rng.multinomial(n, lossy / lossy.sum()), p)
        assert max(lost["tail"], lost["fit"]) < FAMILY / NUMBER_OF_TESTS
        assert min(tail_and_fit(rng.multinomial(n, p), p).values()) > FAMILY / NUMBER_OF_TESTS
