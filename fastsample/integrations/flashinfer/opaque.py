"""What a trace calls in place of the functions of this package. Only a trace imports this, and torch's compiler."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from fastsample.integrations.flashinfer.eager import functions


def _opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    disable: Any = torch.compiler.disable
    say = {}
    if "reason" in inspect.signature(disable).parameters:  # torch 2.7 and later
        name = f"{function.__module__}.{function.__name__}".replace(".chain.", ".")
        say["reason"] = f"{name} is not for fullgraph=True; fastsample.sample, which takes logits, is"
    disabled: Callable[..., Any] = disable(call, **say)
    return disabled


FUNCTIONS = {name: _opaque(function) for name, function in functions.items()}
