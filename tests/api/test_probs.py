"""`input="probs"`: probabilities in place of logits, wherever a call takes it, and what is refused then."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo

import fastsample as fs

pytestmark = pytest.mark.usefixtures("remembered")

B, V = 4, 200
PROBS = torch.softmax(torch.randn(B, V, generator=torch.Generator().manual_seed(1)) * 2, -1)
MASK = fs.pack_bitmask([[*range(i, V, 3)] for i in range(B)], V)
ALLOWED: dict[str, Any] = {
    "temperature": [1.0, 0.0, 1.0, 1e-6],
    "top_k": [0, 3, 50, 7],
    "top_p": 0.9,
    "min_p": 0.01,
    "epsilon_cutoff": 1e-3,
    "top_a": 0.1,
    "p_less": [False, True, True, False],
    "xtc_probability": 0.5,
    "xtc_threshold": 0.05,
    "order": ["top_k_first", "min_p_first", "joint", "temperature_last"],
    "ties": "all",
}


# What it gives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_engine_gives_what_the_reference_gives(dtype: torch.dtype, variant: str) -> None:
    p = PROBS.to(dtype)
    for more in ({}, {"bitmask": MASK}, {"allowed_ids": [[1, 2], None, [3], [4, 5]]}):
        for mode in ("raw", "processed"):
            given = {**ALLOWED, **more, "input": "probs", "seed": 3, "num_samples": 3}
            given |= {"logprobs": mode, "top_logprobs": 4}
            got, want = (fs.sample(p, **given, backend=b) for b in (variant, "reference"))
            for name in ("tokens", "status", "ranks", "top_ids"):
                assert torch.equal(getattr(got, name), getattr(want, name)), name
            for name in ("logprobs", "top_logprobs"):
                torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=3e-7, atol=0)
        got, want = (fs.probabilities(p, **ALLOWED, **more, input="probs", backend=b) for b in (variant, "reference"))
        assert torch.equal(got, want)


def test_nothing_but_ratios_counts(variant: str) -> None:
    for factor in (1.0, 37.5, 2.0**100, 2.0**-100):
        got = fs.sample(PROBS * factor, **ALLOWED, input="probs", seed=5, backend=variant)
        if factor in (1.0, 2.0**100, 2.0**-100):
            assert got == fs.sample(PROBS, **ALLOWED, input="probs", seed=5, backend=variant)
        assert got.status.tolist() == [0] * B


def test_the_distribution_is_what_was_given(variant: str) -> None:
    got = fs.probabilities(PROBS, input="probs", backend=variant)
    torch.testing.assert_close(
        got.double(), PROBS.double() / PROBS.double().sum(-1, keepdim=True), rtol=2e-7, atol=2**-40
    )
    raw = fs.sample(PROBS, input="probs", seed=1, logprobs="raw", top_logprobs=V, backend=variant)
    wanted = PROBS.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(raw.top_ids, wanted.indices)
    torch.testing.assert_close(raw.top_logprobs, wanted.values.log(), rtol=1e-5, atol=1e-6)
    best = fs.sample(PROBS, input="probs", temperature=0.0, seed=1, backend=variant)
    assert torch.equal(best.tokens, PROBS.argmax(-1))


@pytest.mark.parametrize("shape", [(V,), (2, 2, V)])
def test_any_leading_dimensions(shape: tuple[int, ...], variant: str) -> None:
    p = PROBS[0] if len(shape) == 1 else PROBS.view(shape)
    rows = PROBS[:1] if len(shape) == 1 else PROBS
    got, want = (fs.sample(x, input="probs", top_k=9, seed=2, backend=variant).tokens for x in (p, rows))
    assert torch.equal(got, want.view(shape[:-1]))
    got, want = (fs.probabilities(x, input="probs", top_k=9, backend=variant) for x in (p, rows))
    assert torch.equal(got, want.view(shape))


def test_a_repeat_gives_what_a_first_call_gives(variant: str) -> None:
    """And logits in between are none of its business."""
    x = PROBS[:1]
    more = {"top_k": 9, "backend": variant}
    want = [
        fs.sample(x, top_k=torch.tensor([9]), input="probs", seed=s, backend=variant).tokens for s in range(4)
    ]  # which is not repeated
    for _ in range(2):
        for seed in range(4):
            assert torch.equal(fs.sample(x, **more, input="probs", seed=seed).tokens, want[seed])
            fs.sample(x, **more, seed=seed)
    bias = {"bias": {3: 1.0}}
    with pytest.raises(ValueError, match=r"^bias: expected None with input='probs'"):
        fs.sample(x, **more, input="probs", seed=1, **bias)
    fs.sample(x, **more, seed=1, **bias)


def test_a_sampler_is_sample_at_rising_offsets(variant: str) -> None:
    params = fs.SamplingParams(**ALLOWED)
    sampler = fs.Sampler(params, batch_size=B, seed=7, input="probs", backend=variant)
    assert "input='probs'" in repr(sampler)
    out = None
    for step in range(3):
        want = fs.sample(PROBS, params, seed=7, offset=step, input="probs", backend=variant)
        assert (out := sampler(PROBS, out=out)) == want
    twins = [copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))]
    want = sampler(PROBS, bitmask=MASK)
    assert all(twin(PROBS, bitmask=MASK) == want for twin in twins)
    picked = sampler(PROBS[[2, 0]], rows=[2, 0])
    whole = fs.sample(PROBS, params, seed=7, offset=4, input="probs", backend=variant)
    assert torch.equal(picked.tokens, whole.tokens[[2, 0]])


# What it refuses ------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": 0.7}, r"temperature = 0\.7: expected 1, or 0 for the most probable token, with"),
    "a row's": ({"temperature": [1.0, 0.0, 1.5, 1.0]}, r"temperature = 1\.5 \(row 2\): expected 1, or 0"),
    "just not greedy": ({"temperature": 2e-5}, r"temperature = 2e-05: expected 1, or 0"),
    "repetition": ({"repetition_penalty": 1.1}, r"repetition_penalty = 1\.1: expected 1, which is off, with input="),
    "frequency": ({"frequency_penalty": [0, 0, 0, -0.5]}, r"frequency_penalty = -0\.5 \(row 3\): expected 0"),
    "presence": ({"presence_penalty": 0.5}, r"presence_penalty = 0\.5: expected 0, which is off"),
    "n-sigma": ({"top_n_sigma": torch.tensor([0, 1, 0, 0])}, r"top_n_sigma = 1 \(row 1\): expected 0"),
    "typical": ({"typical_p": 0.9}, r"typical_p = 0\.9: expected 1, which is off"),
    "eta": ({"eta_cutoff": np.float32(0.1)}, r"eta_cutoff = 0\.1: expected 0"),
    "dry": ({"dry_multiplier": 0.8}, r"dry_multiplier = 0\.8: expected 0"),
    "n-gram": ({"no_repeat_ngram_size": 1234567}, r"no_repeat_ngram_size = 1234567: expected 0"),
    "bias": ({"bias": {3: 1.0}}, r"bias: expected None with input='probs'; it is added to logits"),
    "no bias": ({"bias": {}}, r"bias: expected None"),
}


@pytest.mark.parametrize(("fields", "words"), REFUSED.values(), ids=REFUSED)
def test_what_needs_logits_is_refused(fields: dict[str, Any], words: str) -> None:
    ids = {"output_ids": [[1]] * B}
    calls: list[Callable[[], Any]] = [
        lambda: fs.sample(PROBS, **fields, **ids, input="probs"),
        lambda: fs.sample(PROBS.view(2, 2, V), **fields, **ids, input="probs"),
        lambda: fs.probabilities(PROBS, **fields, **ids, input="probs"),
    ]
    sampler = fs.Sampler(batch_size=B, seed=1, input="probs")
    if "bias" in fields:
        calls += [lambda: sampler(PROBS, **fields), lambda: sampler(PROBS[:2], rows=[3, 1], **fields)]
    else:
        calls += [lambda: fs.Sampler(batch_size=B, input="probs", **fields)]
        calls += [lambda: fs.sample(PROBS, fs.SamplingParams(**fields), **ids, input="probs")]
    for call in calls:
        for _ in range(2):  # nothing of a refused call is kept
            with pytest.raises(ValueError, match=f"^{words}"):
                call()
    assert sampler.offsets.tolist() == [0] * B


def test_a_slot_is_refused_by_its_number() -> None:
    sampler = fs.Sampler(batch_size=B, seed=1, input="probs", top_k=5)
    before = repr(sampler)
    for more in ({"temperature": 0.5}, {"params": fs.SamplingParams(temperature=0.5)}):
        with pytest.raises(ValueError, match=r"^temperature = 0\.5 \(row 2\): expected 1, or 0"):
            sampler.set_row(2, **more, seed=3, offset=9)
    assert repr(sampler) == before
    sampler.set_row(2, temperature=0.0, top_p=0.5)
    assert int(sampler(PROBS).tokens[2]) == int(PROBS[2].argmax())


def test_the_filters_logits_have_none() -> None:
    with pytest.raises(TypeError, match=r"^input: expected a field of SamplingParams"):
        fs.filter_logits(PROBS, input="probs")
    with pytest.raises(ValueError, match=r"^input = 'log': expected 'logits' or 'probs'"):
        fs.sample(PROBS, input="log")


BAD: dict[str, tuple[float, int, str]] = {
    "nan": (torch.nan, 1, "a NaN probability"),
    "inf": (torch.inf, 2, "a negative or infinite probability"),
    "negative": (-0.25, 2, "a negative or infinite probability"),
}


@pytest.mark.parametrize("case", [*BAD, "zeros", "masked"])
def test_rows_that_are_no_distribution(case: str, variant: str) -> None:
    p, more = PROBS.clone(), {"input": "probs", "backend": variant}
    status, words = 3, r"no probability above 0 \(everything is masked\)"
    if case in BAD:
        value, status, words = BAD[case]
        p[2, 17] = value
    elif case == "zeros":
        p[2] = 0
    else:
        p[2, :100], more["allowed_ids"] = 0, [None, None, [3, 4], None]
    for call in (fs.sample, fs.probabilities, lambda p, **how: fs.sample(p, seed=1, **how)):
        with pytest.raises(ValueError, match=f"^probs: row 2 has {words}; on_invalid="):
            call(p, **more)
    with pytest.raises(ValueError, match=rf"^probs: row 2 \(1, 0\) has {words}"):
        fs.sample(p.view(2, 2, V), **more)
    out = fs.sample(p, **more, seed=1, on_invalid="flag", logprobs="processed")
    assert out.status.tolist() == [0, 0, status, 0]
    assert out.tokens[2] == -1
    assert bool(out.logprobs[2].isnan())
    assert not bool(fs.probabilities(p, **more, on_invalid="flag")[2].any())


# In a graph -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_in_a_graph(fresh: None) -> None:
    sampler, eager = (fs.Sampler(batch_size=B, seed=3, top_k=9, input="probs", backend="reference") for _ in range(2))
    steps: list[tuple[Callable[[torch.Tensor], Any], Callable[[torch.Tensor], Any]]] = [
        (
            lambda p: fs.sample(p * 1, top_p=0.9, seed=1, input="probs", logprobs="raw", backend="reference").logprobs,
            lambda p: fs.sample(p * 1, top_p=0.9, seed=1, input="probs", logprobs="raw", backend="reference").logprobs,
        ),
        (
            lambda p: fs.probabilities(p * 1, p_less=True, input="probs", backend="reference"),
            lambda p: fs.probabilities(p * 1, p_less=True, input="probs", backend="reference"),
        ),
        (lambda p: sampler(p * 1).tokens, lambda p: eager(p * 1).tokens),
        (lambda p: sampler(p[:2] * 1, rows=[3, 1]).tokens, lambda p: eager(p[:2] * 1, rows=[3, 1]).tokens),
    ]
    for step, plain in steps:
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for p in (PROBS, PROBS.flip(1)):
            assert torch.equal(compiled(p), plain(p))


def test_refusals_in_a_graph(fresh: None) -> None:
    bias = (torch.arange(B + 1), torch.arange(B), torch.ones(B))
    sampler = fs.Sampler(batch_size=B, seed=3, input="probs")
    for step, words in (
        (lambda p: fs.sample(p, temperature=torch.tensor([1.0, 1.0, 0.5, 1.0]), input="probs"), r"\(row 2\)"),
        (lambda p: fs.probabilities(p, typical_p=0.5, input="probs"), "typical_p = 0.5"),
        (lambda p: fs.sample(p, bias=bias, input="probs"), "bias: expected None"),
        (lambda p: sampler(p, bias=bias), "bias: expected None"),
        (lambda p: fs.sample(p, p_less=0.5, input="probs"), "p_less = 0.5: expected True or False"),
        (lambda p: fs.sample(p, p_less=2, input="probs"), "p_less = 2: expected True or False"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            torch.compile(step, fullgraph=True, backend="aot_eager")(PROBS)
    with pytest.raises(Exception, match="p_less = 'yes': expected True or False"):
        torch.compile(lambda p: fs.sample(p, p_less="yes"), fullgraph=True, backend="aot_eager")(PROBS)
