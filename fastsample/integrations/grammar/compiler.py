"""Grammars, and the compiler that makes them for a tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch

from fastsample.checks import CPU
from fastsample.integrations.grammar.check import INSTALL, Check, Matches, OneOf, Validates
from fastsample.integrations.grammar.engines import ENGINES, Matcher, Start, gist
from fastsample.integrations.grammar.names import UniqueNames, may_repeat
from fastsample.integrations.grammar.regex import parse
from fastsample.integrations.grammar.schema import ANNOTATIONS, Rewriter
from fastsample.integrations.grammar.types import schema_of
from fastsample.integrations.grammar.vocabulary import Vocabulary


class GrammarCompiler:
    """Makes grammars for one tokenizer, whose vocabulary is read once. It can be pickled.

    Args:
        tokenizer: a tokenizer of transformers, or a tokenizers.Tokenizer: byte-level BPE or SentencePiece.
        backend: "llguidance", "xgrammar", "outlines-core", or "auto": the first of these, in this order, that is
            installed and takes the grammar. What an engine cannot enforce is refused, never ignored; xgrammar and
            outlines-core enforce less of JSON Schema than llguidance. outlines-core continues a complete text only
            with tokens that complete it again.
        any_whitespace: allow up to 8 characters of whitespace between the parts of JSON. By default there is one form,
            that of `json.dumps` (outlines-core: without spaces), so that a small model cannot loop on whitespace.

    Raises:
        TypeError: not a tokenizer.
        ValueError: unknown backend, or a tokenizer whose tokens' bytes cannot be determined.
        ImportError: the backend (with "auto": every one) is not installed.
    """

    def __init__(self, tokenizer: Any, *, backend: str = "auto", any_whitespace: bool = False) -> None:
        if backend != "auto" and backend not in ENGINES:
            raise ValueError(f"backend = {backend!r}: expected 'auto', {', '.join(map(repr, ENGINES))}")
        self._vocabulary = tokenizer if isinstance(tokenizer, Vocabulary) else Vocabulary(tokenizer)
        self._backend, self._any_whitespace = backend, any_whitespace
        self._engines: list[Any] = []
        missing: list[str] = []
        for name in ENGINES if backend == "auto" else (backend,):
            try:
                import_module(name.replace("-", "_"))
                self._engines.append(_engine(name, self._vocabulary))
            except ImportError as error:
                missing.append(f"{name} ({error})")
        if not self._engines:
            raise ImportError(f"grammars need {' or '.join(missing)}: {INSTALL}")

    def json_schema(self, schema: Any, *, strict: bool = True) -> Grammar:
        """A grammar of JSON texts that validate against a schema.

        Where validators differ, or where a text could go on for ever, the narrower reading holds: strings contain no
        \\uXXXX, formats are the texts that every validator accepts, a number stays a millionth away from an exclusive
        bound, and (llguidance) an integer without a bound stays within 10^18.

        Args:
            schema: a JSON Schema (draft 4 to 2020-12) as dict, bool or JSON text; or a type that pydantic describes: a
                BaseModel, a dataclass, a TypedDict, an Enum, list[int], a TypeAdapter.
            strict: close objects. An object whose schema has `properties`, but neither additionalProperties nor
                patternProperties nor propertyNames, may have only the properties named by that schema, by those
                combined with it (allOf, anyOf, oneOf, $ref) and by their `required`; without a `type` it is
                an object. Without `properties` an object stays open.

        Raises:
            TypeError: not something that has a schema.
            ValueError: not JSON, not a JSON Schema, impossible to satisfy, or something that no engine enforces; the
                message says where in the schema.
            ImportError: jsonschema, or for a type pydantic, is not installed.
        """
        text = json.dumps(schema_of(schema), ensure_ascii=False)
        return self._compile("json_schema", text, strict)

    def regex(self, pattern: str) -> Grammar:
        r"""A grammar of the texts that a regular expression matches from end to end, as `re.fullmatch` does.

        Args:
            pattern: in Python's dialect, and \p{Lu}, \P{L} and the like. ^ and $ may stand at its ends. \d, \w and \s
                are ASCII, so that every dialect agrees on what they match.

        Raises:
            TypeError, ValueError: not a pattern, or one that is too large or uses look-around, backreferences, word
                boundaries, an inner anchor, atomic groups or possessive repetitions.
        """
        if not isinstance(pattern, str):
            hint = ": give its .pattern" if isinstance(pattern, re.Pattern) else ""
            raise TypeError(f"regex: expected a str, got {type(pattern).__name__}{hint}")
        return self._compile("regex", pattern)

    def choices(self, choices: Sequence[str]) -> Grammar:
        """A grammar of exactly these texts.

        Raises:
            TypeError, ValueError: not a sequence of non-empty strings.
        """
        if isinstance(choices, (str, bytes)) or not isinstance(choices, Iterable):
            raise TypeError(f"choices: expected a sequence of str, got {choices!r}")
        given = list(choices)
        if not all(isinstance(choice, str) for choice in given):
            raise TypeError(f"choices: expected a sequence of str, got {choices!r}")
        if not given or not all(given):
            raise ValueError(f"choices: expected at least one, and none empty, got {choices!r}")
        return self._compile("choices", list(dict.fromkeys(given)))

    def _compile(self, kind: str, source: Any, *options: Any) -> Grammar:
        """The grammar of the first engine that takes it, or an error with each one's reason."""
        text = source if isinstance(source, str) else json.dumps(source, ensure_ascii=False)
        shown = text if len(text) <= 80 else text[:77] + "..."
        try:
            calls, check = _READ[kind](source, *options)
        except ValueError as error:
            raise ValueError(f"{kind} {shown}: {str(error).removeprefix(f'{kind}: ')}") from None
        except RecursionError:
            raise ValueError(f"{kind} {shown}: it is nested too deeply") from None
        reasons: list[str] = []
        for engine in self._engines:
            try:
                name, argument = calls
                more = (self._any_whitespace,) if name == "json_schema" else ()
                start = getattr(engine, name)(argument, *more)
                if name == "json_schema" and may_repeat(argument):
                    start = partial(_unique, start, self._vocabulary)
                _try_out(start, self._vocabulary)
            except (ValueError, TypeError, RuntimeError) as error:
                reasons.append(f"{engine.name}: {gist(str(error))}")
            else:
                made = (self._vocabulary, engine.name, self._any_whitespace, kind, source, options)
                return Grammar(engine.name, start, self._vocabulary, check, made)
        raise ValueError(f"{kind} {shown}: " + "; ".join(reasons))

    def __reduce__(self) -> tuple[Any, ...]:
        return _compiler, (self._vocabulary, self._backend, self._any_whitespace)

    def __deepcopy__(self, memo: dict[int, Any]) -> GrammarCompiler:
        return self  # nothing changes it


