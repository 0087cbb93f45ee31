"""The public calls for rows that are split over ranks: shapes, masks, histories, seeds, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import pack_bits
from conformance import invalid_rows, named
from drafts import KEPT
from split import CUTS, ROWS, UNEVEN, VOCAB, assert_equal, everywhere, listing

import fastsample as fs
import fastsample.distributed as fd

pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect without")  # of steps without ids

Tensor = torch.Tensor

REPORTS = {"logprobs": "processed", "top_logprobs": 3, "num_samples": 2, **KEPT}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-k": {"top_k": 9, "top_p": 0.8},
    "top-p": {"top_p": 0.9},
}


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
    rows = ROWS.clone()
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
    for rows in (ROWS, (ROWS / 2).round() / 2):
        whole = fs.sample(rows, **how)
        for lists in ((3, 8), (20, 1024)):
            with listing(*lists):
                assert_equal(everywhere(fd.sample, rows, **how), whole)


@pytest.mark.parametrize("logprobs", ["raw", "processed"])
def test_raw_logits_that_only_processing_makes_valid(logprobs: str) -> None:
    rows = ROWS[:3].clone()
    rows[0, 3], rows[1, 266] = torch.nan, torch.inf
    allowed = torch.ones(3, VOCAB, dtype=torch.bool)
    allowed[0, 3] = allowed[1, 266] = False
    how = {"bitmask": pack_bits(allowed), "seed": 1, "logprobs": logprobs, "top_logprobs": 5, "top_p": 0.9}
    whole = fs.sample(rows, **how)
    assert whole.status.tolist() == [0, 0, 0]
    assert_equal(everywhere(fd.sample, rows, **how), whole)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("how", [{"top_p": 0.95}, {"typical_p": 0.9}, {"top_k": 2000}], ids=str)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf, 3e38], ids=str)
def test_invalid_rows_among_flat_ones(wrong: float, how: dict[str, Any], backend: str) -> None:
    """No part of such a row counts as flat; the last value is infinite once a bias is added."""
    rows = torch.randn(3, 3000, generator=torch.Generator().manual_seed(1))
    rows[1, slice(None) if wrong == -torch.inf else 1500] = wrong
    how = {"seed": 1, "on_invalid": "flag", "bias": {1500: 3e38} if wrong == 3e38 else None, **how}
    whole = fs.sample(rows, **how)
    assert whole.status[1] > 0
    assert_equal(everywhere(fd.sample, rows, cuts=(0, 1000, 2000, 3000), vocab=3000, backend=backend, **how), whole)


@pytest.mark.parametrize("mode", MODES)
def test_raw_logprobs_where_one_rank_has_a_mask(mode: str) -> None:
    """What is listed is then of other logits, on every rank."""
    allowed = torch.ones(len(ROWS), VOCAB, dtype=torch.bool)
    first, last = UNEVEN[:2]
    allowed[:, first:last:2] = False
    how = {"seed": 5, "logprobs": "raw", "top_logprobs": 4, "num_samples": 2, **MODES[mode]}

    def own(logits: Tensor, vocab_start: int, **part: Any) -> Any:
        mask = pack_bits(allowed[:, first:last]) if vocab_start == first else None
        return fd.sample(logits, vocab_start=vocab_start, bitmask_shard=mask, **how, **part)

    assert_equal(everywhere(own, ROWS), fs.sample(ROWS, bitmask=pack_bits(allowed), **how))


OF_TOKENS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": [0.5, 1.0, 3.0, 0.0]},
    {"top_p": 0.95},
    {"top_p": 0.99, "min_p": 0.05},
    {"typical_p": 0.7, "temperature": 0.8},
    {"typical_p": 0.3, "temperature": 0.02, "order": "temperature_last"},
    {"min_p": [0.5, 0.001, 0.1, 0.0], "top_p": [1.0, 0.9, 1.0, 0.999]},
    {"top_k": [0, 1500, 2, 2999], "ties": "all"},
    {"epsilon_cutoff": 1e-5, "order": "temperature_last", "temperature": 1.5},
)


@pytest.mark.parametrize("top", [0, 1, 5])
@pytest.mark.parametrize("logprobs", [None, "raw"])
@pytest.mark.parametrize("how", OF_TOKENS, ids=str)
def test_tokens_and_their_raw_logprobs(how: dict[str, Any], logprobs: str | None, top: int) -> None:
    """Of rows that lists decide, of others, and of both in a batch; one rank has nothing, one a single token."""
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(4, 3000, generator=g) * torch.tensor([[1.0], [0.1], [6.0], [2.0]])
    rows[1] = (rows[1] * 40).round() / 40
    how = {"seed": 11, "num_samples": 3, "logprobs": logprobs, "top_logprobs": top if logprobs else 0, **how}
    whole, cuts = fs.sample(rows, **how), (0, 900, 900, 901, 3000)
    for lists in ((256, 1024), (3, 8)):
        with listing(*lists):
            assert_equal(everywhere(fd.sample, rows, cuts=cuts, vocab=3000, **how), whole)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("logprobs", [None, "raw"])
@pytest.mark.parametrize("how", [{"top_p": 0.95}, {"typical_p": 0.8}, {"top_k": 3000}, {"min_p": 0.01}], ids=str)
def test_batches_of_flat_rows(how: dict[str, Any], logprobs: str | None, rows: int) -> None:
    """Whose bins come with the sums of the whole rows."""
    logits = torch.randn(rows, 9000, generator=torch.Generator().manual_seed(rows))
    how = {"seed": 2, "num_samples": 4, "logprobs": logprobs, **how}
    for cuts in ((0, 4500, 9000), (0, 4000, 8999, 9000), (0, 9000)):
        assert_equal(everywhere(fd.sample, logits, cuts=cuts, vocab=9000, **how), fs.sample(logits, **how))


@pytest.mark.parametrize("mode", MODES)
def test_columns_past_the_vocabulary(mode: str) -> None:
    """With which it was padded, so that ranks have equal parts: the last ranks' may all be such."""
    padded = torch.cat([ROWS, torch.full((6, 99), torch.nan)], 1)
    how = {"seed": 4, **REPORTS, **MODES[mode]}
    for cuts in ((0, 200, 400), (0, 100, 200, 300, 400), (0, 301, 400), (0, 50, 350, 400)):
        assert_equal(everywhere(fd.sample, padded, cuts=cuts, vocab=VOCAB, **how), fs.sample(ROWS, **how))


