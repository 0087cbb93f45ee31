"""Sampler: a serving loop's slots, validated and packed once, one step per call."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import torch

from fastsample.arrays import ArrayLike, as_tensor
from fastsample.call import SampleCall
from fastsample.checks import CPU, whole
from fastsample.inputs import (
    NO_INPUTS,
    Allowed,
    BiasLike,
    BreakerIds,
    Inputs,
    Rows,
    Seed,
    TokenIds,
    gather,
    pack_offsets,
    pack_params,
    pack_seeds,
)
from fastsample.inputs.drafts import pack_drafts
from fastsample.inputs.penalties import penalised_rows, warn_without_ids
from fastsample.inputs.probs import require_for_probs, require_no_bias
from fastsample.inputs.step import Stamps, used_in_place
from fastsample.outputs import InputKind, KeptForm, LogprobsMode, OnInvalid, Options, SampleOutput
from fastsample.params import SamplingParams, specs
from fastsample.slots import Pick, SlotIndex, checked, described, listed, shortened, slot_numbers, unpack_params
from fastsample.traced import is_traced, untraced
from fastsample.verified import Given, RuleName, VerifyOutput, as_table, checked_result, split


class Sampler:
    """Samples step after step with the same slots; each call draws at the slots' offsets and advances them by 1.

    Threads may share one: their calls take turns, so the tokens are those of some serial order, and each call gets all
    threads of the CPU engine. A copy or a pickle continues from the same offsets. (Under torch.compile calls do not
    take turns. Threads with CUDA streams of their own must order the streams themselves.)

    Args:
        params: how each slot samples; `fields` override it. One value per slot or one for all.
        batch_size: number of slots B >= 1.
        seed: as for `fastsample.sample`; None takes one fresh seed from torch's default CPU generator.
        offset: position of the first step, an int or one per slot.
        num_samples, logprobs, top_logprobs, on_invalid, backend, input: as for `fastsample.sample`.
        kept, kept_capacity, kept_mass, entropy: as for `fastsample.sample`.

    Raises:
        TypeError, ValueError: bad argument; the message names it, the row and the value.
    """

    @untraced
    def __init__(
        self,
        params: SamplingParams | None = None,
        *,
        batch_size: int,
        seed: Seed | None = None,
        offset: Seed = 0,
        num_samples: int = 1,
        logprobs: LogprobsMode | None = None,
        top_logprobs: int = 0,
        on_invalid: OnInvalid = "raise",
        backend: str = "auto",
        input: InputKind = "logits",
        kept: KeptForm | None = None,
        kept_capacity: int = 0,
        kept_mass: bool = False,
        entropy: bool = False,
        **fields: Any,
    ) -> None:
        batch_size = whole("batch_size", batch_size)
        if not 1 <= batch_size < 2**31:
            raise ValueError(f"batch_size = {batch_size}: expected 1 <= batch_size < 2^31")
        self._batch_size = batch_size
        reported = (kept, kept_capacity, kept_mass, entropy)
        options = Options(num_samples, logprobs, top_logprobs, on_invalid, backend, input, *reported)
        self._call = SampleCall(options, batch_size)
        # What a Sampler changes later must not be an inference tensor, wherever it is made.
        with torch.inference_mode(False):
            records = pack_params(params, fields, batch_size, _OTHERS)
            if input == "probs":
                require_for_probs(records)
            self._rows = Rows(
                records.repeat(batch_size // records.shape[0], 1),
                pack_seeds(seed, batch_size).to(CPU, copy=True),
                pack_offsets(offset, batch_size).cpu().expand(batch_size).clone(),
                workspace={},
            )
            self._initial_records = self._rows.records.clone()
        self._forget()

    def _forget(self) -> None:
        """Nothing is known yet of any step."""
        self._penalised = penalised_rows(self._rows.records.cpu())
        self._device: torch.device | None = None  # of the logits seen last
        self._last_pick: tuple[Pick, SampleCall] | None = None
        self._last: tuple[Rows, Stamps] | None = None
        self._lock = _new_lock(self)

    @untraced
    def __getstate__(self) -> dict[str, Any]:
        # Numbers, not tensors: those would go to another process through shared memory and file descriptors.
        with self._lock:
            own = self._rows
            columns = [t.tolist() for t in (self._initial_records, own.records, own.seeds, own.offsets)]
        return {"batch_size": self._batch_size, "options": tuple(self._call.options), "columns": columns}

    @untraced
    def __setstate__(self, state: dict[str, Any]) -> None:
        self._batch_size = state["batch_size"]
        self._call = SampleCall(Options(*state["options"]), self._batch_size)
        initial, records, seeds, offsets = state["columns"]
        with torch.inference_mode(False):
            self._initial_records, own = (_unpickled(table) for table in (initial, records))
            words = [torch.tensor(t, dtype=torch.int64, device=CPU) for t in (seeds, offsets)]
            self._rows = Rows(own, words[0], words[1], workspace={})
        self._forget()

    @untraced
    def __repr__(self) -> str:
        with self._lock:
            records, offsets = self._rows.records.cpu(), self._rows.offsets.tolist()
        options = self._call.options._asdict()
        parts = {"batch_size": repr(self._batch_size), **described(records)}
        parts |= {name: repr(value) for name, value in options.items() if value != Options._field_defaults[name]}
        parts["offsets"] = shortened([offset % 2**64 for offset in offsets])
        return f"Sampler({', '.join(f'{name}={value}' for name, value in parts.items())})"

    @property
    def batch_size(self) -> int:
        """Number of slots."""
        return self._batch_size

    @property
    @untraced
    def params(self) -> SamplingParams:
        """How each slot samples now: every field with one value per slot. A copy."""
        with self._lock:
            records = self._rows.records.cpu()
        return unpack_params(records)

    @property
    @untraced
    def seeds(self) -> torch.Tensor:
        """Each slot's seed, int64 [B] (the bits of an unsigned integer). A copy, where the logits are."""
        with self._lock:
            return self._rows.seeds.clone()

    @property
    @untraced
    def offsets(self) -> torch.Tensor:
        """Each slot's position at the next call, int64 [B] (the bits of an unsigned integer). A copy, as `seeds`."""
        with self._lock:
            return self._rows.offsets.clone()

    def __call__(
        self,
        logits: ArrayLike,
        *,
        rows: SlotIndex | None = None,
        bitmask: ArrayLike | None = None,
        allowed_ids: Allowed | None = None,
        bias: BiasLike | None = None,
        prompt_ids: TokenIds | None = None,
        output_ids: TokenIds | None = None,
        dry_breakers: BreakerIds | None = None,
        out: SampleOutput | None = None,
    ) -> SampleOutput:
        """One step: sample logits [B, V] ([V] when B is 1) and advance every slot's offset by 1.

        Arguments, results and errors as for `fastsample.sample`. After an error no offset has moved.

        Args:
            rows: the slots that this step samples, if not all: n distinct numbers 0 <= slot < B in any order (a list,
                an integer tensor or array [n], a slice, or one number), or a mask, bool [B]. Row i of the logits
                [n, V], of the other arguments, of the result and in errors then belongs to slot rows[i], and only the
                offsets of these slots advance. A slice, or consecutive slots, costs nothing. Reading a tensor on a GPU
                waits for it; a CUDA graph can capture a step whose list of slots has been used before.
        """
        if is_traced():
            from fastsample import ops
            from fastsample import untraced as elsewhere

            inputs = gather(bitmask, allowed_ids, bias, prompt_ids, output_ids, dry_breakers)
            step = elsewhere.served(ops.step, inputs, out, self._call.options.without_size)
            return step(self, logits, rows, inputs, self._call.options, out)
        if self._penalised and output_ids is None:
            self._warn(rows, prompt_ids)
        with self._lock:
            if rows is not None:
                inputs = gather(bitmask, allowed_ids, bias, prompt_ids, output_ids, dry_breakers)
                return self._step_of(rows, logits, inputs, out)
            call, own = self._call, self._rows
            table = call.table(logits)
            if self._device is not call.device:
                own = self._move_to(call.device)
            if (  # a call of `gather` would be noticed in a step of 6 us
                bitmask is not None
                or allowed_ids is not None
                or bias is not None
                or prompt_ids is not None
                or output_ids is not None
                or dry_breakers is not None
            ):
                inputs = Inputs(bitmask, allowed_ids, bias, prompt_ids, output_ids, dry_breakers)
                own = self._with_inputs(own, table, inputs)
            return call.run(table, own, out, advance=True)

    @untraced
    def verify(
        self,
        logits: ArrayLike,
        draft_ids: TokenIds,
        *,
        num_drafts: Any = None,
        rule: RuleName = "exact",
        draft_logits: ArrayLike | None = None,
        draft_probs: ArrayLike | None = None,
        draft_params: SamplingParams | None = None,
        bitmask: ArrayLike | None = None,
        bias: BiasLike | None = None,
        prompt_ids: TokenIds | None = None,
        output_ids: TokenIds | None = None,
        dry_breakers: BreakerIds | None = None,
    ) -> VerifyOutput:
        """Verify drafts, with a slot for each request; every slot's offset advances by the tokens that came out.

        Arguments, results and errors as for `fastsample.verify`. After an error no offset has moved.
        """
        if self._call.options.num_samples != 1 or self._call.options.input != "logits":
            raise ValueError("verify: expected a Sampler of logits with num_samples = 1")
        given_rows: Any = as_tensor("logits", logits)
        drafts = pack_drafts(given_rows, draft_ids, num_drafts)
        if len(drafts.ids) != self._batch_size:
            raise ValueError(f"draft_ids: expected {self._batch_size} requests, one per slot, got {len(drafts.ids)}")
        raises = self._call.options.on_invalid != "flag"
        given = Given(draft_ids, num_drafts, None, rule, draft_logits, draft_probs, draft_params)
        packed = given.pack_rule(drafts, given_rows, raises)
        if self._penalised and output_ids is None:
            self._warn(None, prompt_ids)
        inputs = Inputs(bitmask, None, bias, prompt_ids, output_ids, dry_breakers)
        with self._lock:
            own = self._move_to(drafts.ids.device)
            rows = Rows(own.records[drafts.request], own.seeds, own.offsets, workspace=own.workspace)
            call = SampleCall(self._call.options.of_rows)
            table = call.table(as_table(given_rows))
            each, history = split(inputs, drafts)
            each.attach(rows, table)
            if self._penalised:
                history.attach(rows)
            found, invalid = packed.apply(self._call.options, drafts, call, table, rows)
            result = checked_result(found, self._call.options, invalid)
            own.offsets += result.num_accepted + (result.status == 0)
        return result

    def _step_of(self, rows: SlotIndex, logits: Any, inputs: Inputs, out: SampleOutput | None) -> SampleOutput:
        """A step of some slots. (A step of all slots, which takes but a few microseconds, needs none of this.)"""
        logits = as_tensor("logits", logits)
        pick, call = self._picked(rows, logits)
        table = call.table(logits)
        own = pick.take(self._move_to(call.device))
        if inputs is not NO_INPUTS:
            self._check(inputs)
            own = own.with_inputs()
            inputs.attach(own, table)
        result = call.run(table, own, out, advance=True)
        pick.put_back(self._rows)
        return result

    def _warn(self, rows: SlotIndex | None, prompt_ids: TokenIds | None) -> None:
        """Warn of penalties that are on in the slots of a step without output ids."""
        with self._lock:
            numbers = range(self._batch_size) if rows is None else slot_numbers(rows, self._batch_size)
            active = {name for row in numbers for name in self._penalised.get(row, ())}
        warn_without_ids(active, prompt_ids, None, stacklevel=3)

    def _picked(self, rows: SlotIndex, logits: torch.Tensor) -> tuple[Pick, SampleCall]:
        """What the last step with these slots has left to reuse, or a new start."""
        numbers = listed(rows, self._batch_size)
        if self._last_pick is None or self._last_pick[0].numbers != numbers:
            pick = Pick(checked(numbers, self._batch_size))
            self._last_pick = pick, SampleCall(self._call.options, len(numbers))
        if isinstance(logits, torch.Tensor):
            self._last_pick[0].require_rows(logits)
        return self._last_pick

    def _move_to(self, device: torch.device | None) -> Rows:
        """The slots, on the device of the logits."""
        self._device = device
        if device is not None and self._rows.records.device != device:
            with torch.inference_mode(False):
                self._rows = self._rows.to(device)
        return self._rows

    def _rows_on(self, device: torch.device) -> Rows:
        """The slots on a device, for a step in a trace."""
        own = self._rows
        if own.records.device != device:
            records, seeds, offsets = (t.to(device) for t in (own.records, own.seeds, own.offsets))
            self._rows = own = Rows(records, seeds, offsets, workspace=own.workspace)
            self._device = None
        return own

    def _with_inputs(self, own: Rows, table: torch.Tensor, given: Inputs) -> Rows:
        """Slots with a step's inputs: the last step's where nothing but their values can have changed since."""
        if self._last is not None:
            rows, stamps = self._last
            if rows.slots is own and stamps.match(given):
                return rows
        self._check(given)
        rows = own.with_inputs()
        given.attach(rows, table)
        self._last = (rows, Stamps(given)) if used_in_place(given, rows) else None
        return rows

    @untraced
    def set_row(
        self,
        row: int,
        params: SamplingParams | None = None,
        *,
        seed: int | None = None,
        offset: int = 0,
        **fields: Any,
    ) -> None:
        """Give a slot to a new sequence: its parameters, its own seed and its position.

        A field that is not given returns to its value when the Sampler was made, whatever `set_row` gave the slot
        since; a seed that is not given stays as it is.

        Args:
            row: slot, 0 <= row < B.
            params: scalar parameters for all fields; `fields` override it.
            seed: this sequence's 64-bit seed, used as it is, so that the slot does not matter. None keeps the slot's
                seed, so at equal offsets the sequence draws with the same random numbers as the one before.
            offset: position of its next token.
        """
        row = self._checked_row(row)
        record = pack_params(params, fields, 1)[0]
        if params is None:
            given = torch.tensor([name in fields for name, _ in specs()], device=CPU)
            record = torch.where(given, record, self._initial_records[row])
        if self._call.options.input == "probs":
            require_for_probs(record[None], row)
        start = pack_offsets(offset, 1)
        own = None if seed is None else pack_seeds([seed], 1)
        with self._lock:
            self._restart(row, own, start, record)

    @untraced
    def reset_row(self, row: int, *, seed: int | None = None) -> None:
        """Start a slot over at offset 0 with the parameters the Sampler was made with.

        Args:
            row: slot, 0 <= row < B.
            seed: as in `set_row`; None keeps the slot's seed.
        """
        row = self._checked_row(row)
        own = None if seed is None else pack_seeds([seed], 1)
        with self._lock:
            self._restart(row, own, pack_offsets(0, 1), self._initial_records[row])

    def _restart(self, row: int, seed: torch.Tensor | None, offset: torch.Tensor, record: torch.Tensor) -> None:
        if seed is not None:
            self._rows.seeds[row].copy_(seed[0])
        self._rows.offsets[row].copy_(offset[0])
        self._rows.records[row].copy_(record)
        self._penalised.pop(row, None)
        if 0 in (own := penalised_rows(record[None])):
            self._penalised[row] = own[0]

    def _check(self, inputs: Inputs) -> None:
        if self._call.options.input == "probs":
            require_no_bias(inputs)

    def _checked_row(self, row: int) -> int:
        row = whole("row", row)
        if not 0 <= row < self.batch_size:
            raise ValueError(f"row = {row}: expected 0 <= row < {self.batch_size}")
        return row


def _unpickled(table: list[list[int]]) -> torch.Tensor:
    """Records that were pickled, which had no parameters that are newer than that: those get their default."""
    newer = SamplingParams().pack()[:, len(table[0]) :].expand(len(table), -1)
    return torch.cat([torch.tensor(table, dtype=torch.int32, device=CPU), newer], 1)


_OTHERS = ("seed", "offset", *Options._fields)
"""What a misspelt name may have meant besides a parameter."""

_alive: weakref.WeakSet[Sampler] = weakref.WeakSet()


def _new_lock(sampler: Sampler) -> threading.Lock:
    _alive.add(sampler)
    return threading.Lock()


def _unlock_all() -> None:
    """In a forked child: the threads that were in a call do not exist here."""
    for sampler in list(_alive):
        sampler._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_all)
