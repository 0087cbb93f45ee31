"""Stage 3's history edits in every engine against the reference: equal to the bit, however long or odd the history."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import histories
import pytest
import torch
from conformance import assert_agree, bits
from histories import LARGE, SMALL, Batch

SUPPORT = Path(histories.__file__).parent
BATCHES = SMALL | LARGE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no effect without"),  # among the batches on purpose
    pytest.mark.usefixtures("remembered"),
]

expected: Callable[[str], dict[str, torch.Tensor]] = cache(lambda name: BATCHES[name].ask("reference"))


@pytest.mark.parametrize("name", BATCHES)
def test_equals_reference(name: str, variant: str) -> None:
    assert_agree(BATCHES[name].ask(variant), expected(name))


@pytest.mark.parametrize("name", [name for name in SMALL if name != "off"])
def test_the_history_changes_the_logits(name: str) -> None:
    """Else the equality of engines would mean nothing."""
    batch = BATCHES[name]
    neutral = {"dry_multiplier": 0.0, "no_repeat_ngram_size": 0}
    plain = Batch(**{**vars(batch), "fields": {**batch.fields, **neutral}})
    assert not torch.equal(bits(plain.ask("reference")["filter_logits"]), bits(expected(name)["filter_logits"]))


def test_a_row_where_nothing_is_left() -> None:
    assert expected("nothing left")["status"].tolist() == [3, 0, 3]
    assert expected("one token in all")["status"].tolist() == [0, 3, 0, 3]


def test_invalid_tokens_that_are_banned() -> None:
    """A ban hides NaN and +inf; DRY's largest products turn +inf into NaN."""
    assert expected("invalid logits torch.float32")["status"].tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 0]
