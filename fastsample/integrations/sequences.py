"""Sequences that a decoder continues: the slots of a Sampler with their histories, and the loop around them.

A sequence draws with its own seed at its own positions, so its text is the same alone, in any batch and in any slot, as
long as the decoder computes the same logits for it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastsample.checks import MAX_VOCAB
from fastsample.inputs import BreakerIds
from fastsample.outputs import SampleOutput
from fastsample.sampler import Sampler

Ids = np.ndarray[Any, Any]
Advance = Callable[[dict[int, int]], torch.Tensor]
"""The new tokens of some sequences, by their slots, to the logits [n, V] that follow them, in the same order."""


def token_ids(name: str, ids: Any, least: int = 0) -> Ids:
    """Ids of a text, int64 [L]: a list, an array or a tensor of integers 0 <= id < 2^20.

    Raises:
        TypeError, ValueError: something else, or fewer than `least`; the message names the argument.
    """
    try:
        table = np.asarray(ids if len(ids) else np.zeros(0, dtype=np.int64))
    except (TypeError, ValueError):
        table = np.empty(0, dtype=object)
    if table.ndim != 1 or table.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected a list or an array [L] of token ids, got {_shown(ids)}")
    if len(table) < least:
        raise ValueError(f"{name}: expected at least {least} token id, got none")
    wrong = np.flatnonzero((table < 0) | (table >= MAX_VOCAB))
    if len(wrong):
        raise ValueError(f"{name}[{wrong[0]}] = {table[wrong[0]]}: expected a token id, 0 <= id < 2^20")
    return table.astype(np.int64)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:50]}..."


def prompts_of(name: str, prompts: Any, encode: Callable[[str], Sequence[int]] | None = None) -> list[Ids]:
    """A list of prompts as ids; where there is a tokenizer's `encode`, any of them may be a string.

    Raises:
        TypeError, ValueError: no list, an empty one, or a prompt that is none; the message names the prompt.
    """
    if isinstance(prompts, (str, bytes)) or not hasattr(prompts, "__len__"):
        raise TypeError(f"{name}: expected a list of prompts, got {_shown(prompts)}")
    if len(prompts) == 0:
        raise ValueError(f"{name}: expected at least one prompt, got none")
    texts = [encode(one) if encode is not None and isinstance(one, str) else one for one in prompts]
    return [token_ids(f"{name}[{row}]", one, 1) for row, one in enumerate(texts)]


def end_ids(name: str, ids: Any) -> frozenset[int]:
    """The ids that end a sequence: one, a list of them, or an empty list."""
    try:
        return frozenset([operator.index(ids)])
    except TypeError:
        return frozenset(token_ids(name, ids).tolist())


class Columns:
    """Rows of ids that grow: int64 [B, L], padded with -1."""

    def __init__(self, rows: int) -> None:
        self._table = np.full((rows, 64), -1, dtype=np.int64)
        self._lengths = np.zeros(rows, dtype=np.int64)

    def put(self, row: int, ids: Ids) -> None:
        """A row's ids, all new."""
        self._reserve(len(ids))
        self._table[row] = -1
        self._table[row, : len(ids)] = ids
        self._lengths[row] = len(ids)

    def append(self, rows: Sequence[int], ids: Ids) -> None:
        """One more id for each of these rows."""
        at = self._lengths[rows]
        self._reserve(int(at.max(initial=0)) + 1)
        self._table[rows, at] = ids
        self._lengths[rows] = at + 1

    def of(self, rows: Sequence[int]) -> Ids:
        """These rows, as wide as their longest."""
        return self._table[rows, : int(self._lengths[rows].max(initial=0))]

    def _reserve(self, width: int) -> None:
        if width > self._table.shape[1]:
            more = np.full((len(self._table), max(width, self._table.shape[1])), -1, dtype=np.int64)
            self._table = np.concatenate([self._table, more], 1)


class Sequences:
    """What the sequences in a Sampler's slots have of prompt and output, for whatever reads it.

    Args:
        sampler: its slots are the sequences'.
        dry_breakers: as for `fastsample.sample`, for all slots.
    """

    def __init__(self, sampler: Sampler, dry_breakers: BreakerIds | None = None) -> None:
        self.sampler = sampler
        self._breakers = dry_breakers
        self._all = list(range(sampler.batch_size))
        self._prompts, self._outputs = Columns(sampler.batch_size), Columns(sampler.batch_size)

    def start(self, slot: int, prompt: Ids) -> None:
        """A sequence begins in a slot: its history is this prompt."""
        self._prompts.put(slot, prompt)
        self._outputs.put(slot, prompt[:0])

    def draw(self, logits: torch.Tensor, slots: Sequence[int], **inputs: Any) -> SampleOutput:
        """The next tokens of these slots from logits [n, V], which become part of their histories."""
        if self.sampler._penalised:
            inputs |= {"prompt_ids": self._prompts.of(slots), "output_ids": self._outputs.of(slots)}
            if self._breakers is not None:
                inputs["dry_breakers"] = self._breakers
        # After a model has run, caches are cold and each line of Python counts: all slots take the shorter way.
        out = self.sampler(logits, rows=None if slots == self._all else slots, **inputs)
        self._outputs.append(slots, out.tokens.numpy())
        return out

    def run(
        self, logits: torch.Tensor, advance: Advance, ends: Collection[int] | Callable[[int], bool], steps: int
    ) -> Iterator[dict[int, int]]:
        """All slots from their first logits [B, V] until each has ended; yields each step's tokens by slot.

        Args:
            ends: the ids that end a sequence, or what says of an id whether it does. They are yielded too.
            steps: tokens of each sequence at most.
        """
        is_end = ends if callable(ends) else ends.__contains__
        slots = self._all
        for left in range(steps - 1, -1, -1):
            tokens = dict(zip(slots, self.draw(logits, slots).tokens.tolist(), strict=True))
            yield tokens
            slots = [slot for slot, token in tokens.items() if not is_end(token)]
            if not slots or not left:
                return
            logits = advance({slot: tokens[slot] for slot in slots})


def collected(steps: Iterator[dict[int, int]], rows: int) -> list[list[int]]:
    """The new ids of each sequence."""
    found: list[list[int]] = [[] for _ in range(rows)]
    for tokens in steps:
        for row, token in tokens.items():
            found[row].append(token)
    return found
