"""JSON schemas: whatever is served, no finished text breaks it; what cannot be held is refused with its place."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import pathlib
import random
import re
import sys
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jsonschema
import numpy as np
import pydantic
import pytest
import torch
from transformers import AutoTokenizer
from typing_extensions import TypedDict

from fastsample.cli.model import shipped_model
from fastsample.integrations.grammar import Grammar, GrammarBatch, GrammarCompiler
from fastsample.integrations.grammar.engines import ENGINES, LLGuidance

EOS, V = 0, 4096


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(shipped_model())


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def ids_of(grammar: Grammar, text: str) -> list[int]:
    """The text, a byte a token."""
    single = {token: i for i, token in enumerate(grammar.vocabulary.tokens) if len(token) == 1}
    return [single[bytes([byte])] for byte in text.encode()]


def takes(grammar: Grammar, text: str) -> bool:
    return grammar.is_complete(ids_of(grammar, text))


def walk(grammar: Grammar, rng: random.Random, limit: int = 250) -> str | None:
    """The text of tokens drawn at random from what is allowed; None where it does not end."""
    batch, tokens = GrammarBatch([grammar], [EOS]), grammar.vocabulary.tokens
    for step in range(limit):
        words = batch.bitmask(torch.zeros(1, V))[0].numpy()
        ids = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        if EOS in ids and (len(ids) == 1 or rng.random() < 0.4):
            batch.accept([EOS])
            return batch.text(0).decode()
        ids = [i for i in ids if i != EOS]
        if step > 25 and rng.random() < 0.8:  # towards an end
            ids = [i for i in ids if set(tokens[i]) & set(b'"]}0123456789')] or ids
        batch.accept([rng.choice(ids)])
    return None


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), "a name stands twice"
    return dict(pairs)


def check(text: str, schema: Any) -> None:
    """What a user would do with it."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    value = json.loads(text, object_pairs_hook=once)
    jsonschema.validate(value, schema, cls=kind, format_checker=kind.FORMAT_CHECKER)


# Random schemas -------------------------------------------------------------------------------------------------------

LEAVES: list[Any] = [
    *({"type": name} for name in ("boolean", "null", "integer", "number", "string", "object", "array")),
    *({"type": "string", "format": name} for name in ("date", "time", "date-time", "duration", "email", "hostname")),
    *({"type": "string", "format": name} for name in ("ipv4", "ipv6", "uuid", "uri", "json-pointer", "base64")),
    *(
        {"type": "string", "pattern": p}
        for p in ("^[a-z]{2,4}$", "a", r"^\d+$", "^(foo|bar)", r"^\w+@\w+\.com$", r"\D")
    ),
    *(
        {"type": "string", "pattern": p}
        for p in ('^"q\\\\"$', "^(a|b|)$", r"^\p{Lu}", "(?i)^hello$", "^.{2,3}$", "x$|^y")
    ),
    {"enum": ["a", 1, 2.5, None, [1, {"k": "é"}]]},
    {"const": {"a": 1, "b": [1.0]}},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": "string", "minLength": 2, "maxLength": 4, "pattern": "[a-c]"},
    {},
]
NUMBERS = [0, 1, -1, 0.5, -0.5, 0.1, 0.25, 2, 10, 100, -7, 1.5, 99.99, 0.001, 123456, -3.75, 1e-6, 0.9357926558382952]
NAMES = ["a", "b", "é", "a b", 'q"', "x\\y", "/", "1", "_id", "ключ"]


