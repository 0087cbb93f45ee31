"""What is measured: sampling modes as data, over the logits makers of tests/cases.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastsample as fs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cases import MAKERS, finish


@dataclass(frozen=True)
class Mode:
    """One way to sample; `limits` are the ratios to amax that are aimed at for B = 1 and B = 64."""

    name: str
    fields: dict[str, Any]
    limits: tuple[float, float] | None = None
    request: dict[str, Any] = field(default_factory=dict)
    extras: bool = False  # with a bitmask and 500 token ids


_EVERYTHING = {
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
}

MODES = [
    Mode("greedy", {"temperature": 0.0}, (1.3, 1.2)),
    Mode("k50 p.95", {"temperature": 0.8, "top_k": 50, "top_p": 0.95}, (2, 1.5)),
    Mode("min_p", {"temperature": 0.8, "min_p": 0.05}, (2, 1.5)),
    Mode("everything", _EVERYTHING, (4, 2.5), {"logprobs": "processed"}, extras=True),
    Mode("p.95", {"temperature": 0.8, "top_p": 0.95}, (7, 3.5)),
    Mode("T", {"temperature": 0.8}, (7, 3.5)),
    Mode("k50 p.95 raw", {"temperature": 0.8, "top_k": 50, "top_p": 0.95}, (8, 4.5), {"logprobs": "raw"}),
    Mode("T n=16", {"temperature": 0.8}, None, {"num_samples": 16}),
]


def make_logits(name: str, rows: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits [rows, vocab] of one of the makers, the same at every call."""
    return finish(MAKERS[name](rows, vocab, torch.Generator().manual_seed(7)), dtype)


def prepare(mode: Mode, logits: torch.Tensor, backend: str = "auto") -> Callable[[], Any]:
    """A step of a prepared Sampler into buffers of its own, as a serving loop would call it."""
    rows, vocab = logits.shape
    options = {"seed": 1, "on_invalid": "flag", "backend": backend, **mode.request}
    sampler = fs.Sampler(batch_size=rows, **options, **mode.fields)
    extras: dict[str, Any] = {}
    if mode.extras:
        g = torch.Generator().manual_seed(3)
        ids = torch.randint(vocab, (rows, 500), generator=g).to(logits.device)
        extras = {"prompt_ids": ids[:, :250], "output_ids": ids[:, 250:]}
        extras["bitmask"] = torch.full((rows, (vocab + 31) // 32), -1, dtype=torch.int32, device=logits.device)
    out = sampler(logits, **extras)
    return lambda: sampler(logits, out=out, **extras)
