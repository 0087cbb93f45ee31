"""No name twice in an object: a grammar has no memory, so it cannot forbid this for open sets of names."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from fastsample.integrations.grammar.engines import Matcher
from fastsample.integrations.grammar.values import types_of
from fastsample.integrations.grammar.vocabulary import Vocabulary


def may_repeat(schema: Any) -> bool:
    """Whether a rewritten schema leaves some object's names open."""
    if not isinstance(schema, dict):
        return False
    types = set() if "enum" in schema else types_of(schema)
    combined = any(word in schema for word in ("$ref", "anyOf", "oneOf", "allOf")) and "type" not in schema
    if not combined or "properties" in schema:
        names_open = schema.get("additionalProperties", True) is not False or "patternProperties" in schema
        if ("object" in types and names_open) or ("array" in types and "items" not in schema):
            return True
    maps = (schema.get(word, {}).values() for word in ("$defs", "properties"))
    lists = (schema.get(word, ()) for word in ("anyOf", "oneOf", "allOf", "prefixItems"))
    inner = [part for group in (*maps, *lists) for part in group]
    return any(map(may_repeat, [*inner, schema.get("items")]))


class UniqueNames:
    """A matcher of JSON that also forbids tokens which would write a name twice."""

    def __init__(self, matcher: Matcher, vocabulary: Vocabulary) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._place = _Place()

    def fill(self, mask: torch.Tensor, row: int) -> None:
        self._matcher.fill(mask, row)
        if not (quotes := self._place.quotes_to_a_name()):
            return
        words = mask[row].numpy()
        ids = self._vocabulary.with_quotes(quotes)
        for token in ids[(words[ids >> 5] >> (ids & 31)) & 1 == 1].tolist():
            if self._repeats(token):
                words[token >> 5] &= np.int32(~(1 << (token & 31)) if token & 31 < 31 else 2**31 - 1)

    def allows(self, token: int) -> bool:
        return self._matcher.allows(token) and not self._repeats(token)

    def accept(self, token: int) -> None:
        self._matcher.accept(token)
        self._place.follow(self._vocabulary.tokens[token])

    def complete(self) -> bool:
        return self._matcher.complete()

    def _repeats(self, token: int) -> bool:
        text = self._vocabulary.tokens[token]
        return b'"' in text and not self._place.copy().follow(text)


class _Place:
    """The position in a JSON text: the open objects, their names so far, and the current string."""

    def __init__(self) -> None:
        self._names: list[set[str] | None] = []  # of each open object; None for an array
        self._string: bytearray | None = None
        self._escaped = False
        self._name_next = False  # the next string is a name

    def copy(self) -> _Place:
        other = _Place()
        other._names = [None if names is None else set(names) for names in self._names]
        other._string = None if self._string is None else bytearray(self._string)
        other._escaped, other._name_next = self._escaped, self._name_next
        return other

    def quotes_to_a_name(self) -> int:
        """The least number of quotation marks in a token that could repeat a name; 0 if there is no name yet."""
        if not any(self._names):
            return 0
        if self._string is None:
            return 2
        if not self._name_next:
            return 3
        begun, names = bytes(self._string).decode(errors="ignore"), self._names[-1] or ()
        return 1 if b"\\" in self._string or any(name.startswith(begun) for name in names) else 3

    def follow(self, text: bytes) -> bool:
        """Read on; False if a name comes twice."""
        unique = True
        for byte in text:
            if self._string is not None:
                unique &= self._in_string(byte)
            elif byte == 0x22:  # "
                self._string = bytearray()
            elif byte in b"{[":
                self._names.append(set() if byte == 0x7B else None)
                self._name_next = byte == 0x7B
            elif byte in b"}]":
                self._names.pop()
                self._name_next = False
            elif byte == 0x2C:  # ,
                self._name_next = self._names[-1] is not None
        return unique

    def _in_string(self, byte: int) -> bool:
        string = self._string
        assert string is not None
        if self._escaped or byte != 0x22:
            self._escaped = byte == 0x5C and not self._escaped
            string.append(byte)
            return True
        self._string = None
        names = self._names[-1] if self._names else None
        if names is None or not self._name_next:
            return True
        self._name_next = False
        name = json.loads(b'"' + bytes(string) + b'"')
        new = name not in names
        names.add(name)
        return new
