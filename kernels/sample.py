"""The pipeline, logits to token, for one row split over many programs (stem of csrc/cpu/sample.cc).

One kernel runs the steps below, in order; each is one or more phases, and a row's programs meet at a barrier after each
phase. A cooperative launch has all programs on the device at once, so that barrier is in device memory and the whole
pipeline is one launch. Where a single program has the row, it is a block barrier. Since programs share nothing but the
workspace, a phase may also be a launch of its own: Triton's interpreter, which runs programs one after another, runs
split rows that way.

    scan         stages 3 and 4: penalties and history edits, the row's maximum, each chunk's highest key; floors
    mass_floors  those of probabilities, whose unit is known after the scan
    top_n_sigma  stage 7, as all steps down to xtc, each skipped where it is off: sums, then the cut
    candidates   the tokens that a small top-k may keep are listed, then top-k and top-p cut the list; nothing is left
                 to do in the two steps that follow, nor, if no other filter measures what is kept, in any but the draw
    top_k        rounds of selection, then a cut among equal tokens
    top_p        likewise
    typical      sums, rounds of selection, the interval; before top_p in "temperature_last"
    late_floors  those of "temperature_last" with typical: the heaviest mass that is kept, then the floors
    epsilon, eta, top_a, p_less
                 sums, then the floor, one filter after the other
    xtc          sums, the top choices, what is excluded
    weigh        the kept mass of each chunk, and what XTC leaves of it
    draw         stage 8: each draw's chunk, then its token; or tokens from the list

The workspace holds sums and maxima of integers, so nothing depends on the order of atomics. The scan initialises it.
"""

import triton
import triton.language as tl

from .candidates import after_collecting, choose, collect, draws_from_list
from .draw import Draws, draw, draw_listed, settle_on, weigh
from .filters import cut, mass_floors, phases_on, top_k, top_p
from .kept import (
    everything,
    narrow_above,
    place_at,
    store_kept,
)
from .keys import INT_MAX, from_key, key_in
from .mass import mass_of_peak, scales_of
from .measured import narrow_by_measure, top_n_sigma, typical, xtc
from .record import choice, param
from .row import Row, meet, renewed, sum_of_chunks
from .scan import best_of, is_filtered, scan, status_of
from .stats import measure
from .verify import settle
from .workspace import (
    CHUNK_SUMS,
    FIRST,
    LATE_FLOORS,
    PEAK,
    TYPICAL,
    XTC,
    cutting_bits,
    first_phase,
    measuring_bits,
    phase_bits,
)


@triton.jit
def probability_floors(row, peak, SPLIT: tl.constexpr):
    """What is above 0, and of the mass that floors ask for."""
    if row.part == 0:
        kept = narrow_above(everything(), place_at(1, INT_MAX))
        store_kept(row.ws, mass_floors(kept, row.record, mass_of_peak(peak, True)))
    meet(row, SPLIT)


@triton.jit
def filter_row(
    row, best, scale, drawn, count, first, last,
    ROUNDS: tl.constexpr, SPLIT: tl.constexpr, PROBS: tl.constexpr, CHUNKS: tl.constexpr, VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Stages 6 and 7, and what is kept weighed: phases first to last - 1, but for the draw.

    Returns the phases that are on, as bits: none of a row that is invalid or greedy.
    """
    peak = from_key(key_in(best))
    typical_first = param(row.record, "order") == choice("order", "temperature_last")
    on, weighing = phases_on(row.record, row.vocab, ROUNDS), first_phase("weigh", ROUNDS)
    on |= phase_bits("weigh", ROUNDS)
    if PROBS:
        on |= phase_bits("mass_floors", ROUNDS)
    on = tl.where(is_filtered(row, best), on, 0)
    choosing = first_phase("candidates", ROUNDS) + 1
    for phase in range(first, tl.minimum(last, choosing)):
        if (on >> phase) & 1 != 0:
            if PROBS and phase < first_phase("top_n_sigma", ROUNDS):
                probability_floors(row, peak, SPLIT)
            elif phase < first_phase("candidates", ROUNDS):
                top_n_sigma(row, phase - first_phase("top_n_sigma", ROUNDS), peak, SPLIT, VEC, BLOCK)
            else:
                collect(row, peak, scale, ROUNDS, VEC, BLOCK)
                meet(row, SPLIT)
    if last > choosing:
        on = after_collecting(row, on, count, ROUNDS)
    if ((on >> choosing) & 1 != 0) & ((first <= choosing) & (last > choosing)):
        if row.part == 0:
            choose(row, peak, scale)
        if draws_from_list(on, ROUNDS):
            tl.debug_barrier()
        else:
            meet(row, SPLIT)
    for number in range(tl.maximum(first, choosing + 1), tl.minimum(last, weighing)):
        phase, row = in_order(number, typical_first, ROUNDS), renewed(row)
        if (on >> phase) & 1 != 0:
            if (tl.full([], cutting_bits(ROUNDS), tl.int64) >> phase) & 1 != 0:
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
                narrow_by_measure(row, measure_at(phase, ROUNDS), mass_of_peak(peak, PROBS), SPLIT)
            else:
                xtc(row, phase - first_phase("xtc", ROUNDS), peak, scale, SPLIT, BLOCK)
    if ((on >> weighing) & 1 != 0) & ((first <= weighing) & (last > weighing)):
        weigh(row, peak, scale, drawn, BLOCK)
        meet(row, SPLIT)
    return on


@triton.jit
def finish(
    row, draws, peak, scale, drawn, on,
    ROUNDS: tl.constexpr, PROBS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last phase: the row's tokens."""
    whole, weighed = tl.full([], 0, tl.int64), (on >> first_phase("weigh", ROUNDS)) & 1 != 0
    if weighed:
        whole = sum_of_chunks(row, row.chunk_sums, CHUNKS)
    if draws_from_list(on, ROUNDS):
        if row.part == 0:
            draw_listed(row, draws, peak, scale, drawn)
    elif whole > 0:
        draw(row, draws, whole, peak, scale, drawn, CHUNKS, BLOCK)
    elif row.part == 0:
        tl.debug_barrier()
        settle_on(row, draws, tl.load(row.ws + tl.where(weighed, FIRST, PEAK)), PROBS)


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
        scan(row, counts + at * x_stride, x_stride, HAS_COUNTS, PROBS, VEC, BLOCK)
        meet(row, SPLIT)
    best = best_of(row)
    if part == 0:
        tl.store(status + at, status_of(best))
        tl.store(ws + PEAK, best)
    peak = from_key(key_in(best))
    scale, drawn = scales_of(record, peak, PROBS)
    on = filter_row(
        row, best, scale, drawn, num_samples, tl.maximum(first, 1), last, ROUNDS, SPLIT, PROBS, CHUNKS, VEC, BLOCK
    )
    if last == first_phase("end", ROUNDS):
        request, step = at, tl.full([], 0, tl.int64)
        if VERIFIES:
            request, step = at // width, at % width
        seed, offset = seeds + request * seed_stride, offsets + request * offset_stride
        draws = Draws(seed, offset, step, tokens + at * num_samples, num_samples)
        finish(row, draws, peak, scale, drawn, on, ROUNDS, PROBS, CHUNKS, BLOCK)
        if VERIFIES:
            settle(part == 0, at, width, drafts, tokens, status, accepted, ends, arrivals)
