"""Whole rows of output: filtered logits and probabilities, from the cutoffs that `sample` left in the workspace."""

import triton
import triton.language as tl

from .filters import from_key, keeps, key_of, min_p_threshold
from .mass import is_greedy, mass_of, mass_scale
from .process import MIN_P, NEG_INF, TEMPERATURE, load_float, load_x
from .sample import PEAK, TOTAL, final_cut, peak_key

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
    WHAT: tl.constexpr,  # KEPT: the processed logits themselves
    BLOCK: tl.constexpr,
):
    """One chunk of a row. Grid: rows, chunks."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    record = records + row * record_stride
    ws = workspace + row * ws_stride
    best = tl.load(ws + PEAK)
    temperature = load_float(record, TEMPERATURE)
    greedy = is_greedy(temperature)
    cut_key, cut_id = final_cut(ws, best, greedy)
    floor = tl.where(greedy, 0, min_p_threshold(load_float(record, MIN_P)))
    value = load_x(x + row * x_stride, ids, vocab)
    w = mass_of(value, from_key(peak_key(best)), mass_scale(temperature))
    kept = keeps(key_of(value), ids, cut_key, cut_id) & (w >= floor)
    if WHAT == PROBABILITIES:
        # The contract divides in float64 and rounds the quotient to float32.
        ratio = tl.where(kept, w, 0).to(tl.float64) / tl.load(ws + TOTAL).to(tl.float64)
        result = ratio.to(tl.float32)
    elif WHAT == FILTERED:
        divisor = tl.zeros_like(value) + tl.where(greedy, 1.0, temperature)
        result = tl.where(kept, tl.div_rn(value, divisor), NEG_INF)
    else:
        result = tl.where(kept, value, NEG_INF)
    tl.store(out + row * vocab + ids, result, mask=ids < vocab)
