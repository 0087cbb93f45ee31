"""Stages 6 and 6b: integer probability mass, and statistics of a set of tokens."""

from __future__ import annotations

import torch

from fastsample.reference.process import NEG_INF

Tensor = torch.Tensor

LOG2E = float.fromhex("0x1.715476p+0")
ROUND_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds a small float32 to an integer
POLYNOMIAL = tuple(
    map(float.fromhex, ("0x1.5bba14p-10", "0x1.3cea88p-7", "0x1.c6b752p-5", "0x1.ebf9bcp-3", "0x1.62e42ap-1", "1"))
)
UNIT = 40  # the mass of the maximum is 2^40


def mass(x: Tensor, temperature: Tensor) -> Tensor:
    """w = trunc(2^40 exp((x - max) / T)) as the contract computes it, int64 [B, V]. Rows hold no NaN and no +inf."""
    return mass_at((x - x.amax(-1, keepdim=True)) * scale_of(temperature))


def scale_of(temperature: Tensor) -> Tensor:
    """c = LOG2E / T."""
    return torch.full_like(temperature, LOG2E) / temperature


def mass_at(y: Tensor) -> Tensor:
    """w of y <= 0, int64."""
    n = (y + ROUND_MAGIC) - ROUND_MAGIC
    f = y - n
    p = torch.full_like(f, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        p = p * f + coefficient
    # Where y < -60, n and f mean nothing (y may be -inf): those tokens have no mass.
    present = y >= -60
    scaled = p * power_of_two(torch.where(present, n, 0).to(torch.int32) + UNIT)
    return torch.where(present, scaled, 0).to(torch.int64)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent from its bits: torch.ldexp goes through pow, which need not be exact."""
    return ((exponent + 127) << 23).view(torch.float32)


def mass_of_probs(p: Tensor) -> Tensor:
    """w = trunc(p * 2^s), the largest of a row in [2^39, 2^40); int64 [B, V]. From the bits of p >= 0."""
    bits = (p.view(torch.int32) & 0x7FFFFFFF).to(torch.int64)
    exponent = (bits >> 23).clamp(min=1)  # p = fraction * 2^(exponent - 150)
    fraction = (bits & 0x7FFFFF) + torch.where(bits >> 23 > 0, 2**23, 0)
    at = bits.argmax(-1, keepdim=True)
    top, width = exponent.gather(1, at), fraction.gather(1, at).double().frexp().exponent
    shift = exponent - top + UNIT - width
    return (fraction << shift.clamp(min=0)) >> (-shift).clamp(0, 63)


# Stage 6b ------------------------------------------------------------------------------------------------------------


def depth(x: Tensor, temperature: Tensor) -> Tensor:
    """e = trunc(-y * 2^14), int64 [B, V]; below 2^20 where there is mass, and not meant elsewhere."""
    return depth_at((x - x.amax(-1, keepdim=True)) * scale_of(temperature))


def depth_at(y: Tensor) -> Tensor:
    """e of y <= 0, int64."""
    return (-y.clamp(min=-60) * 2.0**14).to(torch.int64)


def total_of(w: Tensor) -> Tensor:
    """Z, int64 [B, 1], of the masses of a set (0 outside of it)."""
    return w.sum(-1, keepdim=True)


def halves(w: Tensor) -> tuple[Tensor, Tensor]:
    return w >> 20, w & (2**20 - 1)


def mean_depth(w: Tensor, e: Tensor) -> Tensor:
    """E: the mean of e by mass, float64 [B, 1]."""
    high, low = ((half * e).sum(-1, keepdim=True) for half in halves(w))
    return mean_of(high, low, total_of(w))


def mean_of(high: Tensor, low: Tensor, total: Tensor) -> Tensor:
    """The mean, given the sums of both halves of the masses times what it is of."""
    return (high.double() * 2.0**20 + low.double()) / total.double()


def sum_of_squares(w: Tensor) -> Tensor:
    """Q, float64 [B, 1]."""
    high, low = halves(w)
    return squares_of(*(product.sum(-1, keepdim=True) for product in (high * high, high * low, low * low)))


def squares_of(hh: Tensor, hl: Tensor, ll: Tensor) -> Tensor:
    """The sum of squares, given those of the halves' products."""
    return (hh.double() * 2.0**20 + (2 * hl).double()) * 2.0**20 + ll.double()


def steps_below(x: Tensor, peak: Tensor) -> Tensor:
    """d: how far a logit lies below the highest, int64 [B, V]; 0 for -inf."""
    return torch.where(x > NEG_INF, ((peak - x) * 2.0**11).clamp(max=2**20 - 1), 0).to(torch.int64)


def spread(x: Tensor, peak: Tensor) -> Tensor:
    """sigma: the standard deviation of what lies above -inf, float64 [B, 1]."""
    alive = x > NEG_INF
    d = steps_below(x, peak)
    return deviation_of(*(part.sum(-1, keepdim=True) for part in (alive, d, d * d)))


def deviation_of(count: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """The standard deviation, given n, D1 and D2."""
    n, d1, d2 = count.double(), total.double(), squares.double()
    a = d1 / n
    return (d2 / n - a * a).clamp(min=0).sqrt() * 2.0**-11
