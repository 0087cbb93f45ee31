"""Whether torch records what is called. Native code leaves no trace, so such a call becomes an operator (ops.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C import (
    DispatchKey,
    _dispatch_tls_is_dispatch_key_included,
    _is_torch_function_mode_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch.compiler import is_dynamo_compiling

P = ParamSpec("P")
R = TypeVar("R")

# What torch.compile does with new frames of this thread: None or False where nothing.
_callback: Any = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)
_PRE_DISPATCH = DispatchKey.PreDispatch


def is_traced() -> bool:
    """Whether a call must go by ops.py: recorded, or made by a frame that torch.compile left alone; 0.2 us where not.

    While torch.compile compiles, it evaluates the first condition only. The others are in the order of their cost.
    """
    return (
        is_dynamo_compiling()
        or _is_tracing()
        or (_len_torch_dispatch_stack() > 0 and _is_recorded())
        or (_is_torch_function_mode_enabled() and _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH))
        or bool(_callback())
    )


def is_recorded() -> bool:
    """Under make_fx or a FakeTensorMode."""
    return _is_recorded() or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)


def _is_recorded() -> bool:
    """Whether one of torch's own recording modes is on. Other modes, such as a counter of operations, do not matter."""
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.PROXY, keys.FAKE))


def untraced(method: Callable[P, R]) -> Callable[P, R]:
    """A method that torch.compile neither compiles nor enters: it breaks the graph (fullgraph=True says so)."""

    @wraps(method)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        if is_dynamo_compiling() or _callback():
            from fastsample.disabled import eagerly

            result: R = eagerly(method, *arguments, **named)
            return result
        return method(*arguments, **named)

    return call


def belongs_here(tensor: torch.Tensor) -> bool:
    """Whether a FakeTensorMode, if there is one, takes a tensor."""
    mode: Any = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if mode is None or mode.allow_non_fake_inputs:
        return True
    return isinstance(tensor, torch._subclasses.FakeTensor)
