"""What a rank answers by the CPU engine's own code (csrc/cpu/part.h)."""

from __future__ import annotations

from struct import Struct

import torch

from fastsample.backends import DTYPES
from fastsample.backends.cpu import native
from fastsample.backends.native import LOGITS_FIELDS, PART_FIELDS
from fastsample.distributed.keys import Kept, bits_of
from fastsample.distributed.shard import BINS, SUM_WORDS, Drawn, Shard
from fastsample.threads import get_num_threads

Tensor = torch.Tensor

FIRST, WHOLE, SUMS, TOTALS, DRAWS, ABOVE, BINS_OF, WITHIN = range(8)
GIVEN = 9
_LOGITS, _ASK = (Struct(f"{len(fields)}q") for fields in (LOGITS_FIELDS, PART_FIELDS))


def ask(
    x: Tensor,
    start: int,
    queries: Tensor,
    question: int,
    wants: int,
    words: int,
    details: Tensor | None = None,
    bitmask: Tensor | None = None,
) -> Tensor:
    """The answers for each row of a part, int64 [B, words]; `queries` has PartQuery of each, int64 [B, fields]."""
    rows, vocab = x.shape
    answers = torch.empty(rows, words, dtype=torch.int64)
    logits = _LOGITS.pack(x.data_ptr(), x.stride()[0] if rows > 1 else 0, rows, vocab, DTYPES[x.dtype], 0)
    given = (0, 0) if details is None else (details.shape[1], details.data_ptr())
    into = answers.data_ptr(), words, 0 if bitmask is None else bitmask.data_ptr()
    asked = _ASK.pack(queries.data_ptr(), start, question, wants, *given, *into)
    native().answer(logits, asked, get_num_threads())
    return answers


def open_queries(judged_at: Tensor, drawn_at: Tensor) -> Tensor:
    """Of all tokens above -inf, where the maximum is not yet known; temperatures float32 [B, 1]."""
    return Shard(drawn_at, 0, torch.zeros_like(drawn_at), judged_at, drawn_at).queries()


def first_words(
    x: Tensor, start: int, count: int, queries: Tensor, with_mass: bool = False, shares: Tensor | None = None
) -> Tensor:
    """`fastsample.distributed.lists.list_first`; one more column with what this part of the row weighs, if it were all
    of it; and one with whether these tokens are probably less than a share of that, given bits of float32 [B, 1]."""
    judges = shares is not None
    return ask(x, start, queries, FIRST, with_mass + 2 * judges, count + with_mass + judges, shares)


def whole_sums(x: Tensor, start: int, words: Tensor, queries: Tensor, products: bool, spread: bool) -> Tensor:
    """`Shard.sums` of all above -inf, given what all ranks list of each row, int64 [B, 9]."""
    if not x.shape[1]:
        return words.new_zeros(len(x), SUM_WORDS)
    return ask(x, start, queries, WHOLE, products + 2 * spread, SUM_WORDS, words)


class NativeShard(Shard):
    """`Shard` on the CPU, of one token or more."""

    def sums(self, kept: Kept, products: bool = True, spread: bool = False) -> Tensor:
        return self._ask(SUMS, kept, None, products + 2 * spread, SUM_WORDS)

    def whole(self, products: bool, spread: bool) -> Tensor:
        wants = products + 2 * spread + 4
        return self._ask(SUMS, None, None, wants, SUM_WORDS + 2 * BINS)

    def totals(self, drawn: Drawn, first: bool, count: bool, bits: Tensor | None) -> Tensor:
        wants = first + 2 * (count or bits is not None)
        return self._ask(TOTALS, drawn.kept, drawn, wants, 5, bitmask=bits)

    def draws(self, drawn: Drawn, thresholds: Tensor, entropy: bool) -> Tensor:
        return self._ask(DRAWS, drawn.kept, drawn, int(entropy), 2 * thresholds.shape[1] + 1, thresholds)

    def above(self, x: Tensor) -> Tensor:
        return self._ask(ABOVE, None, None, 0, x.shape[1], bits_of(x))

    def bins(self, kept: Kept) -> Tensor:
        return self._ask(BINS_OF, kept, None, 0, 2 * BINS).view(len(self.x), BINS, 2)

    def within(self, kept: Kept, bins: Tensor, count: int) -> Tensor:
        return self._ask(WITHIN, kept, None, 0, count, bins)

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
        queries = self.queries(kept, drawn)
        details = None if details is None else details.contiguous()
        return ask(self.x, self.start, queries, question, wants, words, details, bitmask)
