"""Kept sets as lists of ids, made of what an engine's run has left."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastsample.backends import Engine, Outputs
from fastsample.outputs import LISTED, empty

_IDS, _ROW_PTR = LISTED
_KEEPS = 2**18  # bytes of scratch that are worth keeping


class Scratch(NamedTuple):
    """Memory for the sets of one call, before they are listed."""

    bitmask: torch.Tensor  # int32 [B, words]
    slots: torch.Tensor | None  # int32 [B, n], for an engine that fills them

    @property
    def is_small(self) -> bool:
        return self.bitmask.nbytes <= _KEEPS

    def lend(self, outputs: Outputs) -> None:
        outputs.kept_bitmask, outputs.kept_slots = self.bitmask, self.slots


def scratch_for(engine: Engine, rows: int, vocab: int, device: torch.device) -> Scratch:
    with torch.inference_mode(False):
        slots = empty((rows, engine.kept_slots), torch.int32, device) if engine.kept_slots else None
        return Scratch(empty((rows, -(-vocab // 32)), torch.int32, device), slots)


def list_ids(engine: Engine, outputs: Outputs, result: Any) -> None:
    """Give a result its exact lists: fresh tensors, whose size is known only now (on a GPU, this waits for it)."""
    assert outputs.kept_count is not None
    assert outputs.kept_bitmask is not None
    device = outputs.kept_count.device
    row_ptr = empty((outputs.kept_count.numel() + 1,), _ROW_PTR.dtype, device)
    total = engine.end_kept(outputs.kept_count.view(-1), 0, row_ptr)
    ids = empty((int(row_ptr[-1]) if total is None else total,), _IDS.dtype, device)
    engine.list_kept(outputs, outputs.kept_bitmask, row_ptr, ids)
    result.kept_ids, result.kept_row_ptr = ids, row_ptr


def fill_lists(engine: Engine, outputs: Outputs, capacity: int) -> None:
    """Fill the lists of a limited size; waits for no device."""
    assert outputs.kept_count is not None
    assert outputs.kept_bitmask is not None
    assert outputs.kept_ids is not None
    assert outputs.kept_row_ptr is not None
    counts = outputs.kept_count.view(-1)
    engine.end_kept(counts, capacity, outputs.kept_row_ptr)
    engine.list_kept(outputs, outputs.kept_bitmask.view(len(counts), -1), outputs.kept_row_ptr, outputs.kept_ids)


def list_verified(engine: Engine, found: Any, capacity: int) -> None:
    """Give what a verification found the lists of its sets; without a limit they replace the bitmasks."""
    count, bitmask = found.kept_count, found.kept_bitmask
    assert count is not None
    assert bitmask is not None
    outputs = Outputs(found.status, kept_count=count, kept_bitmask=bitmask.flatten(0, -2))
    if not capacity:
        list_ids(engine, outputs, found)
        found.kept_bitmask = None
        return
    shapes = (_IDS.dtype, count.numel() * capacity), (_ROW_PTR.dtype, count.numel() + 1)
    found.kept_ids, found.kept_row_ptr = (empty((size,), dtype, count.device) for dtype, size in shapes)
    outputs.kept_ids, outputs.kept_row_ptr = found.kept_ids, found.kept_row_ptr
    fill_lists(engine, outputs, capacity)
