"""What is kept of a row: how many tokens, which, their share of all mass, and the entropy (stem of csrc/cpu/keep.h)."""

import triton
import triton.language as tl

from .kept import Place, keeps, load_kept
from .keys import from_key, key_in, key_of
from .mass import is_greedy, mass_of, scales_of
from .outputs import share
from .process import NEG_INF, load_x
from .record import param
from .stats import divide
from .workspace import CHUNK_SUMS, FIRST, PEAK, REST, TOTAL


@triton.jit
def log1p(x):
    """log(1 + x) of float64, by what rounding adds to 1 (Goldberg 1991, theorem 4)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, divide(tl.log(u) * x, tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def surprise(ws, w, p):
    """-log p of tokens of mass w and probability p."""
    total = tl.load(ws + TOTAL)
    if tl.load(ws + REST) == total:
        others = (total - w).to(tl.float64) / tl.maximum(w, 1).to(tl.float64)
        result = log1p(others)  # exact near p = 1
    else:
        result = -tl.log(p)
    return result


@triton.jit
def log_share(ws, record, everything):
    """log of the share of all mass that is kept."""
    whole = tl.load(ws + TOTAL)
    out, total = everything - whole, everything.to(tl.float64)
    # Near 1, what is left out tells more digits than what is kept.
    result = tl.log(divide(whole.to(tl.float64), total))
    result = tl.where(2 * out < everything, log1p(divide((-out).to(tl.float64), total)), result)
    # Where what is kept weighs nothing, its first token stands for the peak.
    result = tl.where(tl.load(ws + PEAK) == tl.load(ws + FIRST), NEG_INF, result)
    return tl.where(is_greedy(param(record, "temperature")), 0.0, result)


@triton.jit
def found_in(sums, chunks, CHUNKS: tl.constexpr):
    """What the programs of a row's chunks have found, int64, read past the first cache."""
    index = tl.arange(0, CHUNKS)
    return tl.load(sums + index, mask=index < chunks, other=0, volatile=True)


@triton.jit(do_not_specialize=["record_stride", "ws_stride", "num_samples", "chunks"])
def keep(
    x, x_stride, records, record_stride, workspace, ws_stride,
    tokens,  # int64 [B, num_samples], -1 where a row has none
    num_samples,
    count,  # int32 [B]
    bitmask,  # int32 [B, cdiv(vocab, 32)]
    log_kept_mass,  # float32 [B]
    entropy,  # float32 [B]
    arrivals,  # int32 [B], 0 between launches
    vocab,
    chunks,
    COUNT: tl.constexpr,  # whether it is wanted, like the next three
    BITMASK: tl.constexpr,
    MASS: tl.constexpr,
    ENTROPY: tl.constexpr,
    PROBS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of a row; the last of a row's programs to come adds up what they have found. Grid: rows, chunks."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    ws, record = workspace + row * ws_stride, records + row * record_stride
    good = tl.load(tokens + row * num_samples) >= 0
    value, peak = load_x(x + row * x_stride, ids, vocab), from_key(key_in(tl.load(ws + PEAK)))
    place = Place(key_of(value), ids)
    judged, drawn = scales_of(record, peak, PROBS)
    w = mass_of(value, peak, judged)
    kept = keeps(load_kept(ws), place, w) & good
    if BITMASK:
        words = tl.cdiv(vocab, 32)
        word = chunk * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
        bits = tl.reshape(kept.to(tl.int32), [BLOCK // 32, 32]) << tl.arange(0, 32)[None, :]
        tl.store(bitmask + row * words + word, tl.sum(bits, 1), mask=word < words)
    if (COUNT or MASS) or ENTROPY:  # Triton 3.3 knows no longer chains
        sums = ws + CHUNK_SUMS  # free again
        if drawn != judged:
            w = mass_of(value, peak, drawn)
        if COUNT:
            tl.store(sums + chunk, tl.sum(kept.to(tl.int64)))
        if MASS:
            tl.store(sums + chunks + chunk, tl.sum(tl.where(ids < vocab, w, 0)))
        if ENTROPY:
            own = tl.where(kept, w, 0)
            part = tl.full([], 0, tl.float64)
            if tl.max(own) > 0:
                p = share(ws, record, place, own)
                part = tl.sum(tl.where(p > 0, p * surprise(ws, own, p), 0.0))
            tl.store(sums + 2 * chunks + chunk, part.to(tl.int64, bitcast=True))
        tl.debug_barrier()
        if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == chunks - 1:
            tl.store(arrivals + row, 0)
            if COUNT:
                tl.store(count + row, tl.sum(found_in(sums, chunks, CHUNKS)).to(tl.int32))
            if MASS:
                found = log_share(ws, record, tl.sum(found_in(sums + chunks, chunks, CHUNKS)))
                tl.store(log_kept_mass + row, tl.where(good, found, float("nan")).to(tl.float32))
            if ENTROPY:
                found = found_in(sums + 2 * chunks, chunks, CHUNKS).to(tl.float64, bitcast=True)
                tl.store(entropy + row, tl.where(good, tl.sum(found), float("nan")).to(tl.float32))


@triton.jit
def ones_in(bits):
    """How many bits of uint32 are 1 (Warren 2012, Hacker's Delight, 5-1)."""
    pairs = bits - ((bits >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["size"])
def list_ids(
    bitmask,  # int32 [B, words]
    words,
    row_ptr,  # int64 [B + 1]
    ids,  # int32 [size]
    size,
    WORDS: tl.constexpr,  # at a time
):
    """Write the ids of a row's set to its place, ascending; -1 past the last row's. Grid: rows."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    at = tl.load(row_ptr + row)
    there = at < tl.load(row_ptr + row + 1)
    for first in range(0, tl.where(there, words, 0), WORDS):
        word = first + tl.arange(0, WORDS)
        bits = tl.load(bitmask + row * words + word, mask=word < words, other=0).to(tl.uint32, bitcast=True)
        if tl.max((bits != 0).to(tl.int32)) > 0:
            count, bit = ones_in(bits), tl.arange(0, 32)[None, :]
            below = ones_in(bits[:, None] & ((tl.full([], 1, tl.uint32) << bit.to(tl.uint32)) - 1))
            place = (tl.cumsum(count, 0) - count)[:, None] + below
            tl.store(ids + at + place, word[:, None] * 32 + bit, mask=((bits[:, None] >> bit.to(tl.uint32)) & 1) != 0)
            at += tl.sum(count)
    for first in range(tl.load(row_ptr + rows) + row * WORDS, size, rows * WORDS):
        past = first + tl.arange(0, WORDS)
        tl.store(ids + past, tl.full([WORDS], -1, tl.int32), mask=past < size)
