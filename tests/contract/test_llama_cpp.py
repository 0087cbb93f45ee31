"""order="temperature_last", XTC and DRY against llama.cpp's own samplers, on random rows and histories.

llama.cpp sums in float32, so its edges move a little; see tests/support/definitions.py. Left out is top-n-sigma before
typical: llama.cpp keeps what top-n-sigma removes in its list, at -inf, and takes 0 * log(0) of it into the entropy.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from cases import MAKERS
from definitions import judge, log_softmax
from goodness import LEAST_P, chi_square
from llama_chain import Chain, chain, dry, vocabulary
from stacks import missing

import fastsample as fs

WHY = missing("llama_cpp", "llama-cpp-python")
pytestmark = pytest.mark.skipif(WHY is not None, reason=str(WHY))

BACKEND = "reference"  # the engines equal it to the bit
SEQUENCE = ("top_n_sigma", "top_k", "typical_p", "top_p", "min_p")
DEFAULTS = {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8}
ALONE: list[dict[str, Any]] = [
    *({"top_n_sigma": n} for n in (0.5, 1.0, 2.0)),
    *({"typical_p": t} for t in (0.2, 0.5, 0.9)),
    *({"min_p": m} for m in (0.01, 0.1, 0.5)),
    *({"top_p": p} for p in (0.3, 0.9, 0.99)),
    *({"top_k": k} for k in (1, 7, 200)),
]
CHAINS: list[dict[str, Any]] = [
    DEFAULTS,
    {"top_k": 40, "typical_p": 0.9, "top_p": 0.95, "min_p": 0.05, "temperature": 1.4},
    {"top_n_sigma": 1.2, "top_k": 100, "top_p": 0.9, "min_p": 0.02, "temperature": 2.0},
    {"typical_p": 0.7, "min_p": 0.01, "temperature": 0.3},
    {"top_n_sigma": 2.5, "min_p": 0.1, "temperature": 1.1},
]
ALL_OF_XTC = {"xtc_probability": 1.0, "xtc_threshold": 0.06}


def random_rows(kind: str, rows: int = 40, vocab: int = 1000) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    return MAKERS["lm"](rows, vocab, g) if kind == "lm" else torch.randn(rows, vocab, generator=g) * float(kind)


def name(fields: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in fields.items())


@pytest.mark.parametrize("kind", ["lm", "1", "3"])
@pytest.mark.parametrize("fields", [*ALONE, *CHAINS, *({**f, **ALL_OF_XTC} for f in CHAINS)], ids=name)
def test_kept_candidates_and_their_probabilities(fields: dict[str, Any], kind: str) -> None:
    x = random_rows(kind)
    probs = fs.probabilities(x, order="temperature_last", backend=BACKEND, **fields).numpy()
    theirs, certain = chain(fields, draw=True), 0
    for row, mine in zip(x.numpy(), probs, strict=True):
        if near_an_edge(row, fields):
            continue
        left, _ = theirs(row)
        its = np.zeros(len(row))
        its[left["id"]] = np.where(left["logit"] > -np.inf, left["p"], 0)
        np.testing.assert_array_equal(mine > 0, its > 0)
        np.testing.assert_allclose(mine, its, rtol=2e-5, atol=0)
        certain += 1
    assert certain > len(x) / 4


def near_an_edge(row: np.ndarray[Any, Any], fields: dict[str, Any]) -> bool:
    """Whether rounding decides about a token of some filter."""
    keep, edge = judge(row, {**fields, "order": "temperature_last"}, SEQUENCE)
    p = np.exp(log_softmax(np.where(keep, row.astype(np.float64), -np.inf)))
    top = "xtc_threshold" in fields and np.abs(p / fields["xtc_threshold"] - 1) < 1e-4
    return bool(np.any(edge | top))


@pytest.mark.parametrize("rho", [0.25, 0.5])
def test_xtc_acts_as_often(rho: float) -> None:
    """What it leaves is one of two sets, each as often as we say, and the draws of the whole chain fit our mixture."""
    row, count = random_rows("3", 1, 60)[0], 20_000
    fields = {"min_p": 0.02, "xtc_threshold": 0.05, "temperature": 1.3}
    theirs, sets, tokens = chain({**fields, "xtc_probability": rho}, seed=77, draw=True), [], []
    for _ in range(count):
        left, chosen = theirs(row.numpy())
        sets.append(frozenset(left["id"].tolist()))
        tokens.append(int(left["id"][chosen]))
    whole, rest = (kept(row, {**fields, "xtc_probability": value}) for value in (0.0, 1.0))
    assert set(sets) == {whole, rest}
    assert scipy.stats.binomtest(sets.count(rest), count, rho).pvalue > LEAST_P
    same = {**fields, "order": "temperature_last", "xtc_probability": rho, "backend": BACKEND}
    wanted = fs.probabilities(row, **same).double().numpy()
    ours = fs.sample(row, **same, seed=[1], num_samples=count).tokens.numpy()
    for drawn in (np.array(tokens), ours):
        assert chi_square(np.bincount(drawn, minlength=60), wanted / wanted.sum()) > LEAST_P


def kept(row: torch.Tensor, fields: dict[str, Any]) -> frozenset[int]:
    x = fs.filter_logits(row, order="temperature_last", backend=BACKEND, **fields)
    return frozenset((x > -torch.inf).nonzero()[:, 0].tolist())


# DRY ------------------------------------------------------------------------------------------------------------------

VOCAB, BREAKERS = 64, (3, 17, 40)
EXACT = [  # powers that float32 holds exactly, as far as these histories take them
    {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2},
    {"dry_multiplier": 0.37, "dry_base": 1.5, "dry_allowed_length": 1},
    {"dry_multiplier": 2.1, "dry_base": 2.0, "dry_allowed_length": 4},
    {"dry_multiplier": 1.1, "dry_base": 1.0, "dry_allowed_length": 1},
    {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 1, "dry_range": 9},
    {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2, "dry_range": 33},
]


def after_dry(x: torch.Tensor, history: list[int], fields: dict[str, Any], broken: bool) -> tuple[Any, Any]:
    """The row after DRY: ours and theirs, float32 [V]."""
    its = Chain([dry(fields, len(history) + 1, vocabulary(VOCAB, BREAKERS), broken)])
    its.accept(history)
    left, _ = its(x.numpy())
    theirs = np.empty(VOCAB, np.float32)
    theirs[left["id"]] = left["logit"]
    breakers = {"dry_breakers": torch.tensor(BREAKERS)} if broken else {}
    cut = len(history) // 2
    prompt, output = torch.tensor(history)[None].split([cut, len(history) - cut], 1)
    ids = {"prompt_ids": prompt, "output_ids": output}
    mine = fs.filter_logits(x[None], **fields, **breakers, **ids, backend=BACKEND)
    return mine[0].numpy(), theirs


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("fields", EXACT, ids=name)
def test_dry_is_equal_to_the_bit(fields: dict[str, Any], broken: bool) -> None:
    rng, touched = np.random.default_rng(8), 0
    for alphabet, length in itertools.product((2, 3, 8, 45), (1, 2, 3, 12, 60, 250)):
        x = torch.from_numpy(rng.normal(0, 4, VOCAB).astype(np.float32))
        history = rng.integers(alphabet, size=length).tolist()
        mine, its = after_dry(x, history, fields, broken)
        np.testing.assert_array_equal(mine, its)
        touched += int((its != x.numpy()).sum())
    assert touched > 5


@pytest.mark.parametrize("base", [1.05, 1.3, 1.75, 3.0])
@pytest.mark.parametrize("length", [30, 180, 500])
def test_dry_of_long_repetitions(length: int, base: float) -> None:
    """Ours multiplies in float32, theirs takes a power in float64; both stop before the power overflows."""
    fields = {"dry_multiplier": 0.8, "dry_base": base, "dry_allowed_length": 2}
    for period in (1, 2, 7):
        history = [i % period + 20 for i in range(length)]
        mine, its = after_dry(torch.zeros(VOCAB), history, fields, False)
        np.testing.assert_allclose(mine, its, rtol=length * 2.0**-23)
        assert (its < 0).any()
