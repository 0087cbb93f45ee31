"""Top-k, and top-p behind it, by a list of the tokens that may be kept: one pass finds them, one program orders them.

The scan leaves the highest keys of many groups of tokens. At least k tokens reach the k-th largest of those keys, so
whatever top-k keeps is among them, and as there are more groups than k, few others are. Where more tokens reach it than
the list holds, as in a row of equal logits, the rounds of select.py find the same cuts.
"""

import triton
import triton.language as tl

from .filters import floors_are_late, target_of, top_p_base
from .kept import Place, load_kept, mass_if_kept, narrow_above, place_at, store_kept
from .keys import INT_MAX, INT_MIN, LONG_MIN, from_key, id_in, key_in, key_of, ranked
from .mass import mass_of
from .record import choice, param
from .row import load_chunk
from .stats import by_thread
from .workspace import (
    BY_ID,
    BY_RANK,
    CANDIDATES,
    FEW_DRAWS,
    GROUPS,
    LIST,
    LISTED,
    MAXIMA,
    WHOLE,
    bound_rounds,
    groups_of_threads,
    measured_bits,
    phase_bits,
)

WIDTH = tl.constexpr(256)  # tokens that are put in order at a time
UNROLLED = tl.constexpr(4)


@triton.jit
def groups_of_part(row, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """The number of groups that one program's tokens fall into: the more programs, the fewer."""
    fold = tl.where(row.parts > 4, 1, 0) + tl.where(row.parts > 16, 1, 0) + tl.where(row.parts > 64, 1, 0)
    return tl.maximum(groups_of_threads(BLOCK // VEC, 0) >> 2 * fold, 1)


@triton.jit
def store_maxima(row, best, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Leave the highest key of each group: of what one thread has seen, or several threads."""
    groups = groups_of_part(row, VEC, BLOCK)
    for fold in tl.static_range(4):
        if groups == groups_of_threads(BLOCK // VEC, fold):
            store_maxima_of(row, best, groups_of_threads(BLOCK // VEC, fold), BLOCK)


@triton.jit
def store_maxima_of(row, best, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    highest = tl.max(tl.reshape(key_in(best), [SIZE, BLOCK // SIZE]), 1)
    tl.store(row.ws + MAXIMA + row.part * SIZE + tl.arange(0, SIZE), highest.to(tl.int64))


@triton.jit
def find_bound(row, ROUNDS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """A key that at least k tokens reach, if so many are above -inf: the k-th largest maximum, its last bits 0."""
    k, index = param(row.record, "top_k"), tl.arange(0, GROUPS)
    there = index < row.parts * groups_of_part(row, VEC, BLOCK)
    key = tl.load(row.ws + MAXIMA + index, mask=there, other=INT_MIN).to(tl.int32)
    low = tl.full([], INT_MIN, tl.int32)
    for turn in range(bound_rounds(ROUNDS)):
        shift = tl.full([], 30, tl.uint32) - 2 * turn
        digit = (key.to(tl.uint32, bitcast=True) - low.to(tl.uint32, bitcast=True)) >> shift
        # Four counts in one reduction.
        one = tl.full([GROUPS], 1, tl.int64) << (tl.minimum(digit, 3) * 16).to(tl.int64)
        counts = tl.sum(tl.where(key >= low, one, 0))
        third = counts >> 48
        second = third + ((counts >> 32) & 0xFFFF)
        first = second + ((counts >> 16) & 0xFFFF)
        found = (third >= k).to(tl.int32) + (second >= k).to(tl.int32) + (first >= k).to(tl.int32)
        low += found << shift.to(tl.int32)
    return low


@triton.jit
def collect(row, peak, scale, ROUNDS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """List this part's tokens that reach the bound; add up all of its mass where top-p is judged by that."""
    lowest = tl.maximum(find_bound(row, ROUNDS, VEC, BLOCK), load_kept(row.ws).low.key)
    weighs = (param(row.record, "order") == choice("order", "joint")) & (param(row.record, "top_p") < 1.0)
    whole = tl.zeros([BLOCK // VEC], tl.int64)
    for chunk in range(row.begin, row.end):
        reached = tl.load(row.highest_keys + chunk) >= lowest
        if reached | weighs:
            ids, value = load_chunk(row, chunk, BLOCK)
            if weighs:
                whole += by_thread(mass_of(value, peak, scale), VEC, BLOCK)
            if reached:
                # A list that is full already takes no more atomics: they would be as many as the row has tokens.
                full = tl.load(row.ws + LISTED, volatile=True) > CANDIDATES
                key = key_of(value)
                found = key >= tl.where(full, INT_MAX, lowest)
                places = row.ws + LISTED + tl.zeros([BLOCK], tl.int32)
                at = tl.atomic_add(places, tl.full([BLOCK], 1, tl.int64), mask=found, sem="relaxed")
                tl.store(row.ws + LIST + at, ranked(key, ids), mask=found & (at < CANDIDATES))
    if weighs:
        tl.atomic_add(row.ws + WHOLE, tl.sum(whole), sem="relaxed")


@triton.jit
def after_collecting(row, on, count, ROUNDS: tl.constexpr):
    """The phases that are on (bits) once candidates are collected: the list's, or the rounds of selection.

    Where nothing follows but few draws, they are made from the list, and no chunk need be weighed.
    """
    if on & phase_bits("candidates", ROUNDS) != 0:
        if tl.load(row.ws + LISTED) > CANDIDATES:
            on &= ~tl.full([], phase_bits("candidates", ROUNDS), tl.int64)
        else:
            on &= ~tl.full([], phase_bits("top_k", ROUNDS), tl.int64)
            if floors_are_late(row.record) == 0:
                on &= ~tl.full([], phase_bits("top_p", ROUNDS), tl.int64)
            if (on & measured_bits(ROUNDS) == 0) & (count <= FEW_DRAWS):
                on &= ~tl.full([], phase_bits("weigh", ROUNDS), tl.int64)
    return on


@triton.jit
def draws_from_list(on, ROUNDS: tl.constexpr):
    """Whether the first program alone ends the row, given the phases that are on after collecting."""
    both = tl.full([], phase_bits("candidates", ROUNDS) | phase_bits("weigh", ROUNDS), tl.int64)
    return on & both == phase_bits("candidates", ROUNDS)


@triton.jit
def choose(row, peak, scale):
    """Top-k, then top-p unless something comes between them, by one program."""
    arrange(row)
    kept, k = load_kept(row.ws), param(row.record, "top_k")
    if k <= tl.load(row.ws + LISTED):
        last = tl.load(row.ws + BY_RANK + k - 1)
        tied = param(row.record, "ties") == choice("ties", "all")
        kept = narrow_above(kept, place_at(key_in(last), tl.where(tied, INT_MAX, id_in(last))))
    if (param(row.record, "top_p") < 1.0) & (floors_are_late(row.record) == 0):
        order = param(row.record, "order")
        mass = mass_listed(row, BY_RANK, top_p_base(kept, order), peak, scale, scale)
        total = tl.where(order == choice("order", "joint"), tl.load(row.ws + WHOLE), tl.sum(mass))
        target = target_of(param(row.record, "top_p"), total)
        at = tl.sum((tl.cumsum(mass, 0) < target).to(tl.int32))
        if at < tl.load(row.ws + LISTED):
            last = tl.load(row.ws + BY_RANK + at)
            kept = narrow_above(kept, place_at(key_in(last), id_in(last)))
    store_kept(row.ws, kept)


@triton.jit
def arrange(row):
    """Write the list in the rank order and in that of ids: a token's place is the number of those before it."""
    count = tl.load(row.ws + LISTED).to(tl.int32)
    for start in range(0, count, WIDTH):
        here = start + tl.arange(0, WIDTH)
        own = tl.load(row.ws + LIST + here, mask=here < count, other=LONG_MIN)
        by_rank, by_id = tl.zeros([WIDTH], tl.int32), tl.zeros([WIDTH], tl.int32)
        for at in range(0, count, UNROLLED):
            for j in tl.static_range(UNROLLED):
                other = tl.where(count > at + j, tl.load(row.ws + LIST + at + j), LONG_MIN)
                by_rank += (other > own).to(tl.int32)
                by_id += (other.to(tl.int32) > own.to(tl.int32)).to(tl.int32)  # the half that falls with the id
        tl.store(row.ws + BY_RANK + by_rank, own, mask=here < count)
        tl.store(row.ws + BY_ID + by_id, own, mask=here < count)
    tl.debug_barrier()


@triton.jit
def mass_listed(row, order, kept, peak, scale, drawn):
    """Masses to draw from of the candidates in an order, where kept, else 0."""
    index = tl.arange(0, CANDIDATES)
    token = tl.load(row.ws + order + index, mask=index < tl.load(row.ws + LISTED), other=LONG_MIN)  # ranks last
    key = key_in(token)
    return mass_if_kept(kept, Place(key, id_in(token)), from_key(key), peak, scale, drawn)
