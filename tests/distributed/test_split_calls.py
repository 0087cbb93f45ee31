"""The public calls for rows that are split over ranks: shapes, masks, histories, seeds, samplers, drafts, errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import pack_bits
from conformance import assert_agree, invalid_rows, named
from drafts import BLOCKS, KEPT
from ranks import on_ranks
from split import CUTS, listing

import fastsample as fs
import fastsample.distributed as fd

pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect without")  # of steps without ids

Tensor = torch.Tensor

VOCAB = 301
G = torch.Generator().manual_seed(6)
LOGITS = torch.randn(6, VOCAB, generator=G) * 3
UNEVEN = (0, 45, 45, 200, VOCAB)
REPORTS = {"logprobs": "processed", "top_logprobs": 3, "num_samples": 2, **KEPT}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-k": {"top_k": 9, "top_p": 0.8},
    "top-p": {"top_p": 0.9},
}


def everywhere(
    call: Callable[..., Any], logits: Tensor, *given: Any, cuts: Sequence[int] = UNEVEN, vocab: int = 0, **more: Any
) -> list[Any]:
    """What a call returns on each rank, given its part of the logits."""

    def on_rank(wire: Any, begin: int, end: int) -> Any:
        part = {"vocab_start": begin, "vocab_size": vocab or logits.shape[-1], "group": wire}
        return call(logits[..., begin:end], *given, **part, **more)

    return on_ranks(cuts, on_rank)


def named_of(out: Any) -> dict[str, Tensor]:
    return {name: value for name in type(out).__slots__ if (value := getattr(out, name)) is not None}


def assert_equal(found: list[Any], whole: Any) -> None:
    for out in found:
        assert_agree(named_of(out), named_of(whole))


# Rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("logprobs", [None, "raw", "processed"])
def test_invalid_rows(logprobs: str | None, mode: str, dtype: torch.dtype) -> None:
    """A NaN or an infinity on one rank is every rank's; a row is empty where all ranks have nothing."""
    rows = invalid_rows().to(dtype)
    how = {**MODES[mode], "seed": 3, "on_invalid": "flag", "logprobs": logprobs, "top_logprobs": 4 if logprobs else 0}
    whole = fs.sample(rows, **how)
    for cuts in ((0, 1, 600, 600, 1030), (0, 1030), (0, 0, 513, 1030)):
        assert_equal(everywhere(fd.sample, rows, cuts=cuts, **how), whole)


@pytest.mark.parametrize("mode", MODES)
def test_an_invalid_row_raises_on_every_rank(mode: str) -> None:
    rows = LOGITS.clone()
    rows[4, 299] = torch.nan

    def said(logits: Tensor, **part: Any) -> str:
        with pytest.raises(ValueError, match="row 4") as caught:
            fd.sample(logits, seed=1, **MODES[mode], **part)
        return str(caught.value)

    with pytest.raises(ValueError, match="row 4") as whole:
        fs.sample(rows, seed=1, **MODES[mode])
    assert everywhere(said, rows) == [str(whole.value)] * 4


BESIDE: tuple[dict[str, Any], ...] = (
    {"top_k": 5, "top_n_sigma": 0.5},
    {"top_k": 5, "top_p": 0.3},
    {"top_k": 5, "ties": "all"},
    {"top_k": 30, "min_p": 0.2},
    {"min_p": 0.2, "typical_p": 0.3},
    {"min_p": 0.2, "top_p": 0.3},
    {"min_p": 0.2, "top_n_sigma": 0.5},
    {"min_p": 0.2, "eta_cutoff": 0.2},
    {"min_p": 0.2, "xtc_probability": 0.5, "xtc_threshold": 0.02},
)


@pytest.mark.parametrize("order", ["top_k_first", "min_p_first", "joint", "temperature_last"])
@pytest.mark.parametrize("fields", BESIDE, ids=str)
def test_a_filter_that_measures_before_another_cuts(fields: dict[str, Any], order: str) -> None:
    """It measures the whole row, although the other leaves nothing but listed tokens."""
    how = {"seed": 3, "order": order, "temperature": 1.3, **fields, "kept": "bitmask", "num_samples": 3}
    for rows in (LOGITS, (LOGITS / 2).round() / 2):
        whole = fs.sample(rows, **how)
        for lists in ((3, 8), (20, 1024)):
            with listing(*lists):
                assert_equal(everywhere(fd.sample, rows, **how), whole)


