"""Arithmetic on the bits of probabilities.

A probability may be subnormal, and under `torch.set_flush_denormal(True)` torch's float operations read such a number
as 0. So decisions here look at the bits of probabilities, which order non-negative floats as integers.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

_INFINITY = 0x7F800000  # bits of +inf
_LEAST = 149  # the least subnormal is 2^-149


def is_negative(p: Tensor) -> Tensor:
    """Whether a value lies below -0.0 (whose bits are the least int32), or is a NaN with a sign."""
    bits = _bits(p)
    return (bits < 0) & (bits != -(2**31))


def exactly(p: Tensor) -> Tensor:
    """float64 of the values of a float32, float16 or bfloat16 tensor, subnormal ones too."""
    bits = _bits(p)
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


def _bits(p: Tensor) -> Tensor:
    """The bits of float32, float16 or bfloat16 values as float32, int32."""
    return p.float().view(torch.int32)
