"""Structured output: text that matches a JSON schema, a regular expression or one of some choices, every time.

    compiler = GrammarCompiler(tokenizer)
    grammar = compiler.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]})
    model.generate(**inputs, do_sample=True, custom_generate=fs_generate(seed=7, grammar=grammar))

A grammar engine (llguidance, xgrammar or outlines-core, whichever is installed) says which tokens may come next; they
go to the fused kernel as its bitmask, in the pass that samples. The text is that of the new tokens alone, without the
prompt. Special tokens are never part of it; a model's end-of-sequence tokens are allowed where the text is complete,
and alone where it cannot go on. In a loop of your own, `GrammarBatch` keeps the masks of a batch:

    batch = GrammarBatch([grammar, None], stop_ids=[tokenizer.eos_token_id])
    tokens = sampler(logits, bitmask=batch.bitmask(logits)).tokens
    batch.accept(tokens.tolist())
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch

from fastsample.integrations.grammar_engines import ENGINES, Matcher, Start, Vocabulary, gist
from fastsample.params import CPU

__all__ = ["Grammar", "GrammarBatch", "GrammarCompiler", "TruncatedWarning"]

INSTALL = "pip install 'fastsample[grammar]'"


class TruncatedWarning(UserWarning):
    """Generation ended, by its number of tokens or a stopping criterion, before a text was one of its grammar."""


class GrammarCompiler:
    """Makes grammars for one tokenizer; the work on its vocabulary is done once.

    Args:
        tokenizer: a tokenizer of transformers, byte-level BPE or SentencePiece.
        backend: "llguidance", "xgrammar", "outlines-core", or "auto": the first of these, in this order, that is
            installed and takes the grammar. xgrammar and outlines-core ignore some keywords of JSON Schema; a schema
            that holds one is refused. outlines-core goes on from a complete text only by a token that completes it
            again.
        any_whitespace: allow any whitespace between the parts of JSON. By default there is one form: that of
            `json.dumps` (outlines-core: without spaces), which leaves a small model no room to dawdle.

    Raises:
        ValueError: unknown backend, or a tokenizer whose tokens' bytes cannot be told.
        ImportError: the backend (with "auto": every one) is not installed.
    """

    def __init__(self, tokenizer: Any, *, backend: str = "auto", any_whitespace: bool = False) -> None:
        if backend != "auto" and backend not in ENGINES:
            raise ValueError(f"backend = {backend!r}: expected 'auto', {', '.join(map(repr, ENGINES))}")
        self._vocabulary = Vocabulary(tokenizer)
        self._any_whitespace = any_whitespace
        self._engines: list[Any] = []
        missing: list[str] = []
        for name in ENGINES if backend == "auto" else (backend,):
            try:
                self._engines.append(ENGINES[name](self._vocabulary))
            except ImportError as error:
                missing.append(f"{name} ({error})")
        if not self._engines:
            raise ImportError(f"grammars need {' or '.join(missing)}: {INSTALL}")

    def json_schema(self, schema: Any) -> Grammar:
        """A grammar of the JSON texts that validate against a schema.

        Args:
            schema: a JSON Schema as dict, bool or JSON text, or a pydantic model.

        Raises:
            ValueError: the schema is no JSON, no JSON Schema, cannot be satisfied, or holds what no backend enforces.
            ImportError: jsonschema, which checks the schema itself, is not installed.
        """
        if hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise ValueError(f"json_schema: not JSON: {error}") from None
        _check_schema(schema)
        return self._compile("json_schema", schema, self._any_whitespace)

    def regex(self, pattern: str) -> Grammar:
        r"""A grammar of the texts that a regular expression matches from end to end.

        Args:
            pattern: in the backend's dialect (llguidance, outlines-core: Rust's; xgrammar: ECMAScript's), without
                look-around. A leading ^ and a trailing $ are understood. \d, \w and \s are ASCII, so that every
                dialect agrees on what they match; \D, \W, \S and [^...] are the dialect's.

        Raises:
            TypeError, ValueError: not a pattern that a backend takes.
        """
        if not isinstance(pattern, str):
            raise TypeError(f"regex: expected a str, got {type(pattern).__name__}")
        return self._compile("regex", _in_ascii(_unanchored(pattern)))

    def choices(self, choices: Sequence[str]) -> Grammar:
        """A grammar of exactly these texts.

        Raises:
            TypeError, ValueError: not a sequence of non-empty strings.
        """
        if isinstance(choices, str) or not all(isinstance(choice, str) for choice in choices):
            raise TypeError(f"choices: expected a sequence of str, got {choices!r}")
        if not choices or not all(choices):
            raise ValueError(f"choices: expected at least one, and none empty, got {choices!r}")
        return self._compile("choices", list(dict.fromkeys(choices)))

    def _compile(self, kind: str, source: Any, *options: Any) -> Grammar:
        """The grammar of the first engine that takes it, or an error with each one's reason."""
        reasons: list[str] = []
        for engine in self._engines:
            try:
                start = getattr(engine, kind)(source, *options)
            except (ValueError, TypeError) as error:
                reasons.append(f"{engine.name}: {gist(str(error))}")
            else:
                return Grammar(engine.name, start, self._vocabulary)
        text = source if isinstance(source, str) else json.dumps(source)
        shown = text if len(text) <= 80 else text[:77] + "..."
        raise ValueError(f"{kind} {shown}: " + "; ".join(reasons))


