"""Verification of drafts by drawing: what comes out is the text that plain decoding gives, whatever was drafted.

A token is a pure function of its row, so a draft that has the row's own seed and position is right where it equals the
draw. For a draft that is a function of the text before it (n-gram, prompt lookup, the draft model's best token) that
accepts as often as rejection sampling does (Leviathan, Kalman and Matias 2023, https://arxiv.org/abs/2211.17192; Chen
et al. 2023, https://arxiv.org/abs/2302.01318): with the probability that the target gives the draft.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from fastsample import rejection
from fastsample.call import SampleCall, make
from fastsample.checks import CPU, is_one_of
from fastsample.inputs import NO_INPUTS, BiasLike, BreakerIds, Inputs, Rows, Seed, TokenIds, gather
from fastsample.inputs.drafts import Drafts, History, Tree, pack_drafts, pack_tree, spread, spread_bias
from fastsample.inputs.records import PLAIN
from fastsample.outputs import (
    FIELD,
    WRONG,
    Field,
    LogprobsMode,
    OnInvalid,
    Options,
    SampleOutput,
    Written,
    check_buffer,
    span,
)
from fastsample.params import SamplingParams
from fastsample.rejection import Proposal, pack_proposal
from fastsample.traced import is_traced

RuleName: TypeAlias = Literal["exact", "chain", "block"]


@dataclass(slots=True, eq=False)
class VerifyOutput:
    """What `verify` returns. B requests of up to K drafts; each gets its accepted drafts and one token more.

    Attributes:
        tokens: int64 [B, K + 1], padded with -1.
        num_accepted: int32 [B], how many drafts came out; their tokens are `tokens[b, :num_accepted[b]]`.
        status: int32 [B]; 0, or what is wrong with the row that ended the result: 1 NaN, 2 +inf, 3 nothing above -inf.
            That row is number `num_accepted[b]`, and has no token.
        logprobs: float32 [B, K + 1], NaN past the last token; ranks: int64 [B, K + 1], 0 there.
        top_ids: int64 [B, K + 1, N], -1 there; top_logprobs: float32 [B, K + 1, N], NaN there.
        path: int64 [B, n], the nodes whose rows gave the tokens, padded with -1. Of `verify_tree` only.
    """

    tokens: torch.Tensor
    num_accepted: torch.Tensor
    status: torch.Tensor
    logprobs: torch.Tensor | None = None
    ranks: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    path: torch.Tensor | None = None


def verify(
    logits: torch.Tensor,
    draft_ids: TokenIds,
    params: SamplingParams | None = None,
    *,
    num_drafts: Any = None,
    seed: Seed | None = None,
    offset: Seed = 0,
    rule: RuleName = "exact",
    draft_logits: torch.Tensor | None = None,
    draft_probs: torch.Tensor | None = None,
    draft_params: SamplingParams | None = None,
    bitmask: torch.Tensor | None = None,
    bias: BiasLike | None = None,
    prompt_ids: TokenIds | None = None,
    output_ids: TokenIds | None = None,
    dry_breakers: BreakerIds | None = None,
    logprobs: LogprobsMode | None = None,
    top_logprobs: int = 0,
    on_invalid: OnInvalid = "raise",
    backend: str = "auto",
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
        logprobs, top_logprobs, backend: as for `fastsample.sample`.
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
    options = Options(1, logprobs, top_logprobs, on_invalid, backend)
    inputs = gather(bitmask, None, bias, prompt_ids, output_ids, dry_breakers)
    if is_traced():
        traced: VerifyOutput = _traced(drafts, inputs, out)(
            logits, drafts, params, fields, seed, offset, inputs, options, out
        )
        return traced
    return verified(logits, drafts, params, fields, seed, offset, inputs, options, out)


def verify_tree(
    logits: torch.Tensor,
    draft_ids: torch.Tensor,
    parents: torch.Tensor,
    params: SamplingParams | None = None,
    *,
    seed: Seed | None = None,
    offset: Seed = 0,
    bitmask: torch.Tensor | None = None,
    bias: BiasLike | None = None,
    prompt_ids: TokenIds | None = None,
    output_ids: TokenIds | None = None,
    dry_breakers: BreakerIds | None = None,
    logprobs: LogprobsMode | None = None,
    top_logprobs: int = 0,
    on_invalid: OnInvalid = "raise",
    backend: str = "auto",
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
            backend, out: as for `verify`, with nodes for rows.

    Returns:
        VerifyOutput, whose K + 1 is n, with the path.

    Raises:
        TypeError, ValueError, RuntimeError: as for `verify`.
    """
    drafts = Given(draft_ids, parents=parents)
    options = Options(1, logprobs, top_logprobs, on_invalid, backend)
    inputs = gather(bitmask, None, bias, prompt_ids, output_ids, dry_breakers)
    if is_traced():
        traced: VerifyOutput = _traced(drafts, inputs, out)(
            logits, drafts, params, fields, seed, offset, inputs, options, out
        )
        return traced
    return verified(logits, drafts, params, fields, seed, offset, inputs, options, out)


