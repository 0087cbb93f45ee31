"""The largest sums, strides, counts, seeds and offsets there are, against Python's own integers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsample as fs

M32, M64 = 2**32 - 1, 2**64 - 1
V = 2**20
BACKENDS = ("reference", "cpu")
EDGES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]


def uniform60(seed: int, offset: int, draw: int) -> int:
    """Philox4x32-10 in integers without a size; the upper 60 bits of the first two words."""
    c, k = [offset & M32, offset >> 32, draw, 0], [seed & M32, seed >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & M32, (a >> 32) ^ c[3] ^ k[1], a & M32]
        k = [(k[0] + 0x9E3779B9) & M32, (k[1] + 0xBB67AE85) & M32]
    return ((c[0] << 32) + c[1]) >> 4


def splitmix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def drawn(kept: int, seed: int, offset: int, draw: int = 0) -> int:
    """The token of a row of equal logits of which the first `kept` are kept: each weighs 2^40."""
    return (uniform60(seed, offset, draw) * (kept << 40) >> 60) >> 40


@pytest.fixture(scope="module")
def flat() -> torch.Tensor:
    """The largest sum: V = 2^20 masses of 2^40 are 2^60."""
    return torch.full((1, V), -7.5)


def test_the_largest_sum(flat: torch.Tensor, variant: str) -> None:
    tokens = fs.sample(flat, seed=[M64], offset=M64, num_samples=200, backend=variant).tokens[0]
    assert tokens.tolist() == [drawn(V, M64, M64, j) for j in range(200)]
    assert int(tokens.max()) > V * 0.9
    assert set(fs.probabilities(flat, backend=variant).unique().tolist()) == {2.0**-20}


@pytest.mark.parametrize("top_p", [1 - 2.0**-24, 0.5, 1 / 3, 2.0**-20, 2.0**-30, 1e-45])
def test_top_p_of_the_largest_sum(flat: torch.Tensor, top_p: float, variant: str) -> None:
    p30 = int(float(torch.tensor(top_p)) * 2**30)
    kept = max(1, -(-(p30 * 2**60 // 2**30) // 2**40))
    full = fs.filter_logits(flat, top_p=top_p, backend=variant)[0]
    assert full.isfinite().nonzero()[-1].item() == kept - 1
    assert full.isfinite().sum().item() == kept
    tokens = fs.sample(flat, top_p=top_p, seed=[5], num_samples=20, backend=variant).tokens[0]
    assert tokens.tolist() == [drawn(kept, 5, 0, j) for j in range(20)]


@pytest.mark.parametrize("top_k", [V - 1, V, V + 1, 2**31 - 2, 2**31 - 1, 2**31, 2**32 + 5, 2**63, 2**64])
@pytest.mark.parametrize("ties", ["first", "all"])
def test_top_k(flat: torch.Tensor, top_k: int, ties: str, variant: str) -> None:
    kept = V if ties == "all" else min(top_k, V)
    for k in [top_k, [top_k]] + ([torch.tensor([top_k])] if top_k < 2**63 else []):
        tokens = fs.sample(flat, top_k=k, ties=ties, seed=[3], num_samples=9, backend=variant).tokens[0]
        assert tokens.tolist() == [drawn(kept, 3, 0, j) for j in range(9)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds_and_offsets(backend: str) -> None:
    """Every pair of edges, as unsigned numbers and as the signed ones of the same bits."""
    pairs = [(seed, offset) for seed in EDGES for offset in EDGES]
    seeds, offsets = ([pair[i] for pair in pairs] for i in (0, 1))
    x = torch.zeros(len(pairs), 1000)
    want = [drawn(1000, seed, offset) for seed, offset in pairs]
    signed = [[v - 2**64 if v >= 2**63 else v for v in values] for values in (seeds, offsets)]
    tensors = [torch.tensor(values) for values in signed]
    unsigned = [tensor.view(torch.uint64) for tensor in tensors]
    for s, t in ((seeds, offsets), (signed[0], offsets), tensors, unsigned):
        assert fs.sample(x, seed=s, offset=t, backend=backend).tokens.tolist() == want
    for (seed, offset), token in zip(pairs, want, strict=True):
        assert fs.sample(x[0], seed=[seed], offset=offset, backend=backend).tokens.item() == token


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [2**64 - 3, 2**63 - 2, -1, -(2**63)])
def test_a_scalar_seed_wraps(seed: int, backend: str) -> None:
    tokens = fs.sample(torch.zeros(6, 1000), seed=seed, backend=backend).tokens
    assert tokens.tolist() == [drawn(1000, splitmix64(splitmix64(seed) + row), 0) for row in range(6)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_wraps(backend: str) -> None:
    sampler = fs.Sampler(batch_size=2, seed=[1, M64], offset=[2**64 - 2, 2**63 - 1], backend=backend)
    for step in range(5):
        want = [drawn(1000, s, (t + step) & M64) for s, t in ((1, 2**64 - 2), (M64, 2**63 - 1))]
        assert sampler(torch.zeros(2, 1000)).tokens.tolist() == want
    assert sampler.offsets.tolist() == [3, -(2**63) + 4]


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"top_k": 3}], ids=str)
def test_more_than_2_31_elements(fields: dict[str, Any]) -> None:
    """One row of memory stands for all: B x V is 2^31 and then some."""
    line = torch.zeros(1, V, dtype=torch.bfloat16)
    line[0, [7, 500_000, V - 1]] = torch.tensor([3.0, 4.0, 4.0], dtype=torch.bfloat16)
    rows = 2**11 + 3
    x = line.expand(rows, V)
    assert x.numel() > 2**31
    tokens = fs.sample(x, **fields, seed=range(rows), backend="cpu").tokens
    for row in (0, 1, 2**10, 2**11 - 1, 2**11, rows - 1):
        own = fs.sample(line, **fields, seed=[row], backend="reference").tokens
        assert tokens[row].item() == own.item()
    assert tokens.unique().tolist() == ([500_000] if "temperature" in fields else [7, 500_000, V - 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_further_apart_than_2_31(backend: str, tmp_path: Path) -> None:
    """A stride of 2^31 elements, in a file that is nearly all hole; mask and ids likewise."""
    stride, vocab = 2**31, 300
    memory = torch.from_file(str(tmp_path / "hole"), shared=True, size=2 * stride + vocab, dtype=torch.bfloat16)
    x = memory.as_strided((3, vocab), (stride, 1))
    x.copy_(torch.randn(3, vocab, generator=torch.Generator().manual_seed(1)))
    kwargs = {"seed": 4, "top_p": 0.9, "num_samples": 5}
    got = fs.sample(x, **kwargs, backend=backend).tokens
    assert torch.equal(got, fs.sample(x.contiguous(), **kwargs, backend="reference").tokens)
    words = memory.view(torch.int32).as_strided((3, 9), (stride // 2, 1))
    words.copy_(torch.tensor([[-1] * 9, [5] * 9, [1 << 30] * 9], dtype=torch.int32))
    logits = torch.zeros(3, vocab)
    want = fs.sample(logits, bitmask=words.contiguous(), **kwargs, backend="reference").tokens
    assert torch.equal(fs.sample(logits, bitmask=words, **kwargs, backend=backend).tokens, want)


# Outputs of more than 2^31 elements -----------------------------------------------------------------------------------

ROWS = 2**11 + 3
HUGE = pytest.mark.skipif(not os.environ.get("FASTSAMPLE_HUGE"), reason="needs up to 18 GB of memory: nox -s huge")


@HUGE
@pytest.mark.parametrize("buffer", ["fresh", "out"])
@pytest.mark.parametrize("call", [fs.filter_logits, fs.probabilities])
def test_huge_outputs(call: Callable[..., torch.Tensor], buffer: str) -> None:
    """8.6 GB, and no two rows alike, so that none may stand where another belongs."""
    line = torch.randn(1, V, generator=torch.Generator().manual_seed(1)).bfloat16()
    temperatures = torch.linspace(0.5, 2.0, ROWS)
    assert len(temperatures.unique()) == ROWS
    fields = {"top_k": 1000, "backend": "cpu"}
    out = torch.full((ROWS, V), torch.nan) if buffer == "out" else None
    got = call(line.expand(ROWS, V), temperature=temperatures, **fields, out=out)
    assert got.numel() > 2**31
    for row in range(ROWS):
        assert torch.equal(got[row], call(line[0], temperature=float(temperatures[row]), **fields)), f"row {row}"


@HUGE
def test_huge_tokens() -> None:
    """17 GB of draws; those of a row are the row's own."""
    x, draws = torch.zeros(ROWS, 100), V
    got = fs.sample(x, seed=range(ROWS), num_samples=draws, backend="cpu").tokens
    assert got.numel() > 2**31
    for row in (0, 1, 2**10 - 1, 2**10, 2**11 - 1, 2**11, ROWS - 2, ROWS - 1):
        own = fs.sample(x[:1], seed=[row], num_samples=draws, backend="cpu").tokens[0]
        assert torch.equal(got[row], own)
        assert [drawn(100, row, 0, j) for j in (0, 1, draws - 1)] == got[row, [0, 1, -1]].tolist()
