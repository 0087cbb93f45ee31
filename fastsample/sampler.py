"""Sampler: a serving loop's slots, validated and packed once, one step per call."""

from __future__ import annotations

from typing import Any

import torch

from fastsample.api import add_row_inputs, pack_params
from fastsample.engines import LogprobsMode
from fastsample.params import SamplingParams
from fastsample.request import OnInvalid, Request, SampleOutput
from fastsample.rows import BiasLike, Rows, Seed, TokenIds, pack_offsets, pack_seeds


class Sampler:
    """Samples step after step with the same slots; each call draws at the slots' offsets and advances them by 1.

    Args:
        params: how each slot samples; `fields` override it. One value per slot or one for all.
        batch_size: number of slots B >= 1.
        seed: as for `fastsample.sample`; None takes one fresh seed from torch's default CPU generator.
        offset: position of the first step, an int or one per slot.
        num_samples, logprobs, top_logprobs, on_invalid, backend: as for `fastsample.sample`.

    Raises:
        TypeError, ValueError: bad argument; the message names it, the row and the value.
    """

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
        if not isinstance(batch_size, int) or isinstance(batch_size, bool):
            raise TypeError(f"batch_size = {batch_size!r}: expected an integer")
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: expected at least 1")
        self._batch_size = batch_size
        self._request = Request(num_samples, logprobs, top_logprobs, on_invalid, backend, reused=True)
        records = pack_params(params, fields, batch_size)
        self._rows = Rows(
            records.repeat(batch_size // records.shape[0], 1),
            pack_seeds(seed, batch_size).clone(),
            pack_offsets(offset, batch_size).expand(batch_size).clone(),
            workspace={},
        )
        self._initial_records = self._rows.records.clone()

    @property
    def batch_size(self) -> int:
        """Number of slots."""
        return self._batch_size

    @property
    def offsets(self) -> torch.Tensor:
        """Each slot's position at the next call, int64 [B] (the bits of an unsigned integer). A copy."""
        return self._rows.offsets.clone()

    def __call__(
        self,
        logits: torch.Tensor,
        *,
        bitmask: torch.Tensor | None = None,
        bias: BiasLike | None = None,
        prompt_ids: TokenIds | None = None,
        output_ids: TokenIds | None = None,
        out: SampleOutput | None = None,
    ) -> SampleOutput:
        """One step: sample logits [B, V] ([V] when B is 1) and advance every slot's offset by 1.

        Arguments, results and errors as for `fastsample.sample`. After an error no offset has moved.
        """
        table = self._request.table(logits)
        if table.shape[0] != self._batch_size:
            raise ValueError(f"logits: expected {self._batch_size} rows (batch_size), got {table.shape[0]}")
        self._rows = rows = self._rows.to(table.device)
        if bitmask is not None or bias is not None or prompt_ids is not None or output_ids is not None:
            rows = Rows(rows.records, rows.seeds, rows.offsets, workspace=rows.workspace)
            add_row_inputs(rows, table, bitmask, bias, prompt_ids, output_ids)
        return self._request.run(table, rows, out, advance=True)

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

        Args:
            row: slot, 0 <= row < B.
            params: scalar parameters; `fields` override it.
            seed: this sequence's 64-bit seed, used as it is, so that the slot does not matter; None takes a fresh one.
            offset: position of its next token.
        """
        self._check_row(row)
        record = pack_params(params, fields, 1)
        start = pack_offsets(offset, 1)
        self._restart(row, seed, start)
        self._rows.records[row].copy_(record[0])

    def reset_row(self, row: int, *, seed: int | None = None) -> None:
        """Start a slot over at offset 0 with the parameters the Sampler was made with.

        Args:
            row: slot, 0 <= row < B.
            seed: as in `set_row`; None keeps the slot's seed.
        """
        self._check_row(row)
        own = int(self._rows.seeds[row]) if seed is None else seed
        self._restart(row, own, pack_offsets(0, 1))
        self._rows.records[row].copy_(self._initial_records[row])

    def _restart(self, row: int, seed: int | None, offset: torch.Tensor) -> None:
        own = pack_seeds(None, 1) if seed is None else pack_seeds([seed], 1)
        self._rows.seeds[row].copy_(own[0])
        self._rows.offsets[row].copy_(offset[0])

    def _check_row(self, row: int) -> None:
        if not isinstance(row, int) or isinstance(row, bool):
            raise TypeError(f"row = {row!r}: expected an integer")
        if not 0 <= row < self.batch_size:
            raise ValueError(f"row = {row}: expected 0 <= row < {self.batch_size}")
