"""What a rank answers about its part of a row that is split over ranks: sums, counts, bins (stem of csrc/cpu/part.h).

What answers consist of is integers, in any order of the programs; but for an entropy they are those of the CPU engine.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .keep import found_in
from .kept import Kept, Place, keeps, mass_if_kept, narrow_above, narrow_below, place_at, ranks_before
from .keys import INT_MAX, KEY_INF, KEY_LOWEST, LONG_MIN, from_key, key_of
from .mass import mass_of
from .process import NEG_INF, load_x
from .rounded import mul
from .row import load_chunk, sums_of_each
from .stats import HALF_MASS, LOW_HALF, by_thread, depth_of

HIGH, LOW, FLOOR, TOP, COIN, PEAK, SCALE, JUDGED, TOTAL, REST = map(tl.constexpr, range(10))  # PartQuery
FIELDS = tl.constexpr(10)
HIGHEST = tl.constexpr(2**63 - 1)
LAST_ID = tl.constexpr(2**32 - 1)
NONE = tl.constexpr((-0x800000 << 32) | 0xFFFFFFFF)  # the word of no token

BINS, FINE_BINS, BINS_OF_OCTAVE = tl.constexpr(2048), tl.constexpr(1792.0), tl.constexpr(128.0)  # csrc/cpu/search.h
FINER = tl.constexpr(1 / 64)  # than the bins from FINE_BINS on
READ = tl.constexpr(1024)  # words at a time


class Part(NamedTuple):
    """A rank's part of a row."""

    x: tl.tensor  # pointer to [vocab]
    vocab: tl.tensor
    start: tl.tensor  # int64, the id of its first token
    chunks: tl.tensor


class Query(NamedTuple):
    """A set that is asked about, which serves as a `Kept`, and the whole row's maximum.

    It holds no `Kept`: Triton 3.3 returns no tuples that have others within others.
    """

    high: Place
    low: Place
    floor: tl.tensor
    peak: tl.tensor
    scale: tl.tensor  # of the masses that are drawn from
    judged: tl.tensor  # of those that filters judge by


class TopChoices(NamedTuple):
    """The tokens of a set that rank at `last` or before it are those that a draw leaves out with this probability."""

    last: Place
    coin: tl.tensor


@triton.jit
def part_of(x, x_stride, vocab, start, chunks):
    """This program's. Ids in it begin at 0."""
    row = tl.program_id(0).to(tl.int64)
    return Part(x + row * x_stride, vocab, start.to(tl.int64), chunks)


@triton.jit
def float_in(words):
    """The float32 in the lower half."""
    return words.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def place_of(key, start):
    """The place of a key in this part; tokens of other parts come before its first or after its last."""
    token = LAST_ID - (key & LAST_ID) - start
    token = tl.minimum(tl.maximum(token, -1), INT_MAX)
    return Place((key >> 32).to(tl.int32), token.to(tl.int32))


@triton.jit
def key_at(place, start):
    """The key of a token of this part, int64."""
    return (place.key.to(tl.int64) << 32) + (LAST_ID - (start + place.id))


