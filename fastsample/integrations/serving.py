"""What the adapters to serving stacks share: one sampling step whose parameters are on the device of the logits.

A stack validates its requests when they arrive, so nothing is validated again here and nothing waits for a device.
"""

from __future__ import annotations

import logging
import os

import torch

from fastsample.backends import Outputs, select
from fastsample.checks import MAX_VOCAB
from fastsample.inputs import Rows
from fastsample.outputs import STATUS
from fastsample.params import SamplingParams, write_columns


class Step:
    """Filters and the draw of a batch, with one parameter set per row.

    Args:
        logger: gets each message once.
        work, stays: what this step does and what it leaves to the stack, for the message that names the engine.
        **fields: SamplingParams fields of every row, unless a call has a column for them.
    """

    def __init__(self, logger: logging.Logger, work: str, stays: str, **fields: float | int | str) -> None:
        self._logger, self._work, self._stays = logger, work, stays
        self._records = {torch.device("cpu"): SamplingParams(**fields).pack()}  # type: ignore[arg-type]
        self._said: set[str] = set()

    def why_not(self, logits: torch.Tensor) -> str | None:
        """Why the stack should keep these logits [B, V] to itself, or None."""
        if not 1 <= logits.shape[-1] <= MAX_VOCAB:
            return f"the vocabulary has {logits.shape[-1]} tokens, more than 2^20"
        name = select("auto", logits).name
        if name == "reference" and not os.environ.get("FASTSAMPLE_BACKEND"):
            return f"no fast engine of fastsample serves {logits.dtype} on {logits.device} here"
        self.say(logging.INFO, f"{self._work} are done by engine {name!r}; {self._stays}")
        return None

    def draw(
        self, logits: torch.Tensor, seeds: torch.Tensor, offsets: torch.Tensor, **columns: torch.Tensor | None
    ) -> torch.Tensor:
        """One token per row, int64 [B].

        A row with a NaN, with +inf or with nothing above -inf gets token 0: a server must go on, as it does with the
        stacks' own samplers. A warning says so where the engine knows it without waiting for the device.

        Args:
            logits: float32, float16 or bfloat16 [B, V]; only read.
            seeds, offsets: int64 [B], the bits of unsigned integers.
            **columns: SamplingParams fields, one value per row [B]; None leaves the field as it is.
        """
        status = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
        tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        invalid = self._run(logits, seeds, offsets, columns, Outputs(status, tokens))
        if invalid == 0:
            return tokens
        if invalid is not None:
            row = int(status.nonzero()[0, 0])
            reason = STATUS[int(status[row])]
            self.say(logging.WARNING, f"a row of logits has {reason} (first in row {row}); such rows get token 0")
        return tokens.clamp_(min=0)

    def keep(self, logits: torch.Tensor, **columns: torch.Tensor | None) -> torch.Tensor:
        """Logits divided by the temperature where a token is kept, -inf elsewhere; a new float32 [B, V]."""
        status = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
        kept = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        unused = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
        self._run(logits, unused, unused, columns, Outputs(status, filtered=kept))
        return kept

    def say(self, level: int, message: str) -> None:
        """Log a message, the first time it comes up."""
        if message not in self._said:
            self._said.add(message)
            self._logger.log(level, "fastsample: %s", message)

    def _run(
        self,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        offsets: torch.Tensor,
        columns: dict[str, torch.Tensor | None],
        out: Outputs,
    ) -> int | None:
        table = logits if logits.shape[1] == 1 or logits.stride(1) == 1 else logits.contiguous()
        if logits.device not in self._records:
            self._records[logits.device] = self._records[torch.device("cpu")].to(logits.device)
        records = self._records[logits.device].expand(len(table), -1).clone()
        write_columns(records, columns)
        rows = Rows(records, seeds.to(logits.device, non_blocking=True), offsets.to(logits.device, non_blocking=True))
        return select("auto", table).run(table, rows, out)