class Grammar:
    """A compiled grammar, made by a GrammarCompiler. Any number of sequences may follow it at once.

    Attributes:
        backend: the grammar engine that serves it.
        vocabulary: the tokens that it was compiled for.
    """

    def __init__(self, backend: str, start: Start, vocabulary: Vocabulary) -> None:
        self.backend = backend
        self.vocabulary = vocabulary
        self._start = start

    def matcher(self) -> Matcher:
        """A new text's way through the grammar."""
        return self._start()

    def is_complete(self, tokens: Iterable[int]) -> bool:
        """Whether the text of these tokens (without an end-of-sequence token) is a whole text of the grammar."""
        matcher = self.matcher()
        text = self.vocabulary.is_text
        return all(text(int(token)) and matcher.accept(int(token)) for token in tokens) and matcher.complete()


class GrammarBatch:
    """Where each sequence of a batch stands in its grammar, and which tokens it may go on with.

    Args:
        grammars: one per sequence; None leaves a sequence free.
        stop_ids: the ids that end a sequence: allowed where its text is complete, and alone where it cannot go on.
            Without any, a sequence ends at the first token that completes its text.

    Raises:
        TypeError, ValueError: no grammar, or grammars of different tokenizers.
    """

    def __init__(self, grammars: Sequence[Grammar | None], stop_ids: Iterable[int] = ()) -> None:
        for row, grammar in enumerate(grammars):
            if grammar is not None and not isinstance(grammar, Grammar):
                raise TypeError(f"grammar (row {row}): expected a Grammar or None, got {type(grammar).__name__}")
        given = [grammar for grammar in grammars if grammar is not None]
        if not given:
            raise ValueError("grammar: expected at least one, got none")
        self._vocabulary = given[0].vocabulary
        if any(grammar.vocabulary.tokens != self._vocabulary.tokens for grammar in given):
            raise ValueError("grammar: expected grammars of one tokenizer, got several")
        self._grammars = list(grammars)
        self._stop_ids = {int(i) for i in stop_ids}
        self._matchers = [None if grammar is None else grammar.matcher() for grammar in grammars]
        self._ended = [False] * len(grammars)
        self._complete = [matcher is None or matcher.complete() for matcher in self._matchers]
        self._masks: _Masks | None = None

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._matchers)

    def bitmask(self, logits: torch.Tensor) -> torch.Tensor:
        """The tokens that may come next, for logits [B, V]: int32 [B, words] on their device, as `sample` takes it.

        A sequence without a grammar, or past its end, may have any token. The next call writes to the same tensor.

        Raises:
            ValueError: another number of rows, or no token of the vocabulary continues a sequence's text.
        """
        if logits.ndim != 2 or len(logits) != len(self._matchers):
            raise ValueError(f"logits: expected {len(self._matchers)} rows (grammars), got {tuple(logits.shape)}")
        if self._masks is None or self._masks.vocab != logits.shape[1]:
            self._masks = _Masks(len(self._matchers), logits.shape[1], self._vocabulary, self._stop_ids)
        bound = [row for row, m in enumerate(self._matchers) if m is not None and not self._ended[row]]
        mask = self._masks.write([(row, self._matchers[row], self._complete[row]) for row in bound])
        return mask if logits.device.type == "cpu" else mask.to(logits.device, non_blocking=True)

    def accept(self, tokens: Sequence[int | None], *, strict: bool = True) -> None:
        """Append a token to each sequence; those that have ended ignore theirs.

        Args:
            tokens: one per sequence; None ends a sequence, whatever its text.
            strict: whether a token that its grammar does not allow is an error, or ends the sequence.

        Raises:
            ValueError: another number of tokens, or a token that is not allowed.
        """
        if len(tokens) != len(self._matchers):
            raise ValueError(f"tokens: expected {len(self._matchers)} (one per grammar), got {len(tokens)}")
        for row, (matcher, token) in enumerate(zip(self._matchers, tokens, strict=True)):
            if matcher is None or self._ended[row]:
                continue
            if token is None or (token in self._stop_ids and self._complete[row]):
                self._ended[row] = True
            elif not self._vocabulary.is_text(token) or not matcher.accept(token):
                if strict:
                    raise ValueError(f"token {token} (row {row}): the grammar does not allow it here")
                self._ended[row] = True
            else:
                self._complete[row] = matcher.complete()
                self._ended[row] = self._complete[row] and not self._stop_ids

    def restarted(self) -> GrammarBatch:
        """The same grammars at their beginning."""
        return GrammarBatch(self._grammars, self._stop_ids)

    @property
    def padding(self) -> int | None:
        """An id that is no text, for sequences that have ended; None where the tokenizer has none."""
        return self._vocabulary.padding

    @property
    def ended(self) -> list[bool]:
        """Per sequence: whether it has ended."""
        return list(self._ended)

    @property
    def truncated(self) -> list[bool]:
        """Per sequence: whether its text is not (yet) a whole text of its grammar."""
        return [not complete for complete in self._complete]


