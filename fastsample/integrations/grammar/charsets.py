"""Character sets: the classes and escapes of Python's patterns as ranges of code points."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TypeAlias

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Inclusive ranges of code points, in order and not adjacent."""

ALL: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))
_SURROGATES = (0xD800, 0xDFFF)

_ASCII: dict[str, Ranges] = {
    "DIGIT": ((0x30, 0x39),),
    "WORD": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
    "SPACE": ((0x09, 0x0D), (0x20, 0x20)),
}
_ESCAPES = {"DIGIT": r"\d", "WORD": r"\w", "SPACE": r"\s"}


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same code points, in order and without overlaps."""
    out: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], high))
        else:
            out.append((low, high))
    return tuple(out)


def without(ranges: Ranges, others: Iterable[tuple[int, int]]) -> Ranges:
    """The code points of the first set that are not in the second."""
    kept: list[tuple[int, int]] = []
    holes = merged(others)
    for low, high in ranges:
        for first, last in holes:
            if last < low or first > high:
                continue
            if first > low:
                kept.append((low, first - 1))
            low = last + 1
        if low <= high:
            kept.append((low, high))
    return tuple(kept)


def charset(name: str, value: Any, flags: int) -> Ranges:
    """The characters that an item of Python's parser matches."""
    if name == "ANY":
        return ALL if flags & re.DOTALL else without(ALL, [(0x0A, 0x0A)])
    items = value if name == "IN" else [(name.removeprefix("NOT_"), value)]
    negated = name == "NOT_LITERAL" or (name == "IN" and str(items[0][0]) == "NEGATE")
    items = items[1:] if name == "IN" and negated else items
    if flags & re.IGNORECASE:
        return without(_scanned(_class(items, negated), flags & (re.IGNORECASE | re.ASCII)), [_SURROGATES])
    # A negated set excludes all that an item may match in any dialect; others have only what every dialect matches.
    ranges = merged(pair for op, code in items for pair in _item(op, code, flags, wide=negated))
    return without(ALL, ranges) if negated else without(ranges, [_SURROGATES])


def _item(op: Any, value: Any, flags: int, *, wide: bool) -> Ranges:
    if str(op) == "LITERAL":
        return ((value, value),)
    if str(op) == "RANGE":
        return (tuple(value),)
    kind = str(value).removeprefix("CATEGORY_")
    inverse, kind = kind.startswith("NOT_"), kind.removeprefix("NOT_")
    all_of_it = _ASCII[kind] if flags & re.ASCII else _scanned(_ESCAPES[kind], 0)
    if inverse:
        return without(ALL, _ASCII[kind] if wide else all_of_it)
    return all_of_it if wide else _ASCII[kind]


def _class(items: Any, negated: bool) -> str:
    """The items as a character class in Python's dialect."""
    body = ""
    for op, value in items:
        if str(op) == "CATEGORY":
            kind = str(value).removeprefix("CATEGORY_")
            escape = _ESCAPES[kind.removeprefix("NOT_")]
            body += escape.upper() if kind.startswith("NOT_") else escape
        else:
            body += "-".join(rf"\U{code:08x}" for code in ((value,) if str(op) == "LITERAL" else value))
    return f"[{'^' if negated else ''}{body}]"


@lru_cache(maxsize=64)
def _scanned(pattern: str, flags: int) -> Ranges:
    """All code points that a one-character pattern matches, by Python's own engine."""
    runs = re.finditer(f"{pattern}+", _every_character(), flags)
    return tuple((run.start(), run.end() - 1) for run in runs)


@lru_cache(maxsize=1)
def _every_character() -> str:
    return "".join(map(chr, range(0x110000)))


@lru_cache(maxsize=64)
def _of_category(category: str) -> Ranges:
    """All code points of one of Unicode's general categories, such as Lu or L."""
    codes = (code for code in range(0x110000) if unicodedata.category(chr(code)).startswith(category))
    return merged((code, code) for code in codes)


_CATEGORIES = (
    set("LMNPSZC") | {unicodedata.category(chr(code)) for code in range(0x3000)} | {"Co", "Cs", "Cn", "Zp", "Zl"}
)
_PIECE = re.compile(r"\\([pP])(?:\{(\^?)([^}]*)\}|(\w))|\\.|\(\?<(?=[A-Za-z_])|\[\^?\]?|.", re.DOTALL)


def with_properties(pattern: str) -> str:
    r"""The pattern with \p{Lu}, \PL and the like expanded, and groups named in Python's syntax."""
    pieces, inside = [], False
    for match in _PIECE.finditer(pattern):
        piece = match[0]
        if match[1]:
            name = match[3] if match[4] is None else match[4]
            name = name.removeprefix("gc=").removeprefix("General_Category=")
            if name not in _CATEGORIES:
                raise ValueError(
                    f"{piece} is not served: of Unicode's properties only general categories are, such as Lu"
                )
            ranges = _of_category(name)
            ranges = without(((0, 0x10FFFF),), ranges) if (match[1] == "P") != bool(match[2]) else ranges
            body = "".join(rf"\U{low:08x}-\U{high:08x}" for low, high in ranges)
            piece = body if inside else f"[{body}]"
        elif piece.startswith("[") and not inside:
            inside = True
        elif piece.startswith("["):
            inside = not piece.endswith("]")
        elif piece == "]":
            inside = False
        elif piece == "(?<" and not inside:
            piece = "(?P<"
        pieces.append(piece)
    return "".join(pieces)


def holds(ranges: Ranges, code: int) -> bool:
    """Whether a code point is in the set."""
    place = bisect_right(ranges, (code, 0x110000))
    return place > 0 and ranges[place - 1][1] >= code
