"""The public calls: sample, filter_logits and probabilities. Arguments are checked here, once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch

from fastsample.backends import LogprobsMode, Outputs, select
from fastsample.ids import pack_token_ids
from fastsample.leading import flat_fields, flat_inputs, flat_words
from fastsample.masks import check_bitmask, restrict
from fastsample.params import CPU, SamplingParams, check_names, has_memory, require_memory
from fastsample.penalties import active_penalties, warn_without_ids
from fastsample.request import (
    OnInvalid,
    Request,
    SampleOutput,
    Written,
    check_buffer,
    check_logits,
    check_on_invalid,
    raise_if_invalid,
)
from fastsample.rows import Allowed, BiasLike, Rows, Seed, TokenIds, pack_bias, pack_offsets, pack_seeds
from fastsample.traced import is_traced


def sample(
    logits: torch.Tensor,
    params: SamplingParams | None = None,
    *,
    seed: Seed | None = None,
    offset: Seed = 0,
    num_samples: int = 1,
    bitmask: torch.Tensor | None = None,
    allowed_ids: Allowed | None = None,
    bias: BiasLike | None = None,
    prompt_ids: TokenIds | None = None,
    output_ids: TokenIds | None = None,
    logprobs: LogprobsMode | None = None,
    top_logprobs: int = 0,
    on_invalid: OnInvalid = "raise",
    backend: str = "auto",
    out: SampleOutput | None = None,
    **fields: Any,
) -> SampleOutput:
    """Draw one or more tokens per row of logits.

    A token depends on its row alone: the logits, the parameters, seed, offset and draw index. The batch, the slot,
    the number of threads, the instruction set, the device and the engine change nothing.

    Args:
        logits: float32, float16 or bfloat16 [B, V], or [V] for a single row (outputs then lose their first dimension).
            Any row stride, last dimension contiguous, 1 <= V <= 2^20. Never written to. More leading dimensions, as
            [B, T, V], are those of the outputs too; the rows are those of `logits.flatten(0, -2)` (a view, or a copy
            where strides allow none), also in what an int seed gives them and in errors. What has one entry per row is
            then given per row of that table, or as a tensor or array [B, T, ...], where a dimension of 1 is one for
            all: `offset=start[:, None] + torch.arange(T)`.
        params: how to sample; `fields` are SamplingParams fields and override it.
        seed: an int s, which gives row i the seed splitmix64(splitmix64(s) + i), or one 64-bit seed per row, used as it
            is. None takes a fresh seed from torch's default CPU generator (`torch.manual_seed` repeats it).
        offset: position in the sequence, 0 <= offset < 2^64; an int or one per row. Advance it by 1 per step. In a
            tensor, int64 holds the bits of the 64-bit word, as in `Sampler.offsets`; numbers below 0 are refused
            everywhere else.
        num_samples: independent draws per row, n >= 1.
        bitmask: int32 [B, words] or [words]; token j is allowed when bit j % 32 of word j // 32 is 1. Tokens past the
            last word are not allowed (xgrammar's and llguidance's format).
        allowed_ids: what may be drawn, beside the bitmask (a token must pass both): bool [V] or [B, V], True where
            allowed; or ids: [n] or a list for all rows, [B, n] padded with -1, or a list with a row's ids each, None
            where everything is allowed. 0 <= id < V. A row without ids is invalid. `fastsample.pack_bitmask` packs them
            once for many steps; here ids are packed by the host, which waits for a GPU that holds them.
        bias: {id: value} for all rows, a list with a dict or None per row, or tensors (row_ptr [B + 1], ids [N],
            values [N]); added to the logits. Finite or -inf. Tensors on a GPU are checked there, which waits for it;
            what `fastsample.rows.pack_bias(bias, logits)` returns was checked, and a step with it does not wait.
        prompt_ids, output_ids: what the penalties count: integers [B, L] padded with -1 (a tensor or an array), or a
            list with a row's ids each: a list, tensor or array [L], or None for none. A penalty that is on has no
            effect without them: a UserWarning says so. Where there are no ids yet, pass empty lists.
        logprobs: "raw" reports log-softmax of the logits as given, "processed" that of the distribution drawn from.
        top_logprobs: also report the N most probable tokens, 0 <= N <= V. Needs `logprobs`.
        on_invalid: a row with a NaN, with +inf or with nothing above -inf raises ValueError ("raise"; on a GPU this
            waits for the device) or yields token -1 and a status ("flag").
        backend: "auto", "reference", "cpu", "triton" or "cuda". A named engine serves or raises; it is never replaced.
        out: a SampleOutput of an earlier call of the same shape, to be filled and returned.
        **fields: SamplingParams fields, e.g. temperature=0.8, top_k=50.

    Returns:
        SampleOutput with fresh tensors on the logits' device, or `out`.

    Raises:
        TypeError, ValueError: bad argument; the message names it, the row and the value. Nothing is written.
        RuntimeError: the named backend cannot serve these logits.
    """
    if is_traced():
        from fastsample import ops, untraced

        inputs = (bitmask, bias, prompt_ids, output_ids, allowed_ids)
        wishes = (num_samples, logprobs, top_logprobs, on_invalid, backend)
        call = untraced.served(ops.sample, inputs, out)
        return call(logits, params, fields, seed, offset, inputs, wishes, out)
    request = Request(num_samples, logprobs, top_logprobs, on_invalid, backend)
    table = request.table(logits)
    if len(request.batch) > 1:
        fields, (seed, offset) = flat_fields(request.batch, fields), flat_words(request.batch, seed, offset)
        bitmask, bias, prompt_ids, output_ids, allowed_ids = flat_inputs(
            request.batch, bitmask, bias, prompt_ids, output_ids, allowed_ids
        )
    count = table.shape[0]
    packed = pack(params, fields, count, OTHERS)
    rows = Rows(packed.records, pack_seeds(seed, count), pack_offsets(offset, count))
    add_row_inputs(rows, table, bitmask, bias, prompt_ids, output_ids, allowed_ids)
    if packed.penalties and output_ids is None:
        warn_without_ids(packed.penalties, prompt_ids, output_ids, stacklevel=2)
    return request.run(table, rows.to(table.device), out)


OTHERS: tuple[str, ...] = (
    *("seed", "offset", "num_samples", "bitmask", "allowed_ids", "bias", "prompt_ids", "output_ids"),
    *("logprobs", "top_logprobs", "on_invalid", "backend", "out"),
)
"""What a misspelt name may have meant besides a parameter."""


def filter_logits(
    logits: torch.Tensor,
    params: SamplingParams | None = None,
    *,
    bitmask: torch.Tensor | None = None,
    allowed_ids: Allowed | None = None,
    bias: BiasLike | None = None,
    prompt_ids: TokenIds | None = None,
    output_ids: TokenIds | None = None,
    on_invalid: OnInvalid = "raise",
    backend: str = "auto",
    out: torch.Tensor | None = None,
    **fields: Any,
) -> torch.Tensor:
    """The processed logits divided by the temperature where a token is kept, -inf elsewhere.

    Arguments as for `sample`. A greedy row keeps only its maximum, undivided. Invalid rows (with on_invalid="flag")
    are all -inf.

    Returns:
        float32 [B, V] ([V] for 1-D logits), or `out`.
    """
    inputs = (bitmask, bias, prompt_ids, output_ids, allowed_ids)
    return _full("filtered", logits, params, inputs, on_invalid, backend, out, fields)


def probabilities(
    logits: torch.Tensor,
    params: SamplingParams | None = None,
    *,
    bitmask: torch.Tensor | None = None,
    allowed_ids: Allowed | None = None,
    bias: BiasLike | None = None,
    prompt_ids: TokenIds | None = None,
    output_ids: TokenIds | None = None,
    on_invalid: OnInvalid = "raise",
    backend: str = "auto",
    out: torch.Tensor | None = None,
    **fields: Any,
) -> torch.Tensor:
    """The distribution that `sample` draws from: kept tokens renormalised, 0 elsewhere.

    Arguments as for `sample`. Invalid rows (with on_invalid="flag") are all 0.

    Returns:
        float32 [B, V] ([V] for 1-D logits), or `out`.
    """
    inputs = (bitmask, bias, prompt_ids, output_ids, allowed_ids)
    return _full("probabilities", logits, params, inputs, on_invalid, backend, out, fields)


class Packed(NamedTuple):
    """Parameters as a call needs them; not to be written to."""

    records: torch.Tensor  # int32 [B or 1, fields]
    penalties: tuple[str, ...]  # those that are on


def pack_params(
    params: SamplingParams | None, fields: dict[str, Any], rows: int, others: tuple[str, ...] = ()
) -> torch.Tensor:
    """The records of `pack`."""
    return pack(params, fields, rows, others).records


def pack(params: SamplingParams | None, fields: dict[str, Any], rows: int, others: tuple[str, ...] = ()) -> Packed:
    """`params` with `fields` on top; `others` names what the call takes besides, which a misspelt field may mean."""
    check_names(fields, others)
    if params is None and _PLAIN.issuperset(types := tuple(map(type, fields.values()))):
        return _pack_plain(tuple(fields.items()), types)
    if params is None:
        params = SamplingParams(**fields)
    elif not isinstance(params, SamplingParams):
        raise TypeError(f"params: expected SamplingParams, got {type(params).__name__}")
    elif fields:
        params = params.replace(**fields)
    packed = _pack(params)
    if len(packed.records) not in (1, rows):
        names = ", ".join(params.per_row())
        wanted = "one value" if rows == 1 else f"one value for all rows or {rows} values (one per row of logits)"
        raise ValueError(f"{names}: expected {wanted}, got {len(packed.records)} values")
    return packed


_PLAIN = frozenset((float, int, str))


@lru_cache(maxsize=256)
def _pack_plain(fields: tuple[tuple[str, Any], ...], types: tuple[type, ...]) -> Packed:
    """Scalar fields are the same call after call. Their types are part of the key: 1 == 1.0 == True."""
    packed = _pack(SamplingParams(**dict(fields)))
    require_memory("params", packed.records)  # a mode of torch's that makes fake tensors must not leave one here
    return packed


def _pack(params: SamplingParams) -> Packed:
    """Kept with scalar params, which are the same step after step; a tensor's values may have changed."""
    kept: Packed | None = params.__dict__.get("_packed")
    if kept is not None:
        return kept
    packed = Packed(params.pack(), active_penalties(params))
    if len(packed.records) == 1 and not params.per_row() and has_memory(packed.records):
        object.__setattr__(params, "_packed", packed)
    return packed


