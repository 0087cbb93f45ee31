"""DRY's breakers as people write them: token ids, or strings that stand for every token whose text contains them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from fastsample.checks import CPU
from fastsample.inputs.ids import pad, row_of_ids
from fastsample.integrations.breakers import ids_containing
from fastsample.integrations.transformers.rows import Batch

Breakers: TypeAlias = "Sequence[str | int] | Sequence[Sequence[str | int] | None] | np.ndarray[Any, Any] | torch.Tensor"


def check_breakers(breakers: Any, tokenizer: Any) -> None:
    """Raise unless these are breakers. Strings are looked up where there is a tokenizer already."""
    for line in _lines(breakers):
        if tokenizer is not None or not any(isinstance(one, str) for one in line):
            breaker_ids(line, tokenizer)


def sequence_breakers(breakers: Any, batch: Batch, tokenizer: Any) -> torch.Tensor:
    """int64 [L], which all sequences share, or [B, L] padded with -1."""
    lines = [breaker_ids(line, tokenizer) for line in _lines(breakers)]
    if not is_per_sequence(breakers):
        return lines[0]
    batch.require("dry_breakers", len(lines))
    return pad([line for line in lines for _ in range(batch.sequences // len(lines))], CPU)


def breaker_ids(line: Any, tokenizer: Any, name: str = "dry_breakers") -> torch.Tensor:
    """The ids that strings and ids stand for, int64 [L] on the CPU; `name` is the caller's word for them in errors."""
    if isinstance(line, (torch.Tensor, np.ndarray)):
        return row_of_ids(name, line, None, CPU)
    texts = [one for one in line if isinstance(one, str)]
    ids = row_of_ids(name, [one for one in line if not isinstance(one, str)], None, CPU)
    if not texts:
        return ids
    if tokenizer is None:
        raise ValueError(
            f"{name}: {texts[0]!r} is a string, and strings need a tokenizer: "
            "give fs_generate or generate tokenizer=..., or pass token ids"
        )
    try:
        found = {token for text in texts for token in ids_containing(tokenizer, text)}
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return torch.tensor(sorted(found.union(ids.tolist())), dtype=torch.int64, device=CPU)


def _lines(breakers: Any) -> list[Any]:
    """The breakers of each sequence, or those of all as the only line."""
    if isinstance(breakers, torch.Tensor):
        breakers = breakers.to(CPU)
    if is_per_sequence(breakers):
        return [() if line is None else _line(line, f" (row {row})") for row, line in enumerate(breakers)]
    return [_line(breakers, "")]


def _line(line: Any, where: str) -> Any:
    if not isinstance(line, _LISTS):
        raise TypeError(f"dry_breakers{where}: expected a list of strings and token ids, got {line!r}")
    return line


_LISTS = (list, tuple, set, frozenset, np.ndarray, torch.Tensor)


def is_per_sequence(breakers: Any) -> bool:
    """Whether these are lists, one for each sequence."""
    if isinstance(breakers, (torch.Tensor, np.ndarray)):
        return breakers.ndim == 2
    return isinstance(breakers, (list, tuple)) and any(one is None or isinstance(one, _LISTS) for one in breakers)
