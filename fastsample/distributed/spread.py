"""Stage 8 and the outputs of rows that keep tokens which no list has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from fastsample.backends import Outputs
from fastsample.distributed.keys import HIGHEST, IDS, LOWEST, NO_KEY, narrow_below, value_of
from fastsample.distributed.outputs import Found, put
from fastsample.distributed.search import thresholds
from fastsample.distributed.shard import Drawn, Shard, mixture
from fastsample.distributed.wire import Wire
from fastsample.inputs import Rows
from fastsample.reference import log_share, multiply_high60

Tensor = torch.Tensor


@dataclass
class Lone:
    """Where all of a set has no mass, since its maximum is gone: its first token is all there is."""

    whole: Tensor  # bool [b, 1], of what is kept, and
    rest: Tensor  # bool [b, 1], of that without XTC's top choices
    first: Tensor  # int64 [b, 1], the keys of those tokens
    first_rest: Tensor


def write_spread(found: Found, index: Tensor, rows: Rows, out: Outputs, start: int) -> Tensor:
    """The outputs of rows `index` int64 [b]: one message for what they weigh, and one for what is drawn. Returns the
    keys of the sampled tokens, int64 [b, n]."""
    wire, shard = found.row.wire, found.row.shard.among(index)
    drawn, reports = drawn_of(found, index), out.mode == "processed"
    bits = None
    if out.kept_bitmask is not None:
        bits = torch.zeros(len(index), -(-shard.x.shape[1] // 32), dtype=torch.int32, device=index.device)
    shares, alone = _known_shares(found, index, drawn), False
    if shares is None:
        alone = may_be_lone(shard, drawn)
        shares = wire.gather(shard.totals(drawn, alone, out.kept_count is not None, bits))
    elif bits is not None:
        shard.totals(drawn, False, False, bits)
    drawn.total, drawn.rest = shares[:, :, :2].sum(0).unbind(1)
    lone = _lone(drawn, shares) if alone else _nowhere_lone(index)
    streams = torch.stack([t[index if len(t) > 1 else index * 0] for t in (rows.seeds, rows.offsets)], 1)
    queries = shard.queries(drawn.kept, drawn)
    at, leaves = thresholds(wire.rank, shares[:, :, :2], streams, queries, out.num_samples)
    parts = [shard.draws(drawn, at, out.entropy is not None)]
    if reports and out.num_top:
        parts.append(shard.first(drawn.kept, out.num_top))
    if out.given is not None:
        parts.append(shard.keys_of(out.given[index, None]))
    told = wire.gather(torch.cat(parts, 1))
    n = out.num_samples
    keys = told[:, :, :n].amax(0)
    keys = torch.where(lone.whole, lone.first, torch.where(leaves & lone.rest, lone.first_rest, keys))
    if out.given is not None:
        keys = torch.where(told[:, :, -1:].amax(0) > NO_KEY, told[:, :, -1:].amax(0), keys)
    put(out.tokens, index, IDS - (keys & IDS))
    put(out.kept_count, index, torch.where(lone.whole[:, 0], 1, shares[:, :, 4].sum(0)))
    if out.entropy is not None:
        entropy = told[:, :, 2 * n].contiguous().view(torch.float64).sum(0)
        put(out.entropy, index, torch.where(lone.whole[:, 0], 0.0, entropy))
    if out.log_kept_mass is not None:
        put(out.log_kept_mass, index, log_share(drawn.total, found.all_mass()[index, 0]))
    if bits is not None and out.kept_bitmask is not None:
        put(out.kept_bitmask, index, _all_bits(wire, bits, start, out.kept_bitmask.shape[-1], lone))
    if not reports:
        return keys
    put(out.logprobs, index, _probability(shard, drawn, lone, keys).log())
    if out.ranks is not None:
        put(out.ranks, index, wire.total(shard.above(value_of(keys))) + 1)
    if out.num_top:
        top = told[:, :, 2 * n + 1 :][:, :, : out.num_top].transpose(0, 1).reshape(len(index), -1)
        top = top.topk(out.num_top).values
        top = torch.where(lone.whole, pad(lone.first, (0, out.num_top - 1), value=NO_KEY), top)
        there = top >= LOWEST
        put(out.top_ids, index, torch.where(there, IDS - (top & IDS), -1))
        p = _probability(shard, drawn, lone, top)
        put(out.top_logprobs, index, torch.where(there, p.log(), -torch.inf))
    return keys


def drawn_of(found: Found, index: Tensor) -> Drawn:
    """What draws are from. Top choices that every draw leaves out are not kept."""
    coin = found.coin.expand(len(found.row.peak), 1)[index]
    kept, top = found.kept.of(index), found.top[index]
    out = (coin == 1) & (top < HIGHEST)
    kept = narrow_below(kept, torch.where(out, top + 1, HIGHEST))
    nothing = torch.zeros(len(index), dtype=torch.int64, device=top.device)
    return Drawn(kept, torch.where(out, HIGHEST, top), coin, nothing, nothing)


def _known_shares(found: Found, index: Tensor, drawn: Drawn) -> Tensor | None:
    """What each rank has of what is drawn, int64 [R, b, 5] as `Shard.totals` answers, if a search has told that."""
    row = found.row
    if bool((drawn.top < HIGHEST).any()) or not torch.equal(row.shard.judged_at, row.shard.drawn_at):
        return None
    if (known := row.shares(index, drawn.kept)) is None or not bool(known[0].sum(0).all()):
        return None
    mass, tokens = known
    nothing = torch.full_like(mass, NO_KEY)
    return torch.stack([mass, mass, nothing, nothing, tokens], 2)


def may_be_lone(shard: Shard, drawn: Drawn) -> bool:
    """Whether in some row all of a set may have no mass."""
    without_peak = (drawn.top < HIGHEST) | (drawn.kept.high < HIGHEST)
    return bool((without_peak | (shard.judged_at != shard.drawn_at)).any())


def _lone(drawn: Drawn, shares: Tensor) -> Lone:
    first, first_rest = shares[:, :, 2:4].amax(0)[:, :, None].unbind(1)
    whole = (drawn.total == 0)[:, None]
    return Lone(whole, (drawn.rest == 0)[:, None] & ~whole, first, first_rest)


def _nowhere_lone(index: Tensor) -> Lone:
    nowhere, no_key = torch.zeros_like(index[:, None], dtype=torch.bool), torch.full_like(index[:, None], NO_KEY)
    return Lone(nowhere, nowhere, no_key, no_key)


def here(rank: int, u: Tensor, shares: Tensor) -> Tensor:
    """Where draws fall in a rank's running mass, int64 [b, n]; -1 where they fall into another's.

    Args:
        u: int64 [b, n], 60 uniform bits of each.
        shares: int64 [R, b, 1], the mass that each rank has.
    """
    threshold = multiply_high60(u, shares.sum(0)) - shares[:rank].sum(0)
    return torch.where((threshold >= 0) & (threshold < shares[rank]), threshold, -1)


def _probability(shard: Shard, drawn: Drawn, lone: Lone, keys: Tensor) -> Tensor:
    """Of kept tokens, float64 [b, n]."""
    w = shard.mass_of(value_of(keys), shard.drawn_at)
    p = mixture(w, torch.where(keys > drawn.top, 0, w), drawn)
    p = torch.where(lone.rest & (keys == lone.first_rest), p + drawn.coin.double(), p)
    return torch.where(lone.whole, 1.0, p)


def _all_bits(wire: Wire, bits: Tensor, start: int, words: int, lone: Lone) -> Tensor:
    """Every rank's bits int32 [b, ceil(V_r / 32)] as masks of whole rows, int32 [b, words]."""
    own = pad(torch.where(lone.whole, 0, bits).to(torch.int64) & (2**32 - 1), (1, 1))
    shift = start % 32
    part = (own << shift | own.roll(1, -1) >> (32 - shift))[:, 1:] & (2**32 - 1)
    whole = torch.zeros(len(bits), words + part.shape[1], dtype=torch.int64, device=bits.device)
    whole[:, start // 32 : start // 32 + part.shape[1]] = part
    found = wire.total(whole[:, :words])
    ids = torch.where(lone.whole, IDS - (lone.first & IDS), 0)
    alone = torch.zeros_like(found).scatter_(1, ids >> 5, torch.ones_like(ids) << (ids & 31))
    return torch.where(lone.whole, alone, found).to(torch.int32)
