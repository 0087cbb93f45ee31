"""Whether one value can satisfy two JSON Schemas. If none can, oneOf equals anyOf, which engines enforce."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastsample.integrations.grammar.values import types_of

DEPTH = 6


@dataclass
class _Said:
    """The constraints on a value by a schema and those that it includes (allOf, $ref)."""

    types: set[str] = field(default_factory=lambda: types_of({}))
    values: list[Any] | None = None
    required: set[str] = field(default_factory=set)
    properties: dict[str, list[Any]] = field(default_factory=dict)
    closed: list[set[str]] = field(default_factory=list)  # the allowed names, for each closed schema
    options: list[list[Any]] = field(default_factory=list)  # for each anyOf and oneOf


class Disjoint:
    """Tells schemas apart.

    Args:
        target: returns the schema that a reference points to.
        fits: whether a value validates against a part of the schema.
    """

    def __init__(self, target: Callable[[str], Any], fits: Callable[[Any, Any], bool]) -> None:
        self._target, self._fits = target, fits

    def __call__(self, a: Any, b: Any, depth: int = DEPTH) -> bool:
        """Whether certainly no value satisfies both."""
        if a is False or b is False:
            return True
        if depth == 0:
            return False
        one, other = self._said(a), self._said(b)
        shared = {("number" if name == "integer" else name) for name in one.types} & {
            ("number" if name == "integer" else name) for name in other.types
        }
        return (
            not shared
            or (one.values is not None and not any(self._fits(value, b) for value in one.values))
            or (other.values is not None and not any(self._fits(value, a) for value in other.values))
            or any(all(self(option, b, depth - 1) for option in options) for options in one.options)
            or any(all(self(a, option, depth - 1) for option in options) for options in other.options)
            or (shared == {"object"} and self._properties(one, other, depth))
        )

    def _properties(self, one: _Said, other: _Said, depth: int) -> bool:
        """Whether a property required by one is disjoint in the other, or is not allowed there."""
        for has, may in ((one, other), (other, one)):
            if any(has.required - names for names in may.closed):
                return True
        return any(
            self(mine, theirs, depth - 1)
            for name in one.required | other.required
            for mine in one.properties.get(name, ())
            for theirs in other.properties.get(name, ())
        )

    def _said(self, schema: Any) -> _Said:
        said, ahead, followed = _Said(), [schema], set()
        while ahead:
            part = ahead.pop()
            if not isinstance(part, dict):
                continue
            said.types &= types_of(part)
            if "enum" in part or "const" in part:
                said.values = part["enum"] if "enum" in part else [part["const"]]
            said.required |= set(part["required"]) if isinstance(part.get("required"), list) else set()
            for name, inner in part.get("properties", {}).items():
                said.properties.setdefault(name, []).append(inner)
            if part.get("additionalProperties") is False and "patternProperties" not in part:
                said.closed.append(set(part.get("properties", {})))
            said.options += [part[word] for word in ("anyOf", "oneOf") if word in part]
            ahead += part.get("allOf", ())
            if "$ref" in part and part["$ref"] not in followed:
                followed.add(part["$ref"])
                ahead.append(self._target(part["$ref"]))
        return said
