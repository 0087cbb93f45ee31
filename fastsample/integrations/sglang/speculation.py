"""SGLang's drafts, verified by drawing: a seeded text is the one without drafts, whatever drafted it.

Every node of a tree of drafts has a row of logits. Its token is what plain decoding draws there, with the seed of the
request and the position of the node for offset. From the root, the way goes on to the child that has the token drawn.

SGLang's own `eagle_sample` takes the best token on CPUs and XPUs, whatever the temperature; elsewhere it leaves min-p
and custom logit processors out. Its penalties do not count the drafts, nor all accepted ones in later steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.runtime_context import get_exec, get_parallel, get_spec
from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties
from sglang.srt.utils import is_hip
from sglang.srt.utils.async_probe import sanitize_nan_logits

from fastsample.inputs import pack_seeds
from fastsample.integrations.asked import Asked, Edits, padded
from fastsample.integrations.sglang import masks
from fastsample.integrations.sglang.common import STEP, Inputs, columns, is_chosen
from fastsample.integrations.sglang.penalties import Penalties
from fastsample.integrations.sglang.tree import Tree

TARGET = "sglang.srt.speculative.eagle_utils.eagle_sample"


def left(algorithm: Any) -> str | None:
    """Why SGLang verifies the drafts of this algorithm itself, or None."""
    from sglang.srt.speculative.spec_utils import SIMULATE_ACC_LEN

    if not (algorithm.is_eagle() or algorithm.is_standalone() or algorithm.is_ngram()):
        return "this algorithm has a verification of its own"
    if get_spec().speculative_use_rejection_sampling:
        return "--speculative-use-rejection-sampling was asked for"
    if get_exec().deterministic.rl_on_policy_target is not None:
        return "rl_on_policy_target was asked for"
    return "SGLANG_SIMULATE_ACC_LEN was asked for" if SIMULATE_ACC_LEN > 0 else None


def verify(
    theirs: Callable[..., Any],
    verify_input: Any,
    batch: Any,
    logits_output: Any,
    grammar_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """eagle_sample of SGLang, around it: n nodes for each of B requests.

    Returns:
        The tokens drawn along the ways, int32 [B * n] by node; how many there are, int32 [B]; and the nodes of each
        way, int32 [B, depth], -1 past its end.

    Raises:
        RuntimeError: no engine of fastsample serves these logits.
    """
    if batch.forward_mode.is_idle() or not is_chosen():
        return theirs(verify_input, batch, logits_output, grammar_mask, *args, **kwargs)
    info, logits = batch.sampling_info, logits_output.next_token_logits
    reason = left(batch.spec_algorithm)
    if reason is None and info.has_watermark_candidates:
        reason = "a request has a watermark"
    if reason is not None:
        STEP.say(logging.WARNING, f"SGLang verifies drafts by itself: {reason}")
        return theirs(verify_input, batch, logits_output, grammar_mask, *args, **kwargs)
    reason = STEP.why_not(logits)
    if reason is not None:
        raise RuntimeError(f"--sampling-backend fastsample: {reason}")
    STEP.say(logging.INFO, "drafts are verified by drawing: a seeded text is the one without drafts")
    tree = Tree(verify_input, len(batch.seq_lens))
    penalties = _process(logits, info, tree, grammar_mask)
    inputs = _inputs(logits, info, tree)
    drawn = (logits.argmax(-1) if info.is_all_greedy else inputs.draw()).view(tree.tokens.shape)
    predict, accept_index, accepted = _walk(verify_input, tree, drawn, batch.device)
    group = get_parallel().attn_tp_group if is_dp_attention_enabled() else get_parallel().tp_group
    if group.world_size > 1 and (is_hip() or not info.is_all_greedy):  # where SGLang does
        for result in (predict, accept_index, accepted):
            group.broadcast(result, src=0)
    if penalties is not None:
        penalties.advance(tree, accept_index, accepted)
    if info.sampling_mask_batch_indices is not None:
        logits_output.sampling_mask_output = masks.of_ways(inputs, info, predict, accept_index, accepted + 1)
    return predict, accepted + 1, accept_index


def _walk(given: Any, tree: Tree, drawn: torch.Tensor, device: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What was drawn by node, the nodes along the ways, and the number of drafts there.

    SGLang's greedy verification is this walk for any tokens of the nodes.
    """
    from sglang.srt.speculative import eagle_utils

    shape = len(tree.tokens), given.max_tree_depth
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = eagle_utils.verify_tree_greedy_func(
        predicts=torch.zeros(tree.tokens.numel(), dtype=torch.int32, device=device),
        accept_index=torch.full(shape, -1, dtype=torch.int32, device=device),
        accept_token_num=torch.empty(shape[0], dtype=torch.int32, device=device),
        candidates=tree.tokens,
        retrieve_index=given.retrieve_index,
        retrieve_next_token=given.retrieve_next_token,
        retrieve_next_sibling=given.retrieve_next_sibling,
        target_predict=drawn,
        topk=given.tree_topk,
    )
    return result


def _inputs(logits: torch.Tensor, info: Any, tree: Tree) -> Inputs:
    """What every node is drawn with, as FastSampler does it in a plain step."""
    seeds = info.sampling_seed
    if seeds is None:
        seeds = pack_seeds(None, len(tree.tokens)).to(logits.device, non_blocking=True)
    records = STEP.records(getattr(info, "_fastsample", None), logits[:: tree.nodes])
    if records is not None:
        records = tree.of_nodes(records)
    given = {name: tree.of_nodes(values) for name, values in columns(info).items()}
    return Inputs(logits, tree.of_nodes(seeds), tree.offsets.long(), records, given)


def _process(logits: torch.Tensor, info: Any, tree: Tree, grammar_mask: Any) -> Penalties | None:
    """All that comes before the filters, in place in logits [B * n, V], in the order of a plain step."""
    rows = logits.view(*tree.tokens.shape, -1)
    penalties = Penalties.of(info)
    if penalties is not None:
        penalties.apply(rows, tree)
    else:
        if info.acc_additive_penalties is not None:
            rows.add_(info.acc_additive_penalties[:, None])
        if info.acc_scaling_penalties is not None:
            apply_scaling_penalties(logits, tree.of_nodes(info.acc_scaling_penalties))
    if grammar_mask is not None:
        grammar_mask.apply(logits)
    if info.logit_bias is not None:
        rows.add_(info.logit_bias[:, None])
    if info.has_custom_logit_processor:
        apply_custom_logit_processor(logits, info, tree.nodes)
    sanitize_nan_logits(logits, "verify: target model logits")
    asked = getattr(info, "_fastsample", None)
    if asked is not None and asked.edited:
        _edit(logits, asked, tree)
    return penalties


def _edit(logits: torch.Tensor, asked: Asked, tree: Tree) -> None:
    """DRY and n-grams that must not be repeated. Every output up to the root is known here: nothing runs ahead."""
    edits = asked.edits(logits.device)
    requests = [asked.rows[at] for at in asked.edited]
    known = [row.history.ids(row.source.output_ids) for row in requests if row.history is not None]
    before = tree.of_nodes(padded(known).to(logits.device, non_blocking=True))
    drafts = tree.tokens[edits.where][:, None].masked_fill(tree.way[edits.where] == 0, -1)
    where = edits.where[:, None] * tree.nodes + torch.arange(tree.nodes, device=logits.device)
    of_nodes = Edits(where.flatten(), tree.of_nodes(edits.records), tree.of_nodes(edits.breakers))
    STEP.edit_rows(logits, of_nodes, torch.cat([before, drafts.flatten(0, 1)], 1))
