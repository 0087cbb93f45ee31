"""Tokens that a rank lists of its part of a row, in id order: the first, or those in some bins (csrc/cpu/part.h)."""

import triton
import triton.language as tl

from .keep import found_in
from .kept import Place, keeps, load_kept, mass_if_kept, ranks_within
from .keys import from_key, key_in, key_of
from .logprobs import sound
from .mass import mass_of
from .part import LAST_ID, NONE, bin_of, float_in, load_query, part_of, word_of
from .process import NEG_INF, load_x, to_float32
from .row import load_chunk
from .scan import status_of
from .workspace import CHUNK_SUMS, PEAK

COUNTS, MASSES, LISTED, SOME, ROWS = map(tl.constexpr, range(5))  # sums of a row's chunks
FEWER = tl.constexpr(16)  # times as many tokens there are as are looked at to see whether a row is flat
PADDING = tl.constexpr(256)  # words at a time
NAN_WORD = tl.constexpr((0x7FC00000 << 32) | 0xFFFFFFFF)
INF_WORD = tl.constexpr((0x7F800000 << 32) | 0xFFFFFFFF)


@triton.jit
def is_first(ws, place):
    """Whether tokens are among those that `sample` has kept in this workspace."""
    return ranks_within(load_kept(ws), place)


@triton.jit
def is_within(query, bins, place, value):
    """Whether tokens of the set lie in two ranges of bins."""
    inside = keeps(query, place, mass_of(value, query.peak, query.judged))
    at = bin_of(value, query.peak, query.judged)
    near = (at >= tl.load(bins)) & (at < tl.load(bins + 1))
    return inside & (near | ((at >= tl.load(bins + 2)) & (at < tl.load(bins + 3))))


@triton.jit(do_not_specialize=["start", "ws_stride", "chunks"])
def count_first(
    x, x_stride, queries, start,
    workspace,  # int64 [B, ws_stride], where `sample` has kept the first tokens
    ws_stride,
    sums,  # int64 [B, ROWS, chunks]: how many of these each chunk has, their mass, and so on
    vocab, chunks,
    MASS: tl.constexpr,  # whether that of the part is wanted
    FLAT: tl.constexpr,  # whether to ask if the part is flat
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Look at one chunk of a row. Grid: rows, chunks."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, ws, sums = part_of(x, x_stride, vocab, start, chunks), workspace + row * ws_stride, sums + row * ROWS * chunks
    good, kept = sound(ws), load_kept(ws)
    count, mass, listed = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    peak, looks = from_key(key_in(tl.load(ws + PEAK))), good
    if not MASS:
        looks = good & (tl.load(ws + CHUNK_SUMS + 2 * chunks + chunk) >= kept.low.key)
    if looks:
        query = load_query(queries, part.start)
        ids, value = load_chunk(part, chunk, BLOCK)
        place = Place(key_of(value), ids)
        first = is_first(ws, place)
        count = tl.sum(first.to(tl.int64))
        if MASS:
            mass = tl.sum(mass_if_kept(query, place, value, peak, query.judged, query.scale))
        if FLAT:
            listed = tl.sum(tl.where(first, mass_of(value, peak, query.judged), 0))
    tl.store(sums + COUNTS * chunks + chunk, count)
    if MASS:
        tl.store(sums + MASSES * chunks + chunk, mass)
    if FLAT:
        tl.store(sums + LISTED * chunks + chunk, listed)
        some = tl.full([], 0, tl.int64)
        if good:
            ids = chunk * BLOCK + tl.arange(0, BLOCK // FEWER)
            scale = load_query(queries, part.start).judged
            some = tl.sum(mass_of(load_x(part.x, ids, vocab), peak, scale))
        tl.store(sums + SOME * chunks + chunk, some)


@triton.jit(do_not_specialize=["start", "chunks"])
def count_within(
    x, x_stride, queries, start,
    details,  # int64 [B, 4], two ranges of bins
    sums,  # int64 [B, ROWS, chunks], of which only the counts are wanted
    vocab, chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """How many tokens to list one chunk of a row has. Grid: rows, chunks."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = part_of(x, x_stride, vocab, start, chunks)
    ids, value = load_chunk(part, chunk, BLOCK)
    wanted = is_within(load_query(queries, part.start), details + row * 4, Place(key_of(value), ids), value)
    tl.store(sums + (row * ROWS + COUNTS) * chunks + chunk, tl.sum(wanted.to(tl.int64)))


@triton.jit(do_not_specialize=["start", "width", "stride", "at"])
def given(
    x, x_stride, start,
    details,  # int64 [B, width], tokens as words
    width,
    answers,  # float32 [B, stride]: from `at` on the logits of these tokens, -inf of those that are not here
    stride, at, vocab,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Look some tokens up. As many logits are written as fill whole words, two to each. Grid: rows, blocks."""
    row, index = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = (tl.load(details + row * width + index, mask=index < width, other=NONE) & LAST_ID) - start.to(tl.int64)
    here = (token >= 0) & (token < vocab)
    value = to_float32(tl.load(x + row * x_stride + token, mask=here, other=0.0))
    there = index < width + (width & 1)
    tl.store(answers + row * stride + at + index, tl.where(here, value, NEG_INF), mask=there)


@triton.jit(do_not_specialize=["start", "ws_stride", "words", "room", "chunks"])
def tell(
    x, x_stride, queries, start,
    details,  # int64 [B, 4], bins; or [B, 1], bits of float32
    workspace, ws_stride,
    sums,  # int64 [B, ROWS, chunks]
    answers,  # int64 [B, words]: `room` tokens; the part's mass; whether it is flat
    words, room, vocab, chunks,
    FIRST: tl.constexpr,  # the first tokens, or those in some bins
    MASS: tl.constexpr,
    FLAT: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the tokens of one chunk of a row, and its share of the padding. Grid: rows, chunks."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, ws, sums = part_of(x, x_stride, vocab, start, chunks), workspace + row * ws_stride, sums + row * ROWS * chunks
    answers += row * words
    counts, index = found_in(sums, chunks, CHUNKS), tl.arange(0, CHUNKS)
    before = tl.sum(tl.where(index < chunk, counts, 0))
    if (tl.load(sums + chunk) > 0) & (before < room):
        ids, value = load_chunk(part, chunk, BLOCK)
        place = Place(key_of(value), ids)
        if FIRST:
            wanted = is_first(ws, place)
        else:
            wanted = is_within(load_query(queries, part.start), details + row * 4, place, value)
        at = before + tl.cumsum(wanted.to(tl.int32), 0) - 1
        tl.store(answers + at, word_of(value, ids, part.start), mask=wanted & (at < room))
    front = tl.full([], NONE, tl.int64)
    if FIRST:
        status = status_of(tl.load(ws + PEAK))
        front = tl.where(status == 1, NAN_WORD, tl.where(status == 2, INF_WORD, front))
    for begin in range(tl.sum(counts) + chunk * PADDING, room, chunks * PADDING):
        past = begin + tl.arange(0, PADDING)
        tl.store(answers + past, tl.where(past == 0, front, NONE), mask=past < room)
    if chunk == 0:
        if MASS:
            tl.store(answers + room, tl.sum(found_in(sums + MASSES * chunks, chunks, CHUNKS)))
        if FLAT:
            share = float_in(tl.load(details + row)).to(tl.float64)
            listed = tl.sum(found_in(sums + LISTED * chunks, chunks, CHUNKS)).to(tl.float64)
            some = tl.sum(found_in(sums + SOME * chunks, chunks, CHUNKS)) * FEWER
            tl.store(answers + words - 1, (listed < some.to(tl.float64) * share).to(tl.int64))
