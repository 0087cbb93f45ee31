"""The CPU engine: adapter to fastsample._cpu (csrc/cpu), pointers and strides in, nothing copied."""

from __future__ import annotations

from importlib import import_module
from struct import Struct
from typing import Any

import torch

from fastsample.backends import DTYPES, Engine, Outputs, Question
from fastsample.backends.native import (
    LOGITS_FIELDS,
    PART_FIELDS,
    call_arguments,
    draft_arguments,
    mismatch,
    report_arguments,
    row_arguments,
)
from fastsample.inputs import Rows
from fastsample.reports import Layout
from fastsample.threads import get_num_threads

_LOGITS, _ASK = (Struct(f"{len(fields)}q") for fields in (LOGITS_FIELDS, PART_FIELDS))


def _load() -> tuple[Any, str | None]:
    """fastsample._cpu, or the reason why it cannot serve."""
    try:
        native = import_module("fastsample._cpu")
    except ImportError as error:
        return None, f"fastsample._cpu cannot be imported: {error}"
    if (reason := mismatch(native)) is not None:
        return None, f"fastsample._cpu {reason}"
    return native, None


_native, _reason = _load()


def _why_no_isa() -> str | None:
    """What is wrong with FASTSAMPLE_ISA."""
    try:
        _native.isa()
    except ValueError as error:
        return str(error)
    return None


def native() -> Any:
    """The module fastsample._cpu; RuntimeError with the reason where it cannot serve."""
    if _reason is not None:
        raise RuntimeError(_reason)
    return _native


class CpuEngine(Engine):
    """Native code on CPU tensors."""

    name = "cpu"
    restores = True
    verifies = True
    takes_parts = True

    def why_not(self, logits: torch.Tensor | None) -> str | None:
        if _reason is not None:
            return _reason
        if logits is None:
            return _why_no_isa()  # with logits, the call itself raises that: `auto` must not go on to a slower engine
        if logits.device.type != "cpu":
            return f"it serves CPU tensors, and the logits are on {logits.device}"
        return None

    def run(self, logits: torch.Tensor, rows: Rows, out: Outputs) -> int | None:
        packed = rows.native or row_arguments(rows)
        invalid: int = _native.run(packed, call_arguments(logits, out), get_num_threads(), out.restore)
        return invalid

    reports = True

    def report(self, logits: torch.Tensor, rows: Rows, out: Outputs, layout: Layout) -> tuple[int, bytearray]:
        if layout.native is None:
            layout.native = report_arguments(layout.size, layout.starts)
        packed, call = rows.native or row_arguments(rows), call_arguments(logits, out)
        found: tuple[int, bytearray] = _native.report(packed, call, layout.native, get_num_threads(), out.restore)
        return found

    def verify(
        self,
        table: torch.Tensor,
        rows: Rows,
        out: Outputs,
        ids: torch.Tensor,
        accepted: torch.Tensor,
        ends: torch.Tensor,
    ) -> int | None:
        packed, drafts = rows.native or row_arguments(rows), draft_arguments(ids, accepted, ends)
        invalid: int = _native.verify(packed, call_arguments(table, out), drafts, get_num_threads())
        return invalid

    def end_kept(self, counts: torch.Tensor, capacity: int, row_ptr: torch.Tensor) -> int | None:
        total: int = _native.end_kept(counts.data_ptr(), counts.numel(), capacity, row_ptr.data_ptr())
        return total

    def list_kept(self, bitmask: torch.Tensor, row_ptr: torch.Tensor, ids: torch.Tensor) -> None:
        lists = row_ptr.data_ptr(), ids.data_ptr(), ids.numel()
        _native.list_kept(bitmask.data_ptr(), *bitmask.shape, *lists, get_num_threads())

    def answers(self) -> bool:
        return True

    def answer(self, x: torch.Tensor, question: Question) -> torch.Tensor:
        start, queries, number, wants, words, details, bitmask = question
        rows, vocab = x.shape
        answers = torch.empty(rows, words, dtype=torch.int64)
        logits = _LOGITS.pack(x.data_ptr(), x.stride()[0] if rows > 1 else 0, rows, vocab, DTYPES[x.dtype], 0)
        given = (0, 0) if details is None else (details.shape[1], details.data_ptr())
        into = answers.data_ptr(), words, 0 if bitmask is None else bitmask.data_ptr()
        asked = _ASK.pack(queries.data_ptr(), start, number, wants, *given, *into)
        _native.answer(logits, asked, get_num_threads())
        return answers

    def advance(self, rows: Rows) -> None:
        _native.advance(rows.native)  # torch takes longer for this than for a small row


ENGINE = CpuEngine()
