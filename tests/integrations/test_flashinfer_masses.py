"""FlashInfer's functions on probabilities as small as they come: subnormal maxima, whatever the float environment."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from goodness import chi_square

from fastsample import reference as spec
from fastsample.integrations import flashinfer as fi
from fastsample.integrations.flashinfer import arguments, pipeline

LEAST_P = 1e-5


@pytest.fixture(params=[False, True], ids=["subnormals", "flushed"])
def flush(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both modes of torch's float operations."""
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this machine has no such mode")
    yield request.param
    torch.set_flush_denormal(False)


def values(p: torch.Tensor) -> list[list[Fraction]]:
    """Exact values of a table, from bits."""
    bits = p.float().view(torch.int32).tolist()
    return [[_value(b) for b in row] for row in bits]


def _value(bits: int) -> Fraction:
    sign, bits = (-1, bits + 2**31) if bits < 0 else (1, bits)
    exponent, mantissa = bits >> 23, bits & (2**23 - 1)
    units = mantissa if exponent == 0 else (2**23 + mantissa) << (exponent - 1)
    return Fraction(sign * units, 2**149)


def contract_masses(row: list[Fraction]) -> list[int]:
    """w = trunc(p 2^s) with the largest in [2^39, 2^40)."""
    s, top = 0, max(row)
    while top * Fraction(2) ** s < 2**39:
        s += 1
    while top * Fraction(2) ** s >= 2**40:
        s -= 1
    return [int(x * Fraction(2) ** s) for x in row]


