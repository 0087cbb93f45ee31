"""Model runner V2: `Sampler._sample_random`, `RejectionSampler._verify`, and the requests in their slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastsample.integrations.asked import Asked, Row
from fastsample.integrations.vllm.arrival import for_runner, row_of
from fastsample.integrations.vllm.common import PROCESSED, STEP, left
from fastsample.integrations.vllm.drafts import Spread, accept, is_left
from fastsample.integrations.vllm.masks import marked
from fastsample.params import specs

_TEMPERATURE = [name for name, _ in specs()].index("temperature")


class _Asking:
    """The Rows of all requests, by their slot. For the V2 runner it is one more logits processor, the last one."""

    def __init__(self, states: Any) -> None:
        self._tokens = states.all_token_ids
        self._rows: dict[int, Row] = {}
        self._last: tuple[bytes, Asked | None] | None = None

    def put(self, slot: int, row: Row | None) -> None:
        """A request enters a slot, whatever was in it."""
        self._last = None
        self._rows.pop(slot, None)
        if row is not None:
            self._rows[slot] = row

    def of_rows(self, slots: np.ndarray[Any, Any], slot_of: torch.Tensor) -> Asked | None:
        """What the rows ask for, given the slots of the requests and the slot of each row, int [N]."""
        asked = self.asked(slots)
        if asked is None or len(slot_of) == len(slots):  # a row for each request
            return asked
        device = slot_of.device
        place = torch.empty(len(self._tokens.gpu), dtype=torch.int64, device=device)
        where = torch.from_numpy(slots).to(device, non_blocking=True).long()
        place[where] = torch.arange(len(slots), device=device)
        return Spread(asked, len(slots), place[slot_of])

    def asked(self, slots: np.ndarray[Any, Any]) -> Asked | None:
        """What the requests in these slots ask for."""
        if not self._rows:
            return None
        key = slots.tobytes()
        if self._last is None or self._last[0] != key:
            rows = {at: self._rows[slot] for at, slot in enumerate(slots.tolist()) if slot in self._rows}
            self._last = key, Asked(rows) if rows else None
        return self._last[1]

    def add_request(self, slot: int, params: Any) -> bool:
        """Whether the logits of this request are edited."""
        row = self._rows.get(slot)
        return row is not None and row.edits is not None

    def apply_staged_writes(self) -> None:
        pass

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """The edits; the histories are on the device already, and the drafts before a row in the rows before it."""
        asked = self.of_rows(ctx.idx_mapping_np, ctx.expanded_idx_mapping)
        if asked is None or not asked.edited:
            return logits
        where = asked.edits(logits.device).where
        length = int(ctx.seq_lens_upper_bound_np[asked.edited].max())
        ids = self._tokens.gpu[ctx.expanded_idx_mapping[where], :length].long()
        back = ctx.pos[where, None] - torch.arange(length, device=logits.device)
        if isinstance(asked, Spread):
            drafts = ctx.input_ids[(where[:, None] - back).clamp(0, len(logits) - 1)].long()
            ids = torch.where(back < ctx.expanded_local_pos[where, None], drafts, ids)
        STEP.edit(logits, asked, ids.masked_fill_(back < 0, -1))
        return logits


def init(theirs: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Sampler.__init__."""
    theirs(self, *args, **kwargs)
    self._fastsample = _Asking(self.req_states)
    self.logits_processors.append(self._fastsample)


def add_request(theirs: Callable[..., None], self: Any, req_idx: int, sampling_params: Any) -> None:
    """Sampler.add_request."""
    row = row_of(sampling_params)
    self._fastsample.put(req_idx, row)
    theirs(self, req_idx, sampling_params if row is None else for_runner(sampling_params, row))


def sample_random(
    theirs: Callable[..., Any],
    self: Any,
    processed_logits: torch.Tensor,
    expanded_idx_mapping: torch.Tensor,
    idx_mapping_np: Any,
    pos: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampler._sample_random: int64 tokens [B], and the logits that processed log-probabilities are of.

    Args:
        processed_logits: [B, V] of any dtype, divided by the temperature and cut by min-p, but where a row has its
            own record.
        expanded_idx_mapping: the state of each row's request, [B].
        pos: int64 [B], position of the token that the logits follow.
        top_k: int32 [B], V is off; None: off for all.
        top_p: float32 [B], 1 is off; None: off for all.
    """
    asking = getattr(self, "_fastsample", None)
    records = (
        None if asking is None else STEP.records(asking.of_rows(idx_mapping_np, expanded_idx_mapping), processed_logits)
    )
    if left(processed_logits) and records is None:
        answer: tuple[torch.Tensor, torch.Tensor] = theirs(
            self, processed_logits, expanded_idx_mapping, idx_mapping_np, pos, top_k, top_p, *args, **kwargs
        )
        return answer
    states = self.sampling_states
    # A temperature of 0 asks for the maximum and has divided nothing. Any other one is already applied.
    temperature = (states.temperature.gpu[expanded_idx_mapping] != 0).float()
    if records is not None:  # that of a record is still to be applied; it is 1 where there is none
        temperature *= records.view(torch.float32)[:, _TEMPERATURE]
    seeds = states.seeds.gpu[expanded_idx_mapping]
    columns = {"top_k": top_k, "top_p": top_p}
    given: dict[str, Any] = {"records": records, "temperature": temperature, **columns}
    kept = None
    if getattr(self, "return_sampling_mask", False):
        tokens, kept = STEP.draw_kept(processed_logits, seeds, pos.long(), **given)
    else:
        tokens = STEP.draw(processed_logits, seeds, pos.long(), **given)
    if self.logprobs_mode in PROCESSED and (top_k is not None or top_p is not None or records is not None):
        processed_logits = STEP.keep(processed_logits, records, **columns)
    return tokens, processed_logits if kept is None else marked(processed_logits, kept)


def verify(
    theirs: Callable[..., Any],
    self: Any,
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RejectionSampler._verify: the processed logits, int64 tokens [R, K + 1] and int32 numbers of them [R].

    Every row goes through vLLM's Sampler, as a row without drafts does.

    Args:
        logits: [N, V] of any dtype.
        draft_logits: [slots, K, V], or None.
        rest: the token that each row follows and its position, [N]; where the rows of each request begin, and N,
            int32 [R + 1]; the slot of each request, [R], on the device and on the host; the slot of each row and its
            number in its request, [N]; on the host, no less than the length of each request, [R]; and the tokens that
            rows follow once more, with -1 where a grammar forbids a draft.
    """
    inputs, pos, bounds, idx_mapping, idx_mapping_np, slot_of, local_pos, lengths, drafts = rest
    asking = getattr(self.sampler, "_fastsample", None)
    asked = None if asking is None else asking.asked(idx_mapping_np)
    watermark = None if self.watermark_key is None else "with watermarks"
    if is_left(self, draft_logits, watermark) or (left(logits) and (asked is None or not asked.filtered)):
        answer: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = theirs(self, logits, draft_logits, *rest)
        return answer
    tokens, processed_logits = self.sampler.sample(
        logits, slot_of, idx_mapping, idx_mapping_np, pos, inputs, local_pos, lengths
    )
    _, drawn, accepted = accept(tokens, drafts, bounds, self.num_speculative_steps)
    return processed_logits, drawn, (accepted + 1).to(torch.int32)
