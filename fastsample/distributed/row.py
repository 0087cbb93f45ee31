"""A row that is split over ranks, of which every rank has a list of the first tokens.

What the list cannot answer, the ranks find out together: sums of what each has, or a search.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from fastsample.distributed.filters import Sums, bounds_near
from fastsample.distributed.keys import HIGHEST, LOWEST, NO_KEY, Kept, everything, key, value_of
from fastsample.distributed.search import BY_DISTANCE, BY_MASS, BY_NUMBER, Near, find
from fastsample.distributed.shard import LEVELS, SAME, SUM_WORDS, VALUES, Shard, distance
from fastsample.distributed.wire import Wire
from fastsample.reference.mass import UNIT, deviation_of, halves, scale_of
from fastsample.reference.process import NAN, NOTHING_LEFT, POSITIVE_INFINITY

Tensor = torch.Tensor


class SplitRow:
    """Rows as the filters see them (`fastsample.distributed.filters.Row`).

    Args:
        x: float32 [B, N], what the shard has of the listed tokens, -inf where there is none.
        ids: int64 [B, N]; those of each rank are as many as of any other, -1 past its last.
        status: int32 [B], what is wrong with each row, 0 for nothing.
        wanted: which sums of whole rows filters need: products, spread.
        sums: these of whole rows, if they are known already.
        open_: bool [B, 1], rows whose only search is known to end past the list; None where that is not known.

    A row that is invalid lists nothing.
    """

    def __init__(
        self,
        wire: Wire,
        shard: Shard,
        x: Tensor,
        ids: Tensor,
        status: Tensor,
        vocab: int,
        wanted: tuple[bool, bool],
        sums: Tensor | None = None,
        open_: Tensor | None = None,
    ) -> None:
        self.wire, self.shard, self.vocab = wire, shard, vocab
        self.status, self.valid = status, (status == 0)[:, None]
        x = torch.where(self.valid & (ids >= 0), x, -torch.inf)
        self.listed, self.ids = x, ids
        self.peak, self.scale = shard.peak, scale_of(shard.judged_at).expand_as(shard.peak)
        self.wanted, self.open = wanted, open_
        self._all_open = open_ is not None and bool(open_.all())
        self._whole = sums
        self._near: Near | None = None  # what the last search has found
        self._bins: Tensor | None = None  # of whole rows, int64 [R, B, 2 BINS], if they are known

    @cached_property
    def edge(self) -> Tensor:
        """Down to where the list has everything, a key, int64 [B, 1]."""
        return edge_of(self.listed, self.ids, self.wire.size)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        """The keys of the listed tokens in rank order, int64 [B, N], and where each is listed."""
        keys = torch.where(self.listed > -torch.inf, key(self.listed, self.ids), NO_KEY)
        keys, order = keys.sort(descending=True)
        return keys, order

    @property
    def keys(self) -> Tensor:
        return self._sorted[0]

    @property
    def order(self) -> Tensor:
        return self._sorted[1]

    @cached_property
    def x(self) -> Tensor:
        return self.listed.gather(1, self.order)

    @cached_property
    def mass(self) -> Tensor:
        return self.shard.mass_of(self.x, self.shard.judged_at)

    @cached_property
    def depth(self) -> Tensor:
        return self.shard.depth_of(self.x)

    @cached_property
    def known(self) -> Tensor:
        return (self.keys >= self.edge) & (self.keys >= LOWEST)

    @cached_property
    def beyond(self) -> Tensor:
        """More than any token that is not listed weighs, int64 [B, 1]."""
        return bound_beyond(self.shard.mass_of(value_of(self.edge), self.shard.judged_at))

    @cached_property
    def unit(self) -> Tensor:
        """What the maximum weighs, int64 [B, 1]."""
        if self.shard.kind == "logits":
            return torch.full_like(self.peak, 2**UNIT, dtype=torch.int64)
        return self.shard.mass_of(self.peak, self.shard.judged_at)

    def lists(self, kept: Kept) -> Tensor:
        """Whether all of a set is listed, bool [B, 1]."""
        listed = kept.low >= self.edge
        return listed | (kept.floor > self.beyond) if bool(kept.floor.any()) else listed

    def held(self, kept: Kept) -> Tensor:
        """Which listed tokens are kept, bool [B, N] in rank order."""
        return self.known & kept.holds(self.keys, self.mass)

    # Sums ------------------------------------------------------------------------------------------------------------

    def sums(self, kept: Kept, on: Tensor) -> Sums:
        if self._whole is not None and (self._bins is not None or bool((kept.whole() | ~on).all())):
            return Sums(*self._whole[:, :6, None].unbind(1))
        w = self.mass * self.held(kept)
        high, low = halves(w)
        parts = (w, high * self.depth, low * self.depth, high * high, high * low, low * low)
        found = torch.stack([part.sum(-1) for part in parts], -1)
        open_ = on & ~self.lists(kept)
        if bool((of_all := open_ & kept.whole()).any()):
            found = torch.where(of_all, self.whole()[:, : found.shape[1]], found)
        found = self._together(found, open_ & ~kept.whole(), lambda shard, rows: shard.sums(kept.of(rows))[:, :6])
        return Sums(*found.unsqueeze(-1).unbind(1))

    def whole(self) -> Tensor:
        """The sums and the spread of all tokens above -inf, int64 [B, 9]."""
        if self._whole is None:
            all_ = everything(len(self.peak), self.peak.device)
            self._whole = self.wire.total(self.shard.sums(all_, *self.wanted))
        return self._whole

    def look_ahead(self, bins: Tensor | None) -> None:
        """Take the bins of whole rows, where all that these need is one search; if they are not known, with their sums
        in one message."""
        if bins is None:
            told = self.wire.gather(self.shard.whole(*self.wanted))
            self._whole, bins = told[:, :, :SUM_WORDS].sum(0), told[:, :, SUM_WORDS:]
        self._bins = bins
        self.open, self._all_open = self.valid, True

    def heaviest(self, kept: Kept, on: Tensor) -> Tensor:
        if bool((kept.high == HIGHEST).all()):
            return self.unit
        listed = (self.mass * self.held(kept)).amax(-1, keepdim=True)
        listed = torch.where(kept.high == HIGHEST, self.unit, listed)
        open_ = on & (kept.high < HIGHEST) & ~self.lists(kept)
        return self._most(listed, open_, lambda shard, rows: shard.ends(kept.of(rows))[:, 2:3])

    def deviation(self, on: Tensor) -> Tensor:
        return deviation_of(*self.whole()[:, -3:, None].unbind(1))

    def last(self, kept: Kept, on: Tensor) -> tuple[Tensor, Tensor]:
        held = self.held(kept)
        found = torch.stack([torch.where(held, self.keys, HIGHEST).amin(-1), held.sum(-1)], -1)
        rows = (on & ~self.lists(kept))[:, 0].nonzero()[:, 0]
        if len(rows):
            ends = self.wire.gather(self.shard.of(rows).ends(kept.of(rows)))
            found[rows] = torch.stack([ends[:, :, 1].amin(0), ends[:, :, 3].sum(0)], -1)
        return found[:, :1], found[:, 1:]

    def _together(self, found: Tensor, open_: Tensor, ask: Callable[[Shard, Tensor], Tensor]) -> Tensor:
        """`found`, but the sum of what each rank answers in the open rows."""
        rows = open_[:, 0].nonzero()[:, 0]
        if len(rows):
            found = found.index_copy(0, rows, self.wire.total(ask(self.shard.of(rows), rows)))
        return found

    def _most(self, found: Tensor, open_: Tensor, ask: Callable[[Shard, Tensor], Tensor]) -> Tensor:
        rows = open_[:, 0].nonzero()[:, 0]
        if len(rows):
            found = found.index_copy(0, rows, self.wire.gather(ask(self.shard.of(rows), rows)).amax(0))
        return found

    # Places in the rank order ----------------------------------------------------------------------------------------

    def nth(self, n: Tensor, on: Tensor) -> Tensor:
        all_ = everything(len(self.peak), self.peak.device)
        return self._search(all_, n, on, BY_NUMBER)

    def reach(self, kept: Kept, target: Tensor, on: Tensor) -> Tensor:
        return self._search(kept, target, on, BY_MASS)

    def _search(self, kept: Kept, target: Tensor, on: Tensor, by: int) -> Tensor:
        """The key at which listed weights, or else all, reach the target; the lowest one where they do not."""
        if self._is_open(on):
            found, rows = torch.full_like(target, LOWEST), on
        else:
            weights = self.known.to(torch.int64) if by == BY_NUMBER else self.mass * self.held(kept)
            at = (weights.cumsum(-1) < target).sum(-1, keepdim=True)
            listed = at < weights.shape[1]
            found = torch.where(listed, self.keys.gather(1, at.clamp(max=weights.shape[1] - 1)), LOWEST)
            rows = on & ~listed & ~self.lists(kept)
        some = rows[:, 0].nonzero()[:, 0]
        if len(some):
            near = self._find(some, kept, target, by)
            found[some] = self._refine(some, kept, target, by) if near is None else near.kept.low
        return found

    def nearest(self, kept: Kept, mean: Tensor, target: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_open(on):
            high, low, rows = torch.full_like(target, HIGHEST), torch.full_like(target, LOWEST), on
        else:
            held = self.held(kept)
            distances = torch.where(held, distance(self.x, mean), 2**31)
            # Tokens that are not listed lie below the last that is, so they are further from a mean above it.
            last = value_of(self.edge)
            open_at = torch.where(mean >= last, distance(last, mean), 0)
            near, order = distances.sort(-1)
            at = ((self.mass * held).gather(1, order).cumsum(-1) < target).sum(-1, keepdim=True)
            limit = near.gather(1, at.clamp(max=near.shape[1] - 1))
            high, low = bounds_near(mean, limit.to(torch.int32).view(torch.float32))
            rows = on & ~((at < near.shape[1]) & (self.lists(kept) | (limit < open_at)))
        some = rows[:, 0].nonzero()[:, 0]
        if len(some):
            found = self._find(some, kept, target, BY_DISTANCE, mean)
            if found is not None:
                high[some], low[some] = found.kept.high, found.kept.low
            else:
                limit = (self._refine(some, kept, target, BY_MASS, mean) >> 32).to(torch.int32).view(torch.float32)
                high[some], low[some] = bounds_near(mean[some], limit)
        return high, low

    def _is_open(self, on: Tensor) -> bool:
        """Whether these rows need not be looked up in the list."""
        return self._all_open or (self.open is not None and bool((self.open | ~on).all()))

    def spread(self, kept: Kept, on: Tensor) -> Tensor:
        """Rows of which a set's tokens are not all listed, bool [B, 1]."""
        return on if self._is_open(on) else on & ~self.lists(kept)

    def shares(self, rows: Tensor, kept: Kept) -> tuple[Tensor, Tensor] | None:
        """The mass and the number of tokens that each rank has of a set, int64 [R, b], if a search has told."""
        if self._near is None:
            return None
        known = self._near.shares(rows, kept)
        if known is None and bool(kept.floor.any()):  # a floor that all tokens pass changes nothing
            shard = self.shard.among(rows)
            lightest = shard.mass_of(value_of(kept.low), shard.judged_at)
            kept = kept._replace(floor=torch.where(kept.floor <= least_above(lightest), 0, kept.floor))
            known = self._near.shares(rows, kept)
        return known

    def _find(self, rows: Tensor, kept: Kept, target: Tensor, by: int, mean: Tensor | None = None) -> Near | None:
        """The tokens of some rows up to the place at which they reach the target; None where too many are about it."""
        if self.shard.kind == "probs":
            return None
        shard = self.shard.among(rows)
        bins = self.wire.gather(shard.bins(kept.of(rows))) if self._bins is None else self._bins[:, rows]
        mean = None if mean is None else mean[rows]
        self._near = find(self.wire, shard, kept.of(rows), rows, bins, target[rows], by, mean)
        return self._near

    def _refine(self, rows: Tensor, kept: Kept, target: Tensor, by: int, mean: Tensor | None = None) -> Tensor:
        """The place at which a set's weights reach the target, from the highest key down or the nearest token out,
        however many tokens are equal or almost so.

        Each level shows which of the next bits the place has; a bin with a single token ends the search.
        """
        shard, kept, target = self.shard.of(rows), kept.of(rows), target[rows]
        mean = None if mean is None else mean[rows]
        base, before = torch.full_like(target, NO_KEY), torch.zeros_like(target)
        missing = torch.zeros_like(target, dtype=torch.bool)
        for level in range(len(LEVELS) if mean is None else VALUES):
            bins = self.wire.total(shard.histogram(kept, base, level, mean))
            if mean is None:
                bins = bins.flip(1)
            running = bins[:, :, by].cumsum(-1) + before
            missing |= running[:, -1:] < target
            at = (running < target).sum(-1, keepdim=True).clamp(max=bins.shape[1] - 1)
            before = running.gather(1, at) - bins[:, :, by].gather(1, at)
            base = base + ((at if mean is not None else bins.shape[1] - 1 - at) << LEVELS[level][0])
            if mean is None and level < VALUES and bool((bins[:, :, 1].gather(1, at) <= 1).all()):
                base = self._only(shard, kept, base, level)
                break
            if mean is None and level == VALUES - 1:
                base = base + SAME
        return torch.where(missing, LOWEST, base)

    def _only(self, shard: Shard, kept: Kept, base: Tensor, level: int) -> Tensor:
        """The key of the only token in a bin."""
        width = 2 ** LEVELS[level][0]
        within = kept._replace(low=torch.maximum(kept.low, base), high=torch.minimum(kept.high, base + width))
        return self.wire.gather(shard.ends(within)[:, :1]).amax(0)


def status_of(listed: Tensor) -> Tensor:
    """What is wrong with each row, 0 for nothing, int32 [B], given what ranks list of it."""
    status = torch.where((listed == -torch.inf).all(-1), NOTHING_LEFT, 0)
    status = torch.where((listed == torch.inf).any(-1), POSITIVE_INFINITY, status)
    return torch.where(listed.isnan().any(-1), NAN, status).to(torch.int32)


def bound_beyond(mass: Tensor) -> Tensor:
    """More than any token below one of this mass weighs: masses rise with the logit but for their last bits."""
    return mass + (mass >> 18) + 2


def least_above(mass: Tensor) -> Tensor:
    """Likewise less than any token above it weighs, or this."""
    return mass - (mass >> 18) - 2


def edge_of(x: Tensor, ids: Tensor, ranks: int) -> Tensor:
    """The lowest key down to which every rank has listed all of its tokens, int64 [B, 1]."""
    keys = torch.where(ids >= 0, key(x, ids), HIGHEST).view(len(ids), ranks, -1)
    full = (keys < HIGHEST).all(-1)
    return torch.where(full, keys.amin(-1), LOWEST).amax(-1, keepdim=True)