class Grammar:
    """A compiled grammar, made by a GrammarCompiler. Any number of sequences may follow it at the same time.

    A pickle holds its source and the bytes of its vocabulary; loading it compiles the grammar again.

    Attributes:
        backend: the grammar engine that serves it.
        vocabulary: the tokens that it was compiled for.
    """

    def __init__(self, backend: str, start: Start, vocabulary: Vocabulary, check: Check, made: tuple[Any, ...]) -> None:
        self.backend = backend
        self.vocabulary = vocabulary
        self._start, self._check, self._made = start, check, made

    def matcher(self) -> Matcher:
        """A matcher at the start of a new text."""
        return self._start()

    def fault(self, text: bytes) -> str | None:
        """What the engine-independent check finds wrong with a finished text, or None."""
        try:
            return self._check(text.decode())
        except UnicodeDecodeError:
            return "it is no UTF-8"

    def is_complete(self, tokens: Iterable[int]) -> bool:
        """Whether the text of these tokens (without an end-of-sequence token) is a whole text of the grammar.

        Raises:
            RuntimeError: the engine reached a limit of its own and gave up.
        """
        matcher, ids = self.matcher(), [int(token) for token in tokens]
        for token in ids:
            if not self.vocabulary.is_text(token) or not matcher.allows(token):
                return False
            matcher.accept(token)
        return matcher.complete() and self.fault(self.vocabulary.bytes_of(ids)) is None

    def __repr__(self) -> str:
        kind, source = self._made[3:5]
        text = source if isinstance(source, str) else repr(source)
        return f"<Grammar {kind} {text if len(text) <= 60 else text[:57] + '...'} ({self.backend})>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _grammar, self._made

    def __deepcopy__(self, memo: dict[int, Any]) -> Grammar:
        return self  # nothing changes it


