"""FlashInfer's functions: kept sets and distributions against float64, `indices`, parameters per row.

The ideas are those of FlashInfer's own suite (support, frequencies, renormalisation, masks, joint order, logits against
probabilities, NaN rows), tested exactly where arithmetic allows and by chi-square elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flashinfer_calls import CALLS, call, each_call, probs, rows
from goodness import chi_square

import fastsample as fs
from fastsample.integrations import flashinfer as fi
from fastsample.integrations.flashinfer import pipeline

DRAWS = 200_000
LEAST_P = 1e-5  # of a chi-square test; the draws are seeded, so it passes or fails for good


def oracle(
    p: np.ndarray, top_k: int = 2**31, top_p: float = 1.0, min_p: float = 0.0, joint: bool = False, slack: float = 0.0
) -> np.ndarray:
    """Kept tokens of one row in float64; `slack` moves what top-p has to reach."""
    p = p.astype(np.float64)
    ranked = np.argsort(-p, kind="stable")
    keep = np.zeros(len(p), bool)
    keep[ranked[:top_k]] = True
    base = np.where(keep | joint, p, 0)[ranked]
    keep[ranked[np.cumsum(base) - base >= top_p * base.sum() * (1 - slack)]] &= top_p >= 1
    return keep & (p > 0) & (p >= np.float64(np.float32(min_p)) * p.max())


# Distributions --------------------------------------------------------------------------------------------------------


@each_call
@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_frequencies(name: str, spread: float) -> None:
    """Through `indices`: many outputs of two rows."""
    p = probs(2, 111, 1, spread)
    p[:, ::3] = 0
    p /= p.sum(-1, keepdim=True)
    indices = torch.arange(2 * DRAWS) % 2
    samples = call(name, p, indices=indices, seed=3)
    for row in range(2):
        kept = oracle(p[row].numpy(), **CALLS[name][2])
        wanted = np.where(kept, p[row].double().numpy(), 0)
        counts = np.bincount(samples[indices == row].numpy(), minlength=111)
        assert chi_square(counts, wanted / wanted.sum()) > LEAST_P


@each_call
def test_frequencies_of_rows(name: str) -> None:
    """Without `indices`: every row draws once."""
    p = probs(1, 50, 2)
    samples = call(name, p.expand(40_000, -1), seed=8, offset=2)
    wanted = np.where(oracle(p[0].numpy(), **CALLS[name][2]), p[0].double().numpy(), 0)
    assert chi_square(np.bincount(samples.numpy(), minlength=50), wanted / wanted.sum()) > LEAST_P


@each_call
@pytest.mark.parametrize("vocab", [1, 2, 111, 5000])
def test_indices_change_nothing(name: str, vocab: int) -> None:
    """A pass over the table, one over copies of rows for their outputs, rows filtered once: the same tokens."""
    p = probs(64, vocab, 4)
    everything = torch.arange(64, dtype=torch.int32)
    direct = call(name, p, seed=5, offset=9)
    assert torch.equal(direct, call(name, p, indices=everything, seed=5, offset=9))
    seeds, offsets = torch.arange(64) * 10**15 - 7, torch.arange(64)
    direct = call(name, p, seed=seeds, offset=offsets)
    for chosen in (torch.tensor([63, 0, 5, 5]), torch.arange(640) % 64, torch.arange(63)):
        picked = call(name, p, indices=chosen, seed=seeds[chosen], offset=offsets[chosen])
        assert torch.equal(direct[chosen].long(), picked)
    for count in (1, pipeline.COPIES, pipeline.COPIES + 1):
        many = call(name, p[7:8], indices=torch.zeros(count, dtype=torch.int64), seed=seeds[7:8].expand(count))
        assert many.tolist() == [int(call(name, p[7:8], seed=seeds[7:8]))] * count


def test_logits_draw_what_sample_draws() -> None:
    x = rows(9, 300)
    seeds, offsets = torch.arange(9), torch.full((9,), 4)
    k, p = torch.tensor([1, 2, 3, 50, 300, 10**6, 7, 8, 9]), torch.linspace(0.1, 1, 9)
    for order in ("top_k_first", "joint"):
        got = fi.top_k_top_p_sampling_from_logits(x, k, p, filter_apply_order=order, seed=seeds, offset=offsets)
        want = fs.sample(x, top_k=k, top_p=p, order=order, seed=seeds, offset=offsets).tokens
        assert torch.equal(got.long(), want)
    assert torch.equal(fi.sampling_from_logits(x, seed=6).long(), fs.sample(x, seed=6).tokens)


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
def test_logits_and_their_probabilities_agree(order: str) -> None:
    x = rows(500, 2000, spread=3)
    for k, p in ((100, 0.5), (1000, 0.9), (200, 0.1)):
        a = fi.top_k_top_p_sampling_from_logits(x, k, p, filter_apply_order=order, seed=1)
        b = fi.top_k_top_p_sampling_from_probs(torch.softmax(x, -1), k, p, filter_apply_order=order, seed=1)
        assert (a == b).float().mean() > 0.995


# Kept sets ------------------------------------------------------------------------------------------------------------


def test_top_k_keeps_exactly_k() -> None:
    for vocab in (1, 5, 111, 32_000):
        p = probs(8, vocab, vocab)
        k = torch.randint(1, vocab + 1, (8,), generator=torch.Generator().manual_seed(1))
        got = fi.top_k_renorm_probs(p, k)
        for row in range(8):
            assert np.array_equal(got[row].numpy() > 0, oracle(p[row].numpy(), top_k=int(k[row]))), (vocab, row)
        tied = torch.full((3, vocab), 1 / vocab)
        kept = fi.top_k_renorm_probs(tied, (vocab + 1) // 2) > 0
        assert torch.equal(kept, (torch.arange(vocab) < (vocab + 1) // 2).expand(3, -1))


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("vocab", [2, 111, 5000, 32_000])
def test_top_p_keeps_what_float64_keeps(vocab: int, spread: float) -> None:
    """The exact set but for what masses leave out: less than 2^-40 of the largest probability, of each token."""
    p = probs(16, vocab, vocab, spread)
    exactly = 0
    for top_p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0):
        kept = fi.top_p_renorm_probs(p, top_p).numpy() > 0
        share = np.trunc(float(np.float32(top_p)) * 2**30) / 2**30
        for row in range(16):
            most = oracle(p[row].numpy(), top_p=share, slack=-(2.0**-23))
            least = oracle(p[row].numpy(), top_p=share, slack=2.0**-23)
            drawn = p[row].numpy() > p[row].numpy().max() * 2.0**-39
            assert (least & drawn <= kept[row]).all(), (top_p, row)
            assert (kept[row] <= most).all(), (top_p, row)
            exactly += np.array_equal(kept[row] & drawn, oracle(p[row].numpy(), top_p=share) & drawn)
    assert exactly >= 0.98 * 16 * 6


@pytest.mark.parametrize(
    ("row", "top_p", "kept"),
    [
        ([0.5, 0.25, 0.125, 0.125], 0.75, [0, 1]),
        ([0.5, 0.25, 0.125, 0.125], 0.76, [0, 1, 2]),
        ([4.0, 3.0, 1.0, 0.0], 0.875, [0, 1]),
        ([1.0] * 8, 0.375, [0, 1, 2]),
        ([0.25] * 4, 0.5, [0, 1]),
        ([0.1, 0.2, 0.3, 0.4], 0.0, [3]),
        ([0.0, 0.5, 0.0, 0.5], 1.0, [1, 3]),
        ([2.0, 6.0, 4.0, 4.0], 0.625, [1, 2]),
        ([0.4, 0.3, 0.2, 0.1], 0.9, [0, 1, 2]),
        # As float32, 0.8 is 0.80000001, and 0.5 + 0.3 is that much of 1.00000002.
        ([0.5, 0.3, 0.15, 0.05], 0.8, [0, 1, 2]),
        ([0.5, 0.3, 0.15, 0.05], 0.79999, [0, 1]),
    ],
)
def test_top_p_of_round_numbers(row: list[float], top_p: float, kept: list[int]) -> None:
    renormed = fi.top_p_renorm_probs(torch.tensor([row]), top_p)[0]
    assert renormed.nonzero()[:, 0].tolist() == kept
    wanted = torch.tensor([x if i in kept else 0.0 for i, x in enumerate(row)])
    torch.testing.assert_close(renormed, wanted / wanted.sum())


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.1, 0.3, 0.7, 1.0])
def test_min_p_support(min_p: float) -> None:
    p = probs(1, 200, 5)
    samples = fi.min_p_sampling_from_probs(p, min_p, torch.zeros(DRAWS, dtype=torch.int32), seed=2)
    kept = oracle(p[0].numpy(), min_p=min_p)
    seen = np.zeros(200, bool)
    seen[samples.numpy()] = True
    assert (seen <= kept).all()
    likely = kept & (p[0].numpy() > 20 / DRAWS)
    assert (seen >= likely).all()


def test_round_min_p() -> None:
    p = torch.tensor([[0.5, 0.25, 0.2, 0.05]])
    samples = fi.min_p_sampling_from_probs(p, 0.5, torch.zeros(1000, dtype=torch.int64), seed=1)
    assert set(samples.tolist()) == {0, 1}


def test_joint_measures_the_whole_row() -> None:
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    many = torch.zeros(2000, dtype=torch.int32)
    first = fi.top_k_top_p_sampling_from_probs(p, 2, 0.55, many, seed=1)
    joint = fi.top_k_top_p_sampling_from_probs(p, 2, 0.55, many, "joint", seed=1)
    assert set(first.tolist()) == {0}  # 0.4 / 0.7 reaches 0.55
    assert set(joint.tolist()) == {0, 1}
    with pytest.raises(ValueError, match="filter_apply_order = 'both': expected"):
        fi.top_k_top_p_sampling_from_probs(p, 2, 0.5, filter_apply_order="both")


def test_parameters_per_row() -> None:
    p = probs(4, 100, 6)
    k, top_p, min_p = torch.tensor([1, 5, 100, 2**31]), torch.tensor([0.2, 0.9, 1.0, 0.5]), torch.rand(4)
    for function, name, values in (
        (fi.top_k_renorm_probs, "top_k", k),
        (fi.top_p_renorm_probs, "top_p", top_p),
        (fi.top_k_mask_logits, "top_k", k),
    ):
        whole = function(p, values)
        for row in range(4):
            assert torch.equal(whole[row], function(p[row : row + 1], values[row].item())[0]), name
    for name, values in (("top_k", k), ("top_p", top_p), ("min_p", min_p)):
        function = getattr(fi, f"{name}_sampling_from_probs")
        seeds = torch.arange(4)
        whole = function(p, values, seed=seeds)
        alone = [function(p[i : i + 1], values[i].item(), seed=seeds[i : i + 1]) for i in range(4)]
        assert torch.equal(whole, torch.cat(alone))
        # With indices a parameter belongs to the row, not to the output.
        chosen = torch.tensor([3, 3, 0])
        picked = function(p, values, chosen, seed=torch.tensor([3, 3, 0]))
        assert torch.equal(picked.int(), whole[chosen])


# Renormalisation and masks --------------------------------------------------------------------------------------------


def test_renormed_rows_sum_to_one() -> None:
    p = probs(6, 3000)
    for got in (fi.top_p_renorm_probs(p, 0.9), fi.top_k_renorm_probs(p, 40), fi.top_p_renorm_probs(p * 37, 0.9)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double().sum(-1), torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0)
        kept = torch.where(got > 0, p, 0).double()
        torch.testing.assert_close(got.double(), kept / kept.sum(-1, keepdim=True), atol=2**-39, rtol=2**-23)
    assert fi.top_k_renorm_probs(p.bfloat16(), 40).dtype == torch.bfloat16
    assert fi.top_p_renorm_probs(p.half(), 0.9).dtype == torch.float32
    assert fi.top_p_renorm_prob is fi.top_p_renorm_probs
    assert fi.top_k_renorm_prob is fi.top_k_renorm_probs


def test_renorm_then_sample_is_sample() -> None:
    p = probs(200, 500, 9)
    renormed = fi.top_p_renorm_probs(p, 0.8)
    a, b = fi.sampling_from_probs(renormed, seed=2), fi.top_p_sampling_from_probs(p, 0.8, seed=2)
    assert (a == b).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mask_logits(dtype: torch.dtype) -> None:
    x = rows(5, 200).to(dtype)
    x[0, :150] = -torch.inf
    x[1] = -torch.inf
    x[2, 5] = -0.0
    k = torch.tensor([100, 3, 200, 1, 50])
    got = fi.top_k_mask_logits(x, k)
    assert got.dtype == dtype
    for row in range(5):
        best = torch.sort(x[row].float(), descending=True, stable=True).indices[: k[row]]
        want = torch.full_like(x[row], -torch.inf)
        want[best] = x[row, best]
        assert torch.equal(got[row].view(torch.uint8), want.view(torch.uint8))
    for value, words in ((torch.nan, "a NaN"), (torch.inf, r"a \+inf")):
        bad = x.clone()
        bad[3, 7] = value
        with pytest.raises(ValueError, match=f"logits: row 3 has {words}"):
            fi.top_k_mask_logits(bad, 3)


@pytest.mark.parametrize("temperature", [None, 1, 0.5, 0.1, "rows"])
def test_softmax(temperature: Any) -> None:
    x = rows(7, 1000, spread=5)
    x[0, 100:] = -torch.inf
    if temperature == "rows":
        temperature = torch.linspace(0.1, 3, 7)
    divisor = 1 if temperature is None else temperature
    want = torch.softmax(x.double() / (divisor[:, None] if isinstance(divisor, torch.Tensor) else divisor), -1)
    got = fi.softmax(x, temperature)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(fi.softmax(x.bfloat16()), torch.softmax(x.bfloat16().float(), -1))


def test_softmax_at_zero_is_greedy() -> None:
    x = torch.tensor([[1.0, 3, 3, 2], [1, 2, 3, 4]])
    assert fi.softmax(x, 0.0).tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    mixed = fi.softmax(x, torch.tensor([0.0, 1.0]))
    assert mixed[0].tolist() == [0, 1, 0, 0]
    torch.testing.assert_close(mixed[1], torch.softmax(x[1], -1))


@pytest.mark.parametrize(("bits", "token"), [(0, 2), (2**60 - 1, 4)])
def test_the_ends_of_the_uniforms(bits: int, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probability of 0 is drawn at neither end, by outputs that share a row. (Others are drawn by the engines.)"""
    monkeypatch.setattr(pipeline, "uniform60", lambda seeds, offsets, index: torch.full((6,), bits))
    p = torch.tensor([[0, 0, 0.5, 0, 0.5, 0]])
    assert fi.sampling_from_probs(p, torch.zeros(6, dtype=torch.int32)).tolist() == [token] * 6


def test_one_call_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, the table goes through an engine once (a second time for check_nan)."""
    calls, select_ = [], pipeline.select

    def counted(backend: str, x: torch.Tensor) -> Any:
        calls.append(x.shape)
        return select_(backend, x)

    monkeypatch.setattr(pipeline, "select", counted)
    p = probs(3, 50)
    few, many = torch.tensor([2, 0]), torch.arange(30) % 3
    for name in CALLS:
        for more, shape in (({}, (3, 50)), ({"indices": few}, (2, 50)), ({"indices": many}, (3, 50))):
            calls.clear()
            call(name, p, seed=1, **more)
            assert calls == [shape], name
    for function in (fi.top_k_renorm_probs, fi.top_p_renorm_probs, fi.top_k_mask_logits, fi.softmax):
        calls.clear()
        function(p, 1)
        assert calls == [(3, 50)]
    calls.clear()
    fi.sampling_from_probs(p, check_nan=True)
    assert len(calls) == 2
