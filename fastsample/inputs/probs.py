"""Probabilities as input: which parameters and inputs have no meaning for them."""

from __future__ import annotations

import torch

from fastsample.inputs.step import Inputs
from fastsample.params import GREEDY_BELOW, SamplingParams, specs


def require_probs(records: torch.Tensor, inputs: Inputs) -> None:
    """ValueError if packed records, int32 [B or 1, fields], or inputs ask for what needs logits.

    That is a temperature other than 1 (but greedy rows are served), a penalty, a filter measured on logits, or a bias.
    """
    if inputs.bias is not None:
        raise ValueError("bias: input='probs' takes none, since it is added to logits")
    columns = zip(specs(), records.T, strict=True)
    for (name, spec), bits in columns:
        if name != "temperature" and not spec.counts and not spec.of_logits:
            continue
        values = bits.contiguous().view(torch.float32) if spec.kind == "float" else bits
        neutral = getattr(SamplingParams, name)
        wrong = values != neutral
        if name == "temperature":
            wrong &= values >= GREEDY_BELOW
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            where = f" (row {row})" if len(values) > 1 else ""
            wanted = "1, or 0 for the most probable token" if name == "temperature" else f"{neutral:g}, which is off"
            raise ValueError(
                f"{name} = {values[row].item():g}{where}: input='probs' takes no such value, since it needs logits; "
                f"expected {wanted}"
            )
