"""The rules "chain" and "block" for rows that are split over ranks: each compares two laws on its own columns.

Of a law, ranks need to know what all tokens weigh, and what the draft does. What is left of one law once another is
taken off is added up as any masses are, and drawn from where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from fastsample.backends import DTYPES, INPUTS
from fastsample.checks import CPU
from fastsample.distributed.agreement import digest
from fastsample.distributed.keys import HIGHEST, IDS, NO_KEY, Kept, narrow_above, narrow_below, value_of
from fastsample.distributed.outputs import Found
from fastsample.distributed.spread import drawn_of, here
from fastsample.inputs import Rows
from fastsample.reference.draw import PLAIN_DRAW, RESIDUAL, XTC_COIN, uniform60
from fastsample.rejection import AT_ONCE, Law, Rejection

if TYPE_CHECKING:
    from fastsample.distributed.engine import SplitEngine

Tensor = torch.Tensor


class LawPart:
    """This rank's part of the laws that draws 0 of N rows are from.

    Attributes:
        shares: int64 [R, N], what each rank's part weighs; known after `heard`, as the masses are.
    """

    shares: Tensor

    def __init__(self, found: Found, rows: Rows) -> None:
        every = torch.arange(len(rows.seeds), device=rows.seeds.device)
        self._status, self._shard = found.status, found.row.shard
        self._drawn = drawn_of(found, every)
        invalid = (found.status != 0)[:, None]
        self._drawn.kept = narrow_above(self._drawn.kept, torch.where(invalid, HIGHEST, self._drawn.kept.low))
        toss = uniform60(rows.seeds, rows.offsets, torch.zeros_like(every), XTC_COIN)[:, None]
        self._leaves = (toss < (self._drawn.coin * 2.0**60).to(torch.int64)) & (self._drawn.top < HIGHEST)
        self._kept = narrow_below(self._drawn.kept, torch.where(self._leaves, self._drawn.top + 1, HIGHEST))
        self._lone = torch.zeros_like(self._leaves)  # where nothing has a mass, so that the first token is all there is

    @property
    def width(self) -> int:
        return self._shard.x.shape[1]

    def told(self, ids: Tensor) -> Tensor:
        """What this rank tells the others, int64 [N, 5]; ids int64 [N], whose masses are to be known, may be any."""
        shard, keys = self._shard, self._shard.keys_of(ids[:, None])
        x = value_of(keys)
        own = shard.mass_of(x, shard.drawn_at) * self._kept.holds(keys, shard.mass_of(x, shard.judged_at))
        return torch.cat([shard.totals(self._drawn, True, False, None)[:, :4], own], 1)

    def heard(self, told: Tensor, ids: Tensor) -> Law:
        """The laws, and what the ids weigh in them, given what each rank has told, int64 [R, N, 5]."""
        whole, rest, first, first_of_rest, own = told.unbind(2)
        leaves = self._leaves[:, 0] & (whole.sum(0) > 0)
        shares, first = torch.where(leaves, rest, whole), torch.where(leaves, first_of_rest, first)
        key = first.amax(0)
        lone = shares.sum(0) == 0
        alone = torch.where(key > NO_KEY, self._shard.alone(value_of(key[:, None]))[:, 0], 0)
        self.shares = torch.where(lone, alone * (first == key), shares)
        self._lone, only = lone[:, None], Kept(key[:, None] + 1, key[:, None], torch.zeros_like(key[:, None]))
        self._kept = Kept(*(torch.where(self._lone, *bounds) for bounds in zip(only, self._kept, strict=True)))
        own = torch.where(lone, alone * (ids == IDS - (key & IDS)), own.sum(0))
        return Law(ids, self._status, torch.stack([own, self.shares.sum(0)], 1))

    def masses(self, rows: Tensor) -> Tensor:
        """The masses of this rank's tokens in some rows, int64 [n, V_r]."""
        shard = self._shard.of(rows)
        x = shard.logits()
        w = torch.where(self._lone[rows], shard.alone(x), shard.mass_of(x, shard.drawn_at))
        return w * shard.held(self._kept.of(rows))


