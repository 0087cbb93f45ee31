"""SGLang (0.5.23): a sampling backend, `--sampling-backend fastsample`; and filters that SGLang lacks.

The entry point `sglang.srt.plugins` calls `register` in every process of SGLang. Nothing changes until the backend is
chosen by name; `FASTSAMPLE_SGLANG=0` (or a `SGLANG_PLUGINS` without `fastsample`) keeps even the name away. With
`--device cpu` and with `--enable-deterministic-inference` SGLang replaces any backend by "pytorch"; if the command line
says "fastsample", fastsample is used there too.

| stage | done by |
|---|---|
| grammar mask, bias, penalties, custom logit processors, NaN handling | SGLang, before we are called |
| DRY, n-grams that must not be repeated | fastsample, after all of these |
| greedy | SGLang where the whole batch is greedy; else fastsample (the lowest id among the maxima, as SGLang) |
| temperature, top-k, top-p, min-p | fastsample; each filter judges the whole row, exactly k tokens pass top-k |
| the other filters | fastsample, after these; or where the request's `order` has them |
| draw | fastsample |
| seed | `sampling_seed` of a request, in every mode; offset: position of the last token |
| seed of other requests | 42 in deterministic mode, as in SGLang; else fresh from torch's default CPU generator |
| seeds of the `n` texts of a prompt | all different (see siblings.py) |
| log-probabilities, top log-probabilities | SGLang |
| sampling masks | fastsample, with any top-k (see masks.py); SGLang where the whole batch is greedy |
| verification of drafts (EAGLE, STANDALONE, NGRAM) | fastsample, by drawing (see speculation.py) |
| other speculative decoding, `rl_on_policy_target`, watermarks | SGLang; with such drafts, seeds as SGLang has them |

A row's token depends on that row alone. (SGLang's own backends filter in another order when a neighbour has min-p, and
use `sampling_seed` only in deterministic mode.) Tokens are not those that SGLang itself would draw for that seed.

What SGLang has no parameter for comes as `custom_params` of a request (see extras.py). It is validated when the request
arrives; the batch's SamplingBatchInfo carries it from there to the sampler.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.layers import sampler as theirs
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_exec, get_schedule, get_server_args
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from fastsample.inputs import pack_seeds
from fastsample.integrations.asked import Asked, History, padded
from fastsample.integrations.extras import Extras, RefusedError, read
from fastsample.integrations.sglang import admission, masks, penalties, siblings, speculation
from fastsample.integrations.sglang.common import STEP as _STEP
from fastsample.integrations.sglang.common import Inputs, columns
from fastsample.integrations.sglang.common import is_chosen as _is_chosen

__all__ = ["FastSampler", "register"]


def register() -> None:
    """Make the backend known; a second call changes nothing. Does nothing with FASTSAMPLE_SGLANG=0."""
    if os.environ.get("FASTSAMPLE_SGLANG") == "0" or "fastsample" in theirs._CUSTOM_SAMPLER_FACTORIES:
        return
    of_pytorch = theirs._CUSTOM_SAMPLER_FACTORIES.pop("pytorch", theirs.Sampler)
    theirs.register_sampler_backend("fastsample", FastSampler)
    theirs.register_sampler_backend("pytorch", lambda: FastSampler() if _is_chosen() else of_pytorch())
    for owner, name, ours in (
        (SamplingParams, "normalize", _normalize),
        (SamplingParams, "verify", _verify),
        (SamplingBatchInfo, "adjusted_from_schedule_batch", _adjusted),
        (SamplingBatchInfo, "adjusted_filter_batch", _filtered),
        (SamplingBatchInfo, "adjusted_merge_batch", _merged),
        (SamplingBatchInfo, "copy_for_forward", _copied),
    ):
        setattr(owner, name, functools.partialmethod(ours, getattr(owner, name)))
    around: dict[str, Callable[..., Any]] = {
        speculation.TARGET: speculation.verify,
        penalties.COUNT: penalties.count,
        penalties.FEED: penalties.feed,
        admission.ADMIT: admission.admit,
        admission.VALIDATE: admission.validate,
    }
    if siblings.MANAGER in sys.modules:  # in the process that has the tokenizer
        around |= {siblings.BATCH: siblings.batch, siblings.SEND: siblings.send}
    for target, hook in around.items():
        HookRegistry.register(target, hook, HookType.AROUND)


# Requests ------------------------------------------------------------------------------------------------------------


def _normalize(self: Any, theirs: Callable[..., None], tokenizer: Any) -> None:
    """SamplingParams.normalize: a request has arrived. It is refused here, before it reaches any batch.

    Raises:
        RefusedError: an extra parameter that cannot be served; a server answers with status 400.
    """
    theirs(self, tokenizer)
    if not self.custom_params or not _is_chosen():
        return
    _STEP.say_near_misses(self.custom_params, "custom_params")
    extras = read(self.custom_params, tokenizer)
    if extras is None:
        return
    reason = _why_not(self, extras)
    if reason is not None:
        raise ValueError(f"{', '.join(extras.names())}: {reason}")
    self.custom_params = {**self.custom_params, **extras.written()}


def _verify(self: Any, theirs: Callable[..., None], vocab_size: int) -> None:
    """SamplingParams.verify, which comes next and knows the size of the vocabulary."""
    theirs(self, vocab_size)
    if self.custom_params and _is_chosen():
        read(self.custom_params, vocab=vocab_size)


def _why_not(params: Any, extras: Extras) -> str | None:
    """Why this server cannot serve a request's extra parameters, or None."""
    drafts = SpeculativeAlgorithm.from_string(get_server_args().speculative_algorithm)
    if not drafts.is_none():
        reason = speculation.left(drafts)
        if reason is not None:
            return f"not with this speculative decoding, which SGLang verifies: {reason}"
        if extras.edits and not get_schedule().disable_overlap_schedule:
            return "with speculative decoding only under --disable-overlap-schedule"
    if get_exec().deterministic.rl_on_policy_target is not None:
        return "not with rl_on_policy_target, where SGLang samples"
    return "not with watermarks, which are SGLang's own" if params.watermark is not None else None


