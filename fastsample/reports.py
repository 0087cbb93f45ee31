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
        names = (*names, "kept_row_ptr") if lists else names
        self.starts: dict[str, int] = {}
        self.shapes = {name: FIELD[name].shape(batch, options, vocab) for name in names}
        self.size = 0  # bytes up to the lists
        for name in names:
            self.starts[name] = self.size
            self.size += -(-self._bytes(name) // _WORD) * _WORD
        self.native: Any = None  # the same in native form, if an engine has made it
        self._lists = lists

    def _bytes(self, name: str) -> int:
        return prod(self.shapes[name]) * FIELD[name].dtype.itemsize

    def tensor(self, name: str, memory: bytearray) -> torch.Tensor | None:
        """An output as a tensor, or None if it is not reported. Its memory is its own: not even a count keeps a whole
        step's bytes; but that of bitmasks, which are most of them, is the call's."""
        if self._lists and name == "kept_ids":
            return _tensor(memory[self.size :], FIELD[name].dtype)
        start = self.starts.get(name)
        if start is None:
            return None
        own = memoryview(memory)[start : start + self._bytes(name)]
        return _tensor(own if name == "kept_bitmask" else bytearray(own), FIELD[name].dtype).view(self.shapes[name])


def _tensor(memory: Any, dtype: torch.dtype) -> torch.Tensor:
    if torch.is_inference_mode_enabled():  # where it is read need not be where the call was
        with torch.inference_mode(False):
            return _tensor(memory, dtype)
    return torch.frombuffer(memory, dtype=dtype) if len(memory) else torch.empty(0, dtype=dtype, device="cpu")
