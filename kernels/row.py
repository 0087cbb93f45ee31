"""A row as the phases of `sample` see it: what one program reads of it, and where its programs meet."""

from typing import NamedTuple

import triton
import triton.language as tl

from .keys import INT_MIN, from_key
from .mass import mass_of, may_reach
from .process import load_x
from .versions import backend, is_gfx9


class Row(NamedTuple):
    """Pointers to a row, and the part of it that this program reads: the chunks [begin, end)."""

    x: tl.tensor  # [vocab]
    vocab: tl.tensor
    record: tl.tensor  # int32 [columns]
    ws: tl.tensor  # int64 [words(chunks)]; the next two lie in it
    chunk_sums: tl.tensor  # [2, chunks], counts of equal tokens or kept masses; the masses of what XTC leaves
    highest_keys: tl.tensor  # [chunks]
    sem: tl.tensor  # int32
    chunks: tl.tensor
    begin: tl.tensor
    end: tl.tensor
    part: tl.tensor  # this program's number among the row's
    parts: tl.tensor


@triton.jit
def renewed(row):
    """The same row, in a loop over phases: no address in the record or the workspace is computed before that loop.

    Each would take a register for all of the loop.
    """
    record, ws = unforeseen(row.record), unforeseen(row.ws)
    sums, keys = unforeseen(row.chunk_sums), unforeseen(row.highest_keys)
    return Row(row.x, row.vocab, record, ws, sums, keys, row.sem, row.chunks, row.begin, row.end, row.part, row.parts)


@triton.jit
def unforeseen(pointer):
    """The same pointer, which the compiler cannot know ahead of this place."""
    if backend() == "cuda":
        address = pointer.to(tl.int64)
        address = tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [address], tl.int64, False, 1)
        return address.to(pointer.dtype)
    else:
        return pointer


@triton.jit
def ids_of(row, chunk, BLOCK: tl.constexpr):
    """Ids of a chunk, in rows of those that one thread loads at once.

    A thread's ids are one that it computes here and constants from there on, so that none of them lives in a register
    beyond the chunk.
    """
    vec: tl.constexpr = 128 // row.x.dtype.element_ty.primitive_bitwidth
    first = chunk * BLOCK + vec * tl.arange(0, BLOCK // vec)
    return first[:, None] + tl.arange(0, vec)[None, :]


@triton.jit
def load_chunk(row, chunk, BLOCK: tl.constexpr):
    """Ids and logits of a chunk."""
    ids = ids_of(row, chunk, BLOCK)
    return tl.reshape(ids, [BLOCK]), tl.reshape(load_x(row.x, ids, row.vocab), [BLOCK])


@triton.jit
def wait_for_stores(row):
    """Lets each wave wait for its own stores, where neither a barrier does that nor a release by another wave.

    On gfx942, what is on its way at the release may reach the programs on another of the GPU's dies after it.
    """
    if is_gfx9():
        tl.inline_asm_elementwise("s_waitcnt vmcnt(0)", "=v,0", [row.part], tl.int32, is_pure=False, pack=1)


@triton.jit
def meet(row, SPLIT: tl.constexpr):
    """Barrier of a row's programs: each sees afterwards what any of them wrote before.

    The semaphore's sign flips when all have arrived, so it never needs to be cleared: each arrival adds 1, except that
    the first program adds what makes the sum 2^31. All programs must be on the device at once (a cooperative launch).
    """
    if SPLIT:
        wait_for_stores(row)
    tl.debug_barrier()
    if SPLIT:
        step = tl.where(row.part == 0, INT_MIN - (row.parts - 1), 1)
        before = tl.atomic_add(row.sem, step, sem="release")
        waiting = True
        while waiting:
            waiting = (before ^ tl.atomic_add(row.sem, 0, sem="acquire")) >= 0
        tl.debug_barrier()


@triton.jit
def may_hold(row, chunk, kept, peak, scale):
    """Whether a chunk may hold a token of a set; most chunks of most rows hold none."""
    key = tl.load(row.highest_keys + chunk).to(tl.int32)
    return (key >= kept.low.key) & may_reach(mass_of(from_key(key), peak, scale), kept.floor)


@triton.jit
def sum_of_chunks(row, sums, CHUNKS: tl.constexpr):
    index = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(sums + index, mask=index < row.chunks, other=0))


@triton.jit
def find_chunk(row, sums, threshold, CHUNKS: tl.constexpr):
    """The first chunk whose running sum exceeds the threshold, and the sum of those before it."""
    index = tl.arange(0, CHUNKS)
    sums = tl.load(sums + index, mask=index < row.chunks, other=0)
    passed = tl.cumsum(sums, 0) <= threshold
    return tl.reduce((passed.to(tl.int32), tl.where(passed, sums, 0)), 0, add_both)


@triton.jit
def add_both(count, total, one, more):
    """The sums of two blocks in one reduction."""
    return count + one, total + more


@triton.jit
def sums_of_each(blocks, BITS: tl.constexpr):
    """The sums of 2^BITS blocks of one size.

    In one reduction, which costs the barriers of one; and until Triton 3.7 each reduction in a loop, as all are in the
    one over phases, takes a register for the whole of the loop.
    """
    shape: tl.constexpr = [blocks[0].shape[0], len(blocks)]
    for _ in tl.static_range(BITS):
        blocks = joined(blocks, len(blocks) // 2)
    return tl.sum(tl.reshape(blocks[0], shape), 0)


@triton.jit
def joined(blocks, HALF: tl.constexpr):
    """Half as many blocks: each with that which comes HALF later, along one dimension more."""
    pairs = ()
    for j in tl.static_range(HALF):
        pairs = pairs + (tl.join(blocks[j], blocks[j + HALF]),)
    return pairs