def _unique(start: Start, vocabulary: Vocabulary) -> Matcher:
    return UniqueNames(start(), vocabulary)


@lru_cache(maxsize=6)
def _engine(name: str, vocabulary: Vocabulary) -> Any:
    """An engine that has read a vocabulary; grammars loaded from pickles share it."""
    return ENGINES[name](vocabulary)


def _compiler(vocabulary: Vocabulary, backend: str, any_whitespace: bool) -> GrammarCompiler:
    return GrammarCompiler(vocabulary, backend=backend, any_whitespace=any_whitespace)


def _grammar(
    vocabulary: Vocabulary, backend: str, any_whitespace: bool, kind: str, source: Any, options: tuple[Any, ...]
) -> Grammar:
    return _compiler(vocabulary, backend, any_whitespace)._compile(kind, source, *options)


# What an engine is asked to make, and what checks the texts it produces -------------------------------------------


def _read_schema(text: str, strict: bool) -> tuple[tuple[str, Any], Check]:
    schema = json.loads(text)
    check = Validates(schema)
    if isinstance(schema, dict) and set(schema) - ANNOTATIONS - {"type"} in ({"enum"}, {"const"}):
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        # Whole texts stay exact; an engine would turn their numbers into float64.
        fitting = [json.dumps(value, ensure_ascii=False) for value in values if check.fits(value, schema)]
        if not fitting:
            raise ValueError("none of its values satisfies the rest of the schema")
        return ("choices", list(dict.fromkeys(fitting))), check
    return ("json_schema", Rewriter(schema, strict=strict, fits=check.fits).rewritten()), check


def _read_regex(pattern: str) -> tuple[tuple[str, Any], Check]:
    tree = parse(pattern)
    return ("regex", tree), Matches(tree)


def _read_choices(choices: list[str]) -> tuple[tuple[str, Any], Check]:
    for choice in choices:
        if any(0xD800 <= ord(character) <= 0xDFFF for character in choice):
            raise ValueError(f"choices: {choice!r} holds half a character, which no text does")
    return ("choices", choices), OneOf(choices)


_READ: dict[str, Any] = {"json_schema": _read_schema, "regex": _read_regex, "choices": _read_choices}


def _try_out(start: Start, vocabulary: Vocabulary) -> None:
    """Take the first steps, so that a grammar which an engine cannot follow is refused at compile time."""
    matcher = start()
    mask = torch.zeros(1, vocabulary.end // 32 + 1, dtype=torch.int32, device=CPU)
    for _ in range(2):
        matcher.fill(mask, 0)
        bits = mask.numpy().view("uint8")
        word = next(iter(bits[0].nonzero()[0].tolist()), None)
        token = None if word is None else word * 8 + (int(bits[0, word]) & -int(bits[0, word])).bit_length() - 1
        if token is None or not vocabulary.is_text(token):
            if not matcher.complete():
                raise ValueError("no token of the vocabulary begins a text of it")
            return
        if matcher.allows(token):
            matcher.accept(token)
