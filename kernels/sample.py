"""The pipeline, logits to token, for one row split over many programs (stem of csrc/cpu/sample.cc).

One kernel runs the phases below, in order; a row's programs meet at a barrier after each. A cooperative launch has all
of them on the device at once, so that barrier is in device memory and the whole pipeline is one launch. Where a single
program has the row it is a block barrier. And since programs share nothing but the workspace, a phase may also be a
launch of its own: that is how Triton's interpreter, which runs programs one after another, runs split rows.

    scan        penalties, the row's maximum and its id, each chunk's maximum
    k rounds    top-k's cutoff, four bits of its key each            } left out
    k count     equal tokens per chunk, where not all are kept       } where
    k find      the last of them that is kept                        } top-k is off
    p rounds, p count, p find                                        likewise for top-p
    weigh       kept mass per chunk
    draw        each draw's chunk, then its token

Nothing depends on the order of atomics: sums and maxima of integers, in a workspace that the scan initialises.
"""

import triton
import triton.language as tl

from .filters import (
    BITS,
    DIGITS,
    INT_MAX,
    INT_MIN,
    JOINT,
    KEY_INF,
    KEY_LOWEST,
    KEY_NAN,
    KEY_NEG_INF,
    MIN_P_FIRST,
    TIES_ALL,
    add_above,
    count_equal,
    digit_of,
    find,
    from_key,
    keeps,
    key_of,
    may_reach,
    min_p_threshold,
    nth_equal,
    stricter,
    top_p_target,
)
from .mass import is_greedy, mass_of, mass_scale
from .philox import draw_threshold
from .process import (
    FREQUENCY,
    MIN_P,
    ORDER,
    PRESENCE,
    REPETITION,
    TEMPERATURE,
    TIES,
    TOP_K,
    TOP_P,
    load_float,
    load_x,
    penalise,
)

# A row's workspace, in int64.
K_LOW, K_ABOVE = tl.constexpr(0), tl.constexpr(9)  # [9], before each round and after the last
P_LOW, P_ABOVE = tl.constexpr(18), tl.constexpr(27)  # [9]
P_TARGET, NTH, P_KEY = tl.constexpr(36), tl.constexpr(37), tl.constexpr(38)
K_KEY, K_ID = tl.constexpr(39), tl.constexpr(40)  # top-k's cutoff
CUT_KEY, CUT_ID = tl.constexpr(41), tl.constexpr(42)  # the stricter of both
TOTAL, PEAK = tl.constexpr(43), tl.constexpr(44)
K_SUMS, P_SUMS = tl.constexpr(64), tl.constexpr(64 + 128)  # [8, DIGITS]
PEAKS = tl.constexpr(64 + 256)  # [MAX_PARTS]
MAX_PARTS = tl.constexpr(256)
CHUNK_SUM = tl.constexpr(64 + 256 + 256)  # [chunks], then the chunks' maxima [chunks]


@triton.jit
def meet(sem, part, parts, SPLIT: tl.constexpr):
    """Barrier of a row's programs; what they wrote before it, they see after it.

    The semaphore's sign flips when all have arrived, so it never needs to be cleared: each arrival adds 1, but the
    first program adds what makes the sum 2^31. The programs must be on the device all at once (a cooperative launch).
    """
    tl.debug_barrier()
    if SPLIT:
        step = tl.where(part == 0, INT_MIN - (parts - 1), 1)
        before = tl.atomic_add(sem, step, sem="release")
        waiting = True
        while waiting:
            waiting = (before ^ tl.atomic_add(sem, 0, sem="acquire")) >= 0
        tl.debug_barrier()


