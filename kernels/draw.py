"""Stage 8: what is kept weighed, and tokens drawn from it (stem of csrc/cpu/draw.h)."""

from typing import NamedTuple

import triton
import triton.language as tl

from .candidates import mass_listed
from .kept import (
    Place,
    drawn_from,
    excludes,
    keeps,
    last_top_choice,
    load_kept,
    mass_if_kept,
    only,
    store_kept,
)
from .keys import INT_MAX, LONG_MIN, from_key, id_in, key_in, key_of, ranked
from .mass import mass_of, mass_of_peak
from .philox import draw_threshold, xtc_excludes
from .record import param
from .row import find_chunk, load_chunk, may_hold, sum_of_chunks
from .scan import status_of
from .workspace import BY_ID, FIRST, PEAK, REST, TOTAL


class Draws(NamedTuple):
    """Pointers to what a row's draws come from and to where they go."""

    seed: tl.tensor
    offset: tl.tensor
    step: tl.tensor  # of this row from the one at the offset
    tokens: tl.tensor  # [count]
    count: tl.tensor  # num_samples


@triton.jit
def kept_mass(row, kept, chunk, peak, scale, drawn, BLOCK: tl.constexpr):
    """Mass to draw from of a chunk's tokens where kept, else 0."""
    ids, value = load_chunk(row, chunk, BLOCK)
    return mass_if_kept(kept, Place(key_of(value), ids), value, peak, scale, drawn)


@triton.jit
def weigh(row, peak, scale, drawn, BLOCK: tl.constexpr):
    """The kept mass of each of this part's chunks; then that of what XTC leaves, where it excludes something."""
    whole = tl.full([], 0, tl.int64)
    for rest in range(1 + excludes(row.ws).to(tl.int32)):
        kept = drawn_from(row.ws, rest)
        for chunk in range(row.begin, row.end):
            mass = tl.full([], 0, tl.int64)
            if may_hold(row, chunk, kept, peak, scale):
                mass = tl.sum(kept_mass(row, kept, chunk, peak, scale, drawn, BLOCK))
            tl.store(row.chunk_sums + rest * row.chunks + chunk, mass)
            whole += mass
    kept = load_kept(row.ws)
    if (whole == 0) & ((drawn != scale) | (kept.high.key != INT_MAX)):
        find_first(row, kept, peak, scale, BLOCK)


@triton.jit
def find_first(row, kept, peak, scale, BLOCK: tl.constexpr):
    """The first token in the rank order of what is kept, for the case that none of it has any mass.

    That takes a low temperature after the filters, or filters that leave out the maximum.
    """
    first = tl.full([], LONG_MIN, tl.int64)
    for chunk in range(row.begin, row.end):
        if may_hold(row, chunk, kept, peak, scale):
            ids, value = load_chunk(row, chunk, BLOCK)
            key = key_of(value)
            inside = keeps(kept, Place(key, ids), mass_of(value, peak, scale))
            first = tl.maximum(first, tl.max(tl.where(inside, ranked(key, ids), LONG_MIN)))
    tl.atomic_max(row.ws + FIRST, first, sem="relaxed")


@triton.jit
def draw(row, draws, whole, peak, scale, drawn, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Stage 8, where what is kept has some mass: each of the row's programs takes its share of the draws."""
    has_rest = excludes(row.ws)
    left = whole
    if has_rest:
        left = sum_of_chunks(row, row.chunk_sums + row.chunks, CHUNKS)
    if row.part == 0:
        tl.store(row.ws + TOTAL, whole)
        tl.store(row.ws + REST, left)
    seed, offset = tl.load(draws.seed), tl.load(draws.offset) + draws.step
    for j in range(row.part, draws.count, row.parts):
        index = tl.full([], 0, tl.int32) + j
        rest = tl.full([], 0, tl.int32)
        if has_rest:
            rest = xtc_excludes(seed, offset, index, param(row.record, "xtc_probability")).to(tl.int32)
        threshold = draw_threshold(seed, offset, index, tl.where(rest > 0, left, whole))
        chunk, before = find_chunk(row, row.chunk_sums + rest * row.chunks, threshold, CHUNKS)
        mass = kept_mass(row, drawn_from(row.ws, rest), chunk, peak, scale, drawn, BLOCK)
        token = chunk * BLOCK + tl.sum((before + tl.cumsum(mass, 0) <= threshold).to(tl.int32))
        token = tl.where((rest > 0) & (left == 0), last_top_choice(row.ws), token)
        tl.store(draws.tokens + j, token.to(tl.int64))


@triton.jit
def settle_on(row, draws, best, PROBS: tl.constexpr):
    """What is left is one token: of a greedy row, or of one whose kept tokens have no mass. An invalid row has none."""
    token = tl.where(status_of(best) == 0, id_in(best), -1)
    for j in range(draws.count):
        tl.store(draws.tokens + j, token.to(tl.int64))
    store_kept(row.ws, only(key_in(best), token))
    tl.store(row.ws + PEAK, best)
    total = tl.where(token < 0, 1, mass_of_peak(from_key(key_in(best)), PROBS))
    tl.store(row.ws + TOTAL, total)
    tl.store(row.ws + REST, total)


@triton.jit
def draw_listed(row, draws, peak, scale, drawn):
    """Stage 8 by one program, for a row whose candidates are listed and which nothing else narrows."""
    mass = mass_listed(row, BY_ID, load_kept(row.ws), peak, scale, drawn)
    whole, running = tl.sum(mass), tl.cumsum(mass, 0)
    tl.store(row.ws + TOTAL, whole)
    tl.store(row.ws + REST, whole)
    seed, offset = tl.load(draws.seed), tl.load(draws.offset) + draws.step
    for j in range(draws.count):
        threshold = draw_threshold(seed, offset, tl.full([], 0, tl.int32) + j, whole)
        at = tl.sum((running <= threshold).to(tl.int32))
        tl.store(draws.tokens + j, id_in(tl.load(row.ws + BY_ID + at)).to(tl.int64))
