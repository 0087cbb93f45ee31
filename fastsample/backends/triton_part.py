"""What a rank answers about its part of rows by Triton's kernels (kernels/part.py, part_list.py, part_draws.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from fastsample.backends import Question
from fastsample.backends.triton_memory import ARRIVALS, Layout, Memory, State, Table, kernels

Tensor = torch.Tensor

SUM_WORDS = 9  # of csrc/cpu/question.h
TOTAL_WORDS, WORDS_OF_DRAW, END_WORDS = 5, 9, 3
LOOKED_UP = 256  # tokens at a time
MIN_CHUNKS, MIN_RANKS = 128, 32  # smaller sizes are not worth kernels of their own


class Launches(Protocol):
    """What this takes of `fastsample.backends.triton_call.Call`."""

    memory: Memory
    options: dict[str, Any]

    def sample(self, name: str, table: Table, records: Tensor, status: Tensor) -> State: ...


class Asked:
    """One question's launches, all on the current stream."""

    def __init__(self, call: Launches, table: Table, layout: Layout, question: Question) -> None:
        self.call, self.memory, self.options = call, call.memory, call.options
        self.table, self.layout, self.x = table, layout, table.x
        self.start, self.queries, self.number, self.wants, self.words, details, self.bitmask = question
        self.width = 0 if details is None else details.shape[1]
        self.details = self.queries if details is None else details
        self.batch, self.vocab = table.x.shape

    def answer(self) -> Tensor:
        """The answers for each row, int64 [B, words], as csrc/cpu/part.h has them; but whether a part is flat is
        estimated by other tokens. Never waits for the device."""
        with self.memory.lock:
            return QUESTIONS[self.number](self)

    @property
    def row(self) -> tuple[Any, ...]:
        """What every kernel begins with."""
        return self.x, self.table.stride, self.queries, self.start

    @property
    def blocks(self) -> dict[str, Any]:
        """How a program sees a row's chunks, and how it is compiled."""
        chunks = max(MIN_CHUNKS, 1 << (self.layout.chunks - 1).bit_length())
        return {"CHUNKS": chunks, "BLOCK": self.layout.block, **self.options}

    def found(self, rows: int) -> Tensor:
        """Memory for sums of each row's chunks, int64 [B, rows, chunks]."""
        return self.memory("found in parts", self.batch * rows * self.layout.chunks, torch.int64)

    def zeros(self) -> Tensor:
        return self.queries.new_zeros(self.batch, self.words)

    def empty(self) -> Tensor:
        return self.queries.new_empty(self.batch, self.words)

    def wanted(self, bit: int) -> bool:
        return bool(self.wants & bit)

    def first(self) -> Tensor:
        mass, flat = self.wanted(1), self.wanted(2)
        room = self.words - mass - flat
        answers = self.empty()
        self._list_first(answers, room, mass, flat)
        return answers

    def _list_first(self, answers: Tensor, room: int, mass: bool, flat: bool) -> None:
        """Find where the first tokens end, count them in each chunk, and write them."""
        layout, unused = self.layout, self.memory("unused", self.batch, torch.int32)
        state = self.call.sample("cuts", self.table, self.memory.record(top_k=min(room, self.vocab)), unused)
        found = self.found(int(kernels("part_list").ROWS))
        kernels("part_list").count_first[(self.batch, layout.chunks)](
            *self.row, state.words, layout.record, found, self.vocab, layout.chunks,
            MASS=mass, FLAT=flat, BLOCK=layout.block, **self.options,
        )  # fmt: skip
        self._tell(state.words, layout.record, found, answers, room, FIRST=True, MASS=mass, FLAT=flat)

    def _tell(self, workspace: Tensor, record: int, found: Tensor, answers: Tensor, room: int, **wanted: bool) -> None:
        kernels("part_list").tell[(self.batch, self.layout.chunks)](
            *self.row, self.details, workspace, record, found, answers, self.words, room, self.vocab,
            self.layout.chunks, **wanted, **self.blocks,
        )  # fmt: skip

    def sums(self) -> Tensor:
        return self._sums(bins_at=SUM_WORDS if self.wanted(4) else -1)

    def whole(self) -> Tensor:
        return self._sums(whole=True, bins_at=SUM_WORDS if self.wanted(4) else -1)

    def bins(self) -> Tensor:
        self.wants = 0
        return self._sums(total=False, bins_at=0)

    def _sums(self, whole: bool = False, total: bool = True, bins_at: int = -1) -> Tensor:
        layout, answers = self.layout, self.zeros()
        kernels("part").sums[(self.batch, layout.parts)](
            *self.row, self.details, self.width, answers, self.words, self.vocab, layout.chunks,
            WHOLE=whole, TOTAL=total, PRODUCTS=self.wanted(1), SPREAD=self.wanted(2), BINS_AT=bins_at,
            VEC=layout.vec, BLOCK=layout.block, **self.options,
        )  # fmt: skip
        return answers

    def totals(self) -> Tensor:
        count, bits, answers = self.wanted(2), self.bitmask, self.empty()
        kernels("part").totals[(self.batch, self.layout.chunks)](
            *self.row, answers, answers if bits is None else bits, self.found(TOTAL_WORDS),
            self.memory(ARRIVALS, self.batch, torch.int32), self.vocab, self.layout.chunks,
            FIRST=self.wanted(1), COUNT=count, BITMASK=count and bits is not None, **self.blocks,
        )  # fmt: skip
        return answers

    def draws(self) -> Tensor:
        module, entropy, answers = kernels("part_draws"), self.wanted(1), self.empty()
        chunks, found = self.layout.chunks, self.found(int(module.ROWS))
        module.weigh[(self.batch, chunks)](
            *self.row, self.details, self.width, found, self.vocab, chunks,
            TELLS=entropy, BLOCK=self.layout.block, **self.options,
        )  # fmt: skip
        module.draw[(self.batch, max(self.width, 1))](
            *self.row, self.details, self.width, found, answers, self.vocab, chunks, TELLS=entropy, **self.blocks
        )
        return answers

    def above(self) -> Tensor:
        layout, answers = self.layout, self.zeros()
        kernels("part").above[(self.batch, layout.parts)](
            self.x, self.table.stride, self.details, self.width, answers, self.vocab, layout.chunks,
            BLOCK=layout.block, **self.options,
        )  # fmt: skip
        return answers

    def within(self) -> Tensor:
        answers, found = self.empty(), self.found(int(kernels("part_list").ROWS))
        kernels("part_list").count_within[(self.batch, self.layout.chunks)](
            *self.row, self.details, found, self.vocab, self.layout.chunks, BLOCK=self.layout.block, **self.options
        )
        self._tell(self.queries, 0, found, answers, self.words, FIRST=False, MASS=False, FLAT=False)
        return answers

    def owned(self) -> Tensor:
        module, answers, found = kernels("part_draws"), self.empty(), self.found(1)
        chunks = self.layout.chunks
        draws = (self.words - 1) // WORDS_OF_DRAW
        ranks = max(MIN_RANKS, 1 << (self.width // 2 - 1).bit_length())
        module.weigh_own[(self.batch, chunks)](
            *self.row, self.details, self.width, found, answers, self.words, self.vocab, chunks,
            RANKS=ranks, BLOCK=self.layout.block, **self.options,
        )  # fmt: skip
        module.guess[(self.batch, max(draws, 1))](
            *self.row, self.details, self.width, self.wants, found, answers, self.words, draws, self.vocab, chunks,
            RANKS=ranks, **self.blocks,
        )  # fmt: skip
        return answers

    def given(self) -> Tensor:
        """Some of the first tokens, and the logits of others."""
        count, answers = self.wants, self.empty()
        if count:
            self._list_first(answers, count, False, False)
        kernels("part_list").given[(self.batch, -(-self.width // LOOKED_UP) or 1)](
            self.x, self.table.stride, self.start, self.details, self.width,
            answers.view(torch.float32), 2 * self.words, 2 * count, self.vocab, BLOCK=LOOKED_UP, **self.options,
        )  # fmt: skip
        return answers

    def bits(self) -> Tensor:
        layout, answers = self.layout, self.zeros()
        kernels("part").bits[(self.batch, layout.chunks)](
            *self.row, answers.view(torch.int32), 2 * self.words, self.vocab, layout.chunks,
            BLOCK=layout.block, **self.options,
        )  # fmt: skip
        return answers

    def ends(self) -> Tensor:
        answers = self.empty()
        kernels("part").ends[(self.batch, self.layout.chunks)](
            *self.row, answers, self.found(END_WORDS), self.memory(ARRIVALS, self.batch, torch.int32),
            self.vocab, self.layout.chunks, **self.blocks,
        )  # fmt: skip
        return answers


QUESTIONS: tuple[Callable[[Asked], Tensor], ...] = (
    Asked.first,
    Asked.whole,
    Asked.sums,
    Asked.totals,
    Asked.draws,
    Asked.above,
    Asked.bins,
    Asked.within,
    Asked.owned,
    Asked.given,
    Asked.bits,
    Asked.ends,
)
"""By their numbers in csrc/cpu/question.h."""
