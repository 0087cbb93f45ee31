"""Logits [B, T, V], or with more leading dimensions: arguments [B, T, ...] become those of the flattened table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastsample.arrays import as_array
from fastsample.checks import require_dense


def flat(name: str, value: Any, batch: Sequence[int], trailing: int = 0) -> Any:
    """A tensor or array [*batch, ...] with `trailing` dimensions more as [rows, ...]; anything else as it is.

    A dimension of 1 is shared along the logits' dimension: `offset=start[:, None] + torch.arange(T)`.
    """
    value = as_array(name, value)
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


def flat_fields(batch: Sequence[int], fields: dict[str, Any]) -> dict[str, Any]:
    """Parameters likewise."""
    return {name: flat(name, value, batch) for name, value in fields.items()}
