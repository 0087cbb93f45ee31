"""What both model runners share: the sampling step, what it says, and how methods of vLLM's are replaced."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

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


def swap(where: str, name: str, ours: Callable[..., Any], called: str, known: tuple[str, ...]) -> bool:
    """Replace a method of a class by ours(theirs, self, ...), once; of a static or class method by ours(theirs, ...).

    Where there is no such class, or its method `called` has other arguments than we know, it stays as it is, with a
    warning, and the answer is False: a plugin that raises would stop vLLM.
    """
    module, _, class_name = where.rpartition(".")
    try:
        owner = getattr(import_module(module), class_name)
        theirs, found = getattr(owner, name), tuple(inspect.signature(getattr(owner, called)).parameters)
        is_static = isinstance(inspect.getattr_static(owner, name), (staticmethod, classmethod))
    except (ImportError, AttributeError) as error:
        STEP.say(logging.WARNING, f"{where} cannot be swapped in this vLLM: {error}")
        return False
    if hasattr(theirs, "_fastsample"):
        return True
    found = found if is_static else found[1:]
    if found[: len(known)] != known:
        STEP.say(logging.WARNING, f"{where} cannot be swapped in this vLLM: {called} takes {found}, not {known}")
        return False

    @functools.wraps(theirs)
    def swapped(*args: Any, **kwargs: Any) -> Any:
        return ours(theirs, *args, **kwargs)

    swapped._fastsample = True  # type: ignore[attr-defined]
    setattr(owner, name, staticmethod(swapped) if is_static else swapped)
    return True
