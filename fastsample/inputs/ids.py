"""Token ids as callers have them: tensors, arrays, lists of either, lists of numbers."""

from __future__ import annotations

import marshal
import numbers
from array import array
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from fastsample.arrays import ArrayLike, as_array, from_numpy
from fastsample.checks import (
    CPU,
    INTEGERS,
    integer,
    is_list,
    last_contiguous,
    require_tensor,
)

TokenIds: TypeAlias = "ArrayLike | Sequence[Sequence[int] | ArrayLike | None] | Sequence[int]"

BreakerIds: TypeAlias = "TokenIds"

MAX_IDS = 2**29
"""Token ids per row: prompt, output and bias together are counted in 32 bits."""


def pack_token_ids(name: str, ids: Any, logits: torch.Tensor) -> torch.Tensor:
    """Token ids as int64 [B, L], padded with -1. Ids outside the vocabulary stay: engines ignore them."""
    rows = logits.shape[0]
    ids = as_array(name, ids)
    if isinstance(ids, np.ndarray):
        ids = ids.tolist() if ids.dtype.kind == "O" else _from_array(name, ids).to(logits.device)
    if not isinstance(ids, torch.Tensor):
        return pad(rows_of_ids(name, ids, rows, logits.device), logits.device)
    require_tensor(name, ids, logits.device)
    _require_integers(name, ids)
    table = ids.unsqueeze(0) if ids.ndim == 1 and rows == 1 else ids
    shape = table.shape
    if len(shape) != 2 or shape[0] != rows:
        raise ValueError(f"{name}: expected shape [{rows}, L], got {tuple(ids.shape)}")
    if shape[1] > MAX_IDS:
        raise ValueError(f"{name}: expected at most 2^29 ids per row, got {shape[1]}")
    return last_contiguous(table if table.dtype is torch.int64 else table.to(torch.int64))


def pack_breakers(ids: Any, logits: torch.Tensor) -> torch.Tensor:
    """DRY's breakers as int64 [1, L], which all rows share, or [B, L] padded with -1.

    Ids outside the vocabulary stay: engines ignore them.
    """
    name, rows = "dry_breakers", logits.shape[0]
    ids = as_array(name, ids)
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "O":
        ids = ids.tolist()
    if isinstance(ids, torch.Tensor):
        require_tensor(name, ids, logits.device)
    if isinstance(ids, (torch.Tensor, np.ndarray)):
        if ids.ndim == 1:
            return last_contiguous(row_of_ids(name, ids, None, logits.device).to(logits.device).unsqueeze(0))
        if ids.ndim != 2 or len(ids) != rows:
            raise ValueError(f"{name}: expected ids [L] for all rows or [{rows}, L], got shape {tuple(ids.shape)}")
    elif not is_list(ids):
        raise TypeError(f"{name}: expected ids for all rows, [B, L] or a list per row, got {type(ids).__name__}")
    elif all(isinstance(one, (numbers.Number, str)) for one in ids):
        return row_of_ids(name, ids, None, logits.device).to(logits.device).unsqueeze(0)
    return pack_token_ids(name, ids, logits)


def rows_of_ids(name: str, ids: Any, rows: int, device: torch.device) -> list[torch.Tensor | None]:
    """A list that holds ids or None for each row, or the ids of the only row, as one int64 [L] each."""
    if not is_list(ids):
        raise TypeError(f"{name}: expected a tensor [B, L] or a list of lists of token ids, got {type(ids).__name__}")
    flat = rows == 1 and (not len(ids) or isinstance(ids[0], (numbers.Number, str)))
    table = [ids] if flat else ids
    if len(table) != rows:
        raise ValueError(f"{name}: expected one list of token ids per row ({rows}), got {len(table)}")
    return [None if line is None else row_of_ids(name, line, row, device) for row, line in enumerate(table)]


def row_of_ids(name: str, line: Any, row: int | None, device: torch.device) -> torch.Tensor:
    """Ids of a row, or of all where `row` is None, as int64 [L] on the CPU; those of a tensor stay on `device`."""
    where = name if row is None else f"{name} (row {row})"
    line = as_array(where, line)
    if isinstance(line, (np.ndarray, torch.Tensor)):
        if isinstance(line, np.ndarray):
            line = _from_array(where, line)
        else:
            require_tensor(where, line, device)
        _require_integers(where, line)
        if line.ndim != 1:
            raise ValueError(f"{where}: expected ids [L], got shape {tuple(line.shape)}")
        found: torch.Tensor = line.to(torch.int64).resolve_neg()
    elif is_list(line):
        found = torch.from_numpy(_numbers(name, line, row))
    else:
        raise TypeError(f"{where}: expected a list of token ids, got {line!r}")
    if len(found) > MAX_IDS:
        raise ValueError(f"{where}: expected at most 2^29 ids, got {len(found)}")
    return found


def pad(lines: list[torch.Tensor | None], device: torch.device) -> torch.Tensor:
    """Rows of ids as a table on the device, padded with -1."""
    longest = max((len(line) for line in lines if line is not None), default=0)
    on_cpu = all(line is None or line.device == CPU for line in lines)
    table = torch.full((len(lines), longest), -1, dtype=torch.int64, device=CPU if on_cpu else device)
    for row, line in enumerate(lines):
        if line is not None:
            table[row, : len(line)] = line
    return table.to(device)


_SMALL = np.dtype([("type", "u1"), ("value", "<i4")])


def _numbers(name: str, line: Any, row: int | None) -> np.ndarray[Any, Any]:
    """A sequence of integers as int64 [L], or an error that names the element that is none.

    Numpy and torch take bools for integers, and to ask each number for its type costs more than all the rest of a
    step. In marshal's version 2 an int of 32 bits is the letter i and 4 bytes, and nothing else is: one pass in C
    tells the types and gives the values.
    """
    line = line if type(line) is list else list(line)
    try:
        data = marshal.dumps(line, 2)
    except ValueError:  # something that is not a Python number
        data = b""
    if len(data) == 5 + 5 * len(line):
        found = np.frombuffer(data, _SMALL, offset=5)
        if bool((found["type"] == ord("i")).all()):
            return found["value"].astype(np.int64)
    if all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in set(map(type, line))):
        try:
            return np.array(array("q", line), dtype=np.int64)
        except OverflowError:
            pass  # found below
    return np.array([integer(f"{name} id", value, row) for value in line], dtype=np.int64)


def _from_array(name: str, ids: np.ndarray[Any, Any]) -> torch.Tensor:
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got an array of {ids.dtype}")
    return from_numpy(name, ids)


def _require_integers(name: str, ids: torch.Tensor) -> None:
    """An unsigned id of 64 bits wraps where it is 2^63 or more: outside the vocabulary before and after."""
    if ids.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected integer token ids, got {ids.dtype}")
