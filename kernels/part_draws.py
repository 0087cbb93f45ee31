"""Draws from a row that is split over ranks: the tokens that fall to this one (csrc/cpu/part.h, owner.h)."""

import triton
import triton.language as tl

from .keep import found_in, log1p
from .kept import Place, mass_if_kept, ranks_before
from .keys import LONG_MIN, from_key, key_of
from .mass import mass_of
from .part import FIELDS, HIGHEST, NONE, READ, REST, TOTAL, float_in, key_at, load_query, load_top, part_of, place_if
from .philox import draw_threshold
from .process import to_float32
from .rounded import mul
from .row import find_chunk, load_chunk, sum_of_chunks
from .scan import status_of
from .stats import divide

WHOLE, LEFT, ENTROPY, ROWS = map(tl.constexpr, range(4))  # sums of a row's chunks
GUESSES, WORDS = tl.constexpr(4), tl.constexpr(9)  # csrc/cpu/question.h
OFF = tl.constexpr(2.0**-20)  # of all mass, how far off a place may be: csrc/cpu/owner.h


@triton.jit
def probability(total, rest, top, place, w):
    """Of tokens of mass w, float64, in draws with what XTC may leave out and without."""
    mass, whole = w.to(tl.float64), total.to(tl.float64)
    result = divide(mass, whole)
    if rest != total:
        coin, left = top.coin.to(tl.float64), tl.where(ranks_before(top.last, place), mass, 0.0)
        # Where the rest has no mass, its first token counts as 1.
        left = tl.where((rest == 0) & (place.id == top.last.id + 1), 1.0, left)
        result = divide((1.0 - coin) * mass, whole) + divide(coin * left, tl.maximum(rest, 1).to(tl.float64))
    return result


@triton.jit
def entropy_of(total, rest, top, place, w):
    """What tokens of mass w add to the entropy of draws, float64."""
    p = probability(total, rest, top, place, w)
    surprise = -tl.log(p)
    if rest == total:
        others = (total - w).to(tl.float64) / tl.maximum(w, 1).to(tl.float64)
        surprise = log1p(others)  # exact near p = 1
    return tl.sum(tl.where(p > 0, mul(p, surprise), 0.0))


@triton.jit
def is_asked(thresholds, count):
    """Whether one of the draws may fall here."""
    found = tl.zeros([READ], tl.int32)
    for first in range(0, count, READ):
        index = first + tl.arange(0, READ)
        found |= (tl.load(thresholds + index, mask=index < count, other=-1) != -1).to(tl.int32)
    return tl.max(found) > 0


@triton.jit(do_not_specialize=["start", "width", "chunks"])
def weigh(
    x, x_stride, queries, start,
    details,  # int64 [B, width], thresholds
    width,
    sums,  # int64 [B, ROWS, chunks]: the mass of the set, what XTC leaves of it, the bits of the entropy's share
    vocab, chunks,
    TELLS: tl.constexpr,  # whether the entropy is wanted
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What draws are from, in one chunk of a row. Grid: rows, chunks."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, sums = part_of(x, x_stride, vocab, start, chunks), sums + row * ROWS * chunks
    whole, left, entropy = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64), tl.full([], 0.0, tl.float64)
    if is_asked(details + row * width, width) | tl.full([], TELLS, tl.int1):
        query, top = load_query(queries, part.start), load_top(queries, part.start)
        ids, value = load_chunk(part, chunk, BLOCK)
        place = Place(key_of(value), ids)
        mass = mass_if_kept(query, place, value, query.peak, query.judged, query.scale)
        whole = tl.sum(mass)
        left = tl.sum(tl.where(ranks_before(top.last, place), mass, 0))
        if TELLS:
            total, rest = tl.load(queries + row * FIELDS + TOTAL), tl.load(queries + row * FIELDS + REST)
            if (whole > 0) | (rest != total):
                entropy = entropy_of(total, rest, top, place, mass)
    tl.store(sums + WHOLE * chunks + chunk, whole)
    tl.store(sums + LEFT * chunks + chunk, left)
    if TELLS:
        tl.store(sums + ENTROPY * chunks + chunk, entropy.to(tl.int64, bitcast=True))


