"""The helper that says whether two engines agree sees every difference, and tells which."""

from __future__ import annotations

import pytest
import torch
from conformance import assert_agree

ONE, UP = 1.0, 1 + 2.0**-23


@pytest.mark.parametrize(
    ("name", "found", "expected", "says"),
    [
        ("tokens", torch.tensor([[5, 6]]), torch.tensor([[5, 7]]), "1 of 2, first in row 0, position 1: 6"),
        ("filter_logits", torch.tensor([ONE, ONE]), torch.tensor([ONE, UP]), "row 1: 1.0 (0x3f800000)"),
        ("filter_logits", torch.tensor([0.0]), torch.tensor([-0.0]), "0x80000000"),
        ("raw.logprobs", torch.tensor([ONE]), torch.tensor([UP + 2.0**-22]), "raw.logprobs"),
        ("raw.logprobs", torch.tensor([ONE]), torch.tensor([torch.nan]), "nan"),
        ("status", torch.tensor([0]), torch.tensor([0], dtype=torch.int32), "torch.int64 [1] and not torch.int32 [1]"),
        ("status", torch.tensor([0]), torch.tensor([[0]]), "torch.int64 [1] and not torch.int64 [1, 1]"),
    ],
)
def test_a_difference_is_seen_and_told(name: str, found: torch.Tensor, expected: torch.Tensor, says: str) -> None:
    both = {"same": torch.tensor([1.0, torch.nan])}
    with pytest.raises(AssertionError) as told:
        assert_agree({**both, name: found}, {**both, name: expected})
    assert name in str(told.value)
    assert says in str(told.value)
    assert "same differs" not in str(told.value)


def test_a_missing_output_is_a_difference() -> None:
    with pytest.raises(AssertionError):
        assert_agree({}, {"tokens": torch.tensor([1])})


def test_two_units_in_the_last_place_of_a_log_probability_are_none() -> None:
    near = torch.tensor([UP + 2.0**-23, -torch.inf, torch.nan, 0.0])
    assert_agree({"logprobs": near}, {"logprobs": torch.tensor([ONE, -torch.inf, torch.nan, -0.0])})
