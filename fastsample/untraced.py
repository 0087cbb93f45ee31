"""Calls that cannot be recorded: made eagerly, outside of the graph, or refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch.compiler import is_compiling

from fastsample import api
from fastsample.request import WISHES, SampleOutput
from fastsample.traced import is_recorded

if TYPE_CHECKING:
    from fastsample.sampler import Sampler

Tensor = torch.Tensor
Call = TypeVar("Call", bound=Callable[..., Any])

_INPUTS = ("bitmask", "bias", "prompt_ids", "output_ids", "allowed_ids")


def served(traced: Call, inputs: tuple[Any, ...], out: Any) -> Call:
    """`traced`, or where an argument cannot be an operator's, what breaks the graph and makes the call eagerly.

    It only returns a function, so that the graph breaks in the public call, before anything of ours is compiled. What
    records without breaking (make_fx, torch.export and fullgraph=True) refuses the argument by name.
    """
    compiled = torch.compiler.is_dynamo_compiling()
    if not compiled and torch._C._is_tracing():
        raise RuntimeError("torch.jit.trace (and ONNX export by it) cannot record fastsample; use torch.export")
    name = _refused(inputs, out)
    if not compiled and not is_compiling():
        if not _is_recorded():  # called by a frame that torch.compile left alone
            return cast(Call, _EAGER[traced.__name__, name or "out"])
        if traced.__name__ == "step":
            raise RuntimeError(
                "make_fx and FakeTensorMode cannot record a Sampler, whose offsets change; "
                "pass fastsample.sample a seed and an offset"
            )
    if name is None:
        return traced
    if compiled:
        return cast(Call, _EAGER[traced.__name__, name])
    raise TypeError(f"{name}: expected {_WANTED[name]}")


def _refused(inputs: tuple[Any, ...], out: Any) -> str | None:
    """The argument that cannot be an operator's: what is no tensor would be a constant of the code."""
    if out is not None:
        return "out"
    bitmask, bias, prompt_ids, output_ids, *more = inputs
    for name, value in (("bitmask", bitmask), ("prompt_ids", prompt_ids), ("output_ids", output_ids)):
        if value is not None and not isinstance(value, torch.Tensor):
            return name
    if bias is not None and not (isinstance(bias, tuple) and all(isinstance(part, torch.Tensor) for part in bias[:3])):
        return "bias"
    return "allowed_ids" if any(value is not None for value in more) else None


_TRACES = "under torch.compile and whatever else makes a graph"
_WANTED = {
    "out": f"None {_TRACES}, which plans the buffers itself",
    "bitmask": f"a tensor {_TRACES}",
    "bias": f"tensors (row_ptr, ids, values) {_TRACES}; a dict would be a constant",
    "prompt_ids": f"a tensor {_TRACES}; a list would be a constant",
    "output_ids": f"a tensor {_TRACES}; a list would be a constant",
    "allowed_ids": f"None {_TRACES}; pass a bitmask (fastsample.pack_bitmask)",
}


def _eager_sample(
    logits: Any, params: Any, fields: Any, seed: Any, offset: Any, inputs: Any, wishes: Any, out: Any
) -> SampleOutput:
    given = dict(zip((*_INPUTS, *WISHES), (*inputs, *wishes), strict=True))
    return api.sample(logits, params, seed=seed, offset=offset, out=out, **given, **fields)


def _eager_step(sampler: Sampler, logits: Any, rows: Any, inputs: Any, wishes: Any, out: Any) -> SampleOutput:
    return sampler(logits, rows=rows, out=out, **dict(zip(_INPUTS, inputs, strict=True)))


def _eager_full(*arguments: Any) -> Tensor:
    result: Tensor = cast(Any, api.full)(*arguments, stacklevel=4)
    return result


def _outside_of_a_graph(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return function(*arguments, **named)


def disabled(function: Any, reason: str) -> Any:
    """`function`, which no trace enters; the reason is what fullgraph=True says, where this torch takes one."""
    disable: Any = torch.compiler.disable
    takes_reason = "reason" in inspect.signature(disable).parameters  # torch 2.7 and later
    return disable(function, reason=reason) if takes_reason else disable(function)


def _without_graph(function: Any, name: str) -> Any:
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__name__ = call.__qualname__ = f"fastsample_without_a_graph_for_{name}"
    return disabled(call, f"{name}: expected {_WANTED[name]}")


# A frame of ours that torch.compile would try to compile.
_is_recorded: Any = cast(Any, torch.compiler.disable)(is_recorded)
eagerly: Any = cast(Any, torch.compiler.disable)(_outside_of_a_graph)
_EAGER = {
    (traced, name): _without_graph(function, name)
    for traced, function in (("sample", _eager_sample), ("step", _eager_step), ("full", _eager_full))
    for name in _WANTED
}