# Batches -------------------------------------------------------------------------------------------------------------


def _adjusted(self: Any, theirs: Callable[..., None], batch: Any, vocab_size: int) -> None:
    """SamplingBatchInfo.adjusted_from_schedule_batch: what the requests ask for, and their own seeds in every mode."""
    theirs(self, batch, vocab_size)
    drafts = getattr(batch, "spec_algorithm", None)
    if not _is_chosen() or not (drafts is None or drafts.is_none() or speculation.left(drafts) is None):
        return
    self._fastsample = _asked(batch.reqs)
    if self.sampling_seed is not None:
        return
    seeds = pack_seeds(None, len(batch.reqs))
    for row, request in enumerate(batch.reqs):
        if request.sampling_params.sampling_seed is not None:
            seeds[row] = pack_seeds([request.sampling_params.sampling_seed], 1)[0]
    self.sampling_seed = seeds.to(self.device, non_blocking=True)


def _asked(requests: list[Any]) -> Asked | None:
    """What the requests of a batch ask for. One that came by another way than `_normalize` may still be wrong."""
    rows = {}
    for at, request in enumerate(requests):
        try:
            extras = read(request.sampling_params.custom_params)
        except RefusedError as error:
            request.to_finish = FINISH_ABORT(str(error), HTTPStatus.BAD_REQUEST, "BadRequestError")
            continue
        if extras is not None:
            rows[at] = row = _STEP.row(extras)
            row.history, row.source = History(request.origin_input_ids), request
    return Asked(rows) if rows else None


def _filtered(self: Any, theirs: Callable[..., None], keep: list[int], *more: Any) -> None:
    """SamplingBatchInfo.adjusted_filter_batch."""
    theirs(self, keep, *more)
    asked = getattr(self, "_fastsample", None)
    if asked is not None:
        rows = {new: asked.rows[old] for new, old in enumerate(keep) if old in asked.rows}
        self._fastsample = Asked(rows) if rows else None


def _merged(self: Any, theirs: Callable[..., None], other: Any) -> None:
    """SamplingBatchInfo.adjusted_merge_batch: the rows of `other` are behind those of `self` by now."""
    theirs(self, other)
    ours, others = (getattr(info, "_fastsample", None) for info in (self, other))
    if others is not None:
        before = len(self) - len(other)
        rows = {} if ours is None else ours.rows
        self._fastsample = Asked(rows | {before + at: row for at, row in others.rows.items()})


def _copied(self: Any, theirs: Callable[..., Any]) -> Any:
    """SamplingBatchInfo.copy_for_forward, which knows the fields of its dataclass only, and no penalizers."""
    copy = theirs(self)
    copy._fastsample = getattr(self, "_fastsample", None)
    copy._fastsample_penalizers = getattr(self, "penalizer_orchestrator", None)
    return copy


def _sample(self: Any, theirs: Callable[..., Any], logits_output: Any, forward_batch: Any) -> Any:
    """ModelRunner.sample: a sampler gets no ForwardBatch, which knows the tokens that were just fed to the model."""
    if not isinstance(self.sampler, FastSampler):
        return theirs(self, logits_output, forward_batch)
    self.sampler._batch = forward_batch
    try:
        return theirs(self, logits_output, forward_batch)
    finally:
        self.sampler._batch = None


# The sampler ---------------------------------------------------------------------------------------------------------


