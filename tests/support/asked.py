"""What a call can be asked for besides tokens, all of it: every field of its output then holds a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import fastsample as fs
from fastsample.outputs import LISTED, SAMPLED, Options

KEPT: dict[str, Any] = {"kept": "ids", "kept_capacity": 6, "kept_mass": True, "entropy": True}
EVERYTHING: dict[str, Any] = {"logprobs": "raw", "top_logprobs": 2, **KEPT}
LISTS = tuple(field.name for field in LISTED)
"""Fields that all rows share."""
BY_ROW = tuple(field.name for field in SAMPLED if field.name not in LISTS)


def sentinels(batch: Sequence[int], vocab: int, **own: Any) -> fs.SampleOutput:
    """Buffers for a call that asks for EVERYTHING, but for `own`, full of what no engine writes."""
    options = Options(**EVERYTHING)
    shapes = {field.name: (field.shape(batch, options, vocab), field.dtype) for field in SAMPLED}
    made = {name: torch.full(shape, -77, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    return fs.SampleOutput(**{**made, **own})
