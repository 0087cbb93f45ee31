"""Checks of a finished text that do not rely on the grammar engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol

from fastsample.integrations.grammar import formats
from fastsample.integrations.grammar.regex import Node, matches, parse

INSTALL = "pip install '.[grammar]' in a clone of fastsample"


class Check(Protocol):
    """Says what is wrong with a text, or None."""

    def __call__(self, text: str) -> str | None: ...


class OneOf:
    """The text is one of these."""

    def __init__(self, choices: list[str]) -> None:
        self._choices = frozenset(choices)

    def __call__(self, text: str) -> str | None:
        return None if text in self._choices else "it is none of the choices"


class Matches:
    """A pattern matches the text from end to end."""

    def __init__(self, tree: Node) -> None:
        self._tree = tree

    def __call__(self, text: str) -> str | None:
        return None if matches(self._tree, text) else "the pattern does not match it"


class Validates:
    """The text is JSON that jsonschema validates, formats included, and none of its objects has a name twice."""

    def __init__(self, schema: Any) -> None:
        self.schema = schema
        self._validator = validator(schema)

    def __call__(self, text: str) -> str | None:
        try:
            value = json.loads(text, object_pairs_hook=_once)
            error = next(iter(self._validator.iter_errors(value)), None)
        except ValueError as problem:
            return str(problem)
        except RecursionError:
            return "it is nested too deeply to be checked"
        return None if error is None else f"at {error.json_path}: {error.message}"

    def fits(self, value: Any, part: Any) -> bool:
        """Whether a value validates against a part of the schema."""
        try:
            return bool(self._validator.evolve(schema=part).is_valid(value))
        except import_module("referencing").exceptions.Unresolvable as error:
            raise ValueError(f"a reference leads nowhere: {error}") from None
        except RecursionError:
            raise ValueError("a reference leads back to itself") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands twice in an object")
    return found


def validator(schema: Any) -> Any:
    """jsonschema's validator of a schema, of the draft that it names.

    Raises:
        TypeError, ValueError: not a JSON Schema.
        ImportError: jsonschema is not installed.
    """
    try:
        jsonschema = import_module("jsonschema")
    except ImportError:
        raise ImportError(f"json_schema needs jsonschema: {INSTALL}") from None
    dialect = schema.get("$schema") if isinstance(schema, dict) else None
    kind = jsonschema.validators.validator_for(schema, default=None)
    if kind is None and isinstance(dialect, str):
        raise ValueError(f"json_schema: $schema {dialect!r} is no draft that jsonschema knows")
    kind = kind or jsonschema.Draft202012Validator
    if kind is jsonschema.Draft3Validator:
        raise ValueError("json_schema: draft 3 is not served")
    try:
        kind.check_schema(schema, format_checker=jsonschema.FormatChecker(formats=()))
    except jsonschema.SchemaError as error:
        raise ValueError(f"json_schema: at {error.json_path}: {error.message}") from None
    except RecursionError:
        raise ValueError("json_schema: it is nested too deeply") from None
    rules = {"pattern": _pattern, "patternProperties": _pattern_properties, "additionalProperties": _additional}
    local = import_module("referencing").Registry()  # nothing is fetched
    checker = _format_checker(jsonschema, kind)
    return jsonschema.validators.extend(kind, rules)(schema, format_checker=checker, registry=local)


def _format_checker(jsonschema: Any, kind: Any) -> Any:
    checker = jsonschema.FormatChecker(formats=())
    known = kind.FORMAT_CHECKER
    for name in formats.PATTERNS:
        checker.checks(name)(_format(name, known))
    return checker


def _format(name: str, known: Any) -> Any:
    def check(value: Any) -> bool:
        if not isinstance(value, str):
            return True
        return matches(formats.tree(name), value) and bool(known.conforms(value, name))

    return check


# jsonschema searches with `re`, which can backtrack for ever and does not know \p{Lu}.


@lru_cache(maxsize=256)
def _tree(pattern: str) -> Node:
    return parse(pattern, search=True)


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    if isinstance(instance, str) and not matches(_tree(pattern), instance):
        yield import_module("jsonschema").ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[Any]:
    for pattern, inner in patterns.items() if isinstance(instance, dict) else ():
        for name, value in instance.items():
            if matches(_tree(pattern), name):
                yield from validator.descend(value, inner, path=name, schema_path=pattern)


def _additional(validator: Any, inner: Any, instance: Any, schema: Any) -> Iterator[Any]:
    known = schema.get("properties", {})
    trees = [_tree(pattern) for pattern in schema.get("patternProperties", {})]
    for name, value in instance.items() if isinstance(instance, dict) else ():
        if name not in known and not any(matches(tree, name) for tree in trees):
            for error in validator.descend(value, inner, path=name):
                error.message = f"the property {name!r} is not allowed" if inner is False else error.message
                yield error
