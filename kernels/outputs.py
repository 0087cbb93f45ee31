"""Whole rows of output: filtered logits and probabilities, of what `sample` kept."""

import triton
import triton.language as tl

from .kept import Place, keeps, last_top_choice, load_kept, load_rest, ranks_before
from .keys import from_key, key_in, key_of
from .mass import is_greedy, mass_of, scales_of
from .process import NEG_INF, load_x
from .record import param
from .rounded import div
from .stats import divide
from .workspace import PEAK, REST, TOTAL

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
    WHAT: tl.constexpr,  # KEPT writes the processed logits, or probabilities, themselves
    PROBS: tl.constexpr,  # x holds probabilities, not logits
    BLOCK: tl.constexpr,
):
    """One chunk of a row. Grid: rows, chunks."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ws = workspace + row * ws_stride
    record, peak = records + row * record_stride, from_key(key_in(tl.load(ws + PEAK)))
    value = load_x(x + row * x_stride, ids, vocab)
    place = Place(key_of(value), ids)
    judged, drawn = scales_of(record, peak, PROBS)
    w = mass_of(value, peak, judged)
    kept = keeps(load_kept(ws), place, w)
    if WHAT == PROBABILITIES:
        if drawn != judged:
            w = mass_of(value, peak, drawn)
        # The contract divides in float64 and rounds the quotient to float32.
        result = share(ws, record, place, tl.where(kept, w, 0)).to(tl.float32)
    elif WHAT == FILTERED:
        temperature = param(record, "temperature")
        divisor = tl.zeros_like(value) + tl.where(is_greedy(temperature), 1.0, temperature)
        result = tl.where(kept, div(value, divisor), NEG_INF)
    else:
        result = tl.where(kept, value, 0.0 if PROBS else NEG_INF)
    tl.store(out + row * vocab + ids, result, mask=ids < vocab)


@triton.jit
def share(ws, record, place, w):
    """Probabilities of tokens of mass w, float64: of draws with and without what XTC excludes where it does so."""
    total, rest = tl.load(ws + TOTAL), tl.load(ws + REST)
    mass = w.to(tl.float64)
    result = divide(mass, total.to(tl.float64))
    if rest != total:
        coin = param(record, "xtc_probability").to(tl.float64)
        left = tl.where(ranks_before(load_rest(ws), place), mass, 0.0)
        # Where the rest has no mass, its first token counts as 1.
        left = tl.where((rest == 0) & (place.id == last_top_choice(ws)), 1.0, left)
        rest = tl.maximum(rest, 1)
        result = divide((1.0 - coin) * mass, total.to(tl.float64)) + divide(coin * left, rest.to(tl.float64))
    return result
