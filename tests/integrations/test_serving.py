"""What the adapters to serving stacks share, which needs none of them: against the public calls."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from cases import MAKERS

import fastsample as fs
from fastsample.backends import engine
from fastsample.integrations.serving import Step

VOCAB = 500
SEEDS, OFFSETS = torch.tensor([3, -4, 5, 2**62]), torch.tensor([0, 9, 1, 2**40])
COLUMNS: list[dict[str, Any]] = [
    {},
    {"temperature": torch.tensor([0.0, 0.5, 1.0, 2.0])},
    {"top_k": torch.tensor([1, VOCAB, 7, 2**30], dtype=torch.int32), "top_p": torch.tensor([1.0, 0.3, 0.9, 0.99])},
    {"min_p": torch.tensor([0.0, 0.1, 0.5, 1.0]), "top_p": None},
]


@pytest.fixture
def logger() -> logging.Logger:
    return logging.getLogger("fastsample.tests")


def make(logger: logging.Logger, **fields: Any) -> Step:
    return Step(logger, "the filters", "the rest stays", **fields)


def rows(maker: str = "ties", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return MAKERS[maker](4, VOCAB, torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("fixed", [{"ties": "all"}, {"order": "joint"}, {"order": "min_p_first", "temperature": 0.7}])
@pytest.mark.parametrize("columns", COLUMNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_sample_and_filter_logits(
    logger: logging.Logger, fixed: dict[str, Any], columns: dict[str, Any], dtype: torch.dtype
) -> None:
    step, logits = make(logger, **fixed), rows(dtype=dtype)
    fields = fixed | {name: value for name, value in columns.items() if value is not None}
    wanted = fs.sample(logits, **fields, seed=SEEDS, offset=OFFSETS)
    assert torch.equal(step.draw(logits, SEEDS, OFFSETS, **columns), wanted.tokens)
    assert torch.equal(step.keep(logits, **columns), fs.filter_logits(logits, **fields))


def test_logits_of_any_strides(logger: logging.Logger) -> None:
    logits = rows("lm")
    wanted = make(logger).draw(logits, SEEDS, OFFSETS)
    assert torch.equal(make(logger).draw(logits.T.contiguous().T, SEEDS, OFFSETS), wanted)
    assert torch.equal(make(logger).draw(torch.cat([logits, logits], 1)[:, :VOCAB], SEEDS, OFFSETS), wanted)


def test_a_bad_row_gets_token_0_and_one_warning(logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    step, logits = make(logger), rows("lm")
    wanted = step.draw(logits, SEEDS, OFFSETS)
    logits[1, 3], logits[3] = torch.inf, -torch.inf
    for _ in range(2):
        found = step.draw(logits, SEEDS, OFFSETS)
        assert found.tolist() == [wanted[0], 0, wanted[2], 0]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "+inf" in caplog.text
    assert "row 1" in caplog.text


def test_what_is_left_to_the_stack(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    step = make(logger)
    assert step.why_not(rows()) is None
    assert "2^20" in str(step.why_not(torch.empty(1, 2**20 + 1)))
    monkeypatch.setattr(engine("cpu"), "why_not", lambda logits: "not here")
    assert "no fast engine" in str(step.why_not(rows()))
    monkeypatch.setenv("FASTSAMPLE_BACKEND", "reference")  # asked for by name
    assert step.why_not(rows()) is None


def test_it_says_once_who_does_what(logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    step = make(logger)
    for _ in range(3):
        assert step.why_not(rows()) is None
    assert [record.getMessage() for record in caplog.records] == [
        "fastsample: the filters are done by engine 'cpu'; the rest stays"
    ]


def test_the_entry_points_name_the_adapters() -> None:
    from importlib.metadata import entry_points

    for stack, group in (("vllm", "vllm.general_plugins"), ("sglang", "sglang.srt.plugins")):
        assert entry_points(group=group)["fastsample"].value == f"fastsample.integrations.{stack}:register"
