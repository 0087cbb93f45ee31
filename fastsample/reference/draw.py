"""Stage 8: random bits, and the token that they draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor

PLAIN_DRAW, XTC_COIN, ACCEPTANCE, RESIDUAL = 0, 1, 3, 4  # purposes of random bits; 2 is a drafter's


def draw_from(w: Tensor, u: Tensor) -> Tensor:
    """The first id whose running mass, in id order, exceeds floor(u * Z / 2^60)."""
    return draw_at(w.cumsum(-1), u)


def draw_at(running: Tensor, u: Tensor) -> Tensor:
    """The same, given the running masses."""
    threshold = multiply_high60(u, running[:, -1:])
    return torch.searchsorted(running, threshold.contiguous(), right=True).clamp(max=running.shape[1] - 1)


def uniform60(seed: Tensor, offset: Tensor, index: Tensor, purpose: int = PLAIN_DRAW) -> Tensor:
    """60 uniform bits per (seed, offset, draw index) for a purpose."""
    zero = torch.zeros_like(offset + index)
    counter = (zero + low32(offset), zero + low32(offset >> 32), zero + index, zero + purpose)
    words = philox4x32(counter, (low32(seed), low32(seed >> 32)))
    return (words[0] << 28) | (words[1] >> 4)


def philox4x32(counter: Sequence[Tensor], key: tuple[Tensor, Tensor], rounds: int = 10) -> list[Tensor]:
    """Philox4x32 (Salmon et al. 2011) on 32-bit words held in int64 tensors."""
    c, (k0, k1) = list(counter), key
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves right.
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [low32(p1 >> 32) ^ c[1] ^ k0, low32(p1), low32(p0 >> 32) ^ c[3] ^ k1, low32(p0)]
        k0, k1 = low32(k0 + 0x9E3779B9), low32(k1 + 0xBB67AE85)
    return c


def low32(x: Tensor) -> Tensor:
    return x & 0xFFFFFFFF


def multiply_high60(u: Tensor, total: Tensor) -> Tensor:
    """floor(u * total / 2^60) for u < 2^60 and total <= 2^60, in halves of 30 bits."""
    bits = 2**30 - 1
    u1, u0, z1, z0 = u >> 30, u & bits, total >> 30, total & bits
    return u1 * z1 + ((u1 * z0 + u0 * z1 + (u0 * z0 >> 30)) >> 30)
