"""What the rejection samplers of both model runners share: drafts are verified by drawing.

A request with K drafts has K + 1 rows of logits, each a position further on. Every row is drawn as the runner draws it
without drafts, by the seed of the request and the offset of the row's own position; the drafts that equal the draws
come out, and one token more. So a seeded text is the one without drafts, whatever drafted it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from fastsample.checks import CPU
from fastsample.integrations.asked import Asked, Edits
from fastsample.integrations.vllm.common import STEP
from fastsample.params import SamplingParams
from fastsample.verified import leading

OURS = "standard"  # the only rejection_sample_method that leaves the distribution to the target


def init(
    theirs: Callable[..., None], self: Any, sampler: Any, spec_config: Any = None, *args: Any, **kwargs: Any
) -> None:
    """RejectionSampler.__init__ of either runner, which does not keep the configuration."""
    theirs(self, sampler, spec_config, *args, **kwargs)
    self._fastsample = why_not(spec_config)


def why_not(config: Any) -> str | None:
    """Why vLLM must verify the drafts of a SpeculativeConfig itself, or None."""
    method = getattr(config, "rejection_sample_method", OURS)
    if method != OURS:
        return f"rejection_sample_method is {method!r}"
    if getattr(config, "draft_sample_method", "greedy") == "probabilistic":
        return "the drafts are drawn at random (draft_sample_method is 'probabilistic')"
    return None


def is_left(self: Any, probabilities: torch.Tensor | None, other: str | None = None) -> bool:
    """Whether a rejection sampler must do it by itself, which is said once.

    Args:
        probabilities: of the drafts, or their logits; None where they are a function of the text before them.
        other: a reason of the runner's own.
    """
    reason = getattr(self, "_fastsample", None) or other
    if reason is None and probabilities is not None:
        reason = "the drafts come with probabilities"
    if reason is not None:
        STEP.say(logging.WARNING, f"vLLM verifies drafts by itself: {reason}")
        return True
    STEP.say(logging.INFO, "drafts are verified by drawing: a seeded text is the one without them")
    return False


def accept(
    tokens: torch.Tensor, drafts: torch.Tensor, bounds: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each of R requests gets; nothing here waits for the device.

    Args:
        tokens: int64 [N], drawn for each row; the rows of a request follow each other.
        drafts: [N], the draft that a row follows; that of a request's first row is not looked at; -1 is no token.
        bounds: [R + 1], where the rows of each request begin, and N.
        steps: K, at least the number of drafts of any request.

    Returns:
        The row of each position, int64 [R, K + 1], some row of another request past the last one; its token, likewise;
        the number of accepted drafts, int64 [R].
    """
    bounds = bounds.long()
    at = bounds[:-1, None] + torch.arange(steps + 1, device=bounds.device)
    is_past = at[:, 1:] >= bounds[1:, None]
    at = at.clamp(max=len(tokens) - 1)
    drawn = tokens[at]
    return at, drawn, leading(drawn, drafts[at[:, 1:]].masked_fill(is_past, -1))


class Spread(Asked):
    """What the requests of a batch ask for, for the rows of all of them.

    Args:
        asked: of the requests.
        requests: their number.
        of: int64 [N], the request of each row, on the device of the logits.
        edited: int64 [R], the rows of the requests whose logits are edited; None where only the device knows them:
            then all rows go through the edits, and most are left as they are.
    """

    def __init__(self, asked: Asked, requests: int, of: torch.Tensor, edited: torch.Tensor | None = None) -> None:
        super().__init__(asked.rows)
        self._asked, self._requests, self._of, self._where = asked, requests, of, edited

    def records(self, default: torch.Tensor, count: int) -> torch.Tensor | None:
        own = self._asked.records(default, self._requests)
        return None if own is None else own[self._of]

    def edits(self, device: torch.device) -> Edits:
        own = self._asked.edits(device)
        place = torch.full((self._requests,), len(self.edited), dtype=torch.int64, device=CPU)
        place[self.edited] = torch.arange(len(self.edited), device=CPU)
        where = torch.arange(len(self._of), device=device) if self._where is None else self._where
        pick = place.to(device, non_blocking=True)[self._of[where]]
        neutral = SamplingParams().pack().to(device, non_blocking=True)
        records = torch.cat([own.records, neutral])
        breakers = torch.nn.functional.pad(own.breakers, (0, 0, 0, 1), value=-1)
        return Edits(where, records[pick], breakers[pick])
