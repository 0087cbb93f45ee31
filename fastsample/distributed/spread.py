"""Stage 8 and the outputs of rows that keep tokens which no list has."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from fastsample.backends import Outputs
from fastsample.distributed.keys import IDS, LOWEST, NO_KEY, value
from fastsample.distributed.outputs import Found, pick, put
from fastsample.distributed.wire import Wire
from fastsample.inputs import Rows
from fastsample.reference import multiply_high60, uniform60
from fastsample.reference.draw import PLAIN_DRAW, XTC_COIN
from fastsample.reference.mass import UNIT

Tensor = torch.Tensor


class Spread:
    """Some of the rows, `index` int64 [b], whose kept tokens are spread over the ranks."""

    def __init__(self, found: Found, index: Tensor, rows: Rows) -> None:
        row = found.row
        self.wire, self.coin = row.wire, found.coin.expand(len(row.edge), 1)[index]
        shard, top = row.shard.of(index), found.top[index]
        self.x, self.keys = shard.logits(), shard.keys()
        held, _ = shard.kept(found.kept.of(index))
        held &= ~((self.keys > top) & (self.coin == 1))
        w, rest = shard.at(found.drawn_at[index]).masses(), held & (self.keys <= top)
        sets = held, rest
        parts = [(w * set_).sum(-1) for set_ in sets] + [_highest(self.keys, set_) for set_ in sets]
        told = self.wire.gather(torch.stack(parts, -1))
        sums, firsts = told[:, :, :2], told[:, :, 2:]
        weighs = sums[:, :, :1].sum(0, keepdim=True) > 0
        sums, firsts = (torch.where(weighs, both, both[:, :, :1]) for both in (sums, firsts))
        self.held = torch.where(weighs[0], held, self.keys == firsts[:, :, 0].amax(0)[:, None])
        self.whole, self.of_whole = self._drawn_masses(w * held, sums[:, :, 0], firsts[:, :, 0])
        self.rest, self.of_rest = self._drawn_masses(w * rest, sums[:, :, 1], firsts[:, :, 1])
        self.seeds, self.offsets = (t[index if len(t) > 1 else index * 0] for t in (rows.seeds, rows.offsets))

    def _drawn_masses(self, w: Tensor, sums: Tensor, firsts: Tensor) -> tuple[Tensor, Tensor]:
        """The masses of a set here [b, V_r] and on each rank [R, b]; if they are all 0, its first token has that of a
        peak."""
        first_ = firsts.amax(0)
        weighs = sums.sum(0) > 0
        alone = (self.keys == first_[:, None]) * 2**UNIT
        return torch.where(weighs[:, None], w, alone), torch.where(weighs, sums, (firsts == first_) * 2**UNIT)

    def mixture(self) -> Tensor:
        """The distribution that is drawn from, float64 [b, V_r]."""
        z, z_rest = (shares.sum(0)[:, None] for shares in (self.of_whole, self.of_rest))
        whole, rest = self.whole.double(), self.rest.double()
        coin = self.coin.double()
        mixed = (1 - coin) * whole / z.double() + coin * rest / z_rest.double()
        return torch.where(z != z_rest, mixed, whole / z.double())

    def entropy(self, p: Tensor) -> Tensor:
        """This rank's part of the entropy in nats, float64 [b]."""
        z, z_rest = (shares.sum(0)[:, None] for shares in (self.of_whole, self.of_rest))
        surprise = torch.log1p((z - self.whole).double() / self.whole.clamp(min=1).double())
        surprise = torch.where(z != z_rest, -p.log(), surprise)
        return torch.where(p > 0, p * surprise, 0.0).sum(-1)

    def draw(self, num_samples: int) -> Tensor:
        """Which of this rank's tokens are drawn, int64 [b, num_samples]; -1 where another rank's are."""
        index = torch.arange(num_samples, device=self.x.device)
        at = self.seeds[:, None], self.offsets[:, None], index[None, :]
        u, toss = uniform60(*at, PLAIN_DRAW), uniform60(*at, XTC_COIN)
        leaves = toss < (self.coin * 2.0**60).to(torch.int64)
        return torch.where(leaves, self._draw(u, self.rest, self.of_rest), self._draw(u, self.whole, self.of_whole))

    def _draw(self, u: Tensor, w: Tensor, shares: Tensor) -> Tensor:
        threshold = multiply_high60(u, shares.sum(0)[:, None]) - shares[: self.wire.rank].sum(0)[:, None]
        mine = (threshold >= 0) & (threshold < shares[self.wire.rank][:, None])
        at = torch.searchsorted(w.cumsum(-1), threshold.clamp(min=0), right=True)
        return torch.where(mine, at, -1)

    def top(self, p: Tensor, count: int) -> Tensor:
        """This rank's first kept tokens, int64 [b, 2 count]: their keys, NO_KEY past the last, and the bits of p."""
        keys = torch.where(self.held, self.keys, NO_KEY)
        keys, at = keys.topk(min(count, keys.shape[1]))
        missing = count - keys.shape[1]
        keys = pad(keys, (0, missing), value=NO_KEY)
        return torch.cat([keys, pad(p.gather(1, at), (0, missing)).view(torch.int64)], 1)


