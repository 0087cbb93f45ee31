"""Whether torch records what is called: native code leaves no trace, so a call must become an operator (ops.py)."""

from __future__ import annotations

import torch
from torch._C import (
    DispatchKey,
    _dispatch_tls_is_dispatch_key_included,
    _is_torch_function_mode_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch.compiler import is_dynamo_compiling

_PRE_DISPATCH = DispatchKey.PreDispatch


def is_traced() -> bool:
    """Under torch.compile, torch.export, torch.jit.trace, make_fx or a FakeTensorMode; 0.15 us where under none.

    The first question alone is the one that torch.compile answers while it compiles; the last two are those that have
    an answer of their own only where some mode is on.
    """
    return (
        is_dynamo_compiling()
        or _is_tracing()
        or (_len_torch_dispatch_stack() > 0 and _is_recorded())
        or (_is_torch_function_mode_enabled() and _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH))
    )


def _is_recorded() -> bool:
    """Whether one of torch's own modes is on; those of others, such as a counter of operations, change nothing."""
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.PROXY, keys.FAKE))
