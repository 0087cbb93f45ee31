"""What `generate` returns when `fs_generate` reports more than ids: transformers' own outputs, with fields beside.

What the steps have reported, each for all sequences, is put in the order of the ids: sequence by sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from fastsample.outputs import FIELD, Options, SampleOutput

if TYPE_CHECKING:
    from fastsample.integrations.transformers.step import Progress


REPORTS = ("logprobs", "kept", "kept_mass", "entropy")
"""Options that ask for more of a step than its tokens."""


@dataclass
class Reported:
    """What `fs_generate` adds to the result of `generate`; None where it was not asked for.

    B sequences of T new tokens. Token t of sequence b is row `b * T + t` of the lists: that of
    `logits[:, -T - 1 : -1].flatten(0, 1)`, where the logits are the model's for all ids of the result. So the lists are
    the `kept` of `fastsample.training.kept_logprobs`, with tokens set to -1 where kept_count is 0.

    Attributes:
        logprobs: float32 [B, T], the natural log-probability of each new token; NaN after a sequence's end.
        kept_count: int32 [B, T], how many tokens were kept where each token was drawn; 0 after a sequence's end.
        kept_ids: int32, the kept ids of all rows, ascending in each; none after a sequence's end.
        kept_row_ptr: int64 [B * T + 1]; the ids of row i are `kept_ids[kept_row_ptr[i] : kept_row_ptr[i + 1]]`.
        kept_bitmask: int32 [B, T, ceil(V / 32)]; token j was kept where bit j % 32 of word j // 32 is 1. 0 after a
            sequence's end.
        log_kept_mass, entropy: float32 [B, T], as in `fastsample.SampleOutput`; NaN after a sequence's end.
        status: int32 [B], as in `fastsample.SampleOutput`: why a sequence that could have no token was ended, or 0.
        errors: the same in words, a sentence or None per sequence.
        truncated: bool [B], whether a text is not a whole text of its grammar.
    """

    logprobs: torch.Tensor | None = None
    kept_count: torch.Tensor | None = None
    kept_ids: torch.Tensor | None = None
    kept_row_ptr: torch.Tensor | None = None
    kept_bitmask: torch.Tensor | None = None
    log_kept_mass: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    status: torch.Tensor | None = None
    errors: list[str | None] | None = None
    truncated: torch.Tensor | None = None


@dataclass
class SampledDecoderOnlyOutput(Reported, GenerateDecoderOnlyOutput):
    """What `generate` returns for a decoder-only model, with what was asked of `fs_generate`."""


@dataclass
class SampledEncoderDecoderOutput(Reported, GenerateEncoderDecoderOutput):
    """What `generate` returns for an encoder-decoder, with what was asked of `fs_generate`."""


def with_fields(result: Any, more: dict[str, Any]) -> Any:
    """The result with these fields beside its own; the result itself where there are none."""
    if not more:
        return result
    encodes = isinstance(result, GenerateEncoderDecoderOutput)
    kind = SampledEncoderDecoderOutput if encodes else SampledDecoderOnlyOutput
    return kind(**{field.name: getattr(result, field.name) for field in fields(result)}, **more)


def asked_for(options: Options) -> list[str]:
    """Those of REPORTS that are asked for."""
    return [name for name in REPORTS if getattr(options, name)]


def reported(steps: list[SampleOutput], progress: Progress, start: int) -> dict[str, torch.Tensor]:
    """What the steps, from position `start` on, tell of each sequence up to its end; empty if nothing was asked for."""
    if not steps:
        return {}
    assert progress.lengths is not None
    position = torch.arange(start, start + len(steps), device=steps[0].status.device)
    past = position >= progress.lengths[:, None].to(position.device)
    found = {}
    for name in ("logprobs", "kept_count", "kept_bitmask", "log_kept_mass", "entropy"):
        values = [value for step in steps if (value := getattr(step, name)) is not None]
        if values:
            table = torch.stack(values, dim=1)
            empty = FIELD[name].invalid
            assert empty is not None
            found[name] = table.masked_fill(past if table.ndim == 2 else past[:, :, None], empty)
    if steps[0].kept_ids is not None:
        found |= _lists(steps, found["kept_count"])
    return found


def _lists(steps: list[SampleOutput], count: torch.Tensor) -> dict[str, torch.Tensor]:
    """The steps' lists of kept ids as one, sequence by sequence; `count` [B, T] of each are taken over."""
    begins, ids, before = [], [], 0
    for step in steps:
        assert step.kept_ids is not None
        assert step.kept_row_ptr is not None
        begins.append(step.kept_row_ptr[:-1] + before)
        ids.append(step.kept_ids)
        before += len(step.kept_ids)
    sizes = count.flatten().long()
    row_ptr = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    moved = torch.stack(begins, dim=1).flatten() - row_ptr[:-1]
    places = torch.arange(int(row_ptr[-1]), device=count.device) + moved.repeat_interleave(sizes)
    return {"kept_ids": torch.cat(ids)[places], "kept_row_ptr": row_ptr}
