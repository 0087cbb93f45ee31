"""Stage 7: the filters that first measure what is kept, by the statistics of stage 6b (csrc/core/filters.h)."""

import triton
import triton.language as tl

from .filters import mass_floors, target_of
from .kept import (
    Place,
    everything,
    keeps,
    load_kept,
    narrow_above,
    narrow_below,
    narrow_to_mass,
    place_at,
    store_kept,
    store_rest,
)
from .keys import INT_MAX, KEY_INF, LONG_MIN, from_key, id_in, key_in, key_of, ranked
from .mass import mass_at, mass_of
from .record import param
from .row import load_chunk, may_hold, meet
from .select import add_above, settle
from .stats import deviation, divide, mean_depth, mean_logit, measure_spread, sum_of_squares, sums_of
from .workspace import (
    COUNT,
    EPSILON,
    ETA,
    HEAVIEST,
    LAST,
    LATE_FLOORS,
    MASS,
    NEAREST,
    TOP_A,
    TOP_N_SIGMA,
    TYPICAL,
    TYPICAL_ROUNDS,
    XTC,
    XTC_TOPS,
)


@triton.jit
def top_n_sigma(row, phase, peak, SPLIT: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """One of this filter's phases, numbered from 0. Keeps logits this many standard deviations below the highest."""
    if phase == 0:
        measure_spread(row, peak, VEC, BLOCK)
    elif row.part == 0:
        s = param(row.record, "top_n_sigma").to(tl.float64)
        lowest = peak - (s * deviation(sums_of(row.ws, TOP_N_SIGMA))).to(tl.float32)
        store_kept(row.ws, narrow_above(load_kept(row.ws), place_at(key_of(lowest), INT_MAX)))
    meet(row, SPLIT)


@triton.jit
def typical(row, phase, peak, scale, SPLIT: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """One of this filter's phases, numbered from 1: phase 0 measures. Keeps what is nearest to the mean logit."""
    sums, selection = sums_of(row.ws, TYPICAL), row.ws + NEAREST
    mean = mean_logit(sums, peak, scale)
    target = target_of(param(row.record, "typical_p"), tl.load(sums + MASS))
    key, _, _ = settle(row, selection, phase - 1, target)
    if phase <= TYPICAL_ROUNDS:
        add_above(row, selection, phase - 1, key, VEC, BLOCK, load_kept(row.ws), peak, scale, mean)
    elif row.part == 0:
        # All that are as near as the last one that was needed: an interval of the rank order.
        limit = -from_key(key)
        high, low = key_of(highest_near(mean, limit)), key_of(-highest_near(-mean, limit))
        kept = narrow_below(load_kept(row.ws), place_at(high, -1))
        store_kept(row.ws, narrow_above(kept, place_at(low, INT_MAX)))
    meet(row, SPLIT)


@triton.jit
def highest_near(mean, limit):
    """The highest float whose distance from the mean is at most the limit, which is the distance of some token."""
    near, far = key_of(mean).to(tl.int64), tl.full([], KEY_INF, tl.int64)
    for _ in range(32):
        middle = (near + far) >> 1
        is_near = from_key(middle.to(tl.int32)) - mean <= limit
        near, far = tl.where(is_near, middle, near), tl.where(is_near, far, middle)
    return from_key(near.to(tl.int32))


@triton.jit
def narrow_by_measure(row, which, unit, SPLIT: tl.constexpr):
    """Keep what weighs as much as a filter asks for, given what was measured for it."""
    if row.part == 0:
        sums = sums_of(row.ws, which)
        heaviest = tl.load(sums + HEAVIEST)
        floor = measured_floor(row.record, sums, which, unit.to(tl.float64))
        # At least the heaviest token stays.
        floor = tl.where(floor < heaviest.to(tl.float64), floor, heaviest.to(tl.float64)).to(tl.int64)
        store_kept(row.ws, narrow_to_mass(load_kept(row.ws), floor))
    meet(row, SPLIT)


@triton.jit
def measured_floor(record, sums, which, unit):
    """The mass that a filter asks for, float64."""
    total = tl.load(sums + MASS).to(tl.float64)
    if which == LATE_FLOORS:
        floor = mass_floors(everything(), record, tl.load(sums + HEAVIEST)).floor.to(tl.float64)
    elif which == EPSILON:
        floor = param(record, "epsilon_cutoff").to(tl.float64) * total
    elif which == ETA:
        e = param(record, "eta_cutoff").to(tl.float64)
        y = -(mean_depth(sums) * 0.00006103515625).to(tl.float32)
        linear, root = e * total, tl.sqrt(e) * mass_at(y).to(tl.float64)
        floor = tl.where(linear < root, linear, root)
    elif which == TOP_A:
        floor = (param(record, "top_a").to(tl.float64) * unit) * divide(unit, total)
    else:
        floor = divide(sum_of_squares(sums), total)
    return floor


@triton.jit
def xtc(row, phase, peak, scale, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """One of this filter's phases, numbered from 1: phase 0 measures. Excludes all top choices but the last."""
    if phase == 1:
        find_top_choices(row, peak, scale, BLOCK)
    elif row.part == 0:
        tops = sums_of(row.ws, XTC_TOPS)
        if tl.load(tops + COUNT) > 1:
            last = ~tl.load(tops + LAST)
            before = place_at(key_in(last), id_in(last) - 1)
            if param(row.record, "xtc_probability") < 1.0:
                store_rest(row.ws, before)
            else:
                store_kept(row.ws, narrow_below(load_kept(row.ws), before))
    meet(row, SPLIT)


@triton.jit
def find_top_choices(row, peak, scale, BLOCK: tl.constexpr):
    """Count this part's top choices, and find the last of them in the rank order."""
    total = tl.load(sums_of(row.ws, XTC) + MASS).to(tl.float64)
    floor = (param(row.record, "xtc_threshold").to(tl.float64) * total).to(tl.int64)
    tops = narrow_to_mass(load_kept(row.ws), floor)
    count, last = tl.zeros([BLOCK], tl.int32), tl.full([BLOCK], LONG_MIN, tl.int64)
    for chunk in range(row.begin, row.end):
        if may_hold(row, chunk, tops, peak, scale):
            ids, value = load_chunk(row, chunk, BLOCK)
            key = key_of(value)
            top = keeps(tops, Place(key, ids), mass_of(value, peak, scale))
            count += top.to(tl.int32)
            last = tl.maximum(last, tl.where(top, ~ranked(key, ids), LONG_MIN))
    sums = sums_of(row.ws, XTC_TOPS)
    tl.atomic_add(sums + COUNT, tl.sum(count).to(tl.int64), sem="relaxed")
    tl.atomic_max(sums + LAST, tl.max(last), sem="relaxed")
