"""Rows that stay split over tensor-parallel ranks, in runner V1: `--additional-config '{"fastsample_shards": true}'`.

A vLLM model's head computes this rank's part of the logits, and `LogitsProcessor` gathers the parts. Here it returns
`Shards` instead, which stand for whole rows. A step whose requests need nothing whole is sampled by
`fastsample.distributed`: vLLM's own stages edit the part, and each token is that of the gathered row, to the bit. Any
other use of `Shards`, by whatever code, gathers them as vLLM does, so nothing can take a part for a row. Every rank
runs the same code on the same requests, and so all gather in the same place.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.utils import apply_penalties
from vllm.platforms import current_platform
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)

from fastsample.backends import select
from fastsample.checks import MAX_VOCAB
from fastsample.distributed import Split
from fastsample.integrations.asked import padded
from fastsample.integrations.vllm import masks
from fastsample.integrations.vllm.common import STEP, swap
from fastsample.integrations.vllm.v1 import Asking, asking_of, seeds_of
from fastsample.params import GREEDY_BELOW, specs

OPTION = "fastsample_shards"
HEAD = "vllm.model_executor.layers.logits_processor.LogitsProcessor"
SAMPLER = "vllm.v1.sample.sampler.Sampler"
RUNNER = "vllm.v1.worker.gpu_model_runner"
_TEMPERATURE = [name for name, _ in specs()].index("temperature")


# The option ----------------------------------------------------------------------------------------------------------


def is_wanted(config: Any) -> bool:
    """Whether a VllmConfig asks for it. The configuration is the same on all ranks, as their environments may not be.

    Raises:
        ValueError: the option is neither true nor false.
    """
    options = getattr(config, "additional_config", None)
    wanted = options.get(OPTION, False) if isinstance(options, dict) else False
    if not isinstance(wanted, bool):
        raise ValueError(f"additional_config: {OPTION} = {wanted!r}: expected true or false")
    return wanted


def verify_config(theirs: Callable[..., None], self: Any) -> None:
    """VllmConfig._verify_sampling_replay_config, a part of its making: the option is looked at, too."""
    masks.verify_config(theirs, self)
    if is_wanted(self) and (reason := _why_not(self)) is not None:
        STEP.say(logging.WARNING, f"{OPTION} changes nothing: {reason}")


def _why_not(config: Any) -> str | None:
    """Why the logits of an engine with this configuration are gathered at each step, or None."""
    if config.parallel_config.tensor_parallel_size == 1:
        return "tensor_parallel_size is 1"
    if config.use_v2_model_runner:
        return "the kernels of model runner V2 read whole rows"
    if not current_platform.use_all_gather():
        return "on this platform only one rank samples"
    return None


def init_batch(theirs: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """InputBatch.__init__, which a runner calls before it loads the model. Without the option nothing is swapped."""
    masks.init_batch(theirs, self, *args, **kwargs)
    config = get_current_vllm_config_or_none()
    asking = asking_of(self)
    if config is not None and asking is not None and is_wanted(config) and _why_not(config) is None:
        asking.splits = _serve()


def _serve() -> bool:
    """Whether this vLLM is one that we know. The sampler comes first: without it, all would be gathered."""
    known = ("logits", "sampling_metadata", "predict_bonus_token", "logprobs_mode_override")
    mask = "apply_grammar_bitmask"
    return (
        swap(SAMPLER, "forward", sample, "forward", known)
        and swap(RUNNER, mask, apply_bitmask, mask, ("grammar_output", "input_batch", "logits"))
        and swap(HEAD, "forward", head, "forward", ("lm_head", "hidden_states", "embedding_bias", "skip_gather"))
    )


# Logits --------------------------------------------------------------------------------------------------------------


class Shards(torch.Tensor):
    """Logits of whole rows [B, V], of which this rank has a part; gathered as soon as anything reads them.

    Args:
        own: what this rank's head has computed [B, W], columns past the vocabulary included.
        ranks: how the rows are split.
        join: makes [B, R * W] of what all ranks have computed.

    Attributes:
        start: the id of the part's first token.
        gathered: the whole rows, once something has read them.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    own: torch.Tensor
    ranks: Split
    join: Callable[[torch.Tensor], torch.Tensor]
    start: int
    gathered: torch.Tensor | None

    @staticmethod
    def __new__(cls, own: torch.Tensor, ranks: Split, join: Callable[[torch.Tensor], torch.Tensor]) -> Shards:
        shape = *own.shape[:-1], ranks.engine.vocab
        self: Shards = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=own.dtype, device=own.device)
        self.own, self.ranks, self.join, self.start, self.gathered = own, ranks, join, ranks.engine.start, None
        return self

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def part(self) -> torch.Tensor:
        """A view of this rank's logits [B, V_r]. What is written to it before the rows are gathered is theirs."""
        return self.own[..., : max(0, self.shape[-1] - self.start)]

    def whole(self) -> torch.Tensor:
        """The rows [B, V], gathered as vLLM does it. From now on these are what is read and written to."""
        if self.gathered is None:
            self.gathered = self.join(self.own)[..., : self.shape[-1]]
        return self.gathered

    def data_ptr(self) -> int:
        raise RuntimeError("these logits are split over ranks, and have no memory that a kernel could read")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(lambda value: value.whole() if isinstance(value, cls) else value, (args, kwargs or {}))
        return function(*args, **kwargs)


