"""SGLang (0.5.23): a sampling backend, `--sampling-backend fastsample`.

The entry point `sglang.srt.plugins` calls `register` in every process of SGLang. Nothing changes until the backend is
chosen by name; `FASTSAMPLE_SGLANG=0` (or a `SGLANG_PLUGINS` without `fastsample`) keeps even the name away. With
`--device cpu` and with `--enable-deterministic-inference` SGLang replaces any backend by "pytorch"; if the command line
says "fastsample", fastsample is used there too.

| stage | done by |
|---|---|
| grammar mask, bias, penalties, custom logit processors, NaN handling | SGLang, before we are called |
| greedy | SGLang where the whole batch is greedy; else fastsample (the lowest id among the maxima, as SGLang) |
| temperature, top-k, top-p, min-p | fastsample; each filter judges the whole row, exactly k tokens pass top-k |
| draw | fastsample |
| seed | `sampling_seed` of a request, in every mode; offset: position of the last token |
| seed of other requests | 42 in deterministic mode, as in SGLang; else fresh from torch's default CPU generator |
| log-probabilities, top log-probabilities, sampling masks | SGLang |
| speculative decoding, `rl_on_policy_target`, watermarks | SGLang; with drafts, seeds as SGLang has them |

A row's token depends on that row alone. (SGLang's own backends filter in another order when a neighbour has min-p, and
use `sampling_seed` only in deterministic mode.) Tokens are not those that SGLang itself would draw for that seed.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers import sampler as theirs
from sglang.srt.runtime_context import get_exec, get_server_args
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from fastsample.inputs import pack_seeds
from fastsample.integrations.serving import Step

__all__ = ["FastSampler", "register"]

logger = logging.getLogger(__name__)
_STEP = Step(
    logger,
    "temperature, filters and the draw",
    "greedy batches, grammars, penalties, logit processors, log-probabilities and speculative decoding stay SGLang's",
    order="joint",
)


def register() -> None:
    """Make the backend known; a second call changes nothing. Does nothing with FASTSAMPLE_SGLANG=0."""
    if os.environ.get("FASTSAMPLE_SGLANG") == "0" or "fastsample" in theirs._CUSTOM_SAMPLER_FACTORIES:
        return
    of_pytorch = theirs._CUSTOM_SAMPLER_FACTORIES.pop("pytorch", theirs.Sampler)
    theirs.register_sampler_backend("fastsample", FastSampler)
    theirs.register_sampler_backend("pytorch", lambda: FastSampler() if _is_chosen() else of_pytorch())
    adjusted = SamplingBatchInfo.adjusted_from_schedule_batch
    SamplingBatchInfo.adjusted_from_schedule_batch = functools.partialmethod(_seed, adjusted)


def _is_chosen() -> bool:
    """Whether fastsample was asked for on the command line, even if SGLang has replaced it since."""
    return "fastsample" in (get_exec().kernel.sampling_backend, get_server_args().sampling_backend)


def _seed(self: Any, adjusted: Callable[..., None], batch: Any, vocab_size: int) -> None:
    """SamplingBatchInfo.adjusted_from_schedule_batch: the requests' own seeds outside of deterministic mode too."""
    adjusted(self, batch, vocab_size)
    drafts = getattr(batch, "spec_algorithm", None)
    if self.sampling_seed is not None or not _is_chosen() or not (drafts is None or drafts.is_none()):
        return
    seeds = pack_seeds(None, len(batch.reqs))
    for row, request in enumerate(batch.reqs):
        if request.sampling_params.sampling_seed is not None:
            seeds[row] = pack_seeds([request.sampling_params.sampling_seed], 1)[0]
    self.sampling_seed = seeds.to(self.device, non_blocking=True)


class FastSampler(theirs.Sampler):  # type: ignore[misc]
    """SGLang's sampler with temperature, top-k, top-p, min-p and the draw by fastsample.

    Tokens are drawn from the logits as soon as SGLang has preprocessed them. Log-probabilities and sampling masks need
    SGLang's own forward; it then asks `_sample_from_probs`, which hands out what was drawn: asking for them, or having
    a neighbour that does, changes no token.
    """

    def __init__(self) -> None:
        super().__init__()
        self._positions: torch.Tensor | None = None  # int64 [B], from `forward` to the draw
        self._drawn: tuple[torch.Tensor, torch.Tensor | None] | None = None  # tokens int32 [B], weights of the masks

    def forward(
        self,
        logits_output: Any,
        sampling_info: Any,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int]],
        positions: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One token per row, [B]; the log-probabilities that were asked for go to `logits_output`.

        Raises:
            RuntimeError: no engine of fastsample serves these logits.
        """
        arguments = (logits_output, sampling_info, return_logprob, top_logprobs_nums, token_ids_logprobs, positions)
        if sampling_info.is_all_greedy or self.use_log_softmax_logprob:
            tokens: torch.Tensor = super().forward(*arguments, **kwargs)
            return tokens
        self._positions = positions
        if return_logprob or sampling_info.sampling_mask_batch_indices is not None:
            tokens = super().forward(*arguments, **kwargs)
            if self._drawn is not None:
                raise RuntimeError("fastsample: this SGLang samples by other ways than its Sampler._sample_from_probs")
            return tokens
        self._preprocess_logits(logits_output.next_token_logits, sampling_info)
        tokens, _ = self._take()
        self._sync_token_ids_across_tp(tokens, sampling_info)
        return tokens

    def _preprocess_logits(self, logits: torch.Tensor, sampling_info: Any) -> torch.Tensor:
        logits = super()._preprocess_logits(logits, sampling_info)
        if self._positions is not None:
            positions, self._positions = self._positions, None
            self._drawn = self._draw(logits, sampling_info, positions)
        return logits

    def _draw(
        self, logits: torch.Tensor, info: Any, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        reason = _STEP.why_not(logits)
        if reason is not None:
            raise RuntimeError(f"--sampling-backend fastsample: {reason}")
        columns = {
            "temperature": info.temperatures.view(-1),
            "top_k": info.top_ks,
            "top_p": info.top_ps,
            "min_p": info.min_ps,
        }
        seeds = pack_seeds(None, len(logits)) if info.sampling_seed is None else info.sampling_seed
        tokens = _STEP.draw(logits, seeds, positions.long(), **columns)
        rows = info.sampling_mask_batch_indices
        weights = None
        if rows is not None:
            weights = _STEP.keep(logits[rows], **{name: values[rows] for name, values in columns.items()}).softmax(-1)
        return tokens.int(), weights

    def _take(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self._drawn is not None
        drawn, self._drawn = self._drawn, None
        return drawn

    def _sample_from_probs(
        self, probs: torch.Tensor, sampling_info: Any, positions: torch.Tensor, simple_sampling_case: bool
    ) -> tuple[torch.Tensor, Any]:
        """Tokens int32 [B], and the kept probabilities of the rows that return a sampling mask."""
        if self._drawn is None:  # on-policy RL, which is left to SGLang
            answer: tuple[torch.Tensor, Any] = super()._sample_from_probs(
                probs, sampling_info, positions, simple_sampling_case
            )
            return answer
        tokens, weights = self._take()
        if weights is None:
            return tokens, None
        rows = sampling_info.sampling_mask_batch_indices
        return tokens, theirs._SamplingMaskCapture(weights, token_ids=None, selected_weight=None, batch_rows=rows)
