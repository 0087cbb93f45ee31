"""FlashInfer's functions as data, and rows to give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastsample.integrations import flashinfer as fi


def rows(batch: int, vocab: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def probs(batch: int, vocab: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.softmax(rows(batch, vocab, seed, spread), -1)


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "plain": (fi.sampling_from_probs, {}, {}),
    "k": (fi.top_k_sampling_from_probs, {"top_k": 7}, {"top_k": 7}),
    "p": (fi.top_p_sampling_from_probs, {"top_p": 0.7}, {"top_p": 0.7}),
    "min_p": (fi.min_p_sampling_from_probs, {"min_p": 0.1}, {"min_p": 0.1}),
    "k-p": (fi.top_k_top_p_sampling_from_probs, {"top_k": 20, "top_p": 0.8}, {"top_k": 20, "top_p": 0.8}),
    "joint": (
        fi.top_k_top_p_sampling_from_probs,
        {"top_k": 20, "top_p": 0.8, "filter_apply_order": "joint"},
        {"top_k": 20, "top_p": 0.8, "joint": True},
    ),
    "logits": (fi.sampling_from_logits, {}, {}),
    "logits-k-p": (fi.top_k_top_p_sampling_from_logits, {"top_k": 20, "top_p": 0.8}, {"top_k": 20, "top_p": 0.8}),
    "logits-joint": (
        fi.top_k_top_p_sampling_from_logits,
        {"top_k": 20, "top_p": 0.8, "filter_apply_order": "joint"},
        {"top_k": 20, "top_p": 0.8, "joint": True},
    ),
}
each_call = pytest.mark.parametrize("name", CALLS)


def call(name: str, p: torch.Tensor, **more: Any) -> Any:
    function, arguments_, _ = CALLS[name]
    return function(p.log() if name.startswith("logits") else p, **{**arguments_, **more})
