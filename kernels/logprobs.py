"""Log-probabilities, ranks and top-n of the sampled tokens, from integer masses in float64 (csrc/cpu/logprobs.h)."""

import triton
import triton.language as tl

from .kept import Place, load_kept, ranks_within
from .keys import LONG_MIN, from_key, id_in, key_in, key_of, ranked
from .mass import MASS_UNIT, drawn_scale, mass_of
from .outputs import share
from .process import NEG_INF, load_x, to_float32
from .scan import status_of
from .workspace import PEAK, TOTAL


@triton.jit
def logprob(x, ids, ws, record, RAW: tl.constexpr, PROBS: tl.constexpr):
    """Of tokens with logit x, in the distribution whose workspace `ws` is: the raw logits', or the one drawn from."""
    peak = from_key(key_in(tl.load(ws + PEAK)))
    if RAW and not PROBS:
        normaliser = tl.log(tl.load(ws + TOTAL).to(tl.float64) * (1.0 / MASS_UNIT))
        result = (x.to(tl.float64) - peak.to(tl.float64)) - normaliser
    else:
        w = mass_of(x, peak, drawn_scale(record, peak, PROBS))
        result = tl.log(share(ws, record, Place(key_of(x), ids), w))
    return result.to(tl.float32)


@triton.jit
def sound(ws):
    """Whether the row of this workspace is a distribution at all, that is, valid."""
    return status_of(tl.load(ws + PEAK)) == 0


@triton.jit
def sampled(
    x, x_stride, records, record_stride, workspace, ws_stride, tokens, logprobs, ranks, listed, num_samples,
    RAW: tl.constexpr, PROBS: tl.constexpr,
):  # fmt: skip
    """Log-probability of one draw; initialises its rank and the row's list. Grid: rows x draws."""
    row, j = tl.program_id(0).to(tl.int64) // num_samples, tl.program_id(0) % num_samples
    ws = workspace + row * ws_stride
    token = tl.load(tokens + row * num_samples + j)
    value = to_float32(tl.load(x + row * x_stride + tl.maximum(token, 0)))
    good = (token >= 0) & sound(ws)
    own = logprob(value, token.to(tl.int32), ws, records + row * record_stride, RAW, PROBS)
    own = tl.where(good, own, float("nan"))  # no constant: Triton would find that a NaN has changed
    tl.store(logprobs + row * num_samples + j, own)
    tl.store(ranks + row * num_samples + j, (token >= 0).to(tl.int64))
    if j == 0:
        tl.store(listed + row, tl.full([], 0, tl.int32))


@triton.jit
def rank(x, x_stride, tokens, ranks, num_samples, vocab, chunks, BLOCK: tl.constexpr):
    """Add to each rank the tokens of this part that are strictly above. Grid: rows, parts."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    x += row * x_stride
    for j in range(num_samples):
        token = tl.load(tokens + row * num_samples + j)
        if token >= 0:
            own = to_float32(tl.load(x + token))
            above = tl.full([], 0, tl.int64)
            for chunk in range(part, chunks, parts):
                ids = chunk * BLOCK + tl.arange(0, BLOCK)
                above += tl.sum((load_x(x, ids, vocab) > own).to(tl.int32))
            tl.atomic_add(ranks + row * num_samples + j, above, sem="relaxed")


@triton.jit
def collect(
    x, x_stride, workspace, ws_stride, cuts, cuts_stride, tokens, num_samples, listed, found, num_top, vocab,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """List the tokens of one chunk that the workspace `cuts` keeps, in any order. Grid: rows, chunks."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if sound(workspace + row * ws_stride) & (tl.load(tokens + row * num_samples) >= 0):
        key = key_of(load_x(x + row * x_stride, ids, vocab))
        kept = ranks_within(load_kept(cuts + row * cuts_stride), Place(key, ids)).to(tl.int32)
        if tl.max(kept) > 0:
            at = tl.atomic_add(listed + row, tl.sum(kept), sem="relaxed") + tl.cumsum(kept, 0) - 1
            tl.store(found + row * num_top + at, ranked(key, ids), mask=kept > 0)


@triton.jit
def arrange(
    records, record_stride, workspace, ws_stride, tokens, num_samples, listed, found, num_top, top_ids, top_logprobs,
    RAW: tl.constexpr, PROBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put listed tokens in rank order: a token's place is the number of those above it. Grid: rows, blocks."""
    row = tl.program_id(0).to(tl.int64)
    ws = workspace + row * ws_stride
    here = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(listed + row)
    own = tl.load(found + row * num_top + here, mask=here < count, other=0)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        there = start + tl.arange(0, BLOCK)
        other = tl.load(found + row * num_top + there, mask=there < count, other=LONG_MIN)
        place += tl.sum((other[None, :] > own[:, None]).to(tl.int32), 1)
    there = here < count
    place = tl.where(there, place, here)
    value = logprob(from_key(key_in(own)), id_in(own), ws, records + row * record_stride, RAW, PROBS)
    good = sound(ws) & (tl.load(tokens + row * num_samples) >= 0)
    value = tl.where(there, value, tl.where(good, NEG_INF, float("nan")))
    token = tl.where(there, id_in(own), -1)
    tl.store(top_ids + row * num_top + place, token.to(tl.int64), mask=here < num_top)
    tl.store(top_logprobs + row * num_top + place, value, mask=here < num_top)
