"""Ranks as threads of one process, which exchange messages as a process group would."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from fastsample.distributed.wire import Wire


class ThreadWire(Wire):
    """One of `size` ranks that share a barrier and a place for each one's message."""

    def __init__(self, rank: int, barrier: threading.Barrier, messages: list[Any]) -> None:
        self.rank, self.size, self.rounds, self.sent = rank, len(messages), 0, 0
        self._barrier, self._messages = barrier, messages

    def gather(self, words: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return words.unsqueeze(0)
        self.rounds += 1
        self.sent += words.nbytes
        self._messages[self.rank] = words.clone()
        self._barrier.wait(60)
        shapes = {message.shape for message in self._messages}
        found = torch.stack(self._messages) if len(shapes) == 1 else None
        self._barrier.wait(60)
        assert found is not None, f"messages of different shapes: {shapes}"
        return found


def on_ranks(cuts: Sequence[int], do: Callable[[ThreadWire, int, int], Any]) -> list[Any]:
    """What do(wire, begin, end) returns on each rank, whose tokens are begin to end - 1."""
    size = len(cuts) - 1
    barrier, messages = threading.Barrier(size), [None] * size

    def one(rank: int) -> Any:
        try:
            return do(ThreadWire(rank, barrier, messages), cuts[rank], cuts[rank + 1])
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        waiting = [pool.submit(one, rank) for rank in range(size)]
        errors = [error for future in waiting if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in waiting]
