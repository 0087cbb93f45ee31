"""Seeds and offsets: one 64-bit word per row, kept as the int64 of the same bits."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch

from fastsample.arrays import ArrayLike, as_array, from_numpy
from fastsample.checks import CPU, INTEGERS, is_list, require_dense, require_memory

Seed: TypeAlias = "int | Sequence[int] | ArrayLike"

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(z: int) -> int:
    """One step of the generator (Steele, Lea and Flood 2014): every bit of the result depends on all of z's."""
    return int(_mix((z + _GOLDEN) & _MASK))


def row_seeds(seed: int, count: int) -> torch.Tensor:
    """splitmix64(splitmix64(seed) + row) for row in range(count), as int64 bits [count].

    The inner step keeps neighbouring seeds apart: with seed + row alone, row 1 of a seed would be row 0 of the next.
    """
    first = (splitmix64(seed) + _GOLDEN) & _MASK
    if count == 1:  # the fastest of many ways: torch's and numpy's overhead is most of a single row's sampling
        return torch.full((1,), _signed(_mix(first)), dtype=torch.int64, device=CPU)
    return torch.from_numpy(_mix(np.arange(count, dtype=np.uint64) + np.uint64(first)).view(np.int64))


def _mix(z: Any) -> Any:
    """The finaliser of splitmix64, for a Python int or an array of uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def fill_seeds(words: np.ndarray[Any, Any], seed: int) -> None:
    """Write `row_seeds` of a 64-bit seed to int64 words."""
    seed = _SEED.word(seed)
    if len(words) != 1:
        words[:] = row_seeds(seed, len(words)).numpy()
    else:
        first = _mix((seed + _GOLDEN) & _MASK)
        words[0] = _signed(_mix((first + _GOLDEN) & _MASK))


def fill_offset(words: np.ndarray[Any, Any], offset: int) -> None:
    """Write an offset to a single int64 word."""
    words[0] = _signed(_OFFSET.word(offset))


def pack_seeds(seed: Seed | None, rows: int) -> torch.Tensor:
    """Per-row seeds, int64 bits [B]: a scalar goes through splitmix64, a tensor or sequence is used as it is."""
    if seed is None:
        # torch's default CPU generator: torch.manual_seed makes a program repeatable, no device is asked.
        seed = int(torch.empty(1, dtype=torch.int64, device=CPU).random_())
    seed = as_array("seed", seed)
    if isinstance(seed, (torch.Tensor, np.ndarray)) and seed.ndim == 0:
        seed = int(_SEED.column(seed, rows))
    # The usual type first: a check against an abstract class takes longer.
    if type(seed) is int or (isinstance(seed, numbers.Integral) and not isinstance(seed, bool)):
        return row_seeds(_SEED.word(int(seed)), rows)
    return _SEED.column(seed, rows)


def pack_offsets(offset: Seed, rows: int) -> torch.Tensor:
    """Per-row offsets, int64 bits [B], or [1] where all rows share one. Not to be written to.

    A negative number is no position, whether a Python int or in an array. A tensor of int64 holds bits, as
    `Sampler.offsets` returns them: 2^63 and more are negative there.
    """
    if type(offset) is int or (isinstance(offset, numbers.Integral) and not isinstance(offset, bool)):
        return _shared_offset(_OFFSET.word(int(offset)))
    return _OFFSET.column(offset, rows)


@lru_cache(maxsize=64)
def _shared_offset(offset: int) -> torch.Tensor:
    shared = torch.full((1,), _signed(offset), dtype=torch.int64, device=CPU)
    require_memory("offset", shared)  # a mode of torch's that makes fake tensors must not leave one here
    return shared


@dataclass(frozen=True)
class _Words:
    """Seeds or offsets: 64-bit words, which torch keeps as the int64 of the same bits."""

    name: str
    low: int  # of a number; an int64 tensor holds bits

    def word(self, value: int, row: int | None = None) -> int:
        """A number's 64 bits as an unsigned integer."""
        if not self.low <= value < 2**64:
            where = "" if row is None else f" (row {row})"
            wanted = "an integer, 0 <= value < 2^64" if self.low == 0 else "a 64-bit integer, -2^63 <= value < 2^64"
            raise ValueError(f"{self.name} = {value}{where}: expected {wanted}")
        return value % 2**64

    def column(self, values: Any, rows: int) -> torch.Tensor:
        """One word per row as int64 bits [B], or [1] of a 0-D tensor."""
        values = as_array(self.name, values)
        if isinstance(values, np.ndarray):
            values = self._from_array(values)
        if is_list(values):
            words = [self.word(self._integer(value, row), row) for row, value in enumerate(values)]
            values = torch.tensor([_signed(word) for word in words], dtype=torch.int64, device=CPU)
        if not isinstance(values, torch.Tensor):
            raise TypeError(f"{self.name}: expected an integer or one per row, got {values!r}")
        if values.dtype not in INTEGERS:
            raise TypeError(f"{self.name}: expected integers, got {values.dtype}")
        require_dense(self.name, values)
        if values.ndim > 1 or (values.ndim == 1 and values.shape[0] != rows):
            wanted = f"one int or {rows} {self.name}s (one per row)"
            got = len(values) if values.ndim == 1 else f"shape {tuple(values.shape)}"
            raise ValueError(f"{self.name}: expected {wanted}, got {got}")
        if values.dtype != torch.int64 and values.is_signed() and not values.is_cuda:
            self._refuse_negative(values)
        column = values.view(torch.int64) if values.dtype == torch.uint64 else values.to(torch.int64)
        return column.reshape(1) if column.ndim == 0 else column.resolve_neg().contiguous()

    def _from_array(self, values: np.ndarray[Any, Any]) -> Any:
        """An array's values, of which the signed are numbers."""
        if values.dtype.kind not in "biuf":
            return values.tolist()
        tensor = from_numpy(self.name, values)
        if values.dtype.kind == "i":
            self._refuse_negative(tensor)
        return tensor

    def _refuse_negative(self, values: torch.Tensor) -> None:
        if self.low == 0 and bool((bad := values < 0).any()):
            row = int(bad.reshape(-1).nonzero()[0, 0])
            self.word(int(values.reshape(-1)[row]), row if values.ndim else None)

    def _integer(self, value: Any, row: int) -> int:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{self.name} (row {row}): expected an integer, got {value!r}")
        return int(value)


_SEED = _Words("seed", -(2**63))
_OFFSET = _Words("offset", 0)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
