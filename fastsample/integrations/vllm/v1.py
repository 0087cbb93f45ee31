"""Model runner V1: `TopKTopPSampler`, and what its batch and `Sampler` must tell it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from fastsample.checks import CPU
from fastsample.inputs import pack_seeds
from fastsample.integrations.asked import Asked, History, Row, padded
from fastsample.integrations.vllm.arrival import ROW, for_runner, row_of
from fastsample.integrations.vllm.common import PROCESSED, STEP, left


def init(theirs: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """TopKTopPSampler.__init__: it picks the forward for this platform, and ours then goes before that one."""
    theirs(self, *args, **kwargs)
    self.forward = functools.partial(forward, self, self.forward)


def forward(
    self: Any,
    theirs: Callable[..., Any],
    logits: torch.Tensor,
    generators: dict[int, torch.Generator],
    k: torch.Tensor | None,
    p: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """TopKTopPSampler.forward: int64 tokens [B] and, in the processed modes, what the log-probabilities are of.

    Args:
        logits: float32 [B, V], divided by the temperature and cut by min-p, but where a row has its own record.
        generators: of the seeded rows only.
        k: int32 [B], V is off; None: off for all.
        p: float32 [B], 1 is off; None: off for all.
    """
    asked = getattr(self, "_fastsample", None)
    records = STEP.records(asked, logits)
    if left(logits) and records is None:
        answer: tuple[torch.Tensor, torch.Tensor | None] = theirs(logits, generators, k, p)
        return answer
    tokens = STEP.draw(logits, *_seeds(len(logits), generators), records, top_k=k, top_p=p)
    if self.logprobs_mode not in PROCESSED:
        return tokens, None
    plain = k is None and p is None and records is None
    kept = logits if plain else STEP.keep(logits, records, top_k=k, top_p=p)
    return tokens, kept if self.logprobs_mode == "processed_logits" else kept.log_softmax(dim=-1)


class _Asking:
    """The Rows of a batch. vLLM takes it for a logits processor, and so tells it which request is in which row."""

    def __init__(self, batch: Any) -> None:
        self.asked: Asked | None = None
        self._rows: dict[int, Row] = {}
        self._batch = ref(batch)
        self._needed_anyway = batch.logitsprocs_need_output_token_ids

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, update: Any) -> None:
        if not process_dict_updates(self._rows, update, _new_row):
            return
        self.asked = Asked(self._rows) if self._rows else None
        batch = self._batch()
        if batch is not None:  # vLLM fills in the outputs of steps that it samples ahead only if somebody reads them
            reads = self.asked is not None and bool(self.asked.edited)
            batch.logitsprocs_need_output_token_ids = self._needed_anyway or reads


def _new_row(params: Any, prompt: list[int] | None, output: list[int]) -> Row | None:
    row = (params.extra_args or {}).get(ROW)
    if not isinstance(row, Row):
        return None
    row.history, row.source = History(prompt), output
    return row


def _asked(metadata: Any) -> Asked | None:
    """What the requests of SamplingMetadata ask for."""
    processors = metadata.logitsprocs.argmax_invariant
    return next((processor.asked for processor in processors if isinstance(processor, _Asking)), None)


def init_batch(theirs: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """InputBatch.__init__; a batch that replaces another takes over its processors."""
    theirs(self, *args, **kwargs)
    processors = self.logitsprocs.argmax_invariant
    processors[:] = [processor for processor in processors if not isinstance(processor, _Asking)]
    processors.append(_Asking(self))


def add_request(theirs: Callable[..., int], self: Any, request: Any) -> int:
    """InputBatch.add_request, which looks at the request's parameters once."""
    params, row = request.sampling_params, row_of(request.sampling_params)
    if row is None:
        return theirs(self, request)
    request.sampling_params = for_runner(params, row)
    try:
        return theirs(self, request)
    finally:
        request.sampling_params = params


def sample(
    theirs: Callable[..., Any], self: Any, logits: torch.Tensor, sampling_metadata: Any, *more: Any, **named: Any
) -> Any:
    """Sampler.sample: TopKTopPSampler gets no metadata, so it is told here what the rows ask for."""
    self.topk_topp_sampler._fastsample = _asked(sampling_metadata)
    return theirs(self, logits, sampling_metadata, *more, **named)


def apply_penalties(
    theirs: Callable[..., torch.Tensor], logits: torch.Tensor, sampling_metadata: Any, *more: Any, **named: Any
) -> torch.Tensor:
    """Sampler.apply_penalties, which vLLM calls for every batch, greedy ones too."""
    logits = theirs(logits, sampling_metadata, *more, **named)
    asked = _asked(sampling_metadata)
    if asked is not None and asked.edited:
        rows = [asked.rows[at] for at in asked.edited]
        ids = padded([row.history.ids(row.source) for row in rows if row.history is not None])
        STEP.edit(logits, asked, ids.to(logits.device, non_blocking=True))
    return logits


def _seeds(rows: int, generators: dict[int, torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """Seed and offset of each row, int64 [B]; fresh seeds where a row has no generator."""
    offsets = torch.zeros(rows, dtype=torch.int64, device=CPU)
    if not generators:
        return pack_seeds(None, rows), offsets
    seeds = torch.empty(rows, dtype=torch.int64, device=CPU) if len(generators) == rows else pack_seeds(None, rows)
    own = [(row, *_next_draw(generator)) for row, generator in generators.items()]
    where = torch.tensor([row for row, _, _ in own], device=CPU)
    seeds[where] = pack_seeds([seed for _, seed, _ in own], len(own))
    offsets[where] = torch.tensor([offset for _, _, offset in own], device=CPU)
    return seeds, offsets


_draws: WeakKeyDictionary[torch.Generator, int] = WeakKeyDictionary()


def _next_draw(generator: torch.Generator) -> tuple[int, int]:
    """A request's seed and the number of its draws so far, which goes up by 1.

    A request keeps its generator for as long as it lives, whatever its row. A generator on a GPU counts by itself, in
    steps of 4, and vLLM sets it back by as much when it discards a draw. One on the CPU does not count.
    """
    if generator.device.type == "cpu":
        count = _draws.get(generator, 0)
        _draws[generator] = count + 1
        return generator.initial_seed(), count
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return generator.initial_seed(), offset // 4
