"""The sampling contract in plain PyTorch: the specification that every other engine must match to the bit.

One module per group of stages, one short function per step, in the contract's order; slow on purpose. Nothing here is
shared with the kernels.
Float operations are single binary32 operations on tensors (a 0-dim CPU operand may be turned into a multiplication by
its reciprocal on GPUs, so parameters are always [B, 1] columns on the logits' device); probability mass is int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastsample.inputs import Rows
from fastsample.outputs import InputKind
from fastsample.params import GREEDY_BELOW
from fastsample.reference.draw import (
    PLAIN_DRAW,
    XTC_COIN,
    draw_at,
    draw_from,
    low32,
    multiply_high60,
    philox4x32,
    uniform60,
)
from fastsample.reference.filters import filters, is_kept, rank, rank_order, xtc
from fastsample.reference.mass import LOG2E, POLYNOMIAL, UNIT, depth, mass, mass_of_probs
from fastsample.reference.process import (
    NAN,
    NEG_INF,
    NOTHING_LEFT,
    POSITIVE_INFINITY,
    Params,
    check,
    check_probs,
    choice,
    columns,
    order_of_probs,
    process,
    process_probs,
)

Tensor = torch.Tensor

__all__ = [
    "KEPT",
    "LOG2E",
    "NAN",
    "NEG_INF",
    "NOTHING_LEFT",
    "POLYNOMIAL",
    "POSITIVE_INFINITY",
    "Distribution",
    "check",
    "check_probs",
    "depth",
    "distribution",
    "draw_at",
    "entropy",
    "excludes",
    "filter_logits",
    "law",
    "log_kept_mass",
    "log_share",
    "low32",
    "mass",
    "mass_of_probs",
    "mixture",
    "multiply_high60",
    "one_hot",
    "order_of_probs",
    "philox4x32",
    "probabilities",
    "processed_logprobs",
    "rank_order",
    "ranks",
    "raw_logprobs",
    "raw_logprobs_of_probs",
    "sample",
    "temperatures",
    "uniform60",
]


@dataclass
class Distribution:
    """What is left of a batch after stage 7."""

    x: Tensor  # float32 [B, V], processed logits; of probabilities what ranks as they do
    status: Tensor  # int32 [B]
    kept: Tensor  # bool [B, V]
    greedy: Tensor  # bool [B]
    mass: Tensor  # int64 [B, V], what a plain draw is from
    rest: Tensor  # int64 [B, V], what a draw is from that leaves out what XTC excludes
    alive: Tensor  # int64 [B, V], the mass of every token above -inf
    coin: Tensor  # float32 [B or 1, 1], how likely a draw is from the rest


def distribution(logits: Tensor, rows: Rows, kind: InputKind = "logits") -> Distribution:
    """Stages 0 to 7 for logits, or probabilities, [B, V]."""
    params = columns(rows)
    x = process(logits, rows, params) if kind == "logits" else process_probs(logits, rows)
    status = check(x) if kind == "logits" else check_probs(x)
    valid = (status == 0)[:, None]
    greedy, drawn_at, judged_at = temperatures(params)
    sound = torch.where(valid, x, torch.ones_like(x))
    if kind == "logits":
        w, alone = mass(sound, drawn_at), torch.full_like(sound, 2**UNIT, dtype=torch.int64)
        row = rank(sound, mass(sound, judged_at), depth(sound, judged_at), judged_at)
    else:
        w, alone = mass_of_probs(sound), mass_of_probs(sound.reshape(-1, 1)).view(sound.shape)
        x = order_of_probs(sound)
        row = rank(x, w, torch.zeros_like(w), judged_at)
    narrowed = filters(row, params)
    kept = is_kept(narrowed, row)
    out = is_kept(narrowed._replace(low=xtc(narrowed, row, params)), row) & ~greedy
    coin = params["xtc_probability"]
    argmax = torch.arange(x.shape[1], device=x.device) == 0
    kept = torch.where(greedy, argmax, kept & ~(out & (coin == 1))) & valid
    weighs = (kept & (w.gather(1, row.ids) > 0)).any(-1, keepdim=True)
    kept, out = torch.where(weighs, kept, first(kept)), out & weighs
    whole, rest = (drawn_masses(w, alone, set_, row.ids) for set_ in (kept, kept & ~out))
    by_id = torch.zeros_like(kept).scatter(1, row.ids, kept)
    return Distribution(x, status, by_id, greedy[:, 0], whole, rest, w, coin)


def temperatures(params: Params) -> tuple[Tensor, Tensor, Tensor]:
    """Whether a row is greedy, and the temperatures at which it is drawn from and its filters judge it, [B or 1, 1]."""
    given = params["temperature"]
    greedy = given < GREEDY_BELOW
    drawn_at = torch.where(greedy, torch.ones_like(given), given)
    judged_at = torch.where(choice(params, "order", "temperature_last"), torch.ones_like(given), drawn_at)
    return greedy, drawn_at, judged_at


def first(ranked: Tensor) -> Tensor:
    """The first token of a set, which is given in rank order, bool [B, V]."""
    return ranked & (ranked.cumsum(-1) == 1)


def drawn_masses(w: Tensor, alone: Tensor, ranked: Tensor, ids: Tensor) -> Tensor:
    """The masses of a set, 0 elsewhere, int64 [B, V]. Where they are all 0, its first token has the mass of a peak.

    Args:
        w, alone: int64 [B, V], the masses, and what each would be if the token were the maximum.
        ranked: bool [B, V], whether a token is in the set, in rank order.
        ids: int64 [B, V], the rank order.
    """
    sets = (w.gather(1, ids) * ranked, alone.gather(1, ids) * first(ranked))
    masses, one = (torch.zeros_like(w).scatter(1, ids, m) for m in sets)
    return torch.where(masses.any(-1, keepdim=True), masses, one)


def sample(dist: Distribution, rows: Rows, num_samples: int, given: Tensor | None = None) -> Tensor:
    """Stages 5 and 8: token ids, int64 [B, num_samples]; -1 in invalid rows. Those that are given [B] are not drawn."""
    drawn = draw(dist, rows, num_samples)
    if given is not None:
        is_token = (given >= 0) & (given < dist.x.shape[1])
        drawn = torch.where(is_token, given, drawn[:, 0])[:, None]
    return torch.where((dist.status == 0)[:, None], drawn, -1)


def law(dist: Distribution, rows: Rows) -> Tensor:
    """The masses that draw 0 is from, int64 [B, V]; zeros in invalid rows."""
    rest = excludes(dist, rows, torch.zeros(1, dtype=torch.int64, device=dist.mass.device))
    return torch.where(rest, dist.rest, dist.mass) * (dist.status == 0)[:, None]


def filter_logits(dist: Distribution, rows: Rows) -> Tensor:
    """x / T where kept, -inf elsewhere, float32 [B, V]. A greedy row keeps its maximum as it is (T counts as 1)."""
    temperature = columns(rows)["temperature"]
    divisor = torch.where(dist.greedy[:, None], torch.ones_like(temperature), temperature)
    return torch.where(dist.kept, dist.x / divisor, NEG_INF)


def probabilities(dist: Distribution) -> Tensor:
    """The kept, renormalised distribution, float32 [B, V]; zeros in invalid rows."""
    return mixture(dist).float()


def mixture(dist: Distribution) -> Tensor:
    """Stage 8's mixture of draws with and without what XTC excludes, float64 [B, V]."""
    coin = dist.coin.double()
    whole = share(dist.mass)
    mixed = share(dist.mass, 1 - coin) + share(dist.rest, coin)
    return torch.where((dist.mass != dist.rest).any(-1, keepdim=True), mixed, whole)


