"""Stage 6b: statistics of a set of tokens (stem of csrc/core/stats.h).

The sums are of integers, in any order; what is made of them takes a few binary64 operations per row, each rounded by
itself.
"""

import triton
import triton.language as tl

from .kept import Place, keeps, load_kept
from .keys import key_of
from .mass import MASS_FLOOR, mass_of
from .process import NEG_INF
from .rounded import mul
from .row import load_chunk, may_hold, sums_of_each
from .workspace import (
    COUNT,
    DISTANCES,
    HEAVIEST,
    HIGH_SUM,
    LOW_SQUARES,
    LOW_SUM,
    MASS,
    MEASURES,
    P_LESS,
    SQUARES,
    TOP_N_SIGMA,
)

HALF_MASS = tl.constexpr(20)  # a mass is upper * 2^20 + lower
LOW_HALF = tl.constexpr(2**20 - 1)


@triton.jit
def sums_of(ws, which):
    """Where the sums of a measure lie."""
    return ws + MEASURES + which * 8


@triton.jit
def by_thread(values, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the VEC neighbours that one thread loads, without leaving it."""
    return tl.sum(tl.reshape(values, [BLOCK // VEC, VEC]), 1)


@triton.jit
def measure(row, which, peak, scale, PROBS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Add up this part of what is kept so far: Z, the sums of mass times depth, or for p-less of masses squared."""
    base = load_kept(row.ws)
    mass = tl.zeros([BLOCK // VEC], tl.int64)
    high, low, squares, heaviest = mass, mass, mass, mass
    for chunk in range(row.begin, row.end):
        if may_hold(row, chunk, base, peak, scale):
            ids, value = load_chunk(row, chunk, BLOCK)
            w = mass_of(value, peak, scale)
            w = tl.where(keeps(base, Place(key_of(value), ids), w), w, 0)
            upper, lower = w >> HALF_MASS, w & LOW_HALF
            times = upper
            if not PROBS:
                times = tl.where(which == P_LESS, upper, depth_of(value, peak, scale))
            mass += by_thread(w, VEC, BLOCK)
            high += by_thread(upper * times, VEC, BLOCK)
            low += by_thread(lower * times, VEC, BLOCK)
            squares += by_thread(lower * lower, VEC, BLOCK)
            heaviest = tl.maximum(heaviest, tl.max(tl.reshape(w, [BLOCK // VEC, VEC]), 1))
    sums = sums_of(row.ws, which)
    tl.atomic_add(sums + MASS + tl.arange(0, 4), sums_of_each((mass, high, low, squares), 2), sem="relaxed")
    tl.atomic_max(sums + HEAVIEST, tl.max(heaviest), sem="relaxed")


@triton.jit
def depth_of(x, peak, scale):
    """How far y lies below 0, in units of 2^-14, int64; means nothing where there is no mass."""
    y = tl.maximum((x - peak) * scale, MASS_FLOOR)
    return (y * -16384.0).to(tl.int32).to(tl.int64)


@triton.jit
def mean_depth(sums):
    """E, float64."""
    high, low = tl.load(sums + HIGH_SUM).to(tl.float64), tl.load(sums + LOW_SUM).to(tl.float64)
    return divide(mul(high, 1048576.0) + low, tl.load(sums + MASS).to(tl.float64))


@triton.jit
def mean_logit(sums, peak, scale):
    """mu, the mean logit by mass, float32."""
    below = divide(mean_depth(sums) * 0.00006103515625, scale.to(tl.float64))
    return (peak.to(tl.float64) - below).to(tl.float32)


@triton.jit
def sum_of_squares(sums):
    """Q, float64."""
    high, cross = tl.load(sums + HIGH_SUM).to(tl.float64), (2 * tl.load(sums + LOW_SUM)).to(tl.float64)
    return mul(mul(high, 1048576.0) + cross, 1048576.0) + tl.load(sums + LOW_SQUARES).to(tl.float64)


@triton.jit
def measure_spread(row, peak, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Add up this part's tokens above -inf, and how far they lie below the peak in units of 2^-11."""
    count = tl.zeros([BLOCK // VEC], tl.int64)
    distances, squares = count, count
    for chunk in range(row.begin, row.end):
        _, value = load_chunk(row, chunk, BLOCK)
        alive = value > NEG_INF
        d = tl.where(alive, tl.minimum((peak - value) * 2048.0, 1048575.0), 0.0).to(tl.int32).to(tl.int64)
        count += by_thread(alive.to(tl.int64), VEC, BLOCK)
        distances += by_thread(d, VEC, BLOCK)
        squares += by_thread(d * d, VEC, BLOCK)
    sums = sums_of(row.ws, TOP_N_SIGMA)
    nothing = tl.zeros_like(count)
    found = sums_of_each((count, distances, squares, nothing), 2)
    tl.atomic_add(sums + COUNT + tl.arange(0, 4), found, sem="relaxed")


@triton.jit
def deviation(sums):
    """sigma, the standard deviation of the logits, float64."""
    count = tl.load(sums + COUNT).to(tl.float64)
    mean = divide(tl.load(sums + DISTANCES).to(tl.float64), count)
    variance = divide(tl.load(sums + SQUARES).to(tl.float64), count) - mul(mean, mean)
    return tl.sqrt(tl.where(variance > 0, variance, 0.0)) * 0.00048828125


@triton.jit
def divide(a, b):
    """A quotient in float64, rounded to nearest as IEEE 754 has it."""
    return a / b
