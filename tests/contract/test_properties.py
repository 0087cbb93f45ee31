"""Rows, parameters and extras made up by hypothesis: the CPU engine equals the reference and obeys the laws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import fastsample as fs
from fastsample.checks import to_float32
from fastsample.params import specs
from fastsample.spec import Spec

# Penalties without ids are among the cases on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect without")

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])

# Values that meet each other: small integers and halves tie, extremes overflow, the rest is anything.
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.5, -0.5, 2.0, -20.0, -41.0, -60.0, -math.inf]),
    st.sampled_from([3e38, -3e38, 1e-40]).map(to_float32),
    st.floats(-30, 30, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
ROWS = arrays("float32", array_shapes(min_dims=2, max_dims=2, max_side=70), elements=VALUES)

NUMBERS = {  # with the values that reach other code; any other parameter's follow from the table
    "temperature": st.one_of(st.sampled_from([0.0, 1e-5, 1.0001e-5, 1.0, 2.0**20]), st.floats(2**-7, 10, width=32)),
    "top_k": st.one_of(st.integers(0, 80), st.just(2**31)),
    "top_p": st.one_of(st.sampled_from([1e-30, 0.5, 1 - 2.0**-24, 1.0]), st.floats(0, 1, width=32, exclude_min=True)),
    "min_p": st.one_of(st.sampled_from([0.0, 1e-30, 1e-12, 0.5, 1.0]), st.floats(0, 1, width=32)),
    "repetition_penalty": st.floats(0.125, 8, width=32),
    "frequency_penalty": st.floats(-3, 3, width=32),
    "presence_penalty": st.floats(-3, 3, width=32),
}


def values_of(spec: Spec) -> st.SearchStrategy[Any]:
    if spec.kind == "choice":
        return st.sampled_from(spec.choices)
    if spec.kind == "bool":
        return st.booleans()
    low, high = max(spec.low, -80), min(spec.high, 80)
    if spec.kind == "int":
        return st.one_of(st.sampled_from(spec.examples), st.integers(int(low), int(high)))
    return st.one_of(
        st.sampled_from(spec.examples),
        st.floats(low, high, width=32, exclude_min=spec.open_low, exclude_max=spec.open_high),
    )


def column(name: str, rows: int) -> st.SearchStrategy[Any]:
    one = NUMBERS[name] if name in NUMBERS else values_of(dict(specs())[name])
    return st.one_of(one, st.lists(one, min_size=rows, max_size=rows))


@st.composite
def calls(draw: st.DrawFn) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits and arguments of filter_logits."""
    x = torch.from_numpy(draw(ROWS)).to(draw(DTYPES))
    x = torch.where(x == math.inf, 60000.0, x)  # float16 has no 3e38
    rows, vocab = x.shape
    names = draw(st.sets(st.sampled_from([name for name, _ in specs()])))
    kwargs = {name: draw(column(name, rows)) for name in sorted(names)}
    ids = st.lists(st.integers(-2, vocab + 1), max_size=12)
    if draw(st.booleans()):
        kwargs["prompt_ids"] = draw(st.lists(ids, min_size=rows, max_size=rows))
    if draw(st.booleans()):
        kwargs["output_ids"] = draw(st.lists(ids, min_size=rows, max_size=rows))
    if draw(st.booleans()):
        words = draw(arrays("int32", (rows, draw(st.integers(0, 4)))))
        kwargs["bitmask"] = torch.from_numpy(words)
    if draw(st.booleans()):
        values = st.one_of(st.just(-math.inf), st.floats(-9, 9, width=32))
        entries = st.dictionaries(st.integers(0, vocab - 1), values, max_size=9)
        kwargs["bias"] = draw(st.lists(st.none() | entries, min_size=rows, max_size=rows))
    return x, kwargs


SEEDS = st.integers(0, 2**64 - 1)


@given(calls(), SEEDS, SEEDS)
def test_cpu_equals_reference(call: tuple[torch.Tensor, dict[str, Any]], seed: int, offset: int) -> None:
    x, kwargs = call
    outcome = {}
    for backend in ("reference", "cpu"):
        common = {**kwargs, "backend": backend, "on_invalid": "flag"}
        out = fs.sample(
            x, **common, seed=seed, offset=offset, num_samples=3, logprobs="processed", top_logprobs=x.shape[1]
        )
        full = [fs.filter_logits(x, **common).view(torch.int32), fs.probabilities(x, **common).view(torch.int32)]
        outcome[backend] = [out.tokens, out.status, out.ranks, out.top_ids, *full]
    for want, got in zip(outcome["reference"], outcome["cpu"], strict=True):
        assert torch.equal(got, want)


@given(calls(), SEEDS)
def test_laws_of_the_kept_set(call: tuple[torch.Tensor, dict[str, Any]], seed: int) -> None:
    x, kwargs = call
    x = x.clamp(min=-1e30, max=1e30).where(x.isfinite(), x) if x.dtype != torch.float16 else x  # x / T stays finite
    common = {**kwargs, "backend": "cpu", "on_invalid": "flag"}
    out = fs.sample(x, **common, seed=seed, num_samples=4)
    p, kept = fs.probabilities(x, **common), fs.filter_logits(x, **common).isfinite()
    valid = out.status == 0
    assert torch.equal(kept.any(1), valid)
    assert not bool((p[~kept] != 0).any())
    assert bool(((p.double().sum(1) - valid.double()).abs() < 1e-5).all())
    drawn = out.tokens[valid]
    assert bool((p[valid].gather(1, drawn) > 0).all())
    assert bool((out.tokens[~valid] == -1).all())
    if {"typical_p", "xtc_probability"} & kwargs.keys():
        return  # they may leave out the best
    # Without the filters: what is kept is a prefix of the ranking, and the best is always in it.
    filters = [name for name, spec in specs() if not spec.counts and not spec.of_history]
    off = {name: getattr(fs.SamplingParams, name) for name in filters}
    everything = fs.filter_logits(x, **{**common, **off})
    lowest = torch.where(kept, everything, math.inf).amin(1, keepdim=True)
    assert not bool((everything > lowest)[valid][~kept[valid]].any())
    assert bool((kept & (everything == everything.amax(1, keepdim=True))).any(1)[valid].all())


@given(ROWS, st.integers(1, 80))
def test_top_k_keeps_exactly_k(values: Any, k: int) -> None:
    x = torch.from_numpy(values)
    alive = (x > -math.inf).sum(1)
    kept = fs.filter_logits(x, top_k=k, backend="cpu", on_invalid="flag").isfinite().sum(1)
    assert torch.equal(kept, torch.where((x == math.inf).any(1), 0, alive.clamp(max=k)))


@given(ROWS)
def test_greedy_is_argmax(values: Any) -> None:
    x = torch.from_numpy(values)
    first = [row.index(max(row)) if max(row) > -math.inf else -1 for row in x.tolist()]
    assert fs.sample(x, temperature=0.0, backend="cpu", on_invalid="flag").tokens.tolist() == first
