"""Regular expressions in Python's dialect, parsed once into a tree that every engine gets in the same plain form.

Engines disagree on what an escape, an anchor or a class means, and some take what they do not know for letters. So a
pattern is parsed here, by Python's own parser, and only parts with one meaning are kept: sets of characters,
sequences, alternatives and repetitions. All else (look-around, backreferences, word boundaries, atomic groups) is
refused.

The tree matches a subset of what `re.fullmatch` matches: \\d, \\w and \\s are their ASCII characters, while \\D, \\W,
\\S and [^...] exclude everything that Python's Unicode classes exclude.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from typing import Any, TypeAlias

from fastsample.integrations.grammar.charsets import ALL, Ranges, charset, holds, with_properties, without

_parser: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

LARGEST = 100_000
"""Most characters of a pattern with its repetitions written out: beyond it engines take seconds and fail."""


@dataclass(frozen=True)
class Chars:
    """One character of a set; the empty set matches nothing."""

    ranges: Ranges


@dataclass(frozen=True)
class Sequence:
    """One part after another; without parts, the empty text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Either:
    """One of the options."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """A part, `least` to `most` times (None: without a limit)."""

    part: Node
    least: int
    most: int | None


@dataclass(frozen=True)
class Anchor:
    """The beginning of the text, or its end; a finished tree has none."""

    start: bool


Node: TypeAlias = Chars | Sequence | Either | Repeat | Anchor
EMPTY = Sequence(())
NEVER = Chars(())
ANY_TEXT = Repeat(Chars(ALL), 0, None)


# Reading --------------------------------------------------------------------------------------------------------------


def parse(pattern: str, *, search: bool = False) -> Node:
    """The tree of the texts that a pattern matches from end to end or, with `search`, in part.

    Raises:
        ValueError: not a pattern, or one with a refused construct; the message says which and where.
    """
    try:
        parsed = _parsed(pattern)
        whole = _searched(_read(parsed, parsed.state.flags)) if search else _matched(_read(parsed, parsed.state.flags))
    except (re.error, OverflowError) as error:
        raise ValueError(f"not a pattern: {error}") from None
    except RecursionError:
        raise ValueError("its groups are nested too deeply") from None
    if whole == NEVER:
        raise ValueError("it matches no text")
    if size(whole) > LARGEST:
        raise ValueError(
            f"with its repetitions written out it has {size(whole)} characters; at most {LARGEST} are served"
        )
    return whole


def _parsed(pattern: str) -> Any:
    """The pattern as Python's parser reads it, unless other dialects read it differently."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parsed = _parser.parse(with_properties(pattern))
    for warning in caught:
        if "nested set" not in str(warning.message) or "[[:" in pattern:
            raise ValueError(f"not the same in every dialect: {warning.message}")
    return parsed


def _matched(tree: Node) -> Node:
    return _unanchor(tree, True, True)


def _searched(tree: Node) -> Node:
    ways = [way for half in _open_end(tree, True) for way in _open_end(half, False)]
    return either(_unanchor(way, True, True) for way in ways)


def _read(items: Any, flags: int) -> Node:
    return sequence(_read_one(op, value, flags) for op, value in items)


def _read_one(op: Any, value: Any, flags: int) -> Node:
    name = str(op)
    if name in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
        return Chars(charset(name, value, flags))
    if name == "BRANCH":
        return either(_read(option, flags) for option in value[1])
    if name == "SUBPATTERN":
        _, added, removed, inner = value
        return _read(inner, (flags | added) & ~removed)
    if name in ("MAX_REPEAT", "MIN_REPEAT"):  # greediness does not change which texts match
        least, most, inner = value
        return repeat(_read(inner, flags), least, None if most == _parser.MAXREPEAT else most)
    if name == "AT" and str(value) in _ANCHORS:
        if flags & re.MULTILINE and not str(value).endswith("STRING"):
            raise ValueError("^ and $ of lines, (?m), are not served")
        return Anchor(_ANCHORS[str(value)])
    raise ValueError(f"{_REFUSED.get(name, name)} is not served")


