"""The checks that bring a caller's value of a parameter into the form that its Spec asks for."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch

from fastsample.arrays import as_array, from_numpy
from fastsample.checks import CPU, INTEGERS, is_list, require_dense, to_float32
from fastsample.spec import INT32_MAX, Spec


def code(spec: Spec, value: Any) -> Any:
    """A validated value as the record holds it: a choice becomes its position among the choices."""
    if spec.kind != "choice":
        return value
    return [spec.choices.index(v) for v in value] if isinstance(value, tuple) else spec.choices.index(value)


def normalise(name: str, spec: Spec, value: Any) -> Any:
    """The validated value: a number or a name, or per row a 1-D tensor or a tuple of names."""
    if type(value) in (float, int, str):  # the usual types first: abstract ones take longer to check
        return _scalar(name, spec, value, "")
    value = as_array(name, value)
    if isinstance(value, np.ndarray):
        value = from_numpy(name, value) if value.dtype.kind in "biuf" else value.tolist()
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
        number = to_float32(value) if spec.kind == "float" else min(int(value), INT32_MAX)
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
    column = column.float() if spec.kind == "float" else column.clamp(max=INT32_MAX).to(torch.int64)
    good = spec.accepts(column)
    if not bool(good.all()):
        row = int((~good).nonzero()[0, 0])
        raise ValueError(f"{name} = {value[row].item()!r} (row {row}): expected {spec.wanted}")
    return column.to(_dtype(spec))


def _dtype(spec: Spec) -> torch.dtype:
    return torch.float32 if spec.kind == "float" else torch.int32
