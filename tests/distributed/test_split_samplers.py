"""Samplers and drafts, with rows that are split over ranks: as with whole rows, step after step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import pack_bits
from conformance import assert_agree, named
from drafts import BLOCKS, KEPT
from ranks import on_ranks
from split import CUTS, ROWS, UNEVEN, VOCAB, assert_equal, everywhere

import fastsample as fs
import fastsample.distributed as fd

pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect without")  # of steps without ids

Tensor = torch.Tensor


def serve(sampler: fs.Sampler, logits: Callable[[Tensor], Tensor]) -> list[Any]:
    """What a serving loop sees: steps of all slots and of some, a new sequence in one of them, drafts."""
    rows = torch.randn(4, 6, VOCAB, generator=torch.Generator().manual_seed(3)) * 3
    found: list[Any] = [sampler(logits(rows[0]), prompt_ids=[[1, 2, 250]] * 6, output_ids=[[250, 3]] * 6)]
    found.append(sampler(logits(rows[1][[4, 1]]), rows=[4, 1]))
    sampler.set_row(1, seed=99, offset=2**40, top_k=5, top_p=1.0)
    found.append(sampler(logits(rows[2]), out=sampler(logits(rows[3]))))
    found.append(sampler(logits(rows[2][3:5]), rows=slice(3, 5), bitmask=pack_bits(rows[0][3:5] > 0)))
    return [*found, sampler.offsets, sampler.seeds]


@pytest.mark.parametrize("logprobs", [None, "raw", "processed"])
def test_a_sampler_serves_as_the_undivided_one(logprobs: str | None) -> None:
    how = {"batch_size": 6, "seed": 7, "offset": 2**64 - 2, "logprobs": logprobs, "kept": "ids", "entropy": True}
    how |= {"temperature": [1.0, 0.0, 0.7, 1.0, 2.0, 1.0], "top_p": [0.9, 1.0, 0.5, 0.99, 1.0, 0.9], "min_p": 0.001}
    expected = serve(fs.Sampler(**how, repetition_penalty=1.2), lambda x: x)

    def on_rank(wire: Any, begin: int, end: int) -> list[Any]:
        sampler = fd.ShardedSampler(vocab_start=begin, vocab_size=VOCAB, group=wire, **how, repetition_penalty=1.2)
        return serve(sampler, lambda x: x[:, begin:end])

    for own in on_ranks(UNEVEN, on_rank):
        for ours, whole in zip(own[:-2], expected[:-2], strict=True):
            assert_agree(named(ours), named(whole))
        assert torch.equal(own[-2], expected[-2])
        assert torch.equal(own[-1], expected[-1])


NEUTRAL = {"temperature": 1.0, "top_k": 0, "min_p": 0.0}


@pytest.mark.parametrize("some", [None, [5, 0, 2]], ids=str)
@pytest.mark.parametrize("before", [{"top_k": 5}, {"temperature": 0.0}, {"min_p": 0.5}, {"top_p": 0.9}], ids=str)
def test_a_slots_new_parameters_count_at_once(before: dict[str, Any], some: list[int] | None) -> None:
    """They may ask for more than the slots did before, and for less."""

    def steps(sampler: fs.Sampler, logits: Tensor) -> list[fs.SampleOutput]:
        logits = logits if some is None else logits[some]
        found = [sampler(logits, rows=some), sampler(logits, rows=some)]
        for fields in ({"top_p": 0.99}, {"typical_p": 0.5}, {"top_n_sigma": 1.0}, {"xtc_probability": 0.9}):
            sampler.set_row(0, seed=3, **NEUTRAL, **fields)
            found.append(sampler(logits, rows=some))
        return found

    def on_rank(wire: Any, begin: int, end: int) -> list[fs.SampleOutput]:
        return steps(fd.ShardedSampler(vocab_start=begin, vocab_size=VOCAB, group=wire, **how), ROWS[:, begin:end])

    how = {"batch_size": 6, "seed": 7, "kept": "bitmask", **before}
    expected = steps(fs.Sampler(**how), ROWS)
    for found in on_ranks(UNEVEN, on_rank):
        for ours, whole in zip(found, expected, strict=True):
            assert_agree(named(ours), named(whole))


def test_an_error_moves_no_offset() -> None:
    rows = ROWS.clone()
    rows[5, 0] = torch.inf

    def on_rank(wire: Any, begin: int, end: int) -> list[int]:
        sampler = fd.ShardedSampler(batch_size=6, seed=1, vocab_start=begin, vocab_size=VOCAB, group=wire)
        sampler(ROWS[:, begin:end])
        for wrong in (rows, ROWS[:5]):
            with pytest.raises(ValueError, match=r"row 5|expected 6 rows"):
                sampler(wrong[:, begin:end])
        return sampler.offsets.tolist()

    assert on_ranks(UNEVEN, on_rank) == [[1] * 6] * 4


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_sampler_stays_with_its_group(duplicate: Callable[[Any], Any]) -> None:
    sampler = fd.ShardedSampler(batch_size=1, vocab_start=0, vocab_size=9)
    with pytest.raises(TypeError, match="ShardedSampler: cannot be copied or pickled"):
        duplicate(sampler)


# Drafts --------------------------------------------------------------------------------------------------------------

FEW = list(BLOCKS)[::7] + list(BLOCKS)[-9:]


@pytest.mark.parametrize("name", FEW)
def test_drafts(name: str) -> None:
    block = BLOCKS[name]
    logits, given = block.build()
    how = {"seed": block.seeds, "offset": 2**64 - 2, "on_invalid": "flag", **given, **KEPT}
    how |= {"logprobs": "processed", "top_logprobs": min(3, block.vocab)}
    ids = block.drafted()
    whole = fs.verify(logits, ids, **how)
    for cut in ("2", "3 empty first", "8"):
        assert_equal(everywhere(fd.verify, logits, ids, cuts=CUTS[cut](block.vocab), **how), whole)


def test_requests_of_different_lengths() -> None:
    how = {"num_drafts": [0, 2, 1], "seed": 3, "top_p": 0.8, "logprobs": "raw", "kept": "ids"}
    right = fs.verify(ROWS, [[], [0, 0], [0]], **how).tokens[:, 0]
    drafts = [[], [int(right[1]), 5], [int(right[2])]]
    whole = fs.verify(ROWS, drafts, **how)
    assert whole.num_accepted.tolist() == [0, 1, 1]
    assert_equal(everywhere(fd.verify, ROWS, drafts, **how), whole)


def test_a_tree() -> None:
    rows = ROWS.view(1, 6, VOCAB)
    how = {"seed": 3, "temperature": 0.5, "top_p": 0.9, "logprobs": "processed"}
    first = int(fs.sample(rows[:, 0], seed=3, temperature=0.5, top_p=0.9).tokens)
    drafts, parents = torch.tensor([[0, 9, first, 4, 5, 6]]), torch.tensor([[-1, 0, 0, 2, 2, -1]])
    whole = fs.verify_tree(rows, drafts, parents, **how)
    assert whole.num_accepted.tolist() == [1]
    assert_equal(everywhere(fd.verify_tree, rows, drafts, parents, **how), whole)


def test_a_samplers_drafts() -> None:
    rows = ROWS.view(3, 2, VOCAB)
    how = {"batch_size": 3, "seed": 7, "top_p": 0.7, "repetition_penalty": 1.5}
    ids = {"output_ids": [[1, 250, 3]] * 3}

    def twice(sampler: fs.Sampler, logits: Tensor) -> list[Tensor]:
        out = sampler.verify(logits, [[5]] * 3, **ids)
        right = out.tokens[:, :1]
        found = [out.tokens, sampler.offsets]
        sampler.set_row(0, seed=1)
        return [*found, sampler.verify(logits, right, **ids).tokens, sampler.offsets]

    def on_rank(wire: Any, begin: int, end: int) -> list[Tensor]:
        return twice(fd.ShardedSampler(vocab_start=begin, vocab_size=VOCAB, group=wire, **how), rows[..., begin:end])

    expected = twice(fs.Sampler(**how), rows)
    for found in on_ranks(UNEVEN, on_rank):
        assert all(torch.equal(ours, whole) for ours, whole in zip(found, expected, strict=True))