class SplitRejection(Rejection):
    """Requests under verification, whose rows are split over ranks. Every rank comes to the same."""

    engine: SplitEngine

    def laws(self, given: Tensor, drafted: Tensor) -> tuple[Law, Law]:
        engine, proposal = self.engine, self.proposal
        if not engine.agreed:
            engine.agree(self.rows, self.call.fresh(given.device), self._compared())
        if not len(given):
            return _nothing(given), _nothing(drafted)
        found, self.rows = engine.decide(self.rows)
        target = drafts = LawPart(found, self.rows)
        told = [target.told(given)]
        if len(drafted):
            drafts = LawPart(*engine.decide(self.proposed, engine.drafts, proposal.kind))
            told.append(drafts.told(drafted))
        heard = engine.wire.gather(torch.cat(told))
        self._target, self._drafts, self.width = target, drafts, target.width
        law = drafts.heard(heard[:, len(given) :], drafted) if len(drafted) else _nothing(drafted)
        return target.heard(heard[:, : len(given)], given), law

    def _compared(self) -> tuple[int, ...]:
        """What ranks must have in common beside the target's rows."""
        proposal = self.proposal
        kind = 1 + len(DTYPES) * INPUTS[proposal.kind] + DTYPES[proposal.table.dtype]
        return 1 + (self.rule == "block"), kind, digest(self.proposed.records)

    def masses(self, own: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        return self._target.masses(own), self._drafts.masses(theirs)

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
        return self.engine.wire.gather(own) if len(some) else own[None]

    def last(self, accepted: Tensor, r: Tensor) -> Tensor:
        if not len(accepted):
            return accepted
        wire, row = self.engine.wire, self.index.gather(1, accepted[:, None])[:, 0]
        rejected = (accepted < self.count) & (self.status.gather(1, accepted[:, None])[:, 0] == 0)
        some = rejected.nonzero()[:, 0]
        shares = self._target.shares[:, row]
        shares_left = torch.zeros_like(shares)
        shares_left[:, some] = self._shares_left(some, accepted[some], r[some])
        by_rest = shares_left.sum(0) > 0
        shares = torch.where(by_rest, shares_left, shares)
        seeds, offsets = self.rows.seeds[row], self.rows.offsets[row]
        plain, residual = (
            uniform60(seeds, offsets, *how) for how in ((accepted * 0, PLAIN_DRAW), (accepted, RESIDUAL))
        )
        threshold = here(wire, torch.where(rejected, residual, plain)[:, None], shares[:, :, None])
        tokens = torch.full_like(accepted, -1)
        for part in self._in_parts(by_rest & (threshold[:, 0] >= 0)):
            tokens[part] = self._at(self.left(part, accepted[part], r[part])[0], threshold[part])
        for part in self._in_parts(~by_rest & (threshold[:, 0] >= 0)):
            tokens[part] = self._at(self._target.masses(row[part]), threshold[part])
        return wire.gather(tokens).amax(0)

    def _at(self, w: Tensor, threshold: Tensor) -> Tensor:
        """The ids at thresholds [n, 1] of the running masses, int64 [n]."""
        return torch.searchsorted(w.cumsum(-1), threshold, right=True)[:, 0] + self.engine.start

    def _in_parts(self, wanted: Tensor) -> Iterable[Tensor]:
        some = wanted.nonzero()[:, 0]
        size = max(1, AT_ONCE[some.device == CPU] // max(1, self.width))
        return (some[i : i + size] for i in range(0, len(some), size))


def _nothing(ids: Tensor) -> Law:
    """The laws of no rows."""
    return Law(ids, ids.to(torch.int32), ids.new_empty(0, 2))
