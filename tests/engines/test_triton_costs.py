"""What a row costs the Triton engine, counted: barriers among its programs, and passes over its logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from triton_costs import BASIC, MODES, rows
from triton_interpreter import SUPPORT, run_interpreted

import fastsample as fs

pytest.importorskip("triton", reason="Triton is not installed")

Counts = dict[str, tuple[int, float, list[int]]]


@pytest.fixture(scope="session")
def counted(once: Callable[[str, Callable[[Path], None]], Path]) -> Counts:
    def make(folder: Path) -> None:
        run_interpreted(SUPPORT / "triton_costs.py", folder / "counts.json")

    found: Counts = json.loads((once("costs", make) / "counts.json").read_text())
    return found


BUDGETS = {
    "greedy": (1, 1.0),
    "T": (2, 2.25),
    "min-p": (2, 2.25),
    "k50": (2, 2.0),
    "k192": (2, 2.0),
    "k50 p.9": (2, 2.0),
    "k50 p.9 min-p": (2, 2.0),
    "k50 p.9 joint": (2, 2.0),
    "k50 p.9 temperature last": (2, 2.0),
    "k50 p.9, 8 draws": (2, 2.0),
    "k50 p.9, 9 draws": (4, 4.0),
    "k50 xtc": (7, 4.25),
}
"""At most so many barriers and passes, by mode."""


@pytest.mark.parametrize("name", [*(f"f32: {mode}" for mode in BUDGETS), *(f"bf16: {mode}" for mode in BASIC)])
def test_few_barriers_and_passes(name: str, counted: Counts) -> None:
    barriers, passes, _ = counted[name]
    most = BUDGETS[name.split(": ")[1]]
    assert barriers <= most[0]
    assert passes <= most[1]


def test_rounds_where_too_many_tokens_tie_or_k_is_large(counted: Counts) -> None:
    """Otherwise the tests above would hold for a list that never ends."""
    assert counted["equal: k50 p.9"][0] > 20
    assert counted["f32: k193"][0] > 10


def test_what_was_counted_drew_the_right_tokens(counted: Counts) -> None:
    logits: dict[str, torch.Tensor] = rows()
    for name, (_, _, tokens) in counted.items():
        row, mode = name.split(": ")
        assert fs.sample(logits[row], seed=1, backend="reference", **MODES[mode]).tokens.flatten().tolist() == tokens, (
            name
        )