class Given(NamedTuple):
    """The drafts of a call as the caller gave them."""

    draft_ids: Any
    num_drafts: Any = None
    parents: Any = None  # of a tree
    rule: Any = "exact"
    draft_logits: Any = None
    draft_probs: Any = None
    draft_params: Any = None

    def packed(self, logits: torch.Tensor) -> Drafts:
        if self.parents is not None:
            return pack_tree(logits, self.draft_ids, self.parents)
        return pack_drafts(logits, self.draft_ids, self.num_drafts)

    def pack_rule(self, drafts: Drafts, logits: torch.Tensor, raises: bool) -> Rule:
        """The rule and what it compares, checked."""
        if not is_one_of(self.rule, "exact", "chain", "block"):
            raise ValueError(f"rule = {self.rule!r}: expected 'exact', 'chain' or 'block'")
        if self.rule != "exact":
            proposal = pack_proposal(drafts, logits, self.draft_logits, self.draft_probs, self.draft_params)
            return Rule(self.rule, proposal, raises)
        for name in ("draft_logits", "draft_probs", "draft_params"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: expected None with rule='exact', which compares tokens")
        return _EXACT

    def traced(self) -> tuple[Any, ...]:
        """As an operator takes them, without `draft_params`."""
        return self[:-1]

    def refused(self) -> str | None:
        """The argument that cannot be an operator's."""
        for name in ("draft_ids", "num_drafts", "draft_logits", "draft_probs"):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor) and (value is not None or name == "draft_ids"):
                return name
        return None if self.draft_params is None else "draft_params"


def _traced(drafts: Given, inputs: Inputs, out: Any) -> Any:
    """What makes the call in a trace."""
    from fastsample import ops_verify, untraced

    return untraced.served(ops_verify.verify, inputs, out, drafts.refused())


def verified(
    logits: torch.Tensor,
    given: Given,
    params: SamplingParams | None,
    fields: dict[str, Any],
    seed: Seed | None,
    offset: Seed,
    inputs: Inputs,
    options: Options,
    out: VerifyOutput | None = None,
) -> VerifyOutput:
    """A call of `verify`, or of `verify_tree` where there are parents, as it is made eagerly."""
    drafts = given.packed(logits)
    rule = given.pack_rule(drafts, logits, options.on_invalid != "flag")
    requests = len(drafts.ids)
    if isinstance(params, SamplingParams) and (sizes := params.per_row()):
        own = {name: getattr(params, name) for name, size in sizes.items() if size == requests}
        fields = {**own, **fields}
    fields = {name: v if type(v) in PLAIN else spread(name, v, drafts) for name, v in fields.items()}
    of_each, history = split(inputs, drafts)
    flagged, table, use = options._replace(on_invalid="flag"), as_table(logits), partial(rule.apply, drafts)
    found, invalid = make("tokens", table, params, fields, seed, offset, of_each, flagged, None, 5, history, use)
    result = checked_result(found, options, invalid)
    return result if out is None else _fill(out, result, logits, drafts.ids)


