"""Messages between the ranks of a group: one packed all-gather per round, and who is at fault where it fails."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
import torch.distributed as dist

Tensor = torch.Tensor

all_gather: Any = getattr(dist, "all_gather_single", None)  # what torch 2.13 calls the one below
if all_gather is None and dist.is_available():
    all_gather = dist.all_gather_into_tensor


class Wire:
    """The ranks of a process group; without one, a single rank.

    Attributes:
        rounds: collectives so far.
        sent: bytes that this rank has sent in them to each other rank.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self._group = None if group is None else ref(group)  # calls that are remembered must not keep it alive
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
        words = words.contiguous()
        found = words.new_empty((self.size, *words.shape))
        self.rounds += 1
        self.sent += words.nbytes
        try:
            all_gather(found.view(-1), words.view(-1), group=group)
        except RuntimeError as error:
            lost = self._lost(group)
            what = f"lost the connection to rank {', '.join(map(str, lost))}" if lost else "no answer from some rank"
            raise RuntimeError(f"rank {self.rank} of {self.size}: {what} in round {self.rounds}: {error}") from error
        return found

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
