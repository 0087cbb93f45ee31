"""A verification as it is made eagerly: drafts and rule checked, rows sampled or compared, and what comes out.

`fastsample.verify`, `verify_tree`, their operator (ops_verify.py) and `Sampler.verify` all end here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from fastsample import rejection
from fastsample.arrays import as_tensor
from fastsample.buffers import Written, check_buffer, span
from fastsample.call import SampleCall, make
from fastsample.checks import CPU, is_one_of
from fastsample.inputs import NO_INPUTS, Inputs, Rows, Seed
from fastsample.inputs.drafts import Drafts, History, Tree, pack_drafts, pack_tree, spread, spread_bias
from fastsample.inputs.records import PLAIN
from fastsample.kept import list_verified
from fastsample.outputs import FIELD, WRONG, Array, Field, Options, SampleOutput, require_no_capture, to_numpy
from fastsample.params import SamplingParams
from fastsample.rejection import Proposal, pack_proposal

RuleName: TypeAlias = Literal["exact", "chain", "block"]


class VerifyArrays(NamedTuple):
    """A VerifyOutput as NumPy arrays, with its names, shapes and dtypes."""

    tokens: Array
    num_accepted: Array
    status: Array
    logprobs: Array | None
    ranks: Array | None
    top_ids: Array | None
    top_logprobs: Array | None
    kept_count: Array | None
    kept_ids: Array | None
    kept_row_ptr: Array | None
    kept_bitmask: Array | None
    log_kept_mass: Array | None
    entropy: Array | None
    path: Array | None


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
        kept_count: int32 [B, K + 1], how many tokens are kept where each token was drawn; 0 past the last.
        kept_ids, kept_row_ptr: int32 and int64 [B (K + 1) + 1]: those of token i of request b are
            `kept_ids[kept_row_ptr[j] : kept_row_ptr[j + 1]]`, j = b (K + 1) + i; none past the last.
        kept_bitmask: int32 [B, K + 1, ceil(V / 32)], 0 past the last token.
        log_kept_mass, entropy: float32 [B, K + 1], NaN past the last token.
        path: int64 [B, n], the nodes whose rows gave the tokens, padded with -1. Of `verify_tree` only.
    """

    tokens: torch.Tensor
    num_accepted: torch.Tensor
    status: torch.Tensor
    logprobs: torch.Tensor | None = None
    ranks: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    kept_count: torch.Tensor | None = None
    kept_ids: torch.Tensor | None = None
    kept_row_ptr: torch.Tensor | None = None
    kept_bitmask: torch.Tensor | None = None
    log_kept_mass: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    path: torch.Tensor | None = None

    def numpy(self) -> VerifyArrays:
        """The same outputs as NumPy arrays: over the same memory on a CPU, copied (which waits) from a GPU."""
        return VerifyArrays(*to_numpy(self))


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


def verified(
    logits: Any,
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
    options = options.checked()
    logits = as_tensor("logits", logits)
    drafts = given.packed(logits)
    rule = given.pack_rule(drafts, logits, options.on_invalid != "flag")
    requests = drafts.ids.shape[0]
    if isinstance(params, SamplingParams) and (sizes := params.per_row()):
        own = {name: getattr(params, name) for name, size in sizes.items() if size == requests}
        fields = {**own, **fields}
    fields = {name: v if type(v) in PLAIN else spread(name, v, drafts) for name, v in fields.items()}
    of_each, history = split(inputs, drafts)
    flagged, table, use = options.of_rows, as_table(logits), partial(rule.apply, options, drafts)
    found, invalid = make("tokens", table, params, fields, seed, offset, of_each, flagged, None, 4, history, use)
    result = checked_result(found, options, invalid)
    return result if out is None else _fill(out, result, logits, drafts.ids)


def _fill(out: Any, result: VerifyOutput, logits: torch.Tensor, ids: torch.Tensor) -> VerifyOutput:
    """A caller's buffers, filled with a result; checked before anything is written."""
    if not isinstance(out, VerifyOutput):
        raise TypeError(f"out: expected a VerifyOutput, got {type(out).__name__}")
    values = {name: value for name in out.__slots__ if (value := getattr(result, name)) is not None}
    if result.kept_bitmask is None:  # lists of exactly the size that they have
        out.kept_ids, out.kept_row_ptr = values.pop("kept_ids", None), values.pop("kept_row_ptr", None)
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
        self, options: Options, drafts: Drafts, call: SampleCall, table: torch.Tensor, rows: Rows
    ) -> tuple[VerifyOutput, int | None]:
        """What comes out of drafts, and how many results end at an invalid row where that is known.

        `options` are the verification's, `call` samples its rows; `rows` has the seeds of the requests, and the offsets
        of their first rows.
        """
        found, invalid = self._apply(drafts, call, table, rows)
        if options.kept == "ids":
            list_verified(call.engine, found, options.kept_capacity)
        return found, invalid

    def _apply(
        self, drafts: Drafts, call: SampleCall, table: torch.Tensor, rows: Rows
    ) -> tuple[VerifyOutput, int | None]:
        if self.proposal is None and call.engine.verifies and drafts.in_order:
            sampled, accepted, status, invalid = call.verified(table, rows, drafts.ids)
            fields = {name: drafts.by_request(getattr(sampled, name), 0) for name in _present(sampled)}
            return VerifyOutput(**(fields | {"num_accepted": accepted, "status": status})), invalid
        rows = of_rows(drafts, rows)
        if self.proposal is None:
            sampled = call.run(table, rows, None)
            return _walk(sampled, drafts) if isinstance(drafts, Tree) else accept(sampled, drafts), None
        found = rejection.verify(self.name, call, table, rows, drafts, self.proposal)
        if self.raises:
            rejection.raise_if_unknown(found, self.proposal)
        fields = {"tokens": found.tokens, "status": found.status}
        if call.wants_more:
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
    mask = as_tensor("bitmask", mask)
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
        if at.device == CPU and not bool((at >= 0).any()):  # on a GPU, to know it is to wait
            break
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
    if options.on_invalid != "raise" or invalid == 0:
        return result
    require_no_capture(result.status)
    if bool(result.status.any()):
        request = int(result.status.nonzero()[0, 0])
        code, row = int(result.status[request]), int(result.num_accepted[request])
        raise ValueError(
            f"logits: request {request}, row {row} has {WRONG['logits'][code]}; on_invalid='flag' ends the result "
            "before it and returns a status instead"
        )
    return result
