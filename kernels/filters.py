"""Stage 7: what the filters keep (stem of csrc/core/filters.h).

Each filter narrows the Kept in the row's workspace. One that keeps what has a certain mass, which the record and the
heaviest mass decide, is a function here and a line of `mass_floors`. One that cuts the rank order selects the place in
phases of its own, which workspace.py numbers, and one whose floor depends on more of what is kept measures that first
(measured.py).
"""

import triton
import triton.language as tl

from .kept import Kept, everything, load_kept, narrow_to_mass
from .keys import KEY_NEG_INF, from_key
from .mass import LOW30, MASS_BITS, mass_of
from .record import choice, param
from .row import meet
from .select import add_above, cut_at, cut_equal, settle
from .workspace import MOST, SUMS, TARGET, TOP_K, TOP_P, first_phase, phase_bits


@triton.jit
def mass_floors(kept, record, unit):
    """All filters that are a floor on mass relative to `unit`, the heaviest mass that is kept so far."""
    kept = min_p(kept, record, unit)
    return kept


@triton.jit
def min_p(kept, record, unit):
    """Mass is not quite monotone in x, so this is no cut of the rank order."""
    return narrow_to_mass(kept, (param(record, "min_p").to(tl.float64) * unit.to(tl.float64)).to(tl.int64))


@triton.jit
def floors_are_late(record):
    """Whether typical, which may leave out the maximum, comes before the floors on mass."""
    return (param(record, "order") == choice("order", "temperature_last")) & (param(record, "typical_p") < 1.0)


@triton.jit
def phases_on(record, vocab, ROUNDS: tl.constexpr):
    """The phases of the filters that are on, as bits of an int64."""
    k = param(record, "top_k")
    on = bits_where((k > 0) & (k < vocab), phase_bits("top_k", ROUNDS))
    on |= bits_where((k > 0) & (k < vocab) & (k <= MOST), phase_bits("candidates", ROUNDS))
    on |= bits_where(param(record, "top_p") < 1.0, phase_bits("top_p", ROUNDS))
    on |= bits_where(param(record, "top_n_sigma") > 0.0, phase_bits("top_n_sigma", ROUNDS))
    on |= bits_where(param(record, "typical_p") < 1.0, phase_bits("typical", ROUNDS))
    unit = tl.full([], 1, tl.int64) << MASS_BITS
    floors = floors_are_late(record) & (mass_floors(everything(), record, unit).floor > 0)
    on |= bits_where(floors, phase_bits("late_floors", ROUNDS))
    on |= bits_where(param(record, "epsilon_cutoff") > 0.0, phase_bits("epsilon", ROUNDS))
    on |= bits_where(param(record, "eta_cutoff") > 0.0, phase_bits("eta", ROUNDS))
    on |= bits_where(param(record, "top_a") > 0.0, phase_bits("top_a", ROUNDS))
    on |= bits_where(param(record, "p_less") != 0, phase_bits("p_less", ROUNDS))
    return on | bits_where(param(record, "xtc_probability") > 0.0, phase_bits("xtc", ROUNDS))


@triton.jit
def bits_where(flag, BITS: tl.constexpr):
    return tl.where(flag, tl.full([], BITS, tl.int64), 0)


@triton.jit
def top_k(row, phase, SPLIT: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """One of this filter's rounds, numbered from 0. Keeps the k highest."""
    low, _, _ = settle(row, row.ws + TOP_K, phase, param(row.record, "top_k"))
    add_above(row, row.ws + TOP_K, phase, low, VEC, BLOCK)
    meet(row, SPLIT)


@triton.jit
def top_p(row, phase, peak, scale, SPLIT: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """One of this filter's rounds, numbered from 0. Keeps the shortest prefix whose mass reaches the target."""
    selection = row.ws + TOP_P
    low, _, _ = settle(row, selection, phase, top_p_target(row, selection, phase))
    base = top_p_base(load_kept(row.ws), param(row.record, "order"))
    add_above(row, selection, phase, low, VEC, BLOCK, base, peak, scale)
    meet(row, SPLIT)


@triton.jit
def cut(
    row, phase, peak, scale,
    ROUNDS: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One of the two phases of top-k or top-p that follow the rounds: the lowest key, then the last of its tokens."""
    of_top_p = phase >= first_phase("top_p", ROUNDS)
    selection = row.ws + tl.where(of_top_p, TOP_P, TOP_K)
    if (phase == first_phase("top_p", ROUNDS) - 1) | (phase == first_phase("typical", ROUNDS) - 1):
        cut_equal(row, selection, SPLIT, CHUNKS, BLOCK)
    else:
        target = param(row.record, "top_k").to(tl.int64)
        if of_top_p:
            target = top_p_target(row, selection, ROUNDS)
        key, above, reached = settle(row, selection, ROUNDS, target)
        nth = target - above
        tied = (reached > target) & (key > KEY_NEG_INF) & (param(row.record, "ties") != choice("ties", "all"))
        if of_top_p:
            w = mass_of(from_key(key), peak, scale)
            nth = (nth + w - 1) // w
            tied = above + nth * w < reached
        cut_at(row, selection, key, tl.where(tied, nth, 0), BLOCK)
        meet(row, SPLIT)


@triton.jit
def top_p_base(kept, order):
    """The set that top-p measures: what is kept so far, where floors on mass count only if they come first."""
    floor = tl.where(order == choice("order", "min_p_first"), kept.floor, 0)
    if order == choice("order", "joint"):
        kept = everything()
    return Kept(kept.high, kept.low, floor)


@triton.jit
def top_p_target(row, selection, phase):
    """The total is the first round's sum at its lowest pivot."""
    target = tl.full([], 1, tl.int64)
    if phase == 1:
        target = target_of(param(row.record, "top_p"), tl.load(selection + SUMS))
        if row.part == 0:
            tl.store(selection + TARGET, target)
    if phase > 1:
        target = tl.load(selection + TARGET)
    return target


@triton.jit
def target_of(p, total):
    """The mass to reach: max(1, floor(trunc(p * 2^30) * total / 2^30))."""
    p30 = (p * 1073741824.0).to(tl.int64)
    return tl.maximum(p30 * (total >> 30) + (p30 * (total & LOW30) >> 30), 1)
