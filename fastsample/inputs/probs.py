"""Probabilities as input: which parameters and inputs have no meaning for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastsample.inputs.rows import Rows
from fastsample.inputs.step import Inputs
from fastsample.params import GREEDY_BELOW, SamplingParams, specs
from fastsample.spec import Spec

_NEED_LOGITS = [
    (column, name, spec)
    for column, (name, spec) in enumerate(specs())
    if name == "temperature" or spec.counts or spec.of_logits
]


def require_for_probs(records: torch.Tensor, row: int | None = None) -> None:
    """ValueError if packed records, int32 [B or 1, fields] on the CPU, ask for what needs logits.

    That is a temperature other than 1 (but greedy rows are served), a penalty or a filter measured on logits. `row` is
    that of a single record.
    """
    for column, name, spec in _NEED_LOGITS:
        bits = records[:, column]
        values = bits.contiguous().view(torch.float32) if spec.kind == "float" else bits
        wrong = values != getattr(SamplingParams, name)
        if name == "temperature":
            wrong &= values >= GREEDY_BELOW
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0, 0])
            row = at if row is None and len(values) > 1 else row
            _refuse(name, values[at].item(), "" if row is None else f" (row {row})")


def _refuse(name: str, value: float, where: str) -> None:
    neutral = getattr(SamplingParams, name)
    wanted = "1, or 0 for the most probable token," if name == "temperature" else f"{neutral:g}, which is off,"
    shown = value if isinstance(value, int) else f"{value:g}"
    raise ValueError(f"{name} = {shown}{where}: expected {wanted} with input='probs'; other values need logits")


def for_probs(rows: Rows, argument: str) -> Rows:
    """Rows of logits as those of probabilities that have been made of them; greedy rows stay greedy.

    ValueError if there is a filter that is measured on logits; `argument` is where the probabilities are.
    """
    records = rows.records.clone()
    for column, name, spec in _NEED_LOGITS:
        own, neutral = records[:, column], _neutral(name, spec)
        if spec.of_logits and bool((own != neutral).any()):
            raise ValueError(f"{argument}: {name} is measured on logits; pass draft_logits instead")
        greedy = own.contiguous().view(torch.float32) < GREEDY_BELOW
        own.masked_fill_(~greedy if name == "temperature" else torch.ones_like(greedy), neutral)
    none: dict[str, Any] = dict.fromkeys(("bias", "prompt_ids", "output_ids", "breakers", "drafted_ids", "requests"))
    return replace(rows, records=records, native=None, **none)


def _neutral(name: str, spec: Spec) -> int:
    """The bits of a parameter that is off."""
    value = getattr(SamplingParams, name)
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32)) if spec.kind == "float" else int(value)


def require_no_bias(inputs: Inputs) -> None:
    """ValueError if there is a bias."""
    if inputs.bias is not None:
        raise ValueError("bias: expected None with input='probs'; it is added to logits")
