"""Probabilities as integers: their mass, and arithmetic on their bits.

A probability may be subnormal, and under `torch.set_flush_denormal(True)` torch's float operations read such a number
as 0. So decisions here look at the bits of probabilities, which order non-negative floats as integers.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

_INFINITY = 0x7F800000  # bits of +inf; those of a positive NaN are above it
_ONE = 127 << 23  # bits of 1
_SMALL = 67 << 23  # bits of 2^-60: if a row's maximum is below this, a token with mass may be subnormal
_LEAST = 149  # the least subnormal is 2^-149


def scale(p: Tensor) -> tuple[Tensor, Tensor]:
    """p 2^s, float32 [B, V], whose integer part is a token's mass; and which rows are valid, bool [B].

    s depends on the row: the largest p gets a mass in [2^39, 2^40), so that sums fit the contract's 60 bits. The
    scaling is exact for every p that has a mass (down to 2^-40 of the largest), subnormal ones included.
    """
    bits = bits_of(p)
    high, sound = peaks(bits)
    valid = sound & (high > 0)
    on_cpu = p.device.type == "cpu"
    if not on_cpu or not bool(valid.all()):
        bits = torch.where(valid[:, None], bits, 0)
        high = torch.where(valid, high, _ONE)
    x = bits.view(torch.float32)
    small = high < _SMALL
    if not on_cpu or bool(small.any()):
        x = torch.where(small[:, None], _lift(bits), x)
        high = torch.where(small, _lift(high).view(torch.int32), high)
    factor = (40 + 2 * 127 - 1 - (high >> 23) << 23).view(torch.float32)
    return x * factor[:, None], valid


def bits_of(p: Tensor) -> Tensor:
    """The bits of float32, float16 or bfloat16 values as float32, int32."""
    return p.float().view(torch.int32)


def peaks(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The bits of the largest value over the last dimension, and whether all are finite and non-negative."""
    low, high = bits.amin(-1), bits.amax(-1)
    sound = high < _INFINITY
    if bits.device.type != "cpu" or bool((low < 0).any()):
        sound &= ~is_negative(bits).any(-1)
    return high, sound


def is_negative(bits: Tensor) -> Tensor:
    """Whether a value lies below -0.0 (whose bits are the least int32), or is a NaN with a sign."""
    return (bits < 0) & (bits != -(2**31))


def _lift(bits: Tensor) -> Tensor:
    """2^149 x, exactly, for 0 <= x < 2^-20: a subnormal's bits count units of 2^-149."""
    bits = bits.clamp(min=0)  # -0.0
    return torch.where(bits < 1 << 23, bits.float(), (bits + (_LEAST << 23)).view(torch.float32))


def exactly(p: Tensor) -> Tensor:
    """float64 of the values of a float32, float16 or bfloat16 tensor, subnormal ones too."""
    bits = bits_of(p)
    units = (bits & (1 << 23) - 1).double().copysign(p)
    return torch.where(bits & _INFINITY == 0, units * 2.0**-_LEAST, p.double())


def rounded(values: Tensor) -> Tensor:
    """float32 of float64 values, subnormal ones too."""
    result = values.float()
    tiny = (values != 0) & (values.abs() < 2.0**-126)
    if values.device.type == "cpu" and bool(tiny.any()):
        units = (values.abs() * 2.0**_LEAST).round().clamp(max=2.0**23).to(torch.int32)
        signed = torch.where(values < 0, units - 2**31, units)
        result = torch.where(tiny, signed.view(torch.float32), result)
    return result


def excess(a: Tensor, b: Tensor) -> Tensor:
    """max(0, a - b) of probabilities [B, V], each rounded to float32, up to a factor of its row."""
    a, b = a.float(), b.float()
    rest = (a - b).clamp(min=0)
    if rest.device.type != "cpu" or rest.numel() == 0:
        return rest
    # The largest may have been flushed to 0. In float64 it is not, and rounding twice is exact (53 >= 2 * 24 + 2).
    small = rest.amax(-1) < 2.0**-60
    if bool(small.any()):
        exact = (exactly(a[small]) - exactly(b[small])).clamp(min=0)
        exponent = exact.amax(-1, keepdim=True).frexp().exponent.to(torch.int64)
        rest[small] = (exact * (1023 - exponent << 52).view(torch.float64)).float()
    return rest
