"""The grammar engines that `fastsample.integrations.grammar` drives: llguidance, xgrammar and outlines-core.

All get the same vocabulary: the bytes of each token, as vocabulary.py reads them from the tokenizer, plus one id past
the end that serves as their end of text. (`GrammarBatch` maps it to the model's own end-of-sequence tokens.) All get
schemas and patterns as schema.py and regex.py have rewritten them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Protocol, TypeAlias

import torch

from fastsample.integrations.grammar.regex import Chars, Node, ebnf, either, rust, sequence
from fastsample.integrations.grammar.vocabulary import Vocabulary

WHITESPACE = 8
"""Most characters of whitespace in one place, where any whitespace is allowed."""

LARGEST = 10**18
"""For integers without a bound in the schema: otherwise a model may write digits for ever."""


class Matcher(Protocol):
    """The position of one text in a grammar. An engine that gives up raises a RuntimeError with its reason."""

    def fill(self, mask: torch.Tensor, row: int) -> None:
        """Set the bits of the tokens that may come next in mask[row] (int32 words); others become 0."""

    def allows(self, token: int) -> bool:
        """Whether the grammar allows this token next."""

    def accept(self, token: int) -> None:
        """Append a token that the grammar allows."""

    def complete(self) -> bool:
        """Whether the text so far is a whole text of the grammar."""


Start: TypeAlias = Callable[[], Matcher]


class LLGuidance:
    """https://github.com/guidance-ai/llguidance: refuses what it cannot enforce."""

    name = "llguidance"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._module = import_module("llguidance")
        wrapper = import_module("llguidance._tokenizer").TokenizerWrapper(_ForLLGuidance(vocabulary))
        self._tokenizer = self._module.LLTokenizer(wrapper)

    def json_schema(self, schema: Any, any_whitespace: bool) -> Start:
        options: dict[str, Any] = {"json_allowed_escapes": 'nrbtf\\"', "json_allow_general_unicode_escapes": False}
        if any_whitespace:
            options |= {"whitespace_pattern": rf"[ \t\n\r]{{1,{WHITESPACE}}}"}
        else:
            options |= {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        given = schema if isinstance(schema, dict) else {} if schema else {"enum": []}
        text = json.dumps(_with_bounded_integers(given))
        return self._start(self._module.LLMatcher.grammar_from_json_schema(text, overrides=options))

    def regex(self, tree: Node) -> Start:
        return self._start(self._module.LLMatcher.grammar_from_regex(rust(tree)))

    def choices(self, choices: list[str]) -> Start:
        return self.regex(_alternatives(choices))

    def _start(self, grammar: str) -> Start:
        matcher = self._module.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(gist(matcher.get_error()))
        return lambda: _LLMatcher(matcher.deep_copy())


class _ForLLGuidance:
    """What TokenizerWrapper needs of a tokenizer."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.end
        self.special_token_ids = [vocabulary.end]
        self.tokens = [*vocabulary.tokens, b""]
        self._ids = {token: i for i, token in enumerate(vocabulary.tokens) if token}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text that the grammar forces: the longest token that fits, repeatedly."""
        ids = []
        while text:
            length = next((n for n in range(min(self._longest, len(text)), 0, -1) if text[:n] in self._ids), None)
            if length is None:
                break
            ids.append(self._ids[text[:length]])
            text = text[length:]
        return ids


class _LLMatcher:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, mask: torch.Tensor, row: int) -> None:
        line = mask[row]
        if self._matcher.is_stopped():
            line.zero_()
        else:
            self._matcher.unsafe_compute_mask_ptr(line.data_ptr(), 4 * len(line))
        self._check()

    def allows(self, token: int) -> bool:
        # Reaching a limit looks like a token that is not allowed; only the error tells them apart.
        return self._checked(self._matcher.validate_tokens([token]) == 1)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def complete(self) -> bool:
        return self._checked(self._matcher.is_accepting())

    def _checked(self, answer: bool) -> bool:
        if not answer:
            self._check()
        return bool(answer)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"llguidance gave up: {gist(self._matcher.get_error())}")


class XGrammar:
    """https://github.com/mlc-ai/xgrammar: ignores keywords that it does not know, so those are refused here."""

    name = "xgrammar"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._module = import_module("xgrammar")
        info = self._module.TokenizerInfo(
            [*vocabulary.tokens, b""], vocab_size=vocabulary.end + 1, stop_token_ids=[vocabulary.end]
        )
        self._compiler = self._module.GrammarCompiler(info)

    def json_schema(self, schema: Any, any_whitespace: bool) -> Start:
        _refuse_unenforced(schema, _STRUCTURE | {"prefixItems"})
        _refuse_names(schema)
        options = {"any_whitespace": any_whitespace, "max_whitespace_cnt": WHITESPACE if any_whitespace else None}
        return self._start(self._compiler.compile_json_schema, json.dumps(schema), strict_mode=False, **options)

    def regex(self, tree: Node) -> Start:
        return self._start(self._compiler.compile_grammar, f"root ::= {ebnf(tree)}")

    def choices(self, choices: list[str]) -> Start:
        return self.regex(_alternatives(choices))

    def _start(self, compile_: Callable[..., Any], source: str, **options: Any) -> Start:
        try:
            compiled = compile_(source, **options)
        except RuntimeError as error:
            raise ValueError(gist(re.sub(r"^\[[\d:]+\] \S+: ", "", str(error)))) from None
        return lambda: _XMatcher(self._module.GrammarMatcher(compiled))