@pytest.mark.parametrize("logprobs", ["raw", "processed"])
def test_raw_logits_that_only_processing_makes_valid(logprobs: str) -> None:
    rows = LOGITS[:3].clone()
    rows[0, 3], rows[1, 266] = torch.nan, torch.inf
    allowed = torch.ones(3, VOCAB, dtype=torch.bool)
    allowed[0, 3] = allowed[1, 266] = False
    how = {"bitmask": pack_bits(allowed), "seed": 1, "logprobs": logprobs, "top_logprobs": 5, "top_p": 0.9}
    whole = fs.sample(rows, **how)
    assert whole.status.tolist() == [0, 0, 0]
    assert_equal(everywhere(fd.sample, rows, **how), whole)


@pytest.mark.parametrize("mode", MODES)
def test_columns_past_the_vocabulary(mode: str) -> None:
    """With which it was padded, so that ranks have equal parts: the last ranks' may all be such."""
    padded = torch.cat([LOGITS, torch.full((6, 99), torch.nan)], 1)
    how = {"seed": 4, **REPORTS, **MODES[mode]}
    for cuts in ((0, 200, 400), (0, 100, 200, 300, 400), (0, 301, 400), (0, 50, 350, 400)):
        assert_equal(everywhere(fd.sample, padded, cuts=cuts, vocab=VOCAB, **how), fs.sample(LOGITS, **how))


