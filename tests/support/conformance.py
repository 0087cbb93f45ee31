"""What it means that two engines agree: equal to the bit, log-probabilities to 2 ulp."""

from __future__ import annotations

import torch

LOGPROB_ULP = 2


def bits(x: torch.Tensor) -> torch.Tensor:
    sizes = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
    return x.view(sizes.get(x.dtype, x.dtype))


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in units in the last place; a NaN is only near a NaN."""
    a, b = (torch.where(x.isnan(), torch.nan, x + 0.0) for x in (a, b))
    i, j = (torch.where(x < 0, -(2**31) - x, x) for x in (bits(a).long(), bits(b).long()))
    return int((i - j).abs().max()) if a.numel() else 0


def invalid_rows() -> torch.Tensor:
    """Rows with each status, NaN and infinities in first, middle and last place, alone and together."""
    x = torch.randn(16, 1030, generator=torch.Generator().manual_seed(1))
    nan, inf = torch.nan, torch.inf
    for row, (at, value) in enumerate([(0, nan), (513, nan), (1029, nan), (0, inf), (700, inf), (1029, inf)]):
        x[2 * row, at] = value
    x[12] = -inf
    x[13, 5], x[13, 900] = inf, nan
    x[14], x[14, 1029] = -inf, nan
    return x
