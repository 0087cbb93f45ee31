"""Rows: what an engine sees of a batch besides the logits, validated once and packed per row (see csrc/core/rows.h)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from fastsample.params import (
    CPU,
    INTEGERS,
    from_numpy,
    has_memory,
    is_list,
    require_dense,
    require_memory,
    to_float32,
)

MAX_VOCAB = 2**20

Array: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"
Seed: TypeAlias = "int | Sequence[int] | Array"
TokenIds: TypeAlias = "Array | Sequence[Sequence[int] | Array | None] | Sequence[int]"
Allowed: TypeAlias = "Array | Sequence[Sequence[int] | Array | None] | Sequence[int]"
BiasDict: TypeAlias = Mapping[int, float]
BiasTensors: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
BiasLike: TypeAlias = "BiasDict | Sequence[BiasDict | None] | BiasTensors | Bias"


class Bias(NamedTuple):
    """Sparse additions, checked: row i owns entries row_ptr[i] to row_ptr[i + 1]."""

    row_ptr: torch.Tensor  # int64 [B + 1]
    ids: torch.Tensor  # int64 [N], each 0 <= id < vocab and once per row
    values: torch.Tensor  # float32 [N]
    vocab: int


@dataclass(slots=True)
class Rows:
    """A batch's parameters. A first dimension of 1 is shared by every row."""

    records: torch.Tensor  # int32 [B or 1, fields]: params.SamplingParams.pack()
    seeds: torch.Tensor  # int64 [B], the bits of an unsigned 64-bit integer
    offsets: torch.Tensor  # int64 [B or 1], likewise
    bitmask: torch.Tensor | None = None  # int32 [B or 1, words]
    bias: Bias | None = None
    prompt_ids: torch.Tensor | None = None  # int64 [B, L], ids outside the vocabulary are padding
    output_ids: torch.Tensor | None = None  # int64 [B, L]
    native: Any = None  # an engine's own form of these rows, kept for the next step
    slots: Rows | None = None  # the same parameters without the inputs, which last for many steps
    workspace: dict[Any, Any] | None = None  # buffers that engines keep for a Sampler's steps

    def to(self, device: torch.device) -> Rows:
        """The same rows with the packed parameters on the device of the logits."""
        if self.records.device == device and self.seeds.device == device and self.offsets.device == device:
            return self
        records, seeds, offsets = (t.to(device, non_blocking=True) for t in (self.records, self.seeds, self.offsets))
        return replace(self, records=records, seeds=seeds, offsets=offsets, native=None)

    def with_inputs(self) -> Rows:
        """These slots for one step, whose inputs are to be added."""
        return Rows(self.records, self.seeds, self.offsets, slots=self, workspace=self.workspace)


def stamp(value: Any) -> tuple[Any, ...] | None:
    """All of a tensor but its values that may change while it stays the same object."""
    return None if value is None else (value.data_ptr(), value.dtype, value.shape, value.stride(), value.is_neg())


def shares_values(given: Any, packed: torch.Tensor | None) -> bool:
    """Whether what was made of an argument is a view of it, as it was given."""
    if type(given) is not torch.Tensor or packed is None:
        return False
    return given.data_ptr() == packed.data_ptr() and given.dtype == packed.dtype


_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(z: int) -> int:
    """One step of the generator (Steele, Lea and Flood 2014): 64 bits, of which every one depends on all of z's."""
    return int(_mix((z + _GOLDEN) & _MASK))


