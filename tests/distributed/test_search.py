"""Searches over ranks against one token after the other, and where draws fall against the reference's arithmetic."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import DTYPES, MAKERS, finish
from ranks import ThreadWire, on_ranks

from fastsample.backends import engine
from fastsample.distributed.answers import EngineShard
from fastsample.distributed.keys import Kept, everything, key
from fastsample.distributed.search import BY_DISTANCE, BY_MASS, BY_NUMBER, MOST_TOLD, Near, find, thresholds
from fastsample.distributed.shard import Shard
from fastsample.distributed.spread import here
from fastsample.reference import uniform60
from fastsample.reference.draw import XTC_COIN
from fastsample.reference.mass import mass_at, scale_of

Tensor = torch.Tensor

ROWS, VOCAB = 3, 9000
CUTS = (0, 2500, 2500, 8999, VOCAB)  # one rank has nothing, one a single token
JUDGED = torch.tensor([[1.0], [0.3], [2.5]])


def nearer(x: Tensor, kept: Tensor, mass: Tensor, target: int, by: int, mean: float) -> Tensor:
    """Tokens of a row, in rank order or by their distance from the mean, until they reach the target, bool [V]."""
    distance = (x - torch.tensor(mean)).abs()
    order = (distance if by == BY_DISTANCE else -x).sort(stable=True).indices
    order = order[kept[order]]
    running = (torch.ones_like(mass) if by == BY_NUMBER else mass)[order].cumsum(0)
    n = int((running < target).sum()) + 1
    found = torch.zeros_like(kept)
    found[order[:n]] = True
    if by == BY_DISTANCE:
        found = kept & (distance <= distance[found].max())
    return found


@pytest.mark.parametrize("kind", [Shard, partial(EngineShard, engine=engine("cpu"))])
@pytest.mark.parametrize("by", [BY_MASS, BY_NUMBER, BY_DISTANCE])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maker", ["flat", "lm", "ties", "half_masked", "tiny_spread", "huge", "ascending"])
def test_a_search_ends_where_tokens_reach_the_target(maker: str, dtype: str, by: int, kind: Any) -> None:
    g = torch.Generator().manual_seed(by)
    given = finish(MAKERS[maker](ROWS, VOCAB, g), DTYPES[dtype])
    x = given.float()
    peak = x.amax(-1, keepdim=True)
    w = mass_at((x - peak) * scale_of(JUDGED)) * (x > -torch.inf)
    keys = key(x, torch.arange(VOCAB))
    part = Kept(keys.median(-1, keepdim=True).values.clone() + 2**40, *everything(ROWS, x.device)[1:])
    floor = everything(ROWS, x.device)._replace(floor=torch.tensor([[0], [1], [2**30]]))
    for kept in (everything(ROWS, x.device), part, floor):
        held = kept.holds(keys, w) & (x > -torch.inf)
        weights = held.to(torch.int64) if by == BY_NUMBER else w * held
        mean = (
            torch.where(held, x, 0).double().sum(-1, keepdim=True).div(held.sum(-1, keepdim=True).clamp(min=1)).float()
        )
        for share in (0.1, 0.9, 0.999):
            target = (weights.sum(-1, keepdim=True).double() * share).long() + 1

            def on_rank(
                wire: ThreadWire, begin: int, end: int, kept: Kept = kept, target: Tensor = target, mean: Tensor = mean
            ) -> Near | None:
                some = kind if end > begin else Shard
                shard = some(given[:, begin:end], begin, peak, JUDGED, JUDGED)
                bins = wire.gather(shard.bins(kept))
                return find(wire, shard, kept, torch.arange(ROWS), bins, target, by, mean)

            found = on_ranks(CUTS, on_rank)
            if found[0] is None:
                assert maker in ("ties", "tiny_spread", "huge", "lm")
                continue
            for near in found:
                for row in range(ROWS):
                    if int(weights[row].sum()) < int(target[row]):
                        continue
                    want = nearer(x[row], held[row], w[row], int(target[row]), by, float(mean[row]))
                    got = near.kept.of(torch.tensor([row])).holds(keys[row : row + 1], w[row : row + 1])
                    assert torch.equal(got[0] & held[row], want)
                    masses = [int((w[row] * want)[begin:end].sum()) for begin, end in pairwise(CUTS)]
                    assert near.mass[:, row].tolist() == masses
                    assert near.tokens[:, row].tolist() == [int(want[b:e].sum()) for b, e in pairwise(CUTS)]


def test_a_search_that_ends_among_too_many_tokens_is_given_up() -> None:
    """Each rank may tell of so many, and no more."""

    def search(more: int) -> list[Any]:
        width = MOST_TOLD + more
        x = torch.zeros(1, width + 3)
        one = torch.ones(1, 1)

        def on_rank(wire: ThreadWire, begin: int, end: int) -> Near | None:
            shard = Shard(x[:, begin:end], begin, torch.zeros(1, 1), one, one)
            all_ = everything(1, x.device)
            return find(wire, shard, all_, torch.arange(1), wire.gather(shard.bins(all_)), one.long() * 2**41, BY_MASS)

        return on_ranks((0, width, width + 3), on_rank)

    assert all(near is not None and near.tokens.sum() == 2 for near in search(0))
    assert search(1) == [None, None]


def test_thresholds_are_those_of_the_reference() -> None:
    rows, ranks, draws = 5, 3, 40
    g = torch.Generator().manual_seed(7)
    streams = torch.randint(-(2**63), 2**63 - 1, (rows, 2), generator=g)
    whole = torch.randint(0, 2**50, (ranks, rows), generator=g)
    whole[1, 2], whole[0, 3] = 0, 0
    shares = torch.stack([whole, whole * torch.tensor([[0], [1], [1]])], 2)
    coin = torch.tensor([0.0, 0.3, 0.5, 0.9, 0.5])[:, None]
    top = torch.tensor([5, 5, 5, 5, 2**63 - 1])[:, None]
    queries = torch.zeros(rows, 10, dtype=torch.int64)
    queries[:, 3:4], queries[:, 4:5] = top, coin.view(torch.int32)
    at = streams[:, :1], streams[:, 1:], torch.arange(draws)[None]
    leaves = (uniform60(*at, XTC_COIN) < (coin * 2.0**60).long()) & (top < 2**63 - 1)
    assert 0 < leaves.sum() < leaves.numel()
    owners = torch.zeros(rows, draws, dtype=torch.int64)
    for rank in range(ranks):
        plain, rest = (here(rank, uniform60(*at), shares[:, :, i : i + 1]) for i in (0, 1))
        want = torch.where(leaves, torch.where(rest >= 0, -2 - rest, -1), plain)
        got, left = thresholds(rank, shares, streams, queries, draws)
        assert torch.equal(got, want)
        assert torch.equal(left, leaves)
        owners += got != -1
    assert bool((owners == 1).all())
