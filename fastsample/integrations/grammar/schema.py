"""JSON Schemas, rewritten so that an engine can enforce every word of them, or refused with the place and the reason.

The result uses a short list of keywords, each in one spelling: references point to `$defs`, numbers are exact, patterns
and formats are anchored patterns of one dialect, and an object that names its properties has no others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from decimal import ROUND_CEILING, ROUND_FLOOR
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from fastsample.integrations.grammar import formats
from fastsample.integrations.grammar.disjoint import Disjoint
from fastsample.integrations.grammar.endings import IN_PLACE, is_finite, loops, members_of, required_of
from fastsample.integrations.grammar.regex import NEVER, Node, parse, rust, within
from fastsample.integrations.grammar.values import (
    JSON_CHARACTERS,
    Context,
    above,
    below,
    bounds,
    exact,
    plain,
    rounded,
    step,
    types_of,
    writable,
)

LARGEST_COUNT = 100_000
LARGEST_LENGTH = 1_000_000


ANNOTATIONS = frozenset(
    {
        *("title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "nullable"),
        *("$schema", "$comment", "$defs", "definitions", "$vocabulary", "$anchor", "id", "xml", "externalDocs"),
        *("contentMediaType", "contentEncoding", "discriminator"),
    }
)
_SAYS_WHAT_ELSE = ("additionalProperties", "patternProperties", "propertyNames", "unevaluatedProperties")
_WORDS = frozenset(
    {
        *("type", "enum", "const", "$ref", *IN_PLACE, "properties", "required", "additionalProperties"),
        *("patternProperties", "propertyNames", "minProperties", "maxProperties", "items", "prefixItems"),
        *("additionalItems", "minItems", "maxItems", "uniqueItems", "minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    }
)


class Rewriter:
    """Rewrites one schema.

    Args:
        root: the schema, already checked by check_schema.
        strict: whether objects that name their properties, without saying what else they may have, are closed.
        fits: whether a value validates against a part of the schema.
    """

    def __init__(self, root: Any, *, strict: bool, fits: Callable[[Any, Any], bool]) -> None:
        self._root, self._strict, self._fits = root, strict, fits
        self._draft4 = isinstance(root, dict) and "draft-04" in str(root.get("$schema", ""))
        self._definitions: dict[str, Any] = {}
        self._keys: dict[tuple[str, frozenset[str], bool], str] = {}

    def rewritten(self) -> dict[str, Any] | bool:
        """The whole schema.

        Raises:
            ValueError: no engine can enforce it, or no text of finite length satisfies it.
        """
        out = self._schema(self._root, Context())
        for (pointer, *_), name in self._keys.items():
            if loops(name, self._definitions):
                raise ValueError(f"$ref {pointer!r} leads back to itself without a step into the value")
        if not is_finite(out, self._definitions):
            raise ValueError("no text of finite length satisfies it")
        return {**out, "$defs": self._definitions} if isinstance(out, dict) and self._definitions else out

    def _schema(self, schema: Any, at: Context) -> Any:
        if isinstance(schema, bool):
            return {} if schema else False
        words = {word for word in schema if word not in ANNOTATIONS and not word.startswith("x-")}
        if "$id" in words and at.path:
            raise at.error("'$id' inside a schema changes what references mean, and is not served")
        for word in sorted(words - _WORDS - {"$id"}):
            raise at.error(f"no engine enforces {word!r}")
        if "enum" in words or "const" in words:
            return {"enum": self._values(schema, at)}
        out: dict[str, Any] = {}
        types = types_of(schema)
        if "type" in schema:
            out["type"] = schema["type"]
        self._numbers(schema, types, at, out)
        also = _strings(schema, types, at, out)
        self._arrays(schema, at, out)
        self._objects(schema, at, out)
        self._in_place(schema, at, out)
        if also:
            out["allOf"] = [*out.get("allOf", []), *also]
        return out

    # References and combinations --------------------------------------------------------------------------------------

    def _target(self, pointer: str, at: Context) -> tuple[Any, tuple[str, ...]]:
        """The schema that a reference points to."""
        if pointer != "#" and not pointer.startswith("#/"):
            raise at.error(f"$ref {pointer!r}: only references within the schema, '#/...', are served")
        keys = [unquote(key).replace("~1", "/").replace("~0", "~") for key in pointer.split("/")[1:]]
        found = self._root
        for key in keys:
            if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, dict) and key in found:
                found = found[key]
            else:
                raise at.error(f"$ref {pointer!r} leads nowhere")
        if not isinstance(found, (dict, bool)):
            raise at.error(f"$ref {pointer!r} does not lead to a schema")
        return found, tuple(keys)

    def _reference(self, pointer: str, at: Context) -> str:
        """The name of the rewritten definition for a reference's target."""
        target, path = self._target(pointer, at)
        key = (pointer, at.names, at.decided)
        if key not in self._keys:
            self._keys[key] = name = str(len(self._keys))
            self._definitions[name] = {}  # a placeholder: the definition may refer to itself
            self._definitions[name] = self._schema(target, replace(at, path=path))
        return self._keys[key]

    def _in_place(self, schema: dict[str, Any], at: Context, out: dict[str, Any]) -> None:
        """The schemas that apply to the same value."""
        members = [(word, i, inner) for word in IN_PLACE for i, inner in enumerate(schema.get(word, ()))]
        if "$ref" in schema:
            members.append(("$ref", 0, {"$ref": schema["$ref"]}))
        own = {word: value for word, value in schema.items() if word not in (*IN_PLACE, "$ref")}
        for word, i, member in members:
            # The other branches of anyOf and oneOf need not hold where this one does.
            others = [m for w, j, m in members if w != word or (word == "allOf" and j != i)]
            names, decided = self._named([own, *others])
            around = replace(at, names=at.names | names, decided=at.decided or decided)
            if word == "$ref":
                out["$ref"] = f"#/$defs/{self._reference(schema['$ref'], around)}"
            else:
                branch = self._schema(member, replace(around, path=(*at.path, word, str(i))))
                out.setdefault(word, []).append(branch)
        if "oneOf" in out:
            self._one_of(schema["oneOf"], at)
            branches = out.pop("oneOf")
            if "anyOf" in out:
                out["allOf"] = [*out.get("allOf", []), {"anyOf": branches}]
            else:
                out["anyOf"] = branches

    def _one_of(self, branches: list[Any], at: Context) -> None:
        """Refuse branches that may hold together; for disjoint ones, oneOf is the same as anyOf."""
        disjoint = Disjoint(lambda pointer: self._target(pointer, at)[0], self._fits)
        for j, second in enumerate(branches):
            for i, first in enumerate(branches[:j]):
                if not disjoint(first, second):
                    raise at.error(f"oneOf: a value might satisfy branch {i} and branch {j}, which no engine prevents")

    def _named(self, schemas: Iterable[Any], seen: tuple[str, ...] = ()) -> tuple[frozenset[str], bool]:
        """The properties named by these schemas of one value, and whether one of them says what else is allowed."""
        names: frozenset[str] = frozenset()
        decided = False
        for schema in schemas:
            for member in members_of(schema):
                if not isinstance(member, dict):
                    continue
                names |= {*member.get("properties", ()), *required_of(member)}
                decided |= any(word in member for word in _SAYS_WHAT_ELSE)
                pointer = member.get("$ref")
                if pointer is not None and pointer not in seen:
                    more, other = self._named([self._target(pointer, Context())[0]], (*seen, pointer))
                    names, decided = names | more, decided or other
        return names, decided

    # Values and numbers -----------------------------------------------------------------------------------------------

    def _values(self, schema: dict[str, Any], at: Context) -> list[Any]:
        """The values of an enum or const that satisfy the rest of the schema."""
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        fitting = [value for value in values if self._fits(value, schema)]
        if not fitting:
            raise at.error("none of its values satisfies the rest of the schema")
        return [exact(value, at) for value in fitting]

    def _numbers(self, schema: dict[str, Any], types: set[str], at: Context, out: dict[str, Any]) -> None:
        if not types & {"number", "integer"}:
            return
        whole = "number" not in types
        low = bounds(schema, "minimum", "exclusiveMinimum", at)
        high = bounds(schema, "maximum", "exclusiveMaximum", at)
        name = schema.get("format")
        if name in formats.INTEGERS and whole:
            lowest, highest = formats.INTEGERS[name]
            low, high = [*low, (Fraction(lowest), False)], [*high, (Fraction(highest), False)]
        least = max(((above(*bound, whole, high), bound) for bound in low), default=None)
        most = min(((below(*bound, whole, low), bound) for bound in high), default=None)
        for word, limit in (("minimum", least), ("maximum", most)):
            if limit is not None:
                toward = ROUND_CEILING if word == "minimum" else ROUND_FLOOR
                out[word] = plain(limit[0] if whole else rounded(limit[0], toward))
        if least is not None and most is not None and least[0] > most[0]:
            raise at.error("no number is within its bounds")
        if "multipleOf" in schema:
            out["multipleOf"] = every = step(schema["multipleOf"], at)
            if least is not None and most is not None and math.ceil(least[0] / every) * every > most[0]:
                raise at.error(f"no multiple of {every} is within its bounds")

    # Arrays and objects -----------------------------------------------------------------------------------------------

    def _arrays(self, schema: dict[str, Any], at: Context, out: dict[str, Any]) -> None:
        out |= _counts(schema, ("minItems", "maxItems"), at)
        if schema.get("uniqueItems") and out.get("maxItems", 2) > 1:
            raise at.error("no engine enforces 'uniqueItems' (a set): take a list, and drop what is there twice")
        items, first = schema.get("items"), schema.get("prefixItems")
        if isinstance(items, list):  # before draft 2020-12
            first, items = items, schema.get("additionalItems")
        if first is not None:
            out["prefixItems"] = [self._schema(f, at.inside("prefixItems", str(i))) for i, f in enumerate(first)]
        if items is not None:
            out["items"] = self._schema(items, at.inside("items"))

    def _objects(self, schema: dict[str, Any], at: Context, out: dict[str, Any]) -> None:
        out |= _counts(schema, ("minProperties", "maxProperties"), at)
        if "properties" in schema:
            out["properties"] = {
                writable(name, at): self._schema(inner, at.inside("properties", name))
                for name, inner in schema["properties"].items()
            }
        if required := required_of(schema):
            out["required"] = [writable(name, at) for name in required]
        if "patternProperties" in schema:
            out["patternProperties"] = {
                _anchored(_tree(pattern, at)): self._schema(inner, at.inside("patternProperties", pattern))
                for pattern, inner in schema["patternProperties"].items()
            }
            shorthand = next((p for p in schema["patternProperties"] if re.search(r"\\[dwsDWS]", p)), None)
            if shorthand is not None and schema.get("additionalProperties") is not False:
                raise at.error(
                    f"patternProperties {shorthand!r}: which names \\d, \\w and \\s leave to additionalProperties is "
                    "up to the validator: write [0-9], or additionalProperties false"
                )
        if "additionalProperties" in schema:
            more = self._schema(schema["additionalProperties"], at.inside("additionalProperties"))
            out["additionalProperties"] = more
        if "propertyNames" in schema:
            self._names(schema, at, out)
        self._close(schema, at, out)

    def _names(self, schema: dict[str, Any], at: Context, out: dict[str, Any]) -> None:
        """Express propertyNames by patternProperties, if it constrains nothing but the names."""
        names = schema["propertyNames"]
        followed: set[str] = set()
        while isinstance(names, dict) and "$ref" in names and names["$ref"] not in followed:
            followed.add(names["$ref"])
            names = self._target(names["$ref"], at)[0]
        if names is True or names == {"type": "string"}:
            return
        said = set(names) - ANNOTATIONS - {"type"} if isinstance(names, dict) else {"false"}
        simple = said in ({"pattern"}, {"enum"}, {"const"}) and not {"properties", "patternProperties"} & set(schema)
        if not simple or names.get("type", "string") != "string":
            raise at.error("no engine enforces this 'propertyNames'")
        rest = out.pop("additionalProperties", {})
        if "pattern" in names:
            out["patternProperties"] = {_anchored(_tree(names["pattern"], at)): rest}
        else:
            allowed = [name for name in self._values(names, at) if isinstance(name, str)]
            out["properties"] = {writable(name, at): rest for name in allowed}
        out["additionalProperties"] = False

    def _close(self, schema: dict[str, Any], at: Context, out: dict[str, Any]) -> None:
        """Allow no properties other than those named by this and other schemas of the same value."""
        if not self._strict or "properties" not in schema:
            return
        out.setdefault("type", "object")  # a string would satisfy a list of properties too; an object is meant
        if any(word in schema for word in _SAYS_WHAT_ELSE):
            return
        names, decided = self._named([{word: schema[word] for word in (*IN_PLACE, "$ref") if word in schema}])
        if at.decided or decided:
            return
        for name in sorted({*names, *at.names, *required_of(schema)} - set(out["properties"])):
            out["properties"][writable(name, at)] = {}
        out["additionalProperties"] = False


