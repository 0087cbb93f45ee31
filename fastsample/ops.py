"""torch.library operators for torch.compile and torch.export; a trace that samples imports this, eager calls do not.

The traced half below only sorts arguments; the operators are opaque to the compiler and run what an eager call runs,
checks and errors included. What changes from step to step may be a tensor, so that no step compiles anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.compiler import is_compiling

from fastsample import api
from fastsample.leading import flat_fields, flat_inputs, flat_words
from fastsample.params import SamplingParams, specs, unknown_name
from fastsample.request import FIELDS, Request, SampleOutput, check_logits
from fastsample.rows import Rows, pack_offsets, pack_seeds
from fastsample.slots import Pick, slot_numbers
from fastsample.traced import belongs_here

if TYPE_CHECKING:
    from fastsample.sampler import Sampler

Tensor = torch.Tensor

_PARAMS = "float[] values, Tensor?[] columns"
_INPUTS = "Tensor? bitmask, Tensor[] bias, Tensor? prompt_ids, Tensor? output_ids"
_WISHES = "int num_samples, str? logprobs, int top_logprobs, str on_invalid, str backend"
_OUTPUTS = "(Tensor tokens, Tensor status, Tensor logprobs, Tensor ranks, Tensor top_ids, Tensor top_logprobs)"
_NAMES = tuple(name for name, _ in specs())
_DTYPES = (torch.int64, torch.int32, torch.float32, torch.int64, torch.int64, torch.float32)  # of the outputs


# What is traced ------------------------------------------------------------------------------------------------------


def sample(
    logits: Tensor,
    params: SamplingParams | None,
    fields: dict[str, Any],
    seed: Any,
    offset: Any,
    inputs: tuple[Any, ...],
    wishes: tuple[Any, ...],
    out: SampleOutput | None,
) -> SampleOutput:
    """`fastsample.sample` in a trace."""
    seeds = _fresh() if seed is None else _words("seed", seed)
    result = torch.ops.fastsample.sample(
        _own(logits), *_params(params, fields), seeds, _words("offset", offset), *_inputs(inputs), *wishes
    )
    return _named(result, wishes)


def step(
    sampler: Sampler,
    logits: Tensor,
    rows: Any,
    inputs: tuple[Any, ...],
    wishes: tuple[Any, ...],
    out: SampleOutput | None,
) -> SampleOutput:
    """A call of a Sampler in a trace; the operator advances the offsets in place."""
    own = sampler._rows
    if own.records.device != logits.device:
        records, seeds, offsets = (t.to(logits.device) for t in (own.records, own.seeds, own.offsets))
        sampler._rows = own = Rows(records, seeds, offsets, workspace=own.workspace)
        sampler._device = None
    slots = (_own(logits), own.records, own.seeds, own.offsets)
    if rows is None:
        return _named(torch.ops.fastsample.sample_step(*slots, *_inputs(inputs), *wishes), wishes)
    picked = _as_tensor(rows)
    if not isinstance(picked, torch.Tensor):
        picked = torch.tensor(slot_numbers(picked, sampler.batch_size), dtype=torch.int64, device="cpu")
    return _named(torch.ops.fastsample.sample_rows(*slots, picked, *_inputs(inputs), *wishes), wishes)


def full(
    kind: str,
    logits: Tensor,
    params: SamplingParams | None,
    inputs: tuple[Any, ...],
    on_invalid: str,
    backend: str,
    out: Tensor | None,
    fields: dict[str, Any],
) -> Tensor:
    """`fastsample.filter_logits` and `fastsample.probabilities` in a trace."""
    given = (*_params(params, fields), *_inputs(inputs))
    result: Tensor = torch.ops.fastsample.full(kind, _own(logits), *given, on_invalid, backend)
    return result


def _own(logits: Tensor) -> Tensor:
    """The logits, for which no gradient is wanted."""
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits: expected a torch.Tensor, got {type(logits).__name__}")
    if not is_compiling() and not belongs_here(logits):
        raise ValueError("logits: expected a fake tensor under FakeTensorMode, got one with values")
    return logits.detach()


def _is_exporting() -> bool:
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def _fresh() -> Tensor:
    """A seed of torch's default CPU generator, by an operator where a graph of torch.compile may merge equal ones."""
    if torch.compiler.is_dynamo_compiling():
        if _is_exporting():  # which takes neither that operator nor random_
            return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")
        seed: Tensor = torch.ops.fastsample.fresh_seed(_DRAWN)
        return seed
    return torch.empty((), dtype=torch.int64, device="cpu").random_()


