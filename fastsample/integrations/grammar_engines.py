"""The grammar engines that `fastsample.integrations.grammar` drives: llguidance, xgrammar and outlines-core.

All see the same vocabulary, the bytes of each token as our own reading of the tokenizer gives them, plus one id past
its end that serves as their end of text: what ends a sequence is the model's affair (see `GrammarBatch`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Protocol, TypeAlias

import torch


class Matcher(Protocol):
    """One text on its way through a grammar."""

    def fill(self, mask: torch.Tensor, row: int) -> None:
        """Set the bits of the tokens that may come next in mask[row] (int32 words); others become 0."""

    def accept(self, token: int) -> bool:
        """Append a token; False where the grammar does not allow it."""

    def complete(self) -> bool:
        """Whether the text so far is a whole text of the grammar."""


Start: TypeAlias = Callable[[], Matcher]


class Vocabulary:
    """The bytes of every token that is text.

    Attributes:
        tokens: bytes by id; b"" for special tokens and ids that are none.
        end: the id past the last, which no model draws.
        padding: a special token's id, the padding token's where there is one; None where there is none.
    """

    def __init__(self, tokenizer: Any) -> None:
        ids = tokenizer.get_vocab()
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        pad = getattr(tokenizer, "pad_token_id", None)
        self.padding = pad if pad is not None else min(special, default=None)
        as_bytes = _reader(tokenizer)
        self.end = max(ids.values()) + 1
        self.tokens = [b""] * self.end
        for token, i in ids.items():
            if i not in special:
                self.tokens[i] = as_bytes(token)

    def is_text(self, token: int) -> bool:
        """Whether this is the id of a token with a text of its own."""
        return 0 <= token < self.end and self.tokens[token] != b""


def _reader(tokenizer: Any) -> Callable[[str], bytes]:
    """How a tokenizer of this kind writes bytes in the names of its tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = "" if backend is None or backend.decoder is None else backend.decoder.__getstate__().decode()
    if '"ByteLevel"' in decoder or hasattr(tokenizer, "byte_decoder"):
        return _byte_level
    if '"ByteFallback"' in decoder or "\u2581" in decoder or hasattr(tokenizer, "sp_model"):
        return _sentence_piece
    raise ValueError(
        f"tokenizer: {type(tokenizer).__name__} is neither byte-level nor SentencePiece: the bytes of its tokens are "
        "not known"
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's names of bytes: printable ones stand for themselves, the others for U+0100 and on, in their order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    if all(character in _ALPHABET for character in token):
        return bytes(_ALPHABET[character] for character in token)
    return token.encode()  # an added token is text as it is


def _sentence_piece(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


class LLGuidance:
    """https://github.com/guidance-ai/llguidance: refuses what it cannot enforce."""

    name = "llguidance"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._module = import_module("llguidance")
        wrapper = import_module("llguidance._tokenizer").TokenizerWrapper(_ForLLGuidance(vocabulary))
        self._tokenizer = self._module.LLTokenizer(wrapper)

    def json_schema(self, schema: Any, any_whitespace: bool) -> Start:
        whitespace = {"whitespace_flexible": any_whitespace}
        separators = {} if any_whitespace else {"item_separator": ", ", "key_separator": ": "}
        text = json.dumps(schema if isinstance(schema, dict) else {} if schema else {"enum": []})
        return self._start(self._module.LLMatcher.grammar_from_json_schema(text, overrides=whitespace | separators))

    def regex(self, pattern: str) -> Start:
        return self._start(self._module.LLMatcher.grammar_from_regex(pattern))

    def choices(self, choices: list[str]) -> Start:
        return self.regex(_alternatives(choices))

    def _start(self, grammar: str) -> Start:
        matcher = self._module.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(gist(matcher.get_error()))
        return lambda: _LLMatcher(matcher.deep_copy())


class _ForLLGuidance:
    """What TokenizerWrapper asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.end
        self.special_token_ids = [vocabulary.end]
        self.tokens = [*vocabulary.tokens, b""]
        self._ids = {token: i for i, token in enumerate(vocabulary.tokens) if token}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text that the grammar leaves no choice in: the longest that fits, again and again."""
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

    def accept(self, token: int) -> bool:
        # validate first: a token that is not allowed would leave the matcher in a state of error.
        return bool(self._matcher.validate_tokens([token])) and bool(self._matcher.consume_token(token))

    def complete(self) -> bool:
        return bool(self._matcher.is_accepting())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"grammar: llguidance: {gist(self._matcher.get_error())}")


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
        options = {"any_whitespace": any_whitespace, "strict_mode": False}
        return self._start(self._compiler.compile_json_schema, json.dumps(schema), **options)

    def regex(self, pattern: str) -> Start:
        return self._start(self._compiler.compile_regex, pattern)

    def choices(self, choices: list[str]) -> Start:
        return self._start(
            self._compiler.compile_grammar, "root ::= " + " | ".join(json.dumps(c, ensure_ascii=False) for c in choices)
        )

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

    def accept(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))

    def complete(self) -> bool:
        return bool(self._matcher.is_completed())