def add_row_inputs(
    rows: Rows,
    table: torch.Tensor,
    bitmask: torch.Tensor | None,
    bias: BiasLike | None,
    prompt_ids: TokenIds | None,
    output_ids: TokenIds | None,
    allowed_ids: Allowed | None = None,
) -> None:
    """Check and attach what changes with every step."""
    if bitmask is not None:
        rows.bitmask = check_bitmask(bitmask, table)
    if allowed_ids is not None:
        rows.bitmask = restrict(rows.bitmask, allowed_ids, table)
    if bias is not None:
        rows.bias = pack_bias(bias, table)
    if prompt_ids is not None:
        rows.prompt_ids = pack_token_ids("prompt_ids", prompt_ids, table)
    if output_ids is not None:
        rows.output_ids = pack_token_ids("output_ids", output_ids, table)


def _full(
    kind: Literal["filtered", "probabilities"],
    logits: torch.Tensor,
    params: SamplingParams | None,
    inputs: tuple[Any, ...],
    on_invalid: OnInvalid,
    backend: str,
    out: torch.Tensor | None,
    fields: dict[str, Any],
) -> torch.Tensor:
    if is_traced():
        from fastsample import ops, untraced

        return untraced.served(ops.full, inputs, out)(kind, logits, params, inputs, on_invalid, backend, out, fields)
    return full(kind, logits, params, inputs, on_invalid, backend, out, fields, stacklevel=4)


