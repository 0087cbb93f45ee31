"""The rules "chain" and "block" for rows that are split over ranks.

Where all that is kept is listed, every rank compares two laws alone. Else each does so on its own columns: of a law,
ranks then need to know what all tokens weigh, and what the draft does; what is left of one law once another is taken
off is added up as any masses are, and drawn from where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastsample.backends import DTYPES, INPUTS
from fastsample.checks import CPU
from fastsample.distributed.agreement import digest
from fastsample.distributed.keys import HIGHEST, IDS, NO_KEY, Kept, key, narrow_below, value_of
from fastsample.distributed.outputs import Found
from fastsample.distributed.row import SplitRow
from fastsample.distributed.shard import Shard
from fastsample.distributed.spread import drawn_of, here, may_be_lone
from fastsample.inputs import Rows
from fastsample.reference.draw import PLAIN_DRAW, RESIDUAL, XTC_COIN, uniform60
from fastsample.rejection import AT_ONCE, Law, Rejection

if TYPE_CHECKING:
    from fastsample.distributed.engine import SplitEngine

Tensor = torch.Tensor


@dataclass(kw_only=True)
class ListedShard(Shard):
    """What ranks have listed of rows, as if one had it all."""

    listed: Tensor  # int64 [B, N], ascending but for those that are none, which are -1
    _of_rows = (*Shard._of_rows, "listed")

    def ids(self) -> Tensor:
        return self.listed

    def keys_of(self, ids: Tensor) -> Tensor:
        at = self.listed[:, None, :] == ids[:, :, None]
        x = self.x.gather(1, at.to(torch.int32).argmax(-1))
        return torch.where(at.any(-1) & (ids >= 0), key(x, ids), NO_KEY)


def listed(row: SplitRow) -> ListedShard:
    shard = row.shard
    return ListedShard(row.listed, 0, shard.peak, shard.judged_at, shard.drawn_at, shard.kind, listed=row.ids)


class LawPart:
    """A rank's part of the laws that draws 0 of N rows are from.

    Args:
        of_list: whether this is of what all ranks have listed, and so the whole of it.

    Attributes:
        shares: int64 [R, N], what each rank's part weighs; known after `heard`, as the masses are.
    """

    shares: Tensor

    def __init__(self, found: Found, rows: Rows, of_list: bool) -> None:
        every = torch.arange(len(rows.seeds), device=rows.seeds.device)
        self._status, self._shard = found.status, listed(found.row) if of_list else found.row.shard
        self._drawn = drawn_of(found, every)
        toss = uniform60(rows.seeds, rows.offsets, torch.zeros_like(every), XTC_COIN)[:, None]
        self._leaves = (toss < (self._drawn.coin * 2.0**60).to(torch.int64)) & (self._drawn.top < HIGHEST)
        self._kept = narrow_below(self._drawn.kept, torch.where(self._leaves, self._drawn.top + 1, HIGHEST))
        self._lone = torch.zeros_like(self._leaves)  # where nothing has a mass, so that the first token is all there is

    @property
    def width(self) -> int:
        return self._shard.x.shape[1]

    def ids(self, rows: Tensor) -> Tensor:
        """The tokens of this rank in some rows, int64 [n or 1, V_r]."""
        return self._shard.of(rows).ids()

    def told(self, ids: Tensor) -> Tensor:
        """What this rank tells the others, int64 [N, 5]; ids int64 [N], whose masses are to be known, may be any."""
        shard, keys = self._shard, self._shard.keys_of(ids[:, None])
        x = value_of(keys)
        own = shard.mass_of(x, shard.drawn_at) * self._kept.holds(keys, shard.mass_of(x, shard.judged_at))
        first = may_be_lone(shard, self._drawn)
        return torch.cat([shard.totals(self._drawn, first, False, None)[:, :4], own], 1)

    def heard(self, told: Tensor, ids: Tensor) -> Law:
        """The laws, and what the ids weigh in them, given what each rank has told, int64 [R, N, 5]."""
        whole, rest, first, first_of_rest, own = told.unbind(2)
        leaves = self._leaves[:, 0] & (whole.sum(0) > 0)
        shares, first = torch.where(leaves, rest, whole), torch.where(leaves, first_of_rest, first)
        at = first.amax(0)
        lone = shares.sum(0) == 0
        alone = self._shard.alone(value_of(at[:, None]))[:, 0]
        valid = self._status == 0
        self.shares = torch.where(lone, alone * (first == at), shares) * valid
        self._lone, only = lone[:, None], Kept(at[:, None] + 1, at[:, None], torch.zeros_like(at[:, None]))
        self._kept = Kept(*(torch.where(self._lone, *bounds) for bounds in zip(only, self._kept, strict=True)))
        own = torch.where(lone, alone * (ids == IDS - (at & IDS)), own.sum(0)) * valid
        return Law(ids, self._status, torch.stack([own, self.shares.sum(0)], 1))

    def masses(self, rows: Tensor) -> Tensor:
        """The masses of this rank's tokens in some rows, int64 [n, V_r]."""
        shard = self._shard.of(rows)
        x, lone = shard.logits(), self._lone[rows]
        w = shard.mass_of(x, shard.drawn_at)
        w = torch.where(lone, shard.alone(x), w) if bool(lone.any()) else w
        return w * shard.held(self._kept.of(rows))


