"""The ranks of a group as an engine: it is asked about whole rows, of which each rank has a part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from fastsample.backends import Engine, Outputs, engine, select
from fastsample.checks import CPU
from fastsample.distributed.agreement import DRAFTS, require_agreement
from fastsample.distributed.answers import Answers, EngineShard
from fastsample.distributed.filters import filters, xtc
from fastsample.distributed.host import give_back, outputs_on_host, rows_on_host
from fastsample.distributed.keys import HIGHEST, everything, no_words, value_of
from fastsample.distributed.lists import Lists, list_first, mark_invalid, unpacked
from fastsample.distributed.local import is_edited, process, process_probs, without_edits
from fastsample.distributed.outputs import Found, as_given, compact, translate, write_listed
from fastsample.distributed.plan import Plan, is_of_kept, is_of_tokens
from fastsample.distributed.raw import RawPart, write_raw
from fastsample.distributed.row import SplitRow, status_of
from fastsample.distributed.rules import SplitRejection
from fastsample.distributed.shard import Shard, mass_of
from fastsample.distributed.split import OPEN, sample_split
from fastsample.distributed.spread import write_spread
from fastsample.distributed.wire import Wire
from fastsample.inputs import Rows
from fastsample.outputs import InputKind

Tensor = torch.Tensor

FEWER = 16
"""How many times as many tokens there are as are looked at to see whether a row is flat."""


@dataclass
class Part:
    """What a rank has of rows.

    Attributes:
        engine: does the rank's own work.
        own: [B, V_r], logits or probabilities as they were given.
        x: the same after stages 1 to 3, probabilities with -inf for 0.
        start: the id of its first token.
        wrong: int32 [B], the statuses that these have found; None where these are known to be 0.
        edited: whether these stages may change anything here.

    All but `own` and `x` is where rows are decided.
    """

    engine: Engine
    own: Tensor
    x: Tensor
    start: int
    wrong: Tensor | None
    plan: Plan
    kind: InputKind
    edited: bool

    @property
    def answers(self) -> Answers:
        return Answers(self.engine, self.x, self.start)

    @property
    def given(self) -> Answers:
        """Of rows as they were given."""
        return Answers(self.engine, self.own, self.start)

    @property
    def decider(self) -> Engine:
        """What samples lists."""
        own, here = self.engine, self.plan.records.device
        return engine("cpu") if own.answers() and here == CPU else own

    def words(self, rows: Rows, count: int, with_mass: bool, judges: bool) -> Tensor:
        """What this rank lists of each row, int64 [B, count]; one more column with its mass, if that is wanted, and one
        with whether its part is valid and flat."""
        size, width = self.x.shape
        if not width:
            here = self.plan.records.device
            return pad(no_words(size, count, here), (0, with_mass + judges), value=int(judges))
        if self.engine.answers():
            shares = self.plan.shares(size) if judges else None
            words = self.answers.first_words(count, self.plan.queries(size), with_mass, shares)
        else:
            words = list_first(self.engine, self.x, rows, self.start, count)
            words = torch.cat([words, self._is_flat(words)], 1) if judges else words
        if judges and self.wrong is not None:
            words[:, -1] *= self.wrong == 0
        return mark_invalid(words, self.wrong)

    def _is_flat(self, words: Tensor) -> Tensor:
        """Whether a part is valid, and the listed tokens probably less than a share of its mass, int64 [B, 1]."""
        first, some = unpacked(words)[0], self.x[:, ::FEWER].float()
        peak, judged_at = first.amax(-1, keepdim=True), self.plan.judged_at.expand(len(words), 1)
        valid = peak.isfinite()
        peak = torch.where(valid, peak, 0)
        listed, sampled = (mass_of(self.kind, x.clamp(max=peak), peak, judged_at).sum(-1, True) for x in (first, some))
        return (valid & (listed.double() < sampled.double() * FEWER * self.plan.share)).to(torch.int64)


def _refuse_whole_rows(out: Outputs) -> None:
    """What has a number for each token of a row is not made of its parts. (What laws weigh is told by rules.py.)"""
    law = None if out.given is not None else out.weights
    for name, wanted in (("filter_logits", out.filtered), ("probabilities", out.probabilities), ("law", law)):
        if wanted is not None:
            raise ValueError(f"{name}: expected whole rows; these are split over ranks, of which each has a part")


def _near(x: Tensor, device: torch.device) -> Tensor:
    """A part of rows, which need not stay where it is if it has no tokens."""
    return x if x.shape[1] else x.to(device)


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
        self.agreed = self._all_native = False
        self._plan: Plan | None = None  # of the last call
        self._serves: tuple[torch.device, Engine] | None = None  # likewise, and what did this rank's own work there
        self._own = torch.empty(0, 0)  # [B, V_r], of the next call
        self._mask: Tensor | None = None  # int32 [B or 1, ceil(V_r / 32)], likewise
        self.drafts = torch.empty(0, 0)  # [M, V_r], likewise: what its drafts were drawn from
        self._same_seeds = True
        self._masks = False  # whether any rank had one of its own when raw log-probabilities were last asked for

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

    def _engine(self, own: Tensor) -> Engine:
        """What does this rank's own work: what ranks have agreed on is looked up once."""
        if self._serves is None or self._serves[0] != own.device:
            self._serves = own.device, select(self._backend, own)
        return self._serves[1]

    def why_not(self, logits: Tensor | None) -> str | None:
        return None

    @torch.inference_mode()  # in which buffers of any kind may be written to
    def run(self, logits: Tensor, rows: Rows, out: Outputs) -> int | None:
        _refuse_whole_rows(out)
        if not self.agreed:
            self.agree(rows, out)
        if not self._own.shape[0]:
            return 0
        decides_on_host = self._all_native and out.input == "logits" and self._own.device != CPU
        if not decides_on_host:
            return self._run(rows, rows, out)
        own = outputs_on_host(out)
        invalid = self._run(rows, rows_on_host(rows), own)
        give_back(own, out)
        return invalid

    def _run(self, rows: Rows, decided: Rows, out: Outputs) -> int | None:
        """The outputs of rows, of which `decided` has what it takes to decide them, where that is done."""
        if self._plan is None or not self._plan.holds(decided.records):
            self._plan = Plan(decided.records, self.vocab)
        part = self._part(rows, self._own, self._plan, out.input)
        lists, invalid = self._sample(part, decided, out)
        if out.mode == "raw" and not lists.tells_raw:
            native = out.input == "logits" and part.own.shape[1] and part.engine.answers()
            given = (part.given, self._plan.raw_queries(len(part.own))) if native else (None, None)
            write_raw(self.wire, RawPart(part.own, self.start, out.input, *given), out, lists.known(out.num_top))
        return invalid

    def agree(self, rows: Rows, out: Outputs, drafts: Sequence[int] = [0] * len(DRAFTS)) -> None:
        """Compare what ranks must have in common, as the first call does; `drafts` as for `require_agreement`."""
        native = self._engine(self._own).answers()
        given = self.wire, self.start, self.vocab, self._own, rows, out, self._same_seeds, native, drafts
        self._all_native = require_agreement(*given)
        self.agreed = True

    def decide(self, rows: Rows, own: Tensor | None = None, kind: InputKind = "logits") -> tuple[Found, Rows]:
        """What filters leave of this rank's part of rows [B, V_r], None for the next call's; and the rows with the
        seeds that all ranks use."""
        plan = Plan(rows.records, self.vocab)
        part = self._part(rows, self._own if own is None else own, plan, kind)
        lists, rows = self._exchange(part, rows, plan.count(None), False, plan.shows_flat(None) and kind == "logits")
        return self._decide(self._row(part, lists), plan), rows

    def _part(self, rows: Rows, own: Tensor, plan: Plan, kind: InputKind) -> Part:
        """Stages 1 to 3."""
        engine, x, wrong = self._engine(own), own, None
        edited = is_edited(rows) or self._mask is not None
        if kind == "probs":
            x = process_probs(own, rows, self._mask, self.start)
        elif own.shape[1] and edited:
            x, wrong = process(engine, own, rows, plan.edits, self._mask, self.start, self.vocab)
        here = plan.records.device
        own, x = _near(own, here), _near(x, here)
        return Part(engine, own, x, self.start, None if wrong is None else wrong.to(here), plan, kind, edited)

    def _sample(self, part: Part, rows: Rows, out: Outputs) -> tuple[Lists, int | None]:
        """All but raw log-probabilities, unless these come with it: then the lists say so."""
        plan = part.plan
        native = self._all_native and part.kind == "logits" and out.given is None
        draws_from_all = native and plan.open and is_of_tokens(out)
        judges = plan.shows_flat(out) and part.kind == "logits"
        # Ranks may have masks of their own. Where none has, raw log-probabilities are of what is listed, if that is
        # enough. Otherwise rows as they were given are listed, too: ranks expect masks where the last call had some.
        raw = native and out.mode == "raw"
        masks = raw and not is_edited(rows)
        more = self._masks or not masks or draws_from_all
        apart = plan.raw_count(out) if raw and more else 0
        count = 1 if draws_from_all else plan.count(out, apart > 0)
        lists, rows = self._exchange(part, rows, count, draws_from_all, judges, masks, apart)
        if masks:
            self._masks = not lists.as_given
        invalid: int | None = OPEN
        if draws_from_all or (native and (plan.asks(out) or not (plan.open or lists.flat))):
            invalid = sample_split(self.wire, part.answers, self.vocab, plan, lists, rows, out)
        elif plan.cut_short and is_of_kept(out):
            invalid = self._finish(part, lists, rows, out)
        if invalid == OPEN:
            invalid = self._ask(part, lists, rows, out)
        return lists, invalid

    def _exchange(
        self,
        part: Part,
        rows: Rows,
        count: int,
        with_mass: bool,
        judges: bool,
        ask_edited: bool = False,
        apart: int = 0,
    ) -> tuple[Lists, Rows]:
        """What all ranks list of each row, and the rows with the seeds that all take; the rest as `Lists` has it."""
        words = part.words(rows, count, with_mass, judges)
        more = [torch.full_like(words[:, :1], part.edited)] if ask_edited else []
        if apart:
            listed = words[:, :count].contiguous()
            more.append(part.given.first_and_listed(listed, apart, part.plan.raw_queries(words.shape[0])))
        if not self._same_seeds:
            more.append(rows.seeds[:, None].expand(len(words), 1))
        found = self.wire.gather(torch.cat([words, *more], 1) if more else words)
        if not self._same_seeds:
            rows = replace(rows, seeds=found[0, :, -1].clone(), native=None, slots=None)
        lists = Lists(found, count, with_mass, judges, ask_edited, apart, part.given)
        return lists, rows

    def _finish(self, part: Part, lists: Lists, rows: Rows, out: Outputs) -> int | None:
        """The outputs of rows that lists decide, by any engine, where top-k leaves nothing but listed tokens."""
        x, ids = lists.unpacked
        missing = max(0, out.num_top - x.shape[1])  # as many are wanted
        x, ids = pad(x, (0, missing), value=-torch.inf), pad(ids, (0, missing), value=-1)
        own, own_rows = compact(out, ids), Rows(without_edits(rows.records), rows.seeds, rows.offsets)
        invalid = part.decider.run(as_given(x, part.kind), own_rows, own)
        translate(own, ids, out)
        return invalid

    def _ask(self, part: Part, lists: Lists, rows: Rows, out: Outputs) -> int:
        """The outputs of rows which ranks must ask each other about."""
        found = self._decide(self._row(part, lists), part.plan)
        invalid = write_listed(part.decider, found, *lists.unpacked, rows, out)
        keys = None
        if len(index := found.spread().nonzero()[:, 0]):
            keys = write_spread(found, index, rows, out, self.start)
        if lists.as_given and out.tokens is not None:
            lists.own = lists.logits_of(out.tokens.view(len(part.x), -1))
            if keys is not None:
                lists.own[index] = value_of(keys)
        return invalid

    def _row(self, part: Part, lists: Lists) -> SplitRow:
        """The rows as filters ask about them."""
        listed, ids = lists.unpacked
        plan = part.plan
        status = torch.zeros(len(listed), dtype=torch.int32, device=listed.device)
        if not lists.flat:  # then all are valid
            status = status_of(listed)
        undecided = lists.open if plan.searches_once else None
        valid = (status == 0)[:, None]
        peak = torch.where(valid, listed.amax(-1, keepdim=True), 0)
        temperatures = plan.judged_at.expand_as(valid), plan.drawn_at.expand_as(valid)
        known = part.x, self.start, peak, *temperatures, part.kind
        native = part.engine.answers() and part.x.shape[1] and part.kind == "logits"
        shard = EngineShard(*known, engine=part.engine) if native else Shard(*known)
        row = SplitRow(self.wire, shard, listed, ids, status, self.vocab, plan.wanted, lists.sums, undecided)
        if lists.flat and plan.searches_once:
            row.look_ahead(lists.bins)
        return row

    def _decide(self, row: SplitRow, plan: Plan) -> Found:
        """Stage 7."""
        greedy = plan.greedy.expand_as(row.valid)
        on = row.valid & ~greedy
        kept = filters(everything(len(on), on.device), row, plan.params, on, plan.steps)
        top = torch.full_like(kept.low, HIGHEST)
        if "xtc" in plan.used:
            top = xtc(kept, row, plan.params, on & plan.used["xtc"])
        if bool(greedy.any()):
            kept = kept._replace(low=torch.where(greedy, row.keys[:, :1], kept.low))
        return Found(row, kept, top, row.status, greedy, plan.params["xtc_probability"])
