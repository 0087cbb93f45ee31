"""The rows of a serving stack's batch whose requests ask for more than the stack has, with their histories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastsample.checks import CPU


class History:
    """The ids of a request so far; a stack appends to an output of its own.

    An output may end in placeholders, which are negative; a stack that samples ahead puts the tokens in later.
    """

    def __init__(self, prompt: Sequence[int] | None) -> None:
        self._ids = np.array(() if prompt is None else prompt, dtype=np.int64)
        self._prompt = len(self._ids)
        self._taken = 0  # outputs that are in _ids and stay there
        self._output: Sequence[int] | None = None

    def ids(self, output: Sequence[int]) -> np.ndarray[Any, Any]:
        """Prompt and output, int64 [L], valid until the next call."""
        if output is not self._output or len(output) < self._taken:
            self._output, self._taken = output, 0
        start, end = self._prompt + self._taken, self._prompt + len(output)
        if end > len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(max(end, 64), dtype=np.int64)])
        new = self._ids[start:end]
        new[:] = output[self._taken :]
        open_places = np.flatnonzero(new < 0)
        self._taken += int(open_places[0]) if len(open_places) else len(new)
        return self._ids[:end]


def padded(lines: Sequence[Any], more: int = 0) -> torch.Tensor:
    """Rows of ids as int64 [B, L] on the CPU, with -1 behind them: in the longest row `more` times."""
    table = np.full((len(lines), max(map(len, lines), default=0) + more), -1, dtype=np.int64)
    for row, line in enumerate(lines):
        table[row, : len(line)] = line
    return torch.from_numpy(table)


@dataclass
class Row:
    """What one request asks for at every step."""

    filters: torch.Tensor | None  # its record for the draw, int32 [1, fields] on the CPU
    edits: torch.Tensor | None  # its record for the edits that follow from its history, likewise
    breakers: Sequence[int] = ()
    history: History | None = None
    source: Any = None  # where the stack keeps the request's output


class Asked:
    """The rows of a batch that ask for more, by their number in it; a batch that changes gets another."""

    def __init__(self, rows: Mapping[int, Row]) -> None:
        self.rows = dict(rows)
        self.filtered = [at for at, row in self.rows.items() if row.filters is not None]
        self.edited = [at for at, row in self.rows.items() if row.edits is not None]
        self._on: dict[torch.device, Edits] = {}
        self._records: torch.Tensor | None = None

    def records(self, default: torch.Tensor, count: int) -> torch.Tensor | None:
        """Records of all `count` rows, on the device of the `default` of the others; None where all have that one."""
        if not self.filtered:
            return None
        if self._records is None or self._records.device != default.device or len(self._records) != count:
            table = default.cpu().repeat(count, 1)
            for at, row in self.rows.items():
                if row.filters is not None:
                    table[at] = row.filters[0]
            self._records = table.to(default.device, non_blocking=True)
        return self._records

    def edits(self, device: torch.device) -> Edits:
        """What the edits of the rows `edited` need."""
        if device not in self._on:
            rows = [self.rows[at] for at in self.edited]
            records = torch.cat([row.edits for row in rows if row.edits is not None])
            breakers = padded([row.breakers for row in rows])
            columns = (torch.tensor(self.edited, device=CPU), records, breakers)
            self._on[device] = Edits(*(column.to(device, non_blocking=True) for column in columns))
        return self._on[device]


@dataclass
class Edits:
    """Rows to edit, as an engine sees them."""

    where: torch.Tensor  # int64 [R], their numbers in the batch
    records: torch.Tensor  # int32 [R, fields]
    breakers: torch.Tensor  # int64 [R, L]
