"""DRY's breakers as strings: each stands for every token whose text contains it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from fastsample.integrations.grammar.vocabulary import Vocabulary


def ids_containing(tokenizer: Any, text: str) -> list[int]:
    """The ids of the tokens that contain a text, ascending.

    The first call for a tokenizer reads its whole vocabulary, which takes a fraction of a second.

    Raises:
        ValueError: no token contains it, or every token does.
    """
    return _texts_of(tokenizer).containing(text)


_REMEMBERED = 256


@dataclass
class _Texts:
    """The text of every token of a tokenizer, as bytes by id, and what was looked up in it."""

    size: int
    tokens: list[bytes]
    found: dict[str, list[int]] = field(default_factory=dict)

    def containing(self, text: str) -> list[int]:
        ids = self.found.get(text)
        if ids is not None:
            return ids
        part = text.encode()
        ids = [i for i, token in enumerate(self.tokens) if part in token] if part else []
        if not ids:
            why = f"no token contains {text!r}" if part else "'' is in every token"
            raise ValueError(
                f"{why}; a breaker is a single token, and a string stands for every token that contains it"
            )
        if len(self.found) >= _REMEMBERED:  # strings come from outside
            self.found.clear()
        self.found[text] = ids
        return ids


_KNOWN: WeakKeyDictionary[Any, _Texts] = WeakKeyDictionary()


def _texts_of(tokenizer: Any) -> _Texts:
    """What is known of a tokenizer, read again when tokens have been added to it."""
    size = next((count() for name in ("get_vocab_size", "__len__") if (count := getattr(tokenizer, name, None))), 0)
    known = None
    with suppress(TypeError):  # a kind of object that cannot be remembered
        known = _KNOWN.get(tokenizer)
    if known is None or known.size != size:
        tokens = list(Vocabulary(tokenizer).tokens)
        for name, i in tokenizer.get_vocab().items():
            tokens[i] = tokens[i] or name.encode()  # special tokens are written as they are named
        known = _Texts(size, tokens)
        with suppress(TypeError):
            _KNOWN[tokenizer] = known
    return known
