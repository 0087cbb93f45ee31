"""Kept sets as lists of ids, made of what an engine's run has left."""

from __future__ import annotations

from typing import Any

import torch

from fastsample.backends import Engine
from fastsample.buffers import empty
from fastsample.outputs import LISTED

Tensor = torch.Tensor

_IDS, _ROW_PTR = LISTED


def list_ids(engine: Engine, count: Tensor, bitmask: Tensor) -> tuple[Tensor, Tensor]:
    """All ids and where each row's end, in fresh tensors, whose size is known only now: on a GPU, this waits for it."""
    row_ptr = count.new_empty(count.numel() + 1, dtype=_ROW_PTR.dtype)
    total = engine.end_kept(count, 0, row_ptr)
    ids = count.new_empty(int(row_ptr[-1]) if total is None else total)  # of the counts' dtype, which is the ids'
    engine.list_kept(bitmask, row_ptr, ids)
    return ids, row_ptr


def fill_lists(engine: Engine, count: Tensor, bitmask: Tensor, capacity: int, ids: Tensor, row_ptr: Tensor) -> None:
    """The same for rows that keep at most `capacity`, in tensors that are there; waits for no device."""
    engine.end_kept(count, capacity, row_ptr)
    engine.list_kept(bitmask, row_ptr, ids)


def list_verified(engine: Engine, found: Any, capacity: int) -> None:
    """Give what a verification found the lists of its sets; without a limit they replace the bitmasks."""
    count, bitmask = found.kept_count, found.kept_bitmask.flatten(0, -2)
    if not capacity:
        found.kept_ids, found.kept_row_ptr = list_ids(engine, count, bitmask)
        found.kept_bitmask = None
        return
    sizes = (_IDS.dtype, count.numel() * capacity), (_ROW_PTR.dtype, count.numel() + 1)
    found.kept_ids, found.kept_row_ptr = (empty((size,), dtype, count.device) for dtype, size in sizes)
    fill_lists(engine, count, bitmask, capacity, found.kept_ids, found.kept_row_ptr)
