"""Calls that cannot be recorded: made eagerly, outside of the graph, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.compiler import is_compiling

from fastsample import call
from fastsample.disabled import disabled
from fastsample.inputs import Inputs
from fastsample.inputs.bias import as_tensors
from fastsample.inputs.step import DETAILS
from fastsample.outputs import Options, SampleOutput
from fastsample.traced import is_recorded

Tensor = torch.Tensor
Traced = TypeVar("Traced", bound=Callable[..., Any])

_WANTED = {
    "out": "None under torch.compile and whatever else makes a graph, which plans the buffers itself",
    **{name: detail.wanted for name, detail in DETAILS.items()},
    **dict.fromkeys(("draft_ids", "num_drafts", "draft_logits", "draft_probs"), "a tensor in whatever makes a graph"),
    "kept_capacity": "a limit of the ids listed per row in whatever makes a graph, which needs sizes ahead",
    "draft_params": "None in whatever makes a graph",
}


class Step(Protocol):
    """A Sampler, as it is called here."""

    def __call__(self, logits: Tensor, *, rows: Any, out: Any, **inputs: Any) -> SampleOutput: ...


def served(traced: Traced, inputs: Inputs, out: Any, also: str | None = None) -> Traced:
    """`traced`, or where an argument cannot be an operator's, what breaks the graph and makes the call eagerly.

    `also` is another argument of that kind, which the caller has found.

    It only returns a function, so that the graph breaks in the public call, before anything of ours is compiled. What
    records without breaking (make_fx, torch.export and fullgraph=True) refuses the argument by name.
    """
    compiled = torch.compiler.is_dynamo_compiling()
    if not compiled and torch._C._is_tracing():
        raise RuntimeError("torch.jit.trace (and ONNX export by it) cannot record fastsample; use torch.export")
    name = _refused(inputs, out) or also
    if not compiled and not is_compiling():
        if not _is_recorded():  # called by a frame that torch.compile left alone
            return cast(Traced, _EAGER[traced.__name__, name or "out"])
        if traced.__name__ == "step":
            raise RuntimeError(
                "make_fx and FakeTensorMode cannot record a Sampler, whose offsets change; "
                "pass fastsample.sample a seed and an offset"
            )
    if name is None:
        return traced
    if compiled:
        return cast(Traced, _EAGER[traced.__name__, name])
    raise TypeError(f"{name}: expected {_WANTED[name]}")


def _refused(inputs: Inputs, out: Any) -> str | None:
    """The argument that cannot be an operator's: anything but a tensor would be a constant of the code."""
    if out is not None:
        return "out"
    for name, value in zip(inputs._fields, inputs, strict=True):
        if value is not None and not _can_be(DETAILS[name].operator, value):
            return name
    return None


def _can_be(operator: str, value: Any) -> bool:
    """Whether a value can be an operator's argument of that type."""
    if operator == "Tensor[]":
        return as_tensors(value) is not None
    return operator == "Tensor?" and isinstance(value, torch.Tensor)


def _eager_sample(
    logits: Any, params: Any, fields: Any, seed: Any, offset: Any, inputs: Inputs, options: Options, out: Any
) -> SampleOutput:
    result: SampleOutput = call.make("tokens", logits, params, fields, seed, offset, inputs, options, out)
    return result


def _eager_step(sampler: Step, logits: Any, rows: Any, inputs: Inputs, options: Options, out: Any) -> SampleOutput:
    return sampler(logits, rows=rows, out=out, **inputs._asdict())


def _eager_full(kind: Any, logits: Any, params: Any, fields: Any, inputs: Inputs, options: Options, out: Any) -> Tensor:
    result: Tensor = call.make(kind, logits, params, fields, 0, 0, inputs, options, out)
    return result


def _eager_verify(*arguments: Any) -> Any:
    from fastsample.verified import verified

    return verified(*arguments)


def _without_graph(function: Any, name: str) -> Any:
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__name__ = call.__qualname__ = f"fastsample_without_a_graph_for_{name}"
    return disabled(call, f"{name}: expected {_WANTED[name]}")


# A frame of ours that torch.compile would try to compile.
_is_recorded: Any = cast(Any, torch.compiler.disable)(is_recorded)
_EAGER = {
    (traced, name): _without_graph(function, name)
    for traced, function in (
        ("sample", _eager_sample),
        ("step", _eager_step),
        ("full", _eager_full),
        ("verify", _eager_verify),
    )
    for name in _WANTED
}
