"""The positions of a batch's sequences in their grammars."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastsample.checks import CPU
from fastsample.integrations.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from fastsample.integrations.grammar import Grammar


class TruncatedWarning(UserWarning):
    """Generation ended, by length or a stopping criterion, before a text was complete."""


class GrammarError(ValueError):
    """A sequence cannot follow its grammar.

    Attributes:
        row: the sequence's row.
        text: its text so far.
    """

    def __init__(self, message: str, row: int, text: bytes) -> None:
        super().__init__(message)
        self.row, self.text = row, text

    def __reduce__(self) -> tuple[Any, ...]:
        return GrammarError, (str(self), self.row, self.text)


def per_row(grammar: Any, rows: int) -> list[Grammar | None]:
    """One grammar (or None) per row, from one for all rows or a sequence with one for each.

    Raises:
        TypeError: not grammars; the message says how to make one.
        ValueError: the number of grammars is not that of the rows.
    """
    check_grammar(grammar)
    if _is_grammar(grammar):
        return [grammar] * rows
    if len(grammar) != rows:
        raise ValueError(f"grammar: expected one or {rows} (one per sequence), got {len(grammar)}")
    return list(grammar)


def check_grammar(grammar: Any) -> None:
    """TypeError, with the way to make a grammar of what was given, unless it is one, or a sequence of them or None."""
    if _is_grammar(grammar):
        return
    if isinstance(grammar, (str, bytes, dict)) or not isinstance(grammar, Sequence):
        raise TypeError(f"grammar: {_wanted(grammar)}")
    for row, given in enumerate(grammar):
        if given is not None and not _is_grammar(given):
            raise TypeError(f"grammar (row {row}): {_wanted(given)}")


def _is_grammar(given: Any) -> bool:
    return hasattr(given, "matcher") and hasattr(given, "vocabulary")


def _wanted(given: Any) -> str:
    """What was given, and how to make a grammar from it."""
    shown = repr(given)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    if isinstance(given, str):
        how = f"make one by compiler.regex({shown}), or compiler.choices([...])"
    elif hasattr(given, "json_schema") and hasattr(given, "regex"):
        how, shown = "make one by its json_schema(...), regex(...) or choices([...])", "itself"
    elif isinstance(given, (dict, type)):
        how = "make one by compiler.json_schema(...)"
    else:
        how = "make one by a GrammarCompiler"
    return f"expected a Grammar or None, got {type(given).__name__} {shown}: {how}"


class GrammarBatch:
    """The position of each sequence of a batch in its grammar, and the tokens that may come next.

    Args:
        grammars: one per sequence; None leaves a sequence free.
        stop_ids: the ids that end a sequence: allowed where its text is complete, and all that is allowed where it
            cannot go on. Without any, a sequence ends at the first token that completes its text.

    Raises:
        TypeError, ValueError: not a sequence of grammars or None, or grammars of different tokenizers.
    """

    def __init__(self, grammars: Sequence[Grammar | None], stop_ids: Iterable[int] = ()) -> None:
        if _is_grammar(grammars):
            raise TypeError("grammars: expected one per sequence, got a single Grammar: give [grammar]")
        self._grammars = per_row(grammars, len(grammars) if isinstance(grammars, Sequence) else 0)
        if not self._grammars:
            raise ValueError("grammars: expected at least one (None for a sequence without), got none")
        given = [grammar for grammar in self._grammars if grammar is not None]
        self._vocabulary: Vocabulary | None = given[0].vocabulary if given else None
        if any(grammar.vocabulary != self._vocabulary for grammar in given):
            raise ValueError("grammar: expected grammars of one tokenizer, got several")
        self._stop_ids = {int(i) for i in stop_ids}
        self._matchers = [None if grammar is None else grammar.matcher() for grammar in self._grammars]
        self._texts = [bytearray() for _ in self._grammars]
        self._ended = [False] * len(self._grammars)
        self._strayed = [False] * len(self._grammars)
        self._complete = [m is None or self._is_complete(row) for row, m in enumerate(self._matchers)]
        self._checked = [-1] * len(self._grammars)  # length of the text that last passed the check
        self._masks: _Masks | None = None

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._matchers)

    def bitmask(self, logits: torch.Tensor) -> torch.Tensor:
        """The tokens that may come next, for logits [B, V]: int32 [B, words] on their device, as `sample` takes it.

        A sequence without a grammar, or one that has ended, may have any token. The next call reuses the tensor.

        Raises:
            ValueError: the number of rows is not that of the sequences.
            GrammarError: no token of the vocabulary continues a sequence's text, or the grammar engine gave up.
        """
        if logits.ndim != 2 or len(logits) != len(self._matchers):
            raise ValueError(f"logits: expected {len(self._matchers)} rows (grammars), got {tuple(logits.shape)}")
        if self._masks is None or self._masks.vocab != logits.shape[1]:
            self._masks = _Masks(len(self._matchers), logits.shape[1], self._vocabulary, self._stop_ids)
        masks = self._masks
        bound = [row for row, m in enumerate(self._matchers) if m is not None and not self._ended[row]]
        for row in bound:
            self._ask(row, lambda matcher, row=row: matcher.fill(masks.written, row))
        strayed = [row for row in bound if self._strayed[row]]
        dead = masks.write(bound, [row for row in bound if self._complete[row]], strayed)
        if dead is not None:
            raise self._error(dead, f"grammar (row {dead}): no token of the vocabulary continues its text")
        return masks.mask if logits.device.type == "cpu" else masks.mask.to(logits.device, non_blocking=True)

    def accept(self, tokens: Sequence[int | None] | torch.Tensor, *, strict: bool = True) -> None:
        """Append a token to each sequence; sequences that have ended ignore theirs.

        Args:
            tokens: one per sequence, as a sequence, an array or a tensor; None ends a sequence, whatever its text.
            strict: whether a token that a grammar does not allow is an error. If not, the sequence has strayed: it can
                only end, and is truncated. (Beam search may fill up with such hypotheses.)

        Raises:
            TypeError, ValueError: a wrong number of tokens, or a token that is not an integer or not allowed; then no
                sequence has moved.
            GrammarError: a finished text fails its grammar's second check; then all sequences have moved.
        """
        moves: list[tuple[int, int]] = []
        ends: list[int] = []
        strays: list[int] = []
        for row, token in enumerate(self._ids(tokens)):
            if self._matchers[row] is None or self._ended[row]:
                continue
            if token is None or (token in self._stop_ids and (self._complete[row] or self._strayed[row])):
                ends.append(row)
            elif not self._strayed[row] and self._allows(row, token):
                moves.append((row, token))
            elif strict:
                raise self._error(row, f"token {token} (row {row}): the grammar does not allow it here")
            else:
                strays.append(row)
        for row in strays:
            self._strayed[row], self._complete[row] = True, False
            self._ended[row] |= not self._stop_ids
        for row, token in moves:
            self._move(row, token)
        for row in ends:
            self._ended[row] = True
        for row in (row for row, ended in enumerate(self._ended) if ended and self._complete[row]):
            self._confirm(row)

    def end(self, row: int) -> None:
        """End a sequence here; its text stays as it is."""
        self._ended[row] = True

    def allowed(self, row: int) -> list[int] | None:
        """The ids that the last `bitmask` allows a sequence; None if it may have any."""
        if self._masks is None or self._matchers[row] is None or self._ended[row]:
            return None
        bits = np.unpackbits(self._masks.mask[row].numpy().view(np.uint8), bitorder="little")
        return [int(i) for i in bits[: self._masks.vocab].nonzero()[0]]

    def text(self, row: int) -> bytes:
        """The text so far of a sequence with a grammar, without its end-of-sequence token."""
        return bytes(self._texts[row])

    def restarted(self) -> GrammarBatch:
        """The same grammars, started over."""
        return GrammarBatch(self._grammars, self._stop_ids)

    @property
    def padding(self) -> int | None:
        """An id that is not text, for sequences that have ended; None if the tokenizer has none."""
        return None if self._vocabulary is None else self._vocabulary.padding

    @property
    def ended(self) -> list[bool]:
        """Per sequence: whether it has ended."""
        return list(self._ended)

    @property
    def strayed(self) -> list[bool]:
        """Per sequence: whether it has taken a token that its grammar does not allow (see `accept`)."""
        return list(self._strayed)

    @property
    def truncated(self) -> list[bool]:
        """Per sequence: whether its text is not (yet) a whole text of its grammar.

        Raises:
            GrammarError: a text that the engine calls whole fails the grammar's second check.
        """
        for row in (row for row, complete in enumerate(self._complete) if complete):
            self._confirm(row)
        return [not complete for complete in self._complete]

    def _ids(self, tokens: Any) -> list[int | None]:
        """One id or None per sequence."""
        given = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
        given = [one[0] if isinstance(one, list) and len(one) == 1 else one for one in given]
        if len(given) != len(self._matchers):
            raise ValueError(f"tokens: expected {len(self._matchers)} (one per grammar), got {len(given)}")
        ids: list[int | None] = []
        for row, token in enumerate(given):
            try:
                ids.append(None if token is None else operator.index(token))
            except TypeError:
                raise TypeError(f"tokens (row {row}): expected an int or None, got {token!r}") from None
        return ids

    def _allows(self, row: int, token: int) -> bool:
        if self._vocabulary is None or token in self._stop_ids or not self._vocabulary.is_text(token):
            return False
        return bool(self._ask(row, lambda matcher: matcher.allows(token)))

    def _move(self, row: int, token: int) -> None:
        if self._vocabulary is not None:
            self._texts[row] += self._vocabulary.tokens[token]
        self._ask(row, lambda matcher: matcher.accept(token))
        self._complete[row] = self._is_complete(row)
        self._ended[row] = self._complete[row] and not self._stop_ids

    def _is_complete(self, row: int) -> bool:
        return bool(self._ask(row, lambda matcher: matcher.complete()))

    def _ask(self, row: int, question: Any) -> Any:
        """A row's matcher's answer; GrammarError if it has given up."""
        try:
            return question(self._matchers[row])
        except RuntimeError as error:
            raise self._error(row, f"grammar (row {row}): {error}") from None

    def _confirm(self, row: int) -> None:
        """Check a text that the engine calls whole; if it is not, it is truncated, and this raises."""
        grammar, text = self._grammars[row], bytes(self._texts[row])
        if grammar is None or self._checked[row] == len(text):
            return
        fault = grammar.fault(text)
        if fault is not None:
            self._complete[row] = False
            self._ended[row] = True
            shown = text.decode(errors="replace")
            raise self._error(row, f"grammar (row {row}): {shown!r} breaks it: {fault} ({grammar.backend} let it pass)")
        self._checked[row] = len(text)

    def _error(self, row: int, message: str) -> GrammarError:
        return GrammarError(message, row, bytes(self._texts[row]))


class _Masks:
    """The mask's words as the engines write them, and as the kernel reads them."""

    def __init__(self, rows: int, vocab: int, vocabulary: Vocabulary | None, stop_ids: set[int]) -> None:
        self.vocab = vocab
        # An engine's mask has one bit more than its vocabulary; the logits may have more tokens, or fewer.
        end = 0 if vocabulary is None else vocabulary.end
        self.written = torch.zeros(rows, end // 32 + 1, dtype=torch.int32, device=CPU)
        self.mask = torch.full((rows, (vocab + 31) // 32), -1, dtype=torch.int32, device=CPU)
        self._words = min(self.written.shape[1], self.mask.shape[1])
        words = self.mask.shape[1]
        tokens = [] if vocabulary is None else vocabulary.tokens
        text = {i for i, token in enumerate(tokens) if token} - stop_ids
        self._text = _bits(text, words)[: self._words]
        self._stops = _bits(stop_ids, words)

    def write(self, bound: list[int], complete: list[int], strayed: list[int]) -> int | None:
        """Make the mask from the engines' words; unbound rows may have any token. Returns the first row without one."""
        self.mask.zero_()
        torch.bitwise_and(self.written[:, : self._words], self._text, out=self.mask[:, : self._words])
        if strayed:
            self.mask[strayed] = self._stops
        if complete:
            self.mask[complete] |= self._stops
        if len(bound) < len(self.mask):
            free = torch.ones(len(self.mask), dtype=torch.bool, device=CPU)
            free[bound] = False
            self.mask[free] = -1
        dead = (self.mask == 0).all(1)
        return int(dead.nonzero()[0, 0]) if bool(dead.any()) else None


def _bits(ids: Iterable[int], words: int) -> torch.Tensor:
    """int32 [words] with the bits of these ids set; ids that do not fit are left out."""
    bits = np.zeros(32 * words, dtype=np.uint8)
    bits[[i for i in ids if 0 <= i < 32 * words]] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))
