"""Under torch.compile the functions of this package run eagerly, whole, not traced in pieces."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.compiler import is_compiling

F = TypeVar("F", bound=Callable[..., Any])

_is_traced: Callable[[], bool] = torch.jit._trace.is_tracing

functions: dict[str, Callable[..., Any]] = {}
"""Every function so marked, for `opaque`."""


def eager(function: F) -> F:
    """Mark a public function as opaque to a trace."""
    name = function.__name__
    functions[name] = function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            from fastsample.integrations.flashinfer import opaque  # during a trace the compiler is loaded anyway

            return opaque.FUNCTIONS[name](*args, **kwargs)
        if _is_traced():  # which would see nothing of what an engine does
            raise RuntimeError(f"{name}: torch.jit.trace cannot record it; torch.compile can, with a graph break")
        return function(*args, **kwargs)

    return cast(F, call)
