"""Recursive schemas: whether references loop, and whether some finite text satisfies the schema."""

from __future__ import annotations

from typing import Any

from fastsample.integrations.grammar.values import types_of

IN_PLACE = ("allOf", "anyOf", "oneOf")
"""Words whose schemas are of the same value."""


def members_of(schema: Any) -> list[Any]:
    """A schema and those that apply to the same value, without following references."""
    if not isinstance(schema, dict):
        return [schema]
    return [schema, *(m for word in IN_PLACE for inner in schema.get(word, ()) for m in members_of(inner))]


def required_of(schema: dict[str, Any]) -> list[str]:
    required = schema.get("required", [])
    return list(required) if isinstance(required, list) else []


def loops(name: str, definitions: dict[str, Any]) -> bool:
    """Whether a definition refers to itself for the same value."""
    ahead, seen = [name], set()
    while ahead:
        members = members_of(definitions[ahead.pop()])
        for other in (m["$ref"].rsplit("/", 1)[1] for m in members if isinstance(m, dict) and "$ref" in m):
            if other == name:
                return True
            if other not in seen:
                seen.add(other)
                ahead.append(other)
    return False


def is_finite(schema: Any, definitions: dict[str, Any]) -> bool:
    """Whether a text of finite length satisfies a schema; none does if the schema requires itself as a part."""
    known: dict[str, bool] = {}
    while True:
        found = {name: _ends(inner, known) for name, inner in definitions.items()}
        if found == known:
            return _ends(schema, known)
        known = found


def _ends(schema: Any, known: dict[str, bool]) -> bool:
    """Whether some finite text satisfies a schema, given the definitions known to have one."""
    if not isinstance(schema, dict):
        return False
    if "enum" in schema:
        return True
    if "$ref" in schema and not known.get(schema["$ref"].rsplit("/", 1)[1], False):
        return False
    some = (any(_ends(inner, known) for inner in schema[word]) for word in ("anyOf", "oneOf") if word in schema)
    return all(some) and all(_ends(inner, known) for inner in schema.get("allOf", ())) and _kind_ends(schema, known)


def _kind_ends(schema: dict[str, Any], known: dict[str, bool]) -> bool:
    types = types_of(schema)
    if types - {"array", "object"}:
        return True
    rest = schema.get("items", {})
    first = [*schema.get("prefixItems", ()), *[rest] * schema.get("minItems", 0)][: schema.get("minItems", 0)]
    if "array" in types and all(_ends(item, known) for item in first):
        return True
    properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    others = [schema.get("additionalProperties", {}), *patterns.values()]
    return "object" in types and all(
        _ends(properties[name], known) if name in properties else any(_ends(other, known) for other in others)
        for name in required_of(schema)
    )