def _params(params: SamplingParams | None, fields: dict[str, Any]) -> tuple[list[float], list[Tensor | None]]:
    """One number per field (a choice as its position) or one tensor with a value per row."""
    for name in fields:
        if name not in _NAMES:
            raise TypeError(_unknown(name))
    if params is not None and not isinstance(params, SamplingParams):
        raise TypeError(f"params: expected SamplingParams, got {type(params).__name__}")
    values: list[float] = []
    columns: list[Tensor | None] = []
    for name, spec in specs():
        value = fields[name] if name in fields else getattr(SamplingParams if params is None else params, name)
        value = _as_tensor(value)
        column = None
        if isinstance(value, bool):
            raise TypeError(f"{name} = {value!r}: expected {spec.wanted}")
        if isinstance(value, torch.Tensor):
            column = value
        elif isinstance(value, str):
            value = _position(name, spec.choices, value)
        elif isinstance(value, (list, tuple)):
            parts = [_position(name, spec.choices, v) if isinstance(v, str) else v for v in value]
            column = torch.tensor(parts, device="cpu")
        columns.append(column)
        values.append(value if column is None else 0.0)
    return values, columns


_constant: Any = torch.compiler.assume_constant_result
_unknown = _constant(lambda name: unknown_name(name, api.OTHERS))  # runs as it is: no trace goes through difflib


def _position(name: str, choices: tuple[str, ...], value: str) -> int:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}: expected one of {', '.join(map(repr, choices))}")
    return choices.index(value)


def _as_tensor(value: Any) -> Any:
    """An array as a tensor; torch.compile takes a number of numpy's for an array too."""
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value)
    return value.item() if isinstance(value, np.generic) else value


def _words(name: str, value: Any) -> Tensor:
    """Seeds or offsets as 64-bit words: 0-D of a number, which means what the number means, or one per row."""
    value = _as_tensor(value)
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (list, tuple)):
        return torch.tensor([_word(name, v) for v in value], dtype=torch.int64, device="cpu")
    return torch.tensor(_word(name, value), dtype=torch.int64, device="cpu")


def _word(name: str, value: Any) -> Any:
    if isinstance(value, (bool, float)):
        raise TypeError(f"{name} = {value!r}: expected an integer")
    if name == "offset" and value < 0:
        raise ValueError(f"{name} = {value}: expected an integer, 0 <= value < 2^64")
    if value < -(2**63) or value >= 2**64:
        raise ValueError(f"{name} = {value}: expected a 64-bit integer, -2^63 <= value < 2^64")
    return value - 2**64 if value >= 2**63 else value


