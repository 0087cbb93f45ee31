"""Spec: what one parameter may be, and the checks that bring a caller's value into that form."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fastsample.checks import CPU, INTEGERS, from_numpy, is_list, require_dense, to_float32

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Spec:
    """What one parameter may be. Numbers are compared as the float32 (or int) that the engines will see."""

    kind: Literal["float", "int", "bool", "choice"]
    meaning: str
    low: float = -_FLOAT32_MAX
    high: float = _FLOAT32_MAX
    open_low: bool = False
    choices: tuple[str, ...] = ()
    off: str = ""  # the neutral value, where other libraries have another one
    counts: str = ""  # for a penalty: the ids without which it has no effect
    open_high: bool = False
    of_logits: bool = False  # measured on logits, so that it has no meaning for probabilities
    of_history: bool = False  # reads the ids of the text in their order
    examples: tuple[Any, ...] = ()  # for tests: values that each change what is kept, or its logits,
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # with these fields beside them

    @property
    def range(self) -> str:
        """The range in words, for error messages and documentation."""
        if self.kind == "choice":
            return "one of " + ", ".join(repr(c) for c in self.choices)
        if self.kind == "bool":
            return "True or False"
        low = "" if self.low == -_FLOAT32_MAX else f"{_number(self.low)} {'<' if self.open_low else '<='} "
        high = (
            ""
            if self.high in (_FLOAT32_MAX, _INT32_MAX)
            else f" {'<' if self.open_high else '<='} {_number(self.high)}"
        )
        noun = "an integer" if self.kind == "int" else "a finite number"
        return noun if not low and not high else f"{noun}, {low}value{high}"

    @property
    def wanted(self) -> str:
        """The range as an error tells it, with the value that means off."""
        return f"{self.range}; {self.off} is off" if self.off else self.range

    def accepts(self, value: Any) -> Any:
        """Whether a number, or each element of a tensor, lies in the range (NaN does not)."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above & below


def _number(value: float) -> str:
    return "2^20" if value == 2**20 else f"{value:g}"


def real(default: float, meaning: str, **bounds: Any) -> Any:
    return dataclasses.field(default=default, metadata={"spec": Spec("float", meaning, **bounds)})


def integer(default: int, meaning: str, low: int, high: int = _INT32_MAX, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"spec": Spec("int", meaning, low, high, **more)})


def flag(meaning: str, **more: Any) -> Any:
    spec = Spec("bool", meaning, 0, 1, examples=(True,), **more)
    return dataclasses.field(default=False, metadata={"spec": spec})


def choice(meaning: str, *choices: str, **more: Any) -> Any:
    spec = Spec("choice", meaning, choices=choices, examples=choices[1:], **more)
    return dataclasses.field(default=choices[0], metadata={"spec": spec})


def code(spec: Spec, value: Any) -> Any:
    """A validated value as the record holds it: a choice becomes its position among the choices."""
    if spec.kind != "choice":
        return value
    return [spec.choices.index(v) for v in value] if isinstance(value, tuple) else spec.choices.index(value)


def normalise(name: str, spec: Spec, value: Any) -> Any:
    """The validated value: a number or a name, or per row a 1-D tensor or a tuple of names."""
    if type(value) in (float, int, str):  # the usual types first: abstract ones take longer to check
        return _scalar(name, spec, value, "")
    if isinstance(value, np.ndarray):
        value = from_numpy(value) if value.dtype.kind in "biuf" else value.tolist()
    if isinstance(value, torch.Tensor):
        require_dense(name, value)
        value = value.item() if value.ndim == 0 else value
    if isinstance(value, torch.Tensor):
        return _tensor(name, spec, value)
    if not is_list(value):
        return _scalar(name, spec, value, "")
    items = [_scalar(name, spec, item, f" (row {row})") for row, item in enumerate(value)]
    return tuple(items) if spec.kind == "choice" else torch.tensor(items, dtype=_dtype(spec), device=CPU)


_KINDS: dict[str, Any] = {
    "choice": str,
    "int": numbers.Integral,
    "float": numbers.Real,
    "bool": (bool, np.bool_, numbers.Integral),
}


def _scalar(name: str, spec: Spec, value: Any, where: str) -> Any:
    if not isinstance(value, _KINDS[spec.kind]) or (isinstance(value, (bool, np.bool_)) and spec.kind != "bool"):
        raise TypeError(f"{name} = {value!r}{where}: expected {spec.wanted}")
    if spec.kind == "choice":
        good = value in spec.choices
    else:
        number = to_float32(value) if spec.kind == "float" else min(int(value), _INT32_MAX)
        good = spec.accepts(number)
    if not good:
        raise ValueError(f"{name} = {value!r}{where}: expected {spec.wanted}")
    if spec.kind == "bool":
        return bool(value)
    return value if spec.kind == "choice" else number


def _tensor(name: str, spec: Spec, value: torch.Tensor) -> torch.Tensor:
    if value.ndim != 1:
        raise ValueError(f"{name}: expected a scalar or a 1-D tensor [B], got shape {tuple(value.shape)}")
    numeric = value.dtype in INTEGERS or (spec.kind == "float" and value.is_floating_point())
    numeric |= spec.kind == "bool" and value.dtype == torch.bool
    if spec.kind == "choice" or not numeric:
        raise TypeError(f"{name}: expected {spec.range} per row, got a tensor of {value.dtype}")
    # A copy: validated values must not change with the caller's tensor.
    wide = torch.float64 if spec.kind == "float" or value.dtype == torch.uint64 else torch.int64
    column = value.detach().to("cpu", wide, copy=True)
    column = column.float() if spec.kind == "float" else column.clamp(max=_INT32_MAX).to(torch.int64)
    good = spec.accepts(column)
    if not bool(good.all()):
        row = int((~good).nonzero()[0, 0])
        raise ValueError(f"{name} = {value[row].item()!r} (row {row}): expected {spec.wanted}")
    return column.to(_dtype(spec))


def _dtype(spec: Spec) -> torch.dtype:
    return torch.float32 if spec.kind == "float" else torch.int32
