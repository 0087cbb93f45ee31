"""The public calls: sample, filter_logits, probabilities and Sampler. Arguments are checked here, once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from fastsample.engines import Engine, LogprobsMode, Outputs, select
from fastsample.params import SamplingParams
from fastsample.rows import (
    MAX_VOCAB,
    BiasLike,
    Rows,
    Seed,
    TokenIds,
    pack_bias,
    pack_bitmask,
    pack_offsets,
    pack_seeds,
    pack_token_ids,
)

OnInvalid = Literal["raise", "flag"]

STATUS = {1: "a NaN logit", 2: "a +inf logit", 3: "no logit above -inf (everything is masked)"}
"""What a non-zero status means, after bitmask, bias and penalties."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(slots=True)
class SampleOutput:
    """What `sample` returns. B rows, n = num_samples, N = top_logprobs; [B, n] is [B] when num_samples is 1.

    Attributes:
        tokens: int64 [B] or [B, n]; -1 in invalid rows.
        status: int32 [B]; 0 valid, 1 NaN, 2 +inf, 3 nothing above -inf.
        logprobs: float32 like tokens; natural log-probability of each sampled token. NaN in invalid rows.
        ranks: int64 like tokens; 1 + number of tokens strictly above the sampled one. 0 in invalid rows.
        top_ids: int64 [B, N] in rank order; -1 past the last token that is kept ("processed") or above -inf ("raw").
        top_logprobs: float32 [B, N]; -inf where top_ids is -1.
    """

    tokens: torch.Tensor
    status: torch.Tensor
    logprobs: torch.Tensor | None = None
    ranks: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


