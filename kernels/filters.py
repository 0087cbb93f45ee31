"""Stage 7: the cutoffs of top-k and top-p by radix select, min-p's threshold (stem of csrc/core/filters.h).

A round narrows the cutoff's key by four bits: each program adds what it holds at or above each of 16 keys, integer
atomics sum that over the row's programs, and every program reads off the digit. The number of rounds is fixed.
"""

import triton
import triton.language as tl

from .mass import LOW30, MASS_UNIT, mass_of
from .process import load_x

BITS = tl.constexpr(4)
DIGITS = tl.constexpr(16)
INT_MIN = tl.constexpr(-(2**31))
INT_MAX = tl.constexpr(2**31 - 1)
KEY_NAN = tl.constexpr(2**31 - 1)
KEY_INF = tl.constexpr(0x7F800000)
KEY_NEG_INF = tl.constexpr(-0x7F800000)
KEY_LOWEST = tl.constexpr(-0x7F7FFFFF)  # of the lowest finite float: this cutoff keeps everything above -inf
TIES_ALL = tl.constexpr(1)
MIN_P_FIRST, JOINT = tl.constexpr(1), tl.constexpr(2)


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
def keeps(key, ids, cut_key, cut_id):
    """A cutoff is the last token kept of the rank order; the id INT_MAX keeps all that are equal to it."""
    return (key > cut_key) | ((key == cut_key) & (ids <= cut_id))


@triton.jit
def stricter(key_a, id_a, key_b, id_b):
    key = tl.maximum(key_a, key_b)
    token = tl.where(key_a > key_b, id_a, tl.where(key_a < key_b, id_b, tl.minimum(id_a, id_b)))
    return key, token


@triton.jit
def min_p_threshold(min_p):
    """Tokens of at least this mass survive. Mass is not quite monotone in x, so this is no cutoff on x."""
    return (min_p * MASS_UNIT).to(tl.int64)


@triton.jit
def may_reach(heaviest, floor):
    """Whether a chunk may hold a token of mass `floor`, given the mass of its highest logit.

    Another token of the chunk may be heavier by the unit in the last place by which mass is not monotone; what is
    allowed for here is 8 of them.
    """
    return heaviest + (heaviest >> 20) + 1 >= floor


@triton.jit
def top_p_target(top_p, total):
    """The mass that top-p's prefix must reach: max(1, floor(trunc(p * 2^30) * total / 2^30))."""
    p30 = (top_p * 1073741824.0).to(tl.int64)
    return tl.maximum(p30 * (total >> 30) + (p30 * (total & LOW30) >> 30), 1)


@triton.jit
def add_above(
    x, vocab, begin, end, chunk_max, low, shift, sums, base_key, base_id, floor, peak, scale,
    WEIGHTED: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to sums[j] the number, or the mass, of the tokens in chunks [begin, end) with key >= low + (j << shift).

    Mass counts only within the base set: tokens that the cutoff (base_key, base_id) keeps, of mass floor or more.
    """
    total = (tl.zeros([BLOCK // VEC], tl.int64 if WEIGHTED else tl.int32),) * DIGITS
    one = tl.full([], 1, tl.int32)
    lowest = tl.maximum(low, base_key)
    for chunk in range(begin, end):
        # What lies below every pivot, or below the base set, adds nothing.
        if tl.load(chunk_max + chunk) >= lowest:
            ids = chunk * BLOCK + tl.arange(0, BLOCK)
            value = load_x(x, ids, vocab)
            key = key_of(value)
            if WEIGHTED:
                weight = mass_of(value, peak, scale)
                weight = tl.where(keeps(key, ids, base_key, base_id) & (weight >= floor), weight, 0)
            else:
                weight = tl.full([BLOCK], 1, tl.int32)
            # The VEC neighbours that one thread loads are added without leaving it.
            key, weight = tl.reshape(key, [BLOCK // VEC, VEC]), tl.reshape(weight, [BLOCK // VEC, VEC])
            more = ()
            for j in tl.static_range(DIGITS):
                more = more + (total[j] + tl.sum(tl.where(key >= low + j * (one << shift), weight, 0), 1),)
            total = more
    for j in tl.static_range(DIGITS):
        tl.atomic_add(sums + j, tl.sum(total[j]).to(tl.int64), sem="relaxed")


@triton.jit
def digit_of(sums, low, above, target, shift):
    """The next bits of the cutoff's key: (key so far, weight above its bracket, weight from its bracket on)."""
    j = tl.arange(0, DIGITS)
    weight = tl.load(sums + j)
    digit = tl.sum((weight >= target).to(tl.int32)) - 1
    reached = tl.sum(tl.where(j == digit, weight, 0))
    above = tl.where(digit == DIGITS - 1, above, tl.sum(tl.where(j == digit + 1, weight, 0)))
    return low + (digit << shift), above, reached


@triton.jit
def count_equal(x, vocab, begin, end, chunk_max, chunk_sum, key, BLOCK: tl.constexpr):
    """How many tokens of each chunk have this key."""
    for chunk in range(begin, end):
        equal = 0
        if tl.load(chunk_max + chunk) >= key:
            ids = chunk * BLOCK + tl.arange(0, BLOCK)
            same = (key_of(load_x(x, ids, vocab)) == key) & (ids < vocab)
            equal = tl.sum(same.to(tl.int32))
        tl.store(chunk_sum + chunk, tl.full([], 0, tl.int64) + equal)


@triton.jit
def nth_equal(x, vocab, chunks, chunk_sum, key, nth, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Id of the nth token (from 1) of this key, in id order, from the counts of its chunks."""
    chunk, before = find(chunk_sum, chunks, nth - 1, CHUNKS)
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    same = (key_of(load_x(x, ids, vocab)) == key) & (ids < vocab)
    running = before + tl.cumsum(same.to(tl.int64), 0)
    return chunk * BLOCK + tl.sum((running < nth).to(tl.int32))


@triton.jit
def find(chunk_sum, chunks, threshold, CHUNKS: tl.constexpr):
    """The first chunk whose running sum exceeds the threshold, and the sum of those before it."""
    index = tl.arange(0, CHUNKS)
    sums = tl.load(chunk_sum + index, mask=index < chunks, other=0)
    chunk = tl.sum((tl.cumsum(sums, 0) <= threshold).to(tl.int32))
    return chunk, tl.sum(tl.where(index < chunk, sums, 0))
