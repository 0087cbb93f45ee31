"""Stage 6: integer probability mass, and exact arithmetic on sums of it (stem of csrc/core/mass.h).

The kernels are compiled with enable_fp_fusion=False, so that each float operation below is rounded by itself.
"""

import triton
import triton.language as tl

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
    return tl.div_rn(tl.full([], LOG2E, tl.float32), t)


@triton.jit
def exp2_polynomial(f):
    """exp2(f) for |f| <= 1/2."""
    p = f * C5 + C4
    p = p * f + C3
    p = p * f + C2
    p = p * f + C1
    return p * f + 1.0


@triton.jit
def mass_of(x, peak, scale):
    """w = trunc(2^40 * exp2(y)), int64, for y = (x - peak) * scale <= 0; y may be -inf."""
    # At the floor the mass is 2^-20, which truncates to 0, so clamping replaces the contract's test of y.
    y = tl.maximum((x - peak) * scale, MASS_FLOOR)
    t = y + ROUND_MAGIC
    p = exp2_polynomial(y - (t - ROUND_MAGIC))
    # t's low bits are n: shifted into the exponent they make p * 2^n; p is in [0.7, 1.42], so it stays normal.
    bits = p.to(tl.int32, bitcast=True) + (t.to(tl.int32, bitcast=True) << 23) + (MASS_BITS << 23)
    return bits.to(tl.float32, bitcast=True).to(tl.int64)


@triton.jit
def multiply_high60(a, b):
    """floor(a * b / 2^60) for int64 a < 2^60, b <= 2^60, in halves of 30 bits."""
    a1, a0 = a >> 30, a & LOW30
    b1, b0 = b >> 30, b & LOW30
    return a1 * b1 + ((a1 * b0 + a0 * b1 + (a0 * b0 >> 30)) >> 30)
