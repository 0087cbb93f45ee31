"""Bias: values added to the logits of some token ids."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from fastsample.arrays import ArrayLike, as_tensor
from fastsample.checks import CPU, integer, is_list, require_tensor, to_float32

BiasDict: TypeAlias = Mapping[int, float]
BiasTensors: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
BiasLike: TypeAlias = "BiasDict | Sequence[BiasDict | None] | tuple[ArrayLike, ArrayLike, ArrayLike] | Bias"


class Bias(NamedTuple):
    """Sparse additions, checked: row i owns entries row_ptr[i] to row_ptr[i + 1]."""

    row_ptr: torch.Tensor  # int64 [B + 1]
    ids: torch.Tensor  # int64 [N], each 0 <= id < vocab and once per row
    values: torch.Tensor  # float32 [N]
    vocab: int

    @property
    def tensors(self) -> BiasTensors:
        """What an engine reads."""
        return self.row_ptr, self.ids, self.values


def pack_bias(bias: BiasLike, logits: torch.Tensor) -> Bias:
    """A dict (for every row), a list with a dict or None per row, or (row_ptr, ids, values), as `Bias`.

    Checking tensors on a GPU waits for it. To avoid that in every step, pack once and pass the `Bias`.
    """
    rows, vocab = logits.shape
    if isinstance(bias, Bias):
        if (len(bias.row_ptr), bias.vocab, bias.ids.device) != (rows + 1, vocab, logits.device):
            was = f"{len(bias.row_ptr) - 1} rows and V = {bias.vocab} on {bias.ids.device}"
            raise ValueError(f"bias: was packed for {was}, the logits have {rows} and {vocab} on {logits.device}")
        if bias.ids.is_cuda:
            return bias
        bias = bias.tensors
    bias = tensors_of(bias)
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


def tensors_of(bias: Any) -> Any:
    """A bias whose parts are arrays with tensors in their place; any other form as it is."""
    return tuple(as_tensor("bias", part) for part in bias) if type(bias) is tuple else bias


def as_tensors(bias: Any) -> BiasTensors | None:
    """A bias that was given as tensors, checked or not; None where it is in any other form."""
    if isinstance(bias, Bias):
        return bias.row_ptr, bias.ids, bias.values  # spelled out: torch.compile follows this, but not every property
    if isinstance(bias, tuple) and len(bias) == 3 and all(isinstance(part, torch.Tensor) for part in bias):
        return bias
    return None


def select_bias(bias: BiasTensors, index: torch.Tensor) -> BiasTensors:
    """The biases of some rows, in the order of the index and as often as it names them."""
    row_ptr, ids, values = bias
    counts = row_ptr.diff()[index]
    ends = counts.cumsum(0)
    shift = (row_ptr[:-1][index] - (ends - counts)).repeat_interleave(counts)
    entries = torch.arange(len(shift), device=shift.device) + shift
    return torch.cat([ends.new_zeros(1), ends]), ids[entries], values[entries]
