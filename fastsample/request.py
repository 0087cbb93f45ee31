"""Request: what a sampling call wants besides its rows, and the buffers that it fills."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from fastsample.backends import DTYPES, Engine, LogprobsMode, Outputs, select
from fastsample.params import SamplingParams, has_memory, require_dense, require_strided, whole
from fastsample.rows import MAX_VOCAB, Rows

OnInvalid = Literal["raise", "flag"]

STATUS = {1: "a NaN logit", 2: "a +inf logit", 3: "no logit above -inf (everything is masked)"}
"""What a non-zero status means, after bitmask, bias and penalties."""


@dataclass(slots=True, eq=False)
class SampleOutput:
    """What `sample` returns. B rows, n = num_samples, N = top_logprobs; [B, n] is [B] when num_samples is 1.

    B stands for all of the logits' dimensions but the last: none for [V], [B, T] for [B, T, V].

    Two are equal where every field is, by value: shape, dtype and numbers, a NaN like any other, wherever they lie.
    (To compare on a GPU waits for it.) None has a hash, since calls with `out` change it. Copies, pickles, and loads
    with `torch.load(weights_only=True)` once fastsample is imported.

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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SampleOutput):
            return NotImplemented
        return all(_same_values(getattr(self, name), getattr(other, name)) for name in FIELDS)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, name) for name in FIELDS)