@triton.jit
def word_of(value, ids, start):
    """A token: the bits of its logit above its id."""
    return (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | ((start + ids) & LAST_ID)


@triton.jit
def load_query(queries, start):
    """The query of this program's row."""
    query = queries + tl.program_id(0).to(tl.int64) * FIELDS
    # A NaN ranks above the first place.
    kept = Kept(place_at(KEY_INF, -1), place_at(KEY_LOWEST, INT_MAX), tl.maximum(tl.load(query + FLOOR), 0))
    high = tl.load(query + HIGH)
    if high != HIGHEST:
        kept = narrow_below(kept, place_of(high, start))
    kept = narrow_above(kept, place_of(tl.load(query + LOW), start))
    peak, scale = float_in(tl.load(query + PEAK)), float_in(tl.load(query + SCALE))
    return Query(kept.high, kept.low, kept.floor, peak, scale, float_in(tl.load(query + JUDGED)))


@triton.jit
def load_top(queries, start):
    """What XTC may leave out: no token ranks at the place `last` where that is nothing."""
    query = queries + tl.program_id(0).to(tl.int64) * FIELDS
    top, coin = tl.load(query + TOP), float_in(tl.load(query + COIN))
    first = place_of(top, start)  # of those that stay
    some = (top != HIGHEST) & (coin > 0)
    return TopChoices(place_if(some, Place(first.key, first.id - 1)), tl.where(some, coin, 0.0))


@triton.jit
def place_if(flag, place):
    """A place, or that before all tokens."""
    return Place(tl.where(flag, place.key, KEY_INF), tl.where(flag, place.id, -1))


@triton.jit
def peak_in(words, count):
    """The key of the highest of these tokens, that of a NaN if there is one."""
    best = tl.full([READ], -0x7F800000, tl.int32)
    for first in range(0, count, READ):
        index = first + tl.arange(0, READ)
        best = tl.maximum(best, key_of(float_in(tl.load(words + index, mask=index < count, other=NONE) >> 32)))
    return tl.max(best)


@triton.jit
def bin_of(x, peak, scale):
    """The bin of each logit, int32: fine ones from the peak down, coarse ones, and a last one for the rest."""
    fine = (peak - x) * (scale * BINS_OF_OCTAVE)
    place = tl.minimum(fine, mul(fine - FINE_BINS, FINER) + FINE_BINS)
    place = tl.where(place < BINS - 1, place, BINS - 1.0)
    return tl.maximum(place, 0.0).to(tl.int32)


@triton.jit
def add_sums(part, query, peak, end, answers, PRODUCTS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Z of the set, and if wanted EH, EL, HH, HL, LL."""
    zeros = tl.zeros([BLOCK // VEC], tl.int64)
    mass, high, low, squares, cross, low_squares = zeros, zeros, zeros, zeros, zeros, zeros
    for chunk in range(tl.program_id(1), end, tl.num_programs(1)):
        ids, value = load_chunk(part, chunk, BLOCK)
        w = mass_of(value, peak, query.judged)
        w = tl.where(keeps(query, Place(key_of(value), ids), w), w, 0)
        mass += by_thread(w, VEC, BLOCK)
        if PRODUCTS:
            upper, lower, depth = w >> HALF_MASS, w & LOW_HALF, depth_of(value, peak, query.judged)
            high += by_thread(upper * depth, VEC, BLOCK)
            low += by_thread(lower * depth, VEC, BLOCK)
            squares += by_thread(upper * upper, VEC, BLOCK)
            cross += by_thread(upper * lower, VEC, BLOCK)
            low_squares += by_thread(lower * lower, VEC, BLOCK)
    if PRODUCTS:
        tl.atomic_add(answers + 1 + tl.arange(0, 4), sums_of_each((high, low, squares, cross), 2), sem="relaxed")
        tl.atomic_add(answers + 5 * tl.arange(0, 2), sums_of_each((mass, low_squares), 1), sem="relaxed")
    else:
        tl.atomic_add(answers, tl.sum(mass), sem="relaxed")


@triton.jit
def add_spread(part, peak, end, answers, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """n, D1, D2 of all above -inf."""
    zeros = tl.zeros([BLOCK // VEC], tl.int64)
    alive, distances, squares = zeros, zeros, zeros
    for chunk in range(tl.program_id(1), end, tl.num_programs(1)):
        _, value = load_chunk(part, chunk, BLOCK)
        there = value > NEG_INF
        d = tl.where(there, tl.minimum((peak - value) * 2048.0, 1048575.0), 0.0).to(tl.int32).to(tl.int64)
        alive += by_thread(there.to(tl.int64), VEC, BLOCK)
        distances += by_thread(d, VEC, BLOCK)
        squares += by_thread(d * d, VEC, BLOCK)
    index = tl.arange(0, 4)
    found = sums_of_each((alive, distances, squares, zeros), 2)
    tl.atomic_add(answers + index, found, mask=index < 3, sem="relaxed")


@triton.jit
def add_bins(part, query, peak, end, bins, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Mass and number of the set's tokens in each bin."""
    last = tl.zeros([BLOCK // VEC], tl.int32)
    for chunk in range(tl.program_id(1), end, tl.num_programs(1)):
        ids, value = load_chunk(part, chunk, BLOCK)
        w = mass_of(value, peak, query.judged)
        kept, place = keeps(query, Place(key_of(value), ids), w), bin_of(value, peak, query.judged)
        # Where many tokens lie that have no mass, it is in the last bin.
        last += by_thread((kept & (place == BINS - 1)).to(tl.int32), VEC, BLOCK)
        tl.atomic_add(bins + 2 * place, w, mask=kept & (w > 0), sem="relaxed")
        one = tl.full([BLOCK], 1, tl.int64)
        tl.atomic_add(bins + 2 * place + 1, one, mask=kept & (place < BINS - 1), sem="relaxed")
    tl.atomic_add(bins + 2 * BINS - 1, tl.sum(last).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["start", "width", "words", "chunks"])
def sums(
    x,  # [B, x_stride]
    x_stride,
    queries,  # int64 [B, FIELDS]
    start,
    details,  # int64 [B, width], tokens of all ranks
    width,
    answers,  # int64 [B, words], zeros: Z, EH, EL, HH, HL, LL, n, D1, D2; and [BINS, 2], mass and tokens of each bin
    words,
    vocab,
    chunks,
    WHOLE: tl.constexpr,  # the peak is that of these tokens; where it is not finite, all is 0
    TOTAL: tl.constexpr,  # whether Z is wanted, and the others below
    PRODUCTS: tl.constexpr,
    SPREAD: tl.constexpr,
    BINS_AT: tl.constexpr,  # the place of the bins in the answers, -1 if they are not wanted
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up some chunks of a row. What is wanted besides Z reads them again, from a cache: registers would not do for
    all at once. Grid: rows, parts."""
    row = tl.program_id(0).to(tl.int64)
    part, answers = part_of(x, x_stride, vocab, start, chunks), answers + row * words
    query = load_query(queries, part.start)
    peak, end = query.peak, chunks
    if WHOLE:
        key = peak_in(details + row * width, width)
        peak, end = from_key(key), tl.where((key < KEY_INF) & (key >= KEY_LOWEST), chunks, 0)
    if TOTAL:
        add_sums(part, query, peak, end, answers, PRODUCTS, VEC, BLOCK)
    if SPREAD:
        add_spread(part, peak, end, answers + 6, VEC, BLOCK)
    if BINS_AT >= 0:
        add_bins(part, query, peak, end, answers + BINS_AT, VEC, BLOCK)


@triton.jit
def write_bits(words, chunk, kept, vocab, BLOCK: tl.constexpr):
    """The bits of a chunk."""
    word = chunk * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    bits = tl.reshape(kept.to(tl.int32), [BLOCK // 32, 32]) << tl.arange(0, 32)[None, :]
    tl.store(words + word, tl.sum(bits, 1), mask=word < tl.cdiv(vocab, 32))


@triton.jit(do_not_specialize=["start", "chunks"])
def totals(
    x, x_stride, queries, start,
    answers,  # int64 [B, 5]: the mass of the set, and of what XTC leaves; the first key of either; how many it holds
    bitmask,  # int32 [B, cdiv(vocab, 32)]
    found,  # int64 [B, 5, chunks], what programs find
    arrivals,  # int32 [B], 0 between launches
    vocab, chunks,
    FIRST: tl.constexpr,  # whether it is wanted, like the next two
    COUNT: tl.constexpr,
    BITMASK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of a row; the last of a row's programs to come adds up what they have found. Grid: rows, chunks."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, found = part_of(x, x_stride, vocab, start, chunks), found + row * 5 * chunks
    query, top = load_query(queries, part.start), load_top(queries, part.start)
    ids, value = load_chunk(part, chunk, BLOCK)
    place = Place(key_of(value), ids)
    mass = mass_if_kept(query, place, value, query.peak, query.judged, query.scale)
    kept = keeps(query, place, mass_of(value, query.peak, query.judged))
    stays = kept & ranks_before(top.last, place)
    tl.store(found + chunk, tl.sum(mass))
    tl.store(found + chunks + chunk, tl.sum(tl.where(stays, mass, 0)))
    if FIRST:
        keys = key_at(place, part.start)
        tl.store(found + 2 * chunks + chunk, tl.max(tl.where(kept, keys, LONG_MIN)))
        tl.store(found + 3 * chunks + chunk, tl.max(tl.where(stays, keys, LONG_MIN)))
    if COUNT:
        tl.store(found + 4 * chunks + chunk, tl.sum(kept.to(tl.int64)))
    if BITMASK:
        write_bits(bitmask + row * tl.cdiv(vocab, 32), chunk, kept, vocab, BLOCK)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == chunks - 1:
        tl.store(arrivals + row, 0)
        answers += row * 5
        tl.store(answers, tl.sum(found_in(found, chunks, CHUNKS)))
        tl.store(answers + 1, tl.sum(found_in(found + chunks, chunks, CHUNKS)))
        if FIRST:
            tl.store(answers + 2, highest_in(found + 2 * chunks, chunks, CHUNKS))
            tl.store(answers + 3, highest_in(found + 3 * chunks, chunks, CHUNKS))
        else:
            tl.store(answers + 2 + tl.arange(0, 2), tl.full([2], LONG_MIN, tl.int64))
        count = tl.full([], 0, tl.int64)
        if COUNT:
            count = tl.sum(found_in(found + 4 * chunks, chunks, CHUNKS))
        tl.store(answers + 4, count)


@triton.jit(do_not_specialize=["start", "chunks"])
def ends(
    x, x_stride, queries, start,
    answers,  # int64 [B, 3]: the mass of the set's heaviest token, the key of its last, how many it holds; or 0
    found,  # int64 [B, 3, chunks], what programs find
    arrivals,  # int32 [B], 0 between launches
    vocab, chunks,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of a row; the last of a row's programs to come adds up what they have found. Grid: rows, chunks."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, found = part_of(x, x_stride, vocab, start, chunks), found + row * 3 * chunks
    query = load_query(queries, part.start)
    ids, value = load_chunk(part, chunk, BLOCK)
    place, w = Place(key_of(value), ids), mass_of(value, query.peak, query.judged)
    kept = keeps(query, place, w)
    tl.store(found + chunk, tl.max(tl.where(kept, w, 0)))
    tl.store(found + chunks + chunk, tl.max(tl.where(kept, -key_at(place, part.start), LONG_MIN)))
    tl.store(found + 2 * chunks + chunk, tl.sum(kept.to(tl.int64)))
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == chunks - 1:
        tl.store(arrivals + row, 0)
        count = tl.sum(found_in(found + 2 * chunks, chunks, CHUNKS))
        tl.store(answers + row * 3, highest_in(found, chunks, CHUNKS))
        tl.store(answers + row * 3 + 1, tl.where(count > 0, -highest_in(found + chunks, chunks, CHUNKS), 0))
        tl.store(answers + row * 3 + 2, count)


@triton.jit(do_not_specialize=["start", "words"])
def bits(
    x, x_stride, queries, start,
    answers,  # int32 [B, words], zeros: the set's tokens in a mask of the whole row
    words, vocab, chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of a row, whose words lie across two of the whole row's. Grid: rows, chunks."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, answers = part_of(x, x_stride, vocab, start, chunks), answers + row * words
    query = load_query(queries, part.start)
    ids, value = load_chunk(part, chunk, BLOCK)
    kept = keeps(query, Place(key_of(value), ids), mass_of(value, query.peak, query.judged))
    own = tl.sum(tl.reshape(kept.to(tl.int64), [BLOCK // 32, 32]) << tl.arange(0, 32)[None, :].to(tl.int64), 1)
    own = own << (part.start % 32)
    at = answers + part.start // 32 + chunk * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    low, high = own.to(tl.int32), (own >> 32).to(tl.int32)
    tl.atomic_or(at, low, mask=low != 0, sem="relaxed")
    tl.atomic_or(at + 1, high, mask=high != 0, sem="relaxed")


@triton.jit
def highest_in(keys, chunks, CHUNKS: tl.constexpr):
    """The highest of the keys that the programs of a row's chunks have found."""
    index = tl.arange(0, CHUNKS)
    return tl.max(tl.load(keys + index, mask=index < chunks, other=LONG_MIN, volatile=True))


@triton.jit(do_not_specialize=["width", "chunks"])
def above(x, x_stride, details, width, answers, vocab, chunks, BLOCK: tl.constexpr):
    """Add to answers [B, width] how many tokens lie above logits, given their bits [B, width]. Grid: rows, parts."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    x += row * x_stride
    for j in range(width):
        own = float_in(tl.load(details + row * width + j))
        higher = tl.full([], 0, tl.int64)
        for chunk in range(part, chunks, parts):
            ids = chunk * BLOCK + tl.arange(0, BLOCK)
            higher += tl.sum((load_x(x, ids, vocab) > own).to(tl.int32))
        tl.atomic_add(answers + row * width + j, higher, sem="relaxed")
