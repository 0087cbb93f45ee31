"""Logits [B, T, V], or with more dimensions before the last: rows are those of the flattened table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastsample.params import require_dense


def flat_fields(batch: Sequence[int], fields: dict[str, Any]) -> dict[str, Any]:
    """Parameters: a tensor or array [*batch] becomes one value per row, anything else is left as it is.

    A dimension of 1 is one for all, here and below: `offset=start[:, None] + torch.arange(T)`, `seed=seeds[:, None]`.
    """
    return {name: _flat(name, value, batch, 0) for name, value in fields.items()}


def flat_words(batch: Sequence[int], seed: Any, offset: Any) -> tuple[Any, Any]:
    """Seeds and offsets likewise."""
    return _flat("seed", seed, batch, 0), _flat("offset", offset, batch, 0)


def flat_inputs(
    batch: Sequence[int], bitmask: Any, bias: Any, prompt_ids: Any, output_ids: Any, allowed_ids: Any = None
) -> tuple[Any, ...]:
    """A step's inputs likewise, which have a dimension more: [*batch, L], [*batch, words], [*batch, V]."""
    return (
        _flat("bitmask", bitmask, batch, 1),
        bias,
        _flat("prompt_ids", prompt_ids, batch, 1),
        _flat("output_ids", output_ids, batch, 1),
        _flat("allowed_ids", allowed_ids, batch, 1),
    )


def _flat(name: str, value: Any, batch: Sequence[int], trailing: int) -> Any:
    if not isinstance(value, (torch.Tensor, np.ndarray)) or value.ndim != len(batch) + trailing:
        return value
    if isinstance(value, torch.Tensor):
        require_dense(name, value)
    if any(own not in (1, size) for own, size in zip(value.shape, batch, strict=False)):
        wanted = ", ".join(map(str, batch))
        more = ", ..." if trailing else ""
        raise ValueError(f"{name}: expected shape [{wanted}{more}] like the logits', got {tuple(value.shape)}")
    rest = value.shape[len(batch) :]
    if isinstance(value, np.ndarray):  # stays one: a signed array holds numbers, a tensor of offsets may hold bits
        return np.broadcast_to(value, (*batch, *rest)).reshape(math.prod(batch), *rest)
    return value.expand(*batch, *rest).flatten(0, len(batch) - 1)
