"""What Triton 3.3 and 3.4 lack, and how a kernel learns what it is compiled for."""

import hashlib
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import triton
import triton.language as tl

OLD = not hasattr(triton, "constexpr_function")  # 3.3 or 3.4


def builtin(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call while they are compiled, with the compiler's state as a keyword argument."""
    fn.__triton_builtin__ = True
    return fn


def constexpr_function(fn: Callable[..., Any]) -> Any:
    """Computes a constexpr from others, in kernels; what it is given is plain in `fn`, as it is on the host."""
    if not OLD:
        return triton.constexpr_function(fn)

    @wraps(fn)
    def call(*args: Any, **compiler: Any) -> Any:
        found = fn(*(arg.value if isinstance(arg, tl.constexpr) else arg for arg in args))
        return tl.constexpr(found) if compiler else found

    return builtin(call)


@builtin
def backend(_builder: Any = None, _semantic: Any = None) -> Any:
    """What is compiled for: "cuda" or "hip", or "interpreter" where nothing is."""
    if _builder is None and _semantic is None:
        return "interpreter"
    return tl.constexpr((_builder or _semantic.builder).options.backend_name)


@builtin
def is_gfx9(_builder: Any = None, _semantic: Any = None) -> Any:
    """Whether the GPU that is compiled for is one of AMD's of this family: MI100 to MI355."""
    options = getattr(_builder or getattr(_semantic, "builder", None), "options", None)
    return tl.constexpr(str(getattr(options, "arch", "")).startswith("gfx9"))


def mark(module: ModuleType, text: str) -> None:
    """Make a text part of the keys under which Triton caches a module's kernels on disk.

    An old Triton's keys are made of the sources of jit functions, but neither of constexprs nor of what computes them.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()
    for fn in vars(module).values():
        if isinstance(fn, triton.JITFunction) and fn.__module__ == module.__name__:
            fn._unsafe_update_src(f"{fn.src}\n# {digest}")
