"""The reference as an engine: plain PyTorch on any device."""

from __future__ import annotations

import torch

from fastsample import reference as spec
from fastsample.backends import Engine, Outputs
from fastsample.inputs import Rows


class ReferenceEngine(Engine):
    name = "reference"

    def why_not(self, logits: torch.Tensor | None) -> str | None:
        return None

    @torch.inference_mode()  # in which buffers of any kind may be written to
    def run(self, logits: torch.Tensor, rows: Rows, out: Outputs) -> int | None:
        return write(spec.distribution(logits, rows, out.input), logits, rows, out)


def write(dist: spec.Distribution, logits: torch.Tensor, rows: Rows, out: Outputs) -> int:
    """Fill the outputs from what is left of the logits [B, V]; the number of invalid rows."""
    fill(out.status, dist.status)
    if out.filtered is not None:
        fill(out.filtered, spec.filter_logits(dist, rows))
    if out.probabilities is not None:
        fill(out.probabilities, spec.probabilities(dist))
    for name, kept in zip(("kept_count", "kept_bitmask", "log_kept_mass", "entropy"), spec.KEPT, strict=True):
        if (buffer := getattr(out, name)) is not None:
            fill(buffer, kept(dist))
    if out.tokens is not None:
        tokens = spec.sample(dist, rows, out.num_samples, out.given)
        fill(out.tokens, tokens)
        if out.weights is not None:
            masses = spec.law(dist, rows)
            own = masses.gather(1, tokens.clamp(min=0)) * (tokens >= 0)
            fill(out.weights, torch.cat([own, masses.sum(-1, keepdim=True)], 1))
            if out.masses is not None:
                fill(out.masses, masses)
        if out.mode is not None:
            _write_logprobs(logits, dist, tokens, out)
    return int((dist.status != 0).sum())


def _write_logprobs(logits: torch.Tensor, dist: spec.Distribution, tokens: torch.Tensor, out: Outputs) -> None:
    raw = out.mode == "raw"
    x, sound, logprobs = dist.x, (dist.status == 0)[:, None], spec.processed_logprobs(dist)
    if raw and out.input == "logits":
        x = logits.float()
        sound, logprobs = sound & (spec.check(x) == 0)[:, None], spec.raw_logprobs(x)
    elif raw:
        given = logits.float()
        x = spec.order_of_probs(given)
        sound, logprobs = sound & (spec.check_probs(given) == 0)[:, None], spec.raw_logprobs_of_probs(given)
    valid = (dist.status == 0)[:, None]
    if out.logprobs is not None:
        own = logprobs.gather(1, tokens.clamp(min=0))
        fill(out.logprobs, torch.where(valid, own, torch.nan))
    if out.ranks is not None:
        fill(out.ranks, torch.where(valid, spec.ranks(x, tokens), 0))
    if out.top_ids is not None and out.top_logprobs is not None:
        listed = (x > spec.NEG_INF if raw else dist.kept) & sound
        order = spec.rank_order(torch.where(listed, x, spec.NEG_INF))[:, : out.num_top]
        there = listed.gather(1, order)
        fill(out.top_ids, torch.where(there, order, -1))
        missing = torch.where(sound, spec.NEG_INF, torch.nan)
        fill(out.top_logprobs, torch.where(there, logprobs.gather(1, order), missing))


def fill(buffer: torch.Tensor, values: torch.Tensor) -> None:
    buffer.copy_(values.view(buffer.shape))


ENGINE = ReferenceEngine()
