"""The pipeline, logits to token, for one row split over many programs (stem of csrc/cpu/sample.cc).

One kernel runs the steps below, in order; each is one or more phases, and a row's programs meet at a barrier after each
phase. A cooperative launch has all programs on the device at once, so that barrier is in device memory and the whole
pipeline is one launch. Where a single program has the row, it is a block barrier. Since programs share nothing but the
workspace, a phase may also be a launch of its own: Triton's interpreter, which runs programs one after another, runs
split rows that way.

    scan     stages 3 and 4: penalties and history edits, the row's maximum, each chunk's highest key; floors on mass
    top_k    stage 7: rounds of selection, then a cut among equal tokens; skipped where top-k is off
    top_p    likewise
    weigh    the kept mass of each chunk
    draw     stage 8: each draw's chunk, then its token

The workspace holds sums and maxima of integers, so nothing depends on the order of atomics. The scan initialises it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .filters import mass_floors, top_k, top_p, uses_top_k, uses_top_p
from .kept import Place, all_above, everything, keeps, load_kept, place_at, store_kept
from .keys import KEY_INF, KEY_NAN, KEY_NEG_INF, LONG_MIN, from_key, id_in, key_in, key_of, ranked
from .mass import is_greedy, mass_of, mass_scale
from .philox import draw_threshold
from .process import penalise, repeat, uses_history
from .record import param
from .row import Row, find_chunk, load_chunk, meet
from .workspace import CHUNK_SUMS, DIGITS, MAX_PARTS, PEAK, PEAKS, SUMS, TOP_K, TOP_P, TOTAL, first_phase


class Draws(NamedTuple):
    """Pointers to what a row's draws come from and to where they go."""

    seed: tl.tensor
    offset: tl.tensor
    status: tl.tensor
    tokens: tl.tensor  # [count]
    count: tl.tensor  # num_samples


