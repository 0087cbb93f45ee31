"""SGLang's penalties, which have to know every token before a row of logits.

SGLang counts the newest token of each request before a step: the last one that its scheduler knows. There are two gaps:
of several accepted drafts it counts the last, and a schedule that runs ahead counts each token a step late. Both are
closed here, the second on CPUs only, where nothing really runs ahead: on a GPU the counts are moved about on another
stream meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.runtime_context import get_schedule
from sglang.srt.sampling import penaltylib
from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties

from fastsample.integrations.sglang.common import STEP, is_chosen
from fastsample.integrations.sglang.tree import Tree

COUNT = "sglang.srt.managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens"
FEED = "sglang.srt.managers.overlap_utils.resolve_forward_inputs"
_PENALIZERS = (
    penaltylib.BatchedFrequencyPenalizer,
    penaltylib.BatchedPresencePenalizer,
    penaltylib.BatchedRepetitionPenalizer,
    penaltylib.BatchedMinNewTokensPenalizer,
)


def count(theirs: Callable[..., None], batch: Any) -> None:
    """ScheduleBatch.cumulate_penalty_output_tokens, around it: later, where the newest token is not known yet."""
    schedule = get_schedule()
    ahead = not schedule.disable_overlap_schedule and not schedule.enable_mixed_chunk
    if ahead and str(batch.device) == "cpu" and batch.spec_algorithm.is_none() and is_chosen():
        batch._fastsample_uncounted = True
    else:
        theirs(batch)


def feed(theirs: Callable[..., None], batch: Any, *args: Any, **kwargs: Any) -> None:
    """resolve_forward_inputs, around it: now the model gets the newest tokens, and then the penalties are applied."""
    theirs(batch, *args, **kwargs)
    if getattr(batch, "_fastsample_uncounted", False):
        batch._fastsample_uncounted = False
        newest = batch.input_ids[: len(batch.reqs)].long()
        batch.sampling_info.penalizer_orchestrator.cumulate_output_tokens(newest)


@dataclass
class Penalties:
    """SGLang's penalizers of a batch, which know all tokens up to the roots.

    SGLang adds the newest token of each request to them before a step. What else was accepted is added here, so that
    they see what they see without drafts. They may be written only where no schedule runs ahead of the device.
    """

    frequency: Any
    presence: Any
    repetition: Any
    least: Any  # min_new_tokens

    @staticmethod
    def of(info: Any) -> Penalties | None:
        """Those of a batch, or None where it has none or SGLang's own way must do."""
        orchestrator = getattr(info, "_fastsample_penalizers", None)
        if orchestrator is None or not orchestrator.is_required:
            return None
        found = {kind: one for kind, one in orchestrator.penalizers.items() if one.is_prepared()}
        if not get_schedule().disable_overlap_schedule or found.keys() - set(_PENALIZERS):
            STEP.say(
                logging.WARNING,
                "penalties do not count the drafts, as SGLang has it: that takes --disable-overlap-schedule and no "
                "penalizers but SGLang's",
            )
            return None
        return Penalties(*(found.get(kind) for kind in _PENALIZERS))

    def apply(self, rows: torch.Tensor, tree: Tree) -> None:
        """In place in rows [B, n, V], with the drafts on the way to each node for further outputs.

        The rows get what holds at the root; then the ids that are drafts get their own values, by the same operations.
        """
        ids = tree.tokens.long().clamp(0, rows.shape[2] - 1)
        same = (ids[:, :, None] == ids[:, None]).to(tree.way.dtype)
        times = tree.way @ same  # [B, n, n]: how often the way to a node has the token of the other node
        at = ids[:, None].expand(-1, tree.nodes, -1)
        drafted = rows.gather(2, at)
        if self.frequency is not None or self.presence is not None:
            base, own = rows.new_zeros(len(rows), rows.shape[2], dtype=torch.float32), torch.zeros_like(times)
            if self.frequency is not None:
                base.sub_(self.frequency.cumulated_frequency_penalties)
                own.sub_(self._frequencies(ids, times))
            if self.presence is not None:
                penalizer = self.presence
                base.sub_(penalizer.cumulated_presence_penalties)
                own.sub_(_chosen(times, penalizer.presence_penalties, penalizer.cumulated_presence_penalties, ids))
            rows.add_(base[:, None])
            drafted.add_(own)
        if self.repetition is not None:
            one, all_before = self.repetition.repetition_penalties, self.repetition.cumulated_repetition_penalties
            apply_scaling_penalties(rows, all_before[:, None])
            apply_scaling_penalties(drafted.flatten(1), _chosen(times, one, all_before, ids).flatten(1))
        rows.scatter_(2, at, drafted)
        if self.least is not None:
            length = self.least.len_output_tokens + tree.way.sum(2).int()
            early = length < self.least.min_new_tokens
            for node in range(tree.nodes):  # one at a time takes no [B, n, V]
                rows[:, node].add_(torch.where(early[:, node, None], self.least.stop_token_penalties, 0.0))

    def _frequencies(self, ids: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """What SGLang's sum comes to, token by token: k additions round otherwise than one of k times as much."""
        one = self.frequency.frequency_penalties[:, :, None]
        before: torch.Tensor = self.frequency.cumulated_frequency_penalties
        total = before.gather(1, ids)[:, None].expand(times.shape)
        for k in range(ids.shape[1] - 1):
            total = torch.where(times > k, total + one, total)
        return total

    def advance(self, tree: Tree, accept_index: torch.Tensor, accepted: torch.Tensor) -> None:
        """Count the accepted drafts; SGLang counts the token behind them when it prepares the next step."""
        tokens = tree.tokens.flatten().long()
        for node in accept_index[:, 1:].long().unbind(1):
            there, ids = node[:, None] >= 0, tokens[node.clamp(min=0)][:, None]
            if self.frequency is not None:
                one = self.frequency.frequency_penalties
                self.frequency.cumulated_frequency_penalties.scatter_add_(1, ids, one.masked_fill(~there, 0))
            for penalizer, name in ((self.presence, "presence"), (self.repetition, "repetition")):
                if penalizer is not None:
                    one, total = (
                        getattr(penalizer, f"{name}_penalties"),
                        getattr(penalizer, f"cumulated_{name}_penalties"),
                    )
                    total.scatter_(1, ids, torch.where(there, one, total.gather(1, ids)))
        if self.least is not None:
            self.least.len_output_tokens += accepted[:, None]


def _chosen(times: torch.Tensor, one: torch.Tensor, total: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A penalty that counts once: that of a request [B, 1] if a draft has the token, else what it has, total [B, V]."""
    return torch.where(times > 0, one[:, :, None], total.gather(1, ids)[:, None])
