"""The law of a draw: masses of tokens, and tokens that are given rather than drawn (stem of csrc/cpu/law.h)."""

import triton
import triton.language as tl

from .kept import Place, drawn_from, keeps, last_top_choice, load_rest
from .keys import from_key, key_in, key_of
from .mass import mass_of, mass_of_peak, scales_of
from .philox import xtc_excludes
from .process import load_x, to_float32
from .record import param
from .scan import status_of
from .workspace import PEAK, REST, TOTAL


@triton.jit
def leaves_out(ws, record, seed, offset):
    """Whether draw 0 leaves out what XTC excludes, int32."""
    rest = tl.full([], 0, tl.int32)
    if tl.load(ws + TOTAL) != tl.load(ws + REST):
        zero = tl.full([], 0, tl.int32)
        rest = xtc_excludes(seed, offset, zero, param(record, "xtc_probability")).to(tl.int32)
    return rest


@triton.jit
def lone_mass(ws, PROBS: tl.constexpr):
    """The mass of the one token that XTC leaves where it leaves no mass: that of a row's maximum."""
    return mass_of_peak(from_key(load_rest(ws).key), PROBS)


@triton.jit
def mass_in_law(value, ids, ws, record, rest, PROBS: tl.constexpr):
    """The masses that draw 0 gives tokens, int64; 0 where they are not kept."""
    peak = from_key(key_in(tl.load(ws + PEAK)))
    judged, drawn = scales_of(record, peak, PROBS)
    w = mass_of(value, peak, judged)
    inside = keeps(drawn_from(ws, rest), Place(key_of(value), ids), w)
    if drawn != judged:
        w = mass_of(value, peak, drawn)
    w = tl.where(inside & (status_of(tl.load(ws + PEAK)) == 0), w, 0)
    if (rest > 0) & (tl.load(ws + REST) == 0):
        w = tl.where(ids == last_top_choice(ws), lone_mass(ws, PROBS), 0)
    return w


@triton.jit(do_not_specialize=["record_stride", "seed_stride", "offset_stride", "ws_stride"])
def weigh_tokens(
    x, x_stride, records, record_stride, seeds, seed_stride, offsets, offset_stride, workspace, ws_stride,
    tokens,  # int64 [B]: the drawn ones, which given ones replace
    given,  # int64 [B]
    weights,  # int64 [B, 2]
    vocab,
    HAS_GIVEN: tl.constexpr,
    PROBS: tl.constexpr,
):  # fmt: skip
    """The mass of a row's token and that of all. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    ws, record = workspace + row * ws_stride, records + row * record_stride
    token = tl.load(tokens + row)
    valid = status_of(tl.load(ws + PEAK)) == 0
    if HAS_GIVEN:
        own = tl.load(given + row)
        token = tl.where(valid & (own >= 0) & (own < vocab), own, token)
        tl.store(tokens + row, token)
    rest = leaves_out(ws, record, tl.load(seeds + row * seed_stride), tl.load(offsets + row * offset_stride))
    value = to_float32(tl.load(x + row * x_stride + tl.maximum(token, 0)))
    w = mass_in_law(value, token.to(tl.int32), ws, record, rest, PROBS)
    total = tl.load(ws + TOTAL)
    if rest > 0:
        total = tl.load(ws + REST)
        if total == 0:
            total = lone_mass(ws, PROBS)
    tl.store(weights + row * 2, tl.where(valid, w, 0))
    tl.store(weights + row * 2 + 1, tl.where(valid, total, 0))


@triton.jit(do_not_specialize=["record_stride", "seed_stride", "offset_stride", "ws_stride"])
def write_masses(
    x, x_stride, records, record_stride, seeds, seed_stride, offsets, offset_stride, workspace, ws_stride,
    masses,  # int64 [B, V]
    vocab,
    PROBS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The masses of one chunk of a row. Grid: rows, chunks."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ws, record = workspace + row * ws_stride, records + row * record_stride
    rest = leaves_out(ws, record, tl.load(seeds + row * seed_stride), tl.load(offsets + row * offset_stride))
    w = mass_in_law(load_x(x + row * x_stride, ids, vocab), ids, ws, record, rest, PROBS)
    tl.store(masses + row * vocab + ids, w, mask=ids < vocab)
