"""Raw log-probabilities of split rows that a mask, a bias, penalties or a history have changed, against whole rows'."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from cases import lm, pack_bits
from ranks import on_ranks
from split import assert_equal, everywhere, listing

import fastsample as fs
import fastsample.distributed as fd

Tensor = torch.Tensor

VOCAB = 3000
CUTS = (0, 900, 900, 901, VOCAB)  # a rank has nothing, another a single token
G = torch.Generator().manual_seed(3)
NORMAL = torch.randn(4, VOCAB, generator=G)
ROWS = NORMAL * torch.tensor([[1.0], [0.1], [6.0], [2.0]])
ROWS[1] = (ROWS[1] * 40).round() / 40
FIRST = ROWS.topk(30).indices
FORBIDDEN = torch.zeros(4, VOCAB, dtype=torch.bool).scatter_(1, FIRST[:, ::2], True)
FORBIDDEN[3] = NORMAL[3] > -1  # what is left ranks low
HISTORY = FIRST[:, :9].repeat(1, 3)

EDITS: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.7, "presence_penalty": 0.5, "output_ids": FIRST},
    "bias": {"bias": [{int(i): -3.0 for i in row[:6]} | {int(row[-1]): 2.0, 900: 1.0} for row in FIRST]},
    "mask": {"bitmask": pack_bits(~FORBIDDEN)},
    "DRY": {"dry_multiplier": 4.0, "dry_allowed_length": 1, "output_ids": HISTORY},
    "n-grams": {"no_repeat_ngram_size": 2, "output_ids": HISTORY},
    "mask, bias, penalties": {
        **{"bitmask": pack_bits(~FORBIDDEN), "bias": {900: 5.0, 17: -1.0}},
        **{"frequency_penalty": 0.4, "output_ids": HISTORY},
    },
}
MODES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": [0.5, 1.0, 3.0, 0.0]},
    {"top_k": 9},
    {"top_k": [20, 700, 1, 40], "top_p": 0.9},
    {"top_p": 0.95},
    {"min_p": [0.5, 0.001, 0.1, 0.0], "top_p": [1.0, 0.9, 1.0, 0.999]},
    {"typical_p": 0.7, "temperature": 0.8},
    {"top_k": [0, 1500, 2, 2999], "ties": "all"},
    {"epsilon_cutoff": 1e-5, "order": "temperature_last", "temperature": 1.5},
)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("how", MODES, ids=str)
@pytest.mark.parametrize("top", [0, 5, 400])
def test_edited_rows(top: int, how: dict[str, Any], edit: dict[str, Any]) -> None:
    """Of some, draws are past what is listed, or rank lower than that among rows as they were given."""
    how = {"seed": 11, "num_samples": 3, "logprobs": "raw", "top_logprobs": top, **how, **edit}
    whole = fs.sample(ROWS, **how)
    assert not torch.equal(fs.filter_logits(ROWS, **edit), ROWS)
    for lists in ((256, 1024), (3, 8)):
        with listing(*lists):
            assert_equal(everywhere(fd.sample, ROWS, cuts=CUTS, **how), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", [{"top_p": 0.95}, {"top_k": 50}, {}, {"kept": "ids", "top_p": 0.9}], ids=str)
def test_rows_like_a_language_models(how: dict[str, Any], dtype: torch.dtype) -> None:
    rows = lm(5, VOCAB, torch.Generator().manual_seed(1)).to(dtype)
    ids = rows.float().topk(40).indices
    how = {"seed": 3, "logprobs": "raw", "num_samples": 4, "top_logprobs": 7, "frequency_penalty": 1.0, **how}
    whole = fs.sample(rows, output_ids=ids, **how)
    for cuts in ((0, VOCAB), (0, 1000, VOCAB), CUTS):
        assert_equal(everywhere(fd.sample, rows, cuts=cuts, output_ids=ids, **how), whole)


@pytest.mark.parametrize("edit", [{}, EDITS["penalties"], EDITS["mask"]], ids=["", "penalties", "mask"])
@pytest.mark.parametrize("masked", [CUTS[:1], CUTS[3:4], CUTS[:-1]], ids=["first rank", "last rank", "all ranks"])
@pytest.mark.parametrize("how", MODES[2::2], ids=str)
def test_masks_of_ranks_own_tokens(how: dict[str, Any], masked: tuple[int, ...], edit: dict[str, Any]) -> None:
    """Calls before and after which none has one."""
    allowed = torch.ones(4, VOCAB, dtype=torch.bool)
    for begin, end in pairwise(CUTS):
        if begin in masked:
            allowed[:, begin:end] = torch.rand(4, end - begin, generator=torch.Generator().manual_seed(7)) < 0.6
    if "bitmask" in edit:
        edit = {"bitmask": pack_bits(~FORBIDDEN)}
    both = allowed & ~FORBIDDEN if "bitmask" in edit else allowed
    how = {"seed": 2, "logprobs": "raw", "num_samples": 2, "top_logprobs": 300, **how}
    plain, whole = fs.sample(ROWS, **{**how, **edit}), fs.sample(ROWS, **{**how, **edit, "bitmask": pack_bits(both)})

    def calls(logits: Tensor, vocab_start: int, **part: Any) -> list[fs.SampleOutput]:
        given = {"vocab_start": vocab_start, **part, **how, **edit}
        own = pack_bits(allowed[:, vocab_start : vocab_start + logits.shape[1]])
        mask = own if vocab_start in masked and logits.shape[1] else None
        return [fd.sample(logits, bitmask_shard=mask if masks else None, **given) for masks in (0, 1, 1, 0, 0)]

    for outputs in everywhere(calls, ROWS, cuts=CUTS):
        assert_equal(outputs[1:3], whole)
        assert_equal([*outputs[:1], *outputs[3:]], plain)


@pytest.mark.parametrize("above", [2, 3, 4])
def test_ties_where_a_list_ends(above: int) -> None:
    """Lists of 3 tell the rank of a token that equals their last ones, and not of one below them all."""
    rows = torch.zeros(1, 300)
    rows[0, :above], rows[0, 200] = 1.0, 5.0
    allowed = torch.zeros(1, 300, dtype=torch.bool)
    allowed[0, 50:90] = True  # all equal the last tokens of the first rank's list, if no more than 2 are above
    how = {"bitmask": pack_bits(allowed), "seed": 1, "logprobs": "raw", "top_p": 0.9, "num_samples": 3}
    whole = fs.sample(rows, **how)
    assert whole.ranks.tolist() == [[above + 2] * 3]

    def on_rank(wire: Any, begin: int, end: int) -> int:
        split = fd.Split(begin, 300, group=wire)
        for _ in range(2):
            rounds = split.rounds
            assert_equal([fs.sample(split.whole(rows[:, begin:end]), backend=split.engine, **how)], whole)
        return split.rounds - rounds

    with patch("fastsample.distributed.plan.RAW_LISTED", 3):
        assert on_ranks((0, 100, 300), on_rank) == [2 if above == 2 else 3] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("how", [{"temperature": 3.0}, {"top_k": 50}, {"top_p": 0.9}], ids=str)
def test_ranks_beside_what_is_no_number(how: dict[str, Any], wrong: float, dtype: torch.dtype) -> None:
    """A mask leaves it out, wherever it is."""
    rows = (torch.randn(70, 700, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    at = torch.arange(70)[:, None] * 10 + 3
    rows.scatter_(1, at, wrong)
    mask = pack_bits(torch.ones(70, 700, dtype=torch.bool).scatter_(1, at, False))
    how = {"bitmask": mask, "seed": 1, "logprobs": "raw", "top_logprobs": 2, "num_samples": 3, **how}
    whole = fs.sample(rows, **how)
    assert not whole.status.any()
    for backend in ("cpu", "reference"):
        assert_equal(everywhere(fd.sample, rows, cuts=(0, 300, 700), backend=backend, **how), whole)


def test_invalid_rows_among_edited_ones() -> None:
    rows = ROWS.clone()
    rows[0, 950], rows[1], rows[2, 3] = torch.nan, -torch.inf, torch.inf
    edit = {"frequency_penalty": 1.0, "output_ids": FIRST, "on_invalid": "flag"}
    for mode in MODES:
        how = {"seed": 1, "logprobs": "raw", "top_logprobs": 4, "num_samples": 2, **mode, **edit}
        whole = fs.sample(rows, **how)
        assert whole.status.tolist() == [1, 3, 2, 0]
        assert_equal(everywhere(fd.sample, rows, cuts=CUTS, **how), whole)
