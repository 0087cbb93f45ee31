"""Which tokens may be drawn: bitmasks, and what is packed into them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, TypeAlias

import numpy as np
import torch

from fastsample.arrays import ArrayLike, as_array, as_tensor, from_numpy
from fastsample.checks import (
    CPU,
    INTEGERS,
    MAX_VOCAB,
    is_list,
    last_contiguous,
    require_dense,
    require_tensor,
    whole,
)
from fastsample.inputs.ids import row_of_ids

Allowed: TypeAlias = "ArrayLike | Sequence[Sequence[int] | ArrayLike | None] | Sequence[int]"


def pack_bitmask(allowed: Allowed, vocab_size: int, *, device: torch.device | str | None = None) -> torch.Tensor:
    """The `bitmask` that allows these tokens: packed once, it costs later steps nothing.

    Args:
        allowed: bool [V] or [B, V] (a tensor or an array), True where a token is allowed; or ids: [n] or a list or set
            of numbers for all rows, [B, n] padded with -1, or a list with one row's ids each, or None where everything
            is allowed. A row without ids allows nothing.
        vocab_size: V, 1 <= V <= 2^20.
        device: where the mask shall be; None leaves it where a tensor is, or on the CPU.

    Returns:
        int32 [ceil(V / 32)] for all rows, or [B, ceil(V / 32)]: token j is bit j % 32 of word j // 32 (the format of
        xgrammar and llguidance). Bits past V are 0.

    Raises:
        TypeError, ValueError: something else, or an id that is not in [0, V); the message names id and row.
            A tensor of ids on a GPU is read by the host, which waits for it.
    """
    vocab = whole("vocab_size", vocab_size)
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"vocab_size = {vocab}: expected 1 <= vocab_size <= 2^20")
    allowed = as_array("allowed", allowed)
    if device is None:
        device = allowed.device if isinstance(allowed, torch.Tensor) else CPU
    return _words("allowed", allowed, vocab).to(device)


def check_bitmask(bitmask: Any, logits: torch.Tensor) -> torch.Tensor:
    """A mask of int32 words as [B or 1, words]; a 1-D mask is shared by every row."""
    bitmask = as_tensor("bitmask", bitmask)
    require_tensor("bitmask", bitmask, logits.device)
    if bitmask.dtype != torch.int32:
        raise TypeError(f"bitmask: expected int32 words, got {bitmask.dtype}")
    mask = bitmask.unsqueeze(0) if bitmask.ndim == 1 else bitmask
    if mask.ndim != 2 or mask.shape[0] not in (1, logits.shape[0]):
        raise ValueError(f"bitmask: expected shape [{logits.shape[0]}, words] or [words], got {tuple(bitmask.shape)}")
    return last_contiguous(mask)


def restrict(bitmask: torch.Tensor | None, allowed: Allowed, logits: torch.Tensor) -> torch.Tensor:
    """The mask of logits [B, V], int32 [B or 1, words], that allows what both allow."""
    allowed = as_array("allowed_ids", allowed)
    if isinstance(allowed, torch.Tensor):
        require_tensor("allowed_ids", allowed, logits.device)
    words = _words("allowed_ids", allowed, logits.shape[1]).to(logits.device)
    words = words.unsqueeze(0) if words.ndim == 1 else words
    if words.shape[0] not in (1, logits.shape[0]):
        raise ValueError(f"allowed_ids: expected ids for all rows or {logits.shape[0]} rows, got {words.shape[0]} rows")
    if bitmask is None:
        return words
    shorter = min(words.shape[1], bitmask.shape[1])  # tokens past the last word are not allowed
    return bitmask[:, :shorter] & words[:, :shorter]


def _words(name: str, allowed: Any, vocab: int) -> torch.Tensor:
    """int32 [words], or [B, words] of what has rows."""
    if isinstance(allowed, Set):
        allowed = list(allowed)
    if isinstance(allowed, np.ndarray) and allowed.dtype.kind in "biu":
        allowed = from_numpy(name, allowed)
    if isinstance(allowed, torch.Tensor):
        return _of_tensor(name, allowed, vocab)
    if not is_list(allowed):
        raise TypeError(f"{name}: expected token ids or a tensor of bools, got {type(allowed).__name__}")
    allowed = [as_array(name, line) for line in allowed]
    rows = (type(None), Sequence, Set, np.ndarray, torch.Tensor)
    if not any(issubclass(kind, rows) for kind in set(map(type, allowed))):
        return _of_rows([_ids(name, allowed, None, vocab)], vocab)[0]
    return _of_rows([None if line is None else _ids(name, line, row, vocab) for row, line in enumerate(allowed)], vocab)


def _of_tensor(name: str, allowed: torch.Tensor, vocab: int) -> torch.Tensor:
    require_dense(name, allowed)
    if allowed.ndim not in (1, 2):
        raise ValueError(f"{name}: expected 1 or 2 dimensions, got shape {tuple(allowed.shape)}")
    if allowed.dtype == torch.bool:
        if allowed.shape[-1] != vocab:
            raise ValueError(f"{name}: expected bools [{vocab}] or [B, {vocab}], got shape {tuple(allowed.shape)}")
        return _of_bools(allowed)
    if allowed.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected integer ids or bools, got {allowed.dtype}")
    if allowed.ndim == 1:
        return _of_rows([_ids(name, allowed, None, vocab)], vocab)[0]
    table = allowed.to(CPU, torch.int64)
    return _of_rows([_ids(name, line[line != -1], row, vocab) for row, line in enumerate(table)], vocab)


def _ids(name: str, line: Any, row: int | None, vocab: int) -> np.ndarray[Any, Any]:
    """A row's allowed ids, int64 [n]; `row` is None where they are those of all rows."""
    if isinstance(line, (np.ndarray, torch.Tensor)) and line.dtype in (torch.bool, np.dtype(bool)):
        line = torch.as_tensor(line)
        if line.shape != (vocab,):
            raise ValueError(f"{name} (row {row}): expected bools [{vocab}], got shape {tuple(line.shape)}")
        return np.asarray(line.to(CPU).nonzero()[:, 0])
    line = list(line) if isinstance(line, Set) else line
    device = line.device if isinstance(line, torch.Tensor) else CPU
    ids = row_of_ids(name, line, row, device).to(CPU).numpy()
    outside = (ids < 0) | (ids >= vocab)
    if outside.any():
        where = "" if row is None else f" (row {row})"
        raise ValueError(f"{name}: id {ids[outside][0]}{where}: expected 0 <= id < {vocab}")
    return ids


