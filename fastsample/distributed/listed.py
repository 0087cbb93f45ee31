"""Rows that lists decide, and what ranks tell besides, by the CPU engine's own code (csrc/cpu/listed.h)."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import count
from typing import Any

import torch

from fastsample.backends import Engine, Outputs
from fastsample.backends.native import LISTED_MISSING_FIELDS, LISTED_QUERY_FIELDS, PART_QUERY_FIELDS
from fastsample.distributed.keys import NO_KEY, value_of, words_of
from fastsample.distributed.lists import Lists
from fastsample.distributed.native import BINS_OF, DRAWS, TOTALS, WITHIN, ask
from fastsample.distributed.plan import is_of_tokens
from fastsample.distributed.raw import listed_logits
from fastsample.distributed.shard import BINS, SUM_WORDS
from fastsample.distributed.wire import Wire
from fastsample.inputs import Rows

Tensor = torch.Tensor

UNDECIDED = -1
"""In place of a row's status: ranks must tell more to decide it."""

_LISTS: Any = "lists"  # of `INPUTS`
_KNOWS_SUMS = 1
# What ranks may be asked, in this order, and what is known of a row once they have answered.
_KNOWS = {BINS_OF: 2, WITHIN: 4, TOTALS: 8, DRAWS: 16}
_NO_TOKEN = int(words_of(torch.tensor(-torch.inf), torch.tensor(-1)))
_NOTHING = {BINS_OF: 0, WITHIN: _NO_TOKEN, TOTALS: 0, DRAWS: NO_KEY}  # what a rank without tokens answers
_NO_ANSWERS = (None,) * len(_KNOWS)
_QUERY = len(LISTED_MISSING_FIELDS)
_THRESHOLDS = _QUERY + len(PART_QUERY_FIELDS)


class ListedRows:
    """What all ranks know of rows.

    Args:
        x: [B, V_r], this rank's part of them, of the tokens from `start` on.
        asks: whether more than lists and sums is asked for. Then outputs are status and fewer than 8 tokens.
    """

    def __init__(self, wire: Wire, engine: Engine, x: Tensor, start: int, vocab: int, lists: Lists, asks: bool) -> None:
        self._wire, self._engine, self._lists = wire, engine, lists
        self._x, self._start, self._vocab, self._asks = x, start, vocab, asks
        self._out: Outputs | None = None
        self._told: dict[int, Tensor] = {}  # of each question, int64 [B, R, n]
        self._known = [0] * len(x)
        self._missing = torch.empty(0, 0, dtype=torch.int64)  # what csrc/cpu/lists.h notes of each row
        self._some: tuple[list[int], Tensor] = [], x  # rows that were asked about, and this rank's part of them

    def learn(self, question: int, found: Tensor, rows: list[int] | None = None) -> None:
        """Keep what ranks have answered of rows, int64 [R, b, n]."""
        told = found.transpose(0, 1)
        if rows is not None and len(rows) < len(self._known):
            old = self._told.get(question)
            width = max(told.shape[2], 0 if old is None else old.shape[2])
            whole = told.new_full((len(self._known), told.shape[1], width), _NOTHING[question])
            if old is not None:
                whole[:, :, : old.shape[2]] = old
            whole[rows, :, : told.shape[2]] = told
            told = whole
        self._told[question] = told.contiguous()
        for row in range(len(self._known)) if rows is None else rows:
            self._known[row] |= _KNOWS[question]

    def run(self, rows: Rows, out: Outputs) -> int | None:
        """Stages 7 and 8, as far as that tells; other rows are UNDECIDED."""
        if self._out is None:
            self._out = self._own_outputs(out)
        return self._engine.run(self._table(out.num_samples).view(torch.float32), rows, self._out)

    def _own_outputs(self, out: Outputs) -> Outputs:
        """Without raw log-probabilities, which lists do not tell."""
        if is_of_tokens(out):
            return Outputs(out.status, out.tokens, num_samples=out.num_samples, input=_LISTS, names=())
        own = replace(out, input=_LISTS, names=None, restore=False)
        if out.mode == "raw":
            own.mode = own.logprobs = own.ranks = own.top_ids = own.top_logprobs = None
        return own

    def ask(self, draws: int) -> bool:
        """Have ranks tell what is missing; whether that is all that undecided rows need for now."""
        asked = self._missing[:, 0].tolist() if self._asks else []
        question = next((question for question in _KNOWS if question in asked), 0)
        if not question or min(asked) < 0:
            return False
        rows = [row for row, own in enumerate(asked) if own == question]
        self.learn(question, self._wire.gather(self._answers(question, rows, draws)), rows)
        return True

    def own(self, tokens: Tensor) -> Tensor | None:
        """The logits of tokens int64 [B, n] that have been drawn, float32; None where all of them are listed."""
        if (told := self._told.get(DRAWS)) is None:
            return None
        listed, drawn = listed_logits(*self._lists.unpacked, tokens), value_of(told.amax(1))
        known = torch.tensor(self._known)[:, None] & _KNOWS[DRAWS]
        return torch.where(known > 0, drawn, listed)

    def _table(self, draws: int) -> Tensor:
        """Rows of input "lists"."""
        words, sums, ranks = self._lists.words, self._lists.sums, self._wire.size
        told = [self._told[question] if question in self._told else None for question in _KNOWS] if self._told else []
        shared, more = (self._vocab, ranks, self._wire.rank), _KNOWS_SUMS * (sums is not None)
        sizes = words.shape[1] // ranks, *(0 if found is None else found.shape[2] for found in told or _NO_ANSWERS)
        if self._asks:
            each = _THRESHOLDS + draws + 2 * ranks
            self._missing = words.new_empty(len(words), each)
            notes = count(self._missing.data_ptr(), 8 * each)
            heads = torch.tensor([(*shared, known | more, *sizes, note) for known, note in zip(self._known, notes)])
        else:
            heads = _head(*shared, more, *sizes, 0).expand(len(words), -1)
        parts = [heads, _no_sums(len(words)) if sums is None else sums, words]
        return torch.cat([*parts, *(found.flatten(1) for found in told if found is not None)], 1)

    def _answers(self, question: int, rows: list[int], draws: int) -> Tensor:
        """This rank's, int64 [b, n]."""
        missing, all_ = self._missing, len(rows) == len(self._known)
        if not all_:
            missing = missing[rows]
        if question == WITHIN:
            words = int(missing[:, 5].max())
        else:
            words = {BINS_OF: 2 * BINS, TOTALS: 1, DRAWS: draws}[question]
        if not self._x.shape[1]:
            return missing.new_full((len(rows), words), _NOTHING[question])
        if not all_ and self._some[0] != rows:
            self._some = rows, self._x[rows]
        details = {WITHIN: missing[:, 1:5], DRAWS: missing[:, _THRESHOLDS : _THRESHOLDS + draws]}.get(question)
        details = None if details is None else details.contiguous()
        queries = missing[:, _QUERY:_THRESHOLDS].contiguous()
        answered = {TOTALS: 5, DRAWS: 2 * draws + 1}.get(question, words)
        x = self._x if all_ else self._some[1]
        return ask(x, self._start, queries, question, 0, answered, details)[:, :words]


@lru_cache(maxsize=64)
def _head(*words: int) -> Tensor:
    return torch.tensor([words])


@lru_cache(maxsize=8)
def _no_sums(rows: int) -> Tensor:
    return torch.zeros(rows, SUM_WORDS, dtype=torch.int64)


assert LISTED_QUERY_FIELDS[3:9] == ("known", "tokens", "bins", "told", "shares", "keys")