@triton.jit(do_not_specialize=["start", "width", "chunks"])
def draw(
    x, x_stride, queries, start,
    details,  # int64 [B, width]: t among all of the set, -2 - t without the top choices, -1 for none
    width,
    sums,  # int64 [B, ROWS, chunks]
    answers,  # int64 [B, 2 width + 1]: keys, masses, and the bits of the entropy's share
    vocab, chunks,
    TELLS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One draw of a row. Grid: rows, draws."""
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, sums = part_of(x, x_stride, vocab, start, chunks), sums + row * ROWS * chunks
    answers += row * (2 * width + 1)
    if j == 0:
        entropy = tl.full([], 0, tl.int64)
        if TELLS:
            shares = found_in(sums + ENTROPY * chunks, chunks, CHUNKS).to(tl.float64, bitcast=True)
            entropy = tl.sum(shares).to(tl.int64, bitcast=True)
        tl.store(answers + 2 * width, entropy)
    if j < width:
        key, mass = tl.full([], LONG_MIN, tl.int64), tl.full([], 0, tl.int64)
        threshold = tl.load(details + row * width + j)
        top, leaves = load_top(queries, part.start), threshold < -1
        at, running = tl.where(leaves, -2 - threshold, threshold), sums + tl.where(leaves, LEFT, WHOLE) * chunks
        if (threshold != -1) & (at < sum_of_chunks(part, running, CHUNKS)):
            query = load_query(queries, part.start)
            chunk, before = find_chunk(part, running, at, CHUNKS)
            ids, value = load_chunk(part, chunk, BLOCK)
            place = Place(key_of(value), ids)
            w = mass_if_kept(query, place, value, query.peak, query.judged, query.scale)
            w = tl.where(ranks_before(place_if(leaves, top.last), place), w, 0)
            token = chunk * BLOCK + tl.sum((before + tl.cumsum(w, 0) <= at).to(tl.int32))
            own = to_float32(tl.load(part.x + token))
            key, mass = key_at(Place(key_of(own), token), part.start), mass_of(own, query.peak, query.scale)
        tl.store(answers + j, key)
        tl.store(answers + width + j, mass)


@triton.jit
def peak_told(told, width, RANKS: tl.constexpr):
    """The key of the highest first token of all ranks, that of a NaN if there is one."""
    place = 2 * tl.arange(0, RANKS)
    return tl.max(key_of(float_in(tl.load(told + place, mask=place < width - 2, other=NONE) >> 32)))


@triton.jit(do_not_specialize=["start", "width", "words", "chunks"])
def weigh_own(
    x, x_stride, queries, start,
    details,  # int64 [B, width]: each rank's first token, and its mass beside that; then the row's seed and offset
    width,
    sums,  # int64 [B, chunks]
    answers,  # int64 [B, words], which it fills with zeros
    words, vocab, chunks,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The mass of one chunk of a row beside the maximum of all ranks. Grid: rows, chunks."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = part_of(x, x_stride, vocab, start, chunks)
    key = peak_told(details + row * width, width, RANKS)
    mass = tl.full([], 0, tl.int64)
    if status_of(key.to(tl.int64) << 32) == 0:
        query = load_query(queries, part.start)
        ids, value = load_chunk(part, chunk, BLOCK)
        place = Place(key_of(value), ids)
        mass = tl.sum(mass_if_kept(query, place, value, from_key(key), query.judged, query.scale))
    tl.store(sums + row * chunks + chunk, mass)
    for first in range(chunk * READ, words, chunks * READ):
        index = first + tl.arange(0, READ)
        tl.store(answers + row * words + index, tl.zeros([READ], tl.int64), mask=index < words)


@triton.jit
def told_of(told, width, rank, own, peak, scale, RANKS: tl.constexpr):
    """The mass of the ranks before this one, and of all, as nearly as ranks have told, float64."""
    index = tl.arange(0, RANKS)
    there = 2 * index < width - 2
    first = float_in(tl.load(told + 2 * index, mask=there, other=NONE) >> 32)
    beside = tl.load(told + 2 * index + 1, mask=there, other=0)
    first = tl.where(beside != 0, first, peak)
    below = mul(first.to(tl.float64) - peak.to(tl.float64), scale.to(tl.float64))
    mass = mul(beside.to(tl.float64), tl.exp2(below))
    mass = tl.where(index == rank, own.to(tl.float64), mass)
    return tl.sum(tl.where(index < rank, mass, 0.0)), tl.sum(mass)


@triton.jit
def tell_guesses(part, query, peak, sums, begin, to, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """The tokens from a place of the running mass on, as many as there is room for."""
    chunk, running = find_chunk(part, sums, begin, CHUNKS)
    told = tl.full([], 0, tl.int32)
    while (told < GUESSES) & (chunk < part.chunks):
        end_of_chunk = running + tl.load(sums + chunk)
        if end_of_chunk > running:
            ids, value = load_chunk(part, chunk, BLOCK)
            place = Place(key_of(value), ids)
            ends = running + tl.cumsum(mass_if_kept(query, place, value, peak, query.judged, query.scale), 0)
            while (told < GUESSES) & (begin < end_of_chunk):
                token = chunk * BLOCK + tl.sum((ends <= begin).to(tl.int32))
                begin = tl.min(tl.where(ends > begin, ends, HIGHEST))
                own = to_float32(tl.load(part.x + token))
                if told == 0:
                    tl.store(to, begin - mass_of(own, peak, query.scale))
                tl.store(to + 1 + 2 * told, begin)
                tl.store(to + 2 + 2 * told, key_at(Place(key_of(own), token), part.start))
                told += 1
        running = end_of_chunk
        chunk += 1


@triton.jit(do_not_specialize=["start", "width", "rank", "words", "draws", "chunks"])
def guess(
    x, x_stride, queries, start, details, width,
    rank,  # this one
    sums, answers,  # int64 [B, words]: the exact mass, or a status below 0; then WORDS of each draw
    words, draws, vocab, chunks,
    RANKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One draw of a row. Grid: rows, draws."""
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, sums = part_of(x, x_stride, vocab, start, chunks), sums + row * chunks
    told, answers = details + row * width, answers + row * words
    key = peak_told(told, width, RANKS)
    status, own = status_of(key.to(tl.int64) << 32), sum_of_chunks(part, sums, CHUNKS)
    if j == 0:
        tl.store(answers, tl.where(status == 0, own, -status.to(tl.int64)))
    if (status == 0) & (own > 0) & (j < draws):
        query, peak = load_query(queries, part.start), from_key(key)
        before, all = told_of(told, width, rank, own, peak, query.scale, RANKS)
        seed, offset = tl.load(told + width - 2), tl.load(told + width - 1)
        place = draw_threshold(seed, offset, tl.full([], 0, tl.int32) + j, all.to(tl.int64))
        local, off = place.to(tl.float64) - before, mul(all, OFF)
        if (local >= -off) & (local < own.to(tl.float64) + off):
            begin = tl.minimum(tl.maximum(local - off, 0.0).to(tl.int64), own - 1)
            tell_guesses(part, query, peak, sums, begin, answers + 1 + j * WORDS, CHUNKS, BLOCK)
