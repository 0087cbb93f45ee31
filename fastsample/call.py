"""A call as it is made eagerly: logits and options checked, parameters and inputs packed, an engine run.

The public functions (api.py), the operators for torch.compile (ops.py) and Sampler all end here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch

from fastsample import repeats
from fastsample.arrays import ArrayLike, as_tensor
from fastsample.backends import Engine, KeptSets, Outputs, select
from fastsample.checks import CPU, check_logits, has_memory
from fastsample.inputs import NO_INPUTS, Inputs, Rows, Seed, pack_offsets, pack_seeds
from fastsample.inputs.batch import flat, flat_fields
from fastsample.inputs.drafts import History
from fastsample.inputs.penalties import warn_without_ids
from fastsample.inputs.probs import require_for_probs, require_no_bias
from fastsample.inputs.records import pack
from fastsample.kept import fill_lists, list_ids, scratch_for, worth_keeping
from fastsample.outputs import (
    FIELD,
    LISTED,
    Options,
    SampleOutput,
    Written,
    allocate,
    check_buffer,
    empty,
    fresh_like,
    raise_if_invalid,
    span,
    unrolled,
    wanted,
)
from fastsample.params import SamplingParams

OF_ALL = frozenset(field.name for field in LISTED)
"""Outputs that all rows share."""

Kind = Literal["tokens", "filtered", "probabilities"]

OTHERS = ("seed", "offset", *Options._fields, *Inputs._fields, "out")
"""Arguments of the public calls that a misspelt name may have meant, besides a parameter."""


def make(
    kind: Kind,
    logits: ArrayLike,
    params: SamplingParams | None,
    fields: dict[str, Any],
    seed: Seed | None,
    offset: Seed,
    inputs: Inputs,
    options: Options,
    out: Any,
    stacklevel: int | None = 3,
    history: History | None = None,
    use: Callable[[Any, torch.Tensor, Rows], Any] | None = None,
) -> Any:
    """Make a call of `fastsample.sample` (of tokens), `filter_logits` or `probabilities`, with its checks and errors.

    `stacklevel` of a warning about penalties without ids, as for `warnings.warn`; None for no warning. `history`: of
    drafts, whose rows share what their request has: the ids that penalties count, the seed, and the offset of its first
    row. `use(call, table, rows)`: what to do instead of a run of the call.
    """
    name = repeats.key(kind if history is None else "drafts", params, fields, options)
    known = repeats.take(name)
    call = new(kind, options) if known is None else known.call
    table = call.table(logits)
    if len(call.batch) > 1:
        fields = flat_fields(call.batch, fields) if known is None else fields
        inputs = inputs if inputs is NO_INPUTS else inputs.flat(call.batch)
        seed, offset = flat("seed", seed, call.batch), flat("offset", offset, call.batch)
    count = table.shape[0]
    packed = pack(params, fields, count, OTHERS) if known is None else known.packed
    if options.input == "probs":
        require_no_bias(inputs)
        if known is None:
            require_for_probs(packed.records)
    if history is not None:
        count = history.drafts.ids.shape[0]
    rows = known.rows(seed, offset, count) if known is not None and call.small else None
    if rows is None:
        rows = Rows(packed.records, pack_seeds(seed, count), pack_offsets(offset, count)).to(table.device)
    if inputs is not NO_INPUTS:
        rows = rows if known is None else rows.with_inputs()
        inputs.attach(rows, table)
    if packed.penalties and stacklevel is not None:
        given = inputs if history is None else history
        warn_without_ids(packed.penalties, given.prompt_ids, given.output_ids, stacklevel)
    if packed.penalties and history is not None:
        rows = rows if inputs is not NO_INPUTS else rows.with_inputs()
        history.attach(rows)
    result = call.run(table, rows, out) if use is None else use(call, table, rows)
    if name is not None and call.small:
        call.let_go()
        repeats.put_back(name, repeats.Repeat(call, packed) if known is None else known)
    return result


def new(kind: Kind, options: Options) -> SampleCall | FullCall:
    return SampleCall(options) if kind == "tokens" else FullCall(options, kind)


class Call:
    """The options of a call and what is known of the logits that it saw last.

    The next step with logits of the same shape then costs little Python. A Sampler keeps its call; `slots` is its
    number of slots.
    """

    def __init__(self, options: Options, slots: int | None = None) -> None:
        self.options = options.checked()
        self.raises = self.options.on_invalid == "raise"
        self.slots = slots
        self.batch: tuple[int, ...] = ()  # [B], [] for 1-D logits, [B, T] for 3-D ones
        self.device: torch.device | None = None  # of the logits seen last
        self._engine: Engine
        self.lasts = slots is not None  # whether it serves many steps
        self._shape = (0, 0)  # of the table seen last
        self.small = False  # whether Python's share of a call is worth saving
        self._copied: torch.Tensor | None = None  # the logits, where the table is no view of them
        self._checked: tuple[Any, ...] | None = None

    def table(self, logits: Any) -> torch.Tensor:
        """The logits as [B, V], checked; all checks are of shape, strides, dtype and device, so once is enough."""
        if not isinstance(logits, torch.Tensor):
            logits = as_tensor("logits", logits)
        if self._checked is not None and isinstance(logits, torch.Tensor) and logits.layout is torch.strided:
            known = not logits.is_nested and not logits.is_neg() and has_memory(logits)
            if known and self._checked == (logits.shape, logits.stride(), logits.dtype, logits.device):
                if len(self.batch) == 1:
                    return logits
                return logits.flatten(0, -2) if self.batch else logits.unsqueeze(0)
        table = check_logits(logits)
        if self.slots is not None and logits.ndim > 2:
            raise ValueError(f"logits: expected [{self.slots}, V], a row per slot, got shape {tuple(logits.shape)}")
        if self.slots is not None and table.shape[0] != self.slots:
            raise ValueError(f"logits: expected {self.slots} rows (batch_size), got {table.shape[0]}")
        if self.options.top_logprobs > table.shape[1]:
            raise ValueError(f"top_logprobs = {self.options.top_logprobs}: expected at most V = {table.shape[1]}")
        self._engine = select(self.options.backend, table)
        self.batch = tuple(logits.shape[:-1])
        self._copied = None if table.data_ptr() == logits.data_ptr() else logits
        self._forget_buffers()
        self.device, self._shape = logits.device, (table.shape[0], table.shape[1])
        size = table.shape[0] * max(self.options.num_samples, self.options.top_logprobs)
        # A GPU needs copies of the parameters for every call anyway.
        self.small = size <= repeats.SMALL and self.device == CPU and self._copied is None
        self._checked = (logits.shape, logits.stride(), logits.dtype, self.device)
        return table

    def let_go(self) -> None:
        """Drop all of the caller's tensors, since the next step may be far off."""
        self.lasts = True

    def _forget_buffers(self) -> None:
        """Forget buffers, which fit logits of one shape only."""

    def _require_apart(self, written: Written, table: torch.Tensor, rows: Rows) -> None:
        written.require_apart_from(table, rows)
        if self._copied is not None:
            written.require_apart_from(self._copied, rows)


