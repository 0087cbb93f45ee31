"""A rank's answers by the CPU engine's own code (csrc/cpu/part.h)."""

from __future__ import annotations

from struct import Struct
from typing import Any

import torch

from fastsample.backends import DTYPES
from fastsample.backends.cpu import native
from fastsample.backends.native import LOGITS_FIELDS, PART_FIELDS
from fastsample.distributed.keys import HIGHEST, Kept
from fastsample.distributed.shard import LEVELS, Drawn, Shard
from fastsample.reference.mass import scale_of
from fastsample.threads import get_num_threads

Tensor = torch.Tensor

SUMS, TOTALS, DRAWS, ABOVE, HISTOGRAM = range(5)
_LOGITS, _ASK = (Struct(f"{len(fields)}q") for fields in (LOGITS_FIELDS, PART_FIELDS))


class NativeShard(Shard):
    """`Shard` on the CPU, of one token or more."""

    def sums(self, kept: Kept, products: bool = True, spread: bool = False) -> Tensor:
        return self._ask(SUMS, kept, None, products + 2 * spread, 9)

    def totals(self, drawn: Drawn, first: bool, count: bool, bits: Tensor | None) -> Tensor:
        wants = first + 2 * (count or bits is not None)
        return self._ask(TOTALS, drawn.kept, drawn, wants, 5, bitmask=bits)

    def draws(self, drawn: Drawn, thresholds: Tensor, entropy: bool) -> Tensor:
        return self._ask(DRAWS, drawn.kept, drawn, int(entropy), 2 * thresholds.shape[1] + 1, thresholds)

    def above(self, x: Tensor) -> Tensor:
        return self._ask(ABOVE, None, None, 0, x.shape[1], x.view(torch.int32).to(torch.int64))

    def histogram(self, kept: Kept, base: Tensor, level: int, mean: Tensor | None = None) -> Tensor:
        if mean is not None:
            return super().histogram(kept, base, level, mean)
        shift, bits = LEVELS[level]
        details = torch.cat([base, torch.full_like(base, shift)], 1)
        return self._ask(HISTOGRAM, kept, None, 0, 2 ** (bits + 1), details).view(len(base), -1, 2)

    def _ask(
        self,
        question: int,
        kept: Kept | None,
        drawn: Drawn | None,
        wants: int,
        words: int,
        details: Tensor | None = None,
        bitmask: Tensor | None = None,
    ) -> Tensor:
        """int64 [B, words]: the answers for each row."""
        rows, vocab = self.x.shape
        answers = torch.empty(rows, words, dtype=torch.int64)
        queries = self._queries(kept, drawn)
        details = None if details is None else details.contiguous()
        stride = self.x.stride()[0] if rows > 1 else 0
        logits = _LOGITS.pack(self.x.data_ptr(), stride, rows, vocab, DTYPES[self.x.dtype], 0)
        given = (0, 0) if details is None else (details.shape[1], details.data_ptr())
        into = answers.data_ptr(), words, 0 if bitmask is None else bitmask.data_ptr()
        native().answer(
            logits, _ASK.pack(queries.data_ptr(), self.start, question, wants, *given, *into), get_num_threads()
        )
        return answers

    def _queries(self, kept: Kept | None, drawn: Drawn | None) -> Tensor:
        """PartQuery of each row, int64 [B, fields]."""
        rows = len(self.x)
        floats: list[Any] = [self.peak, scale_of(self.drawn_at), scale_of(self.judged_at)]
        coin = torch.zeros(rows, 1) if drawn is None else drawn.coin
        bits = torch.cat([coin.expand(rows, 1), *floats], 1).view(torch.int32).to(torch.int64)
        place = torch.zeros(rows, 3, dtype=torch.int64) if kept is None else torch.cat(list(kept), 1)
        top = torch.full((rows, 1), HIGHEST) if drawn is None else drawn.top
        sums = torch.zeros(rows, 2, dtype=torch.int64)
        if drawn is not None:
            sums = torch.stack([drawn.total, drawn.rest], 1)
        return torch.cat([place, top, bits, sums], 1)
