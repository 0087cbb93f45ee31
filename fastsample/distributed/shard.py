"""What a rank finds out about its own part of each row: integer sums, counts and keys, which ranks then add up."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastsample.distributed.keys import HIGHEST, LOWEST, Kept, key
from fastsample.reference.mass import halves, mass_at, scale_of
from fastsample.reference.process import NEG_INF

Tensor = torch.Tensor

LEVELS = ((53, 11), (42, 11), (32, 10), (10, 10), (0, 10))
"""Of a search by histograms: the lowest bit of a key that tells one bin from the next, and how many bits do."""
VALUES = 3  # levels after which the logit is known; the others tell equal ones by their ids
SAME = (2**12 - 1) << 20  # bits of a key in between, which are the same for all ids below 2^20


@dataclass
class Shard:
    """A rank's part of rows, after stages 1 to 3.

    Attributes:
        x: float32, float16 or bfloat16 [B, V_r].
        start: the id of its first token.
        peak: float32 [B, 1], the maxima of the whole rows.
        temperature: float32 [B, 1], at which tokens are weighed.
    """

    x: Tensor
    start: int
    peak: Tensor
    temperature: Tensor

    def of(self, rows: Tensor) -> Shard:
        return Shard(self.x[rows], self.start, self.peak[rows], self.temperature[rows])

    def at(self, temperature: Tensor) -> Shard:
        return Shard(self.x, self.start, self.peak, temperature)

    def logits(self) -> Tensor:
        return self.x.float()

    def ids(self) -> Tensor:
        return torch.arange(self.start, self.start + self.x.shape[1], device=self.x.device)

    def keys(self) -> Tensor:
        """int64 [B, V_r]."""
        return key(self.logits(), self.ids())

    def y(self) -> Tensor:
        return (self.logits() - self.peak) * scale_of(self.temperature)

    def masses(self) -> Tensor:
        """int64 [B, V_r]."""
        return mass_at(self.y())

    def kept(self, kept: Kept) -> tuple[Tensor, Tensor]:
        """Which tokens are kept, bool [B, V_r], and what those weigh."""
        w = self.masses()
        held = kept.holds(self.keys(), w)
        return held, w * held

    def sums(self, kept: Kept) -> Tensor:
        """Z, EH, EL, HH, HL, LL of a set, int64 [B, 6]."""
        _, w = self.kept(kept)
        e = (-self.y().clamp(min=-60) * 2.0**14).to(torch.int64)
        high, low = halves(w)
        parts = (w, high * e, low * e, high * high, high * low, low * low)
        return torch.stack([part.sum(-1) for part in parts], -1)

    def spread(self) -> Tensor:
        """n, D1 and D2 of the tokens above -inf, int64 [B, 3]."""
        x = self.logits()
        alive = x > NEG_INF
        d = torch.where(alive, ((self.peak - x) * 2.0**11).clamp(max=2**20 - 1), 0).to(torch.int64)
        return torch.stack([part.sum(-1) for part in (alive, d, d * d)], -1)

    def ends(self, kept: Kept) -> Tensor:
        """The first and the last key of a set, the mass of its heaviest token and their number, int64 [B, 4]."""
        held, w = self.kept(kept)
        if not self.x.shape[1]:
            return torch.tensor([LOWEST, HIGHEST, 0, 0], device=self.x.device).expand(len(self.x), 4)
        keys, count = self.keys(), held.sum(-1)
        first = torch.where(held, keys, LOWEST).amax(-1)
        last = torch.where(held, keys, HIGHEST).amin(-1)
        return torch.stack([first, last, w.amax(-1), count], -1)

    def histogram(self, kept: Kept, base: Tensor, level: int, mean: Tensor | None = None) -> Tensor:
        """Mass and number of the tokens of a set in each bin of a level, int64 [B, bins, 2].

        Args:
            base: int64 [B, 1], where the bins begin; the first level has them all.
            mean: float32 [B, 1]: go by the distance from it instead of the key.
        """
        held, w = self.kept(kept)
        places = self.keys() if mean is None else distance(self.logits(), mean) << 32
        bits = LEVELS[level][1]
        bins = bin_of(places, base, level)
        inside = held & (bins >= 0) & (bins < 2**bits)
        bins = torch.where(inside, bins, 0)
        found = torch.zeros(len(places), 2**bits, 2, dtype=torch.int64, device=places.device)
        for i, weight in enumerate((w * inside, inside.to(torch.int64))):
            found[:, :, i].scatter_add_(1, bins, weight)
        return found


def bin_of(places: Tensor, base: Tensor, level: int) -> Tensor:
    shift, bits = LEVELS[level]
    return (places >> shift) + 2 ** (bits - 1) if level == 0 else (places - base) >> shift


def base_of(bins: Tensor, base: Tensor, level: int) -> Tensor:
    """Where a bin begins, int64 [B, 1]."""
    shift, bits = LEVELS[level]
    return (bins - 2 ** (bits - 1)) << shift if level == 0 else base + (bins << shift)


def distance(x: Tensor, mean: Tensor) -> Tensor:
    """The bits of |x - mean| as float32, which are in its order, int64."""
    return (x - mean).abs().view(torch.int32).to(torch.int64)