@triton.jit
def scan(
    x, counts, record, ws, chunk_max, vocab, begin, end, part,
    HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stages 3 and 4: the best (key, lowest id) of the chunks [begin, end), and the workspace made ready."""
    best = tl.full([BLOCK], -(2**63), tl.int64)
    repetition, frequency = load_float(record, REPETITION), load_float(record, FREQUENCY)
    presence = load_float(record, PRESENCE)
    for chunk in range(begin, end):
        ids = chunk * BLOCK + tl.arange(0, BLOCK)
        value = load_x(x, ids, vocab)
        if HAS_COUNTS:
            count = tl.load(counts + ids, mask=ids < vocab, other=0)
            value = penalise(value, count, repetition, frequency, presence)
            tl.store(x + ids, value, mask=ids < vocab)
        key = key_of(value)
        best = tl.maximum(best, (key.to(tl.int64) << 32) | (INT_MAX - ids))
        tl.store(chunk_max + chunk, tl.max(key).to(tl.int64))
    tl.store(ws + PEAKS + part, tl.max(best))
    if part == 0:
        tl.store(ws + K_SUMS + tl.arange(0, 256), tl.zeros([256], tl.int64))
        for slot in tl.static_range(2):
            tl.store(ws + K_KEY + 2 * slot, tl.full([], KEY_LOWEST, tl.int64))
            tl.store(ws + K_ID + 2 * slot, tl.full([], INT_MAX, tl.int64))


@triton.jit
def load_int(ws, SLOT: tl.constexpr):
    return tl.load(ws + SLOT).to(tl.int32)


@triton.jit
def peak_key(peak):
    return (peak >> 32).to(tl.int32)


@triton.jit
def status_of(peak):
    """Stage 4: 1 NaN, 2 +inf, 3 nothing left, 0 valid."""
    key = peak_key(peak)
    low = tl.where(key == KEY_NEG_INF, 3, 0)
    return tl.where(key == KEY_NAN, 1, tl.where(key == KEY_INF, 2, low))


@triton.jit
def final_cut(ws, peak, greedy):
    """The cutoff of the kept set: a greedy row keeps its maximum's lowest id, an invalid one nothing."""
    key = tl.where(greedy, peak_key(peak), load_int(ws, CUT_KEY))
    token = tl.where(greedy, argmax(peak), load_int(ws, CUT_ID))
    return tl.where(status_of(peak) == 0, key, KEY_NAN), token


@triton.jit
def argmax(peak):
    return INT_MAX - (peak & INT_MAX).to(tl.int32)


@triton.jit
def kept_mass(x, vocab, ids, cut_key, cut_id, floor, peak, scale):
    """Mass where kept, else 0."""
    value = load_x(x, ids, vocab)
    w = mass_of(value, peak, scale)
    return tl.where(keeps(key_of(value), ids, cut_key, cut_id) & (w >= floor), w, 0)


@triton.jit
def settle(ws, turn, target, part, LOW: tl.constexpr, ABOVE: tl.constexpr, SUMS: tl.constexpr):
    """What rounds 0 to turn - 1 have found: (key, weight above, weight reached); the first program notes it."""
    low, above, reached = tl.full([], INT_MIN, tl.int32), tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if turn > 0:
        if turn > 1:
            low = tl.load(ws + LOW + turn - 1).to(tl.int32)
            above = tl.load(ws + ABOVE + turn - 1)
        sums = ws + SUMS + (turn - 1) * DIGITS
        low, above, reached = digit_of(sums, low, above, target, 32 - BITS * turn)
        if part == 0:
            tl.store(ws + LOW + turn, low.to(tl.int64))
            tl.store(ws + ABOVE + turn, above)
    return low, above, reached


@triton.jit
def target_of(ws, turn, top_p, part):
    """Top-p's target: known once the first round's lowest pivot has summed the base set."""
    target = tl.full([], 1, tl.int64)
    if turn == 1:
        target = top_p_target(top_p, tl.load(ws + P_SUMS))
        if part == 0:
            tl.store(ws + P_TARGET, target)
    if turn > 1:
        target = tl.load(ws + P_TARGET)
    return target


@triton.jit
def note_k(ws, key, token):
    """Top-k's cutoff, the final one too as long as top-p says nothing. Never below the lowest finite float."""
    tl.store(ws + K_KEY, tl.maximum(key, KEY_LOWEST).to(tl.int64))
    tl.store(ws + CUT_KEY, tl.maximum(key, KEY_LOWEST).to(tl.int64))
    tl.store(ws + K_ID, token.to(tl.int64))
    tl.store(ws + CUT_ID, token.to(tl.int64))


@triton.jit
def note_p(ws, key, token):
    """Top-p's cutoff, combined with top-k's."""
    key, token = stricter(key, token, load_int(ws, K_KEY), load_int(ws, K_ID))
    tl.store(ws + CUT_KEY, key.to(tl.int64))
    tl.store(ws + CUT_ID, token.to(tl.int64))


@triton.jit
def draw(
    x, ws, chunk_sum, tokens, seed, offset, num_samples, vocab, chunks, floor, peak, scale, cut_key, cut_id,
    part, parts, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stage 8: the row's draws, dealt out to its programs."""
    index = tl.arange(0, CHUNKS)
    total = tl.sum(tl.load(chunk_sum + index, mask=index < chunks, other=0))
    if part == 0:
        tl.store(ws + TOTAL, total)
    for j in range(part, num_samples, parts):
        threshold = draw_threshold(seed, offset, tl.full([], 0, tl.int32) + j, total)
        chunk, before = find(chunk_sum, chunks, threshold, CHUNKS)
        ids = chunk * BLOCK + tl.arange(0, BLOCK)
        running = before + tl.cumsum(kept_mass(x, vocab, ids, cut_key, cut_id, floor, peak, scale), 0)
        tl.store(tokens + j, (chunk * BLOCK + tl.sum((running <= threshold).to(tl.int32))).to(tl.int64))


STRIDES = ["record_stride", "seed_stride", "offset_stride", "ws_stride"]


@triton.jit(do_not_specialize=["num_samples", "first", "last", "chunks", *STRIDES])
def sample(
    x,  # [B, V] logits, or float32 [B, x_stride] made by `prepare`
    x_stride,
    counts,  # int32 [B, x_stride]
    records,  # int32 [B or 1, FIELDS]
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
    row = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    per_part = tl.cdiv(chunks, parts)
    begin, end = part * per_part, tl.minimum((part + 1) * per_part, chunks)
    x += row * x_stride
    ws = workspace + row * ws_stride
    chunk_sum = ws + CHUNK_SUM
    chunk_max = chunk_sum + chunks
    record = records + row * record_stride
    sem = sems + row
    if first == 0:
        scan(x, counts + row * x_stride, record, ws, chunk_max, vocab, begin, end, part, HAS_COUNTS, BLOCK)
        meet(sem, part, parts, SPLIT)

    index = tl.arange(0, MAX_PARTS)
    best = tl.max(tl.load(ws + PEAKS + index, mask=index < parts, other=-(2**63)))
    temperature, top_p = load_float(record, TEMPERATURE), load_float(record, TOP_P)
    top_k, order = tl.load(record + TOP_K), tl.load(record + ORDER)
    greedy = is_greedy(temperature)
    filtered = (status_of(best) == 0) & (greedy == 0)
    uses_k = filtered & (top_k > 0) & (top_k < vocab)
    uses_p = filtered & (top_p < 1.0)
    floor = tl.where(greedy, 0, min_p_threshold(load_float(record, MIN_P)))
    peak, scale = from_key(peak_key(best)), mass_scale(temperature)

    for phase in range(tl.maximum(first, 1), last):
        turn_p = phase - (ROUNDS + 3)
        if uses_k & (phase <= ROUNDS):
            shift = 32 - BITS * phase
            low, _, _ = settle(ws, phase - 1, top_k, part, K_LOW, K_ABOVE, K_SUMS)
            sums = ws + K_SUMS + (phase - 1) * DIGITS
            add_above(
                x, vocab, begin, end, chunk_max, low, shift, sums, INT_MIN, 0, floor, peak, scale, False, VEC, BLOCK
            )
            meet(sem, part, parts, SPLIT)
        elif uses_k & (phase == ROUNDS + 1):
            key, above, reached = settle(ws, ROUNDS, top_k, part, K_LOW, K_ABOVE, K_SUMS)
            tied = (reached > top_k) & (key > KEY_NEG_INF) & (tl.load(record + TIES) != TIES_ALL)
            if part == 0:
                tl.store(ws + NTH, tl.where(tied, top_k - above, 0))
                note_k(ws, key, tl.full([], INT_MAX, tl.int32))
            if tied:
                count_equal(x, vocab, begin, end, chunk_max, chunk_sum, key, BLOCK)
            meet(sem, part, parts, SPLIT)
        elif uses_k & (phase == ROUNDS + 2):
            nth = tl.load(ws + NTH)
            if nth > 0:
                if part == 0:
                    key = load_int(ws, K_KEY)
                    note_k(ws, key, nth_equal(x, vocab, chunks, chunk_sum, key, nth, CHUNKS, BLOCK))
                meet(sem, part, parts, SPLIT)
        elif uses_p & (turn_p >= 0) & (turn_p < ROUNDS):
            shift = 32 - BITS * (turn_p + 1)
            target = target_of(ws, turn_p, top_p, part)
            low, _, _ = settle(ws, turn_p, target, part, P_LOW, P_ABOVE, P_SUMS)
            sums = ws + P_SUMS + turn_p * DIGITS
            base_key = tl.where(order == JOINT, KEY_LOWEST, load_int(ws, K_KEY))
            base_id = tl.where(order == JOINT, INT_MAX, load_int(ws, K_ID))
            base_floor = tl.where(order == MIN_P_FIRST, floor, 0)
            add_above(
                x, vocab, begin, end, chunk_max, low, shift, sums,
                base_key, base_id, base_floor, peak, scale, True, VEC, BLOCK,
            )  # fmt: skip
            meet(sem, part, parts, SPLIT)
        elif uses_p & (turn_p == ROUNDS):
            target = target_of(ws, ROUNDS, top_p, part)
            key, above, reached = settle(ws, ROUNDS, target, part, P_LOW, P_ABOVE, P_SUMS)
            w = mass_of(from_key(key), peak, scale)
            nth = (target - above + w - 1) // w
            tied = above + nth * w < reached
            if part == 0:
                tl.store(ws + NTH, tl.where(tied, nth, 0))
                tl.store(ws + P_KEY, key.to(tl.int64))
                note_p(ws, key, tl.full([], INT_MAX, tl.int32))
            if tied:
                count_equal(x, vocab, begin, end, chunk_max, chunk_sum, key, BLOCK)
            meet(sem, part, parts, SPLIT)
        elif uses_p & (turn_p == ROUNDS + 1):
            nth = tl.load(ws + NTH)
            if nth > 0:
                if part == 0:
                    key = load_int(ws, P_KEY)
                    note_p(ws, key, nth_equal(x, vocab, chunks, chunk_sum, key, nth, CHUNKS, BLOCK))
                meet(sem, part, parts, SPLIT)
        elif filtered & (turn_p == ROUNDS + 2):
            cut_key, cut_id = final_cut(ws, best, greedy)
            for chunk in range(begin, end):
                mass = tl.full([], 0, tl.int64)
                key = tl.load(chunk_max + chunk).to(tl.int32)
                if (key >= cut_key) & may_reach(mass_of(from_key(key), peak, scale), floor):
                    ids = chunk * BLOCK + tl.arange(0, BLOCK)
                    mass = tl.sum(kept_mass(x, vocab, ids, cut_key, cut_id, floor, peak, scale))
                tl.store(chunk_sum + chunk, mass)
            meet(sem, part, parts, SPLIT)
        elif turn_p == ROUNDS + 3:
            row_tokens = tokens + row * num_samples
            if part == 0:
                tl.store(ws + PEAK, best)
                tl.store(status + row, status_of(best))
            if filtered:
                cut_key, cut_id = final_cut(ws, best, greedy)
                draw(
                    x, ws, chunk_sum, row_tokens,
                    tl.load(seeds + row * seed_stride), tl.load(offsets + row * offset_stride), num_samples,
                    vocab, chunks, floor, peak, scale, cut_key, cut_id, part, parts, CHUNKS, BLOCK,
                )  # fmt: skip
            elif part == 0:
                # The maximum alone, or nothing at all.
                token = tl.where(greedy & (status_of(best) == 0), argmax(best), -1)
                for j in range(num_samples):
                    tl.store(row_tokens + j, token.to(tl.int64))
                tl.store(ws + TOTAL, tl.where(token < 0, 1, tl.full([], 1 << 40, tl.int64)))