_ANCHORS = {"AT_BEGINNING": True, "AT_BEGINNING_STRING": True, "AT_END": False, "AT_END_STRING": False}
_REFUSED = {
    "AT": r"a word boundary, \b or \B,",
    "ASSERT": "look-around, (?=...) or (?<=...),",
    "ASSERT_NOT": "negative look-around, (?!...) or (?<!...),",
    "GROUPREF": r"a backreference, \1 or (?P=name),",
    "GROUPREF_EXISTS": "a condition, (?(1)...),",
    "ATOMIC_GROUP": "an atomic group, (?>...),",
    "POSSESSIVE_REPEAT": "a possessive repetition, such as a*+,",
}


def sequence(parts: Iterable[Node]) -> Node:
    """The parts in sequence, simplified."""
    flat: list[Node] = []
    for part in parts:
        flat += part.parts if isinstance(part, Sequence) else [part]
    if NEVER in flat:
        return NEVER
    return flat[0] if len(flat) == 1 else Sequence(tuple(flat))


def either(options: Iterable[Node]) -> Node:
    """One of the options, without those that match nothing."""
    kept = tuple(dict.fromkeys(option for option in options if option != NEVER))
    return NEVER if not kept else kept[0] if len(kept) == 1 else Either(kept)


def repeat(part: Node, least: int, most: int | None) -> Node:
    """The part repeated, simplified."""
    if most == 0 or part == EMPTY or (part == NEVER and least == 0):
        return EMPTY
    return part if part == NEVER or (least, most) == (1, 1) else Repeat(part, least, most)


# Anchors --------------------------------------------------------------------------------------------------------------


def _unanchor(node: Node, first: bool, last: bool) -> Node:
    """Remove the anchors that hold because the node is first in the text, last in it, or both."""
    if isinstance(node, Anchor):
        if first if node.start else last:
            return EMPTY
        raise ValueError(f"an inner {'^' if node.start else '$'} is not served: it belongs at an end of the pattern")
    if isinstance(node, Either):
        return either(_unanchor(option, first, last) for option in node.options)
    if isinstance(node, Repeat):
        once = node.most == 1
        return repeat(_unanchor(node.part, first and once, last and once), node.least, node.most)
    if isinstance(node, Sequence):
        parts, count = node.parts, len(node.parts)
        before = [first and all(_empty(part) for part in parts[:i]) for i in range(count)]
        after = [last and all(_empty(part) for part in parts[i + 1 :]) for i in range(count)]
        return sequence(_unanchor(part, b, a) for part, b, a in zip(parts, before, after, strict=True))
    return node


def _empty(node: Node) -> bool:
    """Whether the node never consumes a character."""
    if isinstance(node, Sequence):
        return all(map(_empty, node.parts))
    if isinstance(node, Either):
        return all(map(_empty, node.options))
    return _empty(node.part) if isinstance(node, Repeat) else isinstance(node, Anchor)


def _open_end(node: Node, start: bool) -> list[Node]:
    """The node with any text allowed at this end, except in options with an anchor there; removes those anchors."""
    parts = node.parts if isinstance(node, Sequence) else (node,)
    if not parts:
        return [ANY_TEXT]
    edge = parts[0 if start else -1]
    rest = parts[1:] if start else parts[:-1]
    if isinstance(edge, Anchor) and edge.start == start:
        again = rest and rest[0 if start else -1] == edge
        return _open_end(sequence(rest), start) if again else [sequence(rest)]
    if isinstance(edge, (Either, Repeat)) and _anchored(edge, start):
        if isinstance(edge, Repeat) and edge.most != 1:
            raise ValueError("a repeated ^ or $ is not served")
        inner = edge.options if isinstance(edge, Either) else (EMPTY, edge.part)[1 if edge.least else 0 :]
        whole = (sequence((option, *rest) if start else (*rest, option)) for option in inner)
        return [option for way in whole for option in _open_end(way, start)]
    return [sequence((ANY_TEXT, *parts) if start else (*parts, ANY_TEXT))]


