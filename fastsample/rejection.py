"""Verification by rejection: drafts that were drawn from a known law are accepted so that the text has the target's.

Two rules, in integers (docs/contract.md, "Verification of drafts"): "chain" tests draft after draft (Leviathan, Kalman
and Matias 2023, https://arxiv.org/abs/2211.17192; Chen et al. 2023, https://arxiv.org/abs/2302.01318); "block" tests
all that a prefix of drafts can still become (Sun et al. 2024, https://arxiv.org/abs/2403.10444, algorithm 2) and
accepts at least as many. An engine weighs the drafts, one number each, and writes out the masses of no more rows than
there are requests at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from fastsample.arrays import as_tensor
from fastsample.backends import Engine, Outputs
from fastsample.buffers import empty
from fastsample.call import SampleCall
from fastsample.checks import CPU, check_logits
from fastsample.inputs import Bias, Rows
from fastsample.inputs.bias import select_bias
from fastsample.inputs.drafts import Drafts, dense_places, packed_places
from fastsample.inputs.probs import for_probs
from fastsample.inputs.records import pack
from fastsample.outputs import WRONG, InputKind, require_no_capture
from fastsample.params import SamplingParams, specs
from fastsample.reference.draw import ACCEPTANCE, RESIDUAL, draw_at, draw_from, multiply_high60, uniform60

Tensor = torch.Tensor

AT_ONCE = {True: 2**18, False: 2**22}  # tokens whose masses are in memory together, or one row: on a CPU, elsewhere
NEARLY_ONE = 1 + 2.0**-40  # more than rounding can lift a coin's threshold


class Proposal(NamedTuple):
    """The rows that drafts were drawn from."""

    table: Tensor  # [M, V]
    request: Tensor  # int64 [M], whose draft came from a row, and
    step: Tensor  # int64 [M], which of its drafts
    row: Tensor  # int64 [B, K], the row of each draft; any row past a request's last
    kind: InputKind
    params: SamplingParams | None  # temperature and filters where they are not the target's


def pack_proposal(drafts: Drafts, logits: Tensor, draft_logits: Any, draft_probs: Any, params: Any) -> Proposal:
    """One of draft_logits and draft_probs, [B, K, V] or [sum(num_drafts), V], checked."""
    if (draft_logits is None) == (draft_probs is None):
        raise ValueError("draft_logits, draft_probs: expected one of them, since these rules compare two laws")
    if params is not None and not isinstance(params, SamplingParams):
        raise TypeError(f"draft_params: expected SamplingParams, got {type(params).__name__}")
    name, given = ("draft_probs", draft_probs) if draft_logits is None else ("draft_logits", draft_logits)
    kind: InputKind = "probs" if draft_logits is None else "logits"
    given = as_tensor(name, given)
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor or an array, got {type(given).__name__}")
    requests, most = drafts.ids.shape
    vocab, device = logits.shape[-1], logits.device
    packed = given.ndim != 3
    wanted = [int(drafts.counts.sum()), vocab] if packed else [requests, most, vocab]
    if list(given.shape) != wanted or given.device != device:
        raise ValueError(f"{name}: expected shape {wanted} on {device}, got {list(given.shape)} on {given.device}")
    places = packed_places(drafts.counts, most, device) if packed else dense_places(requests, most, device)
    request, step, row = places
    return Proposal(check_logits(given, name=name), request, step, row, kind, params)


class Law(NamedTuple):
    """What an engine says of rows, N of them."""

    tokens: Tensor  # int64 [N], the plain draw where no token was given
    status: Tensor  # int32 [N]
    weights: Tensor  # int64 [N, 2], the token's mass and that of all
    masses: Tensor | None = None  # int64 [N, V]


class _Scratch(threading.local):
    """Memory that a thread keeps on the CPU: fresh pages would take longer than what is done to them."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of any contents, until the next of that name."""
        if device != CPU:
            return torch.empty(shape, dtype=dtype, device=device)
        size = shape[0] * shape[1]
        found = self._kept.get(name)
        if found is None or found.numel() < size:
            with torch.inference_mode(False):
                found = self._kept[name] = torch.empty(size, dtype=dtype, device=device)
        return found[:size].view(shape)


