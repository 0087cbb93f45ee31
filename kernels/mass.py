"""Stage 6: integer probability mass, and exact arithmetic on sums of it (stem of csrc/core/mass.h).

Each float operation below is rounded by itself: rounded.py says how.
"""

import triton
import triton.language as tl

from .keys import INT_MAX
from .record import choice, param
from .rounded import div, mul

LOG2E = tl.constexpr(float.fromhex("0x1.715476p+0"))
GREEDY_BELOW = tl.constexpr(1e-5)
ROUND_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a small float to an integer
MASS_FLOOR = tl.constexpr(-60.0)  # below this y there is no mass (in fact, below about -41)
MASS_BITS = tl.constexpr(40)  # the maximum weighs 2^40
MASS_UNIT = tl.constexpr(2.0**40)
LOW30 = tl.constexpr(2**30 - 1)
C1 = tl.constexpr(float.fromhex("0x1.62e42ap-1"))
C2 = tl.constexpr(float.fromhex("0x1.ebf9bcp-3"))
C3 = tl.constexpr(float.fromhex("0x1.c6b752p-5"))
C4 = tl.constexpr(float.fromhex("0x1.3cea88p-7"))
C5 = tl.constexpr(float.fromhex("0x1.5bba14p-10"))


@triton.jit
def is_greedy(temperature):
    return temperature < GREEDY_BELOW


@triton.jit
def mass_scale(temperature):
    """What (x - max) is multiplied by; a greedy row counts as T = 1."""
    t = tl.where(is_greedy(temperature), 1.0, temperature)
    return div(tl.full([], LOG2E, tl.float32), t)


@triton.jit
def drawn_scale(record, peak, PROBS: tl.constexpr):
    """What `mass_of` needs beside the peak for the masses that are drawn from."""
    if PROBS:
        return probability_shift(peak)
    else:
        return mass_scale(param(record, "temperature"))


@triton.jit
def scales_of(record, peak, PROBS: tl.constexpr):
    """The same for the masses that the filters judge by, and for those that are drawn from."""
    drawn = drawn_scale(record, peak, PROBS)
    judged = drawn
    if not PROBS:
        last = param(record, "order") == choice("order", "temperature_last")
        judged = tl.where(last, LOG2E, drawn)
    return judged, drawn


@triton.jit
def mass_of_peak(peak, PROBS: tl.constexpr):
    """The mass of a row's maximum."""
    if PROBS:
        return mass_of_probability(peak, probability_shift(peak))
    else:
        return tl.full([], 1, tl.int64) << MASS_BITS


@triton.jit
def exp2_polynomial(f):
    """exp2(f) for |f| <= 1/2."""
    p = mul(f, C5) + C4
    p = mul(p, f) + C3
    p = mul(p, f) + C2
    p = mul(p, f) + C1
    return mul(p, f) + 1.0


@triton.jit
def mass_of(x, peak, scale):
    """w, int64, of logits, or of probabilities where the scale is a shift (int32), which says all about the peak."""
    if scale.dtype == tl.int32:
        return mass_of_probability(x, scale)
    else:
        return mass_at((x - peak) * scale)


@triton.jit
def mass_at(y):
    """trunc(2^40 * exp2(y)) for y <= 0, which may be -inf."""
    # At the floor the mass is 2^-20, which truncates to 0, so clamping replaces the contract's test of y.
    y = tl.maximum(y, MASS_FLOOR)
    t = y + ROUND_MAGIC
    p = exp2_polynomial(y - (t - ROUND_MAGIC))
    # t's low bits are n: shifted into the exponent they make p * 2^n; p is in [0.7, 1.42], so it stays normal.
    bits = p.to(tl.int32, bitcast=True) + (t.to(tl.int32, bitcast=True) << 23) + (MASS_BITS << 23)
    return bits.to(tl.float32, bitcast=True).to(tl.int64)


@triton.jit
def binary_of(p):
    """(significand, exponent), int32, such that p = significand * 2^(exponent - 150), for p >= 0."""
    bits = p.to(tl.int32, bitcast=True) & INT_MAX
    exponent, fraction = bits >> 23, bits & 0x7FFFFF
    return tl.where(exponent > 0, fraction | 0x800000, fraction), tl.maximum(exponent, 1)


@triton.jit
def probability_shift(largest):
    """What brings the mass of a row's largest probability to [2^39, 2^40)."""
    significand, exponent = binary_of(largest)
    width = (significand.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    return -(width + exponent - MASS_BITS)


@triton.jit
def mass_of_probability(p, shift):
    """w = trunc(p * 2^s), int64, by integers, so that subnormal numbers are like others."""
    significand, exponent = binary_of(p)
    by = tl.minimum(exponent + shift, MASS_BITS)  # the minimum is for what lies past the vocabulary
    left, right = tl.maximum(by, 0), tl.minimum(tl.maximum(-by, 0), 63)
    return (significand.to(tl.int64) << left.to(tl.int64)) >> right.to(tl.int64)


@triton.jit
def may_reach(heaviest, floor):
    """Whether a chunk may hold a token of mass `floor`, given the mass of its highest logit.

    Mass is monotone in x but for a unit in the last place, so another token may be heavier by that; 8 are allowed for.
    """
    return heaviest + (heaviest >> 20) + 1 >= floor


@triton.jit
def multiply_high60(a, b):
    """floor(a * b / 2^60) for int64 a < 2^60, b <= 2^60, in halves of 30 bits."""
    a1, a0 = a >> 30, a & LOW30
    b1, b0 = b >> 30, b & LOW30
    return a1 * b1 + ((a1 * b0 + a0 * b1 + (a0 * b0 >> 30)) >> 30)