class OutlinesCore:
    """https://github.com/dottxt-ai/outlines-core: a schema becomes a regular expression, and that an automaton.

    Where a text is complete, it goes on only by a token that completes it again.
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
        for name in (name for part in _schemas(schema) for name in part.get("properties", ())):
            if json.dumps(name, ensure_ascii=False) != f'"{name}"':
                raise ValueError(f"it does not escape the property {name!r}")
        build = self._module.json_schema.build_regex_from_schema
        return self.regex(build(json.dumps(schema), r"[ \n\t\r]*" if any_whitespace else ""))

    def regex(self, pattern: str) -> Start:
        index = self._module.Index(pattern, self._vocabulary)
        return lambda: _OutlinesMatcher(self._module.Guide(index))

    def choices(self, choices: list[str]) -> Start:
        for choice in choices:
            if longer := next((other for other in choices if other != choice and other.startswith(choice)), None):
                raise ValueError(f"it would end {longer!r} at {choice!r}")
        return self.regex(_alternatives(choices))


class _OutlinesMatcher:
    def __init__(self, guide: Any) -> None:
        self._guide = guide

    def fill(self, mask: torch.Tensor, row: int) -> None:
        line = mask[row]
        self._guide.write_mask_into(line.data_ptr(), len(line), 4)

    def accept(self, token: int) -> bool:
        try:
            self._guide.advance(token, return_tokens=False)
        except ValueError:
            return False
        return True

    def complete(self) -> bool:
        return bool(self._guide.is_finished())


ENGINES: dict[str, type[LLGuidance] | type[XGrammar] | type[OutlinesCore]] = {
    engine.name: engine for engine in (LLGuidance, XGrammar, OutlinesCore)
}
"""In the order in which "auto" asks them: the strictest about JSON Schema first."""


def _alternatives(choices: list[str]) -> str:
    """A regular expression of exactly these texts, in the dialect of Rust's regex crates."""
    return "|".join("".join(rf"\x{{{ord(c):X}}}" if not c.isalnum() else c for c in choice) for choice in choices)


_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$id", "$comment", "$defs", "definitions"),
}
_STRUCTURE = {
    *("type", "enum", "const", "anyOf", "$ref", "properties", "required", "additionalProperties"),
    *("items", "minItems", "maxItems"),
}
_ALONE = ("anyOf", "$ref", "enum", "const")


def _refuse_unenforced(schema: Any, enforced: set[str]) -> None:
    """ValueError for what an engine that ignores what it does not know would let pass."""
    for part in _schemas(schema):
        constraints = sorted(set(part) - _ANNOTATIONS)
        if unknown := [name for name in constraints if name not in enforced]:
            raise ValueError(f"it does not enforce {unknown[0]!r}")
        alone = next((name for name in _ALONE if name in part), None)
        if alone and constraints not in ([alone], [alone, "type"]):
            raise ValueError(f"it does not enforce {' and '.join(constraints)} together")
        if "type" not in part and (sizes := [name for name in constraints if name.startswith(("min", "max"))]):
            raise ValueError(f"it does not enforce {sizes[0]!r} without a type")
        if undeclared := sorted(set(part.get("required", ())) - set(part.get("properties", ()))):
            raise ValueError(f"it does not enforce the required property {undeclared[0]!r}, which is not declared")
        if "type" in part and alone:
            _refuse_values(part)


def _refuse_values(part: dict[str, Any]) -> None:
    """ValueError for an enum or const with a value that is not of the type given beside it."""
    if "enum" not in part and "const" not in part:
        raise ValueError(f"it does not enforce {' and '.join(sorted(set(part) - _ANNOTATIONS))} together")
    of_type = import_module("jsonschema").Draft202012Validator({"type": part["type"]}).is_valid
    for value in part.get("enum", [part.get("const")]):
        if not of_type(value):
            raise ValueError(f"it does not enforce the type {part['type']!r} of {value!r}")


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and every one inside it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for name in ("properties", "$defs", "definitions"):
        for inner in (schema.get(name) or {}).values():
            yield from _schemas(inner)
    for name in ("anyOf", "prefixItems"):
        for inner in schema.get(name) or ():
            yield from _schemas(inner)
    for name in ("items", "additionalProperties"):
        yield from _schemas(schema.get(name))


def gist(message: str) -> str:
    """An error of several lines, in one."""
    lines = [line.strip() for line in message.strip().splitlines()]
    return " ".join(line for line in lines if line.strip("^ "))[:300]
