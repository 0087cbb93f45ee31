"""Verification of drafts by drawing: what comes out is the text that plain decoding gives, whatever was drafted.

A token is a pure function of its row, so a draft that has the row's own seed and position is right where it equals the
draw. For a draft that is a function of the text before it (n-gram, prompt lookup, the draft model's best token) that
accepts as often as rejection sampling does (Leviathan, Kalman and Matias 2023, https://arxiv.org/abs/2211.17192; Chen
et al. 2023, https://arxiv.org/abs/2302.01318): with the probability that the target gives the draft.
"""

from __future__ import annotations

from typing import Any

import torch

from fastsample.arrays import ArrayLike
from fastsample.inputs import BiasLike, BreakerIds, Inputs, Seed, TokenIds, gather
from fastsample.outputs import KeptForm, LogprobsMode, OnInvalid, Options
from fastsample.params import SamplingParams
from fastsample.traced import is_traced
from fastsample.verified import Given, RuleName, VerifyOutput, verified


def verify(
    logits: ArrayLike,
    draft_ids: TokenIds,
    params: SamplingParams | None = None,
    *,
    num_drafts: Any = None,
    seed: Seed | None = None,
    offset: Seed = 0,
    rule: RuleName = "exact",
    draft_logits: ArrayLike | None = None,
    draft_probs: ArrayLike | None = None,
    draft_params: SamplingParams | None = None,
    bitmask: ArrayLike | None = None,
    bias: BiasLike | None = None,
    prompt_ids: TokenIds | None = None,
    output_ids: TokenIds | None = None,
    dry_breakers: BreakerIds | None = None,
    logprobs: LogprobsMode | None = None,
    top_logprobs: int = 0,
    on_invalid: OnInvalid = "raise",
    backend: str = "auto",
    kept: KeptForm | None = None,
    kept_capacity: int = 0,
    kept_mass: bool = False,
    entropy: bool = False,
    out: VerifyOutput | None = None,
    **fields: Any,
) -> VerifyOutput:
    """Verify drafted tokens: the accepted ones and one token more, which are what plain decoding would have drawn.

    Row i of a request (from 0) are the logits that follow its first i drafts; it stands at `offset + i`. Its token is
    that of `fastsample.sample` there, with the drafts before it as further output ids. The result goes on as long as
    the next draft equals the token.

    Args:
        logits: float32, float16 or bfloat16 [B, K + 1, V]; or [N, V], where the rows of each request follow those of
            the one before, num_drafts + 1 of each.
        draft_ids: integers [B, K]; for requests of different lengths padded with -1, as a list of ids per request, or
            (with num_drafts) one after the other [sum(num_drafts)]. An id that is no token, such as -1, is rejected.
        num_drafts: drafts of each request, integers [B]. Needed for logits [N, V]; else None means K, and rows past a
            request's last one count for nothing. Reading a tensor on a GPU waits for it.
        params: how to sample; `fields` override it. Each value is for all, one per request [B], or one per row [N] or
            [B, K + 1].
        seed: an int s, which gives request i the seed splitmix64(splitmix64(s) + i), as `fastsample.sample` does for
            rows; or one per request, used as it is. None takes a fresh seed from torch's default CPU generator.
        offset: position of each request's first row, an int or one per request.
        rule: "exact" accepts the drafts that equal what plain decoding draws, so that the text is the same. "chain"
            (Leviathan et al. 2023, Chen et al. 2023) and "block" (Sun et al. 2024) compare the target's law with the
            one that the drafts were drawn from: the text is another one with the same law, and more drafts are accepted
            where they were drawn at random. Their random bits are no plain draw's, so a drafter must not draw with
            `fastsample.sample` and the same seed and offsets.
        draft_logits: what each draft was drawn from, float32, float16 or bfloat16 [B, K, V], or [sum(num_drafts), V];
            for the rules "chain" and "block", which take the parameters, masks, bias and history of the target's row at
            the same position. Only the rows that have a draft count.
        draft_probs: the same as probabilities, of any sum: the temperature and the penalties are in them, the filters
            (top_k, top_p, ...) are applied.
        draft_params: the temperature and the filters of the drafts, one value for all or per request, where they are
            not the target's; `SamplingParams()` where draft_probs are what the drafts were drawn from as they are.
        bitmask: int32 [words], [B, words], [N, words] or [B, K + 1, words], as for `fastsample.sample`.
        bias: a dict for all rows, a list with a dict or None per request or per row, or tensors (row_ptr, ids, values)
            whose row_ptr has an entry per request or per row.
        prompt_ids, output_ids, dry_breakers: the history of each request before the drafts, as for
            `fastsample.sample`. It is not copied for each row.
        logprobs, top_logprobs, backend, kept_mass, entropy: as for `fastsample.sample`.
        kept, kept_capacity: as for `fastsample.sample`, for each token that comes out: the set of the target's row.
        out: a VerifyOutput of an earlier call of the same shape, to be filled and returned.
        on_invalid: an invalid row that the result comes to raises ValueError ("raise"; on a GPU this waits for the
            device), or ends the result before it and gives a status ("flag"). Rows past the result do not matter.

    Returns:
        VerifyOutput.

    Raises:
        TypeError, ValueError: bad argument; the message names it, the request or row, and the value.
        RuntimeError: the named backend cannot serve these logits.
    """
    drafts = Given(draft_ids, num_drafts, None, rule, draft_logits, draft_probs, draft_params)
    reported = (kept, kept_capacity, kept_mass, entropy)
    options = Options(1, logprobs, top_logprobs, on_invalid, backend, "logits", *reported)
    inputs = gather(bitmask, None, bias, prompt_ids, output_ids, dry_breakers)
    if is_traced():
        traced: VerifyOutput = _traced(drafts, inputs, out, options)(
            logits, drafts, params, fields, seed, offset, inputs, options, out
        )
        return traced
    return verified(logits, drafts, params, fields, seed, offset, inputs, options, out)


