"""The pipeline, logits to token, for one row split over many programs (stem of csrc/cpu/sample.cc).

One kernel runs the steps below, in order; each is one or more phases, and a row's programs meet at a barrier after each
phase. A cooperative launch has all programs on the device at once, so that barrier is in device memory and the whole
pipeline is one launch. Where a single program has the row, it is a block barrier. Since programs share nothing but the
workspace, a phase may also be a launch of its own: Triton's interpreter, which runs programs one after another, runs
split rows that way.

    scan         stages 3 and 4: penalties and history edits, the row's maximum, each chunk's highest key; floors
    mass_floors  those of probabilities, whose unit is known after the scan
    top_n_sigma  stage 7, as all steps down to xtc, each skipped where it is off: sums, then the cut
    top_k        rounds of selection, then a cut among equal tokens
    top_p        likewise
    typical      sums, rounds of selection, the interval; before top_p in "temperature_last"
    late_floors  those of "temperature_last" with typical: the heaviest mass that is kept, then the floors
    epsilon, eta, top_a, p_less
                 sums, then the floor, one filter after the other
    xtc          sums, the top choices, what is excluded
    weigh        the kept mass of each chunk, and what XTC leaves of it
    draw         stage 8: each draw's chunk, then its token

The workspace holds sums and maxima of integers, so nothing depends on the order of atomics. The scan initialises it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .filters import cut, floors_are_late, mass_floors, phases_on, top_k, top_p
from .kept import (
    Place,
    drawn_from,
    everything,
    excludes,
    keeps,
    last_top_choice,
    load_kept,
    narrow_above,
    only,
    place_at,
    store_kept,
    store_rest,
)
from .keys import INT_MAX, KEY_INF, KEY_NAN, KEY_NEG_INF, LONG_MIN, from_key, id_in, key_in, key_of, ranked
from .mass import MASS_BITS, drawn_scale, is_greedy, judged_scale, mass_of
from .measured import narrow_by_measure, top_n_sigma, typical, xtc
from .philox import draw_threshold, xtc_excludes
from .process import load_x, penalise, repeat, uses_history
from .record import choice, param
from .row import Row, find_chunk, ids_of, load_chunk, may_hold, meet, sum_of_chunks
from .stats import measure
from .verify import settle
from .workspace import (
    CHUNK_SUMS,
    DIGITS,
    FIRST,
    LAST,
    LATE_FLOORS,
    MAX_PARTS,
    MEASURES,
    NEAREST,
    PEAK,
    PEAKS,
    REST,
    SUMS,
    TOP_K,
    TOP_P,
    TOTAL,
    TYPICAL,
    XTC,
    XTC_TOPS,
    cutting_bits,
    first_phase,
    measuring_bits,
    phase_bits,
)


class Draws(NamedTuple):
    """Pointers to what a row's draws come from and to where they go."""

    seed: tl.tensor
    offset: tl.tensor
    step: tl.tensor  # of this row from the one at the offset
    status: tl.tensor
    tokens: tl.tensor  # [count]
    count: tl.tensor  # num_samples


@triton.jit
def scan(row, counts, x_stride, HAS_COUNTS: tl.constexpr, PROBS: tl.constexpr, BLOCK: tl.constexpr):
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
    if row.part == 0:
        zeros, index = tl.zeros([8 * DIGITS], tl.int64), tl.arange(0, 8 * DIGITS)
        tl.store(row.ws + TOP_K + SUMS + index, zeros)
        tl.store(row.ws + TOP_P + SUMS + index, zeros)
        tl.store(row.ws + NEAREST + SUMS + index, zeros)
        zeros, index = tl.zeros([128], tl.int64), tl.arange(0, 128)
        tl.store(row.ws + MEASURES + index, tl.where(index == XTC_TOPS * 8 + LAST, LONG_MIN, zeros))
        tl.store(row.ws + FIRST, tl.full([], LONG_MIN, tl.int64))
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
def probability_floors(row, peak, scale, SPLIT: tl.constexpr):
    """What is above 0, and of the mass that floors ask for."""
    if row.part == 0:
        kept = narrow_above(everything(), place_at(1, INT_MAX))
        store_kept(row.ws, mass_floors(kept, row.record, mass_of(peak, peak, scale)))
    meet(row, SPLIT)


