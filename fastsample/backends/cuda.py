"""The CUDA engine: adapter to fastsample._cuda (csrc/cuda). Addresses, strides and a stream in; it never waits."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from threading import Lock
from typing import Any

import torch

from fastsample.backends import Engine, Outputs, Question, engine
from fastsample.backends.native import call_arguments, draft_arguments, mismatch, row_arguments
from fastsample.backends.workspaces import Workspaces, capturing
from fastsample.inputs import Rows

Tensor = torch.Tensor


@cache
def native() -> tuple[Any, str | None]:
    """fastsample._cuda, or the reason why it cannot serve any GPU here."""
    try:
        found = import_module("fastsample._cuda")
    except ModuleNotFoundError:
        return None, f"fastsample was built without it: {_why_left_out()}"
    except ImportError as error:
        return None, f"fastsample._cuda cannot be imported: {error}"
    if (reason := mismatch(found)) is not None:
        return None, f"fastsample._cuda {reason}"
    return found, found.why_not()


def _why_left_out() -> str:
    """What the build noted down, which a source tree has not been through."""
    try:
        from fastsample._built import CUDA_LEFT_OUT
    except ModuleNotFoundError:
        return "this is a source tree; pip install builds it"
    return str(CUDA_LEFT_OUT)


class Buffers:
    """Device memory that a launch uses and nothing else may use meanwhile; it grows and is kept.

    What it has grown out of is kept too, since a captured graph may hold its address. Each growth at least doubles it,
    so that is never more than what is in use.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = Lock()  # the launches of one call, of which the second reads what the first has left
        self.workspace = torch.empty(0, dtype=torch.uint8, device=device)
        self.boards = self.workspace
        self.arrivals = torch.empty(0, dtype=torch.int32, device=device)  # a counter for each request
        self._retired: list[Tensor] = []

    def with_room(self, workspace: int, boards: int, arrivals: int) -> Buffers:
        """Buffers of at least so many bytes, bytes and counters: these, perhaps grown.

        A capture gets its own where these would have to grow: it only records that they are filled with zeros, so a
        launch outside of the graph would find something else there.
        """
        asked = {"workspace": workspace, "boards": boards, "arrivals": arrivals}
        small = {name: size for name, size in asked.items() if size > getattr(self, name).numel()}
        if small and capturing(self.device):
            return Buffers(self.device)._grown(asked)
        return self._grown(small)

    def _grown(self, sizes: dict[str, int]) -> Buffers:
        """Boards and counters begin as zeros, and every launch leaves them so."""
        for name, size in sizes.items():
            old = getattr(self, name)
            self._retired.append(old)
            make = torch.empty if name == "workspace" else torch.zeros
            setattr(self, name, make(max(size, 2 * old.numel()), dtype=old.dtype, device=self.device))
        return self


class CudaEngine(Engine):
    """One launch from logits to token; a second one for whole rows of output and log-probabilities."""

    name = "cuda"
    verifies = True
    advances = True

    def __init__(self, module: Any = None) -> None:
        self._module = module  # tests/simt lends one that needs no GPU
        self._buffers = Workspaces(self.name, Buffers)

    def why_not(self, logits: Tensor | None) -> str | None:
        reason = native()[1]
        if reason is not None or logits is None:
            return reason
        if logits.device.type != "cuda":
            return f"it serves tensors on a CUDA device, and the logits are on {logits.device}"
        return _why_not_device(logits.device)

    def run(self, logits: Tensor, rows: Rows, out: Outputs) -> int | None:
        self._launch(logits, rows, out, None)
        return None if logits.device.type == "cuda" else int((out.status != 0).sum())

    def verify(
        self, table: Tensor, rows: Rows, out: Outputs, ids: Tensor, accepted: Tensor, ends: Tensor
    ) -> int | None:
        self._launch(table, rows, out, (ids, accepted, ends))
        return None if table.device.type == "cuda" else int((ends != 0).sum())

    def list_kept(self, bitmask: Tensor, row_ptr: Tensor, ids: Tensor) -> None:
        rows, words = bitmask.shape
        if rows:
            module, device = self._module or native()[0], ids.device
            addresses = bitmask.data_ptr(), rows, words, row_ptr.data_ptr(), ids.data_ptr(), ids.numel()
            module.list_kept(*addresses, device.index or 0, _stream(device))

    def answers(self) -> bool:
        """Parts of rows are Triton's: their kernels lack nothing that CUDA C++ would add."""
        return engine("triton").why_not(None) is None

    def answer(self, x: Tensor, question: Question) -> Tensor:
        return engine("triton").answer(x, question)

    def _launch(self, logits: Tensor, rows: Rows, out: Outputs, verified: tuple[Tensor, Tensor, Tensor] | None) -> None:
        if logits.shape[0] == 0:
            return
        module = self._module or native()[0]
        packed, call = row_arguments(rows), call_arguments(logits, out)
        stream = _stream(logits.device)
        buffers = self._buffers.of(logits.device, stream, rows)
        requests = 0 if verified is None else len(verified[0])
        with buffers.lock:
            buffers = buffers.with_room(0, 0, requests)
            drafts = None if verified is None else draft_arguments(*verified, buffers.arrivals.data_ptr())

            def launch(memory: Buffers) -> tuple[int, int] | None:
                lent = [(part.data_ptr(), part.numel()) for part in (memory.workspace, memory.boards)]
                needed: tuple[int, int] | None = module.run(
                    packed, call, logits.device.index or 0, stream, *lent, drafts, out.advance
                )
                return needed

            if (needed := launch(buffers)) is not None:  # nothing was launched
                launch(buffers.with_room(*needed, 0))


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@cache
def _why_not_device(device: torch.device) -> str | None:
    reason: str | None = native()[0].why_not_device(
        torch.cuda.current_device() if device.index is None else device.index
    )
    return reason


ENGINE = CudaEngine()