class _XMatcher:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, mask: torch.Tensor, row: int) -> None:
        if not self._matcher.fill_next_token_bitmask(mask, row):
            mask[row] = -1

    def allows(self, token: int) -> bool:
        allowed = bool(self._matcher.accept_token(token))
        if allowed:
            self._matcher.rollback(1)
        return allowed

    def accept(self, token: int) -> None:
        if not self._matcher.accept_token(token):
            raise RuntimeError(f"xgrammar does not take token {token}, which it allowed")

    def complete(self) -> bool:
        return bool(self._matcher.is_completed())


class OutlinesCore:
    """https://github.com/dottxt-ai/outlines-core: a schema becomes a regular expression, which becomes an automaton.

    A complete text continues only with tokens that complete it again.
    """

    name = "outlines-core"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._module = import_module("outlines_core")
        ids: dict[bytes, list[int]] = {}
        for i, token in enumerate(vocabulary.tokens):
            if token:
                ids.setdefault(token, []).append(i)
        self._vocabulary = self._module.Vocabulary(vocabulary.end, ids)

    def json_schema(self, schema: Any, any_whitespace: bool) -> Start:
        _refuse_unenforced(schema, _STRUCTURE | {"minLength", "maxLength"})
        _refuse_names(schema)
        build = self._module.json_schema.build_regex_from_schema
        whitespace = rf"[ \n\t\r]{{0,{WHITESPACE}}}" if any_whitespace else ""
        return self._start(build(json.dumps(schema), whitespace))

    def regex(self, tree: Node) -> Start:
        return self._start(rust(tree))

    def choices(self, choices: list[str]) -> Start:
        for choice in choices:
            if longer := next((other for other in choices if other != choice and other.startswith(choice)), None):
                raise ValueError(f"it would end {longer!r} at {choice!r}")
        return self.regex(_alternatives(choices))

    def _start(self, pattern: str) -> Start:
        index = self._module.Index(pattern, self._vocabulary)
        return lambda: _OutlinesMatcher(self._module.Guide(index))


class _OutlinesMatcher:
    def __init__(self, guide: Any) -> None:
        self._guide = guide

    def fill(self, mask: torch.Tensor, row: int) -> None:
        line = mask[row]
        self._guide.write_mask_into(line.data_ptr(), len(line), 4)

    def allows(self, token: int) -> bool:
        return bool(self._guide.accepts_tokens([token]))

    def accept(self, token: int) -> None:
        self._guide.advance(token, return_tokens=False)

    def complete(self) -> bool:
        return bool(self._guide.is_finished())


ENGINES: dict[str, type[LLGuidance] | type[XGrammar] | type[OutlinesCore]] = {
    engine.name: engine for engine in (LLGuidance, XGrammar, OutlinesCore)
}
"""In the order in which "auto" tries them: the strictest about JSON Schema first."""


def _alternatives(choices: list[str]) -> Node:
    """The tree of exactly these texts."""
    return either(sequence(Chars(((ord(c), ord(c)),)) for c in choice) for choice in choices)


def _with_bounded_integers(schema: Any) -> Any:
    """The schema with a bound on each side of every integer."""
    if isinstance(schema, list):
        return [_with_bounded_integers(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = dict(schema)
    for word in ("properties", "patternProperties", "$defs"):
        if word in out:
            out[word] = {name: _with_bounded_integers(part) for name, part in out[word].items()}
    for word in ("allOf", "anyOf", "oneOf", "prefixItems", "items", "additionalProperties"):
        if word in out:
            out[word] = _with_bounded_integers(out[word])
    types = out.get("type", ())
    if "integer" in ([types] if isinstance(types, str) else types) and "number" not in types:
        out.setdefault("minimum", -LARGEST)
        out.setdefault("maximum", LARGEST)
    return out


# What xgrammar and outlines-core enforce: `tests/integrations/test_grammar.py` walks every one of these words.
_STRUCTURE = {
    *("type", "enum", "anyOf", "$ref", "$defs", "properties", "required", "additionalProperties"),
    *("items", "minItems", "maxItems"),
}
_ALONE = ("anyOf", "$ref", "enum")


def _refuse_unenforced(schema: Any, enforced: set[str]) -> None:
    """ValueError for keywords that the engine would ignore."""
    for part in _schemas(schema):
        words = sorted(set(part) - {"$defs"})
        if unknown := [word for word in words if word not in enforced]:
            raise ValueError(f"it does not enforce {unknown[0]!r}")
        if any(word in part for word in _ALONE) and len(words) > 1:
            raise ValueError(f"it does not enforce {' and '.join(words)} together")
        if "type" not in part and (sizes := [word for word in words if word not in _ALONE]):
            raise ValueError(f"it does not enforce {sizes[0]!r} without a type")
        if isinstance(part.get("type"), list) and len(words) > 1:
            raise ValueError(f"it does not enforce {' and '.join(words)} together")
        if undeclared := sorted(set(part.get("required", ())) - set(part.get("properties", ()))):
            raise ValueError(f"it does not enforce the required property {undeclared[0]!r}, which is not declared")
        if part.get("properties") and part.get("additionalProperties", True) is not False:
            raise ValueError("it would take properties that are named once more for additional ones")


def _refuse_names(schema: Any) -> None:
    """ValueError for names of properties that an engine does not write as JSON does."""
    for name in (name for part in _schemas(schema) for name in part.get("properties", ())):
        if json.dumps(name) != f'"{name}"':
            raise ValueError(f"it does not write the property {name!r} as it is")


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and every one inside it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for word in ("properties", "$defs"):
        for inner in schema.get(word, {}).values():
            yield from _schemas(inner)
    for word in ("anyOf", "prefixItems"):
        for inner in schema.get(word, ()):
            yield from _schemas(inner)
    for word in ("items", "additionalProperties"):
        yield from _schemas(schema.get(word))


def gist(message: str) -> str:
    """An error's lines joined into one."""
    lines = [line.strip() for line in message.strip().splitlines()]
    return " ".join(line for line in lines if line.strip("^ "))[:300]
