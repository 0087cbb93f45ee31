"""The rules "chain" and "block" where rows are split over ranks, against whole rows: equal to the bit on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drafts import KEPT, OFFSET
from ranks import on_ranks
from rejections import BLOCKS, Block
from split import CUTS, LISTS, assert_equal, listing

import fastsample as fs
import fastsample.distributed as fd

pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect without")  # of requests without ids

Tensor = torch.Tensor

REPORTS: tuple[dict[str, Any], ...] = (
    {},
    {"logprobs": "raw", "top_logprobs": 1, "kept": "ids"},
    {"logprobs": "processed", "top_logprobs": 1, **KEPT},
)


def asked(block: Block) -> tuple[Tensor, Tensor, str, dict[str, Any]]:
    """The logits, what the drafts were drawn from and as what it is given, and all other arguments."""
    logits, draft, ids = block.proposed()
    how: dict[str, Any] = {"draft_ids": ids, "rule": block.rule, "seed": block.seeds, "offset": OFFSET}
    if block.packed:
        counts = block.counts()
        logits = torch.cat([logits[b, : n + 1] for b, n in enumerate(counts)])
        draft, how["num_drafts"] = torch.cat([draft[b, :n] for b, n in enumerate(counts)]), counts
    return logits, draft, "draft_probs" if block.probs else "draft_logits", how | block.build()[1]


def everywhere(
    cuts: tuple[int, ...], logits: Tensor, draft: Tensor, name: str, how: dict[str, Any], backend: str = "cpu"
) -> list[fs.VerifyOutput]:
    def on_rank(wire: Any, begin: int, end: int) -> fs.VerifyOutput:
        own = {"vocab_start": begin, "vocab_size": logits.shape[-1], "group": wire, "backend": backend}
        return fd.verify(logits[..., begin:end], **own, **how, **{name: draft[..., begin:end]})

    return on_ranks(cuts, on_rank)


def check(block: Block, number: int, backend: str = "cpu") -> fs.VerifyOutput:
    """Of a block, with a way to split it, lists and reports that depend on the number."""
    cut, lists = list(CUTS.values())[number % len(CUTS)], LISTS[number // len(CUTS) % len(LISTS)]
    logits, draft, name, how = asked(block)
    how |= REPORTS[number % len(REPORTS)] | {"on_invalid": "flag"}
    whole = fs.verify(logits, **how, **{name: draft}, backend="cpu")
    with listing(*lists):
        assert_equal(everywhere(cut(block.vocab), logits, draft, name, how, backend), whole)
    return whole


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_whole_rows(name: str) -> None:
    number = list(BLOCKS).index(name)
    for turn in (0, 17, 34):
        check(BLOCKS[name], number + turn, "reference" if number % 7 == 0 else "cpu")
