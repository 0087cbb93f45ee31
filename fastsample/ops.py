"""torch.library operators for torch.compile and torch.export. Only a trace that samples imports this module.

The traced functions below only sort arguments. The operators are opaque to the compiler and run what an eager call
runs, checks and errors included. Everything that changes from step to step may be a tensor, so no step compiles anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.compiler import is_compiling

from fastsample import call
from fastsample.checks import check_logits
from fastsample.inputs import Inputs, Rows, pack_offsets, pack_params, pack_seeds
from fastsample.inputs.batch import flat, flat_fields
from fastsample.inputs.bias import as_tensors
from fastsample.inputs.probs import require_for_probs, require_no_bias
from fastsample.inputs.step import DETAILS
from fastsample.outputs import SAMPLED, Options, SampleOutput
from fastsample.params import SamplingParams, specs, unknown_name
from fastsample.slots import Pick, slot_numbers
from fastsample.traced import belongs_here

Tensor = torch.Tensor

_NAMES = tuple(name for name, _ in specs())
_TAKEN = {name: detail.operator for name, detail in DETAILS.items() if detail.operator}  # inputs of the operators
_PARAMS = "float[] values, Tensor?[] columns"
_INPUTS = ", ".join(f"{operator} {name}" for name, operator in _TAKEN.items())
_TYPES = {int: "int", str: "str", bool: "bool", type(None): "str?"}
_OPTIONS = ", ".join(f"{_TYPES[type(default)]} {name}" for name, default in Options._field_defaults.items())
_OUTPUTS = f"({', '.join(f'Tensor {field.name}' for field in SAMPLED)})"


class Slots(Protocol):
    """The part of a Sampler that a step in a trace needs."""

    @property
    def batch_size(self) -> int: ...

    def _rows_on(self, device: torch.device) -> Rows: ...


# What is traced ------------------------------------------------------------------------------------------------------


def sample(
    logits: Any,
    params: SamplingParams | None,
    fields: dict[str, Any],
    seed: Any,
    offset: Any,
    inputs: Inputs,
    options: Options,
    out: SampleOutput | None,
) -> SampleOutput:
    """`fastsample.sample` in a trace."""
    seeds = _fresh() if seed is None else _words("seed", seed)
    result = torch.ops.fastsample.sample(
        _own(logits), *_params(params, fields), seeds, _words("offset", offset), *_taken(inputs), *options
    )
    return _named(result, options)


def step(
    sampler: Slots, logits: Any, rows: Any, inputs: Inputs, options: Options, out: SampleOutput | None
) -> SampleOutput:
    """A call of a Sampler in a trace; the operator advances the offsets in place."""
    own = sampler._rows_on(logits.device)
    slots = (_own(logits), own.records, own.seeds, own.offsets)
    if rows is None:
        return _named(torch.ops.fastsample.sample_step(*slots, *_taken(inputs), *options), options)
    picked = _as_tensor(rows)
    if not isinstance(picked, torch.Tensor):
        picked = torch.tensor(slot_numbers(picked, sampler.batch_size), dtype=torch.int64, device="cpu")
    return _named(torch.ops.fastsample.sample_rows(*slots, picked, *_taken(inputs), *options), options)


def full(
    kind: str,
    logits: Any,
    params: SamplingParams | None,
    fields: dict[str, Any],
    inputs: Inputs,
    options: Options,
    out: Tensor | None,
) -> Tensor:
    """`fastsample.filter_logits` and `fastsample.probabilities` in a trace."""
    given = (*_params(params, fields), *_taken(inputs))
    asked = (options.on_invalid, options.backend, options.input)
    result: Tensor = torch.ops.fastsample.full(kind, _own(logits), *given, *asked)
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
    """A seed from torch's default CPU generator. Under torch.compile an operator draws it."""
    if torch.compiler.is_dynamo_compiling():
        if _is_exporting():  # which takes neither that operator nor random_
            return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")
        seed: Tensor = torch.ops.fastsample.fresh_seed(_DRAWN)
        return seed
    return torch.empty((), dtype=torch.int64, device="cpu").random_()