@triton.jit
def status_of(best):
    """Stage 4, of the packed maximum: 1 NaN, 2 +inf, 3 nothing left, 0 valid."""
    key = key_in(best)
    low = tl.where(key == KEY_NEG_INF, 3, 0)
    return tl.where(key == KEY_NAN, 1, tl.where(key == KEY_INF, 2, low))


@triton.jit
def kept_mass(row, kept, chunk, peak, scale, drawn, BLOCK: tl.constexpr):
    """Mass to draw from of a chunk's tokens where kept, else 0."""
    ids, value = load_chunk(row, chunk, BLOCK)
    w = mass_of(value, peak, scale)
    inside = keeps(kept, Place(key_of(value), ids), w)
    if drawn != scale:
        w = mass_of(value, peak, drawn)
    return tl.where(inside, w, 0)


@triton.jit
def weigh(row, peak, scale, PROBS: tl.constexpr, BLOCK: tl.constexpr):
    """The kept mass of each of this part's chunks; then that of what XTC leaves, where it excludes something."""
    drawn = drawn_scale(row.record, peak, PROBS)
    whole = tl.full([], 0, tl.int64)
    for rest in range(1 + excludes(row.ws).to(tl.int32)):
        kept = drawn_from(row.ws, rest)
        for chunk in range(row.begin, row.end):
            mass = tl.full([], 0, tl.int64)
            if may_hold(row, chunk, kept, peak, scale):
                mass = tl.sum(kept_mass(row, kept, chunk, peak, scale, drawn, BLOCK))
            tl.store(row.chunk_sums + rest * row.chunks + chunk, mass)
            whole += mass
    kept = load_kept(row.ws)
    if (whole == 0) & ((drawn != scale) | (kept.high.key != INT_MAX)):
        find_first(row, kept, peak, scale, BLOCK)


@triton.jit
def find_first(row, kept, peak, scale, BLOCK: tl.constexpr):
    """The first token in the rank order of what is kept, for the case that none of it has any mass.

    That takes a low temperature after the filters, or filters that leave out the maximum.
    """
    first = tl.full([], LONG_MIN, tl.int64)
    for chunk in range(row.begin, row.end):
        if may_hold(row, chunk, kept, peak, scale):
            ids, value = load_chunk(row, chunk, BLOCK)
            key = key_of(value)
            inside = keeps(kept, Place(key, ids), mass_of(value, peak, scale))
            first = tl.maximum(first, tl.max(tl.where(inside, ranked(key, ids), LONG_MIN)))
    tl.atomic_max(row.ws + FIRST, first, sem="relaxed")