@triton.jit
def scan(row, counts, x_stride, HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """Stages 3 and 4: find this part's best token, and initialise the workspace."""
    best = tl.full([BLOCK], LONG_MIN, tl.int64)
    repetition, frequency = param(row.record, "repetition_penalty"), param(row.record, "frequency_penalty")
    presence = param(row.record, "presence_penalty")
    repeats = uses_history(row.record)
    for chunk in range(row.begin, row.end):
        ids, value = load_chunk(row, chunk, BLOCK)
        if HAS_COUNTS:
            count = tl.load(counts + ids, mask=ids < row.vocab, other=0)
            value = penalise(value, count, repetition, frequency, presence)
            if repeats:
                value = repeat(value, ids, row.vocab, counts, x_stride, row.record)
            tl.store(row.x + ids, value, mask=ids < row.vocab)
        key = key_of(value)
        best = tl.maximum(best, ranked(key, ids))
        tl.store(row.highest_keys + chunk, tl.max(key).to(tl.int64))
    tl.store(row.ws + PEAKS + row.part, tl.max(best))
    if row.part == 0:
        zeros, index = tl.zeros([8 * DIGITS], tl.int64), tl.arange(0, 8 * DIGITS)
        tl.store(row.ws + TOP_K + SUMS + index, zeros)
        tl.store(row.ws + TOP_P + SUMS + index, zeros)
        store_kept(row.ws, mass_floors(everything(), row.record))


@triton.jit
def status_of(best):
    """Stage 4, of the packed maximum: 1 NaN, 2 +inf, 3 nothing left, 0 valid."""
    key = key_in(best)
    low = tl.where(key == KEY_NEG_INF, 3, 0)
    return tl.where(key == KEY_NAN, 1, tl.where(key == KEY_INF, 2, low))


@triton.jit
def kept_mass(row, kept, chunk, peak, scale, BLOCK: tl.constexpr):
    """Mass of a chunk's tokens where kept, else 0."""
    ids, value = load_chunk(row, chunk, BLOCK)
    w = mass_of(value, peak, scale)
    return tl.where(keeps(kept, Place(key_of(value), ids), w), w, 0)


@triton.jit
def may_reach(heaviest, floor):
    """Whether a chunk may hold a token of mass `floor`, given the mass of its highest logit.

    Mass is monotone in x but for a unit in the last place, so another token may be heavier by that; 8 are allowed for.
    """
    return heaviest + (heaviest >> 20) + 1 >= floor


@triton.jit
def weigh(row, peak, scale, BLOCK: tl.constexpr):
    """The kept mass of each of this part's chunks."""
    kept = load_kept(row.ws)
    for chunk in range(row.begin, row.end):
        mass = tl.full([], 0, tl.int64)
        key = tl.load(row.highest_keys + chunk).to(tl.int32)
        if (key >= kept.low.key) & may_reach(mass_of(from_key(key), peak, scale), kept.floor):
            mass = tl.sum(kept_mass(row, kept, chunk, peak, scale, BLOCK))
        tl.store(row.chunk_sums + chunk, mass)


@triton.jit
def draw(row, draws, peak, scale, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Stage 8: each of the row's programs takes its share of the draws."""
    kept = load_kept(row.ws)
    index = tl.arange(0, CHUNKS)
    total = tl.sum(tl.load(row.chunk_sums + index, mask=index < row.chunks, other=0))
    if row.part == 0:
        tl.store(row.ws + TOTAL, total)
    seed, offset = tl.load(draws.seed), tl.load(draws.offset)
    for j in range(row.part, draws.count, row.parts):
        threshold = draw_threshold(seed, offset, tl.full([], 0, tl.int32) + j, total)
        chunk, before = find_chunk(row, threshold, CHUNKS)
        running = before + tl.cumsum(kept_mass(row, kept, chunk, peak, scale, BLOCK), 0)
        token = chunk * BLOCK + tl.sum((running <= threshold).to(tl.int32))
        tl.store(draws.tokens + j, token.to(tl.int64))


@triton.jit
def settle_unfiltered(row, draws, best, greedy):
    """Stage 5: a greedy row keeps its maximum alone, an invalid one nothing."""
    token = tl.where(greedy & (status_of(best) == 0), id_in(best), -1)
    for j in range(draws.count):
        tl.store(draws.tokens + j, token.to(tl.int64))
    # No token ranks at or above the maximum's key with the id -1.
    store_kept(row.ws, all_above(place_at(key_in(best), token)))
    tl.store(row.ws + TOTAL, tl.where(token < 0, 1, tl.full([], 1 << 40, tl.int64)))


@triton.jit
def after_scan(
    row, draws, first, last,
    ROUNDS: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stages 5 to 8: phases first to last - 1."""
    index = tl.arange(0, MAX_PARTS)
    best = tl.max(tl.load(row.ws + PEAKS + index, mask=index < row.parts, other=LONG_MIN))
    temperature = param(row.record, "temperature")
    greedy = is_greedy(temperature)
    filtered = (status_of(best) == 0) & (greedy == 0)
    uses_k, uses_p = filtered & uses_top_k(row.record, row.vocab), filtered & uses_top_p(row.record)
    peak, scale = from_key(key_in(best)), mass_scale(temperature)
    for phase in range(first, last):
        if uses_k & (phase < first_phase("top_p", ROUNDS)):
            top_k(row, phase - first_phase("top_k", ROUNDS), ROUNDS, SPLIT, CHUNKS, VEC, BLOCK)
        elif uses_p & (phase >= first_phase("top_p", ROUNDS)) & (phase < first_phase("weigh", ROUNDS)):
            top_p(row, phase - first_phase("top_p", ROUNDS), peak, scale, ROUNDS, SPLIT, CHUNKS, VEC, BLOCK)
        elif filtered & (phase == first_phase("weigh", ROUNDS)):
            weigh(row, peak, scale, BLOCK)
            meet(row, SPLIT)
        elif phase == first_phase("draw", ROUNDS):
            if row.part == 0:
                tl.store(row.ws + PEAK, best)
                tl.store(draws.status, status_of(best))
            if filtered:
                draw(row, draws, peak, scale, CHUNKS, BLOCK)
            elif row.part == 0:
                settle_unfiltered(row, draws, best, greedy)


STRIDES = ["record_stride", "seed_stride", "offset_stride", "ws_stride"]


@triton.jit(do_not_specialize=["num_samples", "first", "last", "chunks", *STRIDES])
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
    HAS_COUNTS: tl.constexpr,
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
    row = Row(x + at * x_stride, vocab, record, ws, sums, sums + chunks, sems + at, chunks, begin, end, part, parts)
    if first == 0:
        scan(row, counts + at * x_stride, x_stride, HAS_COUNTS, BLOCK)
        meet(row, SPLIT)
    seed, offset = seeds + at * seed_stride, offsets + at * offset_stride
    draws = Draws(seed, offset, status + at, tokens + at * num_samples, num_samples)
    after_scan(row, draws, tl.maximum(first, 1), last, ROUNDS, SPLIT, CHUNKS, VEC, BLOCK)
