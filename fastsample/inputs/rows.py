"""Rows: what an engine sees of a batch besides the logits, validated once and packed per row (see csrc/core/rows.h)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastsample.inputs.bias import Bias


@dataclass(slots=True)
class Rows:
    """A batch's parameters and inputs. A first dimension of 1 is shared by every row."""

    records: torch.Tensor  # int32 [B or 1, fields]: params.SamplingParams.pack()
    seeds: torch.Tensor  # int64 [B], the bits of an unsigned 64-bit integer
    offsets: torch.Tensor  # int64 [B or 1], likewise
    bitmask: torch.Tensor | None = None  # int32 [B or 1, words]
    bias: Bias | None = None
    prompt_ids: torch.Tensor | None = None  # int64 [B, L], ids outside the vocabulary are padding
    output_ids: torch.Tensor | None = None  # int64 [B, L]
    breakers: torch.Tensor | None = None  # int64 [B or 1, L], likewise; those of DRY
    drafted_ids: torch.Tensor | None = None  # int64 [B, L], likewise; they continue the output
    requests: torch.Tensor | None = None  # int64 [B]: whose prompt, output and breakers a row has; None where its own
    part: tuple[int, int] = (0, 0)  # where logits are a part of rows: the id of the first, and V of the whole rows
    native: Any = None  # an engine's own form of these rows, kept for the next step
    slots: Rows | None = None  # the same parameters without the inputs, which last for many steps
    workspace: dict[Any, Any] | None = None  # buffers that engines keep for a Sampler's steps

    def to(self, device: torch.device) -> Rows:
        """The same rows with the packed parameters on the device of the logits."""
        if self.records.device == device and self.seeds.device == device and self.offsets.device == device:
            return self
        records, seeds, offsets = (t.to(device, non_blocking=True) for t in (self.records, self.seeds, self.offsets))
        return replace(self, records=records, seeds=seeds, offsets=offsets, native=None)

    def with_inputs(self) -> Rows:
        """These rows for one step, whose inputs are still to be attached."""
        return Rows(self.records, self.seeds, self.offsets, slots=self, workspace=self.workspace)

    def visit_inputs(self, visit: Callable[[str, torch.Tensor], None]) -> None:
        """Call `visit` with the name and the memory of each input."""
        if self.bitmask is not None:
            visit("bitmask", self.bitmask)
        if self.bias is not None:
            for part in self.bias.tensors:
                visit("bias", part)
        if self.prompt_ids is not None:
            visit("prompt_ids", self.prompt_ids)
        if self.output_ids is not None:
            visit("output_ids", self.output_ids)
        if self.breakers is not None:
            visit("dry_breakers", self.breakers)
        if self.drafted_ids is not None:
            visit("draft_ids", self.drafted_ids)

    @property
    def lists(self) -> list[torch.Tensor]:
        """The lists of a row's history, in its order."""
        return [ids for ids in (self.prompt_ids, self.output_ids, self.drafted_ids) if ids is not None]