def verify_tree(
    logits: ArrayLike,
    draft_ids: torch.Tensor,
    parents: torch.Tensor,
    params: SamplingParams | None = None,
    *,
    seed: Seed | None = None,
    offset: Seed = 0,
    bitmask: ArrayLike | None = None,
    bias: BiasLike | None = None,
    prompt_ids: TokenIds | None = None,
    output_ids: TokenIds | None = None,
    dry_breakers: BreakerIds | None = None,
    logprobs: LogprobsMode | None = None,
    top_logprobs: int = 0,
    on_invalid: OnInvalid = "raise",
    backend: str = "auto",
    kept: KeptForm | None = None,
    kept_capacity: int = 0,
    kept_mass: bool = False,
    entropy: bool = False,
    out: VerifyOutput | None = None,
    **fields: Any,
) -> VerifyOutput:
    """Verify a tree of drafts: the way from the root along which each node's draw is the token of one of its children.

    Node 0 is the root: its row follows the text so far, and its own token is not looked at. The row of any other node
    follows its token, which follows that of its parent. A node at depth k stands at `offset + k`. Where several
    children have the token that was drawn, the lowest node is taken.

    Args:
        logits: float32, float16 or bfloat16 [B, n, V], the row of each node.
        draft_ids: integers [B, n], each node's token.
        parents: integers [B, n], each node's parent: a lower node. That of node 0 is not looked at. A node whose parent
            is -1 is not in the tree.
        params, seed, offset, bitmask, bias, prompt_ids, output_ids, dry_breakers, logprobs, top_logprobs, on_invalid,
            backend, kept, kept_capacity, kept_mass, entropy, out: as for `verify`, with nodes for rows.

    Returns:
        VerifyOutput, whose K + 1 is n, with the path.

    Raises:
        TypeError, ValueError, RuntimeError: as for `verify`.
    """
    drafts = Given(draft_ids, parents=parents)
    reported = (kept, kept_capacity, kept_mass, entropy)
    options = Options(1, logprobs, top_logprobs, on_invalid, backend, "logits", *reported)
    inputs = gather(bitmask, None, bias, prompt_ids, output_ids, dry_breakers)
    if is_traced():
        traced: VerifyOutput = _traced(drafts, inputs, out, options)(
            logits, drafts, params, fields, seed, offset, inputs, options, out
        )
        return traced
    return verified(logits, drafts, params, fields, seed, offset, inputs, options, out)


def _traced(drafts: Given, inputs: Inputs, out: Any, options: Options) -> Any:
    """What makes the call in a trace."""
    from fastsample import ops_verify, untraced

    return untraced.served(ops_verify.verify, inputs, out, drafts.refused() or options.without_size)
