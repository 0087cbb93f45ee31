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


class Memory:
    """Named buffers, which grow and are reused."""

    def __init__(self, device: torch.device) -> None:
        self.lock = Lock()  # held for a whole call: its launches hand data to each other here
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """`numel` elements, as the last call left them."""
        found = self._buffers.get(name)
        if found is None or found.numel() < numel:
            # Counters must start at 0, and are left so; everything else is written before it is read.
            new = torch.zeros if name in (SEMAPHORES, ARRIVALS) else torch.empty
            found = self._buffers[name] = new(numel, dtype=dtype, device=self._device)
        return found[:numel]

    def record(self, top_k: int) -> Tensor:
        """The packed record of a row for which all else is neutral, int32 [1, columns]."""
        name = f"record {top_k}"
        if name not in self._buffers:
            host = SamplingParams(top_k=top_k).pack()
            record = self._buffers[name] = torch.zeros_like(host, device=self._device)
            for column, bits in enumerate(host[0].tolist()):
                if bits:  # filled on the device: a copy from pageable memory cannot be captured
                    record[:, column].fill_(bits)
        return self._buffers[name]
