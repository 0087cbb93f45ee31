"""Stage 7's one invariant: what any filters, in any order, leave of a row (stem of csrc/core/kept.h)."""

from typing import NamedTuple

import triton
import triton.language as tl

from .keys import INT_MAX, KEY_LOWEST
from .mass import mass_of
from .workspace import FLOOR, HIGH_ID, HIGH_KEY, LOW_ID, LOW_KEY, REST_ID, REST_KEY


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
    return ranks_before(kept.high, token) & ~ranks_before(kept.low, token)


@triton.jit
def keeps(kept, token, mass):
    return ranks_within(kept, token) & (mass >= kept.floor)


@triton.jit
def mass_if_kept(kept, token, x, peak, scale, drawn):
    """Mass to draw from, of the scale `drawn`, of tokens that are kept, whose filters judge by `scale`; of others 0."""
    w = mass_of(x, peak, scale)
    inside = keeps(kept, token, w)
    if drawn != scale:
        w = mass_of(x, peak, drawn)
    return tl.where(inside, w, 0)


@triton.jit
def narrow_below(kept, high):
    lower = ranks_before(kept.high, high)
    key, token = tl.where(lower, high.key, kept.high.key), tl.where(lower, high.id, kept.high.id)
    return Kept(Place(key, token), kept.low, kept.floor)


@triton.jit
def narrow_above(kept, low):
    higher = ranks_before(low, kept.low)
    key, token = tl.where(higher, low.key, kept.low.key), tl.where(higher, low.id, kept.low.id)
    return Kept(kept.high, Place(key, token), kept.floor)


@triton.jit
def narrow_to_mass(kept, floor):
    return Kept(kept.high, kept.low, tl.maximum(floor, kept.floor))


@triton.jit
def place_at(key, token):
    """The place of one token."""
    return Place(tl.full([], 0, tl.int32) + key, tl.full([], 0, tl.int32) + token)


@triton.jit
def only(key, token):
    """One token; nothing if its id is -1."""
    return Kept(place_at(key, token - 1), place_at(key, token), tl.full([], 0, tl.int64))


@triton.jit
def everything():
    """All tokens above -inf."""
    return Kept(place_at(INT_MAX, -1), place_at(KEY_LOWEST, INT_MAX), tl.full([], 0, tl.int64))


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


@triton.jit
def load_rest(ws):
    """The place before the first token that XTC leaves: draws whose coin says so take only what ranks after it."""
    return Place(tl.load(ws + REST_KEY).to(tl.int32), tl.load(ws + REST_ID).to(tl.int32))


@triton.jit
def store_rest(ws, high):
    tl.store(ws + REST_KEY, high.key.to(tl.int64))
    tl.store(ws + REST_ID, high.id.to(tl.int64))


@triton.jit
def last_top_choice(ws):
    """The id of the first token that XTC leaves."""
    return load_rest(ws).id + 1


@triton.jit
def excludes(ws):
    """Whether some draws leave tokens out."""
    return ranks_before(load_kept(ws).high, load_rest(ws))


@triton.jit
def drawn_from(ws, rest):
    """What is kept, or what XTC leaves of it."""
    kept = load_kept(ws)
    if rest:
        kept = narrow_below(kept, load_rest(ws))
    return kept
