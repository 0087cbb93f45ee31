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
    """One way to sample; `limits` are the target ratios for B = 1 and B = 64, to amax or to the mode `beside`."""

    name: str
    fields: dict[str, Any]
    limits: tuple[float, float] | None = None
    request: dict[str, Any] = field(default_factory=dict)
    extras: bool = False  # with a bitmask and 500 token ids
    beside: str = ""  # the mode that it is measured against
    history: str = ""  # with 4096 token ids, of this kind
    call: str = ""  # a function of fastsample.integrations.flashinfer instead of a Sampler

    @property
    def of_probs(self) -> bool:
        """Whether it takes probabilities."""
        return self.request.get("input") == "probs" or self.call.endswith("from_probs")


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

_ONE: dict[str, tuple[dict[str, Any], float | None]] = {  # how many times as long as temperature alone, at most
    "top-n-sigma": ({"top_n_sigma": 1.0}, None),
    "typical": ({"typical_p": 0.9}, 1.5),
    "epsilon": ({"epsilon_cutoff": 9e-4}, 1.5),
    "eta": ({"eta_cutoff": 2e-3}, 1.5),
    "top-a": ({"top_a": 0.2}, 1.5),
    "p-less": ({"p_less": True}, 1.5),
    "XTC": ({"xtc_probability": 0.5, "xtc_threshold": 0.1}, 1.6),
}
_XTC = _ONE["XTC"][0]
_DRY = {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2}
_LLAMA = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "order": "temperature_last"}
_K50 = {"top_k": 50, "top_p": 0.95}

SAMPLERS = [Mode(n, {"temperature": 0.8, **f}, m and (m, m), beside="T") for n, (f, m) in _ONE.items() if m]
SAMPLERS += [
    Mode("top-n-sigma", {"temperature": 0.8, **_ONE["top-n-sigma"][0]}, (2, 2), beside="greedy"),
    Mode("k50 T", {"temperature": 0.8, "top_k": 50}),
    *(Mode(f"k50 {n}", {"temperature": 0.8, "top_k": 50, **f}, beside="k50 T") for n, (f, _) in _ONE.items()),
    Mode("DRY", {"temperature": 0.8, "min_p": 0.05, **_DRY}, beside="min_p", history="text"),
    Mode("DRY one token", {"temperature": 0.8, "min_p": 0.05, **_DRY}, beside="min_p", history="one token"),
    Mode("min_p XTC DRY", {"temperature": 0.8, "min_p": 0.05, **_XTC, **_DRY}, beside="min_p", history="text"),
    Mode("llama.cpp", _LLAMA, beside="k50 p.95"),
    Mode("k50 p.95 T1", _K50),
    Mode("k50 p.95 probs", _K50, (1.5, 1.5), {"input": "probs"}, beside="k50 p.95 T1"),
    Mode("from_logits", _K50, call="top_k_top_p_sampling_from_logits"),
    Mode("from_probs", _K50, (1.5, 1.5), call="top_k_top_p_sampling_from_probs", beside="from_logits"),
]
"""The other filters, DRY, presets, and probabilities; each beside the mode that tells what it adds."""

BY_NAME = {mode.name: mode for mode in [*MODES, *FILTERS, *SAMPLERS]}
HISTORY = 4096


@lru_cache(maxsize=1)  # one input is measured in many ways before the next is made
def make_logits(name: str, rows: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits [rows, vocab] of one of the makers, the same at every call. Read-only."""
    return finish(MAKERS[name](rows, vocab, torch.Generator().manual_seed(7)), dtype)


def rows_of(mode: Mode, logits: torch.Tensor) -> torch.Tensor:
    """What the mode takes: these logits, or their probabilities."""
    return logits.softmax(-1, torch.float32).to(logits.dtype) if mode.of_probs else logits


def extra_inputs(mode: Mode, logits: torch.Tensor) -> dict[str, Any]:
    """For modes that use them: a bitmask that allows everything, 250 prompt ids and 250 output ids; or a history."""
    rows, vocab = logits.shape
    if mode.history:
        return {"output_ids": history(mode.history, logits).to(logits.device)}
    if not mode.extras:
        return {}
    ids = torch.randint(vocab, (rows, 500), generator=torch.Generator().manual_seed(3)).to(logits.device)
    words = torch.full((rows, (vocab + 31) // 32), -1, dtype=torch.int32, device=logits.device)
    return {"bitmask": words, "prompt_ids": ids[:, :250], "output_ids": ids[:, 250:]}


def history(kind: str, logits: torch.Tensor) -> torch.Tensor:
    """Token ids int64 [rows, HISTORY]: the most probable token alone, or a text of probable ones.

    The text's last twelve ids stand in its middle too, before the most probable token.
    """
    words = logits.topk(min(1000, logits.shape[1])).indices.cpu()
    if kind == "one token":
        return words[:, :1].repeat(1, HISTORY)
    often = torch.rand(len(words), HISTORY, generator=torch.Generator().manual_seed(4)) ** 3
    ids, middle = words.gather(1, (often * words.shape[1]).long()), HISTORY // 2
    ids[:, middle + 12] = words[:, 0]
    ids[:, -12:] = ids[:, middle : middle + 12]
    return ids


def prepare(mode: Mode, logits: torch.Tensor, backend: str = "auto", **fields: Any) -> Callable[[], Any]:
    """A step of a prepared Sampler with out=, as in a serving loop; `fields` override the mode's."""
    x = rows_of(mode, logits)
    if mode.call:
        from fastsample.integrations import flashinfer

        draw = getattr(flashinfer, mode.call)
        return lambda: draw(x, **mode.fields)
    options = {"seed": SEED, "on_invalid": "flag", "backend": backend, **mode.request}
    sampler = fs.Sampler(batch_size=x.shape[0], **options, **{**mode.fields, **fields})
    extras = extra_inputs(mode, x)
    out = sampler(x, **extras)
    return lambda: sampler(x, out=out, **extras)
