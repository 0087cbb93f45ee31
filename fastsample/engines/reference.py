"""The reference as an engine: plain PyTorch on any device."""

from __future__ import annotations

import torch

from fastsample import reference as spec
from fastsample.engines import Outputs
from fastsample.rows import Rows


class ReferenceEngine:
    name = "reference"

    def why_not(self, logits: torch.Tensor | None) -> str | None:
        return None

    @torch.no_grad()
    def run(self, logits: torch.Tensor, rows: Rows, out: Outputs) -> int | None:
        dist = spec.distribution(logits, rows)
        out.status.copy_(dist.status)
        if out.filtered is not None:
            out.filtered.copy_(spec.filter_logits(dist, rows))
        if out.probabilities is not None:
            out.probabilities.copy_(spec.probabilities(dist))
        if out.tokens is not None:
            out.tokens.copy_(spec.sample(dist, rows, out.tokens.shape[1]))
            if out.mode is not None:
                self._logprobs(logits, dist, out.tokens, out)
        return int((dist.status != 0).sum())

    def _logprobs(
        self, logits: torch.Tensor, dist: spec.Distribution, tokens: torch.Tensor, out: Outputs
    ) -> None:
        raw = out.mode == "raw"
        x = logits.float() if raw else dist.x
        logprobs = spec.raw_logprobs(x) if raw else spec.processed_logprobs(dist)
        valid = (dist.status == 0)[:, None]
        if out.logprobs is not None:
            own = logprobs.gather(1, tokens.clamp(min=0))
            out.logprobs.copy_(torch.where(valid, own, torch.nan))
        if out.ranks is not None:
            out.ranks.copy_(torch.where(valid, spec.ranks(x, tokens), 0))
        if out.top_ids is not None and out.top_logprobs is not None:
            self._top(x, logprobs, valid, dist, out.top_ids, out.top_logprobs, raw)

    def _top(
        self,
        x: torch.Tensor,
        logprobs: torch.Tensor,
        valid: torch.Tensor,
        dist: spec.Distribution,
        top_ids: torch.Tensor,
        top_logprobs: torch.Tensor,
        raw: bool,
    ) -> None:
        sound = valid & spec.raw_is_sound(x)[:, None] if raw else valid
        listed = (x > spec.NEG_INF if raw else dist.kept) & sound
        order = spec.rank_order(torch.where(listed, x, spec.NEG_INF))[:, : top_ids.shape[1]]
        there = listed.gather(1, order)
        top_ids.copy_(torch.where(there, order, -1))
        missing = torch.where(sound, spec.NEG_INF, torch.nan)
        top_logprobs.copy_(torch.where(there, logprobs.gather(1, order), missing))


ENGINE = ReferenceEngine()
