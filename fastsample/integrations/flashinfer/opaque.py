"""What a trace calls instead of this package's functions. Only a trace imports this, and with it torch's compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fastsample.disabled import disabled
from fastsample.integrations.flashinfer.eager import functions


def _opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    name = f"{function.__module__}.{function.__name__}".replace(".chain.", ".")
    opaque: Callable[..., Any] = disabled(
        call, f"{name} is not for fullgraph=True; fastsample.sample, which takes logits, is"
    )
    return opaque


FUNCTIONS = {name: _opaque(function) for name, function in functions.items()}