def random_schema(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random() * (0.55 if depth > 2 else 1)
    if kind < 0.2:
        words = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
        bounds = {word: rng.choice(NUMBERS) for word in words if rng.random() < 0.4}
        step = {"multipleOf": rng.choice([2, 3, 0.5, 7])} if rng.random() < 0.15 else {}
        return {"type": rng.choice(["number", "integer"]), **bounds, **step}
    if kind < 0.55:
        return rng.choice(LEAVES)
    if kind < 0.75:
        names = rng.sample(NAMES, rng.randint(0, 4))
        made: dict[str, Any] = {"type": "object", "properties": {n: random_schema(rng, depth + 1) for n in names}}
        made["required"] = [name for name in names if rng.random() < 0.5]
        more = rng.random()
        if more < 0.3:
            made["additionalProperties"] = rng.choice([False, {"type": "integer"}, {"type": "null"}])
        elif more < 0.4:
            made["patternProperties"] = {"^x": random_schema(rng, depth + 2)}
        if rng.random() < 0.2:
            made["allOf"] = [{"properties": {"z": random_schema(rng, depth + 2)}}]
        return made
    if kind < 0.87:
        least = rng.randint(0, 2)
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": least, "maxItems": least + 2}
    return {rng.choice(["anyOf", "oneOf", "allOf"]): [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}


@pytest.mark.parametrize(("backend", "count"), [("llguidance", 160), ("xgrammar", 100)])
def test_random_walks_through_random_schemas_validate(tokenizer: Any, backend: str, count: int) -> None:
    served = ended = 0
    for seed in range(count):
        rng = random.Random(seed)
        compiler = GrammarCompiler(tokenizer, backend=backend, any_whitespace=seed % 4 == 0)
        schema = random_schema(rng)
        try:
            grammar = compiler.json_schema(schema, strict=seed % 5 != 0)
        except ValueError:
            continue
        served += 1
        for way in range(3):
            text = walk(grammar, random.Random(way))
            if text is None:
                continue
            ended += 1
            assert takes(grammar, text) or backend != "llguidance", text
            if "\\\\p{" not in json.dumps(schema):  # which jsonschema's own `re` does not know
                check(text, schema)
    assert served > count / 8
    assert ended > 2 * served


# Numbers --------------------------------------------------------------------------------------------------------------

HUGE = 1234567890123456789


@pytest.mark.parametrize("backend", ENGINES)
def test_large_integers_are_exact_or_refused(tokenizer: Any, backend: str) -> None:
    compiler = GrammarCompiler(tokenizer, backend=backend)
    for value in (HUGE, 10**30, -(2**53) - 1):
        for schema in ({"enum": [value]}, {"const": value}, {"type": "integer", "enum": [value, "x"]}):
            grammar = compiler.json_schema(schema)
            assert takes(grammar, str(value))
            assert not takes(grammar, str(int(float(value)))) or int(float(value)) == value
        for inner in ({"enum": [value]}, {"const": [{"k": value}]}, {"type": "integer", "minimum": value}):
            with pytest.raises(ValueError, match=r"at properties\.n: .*2\*\*53"):
                compiler.json_schema({"type": "object", "properties": {"n": inner}})
        with pytest.raises(ValueError, match=r"minimum = .*2\*\*53"):
            compiler.json_schema({"type": "integer", "minimum": value, "maximum": value})


def test_integers_without_a_bound_end(compiler: GrammarCompiler) -> None:
    """A small model goes on with digits as long as it may."""
    inside, outside = ("0", "-7", str(10**18), str(-(10**18))), (str(10**18 + 1), "9" * 30, "-" + "1" * 25)
    schemas: list[Any] = [{"type": "integer"}, {"type": ["integer", "null"]}, {"allOf": [{"type": "integer"}]}]
    for schema in schemas:
        grammar = compiler.json_schema(schema)
        assert all(takes(grammar, text) for text in inside)
        assert not any(takes(grammar, text) for text in outside)
    grammar = compiler.json_schema({"type": "array", "items": {"type": "integer", "exclusiveMinimum": 4}})
    assert takes(grammar, "[5, 6]")
    assert not takes(grammar, "[4]")
    assert not takes(grammar, f"[{outside[0]}]")


def test_numbers_that_float64_does_not_hold_are_refused(compiler: GrammarCompiler) -> None:
    for number in ("1e400", "-1e400", "0.1000000000000000055511151231257827", "1e-400", "NaN", "-Infinity"):
        with pytest.raises(ValueError, match=f"json_schema: not JSON: .*{re.escape(number)}"):
            compiler.json_schema('{"enum": [%s]}' % number)  # noqa: UP031
    with pytest.raises(ValueError, match="JSON compliant"):
        compiler.json_schema({"const": float("inf")})


def test_constant_numbers_are_the_very_same(compiler: GrammarCompiler) -> None:
    rng = random.Random(5)
    served = 0
    for _ in range(300):
        value = rng.choice(
            [round(rng.uniform(-1e3, 1e3), rng.randint(0, 12)), rng.random(), rng.randint(-(2**53), 2**53)]
        )
        try:
            grammar = compiler.json_schema({"type": "array", "items": {"const": value}, "minItems": 1, "maxItems": 1})
        except ValueError:
            assert len(repr(value).strip("-").replace(".", "")) > 15  # digits
            continue
        served += 1
        text = walk(grammar, rng)
        assert text is not None
        assert json.loads(text) == [value]
    assert served > 100
    one = compiler.json_schema({"properties": {"a": {"enum": [1.0, -0.0]}}, "required": ["a"]})
    assert [takes(one, f'{{"a": {text}}}') for text in ("1", "0", "1.5", "true")] == [True, True, False, False]


def test_bounds_that_are_left_out(compiler: GrammarCompiler) -> None:
    for bounds in ({"exclusiveMinimum": 0, "maximum": 0.5}, {"exclusiveMinimum": 0, "exclusiveMaximum": 1}):
        grammar = compiler.json_schema({"type": "number", **bounds})
        assert not any(takes(grammar, text) for text in ("0", "0.0", "-0.0", "0.000", "1", "1.0", "0e0", "1e-999"))
        assert takes(grammar, "0.25")
        assert not takes(grammar, "0.99999999999999999999999")
    near = compiler.json_schema({"type": "number", "exclusiveMinimum": 0.1, "exclusiveMaximum": 0.1000004})
    assert takes(near, "0.1000002")
    assert not takes(near, "0.1")
    with pytest.raises(ValueError, match="no number is within"):
        compiler.json_schema({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2})


def test_multiples(compiler: GrammarCompiler) -> None:
    assert takes(compiler.json_schema({"type": "number", "multipleOf": 0.25}), "1.75")
    with pytest.raises(ValueError, match=r"multipleOf = 0\.1: it is no binary fraction"):
        compiler.json_schema({"type": "number", "multipleOf": 0.1})
    with pytest.raises(ValueError, match="no multiple of 7"):
        compiler.json_schema({"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 6})


# References -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", *ENGINES])
@pytest.mark.parametrize(
    ("part", "reason"),
    [
        *(
            ({"$ref": to}, "only references within")
            for to in ("http://x.y/z", "other.json", "urn:x:y", "#anchor", "b#/c")
        ),
        *(({"$ref": to}, "leads nowhere") for to in ("#/nope", "#/$defs/a/b", "#/properties/x/7")),
        ({"enum": [1], "$ref": "http://127.0.0.1:9/x"}, "leads nowhere"),
        ({"enum": [1], "allOf": [{"$ref": "other.json"}]}, "leads nowhere"),
        ({"$dynamicRef": "#x"}, "'\\$dynamicRef'"),
        ({"$recursiveRef": "#"}, "'\\$recursiveRef'"),
        ({"$id": "inner", "type": "null"}, "'\\$id' inside"),
        ({"not": {"type": "null"}}, "'not'"),
        ({"if": {}, "then": {"type": "null"}}, "'if'"),
        ({"contains": {}}, "'contains'"),
        ({"dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
        ({"unevaluatedProperties": False}, "'unevaluatedProperties'"),
        ({"maximun": 3}, "'maximun'"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "string", "format": "regex"}, "format 'regex'"),
        ({"type": "string", "format": "nonsense"}, "format 'nonsense'"),
        ({"type": "string", "contentSchema": {}}, "'contentSchema'"),
        ({"const": "\x01"}, r"U\+0001"),
        ({"propertyNames": {"maxLength": 3}}, "'propertyNames'"),
        ({"type": "array", "maxItems": 10**9}, "maxItems = 1000000000"),
        ({"anyOf": [{"$ref": "#/properties/x"}, {"type": "null"}]}, "leads back to itself"),
    ],
)
def test_what_is_not_enforced_is_refused_with_its_place(
    tokenizer: Any, backend: str, part: Any, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler = GrammarCompiler(tokenizer, backend=backend)
    with pytest.raises(ValueError, match=rf"(at properties\.x: |\$ref '#/properties/x').*{reason}|{reason}"):
        compiler.json_schema({"type": "object", "properties": {"x": part}})
    assert capfd.readouterr().err == ""  # not even from C++


def test_references_within_are_served(compiler: GrammarCompiler) -> None:
    grammar = compiler.json_schema(
        {
            "$id": "https://example.com/tree",
            "$defs": {"a b": {"type": "integer"}, "c/d~": {"type": "null"}},
            "type": "object",
            "properties": {
                "x": {"$ref": "#/$defs/a%20b", "minimum": 3, "title": "with more"},
                "y": {"$ref": "#/$defs/c~1d~0"},
                "z": {"$ref": "#"},
            },
        }
    )
    assert takes(grammar, '{"x": 3, "y": null, "z": {"x": 4}}')
    assert not takes(grammar, '{"x": 2}')


def test_texts_that_never_end(compiler: GrammarCompiler) -> None:
    for schema in (
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"allOf": [{"$ref": "#"}]},
    ):
        with pytest.raises(ValueError, match="leads back to itself"):
            compiler.json_schema(schema)
    deep: Any = {"type": "null"}
    for _ in range(400):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ValueError, match="nested too deeply"):
        compiler.json_schema(deep)
    for inner in ({"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}):
        with pytest.raises(ValueError, match="no text of finite length"):
            compiler.json_schema({"type": "object", "properties": {"a": inner}, "required": ["a"]})


# Texts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "xgrammar"])
def test_one_spelling_and_no_name_twice(tokenizer: Any, backend: str) -> None:
    compiler = GrammarCompiler(tokenizer, backend=backend)
    schemas: list[Any] = [{"type": "object", "additionalProperties": {"type": "integer"}}, {}]
    if backend == "auto":
        schemas += [
            {"properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": {"type": "integer"}},
            {"type": "object", "patternProperties": {"^a": {"const": 1}}, "additionalProperties": {"type": "integer"}},
        ]
    for schema in schemas:
        grammar = compiler.json_schema(schema)
        assert takes(grammar, '{"a": 1, "b": 2}')
        for text in ('{"a": 1, "a": 1}', '{"a": 1, "b": 2, "b": 3}', '{"a": 1, "\\u0061": 2}'):
            assert not takes(grammar, text), (schema, text)
    batch = GrammarBatch([compiler.json_schema({"type": "object", "additionalProperties": {"type": "null"}})], [EOS])
    for token in ids_of(batch._grammars[0], '{"ab": null, "ab'):  # type: ignore[arg-type]
        batch.accept([token])
    allowed = batch.bitmask(torch.zeros(1, V))
    texts = [batch._grammars[0].vocabulary.tokens[i] for i in batch.allowed(0) or []]  # type: ignore[union-attr]
    assert allowed.any()
    assert texts
    assert not [text for text in texts if text.startswith(b'"')]


def test_a_text_that_an_engine_lets_pass_is_an_error_and_no_result(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LLGuidance.json_schema
    monkeypatch.setattr(LLGuidance, "json_schema", lambda self, schema, space: real(self, {"type": "integer"}, space))
    grammar = GrammarCompiler(tokenizer).json_schema({"type": "integer", "maximum": 5})
    assert takes(grammar, "3")
    assert not takes(grammar, "9")
    nine, three = ids_of(grammar, "93")
    for stop_ids, ends in (([EOS], [EOS, EOS]), ([EOS], [None, None]), ([], None)):
        batch = GrammarBatch([grammar, grammar], stop_ids)
        if ends is not None:
            batch.accept([three, nine])
        with pytest.raises(ValueError, match=r"grammar \(row 1\): '9' breaks it: at \$: 9 is greater than") as caught:
            batch.accept([three, nine] if ends is None else ends)
        assert (caught.value.row, caught.value.text) == (1, b"9")  # type: ignore[attr-defined]
        assert batch.truncated == [False, True]
    batch = GrammarBatch([grammar], [EOS])
    batch.accept([nine])  # it might go on
    with pytest.raises(ValueError, match=r"row 0\): '9' breaks it"):
        batch.truncated  # noqa: B018


# Closed objects -------------------------------------------------------------------------------------------------------

A: dict[str, Any] = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}
B: dict[str, Any] = {"properties": {"b": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        (A, ['{"a": 1}'], ['{"a": 1, "b": 2}', "3"]),
        ({"type": "object", "properties": {}}, ["{}"], ['{"a": 1}']),
        ({"type": "object"}, ["{}", '{"a": 1}'], []),
        ({**A, "additionalProperties": True}, ['{"a": 1, "b": 2}'], []),
        ({**A, "additionalProperties": {"type": "null"}}, ['{"a": 1, "b": null}'], ['{"a": 1, "b": 2}']),
        ({**A, "required": ["a", "z"]}, ['{"a": 1, "z": 2}'], ['{"a": 1}', '{"a": 1, "z": 2, "y": 3}']),
        ({"allOf": [A, B]}, ['{"a": 1}', '{"a": 1, "b": 2}'], ['{"a": 1, "c": 2}']),
        ({"anyOf": [A, B]}, ['{"a": 1}', '{"b": 2}'], ['{"a": 1, "b": 2}', '{"c": 1}']),
        ({**B, "anyOf": [A, {"required": ["c"]}]}, ['{"b": 1, "a": 2}', '{"b": 1, "c": 2}'], ['{"a": 1, "d": 2}']),
        ({"$defs": {"A": A}, "$ref": "#/$defs/A", **B}, ['{"b": 1, "a": 1}', '{"a": 1}'], ['{"a": 1, "c": 1}']),
        ({"allOf": [A, {**B, "additionalProperties": True}]}, ['{"a": 1, "c": 1}'], ['{"c": 1}']),
        ({"items": A}, ['[{"a": 1}]'], ['[{"a": 1, "b": 2}]']),
    ],
)
def test_objects_are_closed_unless_the_schema_says_otherwise(
    compiler: GrammarCompiler, schema: Any, yes: list[str], no: list[str]
) -> None:
    closed, open_ = compiler.json_schema(schema), compiler.json_schema(schema, strict=False)
    for text in yes:
        assert takes(closed, text), text
        assert takes(open_, text) or "allOf" in schema or "$ref" in schema  # whose order of names may be another
    for text in no:
        assert not takes(closed, text), text
    assert takes(compiler.json_schema(A, strict=False), '{"a": 1, "b": 2}')


@pytest.mark.parametrize(
    ("branches", "served"),
    [
        ([A, B], False),  # {"a": 1} satisfies both, before they are closed
        ([{**A, "type": "object"}, {**B, "type": "object"}], False),
        ([{**A, "type": "object"}, {**B, "type": "object", "additionalProperties": False}], True),
        ([{"type": "object", "properties": {"k": {"const": k}}, "required": ["k"]} for k in "ab"], True),
        ([{"type": "object", "properties": {"k": {"const": k}}} for k in "ab"], False),
        ([{"const": 1}, {"const": 2}], True),
        ([{"const": 1}, {"type": "integer"}], False),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([{"type": "string"}, {"anyOf": [{"type": "null"}, {"type": "array"}]}], True),
        ([{"enum": ["a", "b"]}, {"type": "string", "minLength": 2}], True),
    ],
)
def test_one_of_is_served_where_its_branches_exclude_each_other(
    compiler: GrammarCompiler, branches: Any, served: bool
) -> None:
    schema = {"type": "object", "properties": {"x": {"oneOf": branches}}, "required": ["x"]}
    if not served:
        with pytest.raises(ValueError, match=r"at properties\.x: oneOf: a value might satisfy branch 0 and branch 1"):
            compiler.json_schema(schema)
        return
    for seed in range(6):
        if (text := walk(compiler.json_schema(schema), random.Random(seed))) is not None:
            check(text, schema)


def test_whitespace_is_bounded(tokenizer: Any) -> None:
    for backend in ENGINES:
        grammar = GrammarCompiler(tokenizer, backend=backend, any_whitespace=True).json_schema(
            {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 1}
        )
        assert takes(grammar, "[\n   null\t]")
        assert not takes(grammar, f"[{' ' * 40}null]")


# Types ----------------------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


@dataclasses.dataclass
class Point:
    x: int
    y: str = "a"


class Movie(TypedDict):
    year: int


class Node(pydantic.BaseModel):
    value: Literal[1, 2]
    next: Node | None = None


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    friend: Pet | None = None


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    age: int = 3


Pet = Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]


class Home(pydantic.BaseModel):
    pets: list[Pet] = pydantic.Field(max_length=2)


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=150)
    email: Annotated[str, pydantic.StringConstraints(pattern=r"^\S{1,5}@\S{1,5}$")] | None = None
    born: datetime.date | None = None


TYPES: list[Any] = [
    *(int, bool, float, list[int], dict[str, int], tuple[int, bool], int | None, Literal["a", 1]),
    *(
        Colour,
        Point,
        Movie,
        Node,
        Home,
        Person,
        pathlib.Path,
        bytes,
        pydantic.SecretStr,
        pydantic.Base64Bytes,
        uuid.UUID,
    ),
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, pydantic.UUID4),
    *(pydantic.condecimal(gt=0, le=1), pydantic.conint(multiple_of=3, gt=0), pydantic.confloat(gt=0, le=0.5)),
    *(pydantic.constr(pattern="^a+$", max_length=4), pydantic.HttpUrl, pydantic.AnyUrl, pydantic.IPvAnyAddress),
    *(dict[int, int], dict[Literal["x", "y"], int], dict[pydantic.constr(pattern="^k[0-9]$"), int]),  # type: ignore[misc]
]


@pytest.mark.parametrize("source", TYPES, ids=str)
def test_types_are_taken_and_what_comes_of_them_is_of_the_type(compiler: GrammarCompiler, source: Any) -> None:
    grammar, adapter = compiler.json_schema(source), pydantic.TypeAdapter(source)
    texts = [walk(grammar, random.Random(seed)) for seed in range(8)]
    assert any(text is not None for text in texts)
    for text in texts:
        if text is not None:
            adapter.validate_json(text)


def test_a_type_adapter_and_a_model_are_the_same(compiler: GrammarCompiler) -> None:
    for source in (
        Person,
        pydantic.TypeAdapter(Person),
        Person.model_json_schema(),
        json.dumps(Person.model_json_schema()),
    ):
        assert takes(compiler.json_schema(source), '{"name": "a", "age": 3}')
        assert not takes(compiler.json_schema(source), '{"name": "a", "age": 3, "more": 1}')


class Profile(pydantic.BaseModel):
    name: str
    tags: set[int] = set()


class Hooks(pydantic.BaseModel):
    name: str
    call: Callable[[int], int]


class Rule(pydantic.BaseModel):
    avatar: re.Pattern[str]


class Rules(pydantic.BaseModel):
    rules: list[Rule]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Profile, r"at properties\.tags: no engine enforces 'uniqueItems'"),
        (Hooks, r"Hooks at properties\.call: "),
        (Rule, r"at properties\.avatar: nothing here checks the format 'regex'"),
        (Rules, r"at \$defs\.Rule\.properties\.avatar: "),
        (complex, "complex"),
        (pydantic.Json, "contentSchema"),
    ],
)
def test_types_that_are_not_served_name_the_field(compiler: GrammarCompiler, source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compiler.json_schema(source)


def test_what_has_no_schema(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in ([1], None, b"{}", 3):
        with pytest.raises(TypeError, match=r"json_schema: expected a JSON Schema \(a dict, .*, got"):
            compiler.json_schema(source)
    with pytest.raises(TypeError, match="give the class, Node"):
        compiler.json_schema(Node(value=1))
    with pytest.raises(ValueError, match="'a' stands twice"):
        compiler.json_schema('{"a": 1, "a": 2}')
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ImportError, match="needs pydantic: pip install 'pydantic"):
        compiler.json_schema(list[int])
    assert takes(compiler.json_schema({"type": "null"}), "null")
