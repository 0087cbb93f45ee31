"""The rank order as integers: x descending, then id ascending, is key descending. No two tokens share a key."""

from __future__ import annotations

from ctypes import c_int64
from typing import NamedTuple

import torch

Tensor = torch.Tensor

ID_BITS = 32
IDS = 2**ID_BITS - 1  # the lower bits of the key of a token with id 0
HIGHEST = 2**63 - 1


def ordinal(x: Tensor) -> Tensor:
    """Integers in the order of float32 x, int64; equal for -0.0 and +0.0."""
    bits = x.view(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits).to(torch.int64)


def bits_of(x: Tensor) -> Tensor:
    """The bits of float32, int64."""
    return x.view(torch.int32).to(torch.int64)


def value(ordinals: Tensor) -> Tensor:
    """The float32 of an ordinal."""
    bits = torch.where(ordinals < 0, -ordinals - 2**31, ordinals)
    found: Tensor = bits.to(torch.int32).view(torch.float32)
    return found


def key(x: Tensor, ids: Tensor) -> Tensor:
    """int64, of float32 logits and ids below 2^32."""
    found: Tensor = (ordinal(x) << ID_BITS) + (IDS - ids)
    return found


def value_of(keys: Tensor) -> Tensor:
    """The logit of a token, float32, by its key; -inf of a key that is none's."""
    return torch.where(keys >= LOWEST, value(keys >> ID_BITS), -torch.inf)


def from_value(x: Tensor) -> Tensor:
    """The lowest key that a token of this logit may have."""
    return ordinal(x) << ID_BITS


LOWEST = int(from_value(torch.tensor(torch.finfo(torch.float32).min)))
"""The lowest key above -inf."""
NO_KEY = -(2**63)


class Kept(NamedTuple):
    """What filters leave of each row: low <= key < high, and mass >= floor. All are int64 [B, 1]."""

    high: Tensor
    low: Tensor
    floor: Tensor

    def holds(self, keys: Tensor, mass: Tensor) -> Tensor:
        """Whether tokens are kept, bool."""
        return (keys < self.high) & (keys >= self.low) & (mass >= self.floor)

    def whole(self) -> Tensor:
        """Whether that is all tokens above -inf, bool [B, 1]."""
        return (self.high == HIGHEST) & (self.low <= LOWEST) & (self.floor <= 0)

    def of(self, rows: Tensor) -> Kept:
        return Kept(self.high[rows], self.low[rows], self.floor[rows])


def everything(rows: int, device: torch.device) -> Kept:
    """All tokens above -inf."""
    return Kept(*(torch.full((rows, 1), bound, dtype=torch.int64, device=device) for bound in (HIGHEST, LOWEST, 0)))


def narrow_below(kept: Kept, high: Tensor) -> Kept:
    return kept._replace(high=torch.minimum(kept.high, high))


def narrow_above(kept: Kept, low: Tensor) -> Kept:
    return kept._replace(low=torch.maximum(kept.low, low))


def narrow_to_mass(kept: Kept, floor: Tensor) -> Kept:
    return kept._replace(floor=torch.maximum(kept.floor, floor))


def words_of(x: Tensor, ids: Tensor) -> Tensor:
    """int64, given float32 x and ids of -1 where there is no token."""
    found: Tensor = (bits_of(x) << 32) | (ids & IDS)
    return found


def no_words(rows: int, count: int, device: torch.device) -> Tensor:
    """Lists of no tokens."""
    return words_of(torch.full((rows, count), -torch.inf, device=device), torch.tensor(-1, device=device))


def by_row(found: Tensor) -> Tensor:
    """What ranks have told of each row, int64 [B, R n], given [R, B, ...] of n numbers."""
    return found.transpose(0, 1).reshape(found.shape[1], -1).contiguous()


def words_at(address: int, count: int) -> Tensor:
    """What lies there on the host, int64 [count]; one or more."""
    return torch.frombuffer((c_int64 * count).from_address(address), dtype=torch.int64)
