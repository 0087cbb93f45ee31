"""The CPU engine: adapter to fastsample._cpu (csrc/cpu), pointers and strides in, nothing copied."""

from __future__ import annotations

from types import ModuleType

import torch

from fastsample.engines import Outputs
from fastsample.params import specs
from fastsample.rows import Rows
from fastsample.threads import get_num_threads

_native: ModuleType | None
try:
    from fastsample import _cpu as _native
except ImportError as error:
    _native, _why_not_native = None, f"fastsample._cpu cannot be imported: {error}"

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MODES = {None: 0, "raw": 1, "processed": 2}


def native() -> ModuleType:
    """fastsample._cpu, or RuntimeError with the reason why it is not there."""
    if _native is None:
        raise RuntimeError(_why_not_native)
    return _native


class CpuEngine:
    name = "cpu"

    def __init__(self) -> None:
        names = tuple(name for name, _ in specs())
        if _native is not None and _native.PARAM_FIELDS != names:
            raise ImportError(f"fastsample._cpu was built for parameters {_native.PARAM_FIELDS}, not {names}")

    def why_not(self, logits: torch.Tensor | None) -> str | None:
        if _native is None:
            return _why_not_native
        if logits is not None and logits.device.type != "cpu":
            return f"it serves CPU tensors, and the logits are on {logits.device}"
        return None

    def run(self, logits: torch.Tensor, rows: Rows, out: Outputs) -> int | None:
        batch, vocab = logits.shape
        mask, bias = rows.bitmask, rows.bias
        invalid: int = native().run(
            (logits.data_ptr(), logits.stride(0), batch, vocab, _DTYPES[logits.dtype]),
            _column(rows.records),
            _column(rows.seeds),
            _column(rows.offsets),
            None if mask is None else (*_column(mask), mask.shape[1]),
            None if bias is None else tuple(part.data_ptr() for part in bias),
            _token_ids(rows.prompt_ids),
            _token_ids(rows.output_ids),
            (
                out.status.data_ptr(),
                _pointer(out.tokens),
                _pointer(out.filtered),
                _pointer(out.probabilities),
                _pointer(out.logprobs),
                _pointer(out.ranks),
                _pointer(out.top_ids),
                _pointer(out.top_logprobs),
            ),
            1 if out.tokens is None else out.tokens.shape[1],
            _MODES[out.mode],
            0 if out.top_ids is None else out.top_ids.shape[1],
            get_num_threads(),
        )
        return invalid


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _column(tensor: torch.Tensor) -> tuple[int, int]:
    """Pointer and row stride; a stride of 0 shares the first row."""
    return tensor.data_ptr(), tensor.stride(0) if tensor.shape[0] > 1 else 0


def _token_ids(ids: torch.Tensor | None) -> tuple[int, int, int] | None:
    return None if ids is None else (ids.data_ptr(), ids.stride(0), ids.shape[1])


ENGINE = CpuEngine()
