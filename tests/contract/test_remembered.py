"""What tests remember of the reference (tests/support/remembered.py) is what it would say again."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from remembered import DRAW, OWN, Remembered, fingerprint, remembered

import fastsample as fs
from fastsample import reference
from fastsample.inputs import Bias, Rows

X = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
ROWS = Rows(fs.SamplingParams(top_k=5).pack(), torch.tensor([1, 2]), torch.tensor([0]))
IDS = torch.tensor([[1, 2], [3, 3]])
OTHERS: dict[str, Any] = {
    "records": fs.SamplingParams(top_k=6).pack(),
    "bitmask": torch.full((2, 2), -2, dtype=torch.int32),
    "bias": Bias(torch.tensor([0, 1, 1]), torch.tensor([3]), torch.tensor([2.0]), 40),
    "requests": torch.tensor([0, 1]),
    "part": (5, 40),
    **dict.fromkeys(("prompt_ids", "output_ids", "breakers", "drafted_ids"), IDS),
}


class Counted:
    """The reference's distribution, and how often it was worked out."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logits: torch.Tensor, rows: Rows, kind: Any) -> reference.Distribution:
        self.calls += 1
        return reference.distribution(logits, rows, kind)


def test_all_that_a_distribution_is_made_of_counts() -> None:
    assert OTHERS.keys() == {field.name for field in fields(Rows)} - {*DRAW, *OWN}
    changed = [(X, replace(ROWS, **{name: value}), "logits") for name, value in OTHERS.items()]
    bias = OTHERS["bias"]
    changed += [(X, replace(ROWS, bias=bias._replace(values=bias.values + 1)), "logits")]
    changed += [(X, ROWS, "probs"), (X + 1, ROWS, "logits"), (X.double(), ROWS, "logits"), (X.half(), ROWS, "logits")]
    changed += [(X.view(4, 20), ROWS, "logits"), (X.view(torch.int32), ROWS, "logits"), (X.flip(1), ROWS, "logits")]
    prints = {fingerprint(*call) for call in [(X, ROWS, "logits"), *changed]}
    assert len(prints) == 1 + len(changed)


def test_the_same_rows_are_worked_out_once() -> None:
    counted = Counted()
    known = Remembered(counted)
    wide = torch.full((2, 50), torch.nan)
    wide[:, 3:43] = X
    for x in (X, X.clone(), wide[:, 3:43]):
        found = known(x, replace(ROWS, seeds=torch.tensor([8, 9])))
    assert counted.calls == 1
    assert vars(found).keys() == vars(reference.distribution(X, ROWS)).keys()
    assert all(torch.equal(value, vars(reference.distribution(X, ROWS))[name]) for name, value in vars(found).items())


def test_what_was_asked_for_longest_ago_is_forgotten() -> None:
    counted = Counted()
    known = Remembered(counted, most=2 * X.numel())
    for step, calls in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        known(X + step, ROWS)
        assert counted.calls == calls


@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_outputs_are_those_of_the_reference(kind: Any) -> None:
    x = X if kind == "logits" else X.softmax(-1)
    call: dict[str, Any] = {"input": kind, "backend": "reference", "top_p": 0.9, "xtc_probability": 0.5}
    draw = {"seed": 3, "num_samples": 9, "logprobs": "processed", "top_logprobs": 4}
    want = fs.sample(x, **call, **draw), fs.sample(x, **call, **draw | {"seed": 4}), fs.probabilities(x, **call)
    for _ in range(2):
        with remembered():
            got = fs.sample(x, **call, **draw), fs.sample(x, **call, **draw | {"seed": 4}), fs.probabilities(x, **call)
        assert got[:2] == want[:2]
        assert torch.equal(got[2], want[2])
    assert want[0] != want[1]
