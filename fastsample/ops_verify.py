"""The torch.library operator of `fastsample.verify` and `verify_tree`; only a trace that verifies imports this module.

As those of ops.py, it is opaque to the compiler and runs what an eager call runs, checks and errors included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastsample import ops, verified
from fastsample.inputs import Inputs
from fastsample.outputs import FIELD, SAMPLED, Options, SampleOutput
from fastsample.params import SamplingParams

Tensor = torch.Tensor

_OPTIONS = tuple(name for name in Options._fields if name not in ("num_samples", "input"))
_DRAFTS = "Tensor draft_ids, Tensor? num_drafts, Tensor? parents, str rule, Tensor? draft_logits, Tensor? draft_probs"
_SAMPLING = f"{ops._PARAMS}, Tensor seed, Tensor offset, {ops._INPUTS}"
_ASKED = ", ".join(f"{ops._TYPES[type(Options._field_defaults[name])]} {name}" for name in _OPTIONS)
_DTYPES = {
    "tokens": torch.int64,
    "num_accepted": torch.int32,
    "status": torch.int32,
    **{name: FIELD[name].dtype for name in SampleOutput.__slots__ if name not in ("tokens", "status")},
    "path": torch.int64,
}
assert tuple(_DTYPES) == verified.VerifyOutput.__slots__
_OUTPUTS = f"({', '.join(f'Tensor {name}' for name in _DTYPES)})"


def verify(
    logits: Tensor,
    drafts: verified.Given,
    params: SamplingParams | None,
    fields: dict[str, Any],
    seed: Any,
    offset: Any,
    inputs: Inputs,
    options: Options,
    out: Any,
) -> verified.VerifyOutput:
    """`fastsample.verify`, or `verify_tree` where there are parents, in a trace."""
    seeds = ops._fresh() if seed is None else ops._words("seed", seed)
    asked = [getattr(options, name) for name in _OPTIONS]
    result = torch.ops.fastsample.verify(
        ops._own(logits), *drafts.traced(), *ops._params(params, fields), seeds, ops._words("offset", offset),
        *ops._taken(inputs), *asked,
    )  # fmt: skip
    wanted = _wanted(options, drafts.parents is not None)
    values = (value if name in wanted else None for name, value in zip(_DTYPES, result, strict=True))
    return verified.VerifyOutput(*values)  # type: ignore[arg-type]


def _wanted(options: Options, tree: bool) -> set[str]:
    """Names of the outputs that are not None."""
    names = {field.name for field in SAMPLED if field.wanted(options)}  # without a cache, which no trace has
    return names | {"num_accepted"} | ({"path"} if tree else set())


def _options(given: Sequence[Any]) -> Options:
    """The options, read back from an operator's trailing arguments."""
    return Options(1, **dict(zip(_OPTIONS, given[-len(_OPTIONS) :], strict=True)))


@torch.library.custom_op(
    "fastsample::verify",
    mutates_args=(),
    schema=f"(Tensor logits, {_DRAFTS}, {_SAMPLING}, {_ASKED}) -> {_OUTPUTS}",
    **ops._TAGS,
)
def _verify(
    logits: Tensor,
    draft_ids: Tensor,
    num_drafts: Tensor | None,
    parents: Tensor | None,
    rule: str,
    draft_logits: Tensor | None,
    draft_probs: Tensor | None,
    values: Sequence[float],
    columns: Sequence[Tensor | None],
    seed: Tensor,
    offset: Tensor,
    *given: Any,
) -> tuple[Tensor, ...]:
    drafts = verified.Given(draft_ids, num_drafts, parents, rule, draft_logits, draft_probs)
    options, inputs = _options(given), ops._inputs(given)
    result = verified.verified(logits, drafts, None, ops._fields(values, columns), seed, offset, inputs, options)
    outputs = ((name, getattr(result, name)) for name in _DTYPES)
    return tuple(logits.new_empty(0, dtype=_DTYPES[name]) if v is None else v for name, v in outputs)


@_verify.register_fake
def _(logits: Tensor, draft_ids: Tensor, num_drafts: Any, parents: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    options = _options(rest)
    names = _wanted(options, parents is not None)
    if draft_ids.ndim != 2:
        raise ValueError(f"draft_ids: expected shape [B, K] in a graph, got {list(draft_ids.shape)}")
    requests, width = draft_ids.shape[0], draft_ids.shape[1] + (parents is None)
    batch, vocab = (requests, width), logits.shape[-1]
    shapes = {name: FIELD[name].shape(batch, options, vocab) for name in _DTYPES if name in FIELD}
    shapes |= {"num_accepted": (requests,), "status": (requests,), "path": batch}
    return tuple(
        logits.new_empty(shapes[name] if name in names else (0,), dtype=dtype) for name, dtype in _DTYPES.items()
    )