def _fill(out: Any, result: VerifyOutput, logits: torch.Tensor, ids: torch.Tensor) -> VerifyOutput:
    """A caller's buffers, filled with a result; checked before anything is written."""
    if not isinstance(out, VerifyOutput):
        raise TypeError(f"out: expected a VerifyOutput, got {type(out).__name__}")
    values = {name: value for name in out.__slots__ if (value := getattr(result, name)) is not None}
    buffers = {f"out.{name}": getattr(out, name) for name in values}
    for (name, buffer), value in zip(buffers.items(), values.values(), strict=True):
        check_buffer(name, buffer, Field(name, value.dtype, "row", None), tuple(value.shape), value.device)
    written = Written(buffers)
    for name, read in (("the logits", logits), ("draft_ids", ids)):
        written.require_apart(name, *span(read))
    for buffer, value in zip(buffers.values(), values.values(), strict=True):
        buffer.copy_(value)
    return out


@dataclass(frozen=True)
class Rule:
    """How drafts are accepted: "exact", or by comparing the target's law with the one they were drawn from."""

    name: str
    proposal: Proposal | None
    raises: bool  # where a draft's own row is no law

    def apply(
        self, drafts: Drafts, call: SampleCall, table: torch.Tensor, rows: Rows
    ) -> tuple[VerifyOutput, int | None]:
        """What comes out of drafts, and how many results end at an invalid row where that is known.

        `rows` has the seeds of the requests, and the offsets of their first rows.
        """
        if self.proposal is None and call.engine.verifies and drafts.in_order:
            sampled, accepted, status, invalid = call.verified(table, rows, drafts.ids)
            fields = {name: drafts.by_request(getattr(sampled, name), 0) for name in _present(sampled)}
            return VerifyOutput(**(fields | {"num_accepted": accepted, "status": status})), invalid
        rows = of_rows(drafts, rows)
        if self.proposal is None:
            sampled = call.run(table, rows, None)
            return _walk(sampled, drafts) if isinstance(drafts, Tree) else accept(sampled, drafts), None
        found = rejection.verify(self.name, call.engine, table, rows, drafts, self.proposal)
        if self.raises:
            rejection.raise_if_unknown(found, self.proposal)
        fields = {"tokens": found.tokens, "status": found.status}
        if call.options.logprobs is not None:
            sampled = call.of_tokens(table, rows, found.tokens[drafts.request, drafts.position])
            fields |= {name: drafts.by_request(getattr(sampled, name), _EMPTY[name]) for name in _present(sampled)[2:]}
        return _cut(fields, fields, found.accepted), None


_EXACT = Rule("exact", None, False)


def of_rows(drafts: Drafts, rows: Rows) -> Rows:
    """Rows with a seed and an offset each, given those of each request and of its first row."""
    seeds, offsets = rows.seeds, rows.offsets.expand(len(drafts.ids))
    seeds, offsets = seeds[drafts.request], offsets[drafts.request] + drafts.position
    return replace(rows, seeds=seeds, offsets=offsets, native=None, slots=None)


def split(inputs: Inputs, drafts: Drafts) -> tuple[Inputs, History]:
    """What each row is given, and what those of a request share."""
    mask, bias = inputs.bitmask, inputs.bias
    if isinstance(mask, torch.Tensor) and mask.ndim > 1:
        mask = spread("bitmask", mask, drafts)
    if bias is not None:
        bias = spread_bias(bias, drafts)
    own = NO_INPUTS if mask is None and bias is None else Inputs(bitmask=mask, bias=bias)
    return own, History(drafts, inputs.prompt_ids, inputs.output_ids, inputs.dry_breakers)


def as_table(logits: torch.Tensor) -> torch.Tensor:
    """The rows of all requests, one after the other."""
    return logits.flatten(0, 1) if logits.ndim == 3 else logits