def _params(params: SamplingParams | None, fields: dict[str, Any]) -> tuple[list[float], list[Tensor | None]]:
    """Each field as one number (a choice as its position), or as a tensor with a value per row."""
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
        if (isinstance(value, bool) and spec.kind != "bool") or (isinstance(value, str) and spec.kind != "choice"):
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
_unknown = _constant(lambda name: unknown_name(name, call.OTHERS))  # runs untraced: difflib cannot be traced


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
    """Seeds or offsets as 64-bit words: 0-D for a number, or one per row."""
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


def _taken(inputs: Inputs) -> list[Any]:
    """The inputs that the operators take. (The others are None, see untraced.py.)"""
    taken = [(operator, getattr(inputs, name)) for name, operator in _TAKEN.items()]
    return [list(as_tensors(value) or ()) if operator == "Tensor[]" else value for operator, value in taken]


def _named(result: Sequence[Tensor], options: Options) -> SampleOutput:
    """The operator's outputs, which are empty where they are not wanted."""
    outputs = zip(SAMPLED, result, strict=True)
    return SampleOutput(*[value if field.wanted(options) else None for field, value in outputs])  # type: ignore[arg-type]


# The operators -------------------------------------------------------------------------------------------------------

_DRAWN = torch.zeros(1, dtype=torch.int64, device="cpu")
_TAGS: dict[str, Any] = {}
if hasattr(torch.Tag, "cudagraph_unsafe"):  # parameters are checked on the host
    _TAGS["tags"] = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op(
    "fastsample::fresh_seed", mutates_args=("drawn",), schema="(Tensor(a!) drawn) -> Tensor", **_TAGS
)
def _fresh_seed(drawn: Tensor) -> Tensor:
    """A seed from torch's default CPU generator. It counts in `drawn`; otherwise a graph would merge two calls."""
    drawn += 1
    return torch.empty((), dtype=torch.int64, device="cpu").random_()


def _inputs(given: Sequence[Any]) -> Inputs:
    """The inputs, read back from an operator's leading arguments."""
    inputs: dict[str, Any] = dict(zip(_TAKEN, given, strict=False))
    for name, operator in _TAKEN.items():
        if operator == "Tensor[]":
            inputs[name] = tuple(inputs[name]) or None
    return Inputs(**inputs)


def _options(given: Sequence[Any]) -> Options:
    """The options, read back from an operator's trailing arguments."""
    return Options(*given[-len(Options._fields) :])


def _run(table: Tensor, made: call.SampleCall, rows: Rows, inputs: Inputs, advance: bool) -> tuple[Tensor, ...]:
    if made.options.input == "probs":
        require_no_bias(inputs)
    inputs.attach(rows, table)
    out = made.run(table, rows.to(table.device), None, advance)
    values = (getattr(out, field.name) for field in SAMPLED)
    return tuple(
        table.new_empty(0, dtype=field.dtype) if value is None else value
        for field, value in zip(SAMPLED, values, strict=True)
    )


def _fields(values: Sequence[float], columns: Sequence[Tensor | None]) -> dict[str, Any]:
    """The fields of SamplingParams, read back from an operator's arguments."""
    fields: dict[str, Any] = {}
    for (name, spec), value, column in zip(specs(), values, columns, strict=True):
        if column is not None:
            fields[name] = [spec.choices[i] for i in column.tolist()] if spec.kind == "choice" else column
        elif spec.kind == "choice":
            fields[name] = spec.choices[int(value)]
        else:
            fields[name] = int(value) if spec.kind in ("int", "bool") and value == int(value) else value
    return fields