def _inputs(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    bitmask, bias, prompt_ids, output_ids = inputs[:4]
    return bitmask, [] if bias is None else list(bias[:3]), prompt_ids, output_ids


def _named(result: Sequence[Tensor], wishes: tuple[Any, ...]) -> SampleOutput:
    _, logprobs, top_logprobs, _, _ = wishes
    tokens, status, own, ranks, top_ids, top = result
    wanted, listed = logprobs is not None, top_logprobs > 0
    return SampleOutput(
        tokens,
        status,
        own if wanted else None,
        ranks if wanted else None,
        top_ids if listed else None,
        top if listed else None,
    )


# The operators -------------------------------------------------------------------------------------------------------

_DRAWN = torch.zeros(1, dtype=torch.int64, device="cpu")
_TAGS: dict[str, Any] = {}
if hasattr(torch.Tag, "cudagraph_unsafe"):  # parameters are checked on the host
    _TAGS["tags"] = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op(
    "fastsample::fresh_seed", mutates_args=("drawn",), schema="(Tensor(a!) drawn) -> Tensor", **_TAGS
)
def _fresh_seed(drawn: Tensor) -> Tensor:
    """A seed from torch's default CPU generator. It counts in `drawn`, without which two calls would become one."""
    drawn += 1
    return torch.empty((), dtype=torch.int64, device="cpu").random_()


def _run(table: Tensor, request: Request, rows: Rows, inputs: tuple[Any, ...], advance: bool) -> tuple[Tensor, ...]:
    bitmask, bias, prompt_ids, output_ids = inputs
    api.add_row_inputs(rows, table, bitmask, tuple(bias) or None, prompt_ids, output_ids)
    out = request.run(table, rows.to(table.device), None, advance)
    parts = ((getattr(out, name), dtype) for name, dtype in zip(FIELDS, _DTYPES, strict=True))
    return tuple(table.new_empty(0, dtype=dtype) if value is None else value for value, dtype in parts)


def _fields(values: Sequence[float], columns: Sequence[Tensor | None]) -> dict[str, Any]:
    """The fields of SamplingParams again."""
    fields: dict[str, Any] = {}
    for (name, spec), value, column in zip(specs(), values, columns, strict=True):
        if column is not None:
            fields[name] = [spec.choices[i] for i in column.tolist()] if spec.kind == "choice" else column
        elif spec.kind == "choice":
            fields[name] = spec.choices[int(value)]
        else:
            fields[name] = int(value) if spec.kind == "int" and value == int(value) else value
    return fields


@torch.library.custom_op(
    "fastsample::sample",
    mutates_args=(),
    schema=f"(Tensor logits, {_PARAMS}, Tensor seed, Tensor offset, {_INPUTS}, {_WISHES}) -> {_OUTPUTS}",
    **_TAGS,
)
def _sample(
    logits: Tensor,
    values: Sequence[float],
    columns: Sequence[Tensor | None],
    seed: Tensor,
    offset: Tensor,
    bitmask: Tensor | None,
    bias: Sequence[Tensor],
    prompt_ids: Tensor | None,
    output_ids: Tensor | None,
    *wishes: Any,
) -> tuple[Tensor, ...]:
    request = Request(*wishes)
    table = request.table(logits)
    count, fields, inputs = table.shape[0], _fields(values, columns), (bitmask, bias, prompt_ids, output_ids)
    if len(request.batch) > 1:
        fields, (seed, offset) = flat_fields(request.batch, fields), flat_words(request.batch, seed, offset)
        inputs = flat_inputs(request.batch, *inputs)[:4]
    rows = Rows(api.pack_params(None, fields, count), pack_seeds(seed, count), pack_offsets(offset, count))
    return _run(table, request, rows, inputs, False)


_SLOTS = "Tensor logits, Tensor records, Tensor seeds, Tensor(a!) offsets"


@torch.library.custom_op(
    "fastsample::sample_step", mutates_args=("offsets",), schema=f"({_SLOTS}, {_INPUTS}, {_WISHES}) -> {_OUTPUTS}"
)
def _step(
    logits: Tensor,
    records: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    bitmask: Tensor | None,
    bias: Sequence[Tensor],
    prompt_ids: Tensor | None,
    output_ids: Tensor | None,
    *wishes: Any,
) -> tuple[Tensor, ...]:
    request = Request(*wishes)
    request.slots = len(offsets)
    table = request.table(logits)
    rows = Rows(records, seeds, offsets)
    return _run(table, request, rows, (bitmask, bias, prompt_ids, output_ids), True)


@torch.library.custom_op(
    "fastsample::sample_rows",
    mutates_args=("offsets",),
    schema=f"({_SLOTS}, Tensor rows, {_INPUTS}, {_WISHES}) -> {_OUTPUTS}",
    **_TAGS,
)
def _rows(
    logits: Tensor,
    records: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    rows: Tensor,
    bitmask: Tensor | None,
    bias: Sequence[Tensor],
    prompt_ids: Tensor | None,
    output_ids: Tensor | None,
    *wishes: Any,
) -> tuple[Tensor, ...]:
    pick = Pick(slot_numbers(rows, len(offsets)))
    pick.require_rows(logits)
    request = Request(*wishes)
    request.slots = len(pick.numbers)
    table = request.table(logits)
    own = Rows(records, seeds, offsets)
    result = _run(table, request, pick.take(own), (bitmask, bias, prompt_ids, output_ids), True)
    pick.put_back(own)
    return result


@torch.library.custom_op(
    "fastsample::full",
    mutates_args=(),
    schema=f"(str kind, Tensor logits, {_PARAMS}, {_INPUTS}, str on_invalid, str backend) -> Tensor",
    **_TAGS,
)
def _full(
    kind: Any,
    logits: Tensor,
    values: Sequence[float],
    columns: Sequence[Tensor | None],
    bitmask: Tensor | None,
    bias: Sequence[Tensor],
    prompt_ids: Tensor | None,
    output_ids: Tensor | None,
    on_invalid: Any,
    backend: str,
) -> Tensor:
    inputs = (bitmask, tuple(bias) or None, prompt_ids, output_ids)
    return api.full(kind, logits, None, inputs, on_invalid, backend, None, _fields(values, columns))


@_fresh_seed.register_fake
def _(drawn: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@_sample.register_fake
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _shapes(logits, *arguments[-5:-2])


@_step.register_fake
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _shapes(logits, *arguments[-5:-2])


@_rows.register_fake
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _shapes(logits, *arguments[-5:-2])


@_full.register_fake
def _(kind: str, logits: Tensor, *arguments: Any) -> Tensor:
    check_logits(logits, traced=True)
    return logits.new_empty(logits.shape, dtype=torch.float32)


def _shapes(logits: Tensor, num_samples: int, logprobs: str | None, top_logprobs: int) -> tuple[Tensor, ...]:
    batch = tuple(logits.shape[:-1])
    draws = batch if num_samples == 1 else (*batch, num_samples)
    own = draws if logprobs is not None else (0,)
    top = (*batch, top_logprobs) if top_logprobs else (0,)
    shapes = (draws, batch, own, own, top, top)
    return tuple(logits.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, _DTYPES, strict=True))
