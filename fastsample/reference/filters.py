"""Stage 7: filters, each of which narrows what is kept of a row."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastsample.reference.mass import mass_at, mean_depth, scale_of, spread, sum_of_squares, total_of
from fastsample.reference.process import NEG_INF, Params, choice

Tensor = torch.Tensor


class Ranked(NamedTuple):
    """The tokens of each row in rank order: x descending, then id ascending. All are [B, V]."""

    ids: Tensor  # int64
    x: Tensor  # float32
    mass: Tensor  # int64
    depth: Tensor  # int64
    scale: Tensor  # float32 [B or 1, 1]
    unit: Tensor  # int64 [B, 1], the largest mass


class Kept(NamedTuple):
    """What is left of each row: mass >= floor, and high < position in the rank order <= low.

    A filter takes one and returns one that keeps no more. All are int64 [B, 1].
    """

    high: Tensor
    low: Tensor
    floor: Tensor


def rank(x: Tensor, w: Tensor, e: Tensor, temperature: Tensor) -> Ranked:
    ids = rank_order(x)
    unit = w.amax(-1, keepdim=True)
    return Ranked(ids, x.gather(1, ids), w.gather(1, ids), e.gather(1, ids), scale_of(temperature), unit)


def rank_order(x: Tensor) -> Tensor:
    """Token ids by x descending, then id ascending, int64 [B, V]. Adding 0 turns -0.0 into +0.0."""
    return (x + 0.0).sort(dim=-1, descending=True, stable=True).indices


def everything(row: Ranked) -> Kept:
    """All tokens above -inf."""
    alive = (row.x > NEG_INF).sum(-1, keepdim=True)
    return Kept(torch.full_like(alive, -1), alive - 1, torch.zeros_like(alive))


def is_kept(kept: Kept, row: Ranked) -> Tensor:
    """Whether a token is kept, bool [B, V] in rank order."""
    position = torch.arange(row.x.shape[1], device=row.x.device)
    return (kept.high < position) & (position <= kept.low) & (row.mass >= kept.floor)


def kept_mass(kept: Kept, row: Ranked) -> Tensor:
    """Mass where kept, else 0, int64 [B, V] in rank order."""
    return torch.where(is_kept(kept, row), row.mass, 0)


def heaviest(kept: Kept, row: Ranked) -> Tensor:
    """The largest mass, int64 [B, 1]: 2^40 for logits, as long as typical has not left out the maximum."""
    return kept_mass(kept, row).amax(-1, keepdim=True)


def top_n_sigma(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Logits at most this many standard deviations below the highest."""
    s = params["top_n_sigma"]
    within = (row.x >= lowest_within(row, s)).sum(-1, keepdim=True)
    return narrow_above(kept, torch.where(s == 0, kept.low, within - 1))


def lowest_within(row: Ranked, s: Tensor) -> Tensor:
    """The logit that lies s standard deviations below the highest, float32 [B, 1]."""
    peak = row.x[:, :1]
    return peak - (s.double() * spread(row.x, peak)).float()


def top_k(kept: Kept, row: Ranked, params: Params) -> Kept:
    """The first k of the rank order, or with ties="all" everything at least as large as the k-th."""
    vocab = row.x.shape[1]
    k = params["top_k"].to(torch.int64)
    k = torch.where((k == 0) | (k > vocab), vocab, k).expand(len(row.x), 1)
    at_least = (row.x >= row.x.gather(1, k - 1)).sum(-1, keepdim=True)
    return narrow_above(kept, torch.where(choice(params, "ties", "all"), at_least, k) - 1)


def top_p(kept: Kept, row: Ranked, params: Params) -> Kept:
    """The shortest prefix whose mass reaches the target; everything where p = 1."""
    w = kept_mass(kept, row)
    target = top_p_target(params["top_p"], total_of(w))
    before = w.cumsum(-1) - w
    last = (before < target).sum(-1, keepdim=True) - 1
    return narrow_above(kept, torch.where(params["top_p"] == 1, kept.low, last))