@torch.library.custom_op(
    "fastsample::sample",
    mutates_args=(),
    schema=f"(Tensor logits, {_PARAMS}, Tensor seed, Tensor offset, {_INPUTS}, {_OPTIONS}) -> {_OUTPUTS}",
    **_TAGS,
)
def _sample(
    logits: Tensor,
    values: Sequence[float],
    columns: Sequence[Tensor | None],
    seed: Tensor,
    offset: Tensor,
    *given: Any,
) -> tuple[Tensor, ...]:
    made, inputs = call.SampleCall(_options(given)), _inputs(given)
    table = made.table(logits)
    count, fields = table.shape[0], _fields(values, columns)
    if len(made.batch) > 1:
        fields, inputs = flat_fields(made.batch, fields), inputs.flat(made.batch)
        seed, offset = flat("seed", seed, made.batch), flat("offset", offset, made.batch)
    records = pack_params(None, fields, count)
    if made.options.input == "probs":
        require_for_probs(records)
    rows = Rows(records, pack_seeds(seed, count), pack_offsets(offset, count))
    return _run(table, made, rows, inputs, False)


_SLOTS = "Tensor logits, Tensor records, Tensor seeds, Tensor(a!) offsets"


@torch.library.custom_op(
    "fastsample::sample_step", mutates_args=("offsets",), schema=f"({_SLOTS}, {_INPUTS}, {_OPTIONS}) -> {_OUTPUTS}"
)
def _step(logits: Tensor, records: Tensor, seeds: Tensor, offsets: Tensor, *given: Any) -> tuple[Tensor, ...]:
    made, inputs = call.SampleCall(_options(given)), _inputs(given)
    made.slots = len(offsets)
    table = made.table(logits)
    return _run(table, made, Rows(records, seeds, offsets), inputs, True)


@torch.library.custom_op(
    "fastsample::sample_rows",
    mutates_args=("offsets",),
    schema=f"({_SLOTS}, Tensor rows, {_INPUTS}, {_OPTIONS}) -> {_OUTPUTS}",
    **_TAGS,
)
def _rows(
    logits: Tensor, records: Tensor, seeds: Tensor, offsets: Tensor, rows: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    pick = Pick(slot_numbers(rows, len(offsets)))
    pick.require_rows(logits)
    made, inputs = call.SampleCall(_options(given)), _inputs(given)
    made.slots = len(pick.numbers)
    table = made.table(logits)
    own = Rows(records, seeds, offsets)
    result = _run(table, made, pick.take(own), inputs, True)
    pick.put_back(own)
    return result


@torch.library.custom_op(
    "fastsample::full",
    mutates_args=(),
    schema=f"(str kind, Tensor logits, {_PARAMS}, {_INPUTS}, str on_invalid, str backend, str input) -> Tensor",
    **_TAGS,
)
def _full(kind: Any, logits: Tensor, values: Sequence[float], columns: Sequence[Tensor | None], *given: Any) -> Tensor:
    *_, on_invalid, backend, kind_of_input = given
    options = Options(on_invalid=on_invalid, backend=backend, input=kind_of_input)
    fields, inputs = _fields(values, columns), _inputs(given)
    result: Tensor = call.make(kind, logits, None, fields, 0, 0, inputs, options, None, stacklevel=None)
    return result


# Shapes for the compiler ---------------------------------------------------------------------------------------------


@_fresh_seed.register_fake
def _(drawn: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@_full.register_fake
def _(kind: str, logits: Tensor, *rest: Any) -> Tensor:
    check_logits(logits, traced=True)
    return logits.new_empty(logits.shape, dtype=torch.float32)


def _shapes(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    options = _options(rest)
    batch, vocab = tuple(logits.shape[:-1]), logits.shape[-1]
    return tuple(
        logits.new_empty(field.shape(batch, options, vocab) if field.wanted(options) else (0,), dtype=field.dtype)
        for field in SAMPLED
    )


for operator in (_sample, _step, _rows):
    operator.register_fake(_shapes)
