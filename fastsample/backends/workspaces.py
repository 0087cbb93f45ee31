"""Whose memory a launch may use: one rule for every engine that launches kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from fastsample.inputs import Rows

Memory = TypeVar("Memory")


def capturing(device: torch.device) -> bool:
    """Whether the current stream's work is being recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Workspaces(Generic[Memory]):
    """An engine's workspaces: each call gets one that nothing else can be using while its launches run.

    The calls of a stream run one after another and share a workspace; a Sampler has its own. A graph may be replayed on
    any stream, so a capture takes a new workspace from the graph's memory. The exception is a Sampler that already has
    one on the capturing stream: it is captured with that one.
    """

    def __init__(self, engine: str, make: Callable[[torch.device], Memory]) -> None:
        self._engine, self._make = engine, make
        self._shared: dict[tuple[str, torch.device, int], Memory] = {}

    def of(self, device: torch.device, stream: int, rows: Rows) -> Memory:
        """The workspace of a call on the current stream, whose address `stream` is (0 on a CPU)."""
        key = (self._engine, device, stream)
        kept = self._shared if rows.workspace is None else rows.workspace
        found: Memory | None = kept.get(key)
        if capturing(device) and (found is None or kept is self._shared):
            return self._make(device)
        return kept.setdefault(key, self._make(device)) if found is None else found
