"""DRY's breakers as people write them: token ids, or strings that stand for every token whose text contains them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fastsample.checks import CPU
from fastsample.inputs.ids import pad, row_of_ids
from fastsample.integrations.grammar.vocabulary import Vocabulary
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
    if not _is_per_sequence(breakers):
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
    found = {token for text in texts for token in _texts_of(tokenizer).containing(text, name)}
    return torch.tensor(sorted(found.union(ids.tolist())), dtype=torch.int64, device=CPU)


def _lines(breakers: Any) -> list[Any]:
    """The breakers of each sequence, or those of all as the only line."""
    if isinstance(breakers, torch.Tensor):
        breakers = breakers.to(CPU)
    if _is_per_sequence(breakers):
        return [() if line is None else _line(line, f" (row {row})") for row, line in enumerate(breakers)]
    return [_line(breakers, "")]


def _line(line: Any, where: str) -> Any:
    if not isinstance(line, _LISTS):
        raise TypeError(f"dry_breakers{where}: expected a list of strings and token ids, got {line!r}")
    return line


_LISTS = (list, tuple, set, frozenset, np.ndarray, torch.Tensor)


def _is_per_sequence(breakers: Any) -> bool:
    if isinstance(breakers, (torch.Tensor, np.ndarray)):
        return breakers.ndim == 2
    return isinstance(breakers, (list, tuple)) and any(one is None or isinstance(one, _LISTS) for one in breakers)


# What tokens contain -------------------------------------------------------------------------------------------------


@dataclass
class _Texts:
    """The text of every token of a tokenizer, as bytes by id, and what was looked up in it."""

    size: int
    tokens: list[bytes]
    found: dict[str, list[int]] = field(default_factory=dict)

    def containing(self, text: str, name: str) -> list[int]:
        """The ids of the tokens that contain a text; ValueError where there are none."""
        if text not in self.found:
            part = text.encode()
            ids = [i for i, token in enumerate(self.tokens) if part in token] if part else []
            if not ids:
                why = f"no token contains {text!r}" if part else "'' is in every token"
                raise ValueError(
                    f"{name}: {why}; a breaker is a single token, and a string stands for every token that contains it"
                )
            self.found[text] = ids
        return self.found[text]


_KNOWN: WeakKeyDictionary[Any, _Texts] = WeakKeyDictionary()


def _texts_of(tokenizer: Any) -> _Texts:
    """What is known of a tokenizer, read again when tokens have been added to it."""
    size = next((count() for name in ("get_vocab_size", "__len__") if (count := getattr(tokenizer, name, None))), 0)
    try:
        known = _KNOWN.get(tokenizer)
    except TypeError:  # a kind of object that cannot be remembered
        known = None
    if known is None or known.size != size:
        tokens = list(Vocabulary(tokenizer).tokens)
        for name, i in tokenizer.get_vocab().items():
            tokens[i] = tokens[i] or name.encode()  # special tokens are written as they are named
        known = _Texts(size, tokens)
        with suppress(TypeError):
            _KNOWN[tokenizer] = known
    return known
