"""Stage 8: the counter RNG (Philox4x32-10, Salmon et al. 2011) and the draw's threshold (csrc/core/philox.h)."""

import triton
import triton.language as tl

from .mass import multiply_high60

M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)
W0 = tl.constexpr(0x9E3779B9)
W1 = tl.constexpr(0xBB67AE85)


@triton.jit
def philox4x32_10(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 words."""
    for _ in tl.static_range(10):
        hi0, lo0 = tl.umulhi(c0, M0), c0 * M0
        hi1, lo1 = tl.umulhi(c2, M1), c2 * M1
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + W0, k1 + W1
    return c0, c1, c2, c3


PLAIN_DRAW, XTC_COIN = tl.constexpr(0), tl.constexpr(1)  # what random bits are for; no two purposes share any


@triton.jit
def uniform60(seed, offset, index, PURPOSE: tl.constexpr = PLAIN_DRAW):
    """60 uniform bits, int64, for draw `index` of the sequence `seed` at position `offset` (int64 bits)."""
    c0, c1 = offset.to(tl.uint32), (offset >> 32).to(tl.uint32)
    c2 = index.to(tl.uint32)
    c3 = tl.zeros_like(c2) + PURPOSE
    o0, o1, _, _ = philox4x32_10(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    return (o0.to(tl.int64) << 28) | (o1 >> 4).to(tl.int64)


@triton.jit
def draw_threshold(seed, offset, index, total):
    """The drawn token is the first, in id order, whose running mass exceeds this."""
    return multiply_high60(uniform60(seed, offset, index), total)


@triton.jit
def xtc_excludes(seed, offset, index, probability):
    """Whether a draw leaves out what XTC excludes."""
    return uniform60(seed, offset, index, XTC_COIN) < (probability * 1152921504606846976.0).to(tl.int64)