@pytest.mark.parametrize("shape", [(VOCAB,), (1, VOCAB), (2, 3, VOCAB), (0, VOCAB), (2, 0, VOCAB)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    rows = LOGITS[: max(1, torch.Size(shape[:-1]).numel())].reshape(-1)[: torch.Size(shape).numel()].view(shape)
    for mode in MODES.values():
        how = {"seed": 4, "logprobs": "raw", "kept": "ids", **mode}
        assert_equal(everywhere(fd.sample, rows, **how), fs.sample(rows, **how))


def test_buffers_of_an_earlier_call() -> None:
    how = {"seed": 4, **REPORTS, "top_p": 0.9}

    def twice(logits: Tensor, **part: Any) -> fs.SampleOutput:
        out = fd.sample(-logits, **how, **part)
        pointers = [value.data_ptr() for value in named(out).values()]
        assert fd.sample(logits, out=out, **how, **part) is out
        assert [value.data_ptr() for value in named(out).values()] == pointers
        return out

    assert_equal(everywhere(twice, LOGITS), fs.sample(LOGITS, **how))


def test_each_rank_may_have_an_engine_of_its_own() -> None:
    engines = {0: "cpu", 45: "auto", 200: "reference"}  # by where a rank begins

    def own(logits: Tensor, **part: Any) -> list[fs.SampleOutput]:
        backend = engines[part["vocab_start"]]
        return [fd.sample(logits, seed=1, backend=backend, **REPORTS, **mode, **part) for mode in MODES.values()]

    for outputs in everywhere(own, LOGITS):
        for out, mode in zip(outputs, MODES.values(), strict=True):
            assert_equal([out], fs.sample(LOGITS, seed=1, **REPORTS, **mode))


def test_nothing_is_written_to_the_logits_nor_do_ranks_share_outputs() -> None:
    before = LOGITS.clone()
    found = everywhere(fd.sample, LOGITS, seed=1, top_p=0.9, presence_penalty=1.0, output_ids=[[7]] * 6)
    assert torch.equal(LOGITS, before)
    assert len({out.tokens.data_ptr() for out in found}) == 4


# Masks, histories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", ["1", "3 uneven", "4 words", "8", "4 all on one"])
def test_a_mask_of_each_ranks_own_tokens(cut: str, mode: str) -> None:
    allowed = torch.rand(6, VOCAB, generator=torch.Generator().manual_seed(1)) < 0.5
    also = torch.rand(VOCAB, generator=torch.Generator().manual_seed(2)) < 0.5
    how = {"seed": 1, **MODES[mode], **REPORTS}

    def masked(logits: Tensor, both: bool, **part: Any) -> fs.SampleOutput:
        begin = part["vocab_start"]
        shard = pack_bits(allowed[:, begin : begin + logits.shape[1]])
        whole = {"bitmask": pack_bits(also[None])[0]} if both else {}
        return fd.sample(logits, bitmask_shard=shard, **whole, **how, **part)

    cuts = CUTS[cut](VOCAB)
    assert_equal(everywhere(masked, LOGITS, False, cuts=cuts), fs.sample(LOGITS, bitmask=pack_bits(allowed), **how))
    both = fs.sample(LOGITS, bitmask=pack_bits(allowed & also), **how)
    assert_equal(everywhere(masked, LOGITS, True, cuts=cuts), both)


def test_a_mask_that_ends_before_the_ranks_tokens_forbids_the_rest() -> None:
    allowed = torch.zeros(6, VOCAB, dtype=torch.bool)
    allowed[:, :32] = allowed[:, 45:77] = allowed[:, 200:232] = True

    def masked(logits: Tensor, **part: Any) -> fs.SampleOutput:
        return fd.sample(logits, bitmask_shard=torch.tensor([-1], dtype=torch.int32), seed=1, top_p=0.99, **part)

    assert_equal(everywhere(masked, LOGITS), fs.sample(LOGITS, bitmask=pack_bits(allowed), seed=1, top_p=0.99))


HISTORIES: dict[str, dict[str, Any]] = {
    "DRY": {"dry_multiplier": 5.0, "dry_allowed_length": 1},
    "DRY with a breaker": {"dry_multiplier": 5.0, "dry_allowed_length": 1, "dry_breakers": [VOCAB - 1]},
    "n-grams": {"no_repeat_ngram_size": 3},
    "penalties": {"repetition_penalty": 2.0, "presence_penalty": 3.0},
}


@pytest.mark.parametrize("edit", HISTORIES)
def test_a_history_whose_tokens_are_on_other_ranks(edit: str) -> None:
    """What follows a repetition is on the first rank, and what repeats is on the others, and outside the vocabulary."""
    rows = torch.full((2, VOCAB), -9.0)
    rows[:, 7], rows[:, 8] = 3.0, 2.0
    ids = [[100, VOCAB - 1, -1, 250, 7, 44, 100, VOCAB + 3, VOCAB - 1, 250]] * 2
    how = {**HISTORIES[edit], "prompt_ids": [ids[0][:4]] * 2, "output_ids": [ids[0][4:]] * 2, "seed": 5, "top_k": 5}
    whole = fs.sample(rows, **how)
    plain = fs.sample(rows, seed=5, top_k=5, temperature=0.0)
    assert fs.sample(rows, **{**how, "temperature": 0.0}).tokens.tolist() != plain.tokens.tolist()
    for mode in (how, {**how, "temperature": 0.0}, {**how, "top_k": 0, "top_p": 0.9}):
        whole = fs.sample(rows, **mode)
        for cuts in (UNEVEN, (0, 8, 9, VOCAB), (0, 0, 7, 45, VOCAB - 1, VOCAB)):
            assert_equal(everywhere(fd.sample, rows, cuts=cuts, **mode), whole)


# Seeds ---------------------------------------------------------------------------------------------------------------


def test_without_a_seed_ranks_take_that_of_the_first() -> None:
    """Threads draw from one generator, so each has another seed to begin with."""

    def calls(logits: Tensor, **part: Any) -> list[list[int]]:
        drafts = torch.full((3, 1), 5)
        drawn = [fd.sample(logits, num_samples=8, **part, **mode).tokens for mode in MODES.values()]
        return [t.tolist() for t in (*drawn, fd.verify(logits.view(3, 2, -1), drafts, **part).tokens)]

    found = everywhere(calls, LOGITS)
    assert found == [found[0]] * 4


def test_seeds_and_offsets_of_64_bits_for_each_row() -> None:
    how = {"seed": [2**64 - 1 - i for i in range(6)], "offset": [2**63 + i for i in range(6)], "top_p": 0.9}
    assert_equal(everywhere(fd.sample, LOGITS, **how), fs.sample(LOGITS, **how))


# Samplers ------------------------------------------------------------------------------------------------------------


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
        return steps(fd.ShardedSampler(vocab_start=begin, vocab_size=VOCAB, group=wire, **how), LOGITS[:, begin:end])

    how = {"batch_size": 6, "seed": 7, "kept": "bitmask", **before}
    expected = steps(fs.Sampler(**how), LOGITS)
    for found in on_ranks(UNEVEN, on_rank):
        for ours, whole in zip(found, expected, strict=True):
            assert_agree(named(ours), named(whole))


def test_an_error_moves_no_offset() -> None:
    rows = LOGITS.clone()
    rows[5, 0] = torch.inf

    def on_rank(wire: Any, begin: int, end: int) -> list[int]:
        sampler = fd.ShardedSampler(batch_size=6, seed=1, vocab_start=begin, vocab_size=VOCAB, group=wire)
        sampler(LOGITS[:, begin:end])
        for wrong in (rows, LOGITS[:5]):
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
    right = fs.verify(LOGITS, [[], [0, 0], [0]], **how).tokens[:, 0]
    drafts = [[], [int(right[1]), 5], [int(right[2])]]
    whole = fs.verify(LOGITS, drafts, **how)
    assert whole.num_accepted.tolist() == [0, 1, 1]
    assert_equal(everywhere(fd.verify, LOGITS, drafts, **how), whole)


def test_a_tree() -> None:
    rows = LOGITS.view(1, 6, VOCAB)
    how = {"seed": 3, "temperature": 0.5, "top_p": 0.9, "logprobs": "processed"}
    first = int(fs.sample(rows[:, 0], seed=3, temperature=0.5, top_p=0.9).tokens)
    drafts, parents = torch.tensor([[0, 9, first, 4, 5, 6]]), torch.tensor([[-1, 0, 0, 2, 2, -1]])
    whole = fs.verify_tree(rows, drafts, parents, **how)
    assert whole.num_accepted.tolist() == [1]
    assert_equal(everywhere(fd.verify_tree, rows, drafts, parents, **how), whole)


def test_a_samplers_drafts() -> None:
    rows = LOGITS.view(3, 2, VOCAB)
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


# Errors --------------------------------------------------------------------------------------------------------------

PART = {"vocab_start": 0, "vocab_size": VOCAB, "seed": 1}
WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "vocab_start: negative": (ValueError, "vocab_start = -1: expected 0 or more", {"vocab_start": -1}),
    "vocab_start: text": (TypeError, "vocab_start", {"vocab_start": "0"}),
    "vocab_start: a gap": (ValueError, r"vocab_start = 1 \(rank 0\): expected 0", {"vocab_start": 1}),
    "vocab_size: none": (ValueError, "vocab_size = 0", {"vocab_size": 0}),
    "vocab_size: too large": (ValueError, "vocab_size = 1048577", {"vocab_size": 2**20 + 1}),
    "vocab_size: more than there is": (ValueError, "vocab_size = 302: expected 301", {"vocab_size": VOCAB + 1}),
    "logits: integers": (TypeError, "logits", {"logits": LOGITS.long()}),
    "logits: a list": (TypeError, "logits", {"logits": [[0.0]]}),
    "bitmask_shard: bools": (TypeError, "bitmask", {"bitmask_shard": LOGITS > 0}),
    "bitmask_shard: few rows": (ValueError, "bitmask", {"bitmask_shard": torch.ones(5, 10, dtype=torch.int32)}),
    "bitmask: few rows": (ValueError, "bitmask", {"bitmask": torch.ones(5, 10, dtype=torch.int32)}),
    "bias: outside": (ValueError, "bias.*301", {"bias": {VOCAB: 1.0}}),
    "input: probabilities": (ValueError, "input = 'probs': expected 'logits'", {"input": "probs"}),
    "backend: unknown": (ValueError, "backend = 'gpu'", {"backend": "gpu"}),
    "top_p: outside": (ValueError, "top_p = 1.5", {"top_p": 1.5}),
    "top_logprobs: more than there are": (
        ValueError,
        "top_logprobs = 302: expected at most V = 301",
        {"top_logprobs": 302, "logprobs": "raw"},
    ),
}


@pytest.mark.parametrize(("exception", "says", "given"), WRONG.values(), ids=WRONG)
def test_refusals(exception: type[Exception], says: str, given: dict[str, Any]) -> None:
    good = {"logits": LOGITS, **PART}
    fd.sample(**good)
    with pytest.raises(exception, match=says):
        fd.sample(**good | given)


@pytest.mark.parametrize("rule", ["chain", "block"])
def test_rules_that_need_the_drafters_law(rule: str) -> None:
    sampler = fd.ShardedSampler(batch_size=6, vocab_start=0, vocab_size=VOCAB)
    for call in (
        lambda **how: fd.verify(LOGITS[:, None], [[]] * 6, **PART, **how),
        lambda **how: sampler.verify(LOGITS[:, None], [[]] * 6, **how),
    ):
        with pytest.raises(ValueError, match=f"rule = '{rule}': expected 'exact'"):
            call(rule=rule)


def test_a_sampler_of_probabilities_is_refused() -> None:
    with pytest.raises(ValueError, match="input = 'probs': expected 'logits'"):
        fd.ShardedSampler(batch_size=1, vocab_start=0, vocab_size=9, input="probs")


def test_without_a_group_there_is_one_rank() -> None:
    out = fd.sample(LOGITS, vocab_start=0, vocab_size=VOCAB, seed=1, top_p=0.9)
    assert_equal([out], fs.sample(LOGITS, seed=1, top_p=0.9))


def test_torch_compile_leaves_ranks_alone() -> None:
    """A graph breaks around a call; what comes out is the same."""
    sampler = fd.ShardedSampler(batch_size=len(LOGITS), vocab_start=0, vocab_size=VOCAB, seed=1)

    def step(logits: Tensor) -> tuple[Tensor, Tensor]:
        out = fd.sample(logits * 2, seed=1, vocab_start=0, vocab_size=VOCAB, top_k=5)
        return out.tokens + 1, sampler(logits * 2).tokens

    compiled = torch.compile(step, backend="eager")(LOGITS)
    assert torch.equal(compiled[0], fs.sample(LOGITS * 2, seed=1, top_k=5).tokens + 1)
    assert torch.equal(compiled[1], fs.sample(LOGITS * 2, seed=1).tokens)
    assert "rank 0 of 1" in repr(sampler)
