"""Probabilities as input where rows are split over ranks, against whole rows: equal to the bit on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, pack_bits
from drafts import KEPT
from probs import MAKERS, SETS, allowed, finish, invalid_probs, softmax
from split import CUTS, LISTS, assert_equal, everywhere, listing

import fastsample as fs
import fastsample.distributed as fd

Tensor = torch.Tensor

REPORTS: tuple[dict[str, Any], ...] = (
    {"num_samples": 2},
    {"logprobs": "raw", "top_logprobs": 3, "kept": "ids"},
    {"logprobs": "processed", "top_logprobs": 3, "num_samples": 3, **KEPT},
)


def check(p: Tensor, number: int, backend: str = "cpu", **kwargs: Any) -> None:
    """All that can be asked of probabilities, with a way to split them and lists that depend on the number."""
    cut, lists = list(CUTS.values())[number % len(CUTS)], LISTS[number // len(CUTS) % len(LISTS)]
    for reports in REPORTS:
        top = {"top_logprobs": min(3, p.shape[1])} if "top_logprobs" in reports else {}
        how = {"seed": torch.arange(len(p)) - 2, "offset": 3, "input": "probs", "on_invalid": "flag"}
        how |= reports | top | kwargs
        whole = fs.sample(p, backend="cpu", **how)
        with listing(*lists):
            assert_equal(everywhere(fd.sample, p, cuts=cut(p.shape[1]), backend=backend, **how), whole)


@pytest.mark.parametrize("fields", SETS)
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_equals_whole_rows(maker: Any, fields: str) -> None:
    number = MAKERS.index(maker) * len(SETS) + list(SETS).index(fields)
    vocab = (2, 17, 64, 100, 257, 1000, 1025)[number % 7]
    p = finish(maker(5, vocab, torch.Generator().manual_seed(number)), list(DTYPES.values())[number % 3])
    for turn in (0, 17, 33):
        check(p, number + turn, "reference" if number % 9 == 0 else "cpu", **SETS[fields])


@pytest.mark.parametrize("order", ["top_k_first", "min_p_first", "joint", "temperature_last"])
@pytest.mark.parametrize("fields", ["k-p", "m", "epsilon", "top_a", "p_less", "xtc", "all"])
def test_every_filter_in_every_order(fields: str, order: str) -> None:
    p = softmax(5, 301, torch.Generator().manual_seed(1))
    for number in (2, 17, 24, 39):
        check(p, number, **{**SETS[fields], "order": order})


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("fields", ["plain", "greedy", "k-p", "m", "epsilon", "xtc"])
def test_masks(fields: str, dtype: torch.dtype) -> None:
    """What is not allowed has no probability, whatever the row says of it; raw log-probabilities are of all."""
    g = torch.Generator().manual_seed(5)
    p = finish(softmax(5, 301, g), dtype)
    words = torch.randint(-(2**31), 2**31, (5, 10), generator=g).to(torch.int32)
    words[1, :5], words[2, 5:], words[3] = 0, -1, 0
    p[0, ~allowed(words, 301)[0]] = torch.nan
    p[4, ~allowed(words, 301)[4]] = -1.0
    for number in (3, 16, 25):
        check(p, number, bitmask=words, **SETS[fields])
        check(p, number, bitmask=words[:, :4], **SETS[fields])


def test_a_mask_of_each_ranks_own_tokens() -> None:
    p = softmax(5, 301, torch.Generator().manual_seed(5))
    may = torch.rand(p.shape, generator=torch.Generator().manual_seed(6)) < 0.5
    how = {"seed": 1, "input": "probs", "top_p": 0.9, **KEPT}

    def masked(probs: Tensor, **part: Any) -> fs.SampleOutput:
        begin = part["vocab_start"]
        return fd.sample(probs, bitmask_shard=pack_bits(may[:, begin : begin + probs.shape[1]]), **how, **part)

    assert_equal(everywhere(masked, p), fs.sample(p, bitmask=pack_bits(may), **how))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("vocab", [3, 300])
def test_invalid_rows(vocab: int, dtype: torch.dtype) -> None:
    for number, fields in enumerate(({}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5})):
        check(invalid_probs(vocab, dtype), 6 * number, **fields)


def test_a_floor_is_measured_by_the_largest_mass() -> None:
    """Which is half of that of a largest logit here: tokens past the lists are above the floor."""
    p = torch.full((2, 100), 0.075)
    p[:, 50] = 0.5
    how = {"seed": 1, "input": "probs", "min_p": 0.1, "kept": "bitmask"}
    whole = fs.sample(p, **how)
    assert whole.kept_count is not None
    assert whole.kept_count.tolist() == [100, 100]
    with listing(3, 8):
        assert_equal(everywhere(fd.sample, p, cuts=(0, 40, 100), **how), whole)


def test_a_sampler() -> None:
    p = softmax(4, 301, torch.Generator().manual_seed(5))
    how = {"batch_size": 4, "seed": 7, "input": "probs", "top_p": [0.9, 0.5, 1.0, 0.99], "logprobs": "processed"}

    def twice(sampler: fs.Sampler, probs: Tensor) -> list[fs.SampleOutput]:
        found = [sampler(probs)]
        sampler.set_row(1, seed=99, top_k=5, top_p=1.0)
        return [*found, sampler(probs)]

    def on_rank(probs: Tensor, **part: Any) -> list[fs.SampleOutput]:
        return twice(fd.ShardedSampler(**how, **part), probs)

    for found in everywhere(on_rank, p):
        for ours, whole in zip(found, twice(fs.Sampler(**how), p), strict=True):
            assert_equal([ours], whole)


@pytest.mark.parametrize(
    ("says", "given"),
    [
        (r"temperature = 0.5: expected 1, or 0", {"temperature": 0.5}),
        ("typical_p = 0.9: expected 1, which is off", {"typical_p": 0.9}),
        ("repetition_penalty = 2", {"repetition_penalty": 2.0, "output_ids": [[1]] * 2}),
        ("bias: expected None", {"bias": {1: 1.0}}),
        ("input = 'weights': expected 'logits' or 'probs'", {"input": "weights"}),
    ],
)
def test_what_needs_logits_is_refused(says: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=says):
        fd.sample(torch.rand(2, 9), vocab_start=0, vocab_size=9, seed=1, **{"input": "probs", **given})
