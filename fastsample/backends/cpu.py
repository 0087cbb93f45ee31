"""The CPU engine: adapter to fastsample._cpu (csrc/cpu), pointers and strides in, nothing copied."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from fastsample.backends import DTYPES, MODES, Engine, Outputs, beyond_tokens, column, token_ids
from fastsample.inputs import Rows
from fastsample.params import specs
from fastsample.threads import get_num_threads


def _load() -> tuple[Any, str | None]:
    """fastsample._cpu, or the reason why it cannot serve."""
    try:
        native = import_module("fastsample._cpu")
    except ImportError as error:
        return None, f"fastsample._cpu cannot be imported: {error}"
    names = tuple(name for name, _ in specs())
    if names != native.PARAM_FIELDS:
        return None, f"fastsample._cpu was built for other parameters: {native.PARAM_FIELDS}, not {names}"
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

    def why_not(self, logits: torch.Tensor | None) -> str | None:
        if _reason is not None:
            return _reason
        if logits is None:
            return _why_no_isa()  # with logits, the call itself raises that: `auto` must not go on to a slower engine
        if logits.device.type != "cpu":
            return f"it serves CPU tensors, and the logits are on {logits.device}"
        return None

    def run(self, logits: torch.Tensor, rows: Rows, out: Outputs) -> int | None:
        batch, vocab = logits.shape
        if rows.native is None:
            rows.native = _native_rows(rows)
        common = (
            rows.native,
            logits.data_ptr(),
            logits.stride(0),
            batch,
            vocab,
            DTYPES[logits.dtype],
            out.status.data_ptr(),
            0 if out.tokens is None else out.tokens.data_ptr(),
            out.num_samples,
            out.restore,
            get_num_threads(),
        )
        if out.mode is None and out.filtered is None and out.probabilities is None:
            invalid: int = _native.run_tokens(*common)
            return invalid
        invalid = _native.run(*common, *beyond_tokens(out), out.num_top, MODES[out.mode])
        return invalid

    def advance(self, rows: Rows) -> None:
        _native.advance(rows.native)  # torch takes longer for this than for a small row


def _native_rows(rows: Rows) -> Any:
    mask, bias = rows.bitmask, rows.bias
    if rows.slots is None:
        count = rows.offsets.shape[0]
        found = _native.Rows(column(rows.records), column(rows.seeds), column(rows.offsets), count)
    else:
        found = rows.slots.native = rows.slots.native or _native_rows(rows.slots)
    if mask is None and bias is None and rows.prompt_ids is None and rows.output_ids is None:
        return found
    return found.with_inputs(
        None if mask is None else (*column(mask), mask.shape[1]),
        None if bias is None else (bias.row_ptr.data_ptr(), bias.ids.data_ptr(), bias.values.data_ptr()),
        None if rows.prompt_ids is None else token_ids(rows.prompt_ids),
        None if rows.output_ids is None else token_ids(rows.output_ids),
    )


ENGINE = CpuEngine()
