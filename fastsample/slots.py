"""Some of a Sampler's slots as a batch of their own: which, and their rows of the Sampler's state."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from fastsample.arrays import ArrayLike, as_array, from_numpy
from fastsample.checks import CPU, require_dense
from fastsample.inputs import Rows
from fastsample.params import SamplingParams, specs
from fastsample.spec import Spec

SlotIndex: TypeAlias = "int | slice | Sequence[int] | ArrayLike"

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def slot_numbers(rows: SlotIndex, size: int) -> list[int]:
    """The slots that an index names, in its order: distinct, each 0 <= slot < size."""
    return checked(listed(rows, size), size)


def checked(numbers: list[int], size: int) -> list[int]:
    first: dict[int, int] = {}
    for at, slot in enumerate(numbers):
        if not 0 <= slot < size:
            raise ValueError(f"rows[{at}] = {slot}: expected a slot, 0 <= slot < {size}")
        if slot in first:
            raise ValueError(f"rows[{at}] = {slot}: expected distinct slots, and rows[{first[slot]}] is {slot} too")
        first[slot] = at
    return numbers


def listed(rows: Any, size: int) -> list[int]:
    """The numbers in an index, which may be those of no slots."""
    if isinstance(rows, slice):
        try:
            return list(range(size)[rows])
        except TypeError as error:
            raise TypeError(f"rows = {rows!r}: expected a slice of integers") from error
    rows = as_array("rows", rows)
    if isinstance(rows, np.ndarray) and rows.dtype.kind in "biu":
        rows = from_numpy("rows", rows)
    if isinstance(rows, torch.Tensor):
        return _of_tensor(rows, size)
    if isinstance(rows, Sequence) and not isinstance(rows, (str, bytes)):
        if {int}.issuperset(map(type, rows)):
            return list(rows)
        return [_slot(f"rows[{at}]", slot) for at, slot in enumerate(rows)]
    return [_slot("rows", rows)]


def _of_tensor(rows: torch.Tensor, size: int) -> list[int]:
    require_dense("rows", rows)
    mask = rows.dtype == torch.bool
    if rows.ndim != 1 or (mask and len(rows) != size):
        wanted = f"[{size}] of a mask" if mask else "[n]"
        raise ValueError(f"rows: expected shape {wanted}, got {tuple(rows.shape)}")
    if not mask and rows.dtype not in _INTEGERS:
        raise TypeError(f"rows: expected integers or a mask of bool, got {rows.dtype}")
    numbers: list[int] = (rows.nonzero()[:, 0] if mask else rows).tolist()
    return numbers


def _slot(name: str, value: Any) -> int:
    try:
        if not isinstance(value, (bool, np.bool_)):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} = {value!r}: expected the number of a slot, or a list, tensor or slice of them")


def unpack_params(records: torch.Tensor) -> SamplingParams:
    """The parameters that packed records [B, fields] on the CPU hold, each with one value per row."""
    return SamplingParams(**{name: _column(spec, part) for (name, spec), part in zip(specs(), records.T, strict=True)})


def _column(spec: Spec, part: torch.Tensor) -> Any:
    if spec.kind == "choice":
        return [spec.choices[code] for code in part.tolist()]
    return part.contiguous().view(torch.float32) if spec.kind == "float" else part


def described(records: torch.Tensor) -> dict[str, str]:
    """The parameters that are not the default in every row, for people."""
    found: dict[str, str] = {}
    for (name, spec), part in zip(specs(), records.T, strict=True):
        values = _column(spec, part)
        if spec.kind != "choice":
            values = [_number(spec, v) for v in values.numpy()]
        if any(value != getattr(SamplingParams, name) for value in values):
            found[name] = shortened(values)
    return found


def _number(spec: Spec, value: Any) -> Any:
    """A number of numpy's as Python prints it: 0.8, not 0.80000001."""
    if spec.kind == "float":
        return float(str(value))
    return bool(value) if spec.kind == "bool" else int(value)


def shortened(values: list[Any]) -> str:
    """One value where all are the same, else the list, or its ends."""
    if len(set(values)) == 1:
        return repr(values[0])
    if len(values) <= 8:
        return repr(values)
    first, last = (", ".join(map(repr, part)) for part in (values[:4], values[-2:]))
    return f"[{first}, ..., {last}]"


def _is_numpys(tensor: torch.Tensor) -> bool:
    """Whether numpy can gather from it, which takes a third of torch's time."""
    return tensor.device == CPU


class Pick:
    """Slots that are sampled together, and what a Sampler keeps from one step with them to the next.

    Neighbours in rising order are a view of the Sampler's state. Others are gathered before a step and their offsets
    put back after it: on a GPU by kernels alone, so that a captured step sees what has changed since.
    """

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers
        self._index = np.array(numbers, dtype=np.int64)
        self._own: Rows | None = None  # the Sampler's state that the rest was made of
        self._rows: Rows
        self._arrays: list[tuple[Any, Any]] = []  # (all slots', these) records, seeds, offsets
        self._on_device: torch.Tensor | None = None

    def require_rows(self, logits: torch.Tensor) -> None:
        """ValueError unless a table of logits has a row for each slot; what else it must be others say."""
        given = 1 if logits.ndim == 1 else len(logits) if logits.ndim == 2 else len(self.numbers)
        if given != len(self.numbers):
            raise ValueError(f"logits: expected {len(self.numbers)} rows, one for each slot of `rows`, got {given}")

    def take(self, own: Rows) -> Rows:
        """These slots' rows of the Sampler's state, as they are now."""
        if self._own is not own:
            with torch.inference_mode(False):
                self._make(own)
        for whole, part in self._arrays:
            part[...] = whole[self._index]
        if self._on_device is not None:
            for name in ("records", "seeds", "offsets"):
                torch.index_select(getattr(own, name), 0, self._on_device, out=getattr(self._rows, name))
        return self._rows

    def put_back(self, own: Rows) -> None:
        """The offsets, which a step has advanced."""
        if self._arrays:
            whole, part = self._arrays[-1]
            whole[self._index] = part
        elif self._on_device is not None:
            own.offsets.index_copy_(0, self._on_device, self._rows.offsets)

    def _make(self, own: Rows) -> None:
        first, count = self.numbers[0] if self.numbers else 0, len(self.numbers)
        parts = [own.records, own.seeds, own.offsets]
        self._arrays, self._on_device = [], None
        if self.numbers == list(range(first, first + count)):
            picked = [part[first : first + count] for part in parts]
        else:
            picked = [torch.empty_like(part[:count]) for part in parts]
            if _is_numpys(own.records):
                self._arrays = [(whole.numpy(), part.numpy()) for whole, part in zip(parts, picked, strict=True)]
            else:
                self._on_device = torch.tensor(self.numbers, dtype=torch.int64, device=CPU).to(own.records.device)
        self._rows = Rows(picked[0], picked[1], picked[2], workspace=own.workspace)
        self._own = own
