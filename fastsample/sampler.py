"""Sampler: a serving loop's slots, validated and packed once, one step per call."""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from typing import Any

import torch

from fastsample.api import add_row_inputs, pack_params
from fastsample.backends import LogprobsMode
from fastsample.params import CPU, SamplingParams, specs, whole
from fastsample.penalties import penalised_rows, warn_without_ids
from fastsample.request import WISHES, OnInvalid, Request, SampleOutput
from fastsample.rows import Allowed, BiasLike, Rows, Seed, TokenIds, pack_offsets, pack_seeds, shares_values, stamp
from fastsample.slots import Pick, SlotIndex, checked, described, listed, shortened, slot_numbers, unpack_params
from fastsample.traced import is_traced, untraced


class Sampler:
    """Samples step after step with the same slots; each call draws at the slots' offsets and advances them by 1.

    Threads may share one: their calls take turns, so that each gets the tokens of some serial order, and the CPU engine
    gives each call all its threads. A copy or a pickle goes on from the same offsets. (Under torch.compile calls do not
    take turns, and on CUDA streams of their own the threads order their streams.)

    Args:
        params: how each slot samples; `fields` override it. One value per slot or one for all.
        batch_size: number of slots B >= 1.
        seed: as for `fastsample.sample`; None takes one fresh seed from torch's default CPU generator.
        offset: position of the first step, an int or one per slot.
        num_samples, logprobs, top_logprobs, on_invalid, backend: as for `fastsample.sample`.

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
        **fields: Any,
    ) -> None:
        batch_size = whole("batch_size", batch_size)
        if not 1 <= batch_size < 2**31:
            raise ValueError(f"batch_size = {batch_size}: expected 1 <= batch_size < 2^31")
        self._batch_size = batch_size
        self._request = Request(num_samples, logprobs, top_logprobs, on_invalid, backend, batch_size)
        # What a Sampler changes later must not be an inference tensor, wherever it is made.
        with torch.inference_mode(False):
            records = pack_params(params, fields, batch_size, _OTHERS)
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
        self._last_pick: tuple[Pick, Request] | None = None
        self._last: tuple[Rows, tuple[Any, ...], list[Any]] | None = None
        self._lock = _new_lock(self)

    @untraced
    def __getstate__(self) -> dict[str, Any]:
        # Numbers, not tensors: those would go to another process through shared memory and file descriptors.
        with self._lock:
            own = self._rows
            columns = [t.tolist() for t in (self._initial_records, own.records, own.seeds, own.offsets)]
        return {"batch_size": self._batch_size, "request": self._request.anew(), "columns": columns}

    @untraced
    def __setstate__(self, state: dict[str, Any]) -> None:
        self._batch_size = state["batch_size"]
        self._request = state["request"]
        initial, records, seeds, offsets = state["columns"]
        with torch.inference_mode(False):
            self._initial_records, own = (torch.tensor(t, dtype=torch.int32, device=CPU) for t in (initial, records))
            words = [torch.tensor(t, dtype=torch.int64, device=CPU) for t in (seeds, offsets)]
            self._rows = Rows(own, words[0], words[1], workspace={})
        self._forget()

    @untraced
    def __repr__(self) -> str:
        with self._lock:
            records, offsets = self._rows.records.cpu(), self._rows.offsets.tolist()
        wishes = zip(WISHES, self._request.wishes, strict=True)
        parts = {"batch_size": repr(self._batch_size), **described(records)}
        parts |= {name: repr(value) for name, value in wishes if value != _DEFAULTS[name]}
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
        logits: torch.Tensor,
        *,
        rows: SlotIndex | None = None,
        bitmask: torch.Tensor | None = None,
        allowed_ids: Allowed | None = None,
        bias: BiasLike | None = None,
        prompt_ids: TokenIds | None = None,
        output_ids: TokenIds | None = None,
        out: SampleOutput | None = None,
    ) -> SampleOutput:
        """One step: sample logits [B, V] ([V] when B is 1) and advance every slot's offset by 1.

        Arguments, results and errors as for `fastsample.sample`. After an error no offset has moved.

        Args:
            rows: the slots that this step samples, where not all do: n distinct numbers 0 <= slot < B in any order (a
                list, an integer tensor or array [n], a slice, or one number), or a mask of bool [B]. Row i of the
                logits [n, V], of the other arguments and of the result then belongs to slot rows[i], as does a row that
                an error names; the offsets of these slots alone advance. A slice or neighbours cost nothing. A tensor
                on a GPU is read, which waits for it; a CUDA graph captures a step whose list has been used before.
        """
        if is_traced():
            from fastsample import ops
            from fastsample.untraced import served

            inputs = (bitmask, bias, prompt_ids, output_ids, allowed_ids)
            step = served(ops.step, inputs, out)
            return step(self, logits, rows, inputs, self._request.wishes, out)
        if self._penalised and output_ids is None:
            self._warn(rows, prompt_ids)
        with self._lock:
            if rows is not None:
                return self._step_of(rows, logits, (bitmask, bias, prompt_ids, output_ids, allowed_ids), out)
            request, own = self._request, self._rows
            table = request.table(logits)
            if self._device is not request.device:
                own = self._move_to(request)
            if bias is not None or allowed_ids is not None:
                own = own.with_inputs()
                add_row_inputs(own, table, bitmask, bias, prompt_ids, output_ids, allowed_ids)
            elif bitmask is not None or prompt_ids is not None or output_ids is not None:
                own = self._with_tensors(own, table, bitmask, prompt_ids, output_ids)
            return request.run(table, own, out, advance=True)

    def _step_of(
        self, rows: SlotIndex, logits: torch.Tensor, inputs: tuple[Any, ...], out: SampleOutput | None
    ) -> SampleOutput:
        """A step of some slots. (A step of all, which takes but a few us, asks for nothing of this.)"""
        pick, request = self._picked(rows, logits)
        table = request.table(logits)
        own = pick.take(self._move_to(request))
        if any(value is not None for value in inputs):
            own = own.with_inputs()
            add_row_inputs(own, table, *inputs)
        result = request.run(table, own, out, advance=True)
        pick.put_back(self._rows)
        return result

    def _warn(self, rows: SlotIndex | None, prompt_ids: TokenIds | None) -> None:
        """Of penalties that are on in the slots of a step, where there are no output ids."""
        with self._lock:
            numbers = range(self._batch_size) if rows is None else slot_numbers(rows, self._batch_size)
            active = {name for row in numbers for name in self._penalised.get(row, ())}
        warn_without_ids(active, prompt_ids, None, stacklevel=3)

    def _picked(self, rows: SlotIndex, logits: torch.Tensor) -> tuple[Pick, Request]:
        """What is kept of the last step with these slots, or a new beginning."""
        numbers = listed(rows, self._batch_size)
        if self._last_pick is None or self._last_pick[0].numbers != numbers:
            pick = Pick(checked(numbers, self._batch_size))
            self._last_pick = pick, Request(*self._request.wishes, len(numbers))
        if isinstance(logits, torch.Tensor):
            self._last_pick[0].require_rows(logits)
        return self._last_pick

    def _move_to(self, request: Request) -> Rows:
        """The slots, where the request's logits are."""
        self._device = request.device
        if request.device is not None and self._rows.records.device != request.device:
            with torch.inference_mode(False):
                self._rows = self._rows.to(request.device)
        return self._rows

    def _with_tensors(
        self,
        own: Rows,
        table: torch.Tensor,
        bitmask: torch.Tensor | None,
        prompt_ids: TokenIds | None,
        output_ids: TokenIds | None,
    ) -> Rows:
        """Slots with a step's inputs: the last step's where nothing but their values can have changed since."""
        given = (bitmask, prompt_ids, output_ids)
        if self._last is not None:
            rows, known, stamps = self._last
            same = rows.slots is own and all(a is b for a, b in zip(known, given, strict=True))
            if same and stamps == [stamp(value) for value in given]:
                return rows
        rows = own.with_inputs()
        add_row_inputs(rows, table, bitmask, None, prompt_ids, output_ids)
        used = (rows.bitmask, rows.prompt_ids, rows.output_ids)
        in_place = all(a is None or shares_values(a, b) for a, b in zip(given, used, strict=True))
        self._last = (rows, given, [stamp(value) for value in given]) if in_place else None
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

        What is not given is what the slot has of the Sampler: a field its value when the Sampler was made, whatever
        `set_row` gave it since; the seed as it is.

        Args:
            row: slot, 0 <= row < B.
            params: scalar parameters, which give every field; `fields` override it.
            seed: this sequence's 64-bit seed, used as it is, so that the slot does not matter; None keeps the slot's,
                so that at the same offset it draws by the same random numbers as the sequence before.
            offset: position of its next token.
        """
        row = self._checked_row(row)
        record = pack_params(params, fields, 1)[0]
        if params is None:
            given = torch.tensor([name in fields for name, _ in specs()], device=CPU)
            record = torch.where(given, record, self._initial_records[row])
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

    def _checked_row(self, row: int) -> int:
        row = whole("row", row)
        if not 0 <= row < self.batch_size:
            raise ValueError(f"row = {row}: expected 0 <= row < {self.batch_size}")
        return row


_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(Sampler).parameters.items()}
_OTHERS = ("seed", "offset", "num_samples", "logprobs", "top_logprobs", "on_invalid", "backend")
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
