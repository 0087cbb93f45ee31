"""Stage 7 for a row that is split over ranks: the contract's filters in terms of what may be asked of such a row.

A filter that is off in a row asks nothing of it: answers may take a collective, which every rank must take part in.
Each rank has the same parameters and gets the same answers, so all take the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from fastsample.distributed.keys import (
    HIGHEST,
    IDS,
    LOWEST,
    Kept,
    from_value,
    narrow_above,
    narrow_below,
    narrow_to_mass,
    ordinal,
    value,
)
from fastsample.reference.filters import top_p_target
from fastsample.reference.mass import mass_at, mean_of, squares_of
from fastsample.reference.process import Params, choice

Tensor = torch.Tensor


class Sums(NamedTuple):
    """Stage 6b's sums of a set of each row. All are int64 [B, 1]."""

    mass: Tensor  # Z
    deep_high: Tensor  # EH
    deep_low: Tensor  # EL
    square_high: Tensor  # HH
    square_cross: Tensor  # HL
    square_low: Tensor  # LL

    def depth(self) -> Tensor:
        """E, float64 [B, 1]."""
        return mean_of(self.deep_high, self.deep_low, self.mass)

    def squares(self) -> Tensor:
        """Q, float64 [B, 1]."""
        return squares_of(self.square_high, self.square_cross, self.square_low)


