"""Messages between the ranks of a group: one packed message per round, and who is at fault where it fails."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist

from fastsample.distributed.keys import words_at
from fastsample.distributed.shared import GONE, OTHER_SIZE, STOPPED, TIMED_OUT, SharedMemory, open_shared

Tensor = torch.Tensor

all_gather: Any = getattr(dist, "all_gather_single", None)  # what torch 2.13 calls the one below
if all_gather is None and dist.is_available():
    all_gather = dist.all_gather_into_tensor

FAILURES = {
    TIMED_OUT: "no answer from rank {}",
    GONE: "lost the connection to rank {}",
    OTHER_SIZE: "rank {} has sent a message of another size",
    STOPPED: "stopped while it waited for rank {}",
}
memories: WeakKeyDictionary[Any, SharedMemory | None] = WeakKeyDictionary()
"""What the ranks of each group share, since its first message."""
_TAG = 0x66730  # of messages between two ranks, so that nobody else's are taken for ours


class Wire:
    """The ranks of a process group; without one, a single rank.

    Attributes:
        rounds: how often all ranks have exchanged messages so far.
        sent: bytes that this rank has sent in them to each other rank.

    Other backends than Gloo gather, and messages on the host are copied to a device for a group that has none for it.
    Gloo's ranks use memory that they share, if they are all on one machine. Otherwise each sends its message to every
    other one, which takes half as long as a collective, since that runs on a thread of its own.
    """

    _memory: SharedMemory | None = None
    """The group's, once it is open."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self._group = None if group is None else ref(group)  # calls that are remembered must not keep it alive
        backends = "cpu:gloo" if group is None else dist.get_backend_config(group)
        self._by_gloo, self._carries_host = "cpu:gloo" in backends, "cpu:" in backends
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rounds = self.sent = 0
        if self.rank < 0:
            raise ValueError("group: expected a process group of which this process is a rank")

    def gather(self, words: Tensor) -> Tensor:
        """What every rank gives, int64 [R, *shape], given int64 of the same shape on each.

        Raises:
            RuntimeError: a rank did not answer within the group's timeout; the message says which ranks are gone.
        """
        if self._group is None or self.size == 1:
            return words.unsqueeze(0)
        if (group := self._group()) is None:
            raise RuntimeError("group: expected a process group that has not been destroyed")
        if words.is_cpu and not self._carries_host:
            return self.gather(words.to(_device_of(group))).to(words.device)
        words = words.contiguous()
        found = words.new_empty((self.size, *words.shape))
        self.rounds += 1
        self.sent += words.nbytes
        if self._by_gloo and words.is_cpu:
            self._through_memory(group, words, found)
            return found
        try:
            all_gather(found.view(-1), words.view(-1), group=group)
        except RuntimeError as error:
            raise self._failure(group, "some rank", error) from error
        return found

    def _through_memory(self, group: dist.ProcessGroup, own: Tensor, found: Tensor) -> None:
        """Give every other rank `own`, and take theirs."""
        if self._memory is None and group not in memories:
            options = getattr(group._get_backend(own.device), "options", None)
            timeout = getattr(options, "_timeout", timedelta(minutes=30))  # torch's default
            memories[group] = open_shared(self.rank, self.size, timeout, lambda words: self._sent(group, words))
        if (memory := self._memory or memories[group]) is None:
            return self._exchange(group, own, found)
        self._memory = memory
        self._in_memory(memory, own.data_ptr(), own.nbytes, found.data_ptr())

    def _in_memory(self, memory: SharedMemory, own: int, size: int, found: int) -> None:
        what, rank = memory.exchange(own, size, found)
        if what:
            raise RuntimeError(f"rank {self.rank} of {self.size}: {FAILURES[what].format(rank)} in round {self.rounds}")

    def _sent(self, group: dist.ProcessGroup, words: Tensor) -> Tensor:
        found = words.new_empty((self.size, *words.shape))
        self._exchange(group, words, found)
        return found

    def _exchange(self, group: dist.ProcessGroup, own: Tensor, found: Tensor) -> None:
        """The same, as messages of Gloo's."""
        others = [(self.rank + i) % self.size for i in range(1, self.size)]
        places, given = found.unbind(0), [own]
        waiting: list[tuple[int, Any]] = []
        failed: dict[int, RuntimeError] = {}
        # A rank that is gone is found out at once, and the others must not wait for this one because of it.
        for start, tensors in ((group.recv, [[place] for place in places]), (group.send, [given] * self.size)):
            for other in others:
                try:
                    waiting.append((other, start(tensors[other], other, _TAG)))
                except RuntimeError as error:
                    failed[other] = error
        places[self.rank].copy_(own)
        for other, work in waiting:
            if failed:
                break
            try:
                work.wait()
            except RuntimeError as error:
                failed[other] = error
        for other, why in failed.items():
            raise self._failure(group, f"rank {other}", why) from why

    def _failure(self, group: dist.ProcessGroup, silent: str, error: RuntimeError) -> RuntimeError:
        lost = self._lost(group)
        what = f"lost the connection to rank {', '.join(map(str, lost))}" if lost else f"no answer from {silent}"
        return RuntimeError(f"rank {self.rank} of {self.size}: {what} in round {self.rounds}: {error}")

    def gather_at(self, own: int, words: int, found: int) -> None:
        """`gather` of so many words at an address, to another."""
        if (memory := self._memory) is None or self._group is None or self._group() is None:
            told = self.gather(words_at(own, words))
            words_at(found, words * self.size).copy_(told.view(-1))
            return
        self.rounds += 1
        self.sent += 8 * words
        self._in_memory(memory, own, 8 * words, found)

    def total(self, words: Tensor) -> Tensor:
        """The sum of what every rank gives, int64."""
        return self.gather(words).sum(0)

    def _lost(self, group: dist.ProcessGroup) -> list[int]:
        """Which ranks have closed their connections. Gloo refuses to send to them at once; nobody waits for others."""
        lost = []
        for other in range(self.size if dist.get_backend(group) == "gloo" else 0):
            if other != self.rank:
                try:
                    dist.isend(torch.zeros(1), dist.get_global_rank(group, other), group, tag=1)
                except RuntimeError as error:
                    if "Application timeout" not in str(error):  # then it is this rank that has closed it
                        lost.append(other)
        return lost


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """One whose tensors the group carries."""
    kind = dist.get_backend_config(group).split(":")[0]
    return torch.device(kind, getattr(torch, kind).current_device())
