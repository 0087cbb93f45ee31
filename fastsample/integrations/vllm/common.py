"""What both model runners share: the sampling step, and what it says."""

from __future__ import annotations

import logging

import torch
from vllm.logger import init_logger

from fastsample.integrations.serving import Step

logger = init_logger("vllm.plugins.fastsample")

# vLLM's PyTorch sampler keeps what equals the k-th value. It has applied temperature and min-p when it calls us.
STEP = Step(
    logger,
    "top-k, top-p and the draw",
    "all other stages stay vLLM's",
    ties="all",
)
PROCESSED = ("processed_logits", "processed_logprobs")


def left(logits: torch.Tensor) -> bool:
    """Whether vLLM must sample these logits itself, which is said once."""
    reason = STEP.why_not(logits)
    if reason is not None:
        STEP.say(logging.WARNING, f"vLLM samples by itself: {reason}")
    return reason is not None
