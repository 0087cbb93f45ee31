"""The bytes of a tokenizer's tokens, as every grammar engine gets them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np


class Vocabulary:
    """The bytes of every text token.

    Attributes:
        tokens: bytes by id; b"" for special tokens and unused ids.
        end: the id after the last, which no model draws.
        padding: the id of the padding token or else of another special token; None if there is none.

    Vocabularies of the same tokens are equal. A pickle takes about the bytes of the tokens.

    Args:
        tokenizer: one of transformers or of tokenizers, byte-level BPE or SentencePiece.

    Raises:
        TypeError: not a tokenizer.
        ValueError: a tokenizer whose tokens' bytes cannot be determined.
    """

    def __init__(self, tokenizer: Any) -> None:
        ids, special, self.padding, decoder = _described(tokenizer)
        as_bytes = _reader(tokenizer, decoder)
        self.end = max(ids.values()) + 1
        self.tokens = [b""] * self.end
        for token, i in ids.items():
            if i not in special:
                self.tokens[i] = as_bytes(token)

    def is_text(self, token: int) -> bool:
        """Whether this is the id of a token with a text of its own."""
        return 0 <= token < self.end and self.tokens[token] != b""

    def bytes_of(self, tokens: Iterable[int]) -> bytes:
        """The bytes of these tokens' text."""
        return b"".join(self.tokens[token] for token in tokens)

    def with_quotes(self, count: int) -> Any:
        """The ids, int64, of tokens with at least this many quotation marks (1 to 3)."""
        return self._quotes[count - 1]

    @cached_property
    def _quotes(self) -> list[Any]:
        counts = np.fromiter((token.count(b'"') for token in self.tokens), np.int64, self.end)
        return [np.flatnonzero(counts >= least) for least in (1, 2, 3)]

    @cached_property
    def _packed(self) -> tuple[int | None, bytes, bytes]:
        """The padding id, and the tokens' lengths and bytes."""
        lengths = np.fromiter(map(len, self.tokens), np.int32, self.end)
        return self.padding, lengths.tobytes(), b"".join(self.tokens)

    @cached_property
    def digest(self) -> bytes:
        """A digest, equal for equal tokens."""
        return sha256(repr(self.padding).encode() + b"".join(self._packed[1:])).digest()

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Vocabulary) and self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        padding, lengths, text = self._packed
        return _unpacked, (padding, zlib.compress(lengths), zlib.compress(text))

    def __deepcopy__(self, memo: dict[int, Any]) -> Vocabulary:
        return self  # nothing changes it


def _unpacked(padding: int | None, lengths: bytes, text: bytes) -> Vocabulary:
    vocabulary = Vocabulary.__new__(Vocabulary)
    ends = np.cumsum(np.frombuffer(zlib.decompress(lengths), np.int32)).tolist()
    whole = zlib.decompress(text)
    vocabulary.padding, vocabulary.end = padding, len(ends)
    vocabulary.tokens = [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return vocabulary


def _described(tokenizer: Any) -> tuple[dict[str, int], set[int], int | None, Any]:
    """A tokenizer's ids by token, its special ids, its padding id, and its decoder."""
    if isinstance(tokenizer, str):
        raise TypeError(
            f"tokenizer: expected a tokenizer, got the str {tokenizer!r}: "
            f"load it first, by transformers.AutoTokenizer.from_pretrained({tokenizer!r})"
        )
    if hasattr(tokenizer, "get_added_tokens_decoder"):  # one of tokenizers
        added = tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        pad = None if tokenizer.padding is None else tokenizer.padding["pad_id"]
        decoder = tokenizer.decoder
    elif hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "all_special_ids"):
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        pad = getattr(tokenizer, "pad_token_id", None)
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    else:
        raise TypeError(
            f"tokenizer: expected a tokenizer of transformers or tokenizers, got {type(tokenizer).__name__}"
        )
    ids = tokenizer.get_vocab()
    if not ids:
        raise ValueError("tokenizer: it has no tokens")
    return ids, special, pad if pad is not None else min(special, default=None), decoder


def _reader(tokenizer: Any, decoder: Any) -> Callable[[str], bytes]:
    """The function that reads bytes from this kind of tokenizer's token names."""
    how = "" if decoder is None else decoder.__getstate__().decode()
    if '"ByteLevel"' in how or hasattr(tokenizer, "byte_decoder"):
        return _byte_level
    if '"ByteFallback"' in how or "\u2581" in how or hasattr(tokenizer, "sp_model"):
        return _sentence_piece
    raise ValueError(
        f"tokenizer: {type(tokenizer).__name__} is neither byte-level nor SentencePiece: the bytes of its tokens are "
        "not known"
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's names of bytes: printable bytes name themselves, the others are U+0100 and up, in order."""
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
