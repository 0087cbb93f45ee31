"""Stages 1 to 3 of a part of rows: the CPU engine reads ids of the whole rows, for others they are renumbered."""

from __future__ import annotations

import pytest
import torch

from fastsample.backends import engine
from fastsample.distributed.local import Edits, process
from fastsample.inputs import Rows
from fastsample.inputs.bias import pack_bias
from fastsample.params import SamplingParams

VOCAB, BATCH, LENGTH = 300, 6, 120


@pytest.fixture
def rows() -> Rows:
    """Histories in which much repeats, of ids in all parts; some are of no token."""
    random = torch.Generator().manual_seed(3)
    params = SamplingParams(
        repetition_penalty=[1.3, 1.0, 1.0, 0.8, 1.0, 1.2],
        frequency_penalty=[0.0, 0.5, 0.0, 0.0, 0.0, 0.1],
        presence_penalty=[0.0, 0.0, 0.3, 0.0, 0.0, 0.2],
        dry_multiplier=[0.0, 0.8, 1.5, 0.7, 0.0, 0.9],
        dry_allowed_length=1,
        dry_range=[0, 0, 40, 0, 0, 90],
        no_repeat_ngram_size=[2, 0, 0, 3, 1, 0],
    )
    zeros = torch.zeros(BATCH, dtype=torch.int64)
    made = Rows(params.pack(), zeros, zeros)
    few = torch.tensor([0, 3, 99, 100, 101, 150, 199, 200, 299, -1, VOCAB, 2**62, -(2**63)])
    made.prompt_ids = few[torch.randint(len(few), (BATCH, LENGTH), generator=random)]
    made.output_ids = few[torch.randint(len(few), (BATCH, LENGTH), generator=random)]
    made.breakers = torch.tensor([[3, 150, -1, VOCAB + 7]])
    bias = [{0: 1.0, 99: -2.0, 100: 0.5, 199: 3.0, 299: 0.25}] * BATCH
    made.bias = pack_bias(bias, torch.zeros(BATCH, VOCAB))
    return made


@pytest.mark.parametrize(("start", "end"), [(0, 100), (100, 200), (99, 101), (200, 300), (0, 300), (131, 132)])
def test_a_part_is_edited_as_the_whole_row_is(rows: Rows, start: int, end: int) -> None:
    logits = torch.randn(BATCH, VOCAB, generator=torch.Generator().manual_seed(4))
    mask = torch.randint(-(2**31), 2**31, (BATCH, -(-VOCAB // 32)), generator=torch.Generator().manual_seed(5))
    rows.bitmask = mask.to(torch.int32)
    edits = Edits.of(rows.records)
    reference = engine("reference")
    whole, status = process(reference, logits, rows, edits, None, 0, VOCAB)
    assert status is None
    assert not torch.equal(whole[:, start:end], logits[:, start:end])
    for name in ("cpu", "reference"):
        part, status = process(engine(name), logits[:, start:end], rows, edits, None, start, VOCAB)
        ruled_out = (whole[:, start:end] == -torch.inf).all(1)
        assert torch.equal(part[~ruled_out], whole[:, start:end][~ruled_out])
        assert (torch.zeros(BATCH) if status is None else status).ne(0).equal(ruled_out)
