"""The ranks of a group as an engine: it is asked about whole rows, of which each rank has a part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn.functional import pad

from fastsample.backends import Engine, Outputs, select
from fastsample.distributed.agreement import DRAFTS, require_agreement
from fastsample.distributed.filters import filters, uses, xtc
from fastsample.distributed.keys import HIGHEST, IDS, LOWEST, everything, value
from fastsample.distributed.local import is_edited, list_first, process, process_probs, without_edits
from fastsample.distributed.native import NativeShard
from fastsample.distributed.outputs import Found, as_given, compact, translate, write_listed
from fastsample.distributed.raw import write_raw
from fastsample.distributed.row import SplitRow, bound_beyond, edge_of, status_of
from fastsample.distributed.rules import SplitRejection
from fastsample.distributed.shard import Shard, mass_of
from fastsample.distributed.spread import write_spread
from fastsample.distributed.wire import Wire
from fastsample.inputs import Rows
from fastsample.outputs import InputKind
from fastsample.params import GREEDY_BELOW
from fastsample.reference.process import NAN, POSITIVE_INFINITY, choice, columns_of

Tensor = torch.Tensor

LISTED = 256
"""How many of its first tokens a rank tells the others, unless top-k alone decides."""
MOST_LISTED = 1024


class Plan:
    """What the parameters of rows ask for, which lasts while these stay the same."""

    def __init__(self, records: Tensor, vocab: int) -> None:
        self.records = records.clone()
        self.params = params = columns_of(self.records)
        self.used = uses(params)
        self.greedy = params["temperature"] < GREEDY_BELOW
        self.drawn_at = torch.where(self.greedy, 1.0, params["temperature"])
        self.judged_at = torch.where(choice(params, "order", "temperature_last"), 1.0, self.drawn_at)
        k = params["top_k"]
        cut = (k > 0) & (k < vocab) & (k <= MOST_LISTED)
        whole = (params["top_n_sigma"] > 0) | choice(params, "ties", "all")
        whole = whole | (choice(params, "order", "joint") & (params["top_p"] < 1))
        self.cut = self.greedy | (cut & ~whole)
        self.cut_short = bool(self.cut.all())
        # Where min-p comes before all that measures, it may cut everything off that is not listed.
        last, first_ = (choice(params, "order", order) for order in ("temperature_last", "min_p_first"))
        floors = (params["min_p"] > 0) & (params["top_n_sigma"] == 0) & ((params["top_p"] == 1) | first_)
        floors = floors & ~(last & (params["typical_p"] < 1)) & ~((k > MOST_LISTED) & (k < vocab))
        self.floor_short = bool((self.cut | floors).all())
        self.most = int(torch.where(cut & ~self.greedy, k, 1).max())
        self.products = any(name in self.used for name in ("typical", "eta", "p_less"))

    def holds(self, records: Tensor) -> bool:
        """Whether these are still the parameters: a Sampler may have written to its records."""
        return records.shape == self.records.shape and torch.equal(records, self.records)

    def count(self, out: Outputs) -> int:
        """How many tokens a rank lists."""
        return self.most if self.cut_short and _is_of_kept(out) else max(self.most, LISTED, out.num_top)

    def is_enough(self, x: Tensor, ids: Tensor, ranks: int, kind: InputKind) -> bool:
        """Whether what ranks list of each row, as `SplitRow` takes it, is all that filters may keep."""
        if self.cut_short or not self.floor_short:
            return self.cut_short
        edge, peak = edge_of(x, ids, ranks), x.amax(-1, keepdim=True)
        last = torch.where(edge > LOWEST, value(edge >> 32), -torch.inf)
        unit, mass = (mass_of(kind, at, peak, self.judged_at) for at in (peak, last))
        floor = (self.params["min_p"].double() * unit.double()).to(torch.int64)
        return bool((self.cut | (edge <= LOWEST) | (floor > bound_beyond(mass))).all())


def _refuse_whole_rows(out: Outputs) -> None:
    """What has a number for each token of a row is not made of its parts. (What laws weigh is told by rules.py.)"""
    law = None if out.given is not None else out.weights
    for name, wanted in (("filter_logits", out.filtered), ("probabilities", out.probabilities), ("law", law)):
        if wanted is not None:
            raise ValueError(f"{name}: expected whole rows; these are split over ranks, of which each has a part")


def _is_of_kept(out: Outputs) -> bool:
    """Whether all that is asked is about kept tokens."""
    return out.mode != "raw" and out.log_kept_mass is None


class SplitEngine(Engine):
    """Rows of which this rank has the tokens from `start` on.

    Args:
        wire: the ranks.
        start: the id of this rank's first token.
        vocab: V, of the whole rows.
        backend: the engine of this rank's own work.
    """

    name = "split"
    rejection = SplitRejection

    def __init__(self, wire: Wire, start: int, vocab: int, backend: str) -> None:
        self.wire, self.start, self.vocab, self._backend = wire, start, vocab, backend
        self.agreed = False
        self._plan: Plan | None = None  # of the last call
        self._own = torch.empty(0, 0)  # [B, V_r], of the next call
        self._mask: Tensor | None = None  # int32 [B or 1, ceil(V_r / 32)], likewise
        self.drafts = torch.empty(0, 0)  # [M, V_r], likewise: what its drafts were drawn from
        self._same_seeds = True

    def __repr__(self) -> str:
        return f"Split({self.start}, {self.vocab}, rank {self.wire.rank} of {self.wire.size})"

    def prepare(self, own: Tensor, mask: Tensor | None, same_seeds: bool) -> None:
        """What this rank has of the next call's rows.

        Args:
            own: [B, V_r]; columns past the vocabulary are left out.
            mask: int32 [B or 1, words], of these tokens.
            same_seeds: whether all ranks have the same seeds, or are to take those of the first rank.
        """
        self._own = self._without_padding(own)
        self._mask, self._same_seeds = mask, same_seeds

    def prepare_drafts(self, own: Tensor) -> None:
        """What this rank has [M, V_r] of what the next call's drafts were drawn from."""
        self.drafts = self._without_padding(own)

    def _without_padding(self, own: Tensor) -> Tensor:
        return own[:, : max(0, self.vocab - self.start)]

    def why_not(self, logits: Tensor | None) -> str | None:
        return None

    @torch.inference_mode()  # in which buffers of any kind may be written to
    def run(self, logits: Tensor, rows: Rows, out: Outputs) -> int | None:
        _refuse_whole_rows(out)
        if not self.agreed:
            self.agree(rows, out)
        if not len(self._own):
            return 0
        engine = select(self._backend, self._own)
        if self._plan is None or not self._plan.holds(rows.records):
            self._plan = Plan(rows.records, self.vocab)
        plan = self._plan
        x, wrong = self._processed(engine, self._own, rows, out.input)
        listed, ids, rows = self._exchange(engine, x, wrong, rows, plan.count(out))
        if _is_of_kept(out) and plan.is_enough(listed, ids, self.wire.size, out.input):
            missing = max(0, out.num_top - listed.shape[1])  # as many are wanted
            listed, ids = pad(listed, (0, missing), value=-torch.inf), pad(ids, (0, missing), value=-1)
            own_rows = Rows(without_edits(rows.records), rows.seeds, rows.offsets)
            own = compact(out, ids)
            invalid = engine.run(as_given(listed, out.input), own_rows, own)
            translate(own, ids, out)
            return invalid
        found = self._decide(self._row(engine, x, listed, ids, plan, out.input), plan)
        invalid = write_listed(engine, found, listed, ids, rows, out)
        if len(index := found.spread().nonzero()[:, 0]):
            write_spread(found, index, rows, out, self.start)
        if out.mode == "raw":
            write_raw(self.wire, self._own, self.start, out)
        return invalid

    def agree(self, rows: Rows, out: Outputs, drafts: Sequence[int] = [0] * len(DRAFTS)) -> None:
        """Compare what ranks must have in common, as the first call does; `drafts` as for `require_agreement`."""
        require_agreement(self.wire, self.start, self.vocab, self._own, rows, out, self._same_seeds, drafts)
        self.agreed = True

    def decide(self, rows: Rows, own: Tensor | None = None, kind: InputKind = "logits") -> tuple[Found, Rows]:
        """What filters leave of this rank's part of rows [B, V_r], None for the next call's; and the rows with the
        seeds that all ranks use."""
        own = self._own if own is None else own
        engine, plan = select(self._backend, own), Plan(rows.records, self.vocab)
        x, wrong = self._processed(engine, own, rows, kind)
        count = plan.most if plan.cut_short else max(plan.most, LISTED)
        listed, ids, rows = self._exchange(engine, x, wrong, rows, count)
        return self._decide(self._row(engine, x, listed, ids, plan, kind), plan), rows

    def _processed(self, engine: Engine, own: Tensor, rows: Rows, kind: InputKind) -> tuple[Tensor, Tensor | None]:
        """Stages 1 to 3, as a shard takes them."""
        if kind == "probs":
            return process_probs(own, rows, self._mask, self.start), None
        if not own.shape[1] or not (is_edited(rows) or self._mask is not None):
            return own, None
        return process(engine, own, rows, self._mask, self.start, self.vocab)

    def _exchange(
        self, engine: Engine, x: Tensor, wrong: Tensor | None, rows: Rows, count: int
    ) -> tuple[Tensor, Tensor, Rows]:
        """What all ranks list of each row, in id order: logits float32 [B, N] and ids int64 [B, N], -1 past their ends.

        A row that is invalid has a NaN, or an infinity, in front.
        """
        batch = len(x)
        if x.shape[1]:
            listed, ids, status = list_first(engine, x, rows, count)
            status = status if wrong is None else torch.where(wrong > 0, wrong, status)
            bad = torch.where(status == NAN, torch.nan, torch.inf)
            listed[:, 0] = torch.where((status == NAN) | (status == POSITIVE_INFINITY), bad, listed[:, 0])
        else:
            listed = torch.full((batch, count), -torch.inf, device=x.device)
            ids = torch.full((batch, count), -1, dtype=torch.int64, device=x.device)
        words = (listed.view(torch.int32).to(torch.int64) << 32) | torch.where(ids >= 0, ids + self.start, IDS)
        if not self._same_seeds:
            words = torch.cat([words, rows.seeds[:, None]], 1)
        found = self.wire.gather(words)
        if not self._same_seeds:
            rows = replace(rows, seeds=found[0, :, -1].clone())
            found = found[:, :, :-1]
        found = found.transpose(0, 1).reshape(batch, -1).contiguous()
        ids = found & IDS
        return (found >> 32).to(torch.int32).view(torch.float32), torch.where(ids < IDS, ids, -1), rows

    def _row(self, engine: Engine, x: Tensor, listed: Tensor, ids: Tensor, plan: Plan, kind: InputKind) -> SplitRow:
        """The rows as filters ask about them."""
        valid = (status_of(listed) == 0)[:, None]
        peak = torch.where(valid, listed.amax(-1, keepdim=True), 0)
        native = engine.name == "cpu" and x.shape[1] and kind == "logits"
        temperatures = plan.judged_at.expand_as(valid), plan.drawn_at.expand_as(valid)
        shard = (NativeShard if native else Shard)(x, self.start, peak, *temperatures, kind)
        return SplitRow(self.wire, shard, listed, ids, self.vocab, (plan.products, "top_n_sigma" in plan.used))

    def _decide(self, row: SplitRow, plan: Plan) -> Found:
        """Stage 7."""
        greedy = plan.greedy.expand_as(row.edge)
        on = row.valid & ~greedy
        kept = filters(everything(len(on), on.device), row, plan.params, on, plan.used)
        top = torch.full_like(kept.low, HIGHEST)
        if "xtc" in plan.used:
            top = xtc(kept, row, plan.params, on & plan.used["xtc"])
        kept = kept._replace(low=torch.where(greedy, row.keys[:, :1], kept.low))
        return Found(row, kept, top, row.status, greedy, plan.params["xtc_probability"])