def _of_rows(rows: list[np.ndarray[Any, Any] | None], vocab: int) -> torch.Tensor:
    """int32 [B, words] of each row's ids; None allows all of them."""
    words = np.empty((len(rows), -(-vocab // 32)), dtype="<i4")
    for row, ids in enumerate(rows):
        bits = np.zeros(32 * words.shape[1], dtype=np.uint8)
        bits[slice(vocab) if ids is None else ids] = 1
        words[row] = np.packbits(bits, bitorder="little").view("<i4")
    return torch.from_numpy(words.astype(np.int32, copy=False))


def _of_bools(allowed: torch.Tensor) -> torch.Tensor:
    """int32 [..., words] of bools [..., V], where they are."""
    if allowed.device != CPU:
        return _by_sums(allowed)
    packed = np.packbits(allowed.numpy(), axis=-1, bitorder="little")
    packed = np.pad(packed, [(0, 0)] * (allowed.ndim - 1) + [(0, -packed.shape[-1] % 4)])
    return torch.from_numpy(packed.view("<i4").astype(np.int32, copy=False))


def _by_sums(allowed: torch.Tensor) -> torch.Tensor:
    """The same on a GPU, which is not waited for."""
    vocab = allowed.shape[-1]
    padded = torch.nn.functional.pad(allowed, (0, -vocab % 32))
    bits = padded.view(*allowed.shape[:-1], -1, 32).to(torch.int64) << torch.arange(32, device=allowed.device)
    words = bits.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
