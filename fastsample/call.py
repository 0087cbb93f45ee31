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
from fastsample.backends import Engine, Outputs, select
from fastsample.buffers import OF_ALL, Fresh, Written, check_buffer, empty, filled_by_run, span, view
from fastsample.checks import CPU, check_logits, has_memory
from fastsample.inputs import NO_INPUTS, Inputs, Rows, Seed, pack_offsets, pack_seeds
from fastsample.inputs.batch import flat, flat_fields
from fastsample.inputs.drafts import History
from fastsample.inputs.penalties import warn_without_ids
from fastsample.inputs.probs import require_for_probs, require_no_bias
from fastsample.inputs.records import pack
from fastsample.kept import fill_lists, list_ids
from fastsample.outputs import (
    FIELD,
    REPORTED,
    Options,
    SampleOutput,
    raise_if_invalid,
    unrolled,
    wanted,
)
from fastsample.params import SamplingParams
from fastsample.reports import Layout

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
        self.device, self._shape = logits.device, (table.shape[0], table.shape[1])
        self._forget_buffers()
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
        self._filled = filled_by_run(self._wanted)
        self._same = unrolled("a.{0} is b.{0}", self._wanted, " and ")
        self._exact = self.options.kept == "ids" and not self.options.kept_capacity
        self._fresh: Fresh  # all of them
        self._made: Fresh  # those that are not left to be read
        self._layout: Layout | None = None  # of the others
        self._lists: Layout | None = None  # where a caller's buffers are filled, and an engine lists all ids itself
        self._last: tuple[SampleOutput, SampleOutput, Outputs] | None = None  # a caller's, a copy, the engine's view
        self._written: Written  # the memory of the last call's buffers
        self._bytes = 0  # bytes from the first logit to the last
        self._made_for_inference = False

    def run(self, table: torch.Tensor, rows: Rows, out: SampleOutput | None, advance: bool = False) -> SampleOutput:
        """Sample what `table` returned last, into `out` if given; then advance every row's offset by 1 if asked to."""
        outputs = None if out is None else self._checked_outputs(out, table, rows)
        # If an invalid row is an error, a caller's buffers keep their contents.
        if out is None or outputs is None or (self.raises and not outputs.restore):
            result, layout = self._made.make(self.lasts), self._layout
            outputs = self._made.view(result)
        else:
            result, layout = out, self._lists
        in_passing = outputs.advance = advance and self._engine.advances
        invalid: int | None
        if layout is not None:
            invalid, memory = self._engine.report(table, rows, outputs, layout)
        else:
            if self._exact:
                words = FIELD["kept_bitmask"].shape((len(table),), self.options, self._shape[1])
                outputs.kept_bitmask, outputs.names = empty(words, torch.int32, table.device), None
            invalid = self._engine.run(table, rows, outputs)
        if self.raises and invalid != 0:
            status = result.status if result is not out else self._statuses(table, rows)
            try:
                raise_if_invalid(status, self.batch, self.options.input)
            except ValueError:
                if in_passing:
                    rows.offsets -= 1
                raise
        if layout is not None:
            result.leave(layout, memory, () if out is None else OF_ALL)
        elif self.options.kept == "ids":
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

    def _list_kept(self, outputs: Outputs, result: SampleOutput) -> None:
        assert outputs.kept_count is not None
        assert outputs.kept_bitmask is not None
        count, bitmask = outputs.kept_count, outputs.kept_bitmask.view(self._shape[0], outputs.kept_bitmask.shape[-1])
        if self._exact:
            result.kept_ids, result.kept_row_ptr = list_ids(self._engine, count, bitmask)
        else:
            assert result.kept_ids is not None
            assert result.kept_row_ptr is not None
            capacity = self.options.kept_capacity
            fill_lists(self._engine, count, bitmask, capacity, result.kept_ids, result.kept_row_ptr)

    def _statuses(self, table: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The status of each row, of a run whose buffers hold again what they held before."""
        made = self._fresh.make(False)
        self._engine.run(table, rows, self._fresh.view(made))
        return made.status

    def verified(
        self, table: torch.Tensor, rows: Rows, ids: torch.Tensor
    ) -> tuple[SampleOutput, torch.Tensor, torch.Tensor, int | None]:
        """What an engine that verifies makes of drafts: outputs of each row, num_accepted, status, invalid results."""
        result = self._fresh.make(self.lasts)
        accepted, ends = (empty((ids.shape[0],), torch.int32, table.device) for _ in range(2))
        return result, accepted, ends, self.engine.verify(table, rows, self._fresh.view(result), ids, accepted, ends)

    def of_tokens(self, table: torch.Tensor, rows: Rows, given: torch.Tensor) -> SampleOutput:
        """What `run` gives, with tokens int64 [B] that are given; where one is no token, it is drawn."""
        result = self._fresh.make(False)
        outputs = view(result, self._filled, self.options, len(self.batch))
        outputs.names = None
        outputs.given, outputs.weights = given, empty((len(given), 2), torch.int64, table.device)
        self.engine.run(table, rows, outputs)
        return result

    def fresh(self) -> Outputs:
        """New buffers for all that is asked, as an engine sees them."""
        return view(self._fresh.make(False), self._filled, self.options, len(self.batch))

    @property
    def wants_more(self) -> bool:
        """Whether more is wanted than tokens."""
        return len(self._wanted) > 2 or self._exact

    @property
    def engine(self) -> Engine:
        """What serves the logits seen last."""
        return self._engine

    def let_go(self) -> None:
        super().let_go()
        self._last = None
        self._fresh.let_go()
        self._made.let_go()

    def _forget_buffers(self) -> None:
        assert self.device is not None
        self._last = self._layout = self._lists = None
        given = self.options, self.batch, self._shape[1]
        self._fresh = self._made = Fresh(self._wanted, *given, self.device)
        later = tuple(name for name in REPORTED if name in self._wanted)
        # Lists of a limited number are made of counts and bitmasks.
        if self._engine.reports and (later or self._exact) and not self.options.kept_capacity:
            self._made = Fresh(tuple(name for name in self._wanted if name not in later), *given, self.device)
            self._layout = Layout(later, self._exact, *given)
            self._lists = Layout((), True, *given) if self._exact else None

    def _checked_outputs(self, out: SampleOutput, table: torch.Tensor, rows: Rows) -> Outputs:
        """The engine's view of a caller's buffers, which are checked unless they are the last call's."""
        if self._last is not None and self._last[0] is out and self._same(out, self._last[1]):
            self._written.require_apart_from(table, rows, self._bytes)
            return self._last[2]
        if not isinstance(out, SampleOutput):
            raise TypeError(f"out: expected a SampleOutput, got {type(out).__name__}")
        copy = replace(out)  # which reads all that was left to be read
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
        outputs = view(out, self._filled, self.options, len(self.batch))
        outputs.restore = self.raises and self._engine.restores
        self._last = (out, copy, outputs)
        return outputs
