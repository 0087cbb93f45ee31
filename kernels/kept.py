"""Stage 7's one invariant: what any filters, in any order, leave of a row (stem of csrc/core/kept.h)."""

from typing import NamedTuple

import triton
import triton.language as tl

from .keys import INT_MAX, KEY_LOWEST
from .workspace import FLOOR, HIGH_ID, HIGH_KEY, LOW_ID, LOW_KEY


class Place(NamedTuple):
    """A token's place in the rank order (x descending, then id ascending), or a block of such places."""

    key: tl.tensor  # int32, has the order of x
    id: tl.tensor  # int32


class Kept(NamedTuple):
    """The tokens ranked below `high` (exclusive), ranked at or above `low`, of mass `floor` or more."""

    high: Place
    low: Place
    floor: tl.tensor  # int64


@triton.jit
def ranks_before(a, b):
    return (a.key > b.key) | ((a.key == b.key) & (a.id < b.id))


@triton.jit
def ranks_within(kept, token):
    """Whether a token's place lies in the interval; its mass is the caller's to compare."""
    above_low = (token.key > kept.low.key) | ((token.key == kept.low.key) & (token.id <= kept.low.id))
    below_high = (token.key < kept.high.key) | ((token.key == kept.high.key) & (token.id > kept.high.id))
    return above_low & below_high


@triton.jit
def keeps(kept, token, mass):
    return ranks_within(kept, token) & (mass >= kept.floor)


@triton.jit
def better(a, b):
    """Whichever of two places ranks before the other."""
    first = ranks_before(a, b)
    return Place(tl.where(first, a.key, b.key), tl.where(first, a.id, b.id))


@triton.jit
def narrow_below(kept, high):
    first = ranks_before(kept.high, high)
    place = Place(tl.where(first, high.key, kept.high.key), tl.where(first, high.id, kept.high.id))
    return Kept(place, kept.low, kept.floor)


@triton.jit
def narrow_above(kept, low):
    return Kept(kept.high, better(low, kept.low), kept.floor)


@triton.jit
def narrow_to_mass(kept, floor):
    return Kept(kept.high, kept.low, tl.maximum(floor, kept.floor))


@triton.jit
def place_at(key, token):
    """A place of scalars, whichever kind of integers they are."""
    return Place(tl.full([], 0, tl.int32) + key, tl.full([], 0, tl.int32) + token)


@triton.jit
def all_above(low):
    return Kept(place_at(INT_MAX, -1), low, tl.full([], 0, tl.int64))


@triton.jit
def everything():
    """All tokens above -inf."""
    return all_above(place_at(KEY_LOWEST, INT_MAX))


@triton.jit
def load_kept(ws):
    high = Place(tl.load(ws + HIGH_KEY).to(tl.int32), tl.load(ws + HIGH_ID).to(tl.int32))
    low = Place(tl.load(ws + LOW_KEY).to(tl.int32), tl.load(ws + LOW_ID).to(tl.int32))
    return Kept(high, low, tl.load(ws + FLOOR))


@triton.jit
def store_kept(ws, kept):
    tl.store(ws + HIGH_KEY, kept.high.key.to(tl.int64))
    tl.store(ws + HIGH_ID, kept.high.id.to(tl.int64))
    tl.store(ws + LOW_KEY, kept.low.key.to(tl.int64))
    tl.store(ws + LOW_ID, kept.low.id.to(tl.int64))
    tl.store(ws + FLOOR, kept.floor)
