"""The kept sets of a stack's batch, in the forms in which stacks return them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastsample.backends import Engine


@dataclass
class Kept:
    """What each of B rows has kept, as the engine that has drawn from it says."""

    engine: Engine
    count: torch.Tensor  # int32 [B]
    bitmask: torch.Tensor  # int32 [B, ceil(V / 32)]

    @staticmethod
    def empty(engine: Engine, rows: int, vocab: int, device: torch.device) -> Kept:
        """To be filled."""
        count = torch.empty(rows, dtype=torch.int32, device=device)
        return Kept(engine, count, torch.empty(rows, -(-vocab // 32), dtype=torch.int32, device=device))

    def of(self, rows: torch.Tensor) -> Kept:
        """The sets of these rows, int64 or bool."""
        return Kept(self.engine, self.count[rows], self.bitmask[rows])

    def be_single(self, where: torch.Tensor, tokens: torch.Tensor) -> None:
        """Let rows, bool [B], keep nothing but their tokens, int64 [B]."""
        self.count.masked_fill_(where, 1)
        self.bitmask.masked_fill_(where[:, None], 0)
        word = tokens[:, None] // 32
        bit = torch.ones_like(word).bitwise_left_shift(tokens[:, None] % 32).to(torch.int32)
        self.bitmask.scatter_(1, word, torch.where(where[:, None], bit, self.bitmask.gather(1, word)))

    def lists(self, capacity: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Ascending ids of all rows, int32, and where each row's begin and end, int64 [B + 1].

        With a capacity, a row that keeps more lists none, and there are B * capacity places, -1 past the last id: their
        number is known without waiting for a device.
        """
        row_ptr = torch.empty(len(self.count) + 1, dtype=torch.int64, device=self.count.device)
        total = self.engine.end_kept(self.count, capacity, row_ptr)
        if capacity:
            total = len(self.count) * capacity
        ids = torch.empty(int(row_ptr[-1]) if total is None else total, dtype=torch.int32, device=self.count.device)
        self.engine.list_kept(self.bitmask, row_ptr, ids)
        return ids, row_ptr

    def table(self, width: int) -> torch.Tensor:
        """int32 [B, width], each row's ids and then any number; a row that keeps more than `width` has none."""
        ids, row_ptr = self.lists(width)
        at = row_ptr[:-1, None] + torch.arange(width, device=ids.device)
        return ids[at.clamp_(max=len(ids) - 1)]