def share(w: Tensor, times: Tensor | float = 1.0) -> Tensor:
    """times * w / total, in this order."""
    return times * w.double() / w.sum(-1, keepdim=True).clamp(min=1).double()


def one_hot(ids: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool).scatter(1, ids, True)


# What is kept --------------------------------------------------------------------------------------------------------


def kept_count(dist: Distribution) -> Tensor:
    """How many tokens are kept, int32 [B]."""
    return dist.kept.sum(-1, dtype=torch.int32)


def kept_bitmask(dist: Distribution) -> Tensor:
    """The kept tokens as the bits of words, the lowest bit first, int32 [B, ceil(V / 32)]."""
    rows, vocab = dist.kept.shape
    count = -(-vocab // 32)
    bits = torch.zeros(rows, count * 32, dtype=torch.int64, device=dist.kept.device)
    bits[:, :vocab] = dist.kept
    words: Tensor = (bits.view(rows, count, 32) << torch.arange(32, device=bits.device)).sum(-1)
    return words.to(torch.int32)


def log_kept_mass(dist: Distribution) -> Tensor:
    """log of the share that the kept tokens have of the mass of all, float64 [B]; NaN in invalid rows."""
    everything, out = dist.alive.sum(-1), (dist.alive * ~dist.kept).sum(-1)
    found = torch.where(dist.greedy, 0.0, log_share(everything - out, everything))
    return torch.where(dist.status == 0, found, torch.nan)


def log_share(kept: Tensor, everything: Tensor) -> Tensor:
    """log(kept / everything), float64, of masses. Near 1, what is left out tells more digits than what is kept."""
    out = everything - kept
    near = torch.log1p((-out).double() / everything.double())
    return torch.where(2 * out < everything, near, (kept.double() / everything.double()).log())


def entropy(dist: Distribution) -> Tensor:
    """Of the distribution that is drawn from, in nats, float64 [B]; NaN in invalid rows."""
    p, w = mixture(dist), dist.mass
    others = (w.sum(-1, keepdim=True) - w).double()
    surprise = torch.log1p(others / w.clamp(min=1).double())  # -log p, exact near p = 1
    surprise = torch.where((dist.mass != dist.rest).any(-1, keepdim=True), -p.log(), surprise)
    return torch.where(dist.status == 0, torch.where(p > 0, p * surprise, 0.0).sum(-1), torch.nan)


KEPT = (kept_count, kept_bitmask, log_kept_mass, entropy)
"""What can be asked of a kept set, in the order of the outputs."""


# Stage 8 -------------------------------------------------------------------------------------------------------------


def draw(dist: Distribution, rows: Rows, num_samples: int) -> Tensor:
    """Each draw from all that is kept, or where its coin says so from what XTC leaves; int64 [B, num_samples]."""
    index = torch.arange(num_samples, device=dist.mass.device)
    u = uniform60(rows.seeds[:, None], rows.offsets[:, None], index[None, :], PLAIN_DRAW)
    return torch.where(excludes(dist, rows, index), draw_from(dist.rest, u), draw_from(dist.mass, u))


def excludes(dist: Distribution, rows: Rows, index: Tensor) -> Tensor:
    """Whether draws leave out what XTC excludes, bool [B, draws]."""
    toss = uniform60(rows.seeds[:, None], rows.offsets[:, None], index[None, :], XTC_COIN)
    return toss < (dist.coin * 2.0**60).to(torch.int64)


# Log-probabilities ---------------------------------------------------------------------------------------------------


def processed_logprobs(dist: Distribution) -> Tensor:
    """log of the kept, renormalised distribution, float64 [B, V]; -inf where not kept."""
    return mixture(dist).log()


def raw_logprobs_of_probs(p: Tensor) -> Tensor:
    """log of probabilities over their sum, before any processing, float64 [B, V]."""
    sound = (check_probs(p) == 0)[:, None]
    return torch.where(sound, share(mass_of_probs(torch.where(sound, p, torch.ones_like(p)))).log(), torch.nan)


def raw_logprobs(raw: Tensor) -> Tensor:
    """log-softmax of x [B, V] at T = 1, before any processing, float64 [B, V]; the normaliser is a sum of masses."""
    sound = raw_is_sound(raw)[:, None]
    x = torch.where(sound, raw, torch.zeros_like(raw))
    total = mass(x, torch.ones_like(x[:, :1])).sum(-1, keepdim=True)
    logprobs = (x.double() - x.amax(-1, keepdim=True).double()) - (total.double() / 2.0**UNIT).log()
    return torch.where(sound, logprobs, torch.nan)


def raw_is_sound(raw: Tensor) -> Tensor:
    """Whether a row has a log-softmax at all, bool [B]: no NaN, no +inf (a mask may have hidden them later)."""
    return check(raw) == 0


def ranks(x: Tensor, tokens: Tensor) -> Tensor:
    """1 + number of tokens strictly above the sampled one, int64 [B, num_samples]."""
    own = x.gather(1, tokens.clamp(min=0))
    # A NaN is above nothing; searchsorted wants it out of the way.
    ascending = torch.where(x.isnan(), NEG_INF, x).sort(dim=-1).values
    return x.shape[1] - torch.searchsorted(ascending, own, right=True) + 1
