"""Logits [B, T, V], or with more dimensions before the last: rows are those of the flattened table."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastsample.params import from_numpy


def flatten(batch: tuple[int, ...], trailing: int, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments with `trailing` dimensions per row: a tensor or array [*batch, ...] has its batch made one dimension.

    A dimension of 1 is one for all, so that `offset=start[:, None] + torch.arange(T)` and `seed=seeds[:, None]` serve.
    Anything else is left as it is: for all rows, or one per row of the flattened table.
    """
    return {name: _flat(name, value, batch, trailing) for name, value in given.items()}


def _flat(name: str, value: Any, batch: tuple[int, ...], trailing: int) -> Any:
    if not isinstance(value, (torch.Tensor, np.ndarray)) or value.ndim != len(batch) + trailing:
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            return value
        value = from_numpy(value)
    if any(own not in (1, size) for own, size in zip(value.shape, batch, strict=False)):
        wanted = ", ".join(map(str, batch))
        more = ", ..." if trailing else ""
        raise ValueError(f"{name}: expected shape [{wanted}{more}] like the logits', got {tuple(value.shape)}")
    return value.expand(*batch, *value.shape[len(batch) :]).flatten(0, len(batch) - 1)
