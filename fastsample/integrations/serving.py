"""What the adapters to serving stacks share: one sampling step whose parameters are on the device of the logits.

A stack validates its requests when they arrive, so nothing is validated again here and nothing waits for a device.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from fastsample.backends import Engine, Outputs, select
from fastsample.checks import CPU, MAX_VOCAB
from fastsample.inputs import Rows
from fastsample.integrations.asked import Asked, Edits, Row
from fastsample.integrations.extras import Extras, near_misses
from fastsample.integrations.sets import Kept
from fastsample.outputs import STATUS
from fastsample.params import SamplingParams, write_columns

MAX_NEAR_MISSES = 20
"""Warnings of misspelt names: requests bring them, and there is no end of those."""


class Step:
    """Filters and the draw of a batch, with one parameter set per row.

    Args:
        logger: gets each message once.
        work, stays: what this step does and what it leaves to the stack, for the message that names the engine.
        **fields: SamplingParams fields of every row, unless a call has a column for them.
    """

    def __init__(self, logger: logging.Logger, work: str, stays: str, **fields: Any) -> None:
        self._logger, self._work, self._stays = logger, work, stays
        self._fields = fields
        self._records = {CPU: SamplingParams(**fields).pack()}
        self._said: set[str] = set()
        self._misspelt: set[str] = set()

    def why_not(self, logits: torch.Tensor) -> str | None:
        """Why the stack should keep these logits [B, V] to itself, or None."""
        if not 1 <= logits.shape[-1] <= MAX_VOCAB:
            return f"the vocabulary has {logits.shape[-1]} tokens, more than 2^20"
        name = select("auto", logits).name
        if name == "reference" and not os.environ.get("FASTSAMPLE_BACKEND"):
            return f"no fast engine of fastsample serves {logits.dtype} on {logits.device} here"
        self.say(logging.INFO, f"{self._work} are done by engine {name!r}; {self._stays}")
        return None

    def row(self, extras: Extras, **fields: Any) -> Row:
        """What a request with extra parameters asks for; `fields` of the stack's own apply where its filters do."""
        filters = SamplingParams(**(self._fields | fields | extras.filters)).pack() if extras.filters else None
        edits = SamplingParams(**extras.edits).pack() if extras.edits else None
        return Row(filters, edits, extras.breakers or ())

    def records(self, asked: Asked | None, logits: torch.Tensor) -> torch.Tensor | None:
        """Records of the rows of logits [B, V], on their device, if some row has one of its own."""
        return None if asked is None else asked.records(self._record_on(logits.device), len(logits))

    def draw(
        self,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        offsets: torch.Tensor,
        records: torch.Tensor | None = None,
        **columns: torch.Tensor | None,
    ) -> torch.Tensor:
        """One token per row, int64 [B].

        A row with a NaN, with +inf or with nothing above -inf gets token 0: a server must go on, as it does with the
        stacks' own samplers. A warning says so where the engine knows it without waiting for the device.

        Args:
            logits: float32, float16 or bfloat16 [B, V]; only read.
            seeds, offsets: int64 [B], the bits of unsigned integers.
            records: int32 [B, fields], where rows have their own; only read.
            **columns: SamplingParams fields, one value per row [B]; None leaves the field as it is.
        """
        return self._draw(logits, self._rows(logits, seeds, offsets, records, columns), None)

    def draw_by(
        self,
        engine: Engine,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        offsets: torch.Tensor,
        records: torch.Tensor | None = None,
        **columns: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same tokens, by an engine that is not chosen by the logits."""
        return self._draw(logits, self._rows(logits, seeds, offsets, records, columns), None, engine)

    def draw_kept(
        self,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        offsets: torch.Tensor,
        records: torch.Tensor | None = None,
        **columns: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Kept]:
        """The same tokens, and the set that each was drawn from; an invalid row keeps none."""
        rows, vocab = logits.shape
        kept = Kept.empty(select("auto", logits), rows, vocab, logits.device)
        return self._draw(logits, self._rows(logits, seeds, offsets, records, columns), kept), kept

    def keep(
        self, logits: torch.Tensor, records: torch.Tensor | None = None, **columns: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits divided by the temperature where a token is kept, -inf elsewhere; a new float32 [B, V]."""
        unused = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        return self._filtered(logits, self._rows(logits, unused, unused, records, columns))

    def edit(self, logits: torch.Tensor, asked: Asked, ids: torch.Tensor) -> None:
        """DRY and the ban of repeated n-grams, in place in the rows `asked.edited` of logits [B, V].

        Args:
            ids: int64 [number of those rows, L], prompt and output so far; negative ones are no tokens.
        """
        self.edit_rows(logits, asked.edits(logits.device), ids)

    def edit_rows(self, logits: torch.Tensor, edits: Edits, ids: torch.Tensor) -> None:
        """The same for rows that are named by `edits`."""
        part = logits[edits.where]
        unused = torch.zeros(len(part), dtype=torch.int64, device=logits.device)
        rows = Rows(edits.records, unused, unused, prompt_ids=ids, breakers=edits.breakers)
        logits[edits.where] = self._filtered(part, rows).to(logits.dtype)

    def say(self, level: int, message: str) -> None:
        """Log a message, the first time it comes up."""
        if message not in self._said:
            self._said.add(message)
            self._logger.log(level, "fastsample: %s", message)

    def say_near_misses(self, given: Any, where: str) -> None:
        """Warn of names that are nearly ours: they may be misspelt, but may just as well be somebody else's."""
        for name, near in near_misses(given):
            if name in self._misspelt or len(self._misspelt) == MAX_NEAR_MISSES:
                continue
            self._misspelt.add(name)
            self.say(logging.WARNING, f"{where}: {name!r} is none of fastsample's names; did you mean {near!r}?")

    def _record_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._records:
            self._records[device] = self._records[CPU].to(device)
        return self._records[device]

    def _rows(
        self,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        offsets: torch.Tensor,
        records: torch.Tensor | None,
        columns: dict[str, torch.Tensor | None],
    ) -> Rows:
        device = logits.device
        own = self._record_on(device).expand(len(logits), -1) if records is None else records
        own = own.clone()
        write_columns(own, columns)
        return Rows(own, seeds.to(device, non_blocking=True), offsets.to(device, non_blocking=True))

    def _draw(self, logits: torch.Tensor, rows: Rows, kept: Kept | None, engine: Engine | None = None) -> torch.Tensor:
        out = Outputs(
            status=torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device),
            tokens=torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device),
        )
        if kept is not None:
            out.kept_count, out.kept_bitmask = kept.count, kept.bitmask
        invalid = self._run(logits, rows, out, engine)
        assert out.tokens is not None
        if invalid == 0:
            return out.tokens
        if invalid is not None:
            row = int(out.status.nonzero()[0, 0])
            reason = STATUS[int(out.status[row])]
            self.say(logging.WARNING, f"a row of logits has {reason} (first in row {row}); such rows get token 0")
        return out.tokens.clamp_(min=0)

    def _filtered(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        status = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
        filtered = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        self._run(logits, rows, Outputs(status, filtered=filtered))
        return filtered

    def _run(self, logits: torch.Tensor, rows: Rows, out: Outputs, engine: Engine | None = None) -> int | None:
        table = logits if logits.shape[1] == 1 or logits.stride(1) == 1 else logits.contiguous()
        return (engine or select("auto", table)).run(table, rows, out)


class Seen:
    """An object of a stack's as one part of the stack is to see it: with some attributes of ours, else as it is."""

    def __init__(self, seen: Any, **ours: Any) -> None:
        self.__dict__.update(ours, _seen=seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_seen"], name)
