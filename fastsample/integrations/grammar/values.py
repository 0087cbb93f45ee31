"""Values and numbers of a schema that engines must reproduce exactly, and their place in the schema."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from decimal import Context as DecimalContext
from fractions import Fraction
from typing import Any, TypeAlias

from fastsample.integrations.grammar.charsets import Ranges

Path: TypeAlias = tuple[str, ...]

LARGEST_INTEGER = 2**53
"""Beyond this, float64, in which engines hold numbers, skips integers."""

DIGITS = 15
"""With more digits, JSON readers may not agree on the float."""

# Control characters that JSON can only write as \uXXXX are never written: with \u, a name would have many spellings.
JSON_CHARACTERS: Ranges = ((0x08, 0x0A), (0x0C, 0x0D), (0x20, 0x7E), (0x80, 0xD7FF), (0xE000, 0x10FFFF))


@dataclass(frozen=True)
class Context:
    """The position of a schema.

    Attributes:
        path: the keys that lead to it, for messages.
        names: properties that schemas of the same value name.
        decided: whether one of these says what else an object may have.
    """

    path: Path = ()
    names: frozenset[str] = frozenset()
    decided: bool = False

    def inside(self, *keys: str) -> Context:
        """The context of a part of the value."""
        return Context((*self.path, *keys))

    def error(self, message: str) -> ValueError:
        where = ".".join(self.path)
        return ValueError(f"at {where}: {message}" if where else message)


def types_of(schema: dict[str, Any]) -> set[str]:
    """The types that a schema allows."""
    given = schema.get("type", ["null", "boolean", "number", "integer", "string", "array", "object"])
    return set(given) if isinstance(given, list) else {given}


def writable(text: str, at: Context) -> str:
    for character in text:
        code = ord(character)
        if not any(low <= code <= high for low, high in JSON_CHARACTERS):
            raise at.error(f"{text!r} holds U+{code:04X}, which is not written")
    return text


def exact(value: Any, at: Context) -> Any:
    """An enum's value, if engines can reproduce it exactly."""
    if isinstance(value, str):
        return writable(value, at)
    if isinstance(value, list):
        return [exact(item, at) for item in value]
    if isinstance(value, dict):
        return {writable(name, at): exact(item, at) for name, item in value.items()}
    if isinstance(value, bool) or value is None:
        return value
    number = number_of(value, "value", at)
    if number.denominator != 1 and rounded(number, ROUND_FLOOR) != number:
        raise at.error(f"value {value}: the engines read numbers of {DIGITS} digits exactly, no longer ones")
    return plain(number)


def rounded(value: Fraction, how: str) -> Fraction:
    """The nearest number of at most DIGITS digits below or above, which every JSON reader turns into the same float."""
    context = DecimalContext(prec=DIGITS, rounding=how)
    return Fraction(context.divide(Decimal(value.numerator), Decimal(value.denominator)))


def number_of(value: Any, word: str, at: Context) -> Fraction:
    """The number, if engines can hold it exactly."""
    fraction = Fraction(Decimal(repr(value)))
    if abs(fraction) > LARGEST_INTEGER:
        raise at.error(f"{word} {value}: the engines hold numbers as float64, exact up to 2**53 = {LARGEST_INTEGER}")
    if fraction and abs(fraction) < Fraction(1, 10**12):
        raise at.error(f"{word} {value}: numbers below 1e-12 are not served")
    return fraction


def plain(value: Fraction) -> int | float:
    """The number as JSON writes it."""
    return int(value) if value.denominator == 1 else float(value)


def bounds(schema: dict[str, Any], word: str, exclusive: str, at: Context) -> list[tuple[Fraction, bool]]:
    """The limits on one side, and whether each is exclusive."""
    beyond = schema.get(exclusive)
    found = []
    if word in schema:
        found.append((number_of(schema[word], f"{word} =", at), beyond is True))
    if beyond is not None and not isinstance(beyond, bool):
        found.append((number_of(beyond, f"{exclusive} =", at), True))
    return found


def above(low: Fraction, left_out: bool, whole: bool, high: list[tuple[Fraction, bool]]) -> Fraction:
    """The least number to allow, given the limit `low`.

    No text may round to an exclusive limit as a float, so numbers closer to it than a millionth (or than the available
    range) are excluded too.
    """
    if whole:
        return Fraction(math.floor(low) + 1 if left_out else math.ceil(low))
    return low + _margin(low, [bound for bound, _ in high]) if left_out else low


def below(high: Fraction, left_out: bool, whole: bool, low: list[tuple[Fraction, bool]]) -> Fraction:
    """The greatest number to allow, given the limit `high`."""
    return -above(-high, left_out, whole, [(-bound, out) for bound, out in low])


def _margin(limit: Fraction, others: list[Fraction]) -> Fraction:
    room = min((abs(other - limit) / 4 for other in others), default=Fraction(1))
    smallest = max(Fraction(1), abs(limit)) / 2**40
    for digits in range(6, 12):
        if (margin := Fraction(1, 10**digits)) <= room:
            return margin if margin > smallest else max(room, smallest)
    return Fraction(1, 10**12)


def step(value: Any, at: Context) -> int | float:
    """A multipleOf whose multiples are multiples in float64 arithmetic too."""
    exactly = number_of(value, "multipleOf =", at)
    if exactly.denominator & (exactly.denominator - 1):
        raise at.error(
            f"multipleOf = {value}: it is no binary fraction, so that validators do not take its multiples for such "
            "(0.3 / 0.1 is no integer): use integers, or a pattern"
        )
    return plain(exactly)


# Reading --------------------------------------------------------------------------------------------------------------


def load(text: str) -> Any:
    """Parsed JSON, if Python's numbers hold its values exactly and no object has a name twice.

    Raises:
        ValueError: otherwise.
    """
    return json.loads(text, parse_float=_float, parse_constant=_constant, object_pairs_hook=_object)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or Decimal(text) != Decimal(repr(value)):
        raise ValueError(f"the number {text} is {value!r} as float64, in which validators and engines hold it")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} stands twice in an object")
        found[name] = value
    return found