def row_seeds(seed: int, count: int) -> torch.Tensor:
    """splitmix64(splitmix64(seed) + row) for row in range(count), as int64 bits [count].

    The inner step keeps neighbouring seeds apart: of seed + row alone, row 1 of a seed would be row 0 of the next.
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


def pack_seeds(seed: Seed | None, rows: int) -> torch.Tensor:
    """Per-row seeds, int64 bits [B]: a scalar goes through splitmix64, a tensor or sequence is used as it is."""
    if seed is None:
        # torch's default CPU generator: torch.manual_seed makes a program repeatable, no device is asked.
        seed = int(torch.empty(1, dtype=torch.int64, device=CPU).random_())
    if isinstance(seed, (torch.Tensor, np.ndarray)) and seed.ndim == 0:
        seed = int(_SEED.column(seed, rows))
    # The usual type first: to ask for an abstract one takes longer.
    if type(seed) is int or (isinstance(seed, numbers.Integral) and not isinstance(seed, bool)):
        return row_seeds(_SEED.word(int(seed)), rows)
    return _SEED.column(seed, rows)


def pack_offsets(offset: Seed, rows: int) -> torch.Tensor:
    """Per-row offsets, int64 bits [B], or [1] where all rows share one. Not to be written to.

    A negative number is no position, whether a Python int or in an array. A tensor of int64 holds bits, as those that
    `Sampler.offsets` returns: 2^63 and more are negative there.
    """
    if type(offset) is int or (isinstance(offset, numbers.Integral) and not isinstance(offset, bool)):
        return _shared_offset(_OFFSET.word(int(offset)))
    return _OFFSET.column(offset, rows)


@lru_cache(maxsize=64)
def _shared_offset(offset: int) -> torch.Tensor:
    shared = torch.full((1,), _signed(offset), dtype=torch.int64, device=CPU)
    require_memory("offset", shared)  # a mode of torch's that makes fake tensors must not leave one here
    return shared


def pack_bias(bias: BiasLike, logits: torch.Tensor) -> Bias:
    """A dict (for every row), a list with a dict or None per row, or (row_ptr, ids, values), as `Bias`.

    To check tensors on a GPU is to wait for it. A step that must not, packs once and passes the `Bias` instead.
    """
    rows, vocab = logits.shape
    if isinstance(bias, Bias):
        if (len(bias.row_ptr), bias.vocab, bias.ids.device) != (rows + 1, vocab, logits.device):
            was = f"{len(bias.row_ptr) - 1} rows and V = {bias.vocab} on {bias.ids.device}"
            raise ValueError(f"bias: was packed for {was}, the logits have {rows} and {vocab} on {logits.device}")
        if bias.ids.is_cuda:
            return bias
        bias = bias[:3]
    if isinstance(bias, tuple) and any(isinstance(part, torch.Tensor) for part in bias):
        parts = _bias_tensors(bias, rows, logits.device)
    else:
        parts = _bias_dicts(bias, rows)
    _check_bias(*parts, vocab)
    row_ptr, ids, values = (part.to(logits.device, non_blocking=True) for part in parts)
    return Bias(row_ptr, ids, values, vocab)


def _bias_dicts(bias: Any, rows: int) -> BiasTensors:
    dicts = [bias] * rows if isinstance(bias, Mapping) else bias
    if not is_list(dicts):
        raise TypeError(f"bias: expected a dict, a list of dicts or (row_ptr, ids, values), got {type(bias).__name__}")
    if len(dicts) != rows:
        raise ValueError(f"bias: expected one dict per row ({rows}), got {len(dicts)}")
    ids: list[int] = []
    values: list[float] = []
    row_ptr = [0]
    for row, entries in enumerate(dicts):
        if entries is not None and not isinstance(entries, Mapping):
            raise TypeError(f"bias (row {row}): expected a dict of id: value, got {type(entries).__name__}")
        for token, value in (entries or {}).items():
            ids.append(integer("bias id", token, row))
            values.append(_bias_value(value, token, row))
        row_ptr.append(len(ids))
    return (
        torch.tensor(row_ptr, dtype=torch.int64, device=CPU),
        torch.tensor(ids, dtype=torch.int64, device=CPU),
        torch.tensor(values, dtype=torch.float32, device=CPU),
    )


def _bias_value(value: Any, token: Any, row: int) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"bias of id {token} (row {row}): expected a number, got {value!r}")
    number = to_float32(value)
    if math.isinf(number) and value not in (math.inf, -math.inf):
        raise _bad_bias(token, row, value)
    return number


def _bad_bias(token: Any, row: int, value: Any) -> ValueError:
    return ValueError(f"bias of id {token} (row {row}): expected a finite float32 or -inf, got {value}")


def _bias_tensors(bias: tuple[Any, ...], rows: int, device: torch.device) -> BiasTensors:
    if len(bias) != 3:
        raise ValueError(f"bias: expected (row_ptr, ids, values), got {len(bias)} parts")
    for name, part in zip(("row_ptr", "ids", "values"), bias, strict=True):
        require_tensor(f"bias {name}", part, device)
        if part.ndim != 1:
            raise ValueError(f"bias {name}: expected 1 dimension, got shape {tuple(part.shape)}")
    row_ptr, ids, values = bias
    for name, part in (("row_ptr", row_ptr), ("ids", ids)):
        if part.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"bias {name}: expected int64 or int32, got {part.dtype}")
    if not values.is_floating_point():
        raise TypeError(f"bias values: expected float32, got {values.dtype}")
    pointers = row_ptr.tolist()
    good = len(pointers) == rows + 1 and pointers[0] == 0 and pointers == sorted(pointers)
    if not good or pointers[-1] != len(ids) or len(ids) != len(values):
        raise ValueError(
            f"bias: expected row_ptr of {rows + 1} rising entries from 0 to the number of ids "
            f"({len(ids)} ids, {len(values)} values), got {pointers[:8]}"
        )
    given = values.detach()
    row_ptr, ids, values = (part.resolve_neg() for part in (row_ptr.long(), ids.long(), given.float()))
    if given.dtype == torch.float64 and bool((beyond := values.isinf() & given.isfinite()).any()):
        at = int(beyond.nonzero()[0, 0])
        raise _bad_bias(int(ids[at]), int(torch.repeat_interleave(row_ptr.diff())[at]), float(given[at]))
    return row_ptr.contiguous(), ids.contiguous(), values.contiguous()


def _check_bias(row_ptr: torch.Tensor, ids: torch.Tensor, values: torch.Tensor, vocab: int) -> None:
    """Ids within the vocabulary and once per row, values finite or -inf."""
    if not len(ids):
        return
    row_of = torch.repeat_interleave(row_ptr.diff())
    outside = (ids < 0) | (ids >= vocab)
    if bool(outside.any()):
        at = int(outside.nonzero()[0, 0])
        raise ValueError(f"bias id {int(ids[at])} (row {int(row_of[at])}): expected 0 <= id < {vocab}")
    wrong = values.isnan() | (values == torch.inf)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0, 0])
        raise _bad_bias(int(ids[at]), int(row_of[at]), float(values[at]))
    keys = (row_of * vocab + ids).sort().values
    twice = keys[1:] == keys[:-1]
    if bool(twice.any()):
        key = int(keys[1:][twice][0])
        raise ValueError(f"bias id {key % vocab} (row {key // vocab}): expected once per row, got it twice")


def integer(name: str, value: Any, row: int | None) -> int:
    """A token id of any size that int64 holds; `row` is None where it is for all rows."""
    where = "" if row is None else f" (row {row})"
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}{where}: expected an integer, got {value!r}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name}{where}: expected a 64-bit integer, got {value}")
    return int(value)


def last_contiguous(table: torch.Tensor) -> torch.Tensor:
    """A table whose rows an engine can walk, in few questions to torch: each is 0.1 us of a step's 10."""
    if table.is_neg():
        table = table.resolve_neg()
    return table if table.is_contiguous() or table.stride(1) == 1 else table.contiguous()


def require_tensor(name: str, value: Any, device: torch.device) -> None:
    plain = type(value) is torch.Tensor and value.device == device and value.layout is torch.strided
    if plain and not value.is_nested and has_memory(value):
        return  # the usual case, in half the time
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like the logits, got one on {value.device}")
    require_dense(name, value)


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
        if values.ndim > 1 or (values.ndim == 1 and len(values) != rows):
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
        tensor = from_numpy(values)
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
