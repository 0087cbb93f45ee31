"""Whole rows of output: filtered logits and probabilities, of what `sample` kept."""

import triton
import triton.language as tl

from .kept import Place, keeps, load_kept
from .keys import from_key, key_in, key_of
from .mass import is_greedy, mass_of, mass_scale
from .process import NEG_INF, load_x
from .record import param
from .workspace import PEAK, TOTAL

FILTERED, PROBABILITIES, KEPT = map(tl.constexpr, range(3))


@triton.jit
def write(
    x,
    x_stride,
    records,
    record_stride,
    workspace,
    ws_stride,
    out,  # float32 [B, V]
    vocab,
    WHAT: tl.constexpr,  # KEPT writes the processed logits themselves
    BLOCK: tl.constexpr,
):
    """One chunk of a row. Grid: rows, chunks."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ws = workspace + row * ws_stride
    temperature = param(records + row * record_stride, "temperature")
    value = load_x(x + row * x_stride, ids, vocab)
    w = mass_of(value, from_key(key_in(tl.load(ws + PEAK))), mass_scale(temperature))
    kept = keeps(load_kept(ws), Place(key_of(value), ids), w)
    if WHAT == PROBABILITIES:
        # The contract divides in float64 and rounds the quotient to float32.
        ratio = tl.where(kept, w, 0).to(tl.float64) / tl.load(ws + TOTAL).to(tl.float64)
        result = ratio.to(tl.float32)
    elif WHAT == FILTERED:
        divisor = tl.zeros_like(value) + tl.where(is_greedy(temperature), 1.0, temperature)
        result = tl.where(kept, tl.div_rn(value, divisor), NEG_INF)
    else:
        result = tl.where(kept, value, NEG_INF)
    tl.store(out + row * vocab + ids, result, mask=ids < vocab)
