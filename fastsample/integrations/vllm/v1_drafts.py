"""Model runner V1 with drafts: `RejectionSampler.forward`.

vLLM's `Sampler` has a row for each request. It is called here with a row for each position that is to be verified, as
if each were a request of its own, whose output goes on with the drafts before the row. So every stage of vLLM's and of
ours is the same as without drafts.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)

from fastsample.integrations.vllm import v1
from fastsample.integrations.vllm.common import left
from fastsample.integrations.vllm.drafts import Spread, accept, is_left
from fastsample.integrations.vllm.v1 import Asking, Places, asking_of, count_accepted, seeds_of

KNOWN = (MinTokensLogitsProcessor, LogitBiasLogitsProcessor, MinPLogitsProcessor, Asking)


def forward(
    theirs: Callable[..., Any],
    self: Any,
    metadata: Any,
    draft_probs: torch.Tensor | None,
    logits: torch.Tensor,
    sampling_metadata: Any,
) -> Any:
    """RejectionSampler.forward: int32 tokens [B, K + 1], padded with -1.

    Args:
        metadata: SpecDecodeMetadata. The rows of a request are its drafts' and one more.
        draft_probs: float32 [number of drafts, V], or None.
        logits: [number of drafts + B, V] of any dtype; may be changed.
        sampling_metadata: SamplingMetadata of the B requests.
    """
    if is_left(self, draft_probs, _stranger(sampling_metadata)) or (left(logits) and not _needs_us(sampling_metadata)):
        return theirs(self, metadata, draft_probs, logits, sampling_metadata)
    rows = _Rows([count + 1 for count in metadata.num_draft_tokens], logits.device)
    of_requests = seeds_of(len(rows.counts), sampling_metadata.generators)
    seeds, offsets = (column.to(logits.device, non_blocking=True) for column in of_requests)
    places = seeds[rows.of], offsets[rows.of] + rows.position
    by_row = _by_row(sampling_metadata, rows, metadata, places)
    sampled = self.sampler(logits, by_row)

    # vLLM lists a draft with the row that it is compared to; here it goes to the next row, which follows it.
    drafts = torch.full((len(logits),), -1, dtype=torch.int32, device=logits.device)
    drafts[metadata.target_logits_indices.long() + 1] = metadata.draft_token_ids
    bounds = torch.nn.functional.pad(metadata.cu_num_sampled_tokens, (1, 0))
    at, tokens, accepted = accept(sampled.sampled_token_ids[:, 0], drafts, bounds, metadata.max_spec_len)
    count_accepted(sampling_metadata.generators, accepted)
    is_past = torch.arange(metadata.max_spec_len + 1, device=logits.device) > accepted[:, None]
    batch, of_rows = asking_of(sampling_metadata), asking_of(by_row)
    if batch is not None and of_rows is not None and of_rows.kept is not None:  # of a CPU, where nothing waits
        batch.kept = of_rows.kept.of(at[~is_past])
        batch.ends = [0, *(accepted + 1).cumsum(0).tolist()]
    logprobs = sampled.logprobs_tensors
    if logprobs is not None:
        logprobs = LogprobsTensors(*(column[at.flatten()] for column in logprobs[:3]))
    return SamplerOutput(sampled_token_ids=tokens.masked_fill(is_past, -1), logprobs_tensors=logprobs)


class _Rows:
    """The rows of all requests, one after the other: `counts` of them each."""

    def __init__(self, counts: list[int], device: torch.device) -> None:
        self.counts = counts
        self.ends = np.cumsum(counts)
        of = np.repeat(np.arange(len(counts)), counts)
        position = np.arange(len(of)) - np.repeat(self.ends - counts, counts)
        both = torch.from_numpy(np.stack([of, position])).to(device, non_blocking=True)
        self.of, self.position = both  # int64 [N] each: a row's request, and the number of drafts before the row

    def of_request(self, request: int) -> range:
        end = int(self.ends[request])
        return range(end - self.counts[request], end)

    def of_requests(self, requests: Iterable[int]) -> list[int]:
        return [row for request in requests for row in self.of_request(request)]


def _by_row(metadata: Any, rows: _Rows, drafted: Any, places: Places) -> Any:
    """SamplingMetadata of all rows."""
    names = ["temperature", "top_p", "top_k", "allowed_token_ids_mask"]
    if not metadata.no_penalties:
        names += ["prompt_token_ids", "frequency_penalties", "presence_penalties", "repetition_penalties"]
    columns = {name: getattr(metadata, name) for name in names}
    reads_output = metadata.bad_words_token_ids or not metadata.no_penalties
    holder = metadata.thinking_budget_state_holder
    return dataclasses.replace(
        metadata,
        **{name: None if column is None else column[rows.of] for name, column in columns.items()},
        generators={},  # the rows have their places
        output_token_ids=_outputs(metadata, rows) if reads_output else [],
        bad_words_token_ids=_each(metadata.bad_words_token_ids, rows),
        logprob_token_ids=_each(metadata.logprob_token_ids, rows) or None,
        spec_token_ids=None,
        thinking_budget_state_holder=None if holder is None else _Budget(holder, metadata, drafted),
        logitsprocs=_processors(metadata, rows, places),
    )


def _each(of_requests: dict[int, Any] | None, rows: _Rows) -> dict[int, Any]:
    return {row: value for request, value in (of_requests or {}).items() for row in rows.of_request(request)}


def _before(metadata: Any, rows: _Rows, request: int) -> list[list[int]]:
    """The drafts before each row of a request."""
    drafts = metadata.spec_token_ids[request] if metadata.spec_token_ids else []
    return [drafts[:position] for position in range(rows.counts[request])]


def _outputs(metadata: Any, rows: _Rows) -> list[list[int]]:
    outputs = enumerate(metadata.output_token_ids[: len(rows.counts)])
    return [[*output, *before] for request, output in outputs for before in _before(metadata, rows, request)]


# What vLLM keeps for each request of a batch, for each row -----------------------------------------------------------


def _processors(metadata: Any, rows: _Rows, places: Places) -> LogitsProcessors:
    """The logits processors of the batch, in a form for rows."""
    found = LogitsProcessors()
    for processor in metadata.logitsprocs.non_argmax_invariant:
        if isinstance(processor, MinTokensLogitsProcessor):
            if processor.min_toks:
                found.non_argmax_invariant.append(_MinTokens(processor, rows.counts))
        else:
            found.non_argmax_invariant.append(_bias(processor, rows))
    for processor in metadata.logitsprocs.argmax_invariant:
        if isinstance(processor, MinPLogitsProcessor) and processor.min_p_count:
            processor = copy.copy(processor)
            processor.min_p = processor.min_p[rows.of]
            found.argmax_invariant.append(processor)
    found.argmax_invariant.append(_Asking(asking_of(metadata), metadata, rows, places))
    return found


def _bias(processor: LogitBiasLogitsProcessor, rows: _Rows) -> LogitBiasLogitsProcessor:
    if not processor.biases:
        return processor
    own, ids, values = [], [], []
    for request, biases in processor.biases.items():
        where = rows.of_request(request)
        own.append(np.repeat(np.asarray(where), len(biases)))
        ids.append(np.tile(np.fromiter(biases, np.int64), len(where)))
        values.append(np.tile(np.fromiter(biases.values(), np.float32), len(where)))
    spread = copy.copy(processor)
    device = processor.bias_tensor.device
    row, token, spread.bias_tensor = (
        torch.from_numpy(np.concatenate(column)).to(device, non_blocking=True) for column in (own, ids, values)
    )
    spread.logits_slice = (row, token)
    return spread


class _MinTokens:
    """vLLM counts the drafts before a row itself."""

    def __init__(self, processor: MinTokensLogitsProcessor, counts: list[int]) -> None:
        self._processor, self._counts = processor, counts

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        edited: torch.Tensor = self._processor.apply_with_spec_decode(logits, self._counts)
        return edited


class _Budget:
    """vLLM's thinking budget, which knows rows of drafts and rows behind the last draft, apart from each other."""

    def __init__(self, holder: Any, metadata: Any, drafted: Any) -> None:
        self._holder, self._metadata, self._drafted = holder, metadata, drafted

    def has_tracked_requests(self) -> bool:
        return bool(self._holder.has_tracked_requests())

    def update_state(self, *_: Any, **__: Any) -> None:
        self._holder.update_state(self._metadata.output_token_ids, self._metadata.spec_token_ids)

    def apply_to_logits(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        for is_bonus, where in (
            (True, self._drafted.bonus_logits_indices),
            (False, self._drafted.target_logits_indices),
        ):
            part = logits[where]
            logits[where] = self._holder.apply_to_logits(part, is_bonus, self._metadata.spec_token_ids)
        return logits


class _Asking(Asking):
    """What the rows ask for."""

    def __init__(self, batch: Asking | None, metadata: Any, rows: _Rows, places: Places) -> None:
        self.asked, self.places, self.keeps = None, places, batch is not None and batch.keeps
        self._of_requests, self._metadata, self._spread = batch, metadata, rows
        if batch is not None and batch.asked is not None:
            edited = torch.tensor(rows.of_requests(batch.asked.edited), dtype=torch.int64)
            where = edited.to(rows.of.device, non_blocking=True)
            self.asked = Spread(batch.asked, len(rows.counts), rows.of, where)

    def histories(self) -> list[np.ndarray[Any, Any]]:
        if self._of_requests is None or self.asked is None:
            return []
        found = []
        for request, history in zip(self.asked.edited, self._of_requests.histories(), strict=True):
            before = _before(self._metadata, self._spread, request)
            found += [np.concatenate([history, np.asarray(drafts, dtype=np.int64)]) for drafts in before]
        return found


# The processors that vLLM leaves out where it speculates -------------------------------------------------------------


def init_min_tokens(theirs: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """MinTokensLogitsProcessor.__init__: what it is made with makes the others, too."""
    theirs(self, *args, **kwargs)
    self._fastsample = args, kwargs


def init_batch(theirs: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """InputBatch.__init__: where vLLM speculates it has no bias and no min-p."""
    v1.init_batch(theirs, self, *args, **kwargs)
    processors = self.logitsprocs
    first = next((p for p in processors.non_argmax_invariant if isinstance(p, MinTokensLogitsProcessor)), None)
    made = getattr(first, "_fastsample", None)
    if made is None or any(isinstance(p, LogitBiasLogitsProcessor) for p in processors.non_argmax_invariant):
        return
    given, named = made
    processors.non_argmax_invariant.append(LogitBiasLogitsProcessor(*given, **named))
    processors.argmax_invariant.insert(0, MinPLogitsProcessor(*given, **named))


def _stranger(metadata: Any) -> str | None:
    """A logits processor that we cannot turn into one for rows. vLLM itself lets none in beside drafts."""
    names = (type(processor).__name__ for processor in metadata.logitsprocs.all if not isinstance(processor, KNOWN))
    name = next(names, None)
    return None if name is None else f"the logits processor {name} knows no rows of drafts"


def _needs_us(metadata: Any) -> bool:
    """Whether some request was let in because drafts are ours."""
    asking, processors = asking_of(metadata), metadata.logitsprocs
    biased = (p for p in processors.non_argmax_invariant if isinstance(p, LogitBiasLogitsProcessor))
    cut = (p for p in processors.argmax_invariant if isinstance(p, MinPLogitsProcessor))
    return (
        (asking is not None and asking.asked is not None)
        or any(processor.biases for processor in biased)
        or any(processor.min_p_count for processor in cut)
    )
