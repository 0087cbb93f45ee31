"""Stages 3 and 4: a row's first pass, and what follows from its maximum (stem of csrc/cpu/scan.h)."""

import triton
import triton.language as tl

from .candidates import store_maxima
from .filters import floors_are_late, mass_floors
from .kept import everything, store_kept, store_rest
from .keys import KEY_INF, KEY_NAN, KEY_NEG_INF, LONG_MIN, key_in, key_of, ranked
from .mass import MASS_BITS, is_greedy
from .process import load_x, penalise, repeat, uses_history
from .record import param
from .row import ids_of
from .workspace import (
    DIGITS,
    FIRST,
    LAST,
    LISTED,
    MAX_PARTS,
    MEASURES,
    NEAREST,
    PEAKS,
    SUMS,
    TOP_K,
    TOP_P,
    WHOLE,
    XTC_TOPS,
)


@triton.jit
def scan(row, counts, x_stride, HAS_COUNTS: tl.constexpr, PROBS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Stages 3 and 4: find this part's best token, and initialise the workspace."""
    best = tl.full([BLOCK], LONG_MIN, tl.int64)
    repetition, frequency = param(row.record, "repetition_penalty"), param(row.record, "frequency_penalty")
    presence = param(row.record, "presence_penalty")
    repeats = uses_history(row.record)
    for chunk in range(row.begin, row.end):
        ids = ids_of(row, chunk, BLOCK)
        value = load_x(row.x, ids, row.vocab)
        if HAS_COUNTS:
            count = tl.load(counts + ids, mask=ids < row.vocab, other=0)
            value = penalise(value, count, repetition, frequency, presence)
            if repeats:
                value = repeat(value, ids, row.vocab, counts, x_stride, row.record)
            tl.store(row.x + ids, value, mask=ids < row.vocab)
        ids, key = tl.reshape(ids, [BLOCK]), key_of(tl.reshape(value, [BLOCK]))
        if PROBS:
            key = checked(key, ids, row.vocab)
        best = tl.maximum(best, ranked(key, ids))
        tl.store(row.highest_keys + chunk, tl.max(key).to(tl.int64))
    tl.store(row.ws + PEAKS + row.part, tl.max(best))
    store_maxima(row, best, VEC, BLOCK)
    if row.part == 0:
        zeros, index = tl.zeros([8 * DIGITS], tl.int64), tl.arange(0, 8 * DIGITS)
        tl.store(row.ws + TOP_K + SUMS + index, zeros)
        tl.store(row.ws + TOP_P + SUMS + index, zeros)
        tl.store(row.ws + NEAREST + SUMS + index, zeros)
        zeros, index = tl.zeros([128], tl.int64), tl.arange(0, 128)
        tl.store(row.ws + MEASURES + index, tl.where(index == XTC_TOPS * 8 + LAST, LONG_MIN, zeros))
        tl.store(row.ws + FIRST, tl.full([], LONG_MIN, tl.int64))
        tl.store(row.ws + LISTED, tl.full([], 0, tl.int64))
        tl.store(row.ws + WHOLE, tl.full([], 0, tl.int64))
        kept = everything()
        store_rest(row.ws, kept.high)
        # Late floors are not known yet; those of a unit of 0 keep everything.
        unit = tl.full([], 1, tl.int64) << MASS_BITS
        store_kept(row.ws, mass_floors(kept, row.record, tl.where(floors_are_late(row.record), 0, unit)))


@triton.jit
def checked(key, ids, vocab):
    """Keys for stage 4: a negative probability counts as infinite, and 0 as nothing."""
    wrong = tl.where(ids < vocab, KEY_INF, KEY_NEG_INF)
    return tl.where(key > 0, key, tl.where(key == 0, KEY_NEG_INF, wrong))


@triton.jit
def status_of(best):
    """Stage 4, of the packed maximum: 1 NaN, 2 +inf, 3 nothing left, 0 valid."""
    key = key_in(best)
    low = tl.where(key == KEY_NEG_INF, 3, 0)
    return tl.where(key == KEY_NAN, 1, tl.where(key == KEY_INF, 2, low))


@triton.jit
def best_of(row):
    """The row's best token, packed, once all of its parts are scanned."""
    index = tl.arange(0, MAX_PARTS)
    return tl.max(tl.load(row.ws + PEAKS + index, mask=index < row.parts, other=LONG_MIN))


@triton.jit
def is_filtered(row, best):
    """Whether stages 6 to 8 apply: the row is valid and not greedy."""
    return (status_of(best) == 0) & (is_greedy(param(row.record, "temperature")) == 0)
