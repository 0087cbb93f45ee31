"""Model runner V1: `TopKTopPSampler`, and what its batch and `Sampler` must tell it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from fastsample.backends import select
from fastsample.checks import CPU
from fastsample.inputs import pack_seeds
from fastsample.integrations.asked import Asked, History, Row, padded
from fastsample.integrations.sets import Kept
from fastsample.integrations.vllm.arrival import ROW, for_runner, row_of
from fastsample.integrations.vllm.common import PROCESSED, STEP, left
from fastsample.params import GREEDY_BELOW

Places = tuple[torch.Tensor, torch.Tensor]
"""Seed and offset of each row, int64 [B]."""


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
    asking = getattr(self, "_fastsample", None)
    records = None if asking is None else STEP.records(asking.asked, logits)
    places, keeps = (None, False) if asking is None else (asking.places, asking.keeps)
    if left(logits) and records is None and places is None and not keeps:
        answer: tuple[torch.Tensor, torch.Tensor | None] = theirs(logits, generators, k, p)
        return answer
    seeds, offsets = seeds_of(len(logits), generators) if places is None else places
    if asking is None or not keeps:
        tokens = STEP.draw(logits, seeds, offsets, records, top_k=k, top_p=p)
    else:
        tokens, asking.kept = STEP.draw_kept(logits, seeds, offsets, records, top_k=k, top_p=p)
    if self.logprobs_mode not in PROCESSED:
        return tokens, None
    plain = k is None and p is None and records is None
    kept = logits if plain else STEP.keep(logits, records, top_k=k, top_p=p)
    return tokens, kept if self.logprobs_mode == "processed_logits" else kept.log_softmax(dim=-1)


class Asking:
    """The Rows of a batch. vLLM takes it for a logits processor, and so tells it which request is in which row."""

    places: Places | None = None  # where the generators of the requests are not enough
    splits = False  # whether rows may be split over ranks (shards.py)
    keeps = False  # whether somebody asks for the kept sets
    kept: Kept | None = None  # those of all tokens of the last step
    ends: list[int] | None = None  # where the tokens of each request begin, and their number; None: one each

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

    def histories(self) -> list[np.ndarray[Any, Any]]:
        """Prompt and output of the requests whose logits are edited."""
        rows = [] if self.asked is None else [self.asked.rows[at] for at in self.asked.edited]
        return [row.history.ids(row.source) for row in rows if row.history is not None]


def _new_row(params: Any, prompt: list[int] | None, output: list[int]) -> Row | None:
    row = (params.extra_args or {}).get(ROW)
    if not isinstance(row, Row):
        return None
    row.history, row.source = History(prompt), output
    return row


def asking_of(metadata: Any) -> Asking | None:
    """Who knows what the rows of SamplingMetadata, or of an InputBatch, ask for."""
    processors = metadata.logitsprocs.argmax_invariant
    return next((processor for processor in processors if isinstance(processor, Asking)), None)


def init_batch(theirs: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """InputBatch.__init__; a batch that replaces another takes over its processors."""
    theirs(self, *args, **kwargs)
    processors = self.logitsprocs.argmax_invariant
    processors[:] = [processor for processor in processors if not isinstance(processor, Asking)]
    processors.append(Asking(self))


def add_request(theirs: Callable[..., int], self: Any, request: Any) -> int:
    """InputBatch.add_request, which looks at the request's parameters once."""
    asking = asking_of(self)
    params = request.sampling_params
    row = row_of(params, asking is not None and asking.splits)
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
    self.topk_topp_sampler._fastsample = asking = asking_of(sampling_metadata)
    answer = theirs(self, logits, sampling_metadata, *more, **named)
    if asking is not None and asking.keeps:
        _keep_greedy(asking, answer[0], logits, sampling_metadata)
    return answer


def _keep_greedy(asking: Asking, tokens: torch.Tensor, logits: torch.Tensor, metadata: Any) -> None:
    """Greedy rows, which vLLM samples, keep their token."""
    if metadata.all_random:
        return
    if metadata.all_greedy:
        asking.kept = Kept.empty(select("auto", logits), len(logits), logits.shape[1], logits.device)
        greedy = torch.ones_like(tokens, dtype=torch.bool)
    else:
        greedy = metadata.temperature < GREEDY_BELOW
    assert asking.kept is not None
    asking.kept.be_single(greedy, tokens.long())


def apply_penalties(
    theirs: Callable[..., torch.Tensor], logits: torch.Tensor, sampling_metadata: Any, *more: Any, **named: Any
) -> torch.Tensor:
    """Sampler.apply_penalties, which vLLM calls for every batch, greedy ones too."""
    logits = theirs(logits, sampling_metadata, *more, **named)
    asking = asking_of(sampling_metadata)
    if asking is not None and asking.asked is not None and asking.asked.edited:
        ids = padded(asking.histories())
        STEP.edit(logits, asking.asked, ids.to(logits.device, non_blocking=True))
    return logits


# Seeds and offsets ---------------------------------------------------------------------------------------------------


def seeds_of(requests: int, generators: dict[int, torch.Generator]) -> Places:
    """Of each request; fresh seeds where a request has no generator."""
    offsets = torch.zeros(requests, dtype=torch.int64, device=CPU)
    if not generators:
        return pack_seeds(None, requests), offsets
    every = len(generators) == requests
    seeds = torch.empty(requests, dtype=torch.int64, device=CPU) if every else pack_seeds(None, requests)
    own = [(row, *_next_draw(generator)) for row, generator in generators.items()]
    where = torch.tensor([row for row, _, _ in own], device=CPU)
    seeds[where] = pack_seeds([seed for _, seed, _ in own], len(own))
    offsets[where] = torch.tensor([offset for _, _, offset in own], device=CPU)
    ahead = _ahead_of(generators)
    if ahead is not None:
        offsets = offsets.to(ahead.device, non_blocking=True)
        offsets.index_add_(0, where.to(ahead.device, non_blocking=True), ahead)
    return seeds, offsets


def count_accepted(generators: dict[int, torch.Generator], accepted: torch.Tensor) -> None:
    """Requests get accepted drafts besides what was drawn for them, int64 [B], which stays on its device."""
    if generators:
        where = torch.tensor(list(generators), device=CPU).to(accepted.device, non_blocking=True)
        ahead, more = _ahead_of(generators), accepted[where]
        total = more if ahead is None else ahead + more
        _accepted.update(zip(generators.values(), total.unbind(), strict=True))


_draws: WeakKeyDictionary[torch.Generator, int] = WeakKeyDictionary()
_accepted: WeakKeyDictionary[torch.Generator, torch.Tensor] = WeakKeyDictionary()


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


def _ahead_of(generators: dict[int, torch.Generator]) -> torch.Tensor | None:
    """The accepted drafts of each request so far, int64 [number of generators]; None if there are none."""
    found = [_accepted.get(generator) for generator in generators.values()]
    some = next((count for count in found if count is not None), None)
    if some is None:
        return None
    none = torch.zeros_like(some)
    return torch.stack([none if count is None else count for count in found])