def min_p(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Tokens at least this fraction as probable as the most probable one."""
    return narrow_to_mass(kept, (params["min_p"].double() * heaviest(kept, row).double()).to(torch.int64))


def typical(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Those nearest to the mean logit, by mass, whose mass reaches the target. An interval of the rank order."""
    w, t = kept_mass(kept, row), params["typical_p"]
    mean = mean_logit(w, row)
    distance = (row.x - mean).abs()
    nearest = distance.sort(dim=-1, stable=True)
    running = w.gather(1, nearest.indices).cumsum(-1)
    reached = (running < top_p_target(t, total_of(w))).sum(-1, keepdim=True)
    beyond = distance > nearest.values.gather(1, reached.clamp(max=row.x.shape[1] - 1))
    above = (beyond & (row.x > mean)).sum(-1, keepdim=True)
    below = (beyond & ~(row.x > mean)).sum(-1, keepdim=True)
    off = t == 1
    kept = narrow_below(kept, torch.where(off, kept.high, above - 1))
    return narrow_above(kept, torch.where(off, kept.low, row.x.shape[1] - below - 1))


def mean_logit(w: Tensor, row: Ranked) -> Tensor:
    """mu of the masses of a set (0 outside of it), float32 [B, 1]."""
    return (row.x[:, :1].double() - (mean_depth(w, row.depth) * 2.0**-14) / row.scale.double()).float()


def epsilon(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Tokens of at least this probability."""
    return threshold(kept, row, params["epsilon_cutoff"].double() * total_of(kept_mass(kept, row)).double())


def eta(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Tokens of at least this probability, or of less where the entropy is high."""
    w, e = kept_mass(kept, row), params["eta_cutoff"].double()
    typical_mass = mass_at(-(mean_depth(w, row.depth) * 2.0**-14).float()).double()
    return threshold(kept, row, torch.minimum(e * total_of(w).double(), e.sqrt() * typical_mass))


def top_a(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Tokens of at least this times the square of the highest probability."""
    a, unit = params["top_a"].double(), row.unit.double()
    return threshold(kept, row, (a * unit) * (unit / total_of(kept_mass(kept, row)).double()))


def p_less(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Tokens at least as probable as that two draws agree."""
    w = kept_mass(kept, row)
    floor = sum_of_squares(w) / total_of(w).double()
    return threshold(kept, row, torch.where(params["p_less"] != 0, floor, 0.0))


def threshold(kept: Kept, row: Ranked, floor: Tensor) -> Kept:
    """Tokens of at least this mass; the heaviest one in any case."""
    return narrow_to_mass(kept, torch.minimum(floor, heaviest(kept, row).double()).to(torch.int64))


def xtc(kept: Kept, row: Ranked, params: Params) -> Tensor:
    """The position above which everything kept is a top choice but the last, int64 [B, 1]; -1 where nothing is."""
    top = is_kept(kept, row) & (row.mass >= xtc_floor(kept, row, params)) & (params["xtc_probability"] > 0)
    position = torch.arange(row.x.shape[1], device=row.x.device)
    last = torch.where(top, position, -1).amax(-1, keepdim=True)
    return torch.where(top.sum(-1, keepdim=True) >= 2, last - 1, -1)


def xtc_floor(kept: Kept, row: Ranked, params: Params) -> Tensor:
    """The mass of a top choice, int64 [B, 1]."""
    return (params["xtc_threshold"].double() * total_of(kept_mass(kept, row)).double()).to(torch.int64)


def top_p_target(p: Tensor, total: Tensor) -> Tensor:
    """max(1, floor(P30 * Z / 2^30)), exactly."""
    p30 = (p * 2.0**30).to(torch.int64)
    return (p30 * (total >> 30) + (p30 * (total & (2**30 - 1)) >> 30)).clamp(min=1)


def narrow_below(kept: Kept, high: Tensor) -> Kept:
    return kept._replace(high=torch.maximum(kept.high, high))


def narrow_above(kept: Kept, low: Tensor) -> Kept:
    return kept._replace(low=torch.minimum(kept.low, low))


def narrow_to_mass(kept: Kept, floor: Tensor) -> Kept:
    return kept._replace(floor=torch.maximum(kept.floor, floor))


MASS_FLOORS = (min_p,)
"""The filters that keep every token of at least some mass, relative to the heaviest that is kept so far."""
MEASURED_FLOORS = (epsilon, eta, top_a, p_less)
"""The filters that keep every token of at least some mass, which is measured on what is kept so far."""
SEQUENCES = {
    "top_k_first": (top_n_sigma, top_k, top_p, *MASS_FLOORS, typical, *MEASURED_FLOORS),
    "min_p_first": (top_n_sigma, *MASS_FLOORS, top_k, top_p, typical, *MEASURED_FLOORS),
    # First, top-p measures the whole row, which the others up to typical look at anywhere.
    "joint": (top_p, top_n_sigma, top_k, *MASS_FLOORS, typical, *MEASURED_FLOORS),
    "temperature_last": (top_n_sigma, top_k, typical, top_p, *MASS_FLOORS, *MEASURED_FLOORS),
}
"""The filters of each order, first to last."""


def filters(row: Ranked, params: Params) -> Kept:
    """Each row's kept set, by its own order."""
    found = everything(row)
    for order, sequence in SEQUENCES.items():
        kept = everything(row)
        for narrow in sequence:
            kept = narrow(kept, row, params)
        chosen = choice(params, "order", order)
        found = Kept(*(torch.where(chosen, ours, before) for ours, before in zip(kept, found, strict=True)))
    return found
