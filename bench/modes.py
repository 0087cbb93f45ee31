"""The measured sampling modes as data, over the logits makers of tests/support/cases.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import fastsample as fs

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from cases import MAKERS, finish

SEED = 1


@dataclass(frozen=True)
class Mode:
    """One way to sample; `limits` are the target ratios to amax for B = 1 and B = 64."""

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

FILTERS = [Mode(f"k{k}", {"top_k": k}) for k in (1, 50, 1000, 50_000)]
FILTERS += [Mode(f"p{str(p)[1:]}", {"top_p": p}) for p in (0.1, 0.9, 0.999)]
"""Single filters at T = 1, for how much the latency depends on the logits."""

BY_NAME = {mode.name: mode for mode in [*MODES, *FILTERS]}


@lru_cache(maxsize=1)  # one input is measured in many ways before the next is made
def make_logits(name: str, rows: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits [rows, vocab] of one of the makers, the same at every call. Read-only."""
    return finish(MAKERS[name](rows, vocab, torch.Generator().manual_seed(7)), dtype)


def extra_inputs(mode: Mode, logits: torch.Tensor) -> dict[str, Any]:
    """A bitmask that allows everything, 250 prompt ids and 250 output ids, for modes that use them."""
    if not mode.extras:
        return {}
    rows, vocab = logits.shape
    ids = torch.randint(vocab, (rows, 500), generator=torch.Generator().manual_seed(3)).to(logits.device)
    words = torch.full((rows, (vocab + 31) // 32), -1, dtype=torch.int32, device=logits.device)
    return {"bitmask": words, "prompt_ids": ids[:, :250], "output_ids": ids[:, 250:]}


def prepare(mode: Mode, logits: torch.Tensor, backend: str = "auto", **fields: Any) -> Callable[[], fs.SampleOutput]:
    """A step of a prepared Sampler with out=, as in a serving loop; `fields` override the mode's."""
    options = {"seed": SEED, "on_invalid": "flag", "backend": backend, **mode.request}
    sampler = fs.Sampler(batch_size=logits.shape[0], **options, **{**mode.fields, **fields})
    extras = extra_inputs(mode, logits)
    out = sampler(logits, **extras)
    return lambda: sampler(logits, out=out, **extras)