def _same_values(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    try:
        require_dense("a", a)
        require_dense("b", b)
    except ValueError:  # nothing to compare
        return False
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    b = b.to(a.device)
    return bool(((a == b) | ((a != a) & (b != b))).all())


FIELDS = tuple(SampleOutput.__slots__)
WISHES = ("num_samples", "logprobs", "top_logprobs", "on_invalid", "backend")
torch.serialization.add_safe_globals([SampleOutput, SamplingParams])  # plain data, checked by its constructor


class Request:
    """What a sampling call wants besides its rows; checked when made.

    Once logits of some shape have been seen, a step of the same shape costs little Python: a Sampler, which has some
    number of `slots`, keeps its request.
    """

    def __init__(
        self,
        num_samples: int,
        logprobs: LogprobsMode | None,
        top_logprobs: int,
        on_invalid: OnInvalid,
        backend: str,
        slots: int | None = None,
    ) -> None:
        num_samples = _checked_count("num_samples", num_samples, 1, 2**31 - 1)
        top_logprobs = _checked_count("top_logprobs", top_logprobs, 0, MAX_VOCAB)
        if logprobs is not None and not is_one_of(logprobs, "raw", "processed"):
            raise ValueError(f"logprobs = {logprobs!r}: expected None, 'raw' or 'processed'")
        if top_logprobs and logprobs is None:
            raise ValueError(f"top_logprobs = {top_logprobs}: needs logprobs='raw' or 'processed'")
        check_on_invalid(on_invalid)
        self.num_samples = num_samples
        self.logprobs: LogprobsMode | None = logprobs
        self.top_logprobs = top_logprobs
        self.raises = on_invalid == "raise"
        self.backend = backend
        self.slots = slots
        self.wishes = (num_samples, logprobs, top_logprobs, on_invalid, backend)
        self.device: torch.device | None = None  # of the logits seen last
        self._engine: Engine
        self.batch: tuple[int, ...] = ()  # [B], [] for 1-D logits, [B, T] for 3-D ones
        self._copied: torch.Tensor | None = None  # the logits, where the table is no view of them
        self._checked: tuple[Any, ...] | None = None
        self._template: SampleOutput | None = None
        self._own: Outputs | None = None  # of fresh buffers; a Sampler's calls take turns
        self._last: tuple[SampleOutput, Outputs] | None = None
        self._written: Written  # and what is known of its memory
        self._bytes = 0  # from the first logit to the last
        self._made_for_inference = False

    def anew(self) -> Request:
        """The same wishes, and nothing yet of what logits have been seen."""
        return Request(*self.wishes, self.slots)

    def table(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits as [B, V], checked; all checks are of shape, strides, dtype and device, so once is enough."""
        known = self._checked is not None and isinstance(logits, torch.Tensor) and logits.layout is torch.strided
        known = known and not logits.is_nested and not logits.is_neg() and has_memory(logits)
        if known and self._checked == (logits.shape, logits.stride(), logits.dtype, logits.device):
            return logits if logits.ndim == 2 else logits.unsqueeze(0)
        table = check_logits(logits)
        if self.slots is not None and logits.ndim > 2:
            raise ValueError(f"logits: expected [{self.slots}, V], a row per slot, got shape {tuple(logits.shape)}")
        if self.slots is not None and table.shape[0] != self.slots:
            raise ValueError(f"logits: expected {self.slots} rows (batch_size), got {table.shape[0]}")
        if self.top_logprobs > table.shape[1]:
            raise ValueError(f"top_logprobs = {self.top_logprobs}: expected at most V = {table.shape[1]}")
        self._engine = select(self.backend, table)
        self.batch = tuple(logits.shape[:-1])
        self._copied = None if table.data_ptr() == logits.data_ptr() else logits
        self._template = self._last = None
        self.device = logits.device
        self._checked = (logits.shape, logits.stride(), logits.dtype, self.device)
        return table

    def run(self, table: torch.Tensor, rows: Rows, out: SampleOutput | None, advance: bool = False) -> SampleOutput:
        """Sample what `table` returned last, into `out` if given; then advance every row's offset by 1 if asked to."""
        outputs = None if out is None else self._checked_outputs(out, table, rows)
        # A caller's buffers keep what they hold where a row is invalid and that is an error.
        if out is None or outputs is None or (self.raises and not outputs.restore):
            result = self._fresh(table.device)
            outputs = self._own = self._outputs(result, self._own)
        else:
            result = out
        invalid = self._engine.run(table, rows, outputs)
        if self.raises and invalid != 0:
            if outputs.restore:
                result = self._fresh(table.device)
                self._engine.run(table, rows, self._outputs(result))
            raise_if_invalid(result.status, self.batch)
        if advance:
            self._engine.advance(rows)
        if out is None or out is result:
            return result
        with torch.inference_mode() if self._made_for_inference else nullcontext():
            for name in FIELDS:
                if (value := getattr(result, name)) is not None:
                    getattr(out, name).copy_(value)
        return out

    def _buffers(self, device: torch.device) -> SampleOutput:
        """Buffers of the shapes and dtypes that the logits need."""
        batch = self.batch
        draws = batch if self.num_samples == 1 else (*batch, self.num_samples)
        buffers = SampleOutput(_empty(draws, torch.int64, device), _empty(batch, torch.int32, device))
        if self.logprobs is not None:
            buffers.logprobs = _empty(draws, torch.float32, device)
            buffers.ranks = _empty(draws, torch.int64, device)
        if self.top_logprobs:
            top = (*batch, self.top_logprobs)
            buffers.top_ids = _empty(top, torch.int64, device)
            buffers.top_logprobs = _empty(top, torch.float32, device)
        return buffers

    def _fresh(self, device: torch.device) -> SampleOutput:
        """New buffers for each call; like the template's they are made in half the time, which pays from the second."""
        if self._template is None:
            self._template = self._buffers(device)
            return self._template if self.slots is None else self._buffers(device)
        like = self._template
        fresh = SampleOutput(torch.empty_like(like.tokens), torch.empty_like(like.status))
        if self.logprobs is not None:
            for name in FIELDS[2:]:
                if (value := getattr(like, name)) is not None:
                    setattr(fresh, name, torch.empty_like(value))
        return fresh

    def _outputs(self, result: SampleOutput, outputs: Outputs | None = None, restore: bool = False) -> Outputs:
        """The engine's view of buffers: `outputs`, if given, is an earlier one."""
        if outputs is None:
            outputs = Outputs(result.status, num_samples=self.num_samples, mode=self.logprobs, restore=restore)
            outputs.num_top = self.top_logprobs
        if len(self.batch) > 1:
            result = self._by_row(result)
        outputs.status, outputs.tokens = result.status, result.tokens
        if self.logprobs is not None:
            outputs.logprobs, outputs.ranks = result.logprobs, result.ranks
            outputs.top_ids, outputs.top_logprobs = result.top_ids, result.top_logprobs
        return outputs

    def _by_row(self, result: SampleOutput) -> SampleOutput:
        """Buffers [B, T, ...] as an engine fills them, [B * T, ...]; those that are not asked for may be anything."""
        wanted = FIELDS if self.top_logprobs else FIELDS[: 4 if self.logprobs is not None else 2]
        return SampleOutput(*(getattr(result, name).flatten(0, len(self.batch) - 1) for name in wanted))

    def _checked_outputs(self, out: SampleOutput, table: torch.Tensor, rows: Rows) -> Outputs:
        """The engine's view of a caller's buffers, which are checked unless they are the last call's."""
        if self._last is not None and self._last[0] is out and _same_buffers(out, self._last[1]):
            self._written.require_apart_from(table, rows, self._bytes)
            return self._last[1]
        if not isinstance(out, SampleOutput):
            raise TypeError(f"out: expected a SampleOutput, got {type(out).__name__}")
        if self._template is None:
            self._template = self._buffers(table.device)
        wanted = [name for name in FIELDS if getattr(self._template, name) is not None]
        for name in wanted:
            check_buffer(f"out.{name}", getattr(out, name), getattr(self._template, name))
        self._written = Written({f"out.{name}": getattr(out, name) for name in wanted})
        self._made_for_inference = any(getattr(out, name).is_inference() for name in wanted)
        start, end = _span(table)
        self._bytes = end - start
        self._written.require_apart_from(table, rows)
        if self._copied is not None:
            self._written.require_apart_from(self._copied, rows)
        outputs = self._outputs(out, restore=self.raises and self._engine.restores)
        self._last = (out, outputs)
        return outputs


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor; to read a tuple takes torch half as long again as to read its numbers."""
    return torch.empty(*shape or ((),), dtype=dtype, device=device)


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


def check_logits(logits: torch.Tensor, traced: bool = False) -> torch.Tensor:
    """The logits as [B, V], leading dimensions made one, or an error that says what they should be.

    `traced` ones have no values yet.
    """
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits: expected a torch.Tensor, got {type(logits).__name__}")
    (require_strided if traced else require_dense)("logits", logits)
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits: expected float32, float16 or bfloat16, got {logits.dtype}")
    if logits.ndim == 0:
        raise ValueError("logits: expected shape [B, V], [V] or [B, T, V], got ()")
    vocab = logits.shape[-1]
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"logits: expected 1 <= V <= 2^20, got V = {vocab}")
    if vocab > 1 and logits.stride(-1) != 1 and logits.numel():
        raise ValueError(
            f"logits: expected a contiguous last dimension, got stride {logits.stride(-1)}; call .contiguous()"
        )
    if logits.is_neg():
        logits = logits.resolve_neg()
    if logits.ndim == 2:
        return logits
    return logits.unsqueeze(0) if logits.ndim == 1 else logits.flatten(0, -2)


def raise_if_invalid(status: torch.Tensor, batch: tuple[int, ...] = ()) -> None:
    """ValueError that names each invalid row (the first few) and what is wrong with it. Waits for the device.

    `batch`: the leading dimensions, where there are several: then a row has its place among them named too.
    """
    if status.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("on_invalid='raise' waits for the device, which no CUDA graph can; use on_invalid='flag'")
    bad = status.reshape(-1).nonzero()[:, 0].tolist()
    if bad:
        places = [f" {tuple(map(int, np.unravel_index(row, batch)))}" if len(batch) > 1 else "" for row in bad[:4]]
        shown = ", ".join(
            f"row {row}{place} has {STATUS[int(status.reshape(-1)[row])]}"
            for row, place in zip(bad, places, strict=False)
        )
        more = f" and {len(bad) - 4} more rows are invalid" if len(bad) > 4 else ""
        raise ValueError(f"logits: {shown}{more}; on_invalid='flag' returns token -1 and a status instead")


def is_one_of(value: Any, *choices: str) -> bool:
    """Whether an argument is one of some strings. What is no string may not even compare."""
    return isinstance(value, str) and value in choices


def check_on_invalid(on_invalid: str) -> None:
    if not is_one_of(on_invalid, "raise", "flag"):
        raise ValueError(f"on_invalid = {on_invalid!r}: expected 'raise' or 'flag'")


def check_buffer(name: str, buffer: Any, like: torch.Tensor) -> None:
    """A buffer to write to must be exactly what a fresh one would be."""
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(buffer).__name__}")
    require_dense(name, buffer)
    if buffer.shape != like.shape or buffer.dtype != like.dtype or buffer.device != like.device:
        got = f"{buffer.dtype} {list(buffer.shape)} on {buffer.device}"
        raise ValueError(f"{name}: expected {like.dtype} {list(like.shape)} on {like.device}, got {got}")
    if not buffer.is_contiguous() or buffer.is_neg():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {buffer.stride()}")
    if buffer.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient: it is overwritten; call .detach()")


class Written:
    """Buffers that a call writes to: each in memory of its own."""

    def __init__(self, buffers: dict[str, torch.Tensor]) -> None:
        self._spans = {name: _span(buffer) for name, buffer in buffers.items() if buffer.numel()}
        self._low = min((start for start, _ in self._spans.values()), default=0)
        self._high = max((end for _, end in self._spans.values()), default=0)
        in_order = sorted(self._spans.items(), key=lambda item: item[1])
        for (name, (_, end)), (other, (start, _)) in pairwise(in_order):
            if start < end:
                raise ValueError(f"{other}: shares memory with {name}; pass another tensor")

    def require_apart_from(self, table: torch.Tensor, rows: Rows, size: int | None = None) -> None:
        """ValueError where what is read lies there too, or might, where rows are far apart.

        `size`: the table's bytes, where a step knows that nothing but the table and the inputs can have moved.
        """
        if (start := table.data_ptr()) < self._high:
            self._require_apart("the logits", start, start + size if size is not None else _span(table)[1])
        if size is None:
            self._look_at("seed", rows.seeds)
            self._look_at("offset", rows.offsets)
        if rows.bitmask is not None:
            self._look_at("bitmask", rows.bitmask)
        for part in rows.bias[:3] if rows.bias is not None else ():
            self._look_at("bias", part)
        if rows.prompt_ids is not None:
            self._look_at("prompt_ids", rows.prompt_ids)
        if rows.output_ids is not None:
            self._look_at("output_ids", rows.output_ids)

    def _look_at(self, other: str, tensor: torch.Tensor) -> None:
        if tensor.data_ptr() < self._high:
            self._require_apart(other, *_span(tensor))

    def _require_apart(self, other: str, start: int, end: int) -> None:
        if end <= self._low or self._high <= start:
            return
        for name, (first, last) in self._spans.items():
            if start < last and first < end:
                raise ValueError(f"{name}: shares memory with {other}; pass another tensor")


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Address of a tensor's first byte and of the one past its last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    if not tensor.numel():
        return start, start
    last = 0
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        last += (size - 1) * stride
    return start, start + (last + 1) * tensor.element_size()


def _checked_count(name: str, value: Any, low: int, high: int) -> int:
    count = whole(name, value)
    if not low <= count <= high:
        raise ValueError(f"{name} = {count}: expected {low} <= {name} <= {high}")
    return count
