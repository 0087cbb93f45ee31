"""What a request to a serving stack may ask for beyond the stack's own sampling parameters.

vLLM and SGLang let a request carry names that they do not know themselves, for whoever reads them. These are the fields
of SamplingParams that the stacks lack, and DRY's breakers. All other names are somebody else's and stay untouched.
"""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastsample.checks import MAX_VOCAB
from fastsample.integrations.breakers import ids_containing
from fastsample.params import SamplingParams, specs
from fastsample.spec import Spec

_STACKS_HAVE = frozenset(
    ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
)
BREAKERS = "dry_breakers"
MAX_STRINGS = 64
"""Breakers of a request that are strings: each is looked up in the whole vocabulary."""

FIELDS: dict[str, Spec] = {name: spec for name, spec in specs() if name not in _STACKS_HAVE}
NAMES = (*FIELDS, BREAKERS)
_OF_HISTORY = frozenset(name for name, spec in FIELDS.items() if spec.of_history)


class RefusedError(ValueError):
    """A value that a request must not have; the message names the parameter, the value and the range."""

    def __init__(self, parameter: str, value: Any, wanted: str) -> None:
        self.parameter, self.value = parameter, reprlib.repr(value)
        super().__init__(f"{parameter} = {self.value}: expected {wanted}")


@dataclass(frozen=True)
class Extras:
    """The extra parameters of a request, validated."""

    fields: dict[str, Any]
    breakers: list[int] | None = None

    @property
    def filters(self) -> dict[str, Any]:
        """Fields of the filters and of their order."""
        return {name: value for name, value in self.fields.items() if name not in _OF_HISTORY}

    @property
    def edits(self) -> dict[str, Any]:
        """Fields of DRY and of the n-grams that must not be repeated; empty if neither has an effect."""
        found = {name: value for name, value in self.fields.items() if name in _OF_HISTORY}
        return found if found.get("dry_multiplier") or found.get("no_repeat_ngram_size") else {}

    def names(self) -> list[str]:
        return list(self.fields) or [BREAKERS]

    def written(self) -> dict[str, Any]:
        """The form in which they travel on with the request: every breaker is an id."""
        return self.fields if self.breakers is None else {**self.fields, BREAKERS: self.breakers}


def read(given: Any, tokenizer: Any = None, vocab: int | None = None) -> Extras | None:
    """The extra parameters among the names that a request carries, or None where they would change nothing.

    Args:
        given: names and values of all who read them; None of a name means that it is not given.
        tokenizer: for breakers that are strings; None where there is none.
        vocab: number of token ids, where it is known.

    Raises:
        RefusedError: a value out of range, or one that is no value of this parameter.
    """
    if not isinstance(given, Mapping):
        return None
    found = {name: given[name] for name in NAMES if given.get(name) is not None}
    breakers = found.pop(BREAKERS, None)
    fields = {name: _checked(name, value) for name, value in found.items()}
    ids = None if breakers is None else _breaker_ids(breakers, tokenizer, vocab)
    changed = {name: value for name, value in fields.items() if _matters(name, value)}
    return Extras(changed, ids) if changed else None


def _checked(name: str, value: Any) -> Any:
    """One value in the range, of a type of Python's own, which every transport can carry."""
    try:
        params = SamplingParams(**{name: value})
    except (TypeError, ValueError, OverflowError) as error:
        raise RefusedError(name, value, FIELDS[name].wanted) from error
    if params.per_row():  # one value for each of several rows, as fastsample's own calls may have
        raise RefusedError(name, value, FIELDS[name].wanted)
    return value if type(value) is float else getattr(params, name)


def _matters(name: str, value: Any) -> bool:
    """Whether a value is another than the neutral one. A choice always is: the stacks' own are not our defaults."""
    return FIELDS[name].kind == "choice" or value != getattr(SamplingParams, name)


def _breaker_ids(given: Any, tokenizer: Any, vocab: int | None) -> list[int]:
    wanted = "a token id or a string, or a list of them"
    items = [given] if isinstance(given, (str, int)) else given
    if not isinstance(items, (list, tuple)):
        raise RefusedError(BREAKERS, given, wanted)
    if sum(isinstance(item, str) for item in items) > MAX_STRINGS:
        raise RefusedError(BREAKERS, given, f"at most {MAX_STRINGS} strings")
    ids: set[int] = set()
    for item in items:
        if isinstance(item, str):
            ids.update(_ids_of(item, tokenizer))
            continue
        if isinstance(item, bool) or not isinstance(item, numbers.Integral):
            raise RefusedError(BREAKERS, item, wanted)
        token = int(item)
        if token < 0 or token >= (MAX_VOCAB if vocab is None else vocab):
            raise RefusedError(BREAKERS, token, "a token id" if vocab is None else f"a token id, 0 <= id < {vocab}")
        ids.add(token)
    return sorted(ids)


def _ids_of(text: str, tokenizer: Any) -> list[int]:
    if tokenizer is None:
        raise RefusedError(BREAKERS, text, "token ids, since no tokenizer is at hand that knows strings")
    try:
        return ids_containing(tokenizer, text)
    except (TypeError, ValueError) as error:
        raise RefusedError(BREAKERS, text, f"a string that some token contains, or token ids ({error})") from error


def near_misses(given: Any) -> Iterator[tuple[str, str]]:
    """Names that are nobody's as far as we know, each with that of ours that it nearly is."""
    if isinstance(given, Mapping):
        for name in given:
            if isinstance(name, str) and len(name) < 40 and (near := _nearly(name)):
                yield name, near


@lru_cache(maxsize=256)
def _nearly(name: str) -> str | None:
    from difflib import get_close_matches

    if name in NAMES:
        return None
    return next(iter(get_close_matches(name.lower(), NAMES, 1, 0.85)), None)
