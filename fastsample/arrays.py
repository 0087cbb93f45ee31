"""Arrays of NumPy, MLX, JAX, ONNX Runtime and others, as NumPy arrays and tensors over the same memory."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack


class SupportsDLPack(Protocol):
    """An array that hands its memory to other libraries (https://dmlc.github.io/dlpack)."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> Any: ...


class SupportsArrayInterface(Protocol):
    """One that does so as NumPy describes it (https://numpy.org/doc/stable/reference/arrays.interface.html)."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


ArrayLike: TypeAlias = "torch.Tensor | np.ndarray[Any, Any] | SupportsDLPack | SupportsArrayInterface"
"""What the public calls take for a tensor."""

_PLAIN = frozenset((type(None), bool, int, float, str, list, tuple, dict, torch.Tensor, np.ndarray))
_PROTOCOLS = ("__dlpack__", "__array_interface__", "__array__", "__cuda_array_interface__")


def as_array(name: str, value: Any) -> Any:
    """An array of another library as a tensor, or as one of NumPy's where it holds integers; all else as it is.

    Integers of a tensor may stand for the bits of 64-bit words, which those of an array never do.
    """
    kind = type(value)
    if kind in _PLAIN or isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value
    own = getattr(value, "__dict__", ())  # not hasattr: a proxy, as graphs are traced with, claims to have everything
    if not any(hasattr(kind, protocol) or protocol in own for protocol in _PROTOCOLS):
        return value
    found = _shared(name, value)
    if isinstance(found, torch.Tensor) and found.device.type == "cpu" and not found.is_floating_point():
        return found.numpy()
    return found


def as_tensor(name: str, value: Any) -> Any:
    """A tensor over an array's memory; what is no array comes back as it is."""
    if type(value) is torch.Tensor:  # the usual case
        return value
    value = as_array(name, value)
    return from_numpy(name, value) if isinstance(value, np.ndarray) else value


def from_numpy(name: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """An array of numbers as a tensor, which is not to be written to.

    It is a copy where torch could not read the memory: a foreign byte order, strides that are negative or no multiple
    of an element.
    """
    if array.dtype.name == "bfloat16":  # of ml_dtypes, as JAX has it; NumPy itself has no such numbers
        return from_numpy(name, array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{name}: expected numbers, got an array of {array.dtype}")
    size = array.itemsize
    if not array.dtype.isnative or any(stride < 0 or stride % size for stride in array.strides):
        array = np.array(array, array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Memory(array)))


class _Memory:
    """The memory of a read-only array, of which torch would warn, since no tensor can be read-only."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array  # keeps the memory
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _shared(name: str, value: Any) -> Any:
    """The memory of another library's array, by the first protocol that serves."""
    failures = []
    for protocol, read in (("__dlpack__", from_dlpack), ("__cuda_array_interface__", torch.as_tensor)):
        if hasattr(value, protocol):
            try:
                return read(value)
            except Exception as error:  # whatever the other library raises; it may have another way
                failures.append(f"{protocol}: {error}")
    try:
        array = np.asarray(value)
    except Exception as error:
        failures.append(f"np.asarray: {error}")
    else:
        if array.dtype.kind != "O":
            return array
    kind = type(value)
    why = f" ({'; '.join(failures)})" if failures else ""
    raise TypeError(f"{name}: cannot read the memory of a {kind.__module__}.{kind.__qualname__}{why}")