@triton.jit
def draw(row, draws, whole, peak, scale, PROBS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Stage 8, where what is kept has some mass: each of the row's programs takes its share of the draws."""
    drawn = drawn_scale(row.record, peak, PROBS)
    has_rest = excludes(row.ws)
    left = whole
    if has_rest:
        left = sum_of_chunks(row, row.chunk_sums + row.chunks, CHUNKS)
    if row.part == 0:
        tl.store(row.ws + TOTAL, whole)
        tl.store(row.ws + REST, left)
    seed, offset = tl.load(draws.seed), tl.load(draws.offset) + draws.step
    for j in range(row.part, draws.count, row.parts):
        index = tl.full([], 0, tl.int32) + j
        rest = tl.full([], 0, tl.int32)
        if has_rest:
            rest = xtc_excludes(seed, offset, index, param(row.record, "xtc_probability")).to(tl.int32)
        threshold = draw_threshold(seed, offset, index, tl.where(rest > 0, left, whole))
        chunk, before = find_chunk(row, row.chunk_sums + rest * row.chunks, threshold, CHUNKS)
        mass = kept_mass(row, drawn_from(row.ws, rest), chunk, peak, scale, drawn, BLOCK)
        token = chunk * BLOCK + tl.sum((before + tl.cumsum(mass, 0) <= threshold).to(tl.int32))
        token = tl.where((rest > 0) & (left == 0), last_top_choice(row.ws), token)
        tl.store(draws.tokens + j, token.to(tl.int64))


@triton.jit
def settle_on(row, draws, best, PROBS: tl.constexpr):
    """What is left is one token: of a greedy row, or of one whose kept tokens have no mass. An invalid row has none."""
    token = tl.where(status_of(best) == 0, id_in(best), -1)
    for j in range(draws.count):
        tl.store(draws.tokens + j, token.to(tl.int64))
    store_kept(row.ws, only(key_in(best), token))
    tl.store(row.ws + PEAK, best)
    x = from_key(key_in(best))
    total = tl.where(token < 0, 1, mass_of(x, x, judged_scale(row.record, x, PROBS)))
    tl.store(row.ws + TOTAL, total)
    tl.store(row.ws + REST, total)


@triton.jit
def best_of(row):
    """The row's best token, packed, once all of its parts are scanned."""
    index = tl.arange(0, MAX_PARTS)
    return tl.max(tl.load(row.ws + PEAKS + index, mask=index < row.parts, other=LONG_MIN))


@triton.jit
def is_filtered(row, best):
    """Whether stages 6 to 8 apply: the row is valid and not greedy."""
    return (status_of(best) == 0) & (is_greedy(param(row.record, "temperature")) == 0)


@triton.jit
def filter_row(
    row, first, last,
    ROUNDS: tl.constexpr, SPLIT: tl.constexpr, PROBS: tl.constexpr, CHUNKS: tl.constexpr, VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Stages 6 and 7, and what is kept weighed: phases first to last - 1, but for the draw."""
    best = best_of(row)
    peak = from_key(key_in(best))
    scale = judged_scale(row.record, peak, PROBS)
    typical_first = param(row.record, "order") == choice("order", "temperature_last")
    on, weighing = phases_on(row.record, row.vocab, ROUNDS), first_phase("weigh", ROUNDS)
    if PROBS:
        on |= phase_bits("mass_floors", ROUNDS)
    on = tl.where(is_filtered(row, best), on, 0)
    for number in range(first, tl.minimum(last, weighing)):
        phase = in_order(number, typical_first, ROUNDS)
        if (on >> phase) & 1 != 0:
            if PROBS and phase < first_phase("top_n_sigma", ROUNDS):
                probability_floors(row, peak, scale, SPLIT)
            elif phase < first_phase("top_k", ROUNDS):
                top_n_sigma(row, phase - first_phase("top_n_sigma", ROUNDS), peak, SPLIT, VEC, BLOCK)
            elif (tl.full([], cutting_bits(ROUNDS), tl.int64) >> phase) & 1 != 0:
                cut(row, phase, peak, scale, ROUNDS, SPLIT, CHUNKS, BLOCK)
            elif phase < first_phase("top_p", ROUNDS):
                top_k(row, phase - first_phase("top_k", ROUNDS), SPLIT, VEC, BLOCK)
            elif phase < first_phase("typical", ROUNDS):
                top_p(row, phase - first_phase("top_p", ROUNDS), peak, scale, SPLIT, VEC, BLOCK)
            elif (tl.full([], measuring_bits(ROUNDS), tl.int64) >> phase) & 1 != 0:
                measure(row, measure_at(phase, ROUNDS), peak, scale, PROBS, VEC, BLOCK)
                meet(row, SPLIT)
            elif phase < first_phase("late_floors", ROUNDS):
                typical(row, phase - first_phase("typical", ROUNDS), peak, scale, SPLIT, VEC, BLOCK)
            elif phase < first_phase("xtc", ROUNDS):
                narrow_by_measure(row, measure_at(phase, ROUNDS), mass_of(peak, peak, scale), SPLIT)
            else:
                xtc(row, phase - first_phase("xtc", ROUNDS), peak, scale, SPLIT, BLOCK)
    if is_filtered(row, best) & (first <= weighing) & (last > weighing):
        weigh(row, peak, scale, PROBS, BLOCK)
        meet(row, SPLIT)


@triton.jit
def finish(row, draws, PROBS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """The last phase: the row's status and tokens."""
    best = best_of(row)
    filtered = is_filtered(row, best)
    whole = tl.full([], 0, tl.int64)
    if filtered:
        whole = sum_of_chunks(row, row.chunk_sums, CHUNKS)
    if row.part == 0:
        tl.store(draws.status, status_of(best))
    if whole > 0:
        if row.part == 0:
            tl.store(row.ws + PEAK, best)
        peak = from_key(key_in(best))
        draw(row, draws, whole, peak, judged_scale(row.record, peak, PROBS), PROBS, CHUNKS, BLOCK)
    elif row.part == 0:
        settle_on(row, draws, tl.where(filtered, tl.load(row.ws + FIRST), best), PROBS)


@triton.jit
def in_order(number, typical_first, ROUNDS: tl.constexpr):
    """The phase that comes at a number: in "temperature_last", those of typical come before top-p's."""
    number = tl.full([], 0, tl.int32) + number  # the interpreter's is no tensor
    begin, middle = first_phase("top_p", ROUNDS), first_phase("typical", ROUNDS)
    end = first_phase("late_floors", ROUNDS)
    later = number - (end - middle)
    swapped = tl.where(later < begin, number + (middle - begin), later)
    return tl.where(typical_first & (number >= begin) & (number < end), swapped, number)


@triton.jit
def measure_at(phase, ROUNDS: tl.constexpr):
    """What a phase measures, or uses the measure of."""
    floor = (phase - first_phase("late_floors", ROUNDS)) // 2 + LATE_FLOORS
    floor = tl.where(phase < first_phase("late_floors", ROUNDS), TYPICAL, floor)
    return tl.where(phase < first_phase("xtc", ROUNDS), floor, XTC)


STRIDES = ["record_stride", "seed_stride", "offset_stride", "ws_stride"]


@triton.jit(do_not_specialize=["num_samples", "first", "last", "chunks", "width", *STRIDES])
def sample(
    x,  # [B, V] logits, or float32 [B, x_stride] made by `prepare`
    x_stride,
    counts,  # int32 [2, B, x_stride]
    records,  # int32 [B or 1, columns]
    record_stride,
    seeds,
    seed_stride,
    offsets,
    offset_stride,
    status,
    tokens,  # int64 [B, num_samples]
    num_samples,
    workspace,  # int64 [B, ws_stride]
    ws_stride,
    sems,  # int32 [B]
    vocab,
    chunks,
    first,
    last,
    drafts,  # int64 [B / width, width - 1]
    accepted,  # int32 [B / width]
    ends,  # int32 [B / width]
    arrivals,  # int32 [B / width], 0 between launches
    width,  # rows of a request, which have one seed and follow one another
    VERIFIES: tl.constexpr,  # whether rows are of requests with drafts
    HAS_COUNTS: tl.constexpr,
    PROBS: tl.constexpr,  # x holds probabilities, not logits
    ROUNDS: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNKS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Phases first to last - 1 of one row's part. Grid: rows, parts."""
    at = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    each = tl.cdiv(chunks, parts)
    begin, end = part * each, tl.minimum((part + 1) * each, chunks)
    record, ws = records + at * record_stride, workspace + at * ws_stride
    sums = ws + CHUNK_SUMS
    row = Row(x + at * x_stride, vocab, record, ws, sums, sums + 2 * chunks, sems + at, chunks, begin, end, part, parts)
    if first == 0:
        scan(row, counts + at * x_stride, x_stride, HAS_COUNTS, PROBS, BLOCK)
        meet(row, SPLIT)
    filter_row(row, tl.maximum(first, 1), last, ROUNDS, SPLIT, PROBS, CHUNKS, VEC, BLOCK)
    if last == first_phase("end", ROUNDS):
        request, step = at, tl.full([], 0, tl.int64)
        if VERIFIES:
            request, step = at // width, at % width
        seed, offset = seeds + request * seed_stride, offsets + request * offset_stride
        draws = Draws(seed, offset, step, status + at, tokens + at * num_samples, num_samples)
        finish(row, draws, PROBS, CHUNKS, BLOCK)
        if VERIFIES:
            settle(part == 0, at, width, drafts, tokens, status, accepted, ends, arrivals)