class _Masks:
    """The words that the engines write, and those that the kernel reads."""

    def __init__(self, rows: int, vocab: int, vocabulary: Vocabulary, stop_ids: set[int]) -> None:
        self.vocab = vocab
        # An engine's mask has a bit for the id past its vocabulary's end; the logits may be more, or fewer.
        self._written = torch.zeros(rows, vocabulary.end // 32 + 1, dtype=torch.int32, device=CPU)
        self._mask = torch.full((rows, (vocab + 31) // 32), -1, dtype=torch.int32, device=CPU)
        self._words = min(self._written.shape[1], self._mask.shape[1])
        words = self._mask.shape[1]
        text = {i for i, token in enumerate(vocabulary.tokens) if token} - stop_ids
        self._text = _bits(text, words)[: self._words]
        self._stops = _bits(stop_ids, words)

    def write(self, bound: list[tuple[int, Any, bool]]) -> torch.Tensor:
        """Masks of the (row, matcher, whether its text is complete) given; the other rows are free."""
        for row, matcher, _ in bound:
            matcher.fill(self._written, row)
        self._mask.zero_()
        torch.bitwise_and(self._written[:, : self._words], self._text, out=self._mask[:, : self._words])
        rows = [row for row, *_ in bound]
        if complete := [row for row, _, done in bound if done]:
            self._mask[complete] |= self._stops
        if len(rows) < len(self._mask):
            free = torch.ones(len(self._mask), dtype=torch.bool, device=CPU)
            free[rows] = False
            self._mask[free] = -1
        dead = (self._mask == 0).all(1)
        if bool(dead.any()):
            raise ValueError(
                f"grammar (row {int(dead.nonzero()[0, 0])}): no token of the vocabulary continues its text"
            )
        return self._mask


def _bits(ids: Iterable[int], words: int) -> torch.Tensor:
    """int32 [words] with the bits of these ids set; those that do not fit are left out."""
    bits = np.zeros(32 * words, dtype=np.uint8)
    bits[[i for i in ids if i < 32 * words]] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))


def _unanchored(pattern: str) -> str:
    """Without the anchors that a match from end to end implies."""
    body = pattern[1:] if pattern.startswith("^") else pattern
    escaped = len(body[:-1]) - len(body[:-1].rstrip("\\"))
    return body[:-1] if body.endswith("$") and escaped % 2 == 0 else body


_ASCII = {r"\d": "0-9", r"\w": "0-9A-Za-z_", r"\s": r" \t\n\r\f\x0b"}


def _in_ascii(pattern: str) -> str:
    """The pattern with its classes of digits, word characters and spaces spelt out, except under a negation."""
    pieces = []
    inside = negated = False
    for piece in re.findall(r"\\.|\[\^?|.", pattern, re.DOTALL):
        if piece in ("[", "[^") and not inside:
            inside, negated = True, piece == "[^"
        elif piece == "]":
            inside = negated = False
        elif piece in _ASCII and not negated:
            piece = _ASCII[piece] if inside else f"[{_ASCII[piece]}]"
        pieces.append(piece)
    return "".join(pieces)


def _check_schema(schema: Any) -> None:
    """ValueError where this is no JSON Schema."""
    if not isinstance(schema, (dict, bool)):
        raise TypeError(f"json_schema: expected a dict, a bool or JSON text of one, got {type(schema).__name__}")
    try:
        jsonschema = import_module("jsonschema")
    except ImportError:
        raise ImportError(f"json_schema needs jsonschema: {INSTALL}") from None
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"json_schema: at {error.json_path}: {error.message}") from None
