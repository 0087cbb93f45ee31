"""What plain sampling and the verification of drafts share."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from sglang.srt.runtime_context import get_exec, get_server_args

from fastsample.integrations.serving import Step
from fastsample.integrations.sets import Kept

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


class Inputs(NamedTuple):
    """What rows of logits are drawn with."""

    logits: torch.Tensor  # [B, V]
    seeds: torch.Tensor  # int64 [B]
    offsets: torch.Tensor  # int64 [B]
    records: torch.Tensor | None  # int32 [B, fields], where rows have their own
    columns: dict[str, torch.Tensor]  # SGLang's parameters, [B] each

    def of(self, rows: torch.Tensor) -> Inputs:
        records = None if self.records is None else self.records[rows]
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Inputs(self.logits[rows], self.seeds[rows], self.offsets[rows], records, columns)

    def draw(self) -> torch.Tensor:
        return STEP.draw(self.logits, self.seeds, self.offsets, self.records, **self.columns)

    def draw_kept(self) -> tuple[torch.Tensor, Kept]:
        return STEP.draw_kept(self.logits, self.seeds, self.offsets, self.records, **self.columns)