def _counts(
    schema: dict[str, Any], words: tuple[str, str], at: Context, largest: int = LARGEST_COUNT
) -> dict[str, int]:
    """The limits of a count, as integers."""
    given = {word: int(schema[word]) for word in words if word in schema}
    for word, count in given.items():
        if count > largest:
            raise at.error(f"{word} = {count}: at most {largest} are served")
    if given.get(words[0], 0) > given.get(words[1], largest):
        raise at.error(f"{words[0]} = {given[words[0]]} is greater than {words[1]} = {given[words[1]]}")
    return {word: count for word, count in given.items() if (word, count) != (words[0], 0)}


# Strings --------------------------------------------------------------------------------------------------------------


def _strings(schema: dict[str, Any], types: set[str], at: Context, out: dict[str, Any]) -> list[dict[str, Any]]:
    """Write the constraints on strings; returns further schemas if it takes more than one pattern."""
    name = schema.get("format")
    if "string" not in types:
        known = formats.ANY_NUMBER | set(formats.INTEGERS) if types & {"number", "integer"} else set()
        if name is not None and name not in known | set(formats.PATTERNS) | formats.ANY_STRING:
            raise at.error(f"nothing here checks the format {name!r}")
        return []
    out |= _counts(schema, ("minLength", "maxLength"), at, LARGEST_LENGTH)
    trees = [_tree(schema["pattern"], at)] if "pattern" in schema else []
    if name in formats.PATTERNS:
        trees.append(_writable_tree(formats.tree(name), at))
    elif name is not None and name not in formats.ANY_STRING:
        raise at.error(f"nothing here checks the format {name!r}")
    patterns = [_anchored(tree) for tree in trees]
    if patterns:
        out["pattern"] = patterns[0]
    return [{"pattern": pattern} for pattern in patterns[1:]]


def _tree(pattern: str, at: Context) -> Node:
    try:
        tree = parse(pattern, search=True)
    except ValueError as error:
        raise at.error(f"pattern {pattern!r}: {error}") from None
    return _writable_tree(tree, at)


def _writable_tree(tree: Node, at: Context) -> Node:
    kept = within(tree, JSON_CHARACTERS)
    if kept == NEVER:
        raise at.error("its strings are of control characters, which are not written")
    return kept


def _anchored(tree: Node) -> str:
    return f"^(?:{rust(tree)})$"
