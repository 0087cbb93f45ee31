"""What others offer on a GPU: the modes of bench/modes.py in torch's own operations and in FlashInfer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.modes import Mode

Step = Callable[[], torch.Tensor]


def draw(probs: torch.Tensor) -> torch.Tensor:
    """A sample per row without a wait: the exponential race that torch.multinomial runs too."""
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Hugging Face's nucleus: ascending, cumulative probability at most 1 - p dropped."""
    values, order = logits.sort(-1)
    gone = values.softmax(-1).cumsum(-1) <= 1 - p
    gone[:, -1] = False
    return logits.masked_fill(gone.scatter(1, order, gone), -torch.inf)


def penalised(logits: torch.Tensor, fields: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    own = logits.gather(1, ids)
    theta = fields["repetition_penalty"]
    logits = logits.scatter(1, ids, torch.where(own > 0, own / theta, own * theta))
    counts = torch.zeros_like(logits).scatter_add_(1, ids, torch.ones_like(own))
    return logits - fields["frequency_penalty"] * counts - fields["presence_penalty"] * (counts > 0)


def torch_step(mode: Mode, logits: torch.Tensor) -> Step:
    """The mode as one would write it in torch, top-k first among the filters so that the rest is small."""
    fields = mode.fields
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(logits.shape[1], (logits.shape[0], 500), generator=g).to(logits.device)

    def step() -> torch.Tensor:
        if fields["temperature"] == 0:
            return logits.argmax(-1)
        x = logits.float()
        if mode.extras:
            x = penalised(x, fields, ids)
        x, chosen = x / fields["temperature"], None
        if fields.get("top_k"):
            x, chosen = x.topk(fields["top_k"])
        if fields.get("top_p"):
            x = keep_top_p(x, fields["top_p"])
        probs = x.softmax(-1)
        if fields.get("min_p"):
            probs = probs.where(probs >= fields["min_p"] * probs.amax(-1, keepdim=True), 0)
        token = draw(probs)
        return token if chosen is None else chosen.gather(1, token[:, None])[:, 0]

    return step


def flashinfer_steps() -> dict[str, Callable[[Mode, torch.Tensor], Step | None]]:
    """FlashInfer's samplers by name; none where it does not import."""
    try:
        import flashinfer.sampling as fi
    except ImportError:
        return {}

    def from_logits(mode: Mode, logits: torch.Tensor) -> Step | None:
        f = mode.fields
        if mode.extras or f["temperature"] == 0:
            return None
        if f.get("min_p"):
            return lambda: fi.min_p_sampling_from_probs(fi.softmax(logits.float(), f["temperature"]), f["min_p"])
        if f.get("top_k"):
            return lambda: fi.top_k_top_p_sampling_from_logits(
                logits.float() / f["temperature"], f["top_k"], f["top_p"], filter_apply_order="top_k_first"
            )
        if f.get("top_p"):
            return lambda: fi.top_p_sampling_from_probs(fi.softmax(logits.float(), f["temperature"]), f["top_p"])
        return lambda: fi.sampling_from_logits(logits.float() / f["temperature"])

    def cake(mode: Mode, logits: torch.Tensor) -> Step | None:
        f = mode.fields
        if mode.extras or not f.get("top_k"):
            return None
        return lambda: fi.cake_top_k_top_p_sampling_from_probs(
            fi.softmax(logits.float(), f["temperature"]), f["top_k"], f["top_p"]
        )

    found: dict[str, Callable[[Mode, torch.Tensor], Step | None]] = {"flashinfer": from_logits}
    if hasattr(fi, "cake_top_k_top_p_sampling_from_probs"):
        found["flashinfer cake"] = cake
    return found