def sample(
    logits: torch.Tensor,
    params: SamplingParams | None = None,
    *,
    seed: Seed | None = None,
    offset: Seed = 0,
    num_samples: int = 1,
    bitmask: torch.Tensor | None = None,
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
            Any row stride, last dimension contiguous, 1 <= V <= 2^20. Never written to.
        params: how to sample; `fields` are SamplingParams fields and override it.
        seed: an int, which gives row i the seed splitmix64(seed + i), or one 64-bit seed per row, used as it is. None
            takes a fresh seed from torch's default CPU generator (`torch.manual_seed` repeats it).
        offset: position in the sequence, 0 <= offset < 2^64; an int or one per row. Advance it by 1 per step.
        num_samples: independent draws per row, n >= 1.
        bitmask: int32 [B, words] or [words]; token j is allowed when bit j % 32 of word j // 32 is 1. Tokens past the
            last word are not allowed (xgrammar's and llguidance's format).
        bias: {id: value} for all rows, a list with a dict or None per row, or tensors (row_ptr [B + 1], ids [N],
            values [N]); added to the logits. Finite or -inf.
        prompt_ids, output_ids: int64 or int32 [B, L] padded with -1, or a list of lists; what the penalties count.
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
    request = Request(num_samples, logprobs, top_logprobs, on_invalid, backend)
    table = request.table(logits)
    rows = Rows(
        pack_params(params, fields, table.shape[0]),
        pack_seeds(seed, table.shape[0]),
        pack_offsets(offset, table.shape[0]),
    )
    add_row_inputs(rows, table, bitmask, bias, prompt_ids, output_ids)
    return request.run(table, rows.to(table.device), out)


def filter_logits(
    logits: torch.Tensor,
    params: SamplingParams | None = None,
    *,
    bitmask: torch.Tensor | None = None,
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
    inputs = (bitmask, bias, prompt_ids, output_ids)
    return _full("filtered", logits, params, inputs, on_invalid, backend, out, fields)


def probabilities(
    logits: torch.Tensor,
    params: SamplingParams | None = None,
    *,
    bitmask: torch.Tensor | None = None,
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
    inputs = (bitmask, bias, prompt_ids, output_ids)
    return _full("probabilities", logits, params, inputs, on_invalid, backend, out, fields)


FIELDS = tuple(SampleOutput.__slots__)


class Request:
    """What a sampling call wants besides its rows; checked when made.

    Once logits of some shape have been seen, a step of the same shape costs little Python: a Sampler keeps its request.
    """

    def __init__(
        self,
        num_samples: int,
        logprobs: LogprobsMode | None,
        top_logprobs: int,
        on_invalid: OnInvalid,
        backend: str,
        reused: bool = False,
    ) -> None:
        _check_count("num_samples", num_samples, 1, 2**31 - 1)
        _check_count("top_logprobs", top_logprobs, 0, MAX_VOCAB)
        if logprobs not in (None, "raw", "processed"):
            raise ValueError(f"logprobs = {logprobs!r}: expected None, 'raw' or 'processed'")
        if top_logprobs and logprobs is None:
            raise ValueError(f"top_logprobs = {top_logprobs}: needs logprobs='raw' or 'processed'")
        check_on_invalid(on_invalid)
        self.num_samples = num_samples
        self.logprobs: LogprobsMode | None = logprobs
        self.top_logprobs = top_logprobs
        self.raises = on_invalid == "raise"
        self.backend = backend
        self.reused = reused
        self._engine: Engine
        self._batch: tuple[int, ...] = ()  # [B], or [] for 1-D logits
        self._checked: tuple[Any, ...] | None = None
        self._template: SampleOutput | None = None
        self._last: tuple[SampleOutput, Outputs] | None = None

    def table(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits as [B, V], checked; all checks are of shape, strides, dtype and device, so once is enough."""
        known = self._checked is not None and isinstance(logits, torch.Tensor) and logits.layout is torch.strided
        if known and self._checked == (logits.shape, logits.stride(), logits.dtype, logits.device):
            return logits if logits.ndim == 2 else logits.unsqueeze(0)
        table = check_logits(logits)
        if self.top_logprobs > table.shape[1]:
            raise ValueError(f"top_logprobs = {self.top_logprobs}: expected at most V = {table.shape[1]}")
        self._engine = select(self.backend, table)
        self._batch = tuple(logits.shape[:-1])
        self._template = self._last = None
        self._checked = (logits.shape, logits.stride(), logits.dtype, logits.device)
        return table

    def run(self, table: torch.Tensor, rows: Rows, out: SampleOutput | None, advance: bool = False) -> SampleOutput:
        """Sample what `table` returned last, into `out` if given; then advance every row's offset by 1 if asked to."""
        wanted = None if out is None else self._checked_outputs(out, table.device)
        if wanted is None or self.raises:
            # A caller's buffers are filled only once every row is known to be valid.
            result = self._fresh(table.device)
            outputs = self._outputs(result)
        else:
            result, outputs = out, wanted  # type: ignore[assignment]
        invalid = self._engine.run(table, rows, outputs)
        if self.raises and invalid != 0:
            raise_if_invalid(result.status)
        if advance:
            self._engine.advance(rows)
        if out is None or out is result:
            return result
        for name in FIELDS:
            if (value := getattr(result, name)) is not None:
                getattr(out, name).copy_(value)
        return out

    def _buffers(self, device: torch.device) -> SampleOutput:
        """Buffers of the shapes and dtypes that the logits need."""
        batch = self._batch
        draws = batch if self.num_samples == 1 else (*batch, self.num_samples)
        buffers = SampleOutput(
            tokens=torch.empty(draws, dtype=torch.int64, device=device),
            status=torch.empty(batch, dtype=torch.int32, device=device),
        )
        if self.logprobs is not None:
            buffers.logprobs = torch.empty(draws, dtype=torch.float32, device=device)
            buffers.ranks = torch.empty(draws, dtype=torch.int64, device=device)
        if self.top_logprobs:
            top = (*batch, self.top_logprobs)
            buffers.top_ids = torch.empty(top, dtype=torch.int64, device=device)
            buffers.top_logprobs = torch.empty(top, dtype=torch.float32, device=device)
        return buffers

    def _fresh(self, device: torch.device) -> SampleOutput:
        """New buffers for each call; like the template's they are made in half the time, which pays from the second."""
        if self._template is None:
            self._template = self._buffers(device)
            return self._buffers(device) if self.reused else self._template
        like = self._template
        fresh = SampleOutput(torch.empty_like(like.tokens), torch.empty_like(like.status))
        for name in FIELDS[2:]:
            if (value := getattr(like, name)) is not None:
                setattr(fresh, name, torch.empty_like(value))
        return fresh

    def _outputs(self, result: SampleOutput) -> Outputs:
        return Outputs(
            result.status,
            result.tokens,
            None,
            None,
            self.logprobs,
            result.logprobs,
            result.ranks,
            result.top_ids,
            result.top_logprobs,
            self.num_samples,
            self.top_logprobs,
        )

    def _checked_outputs(self, out: SampleOutput, device: torch.device) -> Outputs:
        """The engine's view of a caller's buffers, which are checked unless they are the last call's."""
        if self._last is not None and self._last[0] is out and _same_buffers(out, self._last[1]):
            return self._last[1]
        if not isinstance(out, SampleOutput):
            raise TypeError(f"out: expected a SampleOutput, got {type(out).__name__}")
        if self._template is None:
            self._template = self._buffers(device)
        for name in FIELDS:
            if (like := getattr(self._template, name)) is not None:
                check_buffer(f"out.{name}", getattr(out, name), like)
        outputs = self._outputs(out)
        self._last = (out, outputs)
        return outputs


def _same_buffers(out: SampleOutput, outputs: Outputs) -> bool:
    """Whether a SampleOutput still holds the tensors that were checked; spelled out, for a step of a few us."""
    return (
        out.tokens is outputs.tokens
        and out.status is outputs.status
        and out.logprobs is outputs.logprobs
        and out.ranks is outputs.ranks
        and out.top_ids is outputs.top_ids
        and out.top_logprobs is outputs.top_logprobs
    )


def check_logits(logits: torch.Tensor) -> torch.Tensor:
    """The logits as [B, V], or an error that says what they should be."""
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits: expected a torch.Tensor, got {type(logits).__name__}")
    if logits.layout != torch.strided or logits.device.type == "meta":
        raise ValueError(f"logits: expected a dense tensor with values, got {logits.layout} on {logits.device}")
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits: expected float32, float16 or bfloat16, got {logits.dtype}")
    if logits.ndim not in (1, 2):
        raise ValueError(f"logits: expected shape [B, V] or [V], got {tuple(logits.shape)}")
    table = logits if logits.ndim == 2 else logits.unsqueeze(0)
    vocab = table.shape[1]
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"logits: expected 1 <= V <= 2^20, got V = {vocab}")
    if vocab > 1 and table.stride(1) != 1:
        raise ValueError(
            f"logits: expected a contiguous last dimension, got stride {table.stride(1)}; call .contiguous()"
        )
    return table


def pack_params(params: SamplingParams | None, fields: dict[str, Any], rows: int) -> torch.Tensor:
    """Packed records [B or 1, fields] of `params` with `fields` on top. Not to be written to."""
    if params is None and all(type(value) in _PLAIN for value in fields.values()):
        return _pack_plain(tuple((name, type(value), value) for name, value in fields.items()))
    if params is None:
        params = SamplingParams(**fields)
    elif not isinstance(params, SamplingParams):
        raise TypeError(f"params: expected SamplingParams, got {type(params).__name__}")
    elif fields:
        params = params.replace(**fields)
    records = params.pack()
    if records.shape[0] not in (1, rows):
        names = ", ".join(params.per_row())
        raise ValueError(f"{names}: expected one value or {rows} (one per row of logits), got {records.shape[0]}")
    return records


_PLAIN = (float, int, str)


@lru_cache(maxsize=256)
def _pack_plain(fields: tuple[tuple[str, type, Any], ...]) -> torch.Tensor:
    """Scalar fields are the same call after call. Their types are part of the key: 1 == 1.0 == True."""
    return SamplingParams(**{name: value for name, _, value in fields}).pack()


def add_row_inputs(
    rows: Rows,
    table: torch.Tensor,
    bitmask: torch.Tensor | None,
    bias: BiasLike | None,
    prompt_ids: TokenIds | None,
    output_ids: TokenIds | None,
) -> None:
    """Check and attach what changes with every step."""
    if bitmask is not None:
        rows.bitmask = pack_bitmask(bitmask, table)
    if bias is not None:
        rows.bias = pack_bias(bias, table)
    if prompt_ids is not None:
        rows.prompt_ids = pack_token_ids("prompt_ids", prompt_ids, table)
    if output_ids is not None:
        rows.output_ids = pack_token_ids("output_ids", output_ids, table)


def raise_if_invalid(status: torch.Tensor) -> None:
    """ValueError that names each invalid row (the first few) and what is wrong with it. Waits for the device."""
    bad = status.reshape(-1).nonzero()[:, 0].tolist()
    if bad:
        shown = ", ".join(f"row {row} has {STATUS[int(status.reshape(-1)[row])]}" for row in bad[:4])
        more = f" and {len(bad) - 4} more rows are invalid" if len(bad) > 4 else ""
        raise ValueError(f"logits: {shown}{more}; on_invalid='flag' returns token -1 and a status instead")


def check_on_invalid(on_invalid: str) -> None:
    if on_invalid not in ("raise", "flag"):
        raise ValueError(f"on_invalid = {on_invalid!r}: expected 'raise' or 'flag'")


def check_buffer(name: str, buffer: Any, like: torch.Tensor) -> None:
    """A buffer to write to must be exactly what a fresh one would be."""
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(buffer).__name__}")
    if buffer.shape != like.shape or buffer.dtype != like.dtype or buffer.device != like.device:
        got = f"{buffer.dtype} {list(buffer.shape)} on {buffer.device}"
        raise ValueError(f"{name}: expected {like.dtype} {list(like.shape)} on {like.device}, got {got}")
    if not buffer.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {buffer.stride()}")


def _check_count(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} = {value!r}: expected an integer")
    if not low <= value <= high:
        raise ValueError(f"{name} = {value}: expected {low} <= {name} <= {high}")


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
    """filter_logits and probabilities: one float32 per logit."""
    check_on_invalid(on_invalid)
    table = check_logits(logits)
    zeros = torch.zeros(table.shape[0], dtype=torch.int64)
    rows = Rows(pack_params(params, fields, table.shape[0]), zeros, zeros)
    add_row_inputs(rows, table, *inputs)
    engine = select(backend, table)
    rows = rows.to(table.device)
    status = torch.empty(table.shape[0], dtype=torch.int32, device=table.device)
    result = torch.empty(logits.shape, dtype=torch.float32, device=table.device)
    if out is not None:
        check_buffer("out", out, result)
        if on_invalid == "raise":  # a first run that only looks, so that nothing is written on an error
            engine.run(table, rows, Outputs(status))
            raise_if_invalid(status)
        result = out
    outputs = Outputs(status)
    setattr(outputs, kind, result)
    invalid = engine.run(table, rows, outputs)
    if on_invalid == "raise" and invalid != 0:
        raise_if_invalid(status)
    return result
