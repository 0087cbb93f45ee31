"""Patterns: what is served is what `re.fullmatch` takes, on every engine; the rest is refused."""

from __future__ import annotations

import random
import re
import time
from typing import Any

import pytest
from transformers import AutoTokenizer

from fastsample.cli.model import shipped_model
from fastsample.integrations.grammar import GrammarCompiler, formats
from fastsample.integrations.grammar.engines import ENGINES
from fastsample.integrations.grammar.regex import Chars, Either, Node, Repeat, Sequence, matches, parse

PATTERNS = [
    r"[0-9]{3}-[a-f]+",
    "(a|bc)*d?",
    "^x?é{2}$",
    r"\d+\.[\d_]\w\s\$",
    "^a|b$",
    r"\Aab\Z",
    r"(?i)straße[^k]K",
    r"(?i:[a-c]s)x[^\W\d]",
    r"\D\W\S",
    r"[^\D\s]",
    r"(?P<name>a)b*?c+?",
    r"(?<name>a)b",
    r"(?s).\n.",
    r"(?x) a b # c",
    r"(?a)\D\w",
    r"a{,3}b",
    "(^a|b)$",
    "[]a]b",
    "[^]a]b",
    r"[a\]b]+",
    r"[\^\-a]",
    r"\x41\u00e9\U0001F600",
    "(|a)*b",
    r"a\/b\-",
]
REFUSED = [
    (r"\h", "bad escape"),
    (r"\Qa.b\E", "bad escape"),
    (r"\z", "bad escape"),
    ("a^b", r"inner \^"),
    ("a$b", r"inner \$"),
    ("a$(b|)", r"inner \$"),
    ("(^a)*", r"inner \^"),
    (r"\bfoo", "word boundary"),
    (r"(a)\1", "backreference"),
    (r"(?P<n>a)(?P=n)", "backreference"),
    ("a*+", "possessive"),
    ("(?>a)", "atomic"),
    ("(?=a)b", "look-around"),
    ("a(?<!b)", "look-around"),
    ("(?m)^a$", r"\(\?m\)"),
    ("(a)?(?(1)b|c)", "condition"),
    ("[[:alpha:]]", "every dialect"),
    ("[a&&b]", "every dialect"),
    (r"\p{Greek}", "general categories"),
    (r"[^\s\S]", "matches no text"),
    ("(a|b", "unterminated"),
    ("a" + "(" * 3000 + ")" * 3000, "nested too deeply|regex"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(shipped_model())


def some_text(node: Node, rng: random.Random) -> str:
    """A text of the tree."""
    if isinstance(node, Chars):
        return chr(rng.randint(*rng.choice(node.ranges)))
    if isinstance(node, Sequence):
        return "".join(some_text(part, rng) for part in node.parts)
    if isinstance(node, Either):
        return some_text(rng.choice(node.options), rng)
    assert isinstance(node, Repeat)
    most = node.least + 3 if node.most is None else min(node.most, node.least + 3)
    return "".join(some_text(node.part, rng) for _ in range(rng.randint(node.least, most)))


def in_python(pattern: str) -> str:
    return pattern.replace("(?<name>", "(?P<name>")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_texts_of_a_pattern_are_those_of_re(pattern: str) -> None:
    tree = parse(pattern)
    for seed in range(200):
        text = some_text(tree, random.Random(seed))
        assert re.fullmatch(in_python(pattern), text), text
        assert matches(tree, text)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", ENGINES)
def test_engines_take_the_texts_of_a_pattern_and_no_others(tokenizer: Any, backend: str, pattern: str) -> None:
    grammar, tree = GrammarCompiler(tokenizer, backend=backend).regex(pattern), parse(pattern)
    single = {token: i for i, token in enumerate(grammar.vocabulary.tokens) if len(token) == 1}
    for seed in range(12):
        rng = random.Random(seed)
        text = some_text(tree, rng)
        taken = grammar.is_complete(single[bytes([byte])] for byte in text.encode())
        assert taken or backend == "outlines-core"  # it goes on from a whole text only to a whole text
        other = text + rng.choice("aZ9 \n^$.")
        if not re.fullmatch(in_python(pattern), other):
            assert not grammar.is_complete(single[bytes([byte])] for byte in other.encode())


@pytest.mark.parametrize(
    ("pattern", "texts"), [("a|^b|c$", "xax b- c"), ("(^|,)x", "x- -,x"), ("^$", ""), (r"\d", "a1b")]
)
def test_a_search_matches_a_part(pattern: str, texts: str) -> None:
    tree = parse(pattern, search=True)
    assert all(matches(tree, text) == bool(re.search(pattern, text)) for text in [*texts.split(), "", "q", "ab", ",xx"])
    for seed in range(100):
        text = some_text(tree, random.Random(seed))
        assert re.search(pattern, text), text


@pytest.mark.parametrize(("pattern", "reason"), REFUSED)
def test_what_engines_read_differently_is_refused(tokenizer: Any, pattern: str, reason: str) -> None:
    for backend in ("auto", *ENGINES):
        with pytest.raises(ValueError, match=f"(?s)^regex .*({reason})"):
            GrammarCompiler(tokenizer, backend=backend).regex(pattern)


@pytest.mark.parametrize("pattern", ["(a{1000}){1000}", "b(a{1000}){1000}", "(((a{99}){99}){99}){99}"])
def test_a_pattern_beyond_the_limits_is_refused_at_once(tokenizer: Any, pattern: str) -> None:
    compiler = GrammarCompiler(tokenizer)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"repetitions written out it has [0-9]* characters"):
        compiler.regex(pattern)
    with pytest.raises(ValueError, match="repetitions written out"):
        compiler.json_schema({"type": "string", "pattern": f"^{pattern}$"})
    assert time.perf_counter() - start < 5


def test_categories_of_unicode(tokenizer: Any) -> None:
    grammar = GrammarCompiler(tokenizer).regex(r"\p{Lu}\P{L}[\p{Ll}_]\pN")
    assert all(grammar.is_complete(tokenizer(text)["input_ids"]) for text in ("A1b2", "É-_9"))
    assert not any(grammar.is_complete(tokenizer(text)["input_ids"]) for text in ("a1b2", "AAb2", "A1B2", "A1bb"))


def test_matching_takes_no_longer_on_patterns_that_backtrack() -> None:
    tree = parse("(?:(?:a|a)*b|(a+a+)+c)")
    start = time.perf_counter()
    assert matches(tree, "a" * 60 + "c")
    assert not matches(tree, "a" * 60 + "d")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", formats.PATTERNS)
def test_formats_are_what_jsonschema_and_pydantic_take(name: str) -> None:
    import datetime
    import ipaddress
    import uuid

    import jsonschema
    import pydantic

    types: dict[str, Any] = {
        **{"date": datetime.date, "time": datetime.time, "date-time": datetime.datetime, "uuid": uuid.UUID},
        **{"duration": datetime.timedelta, "ipv4": ipaddress.IPv4Address, "ipv6": ipaddress.IPv6Address},
        **{"uri": pydantic.AnyUrl, "base64": pydantic.Base64Bytes, "base64url": pydantic.Base64UrlBytes},
        **{"uuid4": pydantic.UUID4, "uuid1": pydantic.UUID1, "ipvanyaddress": pydantic.IPvAnyAddress},
    }
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    adapter = pydantic.TypeAdapter(types.get(name, str))
    for seed in range(300):
        text = some_text(formats.tree(name), random.Random(seed))
        assert checker.conforms(text, name), text
        adapter.validate_python(text)


def test_dates_are_those_of_the_calendar() -> None:
    import datetime

    tree = formats.tree("date")
    for year in (0, 1, 4, 100, 400, 1900, 2000, 2023, 2024, 9996):
        for month in range(14):
            for day in range(33):
                text = f"{year:04}-{month:02}-{day:02}"
                try:
                    datetime.date.fromisoformat(text)
                except ValueError:
                    assert not matches(tree, text), text
                else:
                    assert matches(tree, text), text