class SplitRejection(Rejection):
    """Requests under verification, whose rows are split over ranks. Every rank comes to the same."""

    engine: SplitEngine

    def laws(self, given: Tensor, drafted: Tensor) -> tuple[Law, Law]:
        engine, proposal = self.engine, self.proposal
        if not engine.agreed:
            engine.agree(self.rows, self.call.fresh(), self._compared())
        if not len(given):
            return _nothing(given), _nothing(drafted)
        found, self.rows = engine.decide(self.rows)
        decided = [(found, self.rows)]
        if len(drafted):
            decided.append(engine.decide(self.proposed, engine.drafts, proposal.kind))
        self._alone = not any(bool(found.spread().any()) for found, _ in decided)
        parts = [LawPart(found, rows, self._alone) for found, rows in decided]
        self._target, self._drafts, self.width = parts[0], parts[-1], parts[0].width
        told = [part.told(ids) for part, ids in zip(parts, (given, drafted), strict=False)]
        heard = self._gather(torch.cat(told)).tensor_split((len(given),), 1)
        laws = [part.heard(*own) for part, *own in zip(parts, heard, (given, drafted), strict=False)]
        return laws[0], laws[1] if len(drafted) else _nothing(drafted)

    def _compared(self) -> tuple[int, ...]:
        """What ranks must have in common beside the target's rows."""
        proposal = self.proposal
        kind = 1 + len(DTYPES) * INPUTS[proposal.kind] + DTYPES[proposal.table.dtype]
        return 1 + (self.rule == "block"), digest(self.ids), kind, digest(self.proposed.records)

    def _gather(self, words: Tensor) -> Tensor:
        """What every rank gives, int64 [R, ...]; R is 1 where each knows all."""
        return words[None] if self._alone else self.engine.wire.gather(words)

    def masses(self, own: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        p, q = self._target.masses(own), self._drafts.masses(theirs)
        return p, of_others(q, self._drafts.ids(theirs), self._target.ids(own)) if self._alone else q

    def sums_left(self, follows: Tensor, r: Tensor) -> Callable[[int, Tensor], Tensor]:
        """As of whole rows, but in one message for all."""
        some, before = follows.nonzero().unbind(1)
        sums = torch.zeros_like(self.ids)
        sums[some, before] = self._shares_left(some, before + 1, r[some, before + 1]).sum(0)
        return lambda i, wanted: sums[:, i - 1]

    def _shares_left(self, some: Tensor, at: Tensor, r: Tensor) -> Tensor:
        """What is left of rows `at` of some requests on each rank, int64 [R, n]."""
        own = torch.zeros_like(some)
        for part in self._in_parts(torch.ones_like(some, dtype=torch.bool)):
            own[part] = self.left(some[part], at[part], r[part])[0].sum(1)
        return self._gather(own) if len(some) else own[None]

    def last(self, accepted: Tensor, r: Tensor) -> Tensor:
        if not len(accepted):
            return accepted
        row = self.index.gather(1, accepted[:, None])[:, 0]
        rejected = (accepted < self.count) & (self.status.gather(1, accepted[:, None])[:, 0] == 0)
        some = rejected.nonzero()[:, 0]
        shares = self._target.shares[:, row]
        shares_left = torch.zeros_like(shares)
        shares_left[:, some] = self._shares_left(some, accepted[some], r[some])
        by_rest = shares_left.sum(0) > 0
        at, zero = (self.rows.seeds[row], self.rows.offsets[row]), torch.zeros_like(accepted)
        u = torch.where(rejected, uniform60(*at, accepted, RESIDUAL), uniform60(*at, zero, PLAIN_DRAW))
        rank = 0 if self._alone else self.engine.wire.rank
        threshold = here(rank, u[:, None], torch.where(by_rest, shares_left, shares)[:, :, None])
        mine = threshold[:, 0] >= 0
        tokens = torch.full_like(accepted, -1)
        for part in self._in_parts(mine & by_rest):
            left = self.left(part, accepted[part], r[part])[0]
            tokens[part] = self._token_at(left, threshold[part], row[part])
        for part in self._in_parts(mine & ~by_rest):
            tokens[part] = self._token_at(self._target.masses(row[part]), threshold[part], row[part])
        return self._gather(tokens).amax(0)

    def _token_at(self, w: Tensor, threshold: Tensor, rows: Tensor) -> Tensor:
        """Where the running masses [n, V_r] of rows pass thresholds [n, 1], int64 [n]."""
        place = torch.searchsorted(w.cumsum(-1), threshold, right=True)
        return self._target.ids(rows).expand_as(w).gather(1, place)[:, 0]

    def _in_parts(self, wanted: Tensor) -> Iterable[Tensor]:
        some = wanted.nonzero()[:, 0]
        size = max(1, AT_ONCE[some.device == CPU] // max(1, self.width))
        return (some[i : i + size] for i in range(0, len(some), size))


def of_others(w: Tensor, ids: Tensor, others: Tensor) -> Tensor:
    """What tokens `others` int64 [n, N] weigh, given masses of tokens `ids`, both int64 [n, M]; 0 where they are not
    among these."""
    in_order, order = ids.sort()
    at = torch.searchsorted(in_order, others).clamp(max=ids.shape[1] - 1)
    return torch.where(in_order.gather(1, at) == others, w.gather(1, order.gather(1, at)), 0)


def _nothing(ids: Tensor) -> Law:
    """The laws of no rows."""
    return Law(ids, ids.to(torch.int32), ids.new_empty(0, 2))
