"""What a call on the CPU reports besides its tokens: bytes, of which tensors are made when they are first read.

A tensor takes longer to make than a count of kept tokens takes to find, and many are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from fastsample.outputs import FIELD, Options

_WORD = 8  # bytes; every output begins at a multiple


class Layout:
    """Where in a call's memory each output lies: those of these names, and lists of all kept ids at its end."""

    def __init__(self, names: Sequence[str], lists: bool, options: Options, batch: tuple[int, ...], vocab: int) -> None:
        self.starts: dict[str, int] = {}
        self.size = 0  # bytes up to the lists
        self.native: Any = None  # the same in native form, if an engine has made it
        self._places: dict[str, tuple[slice, torch.dtype, tuple[int, ...]]] = {}
        for name in (*names, "kept_row_ptr") if lists else names:
            dtype, shape = FIELD[name].dtype, FIELD[name].shape(batch, options, vocab)
            end = self.size + prod(shape) * dtype.itemsize
            self.starts[name], self._places[name] = self.size, (slice(self.size, end), dtype, shape)
            self.size = -(-end // _WORD) * _WORD
        if lists:
            self._places["kept_ids"] = slice(self.size, None), FIELD["kept_ids"].dtype, (-1,)

    def tensor(self, name: str, memory: bytearray) -> torch.Tensor | None:
        """An output as a tensor, or None if it is not reported. The memory of ids and bitmasks, which are most of a
        step's bytes, is the call's; others have their own, so that a count does not keep all of it."""
        if name not in self._places:
            return None
        place, dtype, shape = self._places[name]
        own = memoryview(memory)[place] if name in ("kept_ids", "kept_bitmask") else memory[place]
        flat = _tensor(own, dtype)
        return flat if len(shape) == 1 else flat.view(shape)


def _tensor(memory: Any, dtype: torch.dtype) -> torch.Tensor:
    if torch.is_inference_mode_enabled():  # where it is read need not be where the call was
        with torch.inference_mode(False):
            return _tensor(memory, dtype)
    return torch.frombuffer(memory, dtype=dtype) if len(memory) else torch.empty(0, dtype=dtype, device="cpu")
