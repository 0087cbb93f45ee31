"""What the Triton engine's launches share: how rows are split, tables of logits, workspaces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from fastsample.params import SamplingParams, specs

Tensor = torch.Tensor


@cache
def kernels(stem: str) -> Any:
    """The module fastsample.kernels.<stem>; imports triton."""
    module, versions = (import_module(f"fastsample.kernels.{name}") for name in (stem, "versions"))
    if versions.OLD:
        folder = Path(str(module.__file__)).parent
        versions.mark(module, "".join(path.read_text() for path in sorted(folder.glob("*.py"))) + repr(specs()))
    return module


def history_words(ids: int) -> int:
    """int32 words of workspace for the history of a row with so many ids."""
    return int(kernels("history").words(ids))


@dataclass(frozen=True)
class Layout:
    """How rows are split: into chunks of `block` tokens, which `parts` programs per row share."""

    block: int
    vec: int  # neighbours that one thread loads at once
    chunks: int
    parts: int
    rounds: int

    @property
    def record(self) -> int:
        """int64 words of workspace per row."""
        return int(kernels("workspace").words(self.chunks))

    @property
    def last(self) -> int:
        """Number of phases of kernels/sample.py."""
        return int(kernels("workspace").first_phase("end", self.rounds))


@dataclass
class Table:
    """Rows that a kernel reads: the caller's logits or an edited copy."""

    x: Tensor  # [B, V]
    rounds: int
    counts: Tensor | None = None  # int32, same strides

    @property
    def stride(self) -> int:
        return self.x.stride(0)


@dataclass
class State:
    """The workspace of one pass over a table."""

    words: Tensor  # int64 [B, record]
    layout: Layout


SEMAPHORES, ARRIVALS = "semaphores", "arrivals"


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Memory:
    """Named buffers, which grow and are reused.

    A graph goes on using those that it was captured with, so they live on when they are outgrown. What a capture itself
    allocates is the graph's, and holds nothing before a replay: it is not kept, unless all of this memory is a graph's.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock = Lock()  # held for a whole call: its launches hand data to each other here
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._of_graph = is_capturing(device)
        self._captured = False
        self._outgrown: list[Tensor] = []

    def __call__(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """`numel` elements, as the last call left them."""
        capturing = is_capturing(self._device)
        self._captured |= capturing
        found = self._buffers.get(name)
        if found is None or found.numel() < numel:
            # Counters must start at 0, and are left so; everything else is written before it is read.
            new = torch.zeros if name in (SEMAPHORES, ARRIVALS) else torch.empty
            found = self._keep(name, new(numel, dtype=dtype, device=self._device), capturing)
        return found[:numel]

    def _keep(self, name: str, made: Tensor, capturing: bool) -> Tensor:
        if not capturing or self._of_graph:
            if self._captured and name in self._buffers:
                self._outgrown.append(self._buffers[name])
            self._buffers[name] = made
        return made

    def record(self, top_k: int) -> Tensor:
        """The packed record of a row for which all else is neutral, int32 [1, columns]."""
        name = f"record {top_k}"
        if name in self._buffers:
            return self._buffers[name]
        host = SamplingParams(top_k=top_k).pack()
        record = torch.zeros_like(host, device=self._device)
        for column, bits in enumerate(host[0].tolist()):
            if bits:  # filled on the device: a copy from pageable memory cannot be captured
                record[:, column].fill_(bits)
        return self._keep(name, record, is_capturing(self._device))