def _anchored(node: Node, start: bool) -> bool:
    """Whether the node contains an anchor of this end."""
    if isinstance(node, Anchor):
        return node.start == start
    return any(_anchored(part, start) for part in _parts(node))


def _parts(node: Node) -> tuple[Node, ...]:
    """The node's children."""
    if isinstance(node, Sequence):
        return node.parts
    if isinstance(node, Either):
        return node.options
    return (node.part,) if isinstance(node, Repeat) else ()


# Writing, measuring, matching -----------------------------------------------------------------------------------------


def rust(node: Node) -> str:
    """The tree in the dialect of Rust's regex crates, independent of flags."""
    if isinstance(node, Chars):
        if len(node.ranges) == 1 and node.ranges[0][0] == node.ranges[0][1]:
            code = node.ranges[0][0]
            return chr(code) if chr(code).isascii() and chr(code).isalnum() else rf"\x{{{code:X}}}"
        return "[" + "".join(rf"\x{{{low:X}}}-\x{{{high:X}}}" for low, high in node.ranges) + "]"
    if isinstance(node, Either):
        return "(?:" + "|".join(map(rust, node.options)) + ")"
    if isinstance(node, Repeat):
        part = rust(node.part)
        return (part if isinstance(node.part, Chars) else f"(?:{part})") + _count(node)
    return "".join(map(rust, _parts(node)))


def ebnf(node: Node) -> str:
    """The tree as the right-hand side of a rule in xgrammar's notation."""
    if isinstance(node, Chars):
        return "[" + "".join(f"{_code(low)}-{_code(high)}" for low, high in node.ranges) + "]"
    if isinstance(node, Either):
        return "(" + " | ".join(map(ebnf, node.options)) + ")"
    if isinstance(node, Repeat):
        return f"({ebnf(node.part)}){_count(node)}"
    return " ".join(map(ebnf, _parts(node))) or '""'


def _code(code: int) -> str:
    return rf"\U{code:08x}"


def _count(node: Repeat) -> str:
    named = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    most = "" if node.most is None else node.most
    return named.get((node.least, node.most)) or f"{{{node.least},{most}}}"


def size(node: Node) -> int:
    """Characters in the tree, with its repetitions written out."""
    if isinstance(node, Chars):
        return 1
    times = max(1, node.least if node.most is None else node.most) if isinstance(node, Repeat) else 1
    return times * sum(map(size, _parts(node)))


def within(node: Node, allowed: Ranges) -> Node:
    """The tree restricted to texts of allowed characters."""
    if isinstance(node, Chars):
        return Chars(without(node.ranges, without(((0, 0x10FFFF),), allowed)))
    if isinstance(node, Sequence):
        return sequence(within(part, allowed) for part in node.parts)
    if isinstance(node, Either):
        return either(within(option, allowed) for option in node.options)
    return repeat(within(node.part, allowed), node.least, node.most) if isinstance(node, Repeat) else node


def matches(node: Node, text: str) -> bool:
    """Whether the tree matches the text, without backtracking: the time is polynomial in their sizes."""
    return len(text) in _ends(node, text, frozenset([0]))


def _ends(node: Node, text: str, starts: frozenset[int]) -> frozenset[int]:
    """The positions where matches may end that begin at one of these positions."""
    if isinstance(node, Chars):
        return frozenset(i + 1 for i in starts if i < len(text) and holds(node.ranges, ord(text[i])))
    if isinstance(node, Either):
        return frozenset().union(*(_ends(option, text, starts) for option in node.options))
    if isinstance(node, Repeat):
        return _repeated_ends(node, text, starts)
    return reduce(lambda places, part: _ends(part, text, places), _parts(node), starts)


def _repeated_ends(node: Repeat, text: str, starts: frozenset[int]) -> frozenset[int]:
    for _ in range(node.least):
        starts = _ends(node.part, text, starts)
        if not starts:
            return starts
    reached = fresh = starts
    times = node.least
    while fresh and (node.most is None or times < node.most):
        fresh = _ends(node.part, text, fresh) - reached
        reached, times = reached | fresh, times + 1
    return reached
