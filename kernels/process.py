"""Stages 0 to 3: bitmask, bias, penalties, history edits (stem of csrc/core/process.h).

Rows that are edited are copied to the workspace as float32: `prepare` upcasts, masks and clears the counts, `edit` adds
the bias and counts the token ids, and the scan of sample.py penalises each token when it first reads it. Where a row's
history is asked about, a second plane of counts has the longest repetition of each token.
"""

import triton
import triton.language as tl

from .history import PARTS, after_repetition, clear_history, collect, find_repetitions, uses_history
from .rounded import div, mul

NEG_INF = tl.constexpr(float("-inf"))
IN_PROMPT = tl.constexpr(1 << 30)  # bit of a token's count word; the bits below count its occurrences in the output


@triton.jit
def load_x(x, ids, vocab):
    """Logits of these ids as float32, -inf past the vocabulary."""
    return to_float32(tl.load(x + ids, mask=ids < vocab, other=NEG_INF))


@triton.jit
def to_float32(value):
    if value.dtype == tl.bfloat16:
        # By hand, since Triton's interpreter converts denormal bfloat16 to 0.
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def allowed(words, num_words, ids):
    """Whether each token's bit is 1; tokens past the last word are not allowed."""
    word = ids >> 5
    bits = tl.load(words + word, mask=word < num_words, other=0)
    return ((bits >> (ids & 31)) & 1) != 0


@triton.jit
def penalise(x, count, repetition, frequency, presence):
    """Stage 3. `count` holds the occurrences in the output, and the bit IN_PROMPT where the prompt has the token."""
    seen = count != 0
    count = count & (IN_PROMPT - 1)
    # Blocks, since Triton's interpreter cannot broadcast a comparison of scalars.
    zero = tl.zeros_like(x)
    repetition, frequency, presence = zero + repetition, zero + frequency, zero + presence
    repeated = tl.where(x > 0, div(x, repetition), mul(x, repetition))
    x = tl.where(seen & (repetition != 1.0), repeated, x)
    x = tl.where((count > 0) & (frequency != 0.0), x - mul(frequency, count.to(tl.float32)), x)
    return tl.where((count > 0) & (presence != 0.0), x - presence, x)


@triton.jit
def repetitions(counts, x_stride):
    """The plane of the longest repetitions, given a row's counts. Grid: rows, ..."""
    return counts + tl.num_programs(0).to(tl.int64) * x_stride


@triton.jit
def repeat(x, ids, vocab, counts, x_stride, record):
    """The history edits of stage 3, of a row that has any, for some of its tokens."""
    longest = tl.load(repetitions(counts, x_stride) + ids, mask=ids < vocab, other=0)
    if tl.max(longest) > 0:
        x = after_repetition(x, longest, record)
    return x


@triton.jit(do_not_specialize=["mask_words", "record_stride"])
def prepare(
    logits,
    stride,
    mask,
    mask_stride,
    mask_words,
    x,  # float32 [B, x_stride]
    counts,  # int32 [2, B, x_stride]
    x_stride,
    vocab,
    records,
    record_stride,
    HAS_MASK: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    PROBS: tl.constexpr,  # of which 0 means nothing
    BLOCK: tl.constexpr,
):
    """Stages 0 and 1 of one chunk of a row; clears its counts. Grid: rows, chunks."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    value = load_x(logits + row * stride, ids, vocab)
    if HAS_MASK:
        value = tl.where(allowed(mask + row * mask_stride, mask_words, ids), value, 0.0 if PROBS else NEG_INF)
    tl.store(x + row * x_stride + ids, value, mask=inside)
    if HAS_COUNTS:
        counts += row * x_stride
        tl.store(counts + ids, tl.zeros([BLOCK], tl.int32), mask=inside)
        if uses_history(records + row * record_stride):
            tl.store(repetitions(counts, x_stride) + ids, tl.zeros([BLOCK], tl.int32), mask=inside)


@triton.jit
def count_ids(token_ids, length, counts, vocab, part, parts, PROMPT: tl.constexpr, BLOCK: tl.constexpr):
    """Count every id of a row's list; ids outside the vocabulary are padding."""
    for start in range(part * BLOCK, length, parts * BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(token_ids + at, mask=at < length, other=-1)
        inside = (token >= 0) & (token < vocab)
        if PROMPT:
            tl.atomic_or(counts + token, tl.full([BLOCK], IN_PROMPT, tl.int32), mask=inside, sem="relaxed")
        else:
            tl.atomic_add(counts + token, tl.full([BLOCK], 1, tl.int32), mask=inside, sem="relaxed")


STRIDES = ["record_stride", "breakers_stride", "history_stride"]


@triton.jit(do_not_specialize=["prompt_length", "output_length", "num_breakers", "drafted_length", *STRIDES])
def edit(
    x,
    counts,
    x_stride,
    row_ptr,
    bias_ids,
    bias_values,
    prompt,
    prompt_stride,
    prompt_length,
    output,
    output_stride,
    output_length,
    breakers,
    breakers_stride,
    num_breakers,
    drafted,
    drafted_stride,
    drafted_length,
    requests,  # int64 [B]: whose lists before those of drafts a row has
    vocab,
    records,
    record_stride,
    history,  # int32 [B, history_stride]
    history_stride,
    HAS_BIAS: tl.constexpr,
    HAS_PROMPT: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_DRAFTS: tl.constexpr,
    HAS_REQUESTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stage 2, and what stage 3 needs to know. Grid: rows, parts."""
    row = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    x += row * x_stride
    counts += row * x_stride
    if HAS_BIAS:
        # An id appears once per row, so no two lanes write the same token.
        end = tl.load(row_ptr + row + 1)
        for start in range(tl.load(row_ptr + row) + part * BLOCK, end, parts * BLOCK):
            at = start + tl.arange(0, BLOCK)
            token = tl.load(bias_ids + at, mask=at < end, other=-1)
            inside = (token >= 0) & (token < vocab)  # a Bias may be written to after it was checked
            bias = tl.load(bias_values + at, mask=inside, other=0.0)
            value = tl.load(x + token, mask=inside, other=0.0)
            tl.store(x + token, value + bias, mask=inside)
    request = row
    if HAS_REQUESTS:
        request = tl.load(requests + row)
    prompt += request * prompt_stride
    output += request * output_stride
    drafted += row * drafted_stride
    if HAS_OUTPUT:
        count_ids(output, output_length, counts, vocab, part, parts, False, BLOCK)
    if HAS_DRAFTS:
        count_ids(drafted, drafted_length, counts, vocab, part, parts, False, BLOCK)
    if HAS_PROMPT:
        count_ids(prompt, prompt_length, counts, vocab, part, parts, True, BLOCK)
    if (HAS_PROMPT or HAS_OUTPUT) or HAS_DRAFTS:  # Triton 3.3 knows no longer chains
        record = records + row * record_stride
        if (part < PARTS) & uses_history(record):
            history += row * history_stride + part * (history_stride // PARTS)
            breakers += request * breakers_stride
            clear_history(history)
            if HAS_DRAFTS:
                collect(drafted, drafted_length, breakers, num_breakers, history, record, vocab)
            if HAS_OUTPUT:
                collect(output, output_length, breakers, num_breakers, history, record, vocab)
            if HAS_PROMPT:
                collect(prompt, prompt_length, breakers, num_breakers, history, record, vocab)
            find_repetitions(history, record, repetitions(counts, x_stride), part)
