"""Rules "chain" and "block": every engine against the contract in Python's integers, and the laws of what comes out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import rejections
import scipy.stats
import torch
from conformance import ulps_apart
from goodness import LEAST_P, chi_square
from rejections import BLOCKS, expected
from simt_engine import How, Simt, as_backend, build, compiler

import fastsample as fs
from fastsample.reference import uniform60

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no effect without"),  # among the sets on purpose
    pytest.mark.usefixtures("remembered"),
]

SUPPORT = Path(rejections.__file__).parent
NAMES = list(BLOCKS)
FEW = [*NAMES[:-20:6], *NAMES[-20:]]


wanted = cache(lambda name: expected(BLOCKS[name]))


def assert_contract(name: str, found: dict[str, torch.Tensor]) -> None:
    tokens, accepted, status, logprobs = wanted(name)
    assert found["num_accepted"].tolist() == accepted
    assert found["status"].tolist() == status
    assert found["tokens"].tolist() == tokens
    if "xtc" not in name and "llama" not in name:  # whose log-probabilities are of a mixture
        assert bool((ulps_apart(found["logprobs"], logprobs) <= 2).all())


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in NAMES])
def test_is_the_contract(name: str, variant: str) -> None:
    assert_contract(name, BLOCKS[name].ask(variant))


@pytest.mark.parametrize("name", FEW)
def test_reference_is_the_contract(name: str) -> None:
    assert_contract(name, BLOCKS[name].ask("reference"))


def test_some_drafts_are_accepted_and_some_are_not() -> None:
    """Else the tests above would show little."""
    for rule in ("chain", "block"):
        pairs = [
            (a, n) for name in FEW if rule in name for a, n in zip(wanted(name)[1], BLOCKS[name].counts(), strict=True)
        ]
        assert sum(0 < accepted < most for accepted, most in pairs) > 8
        assert sum(accepted == most > 0 for accepted, most in pairs) > 4
        assert sum(accepted == 0 < most for accepted, most in pairs) > 8


@pytest.mark.parametrize("how", [How("block"), How("cluster", 2), How("grid", 3, 64, 2)], ids=lambda how: how.policy)
@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_cuda_on_fibers(how: How, once: Callable[[str, Callable[[Path], object]], Path]) -> None:
    simt = Simt(once("simt", build) / "simt.so")
    simt.how = how
    with as_backend(simt):
        for name in FEW:
            assert_contract(name, BLOCKS[name].ask("cuda"))


def test_triton_interpreted(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    found, names = tmp_path / "found.pt", FEW[::5]
    command = [sys.executable, SUPPORT / "rejections.py", found, *names]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, outputs in torch.load(found).items():
        assert_contract(name, outputs)


# Laws ----------------------------------------------------------------------------------------------------------------

VOCAB, DRAFTS = 5, 3
FILTERS = {"temperature": 0.9, "top_k": 4, "min_p": 0.05}


class Model:
    """A token's law depends on the one before it; the drafts' law is another one."""

    def __init__(self, noise: float) -> None:
        g = torch.Generator().manual_seed(3)
        self.target = torch.randn(VOCAB, VOCAB, generator=g) * 1.5
        self.draft = self.target + noise * torch.randn(VOCAB, VOCAB, generator=g)
        self.p, self.q = (fs.probabilities(x, **FILTERS).double() for x in (self.target, self.draft))

    def text(self, rule: str, requests: int, length: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 [B, length] after token 0, in as many verifications as it takes, and what the first accepted."""
        seed = torch.arange(requests) * 7919 + 11
        text, done = torch.zeros(requests, length + DRAFTS + 2, dtype=torch.int64), torch.zeros(requests).long()
        first = None
        g = torch.Generator().manual_seed(5)
        every = torch.arange(requests)
        while len(every):
            last = text[every, done[every]]
            ids, laws = [last], []
            for _ in range(DRAFTS):
                laws.append(self.draft[ids[-1]])
                ids.append(torch.multinomial(self.q[ids[-1]], 1, generator=g)[:, 0])
            drafts, before = torch.stack(ids[1:], 1), torch.stack(ids, 1)
            out = fs.verify(
                self.target[before], drafts, rule=rule, draft_logits=torch.stack(laws, 1), seed=seed[every],
                offset=done[every], **FILTERS,
            )  # fmt: skip
            first = out.num_accepted if first is None else first
            for step in range(DRAFTS + 1):
                there = (out.tokens[:, step] >= 0) & (done[every] < length + DRAFTS)
                done[every[there]] += 1
                text[every[there], done[every[there]]] = out.tokens[there, step]
            every = every[done[every] < length]
        assert first is not None
        return text[:, 1 : length + 1], first

    def joint(self) -> np.ndarray:
        """The law of the first three tokens."""
        p = self.p.numpy()
        return (p[0][:, None, None] * p[:, :, None] * p[None]).reshape(-1)


def cells(tokens: torch.Tensor) -> np.ndarray:
    index = (tokens[:, 0] * VOCAB + tokens[:, 1]) * VOCAB + tokens[:, 2]
    return np.bincount(index.numpy(), minlength=VOCAB**3)


def assert_laws(requests: int) -> None:
    for noise in (0.3, 1.5):
        model, mean = Model(noise), {}
        for rule in ("chain", "block"):
            tokens, accepted = model.text(rule, requests)
            assert chi_square(cells(tokens), model.joint()) > LEAST_P, (rule, noise)
            mean[rule] = float(accepted.double().mean())
            if rule == "chain":
                rate = float(torch.minimum(model.p[0], model.q[0]).sum())
                taken = int((accepted > 0).sum())
                assert scipy.stats.binomtest(taken, requests, rate).pvalue > LEAST_P, noise
        assert mean["block"] > mean["chain"] - 4 * DRAFTS / requests**0.5, noise


def test_laws() -> None:
    assert_laws(40_000)


@pytest.mark.slow
def test_laws_of_a_million() -> None:
    assert_laws(1_000_000)


def test_drafts_that_are_no_tokens_leave_the_law_alone() -> None:
    """Padding was not drawn from anything, so that nothing may be taken off for it."""
    requests, p = 40_000, Model(1.5).p[0].numpy()
    for rule in ("chain", "block"):
        model = Model(1.5)
        logits, draft = model.target[:1].expand(requests, 2, -1), model.draft[:1].expand(requests, 1, -1)
        ids = torch.tensor([-1, VOCAB])[torch.arange(requests) % 2][:, None]
        out = fs.verify(logits, ids, rule=rule, draft_logits=draft, seed=torch.arange(requests), **FILTERS)
        assert int(out.num_accepted.sum()) == 0
        assert chi_square(np.bincount(out.tokens[:, 0].numpy(), minlength=VOCAB), p) > LEAST_P, rule


def test_purposes_share_no_bits() -> None:
    """Pairs of purposes at the same seed, offset and index: all pairs of their leading bits are equally likely."""
    seed = torch.arange(20_000)
    uniform = [uniform60(seed, torch.zeros_like(seed) + 9, torch.tensor(1), purpose) >> 56 for purpose in range(5)]
    for a in range(5):
        for b in range(a):
            counts = np.bincount((uniform[a] * 16 + uniform[b]).numpy(), minlength=256)
            assert chi_square(counts, np.full(256, 1 / 256)) > LEAST_P, (a, b)
