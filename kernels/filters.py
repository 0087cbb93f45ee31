"""Stage 7: what top-k, top-p and min-p keep (stem of csrc/core/filters.h).

Each filter narrows the Kept in the row's workspace. One that keeps what has a certain mass, which the record alone
decides, is a function here and a line of `mass_floors`. One that cuts the rank order selects the place in phases of its
own, which workspace.py numbers.
"""

import triton
import triton.language as tl

from .kept import Kept, everything, load_kept, narrow_to_mass
from .keys import KEY_NEG_INF, from_key
from .mass import LOW30, MASS_UNIT, mass_of
from .record import choice, param
from .row import meet
from .select import add_above, cut_at, cut_equal, settle
from .workspace import SUMS, TARGET, TOP_K, TOP_P


@triton.jit
def mass_floors(kept, record):
    """All filters that are a floor on mass which the record alone decides; the scan applies them."""
    kept = min_p(kept, record)
    return kept


@triton.jit
def min_p(kept, record):
    """Mass is not quite monotone in x, so this is no cut of the rank order."""
    return narrow_to_mass(kept, (param(record, "min_p") * MASS_UNIT).to(tl.int64))


@triton.jit
def uses_top_k(record, vocab):
    k = param(record, "top_k")
    return (k > 0) & (k < vocab)


@triton.jit
def top_k(
    row, phase,
    ROUNDS: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One of this filter's phases, numbered from 0. Keeps the k highest."""
    k = param(row.record, "top_k")
    selection = row.ws + TOP_K
    if phase < ROUNDS:
        low, _, _ = settle(row, selection, phase, k)
        add_above(row, selection, phase, low, VEC, BLOCK)
        meet(row, SPLIT)
    elif phase == ROUNDS:
        key, above, reached = settle(row, selection, ROUNDS, k)
        ties = param(row.record, "ties")
        tied = (reached > k) & (key > KEY_NEG_INF) & (ties != choice("ties", "all"))
        cut_at(row, selection, key, tl.where(tied, k - above, 0), BLOCK)
        meet(row, SPLIT)
    else:
        cut_equal(row, selection, SPLIT, CHUNKS, BLOCK)


@triton.jit
def uses_top_p(record):
    return param(record, "top_p") < 1.0


@triton.jit
def top_p(
    row, phase, peak, scale,
    ROUNDS: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One of this filter's phases, numbered from 0. Keeps the shortest prefix whose mass reaches the target."""
    selection = row.ws + TOP_P
    if phase < ROUNDS:
        target = top_p_target(row, selection, phase)
        low, _, _ = settle(row, selection, phase, target)
        base = top_p_base(load_kept(row.ws), param(row.record, "order"))
        add_above(row, selection, phase, low, VEC, BLOCK, base, peak, scale)
        meet(row, SPLIT)
    elif phase == ROUNDS:
        target = top_p_target(row, selection, ROUNDS)
        key, above, reached = settle(row, selection, ROUNDS, target)
        w = mass_of(from_key(key), peak, scale)
        nth = (target - above + w - 1) // w
        tied = above + nth * w < reached
        cut_at(row, selection, key, tl.where(tied, nth, 0), BLOCK)
        meet(row, SPLIT)
    else:
        cut_equal(row, selection, SPLIT, CHUNKS, BLOCK)


@triton.jit
def top_p_base(kept, order):
    """The set that top-p measures: what is kept so far, where floors on mass count only if they come first."""
    floor = tl.where(order == choice("order", "min_p_first"), kept.floor, 0)
    if order == choice("order", "joint"):
        kept = everything()
    return Kept(kept.high, kept.low, floor)


@triton.jit
def top_p_target(row, selection, phase):
    """max(1, floor(trunc(p * 2^30) * total / 2^30)). The total is the first round's sum at its lowest pivot."""
    target = tl.full([], 1, tl.int64)
    if phase == 1:
        total = tl.load(selection + SUMS)
        p30 = (param(row.record, "top_p") * 1073741824.0).to(tl.int64)
        target = tl.maximum(p30 * (total >> 30) + (p30 * (total & LOW30) >> 30), 1)
        if row.part == 0:
            tl.store(selection + TARGET, target)
    if phase > 1:
        target = tl.load(selection + TARGET)
    return target
