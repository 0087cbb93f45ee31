"""The Triton engine: launches fastsample.kernels (kernels/) on GPUs of any vendor, and never waits for them."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

from fastsample.backends import Engine, Outputs, Question
from fastsample.backends.triton_call import ROUNDS, WORDS, Call, Verified
from fastsample.backends.triton_launch import (
    PROGRAMS_PER_SM,
    THREADS,
    arch_of,
    device_shape,
    interpreted,
    launch_options,
    on,
)
from fastsample.backends.triton_memory import Layout, Memory, Table, kernels
from fastsample.backends.triton_part import Asked
from fastsample.backends.triton_tuned import known_parts
from fastsample.backends.workspaces import Workspaces
from fastsample.inputs import Rows

Tensor = torch.Tensor

OLDEST = (3, 3)  # version of Triton that has cooperative launches, and tuples in kernels


class TritonEngine(Engine):
    name = "triton"
    verifies = True

    def __init__(self) -> None:
        # Overrides of the tuning, for tests; results do not depend on it.
        self.block: int | None = None
        self.parts: int | None = None
        self.one_launch = not interpreted()  # interpreted programs run one after another, so none may wait for another
        self._workspaces = Workspaces(self.name, Memory)

    def why_not(self, logits: Tensor | None) -> str | None:
        if not _is_installed():
            return "triton is not installed"
        if not interpreted():
            if not _has_device():
                return "there is no CUDA or HIP device"
            if logits is not None and logits.device.type != "cuda":
                return f"it serves tensors on a CUDA or HIP device, and the logits are on {logits.device}"
        return _why_not_kernels()

    def run(self, logits: Tensor, rows: Rows, out: Outputs) -> int | None:
        self._call(logits, rows, out, None)
        return None if logits.device.type == "cuda" else int((out.status != 0).sum())

    def verify(
        self, table: Tensor, rows: Rows, out: Outputs, ids: Tensor, accepted: Tensor, ends: Tensor
    ) -> int | None:
        self._call(table, rows, out, (ids, accepted, ends))
        return None if table.device.type == "cuda" else int((ends != 0).sum())

    @torch.no_grad()
    def _call(self, logits: Tensor, rows: Rows, out: Outputs, verified: Verified | None) -> None:
        with on(logits.device):
            call = Call(self, logits, rows, out, verified)
            with call.memory.lock:
                call.run()

    def answers(self) -> bool:
        return True

    @torch.no_grad()
    def answer(self, x: Tensor, question: Question) -> Tensor:
        queries = question.queries
        if not len(x):
            return queries.new_empty(0, question.words)
        with on(x.device):
            rows = Rows(queries, queries[:, 0], queries[:, 0])  # no draws are the call's: nobody looks at these seeds
            call, table = Call(self, x, rows, Outputs(queries), None), Table(x, ROUNDS[x.dtype])
            return Asked(call, table, self.layout(table), question).answer()

    def list_kept(self, bitmask: Tensor, row_ptr: Tensor, ids: Tensor) -> None:
        rows, words = bitmask.shape
        if rows:
            with on(ids.device):
                kernels("keep").list_ids[(rows,)](
                    bitmask, words, row_ptr, ids, ids.numel(), WORDS=WORDS, **launch_options(ids.device)
                )

    def layout(self, table: Table) -> Layout:
        """Programs per row as measured, or enough to fill the device; several are no more than can run at once.

        A GPU with fewer multiprocessors than the one that was measured may not hold as many.
        """
        (batch, vocab), device, itemsize = table.x.shape, table.x.device, table.x.element_size()
        vec = 16 // itemsize
        block = self.block or vec * THREADS
        chunks = -(-vocab // block)
        resident = PROGRAMS_PER_SM * device_shape(device)[0] // max(batch, 1)
        parts = self.parts or min(known_parts(arch_of(device), itemsize, batch, vocab) or resident, resident)
        limit = min(chunks, int(kernels("workspace").MAX_PARTS))
        return Layout(block, vec, chunks, max(1, min(parts, limit)), table.rounds)

    def memory(self, logits: Tensor, rows: Rows) -> Memory:
        """What this call's launches may use; on a GPU, its device is the current one."""
        stream = torch.cuda.current_stream().cuda_stream if logits.device.type == "cuda" else 0
        return self._workspaces.of(logits.device, stream, rows)


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _has_device() -> bool:
    return torch.cuda.is_available()


@cache
def _why_not_kernels() -> str | None:
    try:
        found = import_module("triton").__version__
        if tuple(map(int, found.split(".")[:2])) < OLDEST:
            return f"Triton {found} is too old: before {'.'.join(map(str, OLDEST))} it has no cooperative launches"
        kernels("sample")
    except ImportError as error:
        return f"the kernels cannot be imported: {error}"
    return None


ENGINE = TritonEngine()