def full(
    kind: Literal["filtered", "probabilities"],
    logits: torch.Tensor,
    params: SamplingParams | None,
    inputs: tuple[Any, ...],
    on_invalid: OnInvalid,
    backend: str,
    out: torch.Tensor | None,
    fields: dict[str, Any],
    stacklevel: int | None = None,
) -> torch.Tensor:
    """filter_logits and probabilities: one float32 per logit.

    `stacklevel` of a warning of penalties without ids, as for `warnings.warn`; None for no warning.
    """
    check_on_invalid(on_invalid)
    table = check_logits(logits)
    batch = logits.shape[:-1]
    if len(batch) > 1:
        fields, inputs = flat_fields(batch, fields), flat_inputs(batch, *inputs)
    count = table.shape[0]
    packed = pack(params, fields, count, OTHERS)
    unused = pack_offsets(0, 1) if count == 1 else torch.zeros(count, dtype=torch.int64, device=CPU)
    rows = Rows(packed.records, unused, unused)
    add_row_inputs(rows, table, *inputs)
    if packed.penalties and stacklevel is not None:
        warn_without_ids(packed.penalties, inputs[2], inputs[3], stacklevel)
    engine = select(backend, table)
    rows = rows.to(table.device)
    status = torch.empty(table.shape[0], dtype=torch.int32, device=table.device)
    result = torch.empty(logits.shape, dtype=torch.float32, device=table.device)
    if out is not None:
        check_buffer("out", out, result)
        for read in (table, logits):
            Written({"out": out}).require_apart_from(read, rows)
        if on_invalid == "raise":  # a first run that only looks, so that nothing is written on an error
            engine.run(table, rows, Outputs(status))
            raise_if_invalid(status, batch)
        result = out
    outputs = Outputs(status)
    setattr(outputs, kind, result if len(batch) < 2 else result.view(table.shape))
    invalid = engine.run(table, rows, outputs)
    if on_invalid == "raise" and invalid != 0:
        raise_if_invalid(status, batch)
    return result
