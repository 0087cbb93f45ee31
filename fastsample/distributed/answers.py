"""What a rank answers about its part of rows by an engine's own code (csrc/cpu/part.h, kernels/part.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct

import torch
from torch.nn.functional import pad

from fastsample.backends import Engine, Question
from fastsample.backends.native import PART_FIELDS, PART_QUERY_FIELDS
from fastsample.distributed.keys import Kept, bits_of, no_words, words_at
from fastsample.distributed.shard import BINS, SUM_WORDS, Drawn, Shard

Tensor = torch.Tensor

FIRST, WHOLE, SUMS, TOTALS, DRAWS, ABOVE, BINS_OF, WITHIN = range(8)
GIVEN = 9
_ASK = Struct(f"{len(PART_FIELDS)}q")


def open_queries(judged_at: Tensor, drawn_at: Tensor) -> Tensor:
    """Of all tokens above -inf, where the maximum is not yet known; temperatures float32 [B, 1]."""
    return Shard(drawn_at, 0, torch.zeros_like(drawn_at), judged_at, drawn_at).queries()


@dataclass
class Answers:
    """A rank's part of rows, of which an engine answers. Answers come to the device that questions come from.

    Attributes:
        engine: has `answer`.
        x: [B, V_r], of the tokens from `start` on.
    """

    engine: Engine
    x: Tensor
    start: int

    def ask(
        self,
        queries: Tensor,
        question: int,
        wants: int,
        words: int,
        details: Tensor | None = None,
        bitmask: Tensor | None = None,
    ) -> Tensor:
        """The answers for each row, int64 [B, words]; as `Engine.answer`."""
        there, here = self.x.device, queries.device
        if there == here:
            asked = Question(self.start, queries, question, wants, words, details, bitmask)
            return self.engine.answer(self.x, asked)
        queries, details = queries.to(there), None if details is None else details.to(there)
        bits = None if bitmask is None else torch.empty_like(bitmask, device=there)
        asked = Question(self.start, queries, question, wants, words, details, bits)
        found = self.engine.answer(self.x, asked).to(here)
        if bitmask is not None and bits is not None:
            bitmask.copy_(bits)
        return found

    def first_words(self, count: int, queries: Tensor, with_mass: bool = False, shares: Tensor | None = None) -> Tensor:
        """`fastsample.distributed.lists.list_first`; one more column with what this part of the row weighs, if it were
        all of it; and one with whether these tokens are probably less than a share of that, given bits of float32
        [B, 1]."""
        judges = shares is not None
        return self.ask(queries, FIRST, with_mass + 2 * judges, count + with_mass + judges, shares)

    def first_and_listed(self, words: Tensor, count: int, queries: Tensor) -> Tensor:
        """The first tokens, as words int64 [B, count]; and the logits of those of other words, int64 [B, n], as float32
        [B, n] or one more, two to a word."""
        more = -(-words.shape[1] // 2)
        if not self.x.shape[1]:
            return pad(no_words(len(self.x), count, words.device), (0, more))
        return self.ask(queries, GIVEN, count, count + more, words)

    def whole_sums(self, words: Tensor, queries: Tensor, products: bool, spread: bool) -> Tensor:
        """`Shard.sums` of all above -inf, given what all ranks list of each row, int64 [B, 9]."""
        if not self.x.shape[1]:
            return words.new_zeros(len(self.x), SUM_WORDS)
        return self.ask(queries, WHOLE, products + 2 * spread, SUM_WORDS, words)

    def above(self, x: Tensor, queries: Tensor) -> Tensor:
        """`Shard.above`."""
        return self.ask(queries, ABOVE, 0, x.shape[1], bits_of(x.contiguous()))


def answer_at(parts: Sequence[Answers], x: int, record: bytes, rows: int, count: int) -> None:
    """What some rows, int64 [count], of one of these parts answer, for code that knows addresses: of the part's logits,
    of the rows, and in PartArguments."""
    queries, _, question, wants, given, details, answers, words, _ = _ASK.unpack(record)
    part = next(part for part in parts if part.x.data_ptr() == x)
    if count < len(part.x):
        some = words_at(rows, count)
        part = Answers(part.engine, part.x[some.to(part.x.device)], part.start)
    about = words_at(queries, count * len(PART_QUERY_FIELDS)).view(count, -1)
    more = words_at(details, count * given).view(count, -1) if given else None
    words_at(answers, count * words).copy_(part.ask(about, question, wants, words, more).flatten())


@dataclass(kw_only=True)
class EngineShard(Shard):
    """`Shard` of one token or more, whose engine answers. All but `x` may be on another device than that.

    Attributes:
        engine: has `answer`.
    """

    engine: Engine

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

    def keys_of(self, ids: Tensor) -> Tensor:
        return self._beside().keys_of(ids.to(self.x.device)).to(ids.device)

    def first(self, kept: Kept, count: int) -> Tensor:
        return self._beside().first(self._there(kept), count).to(self.peak.device)

    def ends(self, kept: Kept) -> Tensor:
        return self._beside().ends(self._there(kept)).to(self.peak.device)

    def histogram(self, kept: Kept, base: Tensor, level: int, mean: Tensor | None = None) -> Tensor:
        there = self.x.device
        mean = None if mean is None else mean.to(there)
        return self._beside().histogram(self._there(kept), base.to(there), level, mean).to(base.device)

    def _beside(self) -> Shard:
        """The same by PyTorch, all of it on the device of `x`."""
        peak, judged_at, drawn_at = (t.to(self.x.device) for t in (self.peak, self.judged_at, self.drawn_at))
        return Shard(self.x, self.start, peak, judged_at, drawn_at, self.kind)

    def _there(self, kept: Kept) -> Kept:
        return Kept(*(t.to(self.x.device) for t in kept))

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
        return Answers(self.engine, self.x, self.start).ask(queries, question, wants, words, details, bitmask)