_scratch = _Scratch()


def weigh(
    engine: Engine,
    table: Tensor,
    rows: Rows,
    given: Tensor | None,
    kind: InputKind = "logits",
    masses: Tensor | None = None,
) -> Law:
    """The law of each row, and the mass of a token in it; every token's mass goes to `masses`, int64 [N, V]."""
    count, device = len(table), table.device
    law = Law(
        empty((count,), torch.int64, device),
        empty((count,), torch.int32, device),
        empty((count, 2), torch.int64, device),
        masses,
    )
    out = Outputs(law.status, law.tokens, weights=law.weights, masses=law.masses, given=given, input=kind)
    engine.run(table, rows, out)
    return law


def take(rows: Rows, index: Tensor) -> Rows:
    """Some of a batch's rows, which share the lists of their requests."""

    def own(values: Tensor) -> Tensor:
        return values if len(values) == 1 else values[index]

    found = Rows(own(rows.records), own(rows.seeds), own(rows.offsets))
    found.prompt_ids, found.output_ids, found.breakers = rows.prompt_ids, rows.output_ids, rows.breakers
    found.requests = rows.requests if rows.requests is None else rows.requests[index]
    if rows.bitmask is not None:
        found.bitmask = own(rows.bitmask)
    if rows.bias is not None:
        found.bias = Bias(*select_bias(rows.bias.tensors, index), rows.bias.vocab)
    if rows.drafted_ids is not None:
        found.drafted_ids = own(rows.drafted_ids)
    return found