class FastSampler(theirs.Sampler):  # type: ignore[misc]
    """SGLang's sampler with temperature, top-k, top-p, min-p and the draw by fastsample.

    Tokens are drawn from the logits as soon as SGLang has preprocessed them. Log-probabilities need SGLang's own
    forward; it then asks `_sample_from_probs`, which hands out what was drawn: asking for them, or having a neighbour
    that does, changes no token.
    """

    def __init__(self) -> None:
        super().__init__()
        from sglang.srt.model_executor.model_runner import ModelRunner

        if not isinstance(vars(ModelRunner)["sample"], functools.partialmethod):
            ModelRunner.sample = functools.partialmethod(_sample, ModelRunner.sample)
        self._batch: Any = None  # the ForwardBatch of the logits, where it is known
        self._at: torch.Tensor | None = None  # int64 [B], positions of the last tokens
        self._positions: torch.Tensor | None = None  # the same, from `forward` to the draw
        self._drawn: tuple[torch.Tensor, Any] | None = None  # tokens int32 [B], the capture of the masks
        if not self.use_log_softmax_logprob:
            self.sampling_mask_max_tokens = masks.cap()

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
        self._at = positions
        arguments = (logits_output, sampling_info, return_logprob, top_logprobs_nums, token_ids_logprobs, positions)
        if sampling_info.is_all_greedy or self.use_log_softmax_logprob:
            tokens: torch.Tensor = super().forward(*arguments, **kwargs)
            return tokens
        self._positions = positions
        if return_logprob:
            tokens = super().forward(*arguments, **kwargs)
            if self._drawn is not None:
                raise RuntimeError("fastsample: this SGLang samples by other ways than its Sampler._sample_from_probs")
            return tokens
        self._preprocess_logits(logits_output.next_token_logits, sampling_info)
        tokens, capture = self._take()
        self._sync_token_ids_across_tp(tokens, sampling_info)
        if capture is not None:
            support = sampling_info.sampling_support_logprobs_capture_indices
            logits_output.sampling_mask_output = self._build_sampling_mask_output(tokens, capture, support)
        return tokens

    def _preprocess_logits(self, logits: torch.Tensor, sampling_info: Any) -> torch.Tensor:
        logits = super()._preprocess_logits(logits, sampling_info)
        asked = getattr(sampling_info, "_fastsample", None)
        if asked is not None and asked.edited:
            _STEP.edit(logits, asked, self._ids(asked, logits.device))
        if self._positions is not None:
            positions, self._positions = self._positions, None
            self._drawn = self._draw(logits, sampling_info, positions)
        return logits

    def _ids(self, asked: Asked, device: torch.device) -> torch.Tensor:
        """Prompt and output of the rows to edit, int64 [R, L].

        A scheduler that runs ahead of the device has not seen the last token yet. It is what the model was fed with.
        """
        rows = [asked.rows[at] for at in asked.edited]
        known = [row.history.ids(row.source.output_ids) for row in rows if row.history is not None]
        ids, batch = padded(known, more=1).to(device, non_blocking=True), self._batch
        if batch is None or self._at is None:
            return ids
        where = asked.edits(device).where
        last = where
        if not batch.forward_mode.is_decode():
            last = (batch.extend_start_loc + batch.extend_seq_lens - 1)[where]
        places = self._at[where].long().clamp(max=ids.shape[1] - 1)
        return ids.scatter_(1, places[:, None], batch.input_ids[last].long()[:, None])

    def _draw(self, logits: torch.Tensor, info: Any, positions: torch.Tensor) -> tuple[torch.Tensor, Any]:
        reason = _STEP.why_not(logits)
        if reason is not None:
            raise RuntimeError(f"--sampling-backend fastsample: {reason}")
        seeds = pack_seeds(None, len(logits)) if info.sampling_seed is None else info.sampling_seed
        records = _STEP.records(getattr(info, "_fastsample", None), logits)
        inputs = Inputs(logits, seeds.to(logits.device, non_blocking=True), positions.long(), records, columns(info))
        return masks.draw(inputs, info)

    def _take(self) -> tuple[torch.Tensor, Any]:
        assert self._drawn is not None
        drawn, self._drawn = self._drawn, None
        return drawn

    def _sample_from_probs(
        self, probs: torch.Tensor, sampling_info: Any, positions: torch.Tensor, simple_sampling_case: bool
    ) -> tuple[torch.Tensor, Any]:
        """Tokens int32 [B], and the kept sets of the rows that return a sampling mask."""
        if self._drawn is None:  # on-policy RL, which is left to SGLang
            answer: tuple[torch.Tensor, Any] = super()._sample_from_probs(
                probs, sampling_info, positions, simple_sampling_case
            )
            return answer
        return self._take()