# What comes out ------------------------------------------------------------------------------------------------------


def accept(sampled: SampleOutput, drafts: Drafts) -> VerifyOutput:
    """The tokens up to the first that is not the next draft."""
    fields = {name: drafts.by_request(getattr(sampled, name), _EMPTY[name]) for name in _present(sampled)}
    ids: Any = drafts.ids
    views: dict[str, Any] = fields
    if ids.device == CPU:  # numpy takes a third of torch's time for so few numbers, by the same expressions
        ids, views = ids.numpy(), {name: value.numpy() for name, value in fields.items()}
    return _cut(fields, views, leading(views["tokens"], ids))


def leading(tokens: Any, ids: Any) -> Any:
    """How many of the drafts [B, K], from the first one on, are what was drawn, tokens [B, K + 1]; int64 [B]."""
    return ((tokens[:, :-1] == ids) & (ids >= 0)).cumprod(1).sum(1)


def _walk(sampled: SampleOutput, tree: Tree) -> VerifyOutput:
    """The tokens along the way from the root, each level for all requests at once."""
    fields = {name: tree.by_request(getattr(sampled, name), _EMPTY[name]) for name in _present(sampled)}
    requests, nodes = tree.shape
    drawn, index = fields["tokens"], torch.arange(nodes, device=tree.ids.device)
    at = torch.zeros(requests, dtype=torch.int64, device=tree.ids.device)
    path = torch.full((requests, nodes), -1, dtype=torch.int64, device=tree.ids.device)
    for depth in range(nodes):
        path[:, depth] = at
        node = at.clamp(min=0)[:, None]
        token = drawn.gather(1, node)
        child = (tree.parents == node) & (tree.tokens == token) & (token >= 0) & (at >= 0)[:, None]
        at = torch.where(child, index, nodes).amin(1)
        at = at.masked_fill(at == nodes, -1)
    along = path.clamp(min=0)
    for name, value in fields.items():
        shape = (*along.shape, *[1] * (value.ndim - 2))
        fields[name] = value.gather(1, along.view(shape).expand(-1, -1, *value.shape[2:]))
    result = _cut(fields, fields, (path >= 0).sum(1) - 1)
    result.path = path
    return result


def _cut(fields: dict[str, torch.Tensor], views: dict[str, Any], accepted: Any) -> VerifyOutput:
    """What came out: `accepted` tokens and one more, then padding, which is written to the views of the fields."""
    rows, steps = views["tokens"].shape
    xp: Any = torch if isinstance(accepted, torch.Tensor) else np
    where = {"device": accepted.device} if xp is torch else {}
    past = xp.arange(steps, **where) > accepted[:, None]
    status = views["status"][xp.arange(rows, **where), accepted]
    for name, value in views.items():
        value[past] = _EMPTY[name]
    accepted, status = (v if xp is torch else torch.from_numpy(v) for v in (accepted, status))
    del fields["status"]
    return VerifyOutput(num_accepted=accepted.to(torch.int32), status=status, **fields)


_EMPTY = {"status": 0} | {name: field.invalid for name, field in FIELD.items() if field.invalid is not None}


def _present(sampled: SampleOutput) -> tuple[str, ...]:
    return tuple(name for name in SampleOutput.__slots__ if getattr(sampled, name) is not None)


def checked_result(result: VerifyOutput, options: Options, invalid: int | None = None) -> VerifyOutput:
    """ValueError where a result ended at an invalid row, if that is an error; `invalid` such rows where it is known."""
    if options.on_invalid == "raise" and invalid != 0 and bool(result.status.any()):
        request = int(result.status.nonzero()[0, 0])
        code, row = int(result.status[request]), int(result.num_accepted[request])
        raise ValueError(
            f"logits: request {request}, row {row} has {WRONG['logits'][code]}; on_invalid='flag' ends the result "
            "before it and returns a status instead"
        )
    return result