class Rejection:
    """One batch of requests under verification: B requests, K drafts at most, N rows of V logits."""

    def __init__(
        self, rule: str, call: SampleCall, table: Tensor, rows: Rows, drafts: Drafts, proposal: Proposal
    ) -> None:
        self.rule, self.call, self.engine = rule, call, call.engine
        self.table, self.rows, self.proposal = table, rows, proposal
        self.index, ids = drafts.rows(), drafts.ids  # int64 [B, K + 1] and [B, K]
        self.ids, self.count = ids, drafts.count()
        self.width = table.shape[1]  # of what `masses` gives
        self.proposed = self._rows_of_drafts()
        padded = torch.nn.functional.pad(ids, (0, 1), value=-1)  # after its last draft, a request draws plainly
        target, law = self.laws(padded[drafts.request, drafts.position], ids[proposal.request, proposal.step])
        self.drawn = target.tokens
        self.status = target.status[self.index]  # int32 [B, K + 1]
        self.mass, self.total = target.weights[self.index].unbind(-1)  # int64 [B, K + 1]
        real = torch.arange(ids.shape[1], device=ids.device) < self.count[:, None]
        self.draft_status = torch.where(real, law.status[proposal.row], 0)
        mass, total = law.weights[proposal.row].unbind(-1)
        # A draft that is no token, or whose row is no law, was drawn from nothing that could be taken off.
        self.known = real & (ids >= 0) & (ids < table.shape[1]) & (self.draft_status == 0)
        self.factor = self.total[:, :-1].double() / total.clamp(min=1).double()
        self.scaled = mass.double() * self.factor  # D before it is truncated, float64 [B, K]

    def _rows_of_drafts(self) -> Rows:
        proposal = self.proposal
        of = self.index[proposal.request, proposal.step]
        proposed = take(self.rows, of)
        if proposal.params is not None:
            own = pack(proposal.params, {}, len(self.ids)).records.to(of.device)
            own = own if len(own) == 1 else own[proposal.request]
            proposed.records = _with_filters(proposed.records, own)
        return for_probs(proposed, "draft_probs") if proposal.kind == "probs" else proposed

    def laws(self, given: Tensor, drafted: Tensor) -> tuple[Law, Law]:
        """Of the target's rows and of the drafts', with the mass of a token in each."""
        proposal = self.proposal
        target = weigh(self.engine, self.table, self.rows, given)
        return target, weigh(self.engine, proposal.table, self.proposed, drafted, proposal.kind)

    def masses(self, own: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        """w_p and w_q in rows of the target and of drafts, int64 [n, V], until the next call."""
        proposal, shape = self.proposal, (len(own), self.width)
        p, q = (_scratch(name, shape, torch.int64, own.device) for name in ("p", "q"))
        weigh(self.engine, self.table[own], take(self.rows, own), None, masses=p)
        weigh(self.engine, proposal.table[theirs], take(self.proposed, theirs), None, proposal.kind, masses=q)
        return p, q

    # Which drafts are accepted --------------------------------------------------------------------------------------

    def coins(self) -> Tensor:
        """60 uniform bits of each draft's test, int64 [B, K]."""
        steps = torch.arange(self.ids.shape[1], device=self.ids.device)
        own = self.index[:, :-1]
        return uniform60(self.rows.seeds[own], self.rows.offsets[own], steps, ACCEPTANCE)

    def chain(self) -> tuple[Tensor, Tensor]:
        """How many drafts are accepted, int64 [B], and 1 for the ratio of what is left, float64 [B]."""
        threshold = multiply_high60(self.coins(), self.scaled.to(torch.int64))
        accepted = ((threshold < self.mass[:, :-1]) & self.known).cumprod(1).sum(1)
        return accepted, torch.ones_like(accepted, dtype=torch.float64)

    def block(self) -> tuple[Tensor, Tensor]:
        """How many drafts are accepted, int64 [B], and the ratio r there, float64 [B]."""
        mass, steps = self.mass[:, :-1], self.ids.shape[1]
        ratio = torch.where(self.known & (mass > 0), mass.double() / self.scaled, 0)
        ratios = [torch.ones(len(mass), dtype=torch.float64, device=mass.device)]
        for i in range(steps):
            ratios.append(torch.where(ratios[-1] > 0, (ratios[-1] * ratio[:, i]).clamp(max=1), 0))
        r = torch.stack(ratios, 1)
        coin = self.coins().double() * 2.0**-60
        # An invalid row ends the block: what follows the drafts before it is that row's.
        at = torch.arange(steps + 1, device=mass.device)
        end = torch.where(self.status != 0, at, steps + 1).amin(1).minimum(self.count)
        likely = (at[1:] <= end[:, None]) & (coin < r[:, 1:] * NEARLY_ONE)
        follows = likely & (at[1:] < end[:, None])
        left = self.sums_left(follows, r)
        accepted = torch.zeros_like(end)
        for i in range(steps, 0, -1):
            own, toss = r[:, i], coin[:, i - 1]
            possible = (accepted == 0) & likely[:, i - 1]
            heads = toss < own
            if i < steps:
                s, total = left(i, possible & follows[:, i - 1]).double(), self.total[:, i].double()
                heads = torch.where(end == i, heads, toss < torch.where(s > 0, s / (s + (1 - own) * total), 0))
            accepted = torch.where(possible & heads, i, accepted)
        return accepted, r.gather(1, accepted[:, None])[:, 0]

    def sums_left(self, follows: Tensor, r: Tensor) -> Callable[[int, Tensor], Tensor]:
        """A function of i and of requests, which are among those that follow [B, K]: their S_i, int64 [B]."""

        def sums(i: int, wanted: Tensor) -> Tensor:
            found = torch.zeros_like(self.count)
            for some in self._in_parts(wanted):
                found[some] = self.left(some, torch.full_like(some, i), r[some, i])[0].sum(1)
            return found

        return sums

    # The token after the accepted drafts ----------------------------------------------------------------------------

    def last(self, accepted: Tensor, r: Tensor) -> Tensor:
        """The token after the accepted drafts, int64 [B]; -1 where its row is invalid."""
        row = self.index.gather(1, accepted[:, None])[:, 0]
        tokens = self.drawn[row].clone()
        if not self.ids.shape[1]:
            return tokens
        rejected = (accepted < self.count) & (self.status.gather(1, accepted[:, None])[:, 0] == 0)
        for some in self._in_parts(rejected):
            own = row[some]
            at = accepted[some].clamp(max=self.ids.shape[1] - 1)
            left, whole = self.left(some, at, r[some])
            running = torch.cumsum(left, 1, out=_scratch("running", tuple(left.shape), torch.int64, left.device))
            u = uniform60(self.rows.seeds[own], self.rows.offsets[own], accepted[some], RESIDUAL)[:, None]
            drawn = torch.where(running[:, -1:] > 0, draw_at(running, u), -1)
            if drawn.device != CPU or bool((drawn < 0).any()):
                drawn = torch.where(drawn < 0, draw_from(whole, u), drawn)
            tokens[some] = torch.where(rejected[some], drawn[:, 0], tokens[some])
        return tokens

    def left(self, some: Tensor, at: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """max(0, trunc(r w_p) - D) and w_p in row `at` of some requests, int64 [n, V], until the next call."""
        p, q = self.masses(self.index[some, at], self.proposal.row[some, at])
        left = _scratch("left", (len(some), self.width), torch.int64, some.device)
        exact = _scratch("exact", (len(some), self.width), torch.float64, some.device)
        factor = torch.where(self.known[some, at], self.factor[some, at], 0)
        q.copy_(exact.copy_(q).mul_(factor[:, None]))  # D: truncated as it is copied
        left.copy_(exact.copy_(p).mul_(r[:, None]))
        return left.sub_(q).clamp_(min=0), p

    def _in_parts(self, wanted: Tensor) -> Iterable[Tensor]:
        """The requests that are wanted, some at a time; on a GPU all of them, since to know which is to wait."""
        every = torch.arange(len(wanted), device=wanted.device)
        found = every[wanted] if wanted.device == CPU else every
        size = max(1, AT_ONCE[wanted.device == CPU] // self.width)
        return (found[i : i + size] for i in range(0, len(found), size))


def _with_filters(records: Tensor, own: Tensor) -> Tensor:
    """Records with the temperature and the filters of `own`; what needs a history stays."""
    stays = torch.tensor([bool(spec.counts) or spec.of_history for _, spec in specs()], device=records.device)
    return torch.where(stays, records, own)


class Found(NamedTuple):
    """What came out."""

    tokens: Tensor  # int64 [B, K + 1], padded with -1
    accepted: Tensor  # int64 [B]
    status: Tensor  # int32 [B, K + 1], of the target's rows
    draft_status: Tensor  # int32 [B, K], of the drafts' rows


def verify(rule: str, call: SampleCall, table: Tensor, rows: Rows, drafts: Drafts, proposal: Proposal) -> Found:
    """Which drafts of each request are accepted, and the token after them."""
    run = (call.engine.rejection or Rejection)(rule, call, table, rows, drafts, proposal)
    accepted, r = run.chain() if rule == "chain" else run.block()
    last = run.last(accepted, r)
    at = torch.arange(run.index.shape[1], device=last.device)
    ids = torch.nn.functional.pad(run.ids, (0, 1), value=-1)
    tokens = torch.where(at < accepted[:, None], ids, -1)
    tokens = torch.where(at == accepted[:, None], last[:, None], tokens)
    return Found(tokens, accepted, run.status, run.draft_status)


def raise_if_unknown(found: Found, proposal: Proposal) -> None:
    """ValueError where a result came to a draft whose row is no law. Waits for the device."""
    status = found.draft_status
    require_no_capture(status)
    steps = torch.arange(status.shape[1], device=status.device)
    for request, step in ((status != 0) & (steps <= found.accepted[:, None])).nonzero()[:1].tolist():
        name = "draft_probs" if proposal.kind == "probs" else "draft_logits"
        raise ValueError(
            f"{name}: request {request}, draft {step} has {WRONG[proposal.kind][int(status[request, step])]}; "
            "on_invalid='flag' rejects such a draft instead"
        )