class FullCall(Call):
    """A call that gives one number per logit."""

    def __init__(self, options: Options, kind: Kind) -> None:
        super().__init__(options)
        self._field = FIELD[kind]
        self._own: Outputs | None = None  # its status is for internal use

    def run(self, table: torch.Tensor, rows: Rows, out: torch.Tensor | None) -> torch.Tensor:
        """Fill a fresh tensor, or `out`, from what `table` returned last."""
        device, shape = table.device, (*self.batch, table.shape[1])
        if self._own is None:
            with torch.inference_mode(False):
                status = empty((table.shape[0],), torch.int32, device)
                self._own = Outputs(status, input=self.options.input)
        outputs, status = self._own, self._own.status
        if out is None:
            result = empty(shape, self._field.dtype, device)
        else:
            check_buffer("out", out, self._field, shape, device)
            self._require_apart(Written({"out": out}), table, rows)
            if self.raises:  # a first run only checks, so that nothing is written on an error
                self._engine.run(table, rows, Outputs(status, input=self.options.input))
                raise_if_invalid(status, self.batch, self.options.input)
            result = out
        setattr(outputs, self._field.name, result if len(self.batch) < 2 else result.view(table.shape))
        invalid = self._engine.run(table, rows, outputs)
        if self.raises and invalid != 0:
            raise_if_invalid(status, self.batch, self.options.input)
        return result

    def let_go(self) -> None:
        super().let_go()
        setattr(self._own, self._field.name, None)

    def _forget_buffers(self) -> None:
        self._own = None