def head(
    theirs: Callable[..., Any],
    self: Any,
    lm_head: Any,
    hidden_states: torch.Tensor,
    embedding_bias: torch.Tensor | None = None,
    skip_gather: bool = False,
) -> Any:
    """LogitsProcessor.forward: logits [B, V], scaled and capped; `Shards` where all that is left to do is to gather."""
    if skip_gather or not _only_gathers(self, lm_head):
        return theirs(self, lm_head, hidden_states, embedding_bias, skip_gather)
    own = theirs(self, lm_head, hidden_states, embedding_bias, True)
    if not hasattr(self, "_fastsample"):
        group = get_tp_group()
        self._fastsample = Split(group.rank_in_group * own.shape[-1], self.org_vocab_size, group=group.device_group)
    return Shards(own, self._fastsample, self._gather_logits)


def _only_gathers(processor: Any, lm_head: Any) -> bool:
    """Whether a LogitsProcessor puts the slices of a head together, of equal width and in id order, and that is all."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    if processor.logits_as_input or type(processor)._get_logits is not LogitsProcessor._get_logits:  # that of LoRA
        return False
    is_of_group = lm_head.tp_size > 1 and getattr(lm_head, "parallel_group", None) is None
    return is_of_group and not lm_head.num_added_embeddings and processor.org_vocab_size <= MAX_VOCAB


def apply_bitmask(
    theirs: Callable[..., None], scheduler_output: Any, grammar_output: Any, input_batch: Any, logits: torch.Tensor
) -> None:
    """The runner's apply_grammar_bitmask, in place; rows are gathered where parts begin within a word of the mask."""
    if isinstance(logits, Shards):
        if logits.gathered is not None or logits.own.shape[-1] % 32:  # which all ranks have alike
            return theirs(scheduler_output, grammar_output, input_batch, logits.whole())
        words = slice(logits.start // 32, -(-(logits.start + logits.part().shape[-1]) // 32))
        own = np.ascontiguousarray(grammar_output.grammar_bitmask[:, words])
        grammar_output, logits = dataclasses.replace(grammar_output, grammar_bitmask=own), logits.part()
        if not own.shape[1]:
            return None
    return theirs(scheduler_output, grammar_output, input_batch, logits)


# A step --------------------------------------------------------------------------------------------------------------


def sample(
    theirs: Callable[..., Any],
    self: Any,
    logits: torch.Tensor,
    sampling_metadata: Any,
    predict_bonus_token: bool = False,
    logprobs_mode_override: Any = None,
) -> Any:
    """Sampler.forward: int32 tokens [B, 1], the same on every rank.

    Args:
        logits: [B, V] of any dtype; may be changed.
        sampling_metadata: SamplingMetadata of the B rows.
    """
    if not isinstance(logits, Shards):
        return theirs(self, logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
    reason = "rejection samplers of vLLM's own" if predict_bonus_token else _why_whole(logits, sampling_metadata)
    if reason is not None:
        STEP.say(logging.INFO, f"logits are gathered in some steps: {reason}")
        return theirs(self, logits.whole(), sampling_metadata, predict_bonus_token, logprobs_mode_override)
    engine = select("auto", logits).name
    STEP.say(logging.INFO, f"logits stay split over ranks: {logits.ranks.engine!r}, with engine {engine!r}")
    return SamplerOutput(_tokens(self, logits, sampling_metadata).to(torch.int32)[:, None], logprobs_tensors=None)


def _why_whole(logits: Shards, metadata: Any) -> str | None:
    """What needs the whole rows of this step, or None; nothing that differs between ranks may decide it."""
    asking, holder = asking_of(metadata), metadata.thinking_budget_state_holder
    processors = [p for p in metadata.logitsprocs.all if not isinstance(p, Asking)]
    reasons = {
        "something has read them before": logits.gathered is not None,
        "log-probabilities": metadata.max_num_logprobs is not None or bool(metadata.logprob_token_ids),
        "a budget of thinking": holder is not None and holder.has_tracked_requests(),
        "DRY or repeated n-grams": asking is not None and asking.asked is not None and bool(asking.asked.edited),
        "sampling masks": asking is not None and asking.keeps,
        **{f"the logits processor {type(p).__name__}": not _is_local(p) for p in processors},
    }
    return next((reason for reason, is_so in reasons.items() if is_so), None)


def _is_local(processor: Any) -> bool:
    """Whether what a logits processor does to a token now depends on this token alone."""
    if isinstance(processor, MinPLogitsProcessor):
        return not processor.min_p_count
    if isinstance(processor, MinTokensLogitsProcessor):  # beside a grammar it looks whether anything else is left
        return not processor.min_toks or not processor.restore_logits_slice[0].numel()
    return isinstance(processor, LogitBiasLogitsProcessor)


def _tokens(sampler: Any, logits: Shards, metadata: Any) -> torch.Tensor:
    """Sampler.forward and Sampler.sample of rows of which this rank has a part: int64 tokens [B]."""
    part = logits.part().to(torch.float32)
    if part.shape[1]:
        part = sampler.apply_logits_processors(part, _of_part(logits, metadata), False)
        _penalise(part, logits.start, metadata)
    asking, batch = asking_of(metadata), len(part)
    if metadata.all_greedy:
        seeds = offsets = torch.zeros(batch, dtype=torch.int64)
        temperature = torch.zeros(batch, device=part.device)
    else:
        part = sampler.apply_temperature(part, metadata.temperature, metadata.all_random)
        places = None if asking is None else asking.places
        seeds, offsets = seeds_of(batch, metadata.generators) if places is None else places
        temperature = (metadata.temperature >= GREEDY_BELOW).float()
    records = None if asking is None else STEP.records(asking.asked, part)
    if records is not None:  # the temperature of a record is still to be applied; it is 1 where there is none
        temperature = temperature * records.view(torch.float32)[:, _TEMPERATURE]
    columns = {"temperature": temperature, "top_k": metadata.top_k, "top_p": metadata.top_p}
    rows = logits.ranks.whole(part, seed=None)  # the first rank's seeds are those of all
    return STEP.draw_by(logits.ranks.engine, rows, seeds, offsets, records, **columns)


# What vLLM's own stages take, for a part -----------------------------------------------------------------------------


def _of_part(logits: Shards, metadata: Any) -> Any:
    """SamplingMetadata whose ids are columns of a part. Histories stay as they are, so penalties are left out."""
    start, width = logits.start, logits.part().shape[-1]
    allowed = metadata.allowed_token_ids_mask
    bad = {
        row: [[*word[:-1], word[-1] - start] for word in words if start <= word[-1] < start + width]
        for row, words in (metadata.bad_words_token_ids or {}).items()
    }
    processors = LogitsProcessors()
    processors.argmax_invariant = metadata.logitsprocs.argmax_invariant
    for processor in metadata.logitsprocs.non_argmax_invariant:
        rows, ids = processor.logits_slice
        own = (ids >= start) & (ids < start + width)
        local = copy.copy(processor)
        local.logits_slice = rows[own], ids[own] - start
        if isinstance(local, LogitBiasLogitsProcessor):
            local.bias_tensor = processor.bias_tensor[own]
        processors.non_argmax_invariant.append(local)
    return dataclasses.replace(
        metadata,
        allowed_token_ids_mask=None if allowed is None else allowed[:, start : start + width],
        bad_words_token_ids=bad,
        logitsprocs=processors,
        no_penalties=True,
    )


def _penalise(part: torch.Tensor, start: int, metadata: Any) -> None:
    """Sampler.apply_penalties, in place; ids that are no columns of the part count as padding, which is its width."""
    if metadata.no_penalties:
        return

    def local(ids: torch.Tensor) -> torch.Tensor:
        columns = ids.to(part.device, non_blocking=True) - start
        return columns.masked_fill((columns < 0) | (columns >= part.shape[1]), part.shape[1])

    strengths = metadata.presence_penalties, metadata.frequency_penalties, metadata.repetition_penalties
    apply_penalties(part, local(metadata.prompt_token_ids), local(padded(metadata.output_token_ids)), *strengths)
