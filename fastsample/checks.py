"""Checks and conversions of tensors, arrays and numbers that several modules share."""

from __future__ import annotations

import math
import numbers
import struct
from collections.abc import Sequence
from typing import Any

import torch

MAX_VOCAB = 2**20

CPU = torch.device("cpu")
"""Where parameters are made, whatever torch's default device is."""

INTEGERS = frozenset(
    (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
)
"""Dtypes of whole numbers."""

FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))
"""Dtypes of logits."""

# Numbers and names ---------------------------------------------------------------------------------------------------


def is_list(value: Any) -> bool:
    """Whether an argument is a sequence of values. Text and bytes are sequences too, but never meant as one."""
    if type(value) is list:
        return True
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def is_one_of(value: Any, *choices: str) -> bool:
    """Whether an argument is one of some strings. Comparing anything that is not a string might fail."""
    return isinstance(value, str) and value in choices


def to_float32(value: Any) -> float:
    """The nearest float32 to a real number, as a Python float; infinite where it overflows."""
    try:
        return float(struct.unpack("f", struct.pack("f", float(value)))[0])
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def whole(name: str, value: Any) -> int:
    """An integer of any kind but bool, or TypeError."""
    if type(value) is int:
        return value
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} = {value!r}: expected an integer")
    return int(value)


def count(name: str, value: Any, low: int, high: int) -> int:
    """An integer between two others, both included."""
    number = whole(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name} = {number}: expected {low} <= {name} <= {high}")
    return number


def integer(name: str, value: Any, row: int | None) -> int:
    """A token id of any size that int64 holds; `row` is None where it stands for all rows."""
    where = "" if row is None else f" (row {row})"
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}{where}: expected an integer, got {value!r}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name}{where}: expected a 64-bit integer, got {value}")
    return int(value)


# Tensors -------------------------------------------------------------------------------------------------------------


def require_dense(name: str, tensor: torch.Tensor) -> None:
    """ValueError unless a tensor has its values in one strided piece of memory."""
    require_strided(name, tensor)
    require_memory(name, tensor)


def require_strided(name: str, tensor: torch.Tensor) -> None:
    """ValueError for a sparse, nested or meta tensor. While a graph is traced, this is all that can be checked."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "a nested tensor" if tensor.is_nested else tensor.layout
        raise ValueError(f"{name}: expected a dense tensor with values, got {kind} on {tensor.device}")


def require_memory(name: str, tensor: torch.Tensor) -> None:
    """ValueError for a strided tensor that has no memory of its own."""
    if not has_memory(tensor):
        raise ValueError(
            f"{name}: expected a dense tensor with values, got a {type(tensor).__name__} without memory of its own "
            "(a wrapper, one inside vmap or grad, a fake one, or one whose storage was freed)"
        )


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a strided tensor's values lie where its address says."""
    kind = type(tensor)
    if kind is not torch.Tensor and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return False  # a wrapper such as DTensor or FakeTensor, whose values are elsewhere
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except (RuntimeError, ValueError):  # from torch.func's wrappers and from lazy parameters
        return False


def require_tensor(name: str, value: Any, device: torch.device) -> None:
    """TypeError or ValueError unless a value is a dense tensor on the device of the logits."""
    plain = type(value) is torch.Tensor and value.device == device and value.layout is torch.strided
    if plain and not value.is_nested and has_memory(value):
        return  # the usual case, in half the time
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor or an array, got {type(value).__name__}")
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like the logits, got one on {value.device}")
    require_dense(name, value)


def last_contiguous(table: torch.Tensor) -> torch.Tensor:
    """A table whose rows an engine can walk. Each query to torch takes 0.1 us of a step's 10, so there are few."""
    if table.is_neg():
        table = table.resolve_neg()
    return table if table.is_contiguous() or table.stride(1) == 1 else table.contiguous()


def check_logits(logits: torch.Tensor, traced: bool = False, name: str = "logits") -> torch.Tensor:
    """The logits as [B, V], with the leading dimensions flattened, or an error that says what they should be.

    Traced logits have no values yet, so their memory is not looked at.
    """
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor or an array, got {type(logits).__name__}")
    (require_strided if traced else require_dense)(name, logits)
    if logits.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {logits.dtype}")
    if logits.ndim == 0:
        raise ValueError(f"{name}: expected shape [B, V], [V] or [B, T, V], got ()")
    vocab = logits.shape[-1]
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"{name}: expected 1 <= V <= 2^20, got V = {vocab}")
    if vocab > 1 and logits.stride(-1) != 1 and logits.numel():
        raise ValueError(
            f"{name}: expected a contiguous last dimension, got stride {logits.stride(-1)}; call .contiguous()"
        )
    if logits.is_neg():
        logits = logits.resolve_neg()
    if logits.ndim == 2:
        return logits
    return logits.unsqueeze(0) if logits.ndim == 1 else logits.flatten(0, -2)
