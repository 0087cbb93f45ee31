"""SGLang's `return_sampling_mask`: for each token that comes out, the ids that it was drawn from.

SGLang finds them by one more top-k over probabilities [B, V]. Here they are what the draw itself has kept, given on in
the form of SGLang's PyTorch sampler: the likeliest first, without tokens whose probability is 0 in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.logits_processor import SamplingMaskOutput, SamplingMaskStatus
from sglang.srt.layers.sampler import _SamplingMaskCapture
from sglang.srt.runtime_context import get_exec, get_server_args

from fastsample.checks import MAX_VOCAB
from fastsample.integrations.sets import Kept
from fastsample.integrations.sglang.common import Inputs

UNASKED = 4096
"""SGLang's own `--sampling-mask-max-tokens`: a cap that nobody has asked for."""


def cap() -> int:
    """The most ids that a mask may have: what `--sampling-mask-max-tokens` says where it is given, else any number.

    Servers that are split into prefill and decode have buffers of that size, whoever asked for it.
    """
    limit: int = get_exec().features.sampling_mask_max_tokens
    is_split = get_server_args().disaggregation_mode != "null"
    return limit if is_split or limit != UNASKED else MAX_VOCAB


def draw(inputs: Inputs, info: Any) -> tuple[torch.Tensor, _SamplingMaskCapture | None]:
    """Tokens int32 [B], and the kept sets of the rows that ask for them; the others cost nothing more."""
    rows = info.sampling_mask_batch_indices
    if rows is None:
        return inputs.draw().int(), None
    if len(rows) == len(inputs.logits):
        asking = inputs
        tokens, kept = inputs.draw_kept()
    else:
        tokens, asking = inputs.draw(), inputs.of(rows)
        _, kept = asking.draw_kept()
    ids, weights = listed(asking, kept, max(info.sampling_mask_top_ks))
    return tokens.int(), _SamplingMaskCapture(weights, token_ids=ids, selected_weight=None, batch_rows=rows)


def listed(inputs: Inputs, kept: Kept, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept ids of R rows, int32 [R, n], and their probabilities, float32 [R, n]: falling, and 0 past the last.

    Args:
        inputs, kept: of these rows.
        top_k: the largest of them. Without one, and with filters of a request's own, only the device knows n.
    """
    logits, temperature = inputs.logits, inputs.columns["temperature"]
    if inputs.records is not None or top_k > UNASKED or not kept.count.is_cuda:
        top_k = max(int(kept.count.max()), 1)
    width = min(top_k, logits.shape[1])
    is_past = torch.arange(width, device=logits.device) >= kept.count[:, None]
    ids = kept.table(width).masked_fill_(is_past, 0)
    scaled = logits.gather(1, ids.long()).float() / temperature[:, None]
    weights, order = scaled.masked_fill_(is_past, -torch.inf).softmax(1).sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), weights


def of_ways(
    inputs: Inputs, info: Any, predict: torch.Tensor, accept_index: torch.Tensor, accept_lens: torch.Tensor
) -> SamplingMaskOutput:
    """The masks of all tokens that come out where drafts are verified.

    Args:
        inputs: of all nodes.
        info: SamplingBatchInfo; some request asks for masks.
        predict: int32 [nodes], the tokens.
        accept_index: int32 [B, depth], the nodes of each way, -1 past its end.
        accept_lens: int32 [B], how many there are.
    """
    rows = info.sampling_mask_batch_indices
    nodes = accept_index[rows].long().clamp(min=0)
    tokens = predict[nodes.flatten()].view(-1, 1)
    if info.is_all_greedy:
        ids, weights = tokens.int(), torch.ones_like(tokens, dtype=torch.float32)
    else:
        asking = inputs.of(nodes.flatten())
        ids, weights = listed(asking, asking.draw_kept()[1], max(info.sampling_mask_top_ks))
    lengths, logprobs = (weights > 0).sum(1, dtype=torch.int32), weights.log()
    selected = torch.where(ids == tokens, logprobs, -torch.inf).amax(1)
    limit = cap()
    statuses = torch.full_like(lengths, SamplingMaskStatus.OK)
    statuses.masked_fill_(lengths > limit, SamplingMaskStatus.OVERFLOW)
    statuses.masked_fill_(~selected.isfinite(), SamplingMaskStatus.INVALID)
    support = info.sampling_support_logprobs_capture_indices
    ids, logprobs = (values[:, :limit].view(*nodes.shape, -1) for values in (ids, logprobs))
    return SamplingMaskOutput(
        token_ids=ids,
        lengths=lengths.clamp(max=limit).view(nodes.shape),
        selected_logprobs=selected.view(nodes.shape),
        support_logprobs=None if support is None else logprobs[support],
        statuses=statuses.view(nodes.shape),
        num_accept_tokens=accept_lens[rows],
    )
