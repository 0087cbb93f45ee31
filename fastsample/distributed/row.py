"""A row that is split over ranks, of which every rank has a list of the first tokens.

What the list cannot answer, the ranks find out together: sums of what each has, or a search by histograms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastsample.distributed.filters import Sums
from fastsample.distributed.keys import HIGHEST, LOWEST, NO_KEY, Kept, everything, key
from fastsample.distributed.shard import LEVELS, SAME, VALUES, Shard, distance
from fastsample.distributed.wire import Wire
from fastsample.reference.mass import deviation_of, halves, scale_of
from fastsample.reference.process import NAN, NOTHING_LEFT, POSITIVE_INFINITY

Tensor = torch.Tensor


class SplitRow:
    """Rows as the filters see them (`fastsample.distributed.filters.Row`).

    Args:
        x: float32 [B, N], what the shard has of the listed tokens, -inf where there is none.
        ids: int64 [B, N]; those of each rank are as many as of any other, -1 past its last.
        wanted: which sums of whole rows filters need: products, spread.
        sums: these of whole rows, if they are known already.

    A row that is invalid lists nothing.
    """

    def __init__(
        self,
        wire: Wire,
        shard: Shard,
        x: Tensor,
        ids: Tensor,
        vocab: int,
        wanted: tuple[bool, bool],
        sums: Tensor | None = None,
    ) -> None:
        self.wire, self.shard, self.vocab = wire, shard, vocab
        self.status = status_of(x)  # int32 [B]
        self.valid = (self.status == 0)[:, None]
        x = torch.where(self.valid & (ids >= 0), x, -torch.inf)
        self.listed, self.ids = x, ids
        self.edge = edge_of(x, ids, wire.size)
        self.peak, self.scale = shard.peak, scale_of(shard.judged_at).expand_as(shard.peak)
        keys = torch.where(x > -torch.inf, key(x, ids), NO_KEY)
        self.keys, self.order = keys.sort(descending=True)
        self.x = x.gather(1, self.order)
        self.mass, self.depth = shard.mass_of(self.x, shard.judged_at), shard.depth_of(self.x)
        self.unit = shard.mass_of(self.peak, shard.judged_at)
        self.known = (self.keys >= self.edge) & (self.keys >= LOWEST)
        self.beyond = bound_beyond(shard.mass_of(self._value_at(self.edge), shard.judged_at))
        self.wanted = wanted
        self._whole = sums

    def _value_at(self, edge: Tensor) -> Tensor:
        at = torch.where(self.known, self.x, torch.inf).amin(-1, keepdim=True)
        return torch.where(edge > LOWEST, torch.where(at.isinf(), self.peak, at), -torch.inf)

    def lists(self, kept: Kept) -> Tensor:
        """Whether all of a set is listed, bool [B, 1]."""
        return (kept.low >= self.edge) | (kept.floor > self.beyond)

    def held(self, kept: Kept) -> Tensor:
        """Which listed tokens are kept, bool [B, N] in rank order."""
        return self.known & kept.holds(self.keys, self.mass)

    # Sums ------------------------------------------------------------------------------------------------------------

    def sums(self, kept: Kept, on: Tensor) -> Sums:
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
            all_ = everything(len(self.edge), self.edge.device)
            self._whole = self.wire.total(self.shard.sums(all_, *self.wanted))
        return self._whole

    def heaviest(self, kept: Kept, on: Tensor) -> Tensor:
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
        all_ = everything(len(self.edge), self.edge.device)
        return self._search(all_, n, self.known.to(torch.int64), on, of_mass=False)

    def reach(self, kept: Kept, target: Tensor, on: Tensor) -> Tensor:
        return self._search(kept, target, self.mass * self.held(kept), on, of_mass=True)

    def _search(self, kept: Kept, target: Tensor, weights: Tensor, on: Tensor, of_mass: bool) -> Tensor:
        """The key at which listed weights, or else all, reach the target; the lowest one where they do not."""
        running = weights.cumsum(-1)
        at = (running < target).sum(-1, keepdim=True)
        listed = at < weights.shape[1]
        found = torch.where(listed, self.keys.gather(1, at.clamp(max=weights.shape[1] - 1)), LOWEST)
        rows = (on & ~listed & ~self.lists(kept))[:, 0].nonzero()[:, 0]
        if len(rows):
            found[rows] = self._refine(rows, kept, target, 0 if of_mass else 1)
        return found

    def nearest(self, kept: Kept, mean: Tensor, target: Tensor, on: Tensor) -> Tensor:
        held = self.held(kept)
        far = 2**31
        distances = torch.where(held, distance(self.x, mean), far)
        # Tokens that are not listed lie below the last that is, so they are further from a mean above it.
        last = self._value_at(self.edge)
        open_at = torch.where(mean >= last, distance(last, mean), 0)
        near, order = distances.sort(-1)
        running = (self.mass * held).gather(1, order).cumsum(-1)
        at = (running < target).sum(-1, keepdim=True)
        limit = near.gather(1, at.clamp(max=near.shape[1] - 1))
        sure = (at < near.shape[1]) & (self.lists(kept) | (limit < open_at))
        rows = (on & ~sure)[:, 0].nonzero()[:, 0]
        if len(rows):
            limit[rows] = self._refine(rows, kept, target, 0, mean) >> 32
        return limit.to(torch.int32).view(torch.float32)

    def _refine(self, rows: Tensor, kept: Kept, target: Tensor, of: int, mean: Tensor | None = None) -> Tensor:
        """The place at which a set's weights reach the target, from the highest key down or the nearest token out.

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
            running = bins[:, :, of].cumsum(-1) + before
            missing |= running[:, -1:] < target
            at = (running < target).sum(-1, keepdim=True).clamp(max=bins.shape[1] - 1)
            before = running.gather(1, at) - bins[:, :, of].gather(1, at)
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


def edge_of(x: Tensor, ids: Tensor, ranks: int) -> Tensor:
    """The lowest key down to which every rank has listed all of its tokens, int64 [B, 1]."""
    keys = torch.where(ids >= 0, key(x, ids), HIGHEST).view(len(ids), ranks, -1)
    full = (keys < HIGHEST).all(-1)
    return torch.where(full, keys.amin(-1), LOWEST).amax(-1, keepdim=True)