class Row(Protocol):
    """What a row must answer, for the rows where `on` [B, 1] holds; elsewhere answers mean nothing."""

    peak: Tensor  # float32 [B, 1], the row's maximum
    scale: Tensor  # float32 [B, 1], c at the temperature that filters judge at
    vocab: int

    @property
    def unit(self) -> Tensor:
        """The maximum's mass, int64 [B, 1]."""

    def sums(self, kept: Kept, on: Tensor) -> Sums: ...

    def heaviest(self, kept: Kept, on: Tensor) -> Tensor:
        """The largest mass in a set, int64 [B, 1]."""

    def deviation(self, on: Tensor) -> Tensor:
        """sigma, float64 [B, 1]."""

    def nth(self, n: Tensor, on: Tensor) -> Tensor:
        """The key of the n-th token above -inf, from 1; the lowest there is where there are fewer."""

    def reach(self, kept: Kept, target: Tensor, on: Tensor) -> Tensor:
        """The key at which the mass of the set, in rank order, reaches the target."""

    def nearest(self, kept: Kept, mean: Tensor, target: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds `high` and `low` of the tokens so near the mean, float32, that their mass reaches the target."""

    def last(self, kept: Kept, on: Tensor) -> tuple[Tensor, Tensor]:
        """The last key of a set, and how many tokens it has, int64 [B, 1]."""


Filter = Callable[[Kept, Row, Params, Tensor], Kept]


def top_n_sigma(kept: Kept, row: Row, params: Params, on: Tensor) -> Kept:
    s = params["top_n_sigma"]
    lowest = row.peak - (s.double() * row.deviation(on)).float()
    return narrow_above(kept, torch.where(on, from_value(lowest), LOWEST))


def top_k(kept: Kept, row: Row, params: Params, on: Tensor) -> Kept:
    k = params["top_k"].to(torch.int64).expand_as(kept.low)
    on = on & (k < row.vocab)
    last = row.nth(k, on)
    last = torch.where(choice(params, "ties", "all"), last & ~IDS, last)
    return narrow_above(kept, torch.where(on, last, LOWEST))


def top_p(kept: Kept, row: Row, params: Params, on: Tensor) -> Kept:
    p = params["top_p"]
    target = top_p_target(p, row.sums(kept, on).mass)
    return narrow_above(kept, torch.where(on, row.reach(kept, target, on), LOWEST))


def mass_floors(kept: Kept, row: Row, params: Params, on: Tensor) -> Kept:
    m = params["min_p"]
    floor = (m.double() * row.heaviest(kept, on).double()).to(torch.int64)
    return narrow_to_mass(kept, torch.where(on, floor, 0))


def typical(kept: Kept, row: Row, params: Params, on: Tensor) -> Kept:
    t = params["typical_p"]
    sums = row.sums(kept, on)
    mean = (row.peak.double() - (sums.depth() * 2.0**-14) / row.scale.double()).float()
    mean = torch.where(on, mean, 0)
    high, low = row.nearest(kept, mean, top_p_target(t, sums.mass), on)
    kept = narrow_below(kept, torch.where(on, high, HIGHEST))
    return narrow_above(kept, torch.where(on, low, LOWEST))


def bounds_near(mean: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Above all keys of logits at most so far from the mean, and the lowest of them."""
    return from_value(highest_near(mean, limit)) + IDS + 1, from_value(-highest_near(-mean, limit))


def highest_near(mean: Tensor, limit: Tensor) -> Tensor:
    """The highest float32 at most so far from the mean, as the difference is rounded."""
    near, far = ordinal(mean), torch.full_like(ordinal(mean), int(ordinal(torch.tensor(torch.inf))))
    for _ in range(33):
        middle = (near + far) >> 1
        within = value(middle) - mean <= limit
        near, far = torch.where(within, middle, near), torch.where(within, far, middle)
    return value(near)


def epsilon(kept: Kept, row: Row, params: Params, on: Tensor) -> Kept:
    e = params["epsilon_cutoff"]
    return threshold(kept, row, e.double() * row.sums(kept, on).mass.double(), on)


def eta(kept: Kept, row: Row, params: Params, on: Tensor) -> Kept:
    e = params["eta_cutoff"].double()
    sums = row.sums(kept, on)
    typical_mass = mass_at(-(sums.depth() * 2.0**-14).float()).double()
    return threshold(kept, row, torch.minimum(e * sums.mass.double(), e.sqrt() * typical_mass), on)


def top_a(kept: Kept, row: Row, params: Params, on: Tensor) -> Kept:
    a, unit = params["top_a"].double(), row.unit.double()
    return threshold(kept, row, (a * unit) * (unit / row.sums(kept, on).mass.double()), on)


def p_less(kept: Kept, row: Row, params: Params, on: Tensor) -> Kept:
    sums = row.sums(kept, on)
    return threshold(kept, row, sums.squares() / sums.mass.double(), on)


def threshold(kept: Kept, row: Row, floor: Tensor, on: Tensor) -> Kept:
    """Tokens of at least this mass; the heaviest one in any case."""
    floor = torch.minimum(torch.where(on, floor, 0.0), row.heaviest(kept, on).double())
    return narrow_to_mass(kept, torch.where(on, floor.to(torch.int64), 0))


def xtc(kept: Kept, row: Row, params: Params, on: Tensor) -> Tensor:
    """The key above which everything kept is excluded, int64 [B, 1]; the highest where nothing is."""
    nothing = torch.full_like(kept.low, HIGHEST)
    floor = (params["xtc_threshold"].double() * row.sums(kept, on).mass.double()).to(torch.int64)
    last, count = row.last(narrow_to_mass(kept, torch.where(on, floor, 0)), on)
    return torch.where(on & (count >= 2), last, nothing)


MEASURED = (epsilon, eta, top_a, p_less)
SEQUENCES: dict[str, tuple[Filter, ...]] = {
    "top_k_first": (top_n_sigma, top_k, top_p, mass_floors, typical, *MEASURED),
    "min_p_first": (top_n_sigma, mass_floors, top_k, top_p, typical, *MEASURED),
    "joint": (top_p, top_n_sigma, top_k, mass_floors, typical, *MEASURED),
    "temperature_last": (top_n_sigma, top_k, typical, top_p, mass_floors, *MEASURED),
}
"""The filters of each order, first to last, as in the reference."""


def uses(params: Params) -> dict[str, Tensor]:
    """The filters that are on in some rows, with those rows, bool [B or 1, 1], by their names."""
    rows = {
        "top_n_sigma": params["top_n_sigma"] > 0,
        "top_k": params["top_k"] > 0,
        "top_p": params["top_p"] < 1,
        "mass_floors": params["min_p"] > 0,
        "typical": params["typical_p"] < 1,
        "epsilon": params["epsilon_cutoff"] > 0,
        "eta": params["eta_cutoff"] > 0,
        "top_a": params["top_a"] > 0,
        "p_less": params["p_less"] != 0,
        "xtc": params["xtc_probability"] > 0,
    }
    return {name: on for name, on in rows.items() if bool(on.any())}


def steps_of(params: Params, used: Mapping[str, Tensor]) -> list[tuple[Filter, Tensor]]:
    """The filters of each row's order, first to last, with the rows that they are for, bool [B or 1, 1]; `used` is what
    `uses` tells."""
    steps = []
    for order, sequence in SEQUENCES.items():
        chosen = choice(params, "order", order)
        steps += [(narrow, chosen & used[narrow.__name__]) for narrow in sequence if narrow.__name__ in used]
    return [(narrow, on) for narrow, on in steps if bool(on.any())]


def filters(kept: Kept, row: Row, params: Params, on: Tensor, steps: Sequence[tuple[Filter, Tensor]]) -> Kept:
    """Narrow each row's kept set where `on` [B, 1] holds; `steps` is what `steps_of` tells."""
    for narrow, wanted in steps:
        if bool((here := on & wanted).any()):
            kept = narrow(kept, row, params, here)
    return kept
