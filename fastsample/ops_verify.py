"""The torch.library operator of `fastsample.verify` and `verify_tree`; only a trace that verifies imports this module.

As those of ops.py, it is opaque to the compiler and runs what an eager call runs, checks and errors included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastsample import ops, verified
from fastsample.inputs import Inputs
from fastsample.outputs import FIELD, Options
from fastsample.params import SamplingParams

Tensor = torch.Tensor

_OPTIONS = ("logprobs", "top_logprobs", "on_invalid", "backend")
_DRAFTS = "Tensor draft_ids, Tensor? num_drafts, Tensor? parents, str rule, Tensor? draft_logits, Tensor? draft_probs"
_SAMPLING = f"{ops._PARAMS}, Tensor seed, Tensor offset, {ops._INPUTS}"
_ASKED = "str? logprobs, int top_logprobs, str on_invalid, str backend"
_DTYPES = {
    "tokens": torch.int64,
    "num_accepted": torch.int32,
    "status": torch.int32,
    **{name: FIELD[name].dtype for name in ("logprobs", "ranks", "top_ids", "top_logprobs")},
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
    wanted = _wanted(options.logprobs, options.top_logprobs, drafts.parents is not None)
    values = (value if name in wanted else None for name, value in zip(_DTYPES, result, strict=True))
    return verified.VerifyOutput(*values)  # type: ignore[arg-type]


def _wanted(logprobs: str | None, top: int, tree: bool) -> list[str]:
    """Names of the outputs that are not None."""
    found = ["tokens", "num_accepted", "status"]
    found += ["logprobs", "ranks"] if logprobs is not None else []
    found += ["top_ids", "top_logprobs"] if top else []
    return [*found, "path"] if tree else found


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
    options = Options(1, **dict(zip(_OPTIONS, given[-len(_OPTIONS) :], strict=True)))
    inputs = ops._inputs(given)
    result = verified.verified(logits, drafts, None, ops._fields(values, columns), seed, offset, inputs, options)
    outputs = ((name, getattr(result, name)) for name in _DTYPES)
    return tuple(logits.new_empty(0, dtype=_DTYPES[name]) if v is None else v for name, v in outputs)


@_verify.register_fake
def _(logits: Tensor, draft_ids: Tensor, num_drafts: Any, parents: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    logprobs, top = rest[-4], rest[-3]
    wanted = _wanted(logprobs, top, parents is not None)
    if draft_ids.ndim != 2:
        raise ValueError(f"draft_ids: expected shape [B, K] in a graph, got {list(draft_ids.shape)}")
    requests, width = draft_ids.shape[0], draft_ids.shape[1] + (parents is None)
    shapes: dict[str, tuple[Any, ...]] = dict.fromkeys(_DTYPES, (requests, width))
    shapes |= {"num_accepted": (requests,), "status": (requests,)}
    shapes |= dict.fromkeys(("top_ids", "top_logprobs"), (requests, width, top))
    return tuple(
        logits.new_empty(shapes[name] if name in wanted else (0,), dtype=dtype) for name, dtype in _DTYPES.items()
    )
