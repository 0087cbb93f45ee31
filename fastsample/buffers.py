"""Buffers for an engine to fill: fresh ones for each call, or a caller's, which are checked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

from fastsample.backends import Outputs
from fastsample.checks import require_dense
from fastsample.inputs import Rows
from fastsample.outputs import FIELD, LISTED, Field, Options, SampleOutput

OF_ALL = tuple(field.name for field in LISTED)
"""Outputs that all rows share, made after a run."""


class Fresh:
    """New buffers of these names for each call of one shape, and the engine's view of the last ones."""

    def __init__(
        self, names: tuple[str, ...], options: Options, batch: Sequence[int], vocab: int, device: torch.device
    ) -> None:
        self._names, self._filled = names, filled_by_run(names)
        self._given = options, batch, vocab, device
        self._template: SampleOutput | None = None
        self._view: Outputs | None = None

    def make(self, lasts: bool) -> SampleOutput:
        """An output with new buffers. To make them like a template, where a call lasts, takes half the time."""
        if self._template is None:
            if lasts:
                self._template = self._allocated()
            return self._allocated()
        made, template = SampleOutput.__new__(SampleOutput), self._template
        for name in self._names:
            setattr(made, name, torch.empty_like(getattr(template, name)))
        return made

    def _allocated(self) -> SampleOutput:
        options, batch, vocab, device = self._given
        made = SampleOutput.__new__(SampleOutput)
        for name in self._names:
            field = FIELD[name]
            setattr(made, name, empty(field.shape(batch, options, vocab), field.dtype, device))
        return made

    def view(self, made: SampleOutput) -> Outputs:
        """The engine's view of buffers that were just made; the one before is no longer valid."""
        options, batch, *_ = self._given
        self._view = view(made, self._filled, options, len(batch), self._view)
        return self._view

    def let_go(self) -> None:
        """Forget the buffers that were made last."""
        if self._view is not None:
            self._view = None if self._template is None else self.view(self._template)


def view(
    out: SampleOutput, filled: tuple[str, ...], options: Options, dims: int, last: Outputs | None = None
) -> Outputs:
    """An engine's view of tokens, status and these, of rows in so many dimensions; `last` is filled in, if given."""
    if last is None:
        last = Outputs(out.status, num_samples=options.num_samples, mode=options.logprobs, names=filled)
        last.num_top, last.input = options.top_logprobs, options.input
    if dims > 1:  # an engine fills [B * T, ...]
        for name in ("tokens", "status", *filled):
            setattr(last, name, getattr(out, name).flatten(0, dims - 1))
        return last
    last.status, last.tokens = out.status, out.tokens
    for name in filled:
        setattr(last, name, getattr(out, name))
    return last


@lru_cache
def filled_by_run(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of these buffers that a run fills, but for tokens and status, which each does."""
    return tuple(name for name in names if name not in ("tokens", "status", *OF_ALL))


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor. Torch reads numbers faster than a tuple of them."""
    return torch.empty(*shape or ((),), dtype=dtype, device=device)


def check_buffer(name: str, buffer: Any, field: Field, shape: tuple[int, ...], device: torch.device) -> None:
    """A buffer to write to must be exactly what a fresh one would be."""
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(buffer).__name__}")
    require_dense(name, buffer)
    if buffer.shape != shape or buffer.dtype != field.dtype or buffer.device != device:
        got = f"{buffer.dtype} {list(buffer.shape)} on {buffer.device}"
        raise ValueError(f"{name}: expected {field.dtype} {list(shape)} on {device}, got {got}")
    if not buffer.is_contiguous() or buffer.is_neg():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {buffer.stride()}")
    if buffer.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient: it is overwritten; call .detach()")


class Written:
    """Buffers that a call writes to, none of which may share memory."""

    def __init__(self, buffers: dict[str, torch.Tensor]) -> None:
        self._spans = {name: span(buffer) for name, buffer in buffers.items() if buffer.numel()}
        self._low = min((start for start, _ in self._spans.values()), default=0)
        self._high = max((end for _, end in self._spans.values()), default=0)
        in_order = sorted(self._spans.items(), key=lambda item: item[1])
        for (name, (_, end)), (other, (start, _)) in pairwise(in_order):
            if start < end:
                raise ValueError(f"{other}: shares memory with {name}; pass another tensor")

    def require_apart_from(self, table: torch.Tensor, rows: Rows, size: int | None = None) -> None:
        """ValueError if something that is read lies in that memory, or may lie there between rows that are far apart.

        `size`: the table's bytes, given by a step that knows that only the table and the inputs can have moved.
        """
        if (start := table.data_ptr()) < self._high:
            self.require_apart("the logits", start, start + size if size is not None else span(table)[1])
        if size is None:
            self._look_at("seed", rows.seeds)
            self._look_at("offset", rows.offsets)
        if size is None or rows.slots is not None:  # without inputs, a step has the rows of its slots
            rows.visit_inputs(self._look_at)

    def _look_at(self, other: str, tensor: torch.Tensor) -> None:
        if tensor.data_ptr() < self._high:
            self.require_apart(other, *span(tensor))

    def require_apart(self, other: str, start: int, end: int) -> None:
        if end <= self._low or self._high <= start:
            return
        for name, (first, last) in self._spans.items():
            if start < last and first < end:
                raise ValueError(f"{name}: shares memory with {other}; pass another tensor")


def span(tensor: torch.Tensor) -> tuple[int, int]:
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