def from_bits(bits: list[list[int]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    return torch.tensor(bits, dtype=torch.int64).to(kind).view(dtype)


def tables() -> Iterator[torch.Tensor]:
    """Rows of random mantissas whose maxima lie anywhere, and zeros of both signs among them."""
    g = np.random.default_rng(1)
    for dtype, mantissa, infinity in (
        (torch.float32, 23, 0x7F800000),
        (torch.bfloat16, 7, 0x7F80),
        (torch.float16, 10, 0x7C00),
    ):
        bits = []
        for high in (
            1,
            2,
            3,
            1 << mantissa - 1,
            (1 << mantissa) - 1,
            1 << mantissa,
            9 << mantissa,
            infinity // 2,
            infinity - 1,
        ):
            row = g.integers(0, high + 1, 64)
            row[:3] = high, 0, 1
            bits.append(row.tolist())
        yield from_bits(bits, dtype)


def packed(p: torch.Tensor) -> torch.Tensor:
    return arguments.pack((), "top_k_first", p)


def test_masses_are_the_contract_s(flush: bool) -> None:
    """Those of rows that outputs share, and those that the engine renormalises with."""
    for p in tables():
        w, valid = pipeline._masses("probs", p, packed(p))
        assert valid.all()
        renormed = fi.top_p_renorm_probs(p, 1.0)
        for got, shares, row in zip(w.tolist(), renormed, values(p), strict=True):
            wanted = contract_masses(row)
            assert got == wanted, p.dtype
            assert shares.tolist() == np.float32(np.array(wanted, float) / float(sum(wanted))).tolist(), p.dtype


def test_what_is_no_distribution(flush: bool) -> None:
    least = 1
    for row, status in (
        ([least, 0, 0], 0),
        ([least, -(2**31), 0], 0),  # -0.0
        ([-(2**31), -(2**31), 0], 3),
        ([0, 0, 0], 3),
        ([127 << 23, -(2**31) + least, 0], 2),  # the least negative number
        ([127 << 23, 0x7F800000, 0], 2),
        ([127 << 23, 0x7FC00000, 0], 1),
        ([127 << 23, 0x7FC00000 - 2**31, 0], 1),
    ):
        p = from_bits([row])
        assert pipeline._status("probs", p, packed(p)).tolist() == [status], row
        assert fi.sampling_from_probs(p, return_valid=True)[1].tolist() == [status == 0], row
    with pytest.raises(ValueError, match=r"probs: row 1 has a negative value, -1\.4013e-45"):
        fi.sampling_from_probs(from_bits([[127 << 23, 0], [127 << 23, -(2**31) + 1]]))


def contract_kept(
    row: list[Fraction], top_k: int = 2**31, top_p: float = 1.0, min_p: float = 0.0, joint: bool = False
) -> set[int]:
    """Stage 7 in Python integers: the tokens that are kept."""
    w = contract_masses(row)
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    first = order[:top_k]
    base = order if joint else first
    p30, total = int(Fraction(float(np.float32(top_p))) * 2**30), sum(w[i] for i in base)
    target, mass, prefix = max(1, p30 * total // 2**30), 0, []
    for i in base:
        if mass < target or top_p == 1:
            prefix.append(i)
        mass += w[i]
    floor = int(Fraction(float(np.float32(min_p))) * max(w))
    return {i for i in {*first} & {*prefix} if w[i] >= floor}


LIMITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "k": {"top_k": 5},
    "p": {"top_p": 0.75},
    "min_p": {"min_p": 0.25},
    "k-p": {"top_k": 9, "top_p": 0.75},
    "joint": {"top_k": 9, "top_p": 0.75, "joint": True},
}


@pytest.mark.parametrize("name", LIMITS)
def test_tokens_are_the_contract_s(name: str, flush: bool) -> None:
    """Kept sets and draws against Python integers: the first id whose running mass exceeds floor(u Z / 2^60)."""
    for p in tables():
        seeds = torch.arange(len(p)) * 12345
        tokens = CALLS[name](p, seed=seeds, offset=torch.tensor([3])).tolist()
        for row, seed, token in zip(values(p), seeds, tokens, strict=True):
            w = contract_masses(row)
            kept = contract_kept(row, **LIMITS[name])
            w = [w[i] if i in kept else 0 for i in range(len(w))]
            u = int(spec.uniform60(seed[None], torch.tensor([3]), torch.tensor([0])))
            running = np.cumsum(np.array(w, dtype=object))
            assert token == next(i for i, r in enumerate(running) if r > u * sum(w) >> 60)


CALLS: dict[str, Any] = {
    "plain": lambda p, **more: fi.sampling_from_probs(p, **more),
    "k": lambda p, **more: fi.top_k_sampling_from_probs(p, 5, **more),
    "p": lambda p, **more: fi.top_p_sampling_from_probs(p, 0.75, **more),
    "min_p": lambda p, **more: fi.min_p_sampling_from_probs(p, 0.25, **more),
    "k-p": lambda p, **more: fi.top_k_top_p_sampling_from_probs(p, 9, 0.75, **more),
    "joint": lambda p, **more: fi.top_k_top_p_sampling_from_probs(p, 9, 0.75, filter_apply_order="joint", **more),
}


def times(whole: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """Small integers times 2^-n, exactly, from bits: numpy's float operations, too, flush what torch's do."""
    if dtype == torch.float16:
        assert factor == 2.0**-24
        return whole.to(torch.int16).view(dtype)
    units = (whole.double() * (factor * 2.0**149)).to(torch.int32)
    bits = torch.where(units < 2**23, units, units.float().view(torch.int32) - (149 << 23))
    return bits.view(dtype) if dtype == torch.float32 else (bits >> 16).to(torch.int16).view(dtype)


def normal_and_tiny(dtype: torch.dtype, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    whole = torch.randint(0, 8, (1, 24), generator=torch.Generator().manual_seed(4)).float()
    return whole, times(whole, factor, dtype)


CASES = [
    (torch.float32, 2.0**-126),
    (torch.float32, 2.0**-140),
    (torch.float32, 2.0**-149),
    (torch.bfloat16, 2.0**-133),
    (torch.float16, 2.0**-24),
]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("dtype", "factor"), CASES)
def test_a_factor_changes_no_token(name: str, dtype: torch.dtype, factor: float, flush: bool) -> None:
    whole, tiny = normal_and_tiny(dtype, factor)
    for more in ({}, {"indices": torch.zeros(300, dtype=torch.int64)}):
        seeds = torch.arange(300)
        tables = [t.expand(300, -1) if not more else t for t in (whole, tiny)]
        a, b = (CALLS[name](t, seed=seeds, **more) for t in tables)
        assert torch.equal(a, b)
    counts = np.bincount(
        CALLS[name](tiny, indices=torch.zeros(60_000, dtype=torch.int64), seed=3).numpy(), minlength=24
    )
    wanted = np.where(counts > 0, whole[0].numpy(), 0)  # which tokens stay, the tokens above have shown
    assert chi_square(counts, wanted / wanted.sum()) > LEAST_P


@pytest.mark.parametrize(("dtype", "factor"), CASES)
def test_renormed_rows(dtype: torch.dtype, factor: float, flush: bool) -> None:
    whole, tiny = normal_and_tiny(dtype, factor)
    assert torch.equal(fi.top_p_renorm_probs(tiny, 0.75), fi.top_p_renorm_probs(whole, 0.75))
    assert torch.equal(fi.top_k_renorm_probs(tiny, 5), fi.top_k_renorm_probs(whole, 5).to(dtype))


def test_float64_is_rounded_to_float32(flush: bool) -> None:
    p = torch.tensor([[3.0, 1.0, 0.0, 2.6]], dtype=torch.float64) * 2.0**-149
    torch.testing.assert_close(fi.top_p_renorm_probs(p, 1.0), torch.tensor([[3.0, 1, 0, 3]]) / 7)


@pytest.mark.parametrize(("dtype", "factor"), CASES)
def test_drafts(dtype: torch.dtype, factor: float, flush: bool) -> None:
    """Acceptance, residual and the last token: all of them ratios."""
    rows = 400
    g = torch.Generator().manual_seed(5)
    draft, target = (torch.randint(0, 8, (rows, n, 12), generator=g).float() for n in (3, 4))
    draft[..., 0] += 1
    target[..., 0] += 1
    ids = torch.randint(0, 12, (rows, 3), generator=g)
    want = fi.chain_speculative_sampling(draft, ids, target, seed=6)
    tiny = [times(table, factor, dtype) for table in (draft, target)]
    got = fi.chain_speculative_sampling(tiny[0], ids, tiny[1], seed=6)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert 0 < int(want[2].sum()) < 3 * rows
