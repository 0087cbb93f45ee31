"""Integers that have the order of logits, and integers that have the rank order of tokens."""

import triton
import triton.language as tl

INT_MIN = tl.constexpr(-(2**31))
INT_MAX = tl.constexpr(2**31 - 1)
LONG_MIN = tl.constexpr(-(2**63))
KEY_NAN = tl.constexpr(2**31 - 1)
KEY_INF = tl.constexpr(0x7F800000)
KEY_NEG_INF = tl.constexpr(-0x7F800000)
KEY_LOWEST = tl.constexpr(-0x7F7FFFFF)  # of the lowest finite float


@triton.jit
def key_of(x):
    """Order-preserving int32; -0.0 and +0.0 share key 0, and every NaN lies above +inf."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, -(bits & INT_MAX), bits)
    return tl.where(x != x, KEY_NAN, key)


@triton.jit
def from_key(key):
    bits = tl.where(key < 0, (-key) | INT_MIN, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def ranked(key, ids):
    """Tokens packed into int64: the higher in the rank order, the greater."""
    return (key.to(tl.int64) << 32) | (INT_MAX - ids)


@triton.jit
def key_in(token):
    return (token >> 32).to(tl.int32)


@triton.jit
def id_in(token):
    return (token & INT_MAX).to(tl.int32) ^ INT_MAX
