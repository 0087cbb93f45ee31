"""What plain sampling and the verification of drafts share."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.runtime_context import get_exec, get_server_args

from fastsample.integrations.serving import Step

logger = logging.getLogger("fastsample.integrations.sglang")

STEP = Step(
    logger,
    "temperature, filters and the draw",
    "greedy batches, grammars, penalties, logit processors and log-probabilities stay SGLang's",
    order="joint",
)


def is_chosen() -> bool:
    """Whether fastsample was asked for on the command line, even if SGLang has replaced it since."""
    return "fastsample" in (get_exec().kernel.sampling_backend, get_server_args().sampling_backend)


def columns(info: Any) -> dict[str, torch.Tensor]:
    """SGLang's parameters of a batch by their names in fastsample, one value per request."""
    return {
        "temperature": info.temperatures.view(-1),
        "top_k": info.top_ks,
        "top_p": info.top_ps,
        "min_p": info.min_ps,
    }