class SampleCall(Call):
    """A call that draws tokens."""

    def __init__(self, options: Options, slots: int | None = None) -> None:
        super().__init__(options, slots)
        self._wanted = wanted(self.options)  # names of the buffers to fill
        self._same = unrolled("a.{0} is b.{0}", self._wanted, " and ")
        self._like = fresh_like(self._wanted)
        self._more = [name for name in self._wanted if name not in ("tokens", "status")]
        self._filled = [name for name in self._more if name not in OF_ALL]  # by an engine's run
        self._names = tuple(self._filled)
        self._template: SampleOutput | None = None
        self._own: Outputs | None = None  # for fresh buffers; a Sampler's calls take turns
        self._last: tuple[SampleOutput, SampleOutput, Outputs] | None = None  # a caller's, a copy, the engine's view
        self._written: Written  # the memory of the last call's buffers
        self._bytes = 0  # bytes from the first logit to the last
        self._made_for_inference = False
        self._lists = self.options.kept == "ids"
        self._sets: KeptSets | None = None  # what is listed; scratch where lists have no limit
        self._exact = self._lists and not self.options.kept_capacity

    def run(self, table: torch.Tensor, rows: Rows, out: SampleOutput | None, advance: bool = False) -> SampleOutput:
        """Sample what `table` returned last, into `out` if given; then advance every row's offset by 1 if asked to."""
        outputs = None if out is None else self._checked_outputs(out, table, rows)
        # If an invalid row is an error, a caller's buffers keep their contents.
        if out is None or outputs is None or (self.raises and not outputs.restore):
            result = self._fresh(table.device)
            outputs = self._own = self._outputs(result, self._own)
        else:
            result = out
        in_passing = outputs.advance = advance and self._engine.advances
        invalid = self._engine.run(table, rows, outputs)
        if self.raises and invalid != 0:
            if outputs.restore:
                result = self._fresh(table.device)
                self._engine.run(table, rows, self._outputs(result))
            try:
                raise_if_invalid(result.status, self.batch, self.options.input)
            except ValueError:
                if in_passing:
                    rows.offsets -= 1
                raise
        if self._lists:
            self._list_kept(outputs, result)
        if advance and not in_passing:
            self._engine.advance(rows)
        if out is None or out is result:
            return result
        if self._exact:
            out.kept_ids, out.kept_row_ptr = result.kept_ids, result.kept_row_ptr
        with torch.inference_mode() if self._made_for_inference else nullcontext():
            for name in self._wanted:
                getattr(out, name).copy_(getattr(result, name))
        return out

    def verified(
        self, table: torch.Tensor, rows: Rows, ids: torch.Tensor
    ) -> tuple[SampleOutput, torch.Tensor, torch.Tensor, int | None]:
        """What an engine that verifies makes of drafts: outputs of each row, num_accepted, status, invalid results."""
        result = self._fresh(table.device)
        outputs = self._own = self._outputs(result, self._own)
        accepted, ends = (empty((ids.shape[0],), torch.int32, table.device) for _ in range(2))
        return result, accepted, ends, self.engine.verify(table, rows, outputs, ids, accepted, ends)

    def of_tokens(self, table: torch.Tensor, rows: Rows, given: torch.Tensor) -> SampleOutput:
        """What `run` gives, with tokens int64 [B] that are given; where one is no token, it is drawn."""
        result = self._fresh(table.device)
        outputs = self._outputs(result)
        outputs.names = None
        outputs.given, outputs.weights = given, empty((len(given), 2), torch.int64, table.device)
        self.engine.run(table, rows, outputs)
        return result

    def fresh(self, device: torch.device) -> Outputs:
        """New buffers for all that is asked, as an engine sees them."""
        return self._outputs(self._fresh(device))

    @property
    def reports(self) -> bool:
        """Whether more is wanted than tokens."""
        return bool(self._more)

    @property
    def engine(self) -> Engine:
        """What serves the logits seen last."""
        return self._engine

    def let_go(self) -> None:
        super().let_go()
        self._last = None
        if self._sets is not None and not worth_keeping(self._sets):
            self._sets = None
            if self._own is not None:
                self._own.kept_bitmask = self._own.kept_slots = None
        if self._own is not None and (ours := self._template) is not None:
            self._own.tokens, self._own.status = ours.tokens, ours.status
            for name in self._filled:
                setattr(self._own, name, getattr(ours, name))
        else:
            self._own = None

    def _forget_buffers(self) -> None:
        self._template = self._last = self._sets = self._own = None

    def _list_kept(self, outputs: Outputs, result: SampleOutput) -> None:
        assert outputs.kept_count is not None
        if self._exact:
            assert self._sets is not None
            result.kept_ids, result.kept_row_ptr = list_ids(self._engine, outputs.kept_count, self._sets)
        else:
            assert outputs.kept_bitmask is not None
            assert result.kept_ids is not None
            assert result.kept_row_ptr is not None
            words, capacity = outputs.kept_bitmask.shape[-1], self.options.kept_capacity
            sets = KeptSets(outputs.kept_bitmask.view(self._shape[0], words))
            fill_lists(self._engine, outputs.kept_count, sets, capacity, result.kept_ids, result.kept_row_ptr)

    def _fresh(self, device: torch.device) -> SampleOutput:
        """New buffers for each call. Making them like a template takes half the time."""
        if self._template is None:
            if self.lasts:
                self._template = allocate(self.batch, self.options, self._shape[1], device)
            return allocate(self.batch, self.options, self._shape[1], device)
        return SampleOutput(*self._like(self._template))

    def _outputs(self, result: SampleOutput, outputs: Outputs | None = None, restore: bool = False) -> Outputs:
        """The engine's view of buffers: `outputs`, if given, is an earlier one."""
        if outputs is None:
            options = self.options
            outputs = Outputs(result.status, num_samples=options.num_samples, mode=options.logprobs, restore=restore)
            outputs.num_top, outputs.input = options.top_logprobs, options.input
            outputs.names = self._names
        if self._exact and outputs.kept_bitmask is None:
            self._lend(outputs, result.status.device)
        if len(self.batch) > 1:  # an engine fills [B * T, ...]
            for name in self._wanted:
                value = getattr(result, name)
                if name not in OF_ALL:
                    setattr(outputs, name, value.flatten(0, len(self.batch) - 1))
            return outputs
        outputs.status, outputs.tokens = result.status, result.tokens
        for name in self._filled:
            setattr(outputs, name, getattr(result, name))
        return outputs

    def _lend(self, outputs: Outputs, device: torch.device) -> None:
        """Give the engine memory for the sets that are listed."""
        if self._sets is None:
            self._sets = scratch_for(self._engine, *self._shape, device)
        outputs.kept_bitmask, outputs.kept_slots = self._sets.bitmask, self._sets.slots
        lent = ("kept_bitmask",) if self._sets.slots is None else ("kept_bitmask", "kept_slots")
        outputs.names = self._names + lent

    def _checked_outputs(self, out: SampleOutput, table: torch.Tensor, rows: Rows) -> Outputs:
        """The engine's view of a caller's buffers, which are checked unless they are the last call's."""
        if self._last is not None and self._last[0] is out and self._same(out, self._last[1]):
            self._written.require_apart_from(table, rows, self._bytes)
            return self._last[2]
        if not isinstance(out, SampleOutput):
            raise TypeError(f"out: expected a SampleOutput, got {type(out).__name__}")
        buffers = {f"out.{name}": getattr(out, name) for name in self._wanted}
        for name, buffer in zip(self._wanted, buffers.values(), strict=True):
            field = FIELD[name]
            shape = field.shape(self.batch, self.options, table.shape[1])
            check_buffer(f"out.{name}", buffer, field, shape, table.device)
        self._written = Written(buffers)
        self._made_for_inference = any(buffer.is_inference() for buffer in buffers.values())
        start, end = span(table)
        self._bytes = end - start
        self._require_apart(self._written, table, rows)
        outputs = self._outputs(
            out, restore=self.raises and self._engine.restores and self.options.kept in (None, "count")
        )
        self._last = (out, replace(out), outputs)
        return outputs
