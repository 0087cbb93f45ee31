"""Radix selection: the key at which a weight, summed from the highest key down, reaches a target.

A round resolves four bits of the key: each program adds up what it holds at or above each of 16 keys, integer atomics
sum that over the row's programs, and every program reads off the digit. The number of rounds is fixed.
"""

import triton
import triton.language as tl

from .kept import Place, keeps, load_kept, narrow_above, place_at, store_kept
from .keys import INT_MAX, INT_MIN, key_of
from .mass import mass_of
from .row import find_chunk, load_chunk, meet, sums_of_each
from .workspace import ABOVE, BITS, CUT, DIGITS, LOW, NTH, SUMS


@triton.jit
def settle(row, selection, turn, target):
    """What rounds 0 to turn - 1 have found: (key, weight above, weight reached). The first program stores it."""
    low, above, reached = tl.full([], INT_MIN, tl.int32), tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if turn > 0:
        if turn > 1:
            low = tl.load(selection + LOW + turn - 1).to(tl.int32)
            above = tl.load(selection + ABOVE + turn - 1)
        sums = selection + SUMS + (turn - 1) * DIGITS
        low, above, reached = digit_of(sums, low, above, target, 32 - BITS * turn)
        if row.part == 0:
            tl.store(selection + LOW + turn, low.to(tl.int64))
            tl.store(selection + ABOVE + turn, above)
    return low, above, reached


@triton.jit
def digit_of(sums, low, above, target, shift):
    """The next bits of the key: (key so far, weight above its bracket, weight from its bracket on)."""
    j = tl.arange(0, DIGITS)
    weight = tl.load(sums + j)
    digit = tl.sum((weight >= target).to(tl.int32)) - 1
    reached = tl.sum(tl.where(j == digit, weight, 0))
    above = tl.where(digit == DIGITS - 1, above, tl.sum(tl.where(j == digit + 1, weight, 0)))
    return low + (digit << shift), above, reached


@triton.jit
def add_above(
    row, selection, turn, low,
    VEC: tl.constexpr, BLOCK: tl.constexpr, base=None, peak=None, scale=None, mean=None,
):  # fmt: skip
    """Round `turn`: add to the j-th sum the number of this part's tokens with key >= low + (j << shift).

    With a base set (a Kept), add the mass of those that are in it instead. With a mean, the key is not that of x but
    the higher, the nearer x is to it.
    """
    weighted: tl.constexpr = base is not None
    centred: tl.constexpr = mean is not None
    shift = tl.full([], 32, tl.int32) - BITS * (turn + 1)
    total = ()
    for _ in tl.static_range(DIGITS):
        total = total + (tl.zeros([BLOCK // VEC], tl.int64 if weighted else tl.int32),)
    lowest = base.low.key if centred else tl.maximum(low, base.low.key) if weighted else low
    for chunk in range(row.begin, row.end):
        highest = tl.load(row.highest_keys + chunk).to(tl.int32)
        # What lies below every pivot, or below the base set, adds nothing.
        if highest >= lowest:
            ids, value = load_chunk(row, chunk, BLOCK)
            key = key_of(value)
            if weighted:
                weight = mass_of(value, peak, scale)
                weight = tl.where(keeps(base, Place(key, ids), weight), weight, 0)
            else:
                weight = tl.full([BLOCK], 1, tl.int32)
            if centred:
                key = -tl.abs(value - mean).to(tl.int32, bitcast=True)  # the order of the bits is that of the distance
            digit = digit_above(key, low, shift)
            weight = tl.where(key >= low, weight, 0)
            # The VEC neighbours that one thread loads are added without leaving it.
            digit, weight = tl.reshape(digit, [BLOCK // VEC, VEC]), tl.reshape(weight, [BLOCK // VEC, VEC])
            if weighted:
                # Each pivot in a branch of its own: what is added all at once takes more registers than there are for
                # sm_120. Pivots above the chunk's highest key are left out; by distance from a mean, none is.
                most = (row.chunks + DIGITS).to(tl.uint32) if centred else digit_above(highest, low, shift)
                for j in tl.static_range(DIGITS):
                    if most >= j:
                        total = added(total, digit, weight, j, j + 1)
            else:
                total = added(total, digit, weight, 0, DIGITS)
    sums = selection + SUMS + turn * DIGITS + tl.arange(0, DIGITS)
    tl.atomic_add(sums, sums_of_each(total, BITS).to(tl.int64), sem="relaxed")


@triton.jit
def digit_above(key, low, shift):
    """The digit of keys from `low` on, more above the round's bracket: compared with constants, not with 16 pivots."""
    return (key.to(tl.uint32, bitcast=True) - low.to(tl.uint32, bitcast=True)) >> shift.to(tl.uint32)


@triton.jit
def added(total, digit, weight, BEGIN: tl.constexpr, END: tl.constexpr):
    """The sums, with what reaches the pivots BEGIN to END - 1 added to theirs."""
    more = ()
    for j in tl.static_range(DIGITS):
        if j >= BEGIN and j < END:
            more = more + (total[j] + tl.sum(tl.where(digit >= j, weight, 0), 1),)
        else:
            more = more + (total[j],)
    return more


@triton.jit
def cut_at(row, selection, key, nth, BLOCK: tl.constexpr):
    """Keep the tokens at or above `key`; of those equal to it, only the first `nth` in id order (0: all of them).

    The next phase, `cut_equal`, finds the nth from the number of equal tokens that this one counts per chunk.
    """
    if row.part == 0:
        tl.store(selection + CUT, key.to(tl.int64))
        tl.store(selection + NTH, nth.to(tl.int64))
        store_kept(row.ws, narrow_above(load_kept(row.ws), place_at(key, INT_MAX)))
    if nth > 0:
        for chunk in range(row.begin, row.end):
            equal = 0
            if tl.load(row.highest_keys + chunk) >= key:
                ids, value = load_chunk(row, chunk, BLOCK)
                equal = tl.sum(((key_of(value) == key) & (ids < row.vocab)).to(tl.int32))
            tl.store(row.chunk_sums + chunk, tl.full([], 0, tl.int64) + equal)


@triton.jit
def cut_equal(row, selection, SPLIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Cut among the tokens equal to the key, where `cut_at` asked for it."""
    nth = tl.load(selection + NTH)
    if nth > 0:
        if row.part == 0:
            key = tl.load(selection + CUT).to(tl.int32)
            chunk, before = find_chunk(row, row.chunk_sums, nth - 1, CHUNKS)
            ids, value = load_chunk(row, chunk, BLOCK)
            same = (key_of(value) == key) & (ids < row.vocab)
            running = tl.cumsum(same.to(tl.int32), 0)
            last = chunk * BLOCK + tl.sum((running < (nth - before).to(tl.int32)).to(tl.int32))
            store_kept(row.ws, narrow_above(load_kept(row.ws), place_at(key, last)))
        meet(row, SPLIT)