def _highest(keys: Tensor, held: Tensor) -> Tensor:
    """The highest of the keys that are held, int64 [b]."""
    if not keys.shape[1]:
        return torch.full((len(keys),), LOWEST, device=keys.device)
    return torch.where(held, keys, LOWEST).amax(-1)


def write_spread(found: Found, index: Tensor, rows: Rows, out: Outputs, start: int) -> None:
    """The outputs of those rows: one message for what is drawn, and one for what must be known of it first."""
    of = Spread(found, index, rows)
    wire, b, n = of.wire, len(index), out.num_samples
    reports = out.mode == "processed"
    p = of.mixture()
    mine = of.draw(n)
    here = mine >= 0
    width = max(of.keys.shape[1], 1)
    at = mine.clamp(min=0, max=width - 1)
    keys, ps = (pick(t, at, here, empty_) for t, empty_ in ((of.keys, NO_KEY), (p, 0.0)))
    parts = [keys, ps.view(torch.int64), of.held.sum(-1, keepdim=True), of.entropy(p)[:, None].view(torch.int64)]
    if reports and out.num_top:
        parts.append(of.top(p, out.num_top))
    told = wire.gather(torch.cat(parts, 1))
    keys, owner = told[:, :, :n].max(0)
    p_drawn = told[:, :, n : 2 * n].gather(0, owner[None])[0].view(torch.float64)
    put(out.tokens, index, IDS - (keys & IDS))
    put(out.kept_count, index, told[:, :, 2 * n].sum(0))
    put(out.entropy, index, told[:, :, 2 * n + 1].contiguous().view(torch.float64).sum(0))
    if out.log_kept_mass is not None:
        put(out.log_kept_mass, index, _log_share(of.of_whole.sum(0), found.all_mass()[index, 0]))
    if out.kept_bitmask is not None:
        put(out.kept_bitmask, index, _all_bits(wire, of.held, start, out.kept_bitmask.shape[-1]))
    if not reports:
        return
    put(out.logprobs, index, p_drawn.log())
    if out.ranks is not None:
        above = (of.x[:, None, :] > value(keys >> 32)[:, :, None]).sum(-1)
        put(out.ranks, index, wire.total(above) + 1)
    if out.num_top:
        firsts = told[:, :, 2 * n + 2 :].view(wire.size, b, 2, -1).permute(1, 2, 0, 3).reshape(b, 2, -1)
        top, order = firsts[:, 0].topk(out.num_top)
        there = top >= LOWEST
        put(out.top_ids, index, torch.where(there, IDS - (top & IDS), -1))
        ps = firsts[:, 1].gather(1, order).contiguous().view(torch.float64)
        put(out.top_logprobs, index, torch.where(there, ps.log(), -torch.inf))


def _log_share(kept: Tensor, everything_: Tensor) -> Tensor:
    """log(kept / all); where little is left out, by that."""
    out = everything_ - kept
    near = torch.log1p((-out).double() / everything_.double())
    return torch.where(2 * out < everything_, near, (kept.double() / everything_.double()).log())


def _all_bits(wire: Wire, held: Tensor, start: int, words: int) -> Tensor:
    """Every rank's part of masks int32 [b, words]."""
    own = torch.zeros(len(held), words, dtype=torch.int64, device=held.device)
    ids = torch.arange(start, start + held.shape[1], device=held.device)
    own.scatter_add_(1, (ids >> 5).expand_as(held), held.to(torch.int64) << (ids & 31))
    return wire.total(own).to(torch.int32)