@pytest.mark.parametrize("shape", [(VOCAB,), (1, VOCAB), (2, 3, VOCAB), (0, VOCAB), (2, 0, VOCAB)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    rows = ROWS[: max(1, torch.Size(shape[:-1]).numel())].reshape(-1)[: torch.Size(shape).numel()].view(shape)
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

    assert_equal(everywhere(twice, ROWS), fs.sample(ROWS, **how))


def test_each_rank_may_have_an_engine_of_its_own() -> None:
    engines = {0: "cpu", 45: "auto", 200: "reference"}  # by where a rank begins

    def own(logits: Tensor, **part: Any) -> list[fs.SampleOutput]:
        backend = engines[part["vocab_start"]]
        return [fd.sample(logits, seed=1, backend=backend, **REPORTS, **mode, **part) for mode in MODES.values()]

    for outputs in everywhere(own, ROWS):
        for out, mode in zip(outputs, MODES.values(), strict=True):
            assert_equal([out], fs.sample(ROWS, seed=1, **REPORTS, **mode))


def test_nothing_is_written_to_the_logits_nor_do_ranks_share_outputs() -> None:
    before = ROWS.clone()
    found = everywhere(fd.sample, ROWS, seed=1, top_p=0.9, presence_penalty=1.0, output_ids=[[7]] * 6)
    assert torch.equal(ROWS, before)
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
    assert_equal(everywhere(masked, ROWS, False, cuts=cuts), fs.sample(ROWS, bitmask=pack_bits(allowed), **how))
    both = fs.sample(ROWS, bitmask=pack_bits(allowed & also), **how)
    assert_equal(everywhere(masked, ROWS, True, cuts=cuts), both)


def test_a_mask_that_ends_before_the_ranks_tokens_forbids_the_rest() -> None:
    allowed = torch.zeros(6, VOCAB, dtype=torch.bool)
    allowed[:, :32] = allowed[:, 45:77] = allowed[:, 200:232] = True

    def masked(logits: Tensor, **part: Any) -> fs.SampleOutput:
        return fd.sample(logits, bitmask_shard=torch.tensor([-1], dtype=torch.int32), seed=1, top_p=0.99, **part)

    assert_equal(everywhere(masked, ROWS), fs.sample(ROWS, bitmask=pack_bits(allowed), seed=1, top_p=0.99))


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

    found = everywhere(calls, ROWS)
    assert found == [found[0]] * 4


def test_seeds_and_offsets_of_64_bits_for_each_row() -> None:
    how = {"seed": [2**64 - 1 - i for i in range(6)], "offset": [2**63 + i for i in range(6)], "top_p": 0.9}
    assert_equal(everywhere(fd.sample, ROWS, **how), fs.sample(ROWS, **how))


# Errors --------------------------------------------------------------------------------------------------------------

PART = {"vocab_start": 0, "vocab_size": VOCAB, "seed": 1}
WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "vocab_start: negative": (ValueError, "vocab_start = -1: expected 0 or more", {"vocab_start": -1}),
    "vocab_start: text": (TypeError, "vocab_start", {"vocab_start": "0"}),
    "vocab_start: a gap": (ValueError, r"vocab_start = 1 \(rank 0\): expected 0", {"vocab_start": 1}),
    "vocab_size: none": (ValueError, "vocab_size = 0", {"vocab_size": 0}),
    "vocab_size: too large": (ValueError, "vocab_size = 1048577", {"vocab_size": 2**20 + 1}),
    "vocab_size: more than there is": (ValueError, "vocab_size = 302: expected 301", {"vocab_size": VOCAB + 1}),
    "logits: integers": (TypeError, "logits", {"logits": ROWS.long()}),
    "logits: a list": (TypeError, "logits", {"logits": [[0.0]]}),
    "bitmask_shard: bools": (TypeError, "bitmask", {"bitmask_shard": ROWS > 0}),
    "bitmask_shard: few rows": (ValueError, "bitmask", {"bitmask_shard": torch.ones(5, 10, dtype=torch.int32)}),
    "bitmask: few rows": (ValueError, "bitmask", {"bitmask": torch.ones(5, 10, dtype=torch.int32)}),
    "bias: outside": (ValueError, "bias.*301", {"bias": {VOCAB: 1.0}}),
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
    good = {"logits": ROWS, **PART}
    fd.sample(**good)
    with pytest.raises(exception, match=says):
        fd.sample(**good | given)


def test_without_a_group_there_is_one_rank() -> None:
    out = fd.sample(ROWS, vocab_start=0, vocab_size=VOCAB, seed=1, top_p=0.9)
    assert_equal([out], fs.sample(ROWS, seed=1, top_p=0.9))


def test_torch_compile_leaves_ranks_alone() -> None:
    """A graph breaks around a call; what comes out is the same."""
    sampler = fd.ShardedSampler(batch_size=len(ROWS), vocab_start=0, vocab_size=VOCAB, seed=1)

    def step(logits: Tensor) -> tuple[Tensor, Tensor]:
        out = fd.sample(logits * 2, seed=1, vocab_start=0, vocab_size=VOCAB, top_k=5)
        return out.tokens + 1, sampler(logits * 2).tokens

    compiled = torch.compile(step, backend="eager")(ROWS)
    assert torch.equal(compiled[0], fs.sample(ROWS * 2, seed=1, top_k=5).tokens + 1)
    assert torch.equal(compiled[1], fs.sample(ROWS * 2, seed=1).tokens)
    assert "rank 0 of 1" in repr(sampler)


def test_what_is_as_wide_as_a_row_is_refused() -> None:
    split = fd.Split(0, VOCAB)
    for call in (fs.filter_logits, fs.probabilities):
        with pytest.raises(ValueError, match=rf"{call.__name__}: expected whole rows"):
            call(split.whole(ROWS), backend=split.engine, top_k=5)
