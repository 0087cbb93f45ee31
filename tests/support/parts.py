"""Parts of rows that are split over ranks, and all that a rank is asked about its own (csrc/cpu/question.h).

TRITON_INTERPRET=1 python parts.py JOBS.json RESULTS.pt    # the Triton engine's answers, in Triton's interpreter
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from cases import DTYPES, MAKERS, finish

from fastsample import SamplingParams
from fastsample.backends import Question
from fastsample.backends.cpu import ENGINE as CPU_ENGINE
from fastsample.distributed.answers import (
    ABOVE,
    BINS_OF,
    DRAWS,
    FIRST,
    SUMS,
    TOTALS,
    WHOLE,
    WITHIN,
    EngineShard,
    open_queries,
)
from fastsample.distributed.keys import HIGHEST, LOWEST, Kept, bits_of, key, no_words, words_of
from fastsample.distributed.shard import BINS, SUM_WORDS, Drawn, Shard
from fastsample.inputs import Rows

Tensor = torch.Tensor

ROWS, START = 7, 4321
OWNED, GIVEN, BITS, ENDS = range(8, 12)
BLOCK = 256  # tokens of a chunk


class Asked:
    """A part of rows, and kept sets of all kinds: open, between places, above masses, empty."""

    def __init__(self, maker: str, width: int, dtype: str) -> None:
        g = torch.Generator().manual_seed(width)
        x = finish(MAKERS[maker](ROWS, width, g), DTYPES[dtype])
        # Parts may lie anywhere below the maximum.
        peak = x.float().amax(-1, keepdim=True).clamp(min=-1e30) + torch.tensor([0, 0, 0, 0.5, 3, 20, 60])[:, None]
        judged = torch.tensor([1, 1, 0.3, 2, 1, 1, 1])[:, None]
        drawn = torch.where(torch.arange(ROWS)[:, None] == 2, 0.7, judged)
        known = x, START, peak, judged, drawn
        self.parts = [Shard(*known), EngineShard(*known, engine=CPU_ENGINE)]
        keys = key(x.float(), torch.arange(START, START + width))
        some = keys.gather(1, torch.randint(width, (ROWS, 2), generator=g)).sort(-1).values.clamp(min=LOWEST)
        open_ = torch.tensor([[True], [False], [True], [False], [True], [True], [False]])
        low = torch.where(open_, LOWEST, some[:, :1])
        high = torch.where(
            torch.tensor([[True], [True], [True], [False], [False], [True], [True]]), HIGHEST, some[:, 1:]
        )
        floor = torch.tensor([0, 0, 2**30, 5, 0, 2**39, 1])[:, None]
        self.kept = Kept(high, low, floor)
        top = torch.where(torch.arange(ROWS)[:, None] % 3 == 1, some[:, 1:], HIGHEST)
        coin = torch.linspace(0.1, 0.9, ROWS)[:, None]
        nothing = torch.zeros(ROWS, dtype=torch.int64)
        self.drawn = Drawn(self.kept, top, coin, nothing, nothing)
        self.x, self.queries = x, open_queries(judged, drawn)
        self.rows = Rows(SamplingParams().pack(), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


@dataclass
class Case:
    """One call of `Engine.answer`."""

    x: Tensor
    queries: Tensor
    number: int
    wants: int
    words: int
    details: Tensor | None = None
    bits: bool = False

    @property
    def question(self) -> Question:
        return Question(START, self.queries, self.number, self.wants, self.words, self.details)

    def answers(self, how: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """The answers, and the bits that are filled in passing."""
        rows, width = self.x.shape
        words = torch.full((rows, -(-width // 32)), 77, dtype=torch.int32)
        return how(self.x, self.question._replace(bitmask=words if self.bits else None)), words


@dataclass(frozen=True)
class Job:
    """A part of rows as `Asked` makes it; the odd ones have rows that are further apart."""

    maker: str
    width: int
    dtype: str
    parts: int = 1  # programs of a row, where each takes several chunks

    @property
    def name(self) -> str:
        return f"{self.maker}-{self.width}-{self.dtype}-{self.parts}"

    def cases(self) -> Iterator[Case]:
        asked = Asked(self.maker, self.width, self.dtype)
        x = asked.x
        if self.width % 2:
            x = torch.cat([x, x[:, :1].expand(-1, 3)], 1)[:, : self.width]
        yield from _about_sets(asked, x)
        yield from _about_draws(asked, x)
        yield from _about_lists(asked, x)
        told = CPU_ENGINE.answer(x, Question(START, asked.queries, FIRST, 1, 2))
        yield from (owned(x, asked.queries, *_told(told, rank, 3), draws=2) for rank in range(3))
        yield owned(x, asked.queries, *_told(told, 0, 1), draws=0)


def _about_sets(asked: Asked, x: Tensor) -> Iterator[Case]:
    queries = asked.parts[1].queries(asked.kept, asked.drawn)
    listed = CPU_ENGINE.answer(x, Question(START, asked.queries, FIRST, 0, 5))
    listed[0, 1] = words_of(torch.tensor(torch.nan), torch.tensor(-1))
    long = torch.cat([no_words(ROWS, 1200, x.device), listed], 1)
    yield from (Case(x, asked.queries, WHOLE, wants, SUM_WORDS, listed) for wants in (0, 3))
    yield Case(x, asked.queries, WHOLE, 6, SUM_WORDS + 2 * BINS, long)
    yield from (Case(x, queries, SUMS, wants, SUM_WORDS) for wants in (0, 1, 2))
    yield Case(x, queries, SUMS, 7, SUM_WORDS + 2 * BINS)
    yield Case(x, queries, BINS_OF, 0, 2 * BINS)
    yield from (Case(x, queries, TOTALS, wants, 5, bits=wants > 1) for wants in (0, 1, 3))
    yield Case(x, queries, ENDS, 0, 3)
    yield Case(x, queries, BITS, 0, (START + x.shape[1] + 100) // 64)
    yield Case(x, asked.queries, GIVEN, 4, 605, long[:, -1202:-1].contiguous())
    yield Case(x, asked.queries, GIVEN, 0, 3, listed)
    yield Case(x, queries, ABOVE, 0, 2, bits_of(torch.cat([x[:, :1].float(), x[:, -1:].float() + 0.25], 1)))
    bins = CPU_ENGINE.answer(x, Question(START, queries, BINS_OF, 0, 2 * BINS)).view(ROWS, BINS, 2)
    fullest = bins[:, :, 1].argmax(1, keepdim=True)
    for ranges in (
        (fullest, fullest + 1, fullest + 1, fullest + 1),
        (fullest * 0, fullest, fullest + 7, fullest + BINS),
    ):
        details = torch.cat(ranges, 1).clamp(max=BINS)
        yield from (Case(x, queries, WITHIN, 0, words, details) for words in (5, x.shape[1] + 300))


def _about_draws(asked: Asked, x: Tensor) -> Iterator[Case]:
    """Thresholds at the first and the last mass of the first chunk and of the row, and past that."""
    queries = asked.parts[1].queries(asked.kept, asked.drawn).clone()
    totals = CPU_ENGINE.answer(x, Question(START, queries, TOTALS, 0, 5))
    queries[:, 8], queries[:, 9] = totals[:, 0].clamp(min=1), totals[:, 1]
    held = asked.parts[0].drawn(asked.kept)
    ends = held[:, :BLOCK].sum(1, keepdim=True)
    rest = (held * (asked.parts[0].keys() <= asked.drawn.top))[:, :BLOCK].sum(1, keepdim=True)
    whole, left = totals[:, :1], totals[:, 1:2]
    at = torch.cat([whole * 0, (ends - 1).clamp(min=0), ends, whole - 1, whole, whole // 2], 1).clamp(min=0)
    leaves = torch.cat([left * 0, (rest - 1).clamp(min=0), rest, left - 1, left], 1).clamp(min=0)
    thresholds = torch.cat([at, -2 - leaves, torch.full_like(whole, -1)], 1)
    thresholds[ROWS - 2] = -1  # none of these is here
    for wants, given in ((1, thresholds), (0, thresholds[:, 4:8]), (1, thresholds[:, :0])):
        yield Case(x, queries, DRAWS, wants, 2 * given.shape[1] + 1, given.contiguous())


def _about_lists(asked: Asked, x: Tensor) -> Iterator[Case]:
    """Of a row that is valid, and one that is not: a few tokens, more than there are, and most of them."""
    width = x.shape[1]
    turn = width % 3
    x, queries = x[2:4].clone(), asked.queries[2:4]
    x[0, width // 2] = (torch.nan, torch.inf, -torch.inf)[turn]
    x[0] = -torch.inf if turn == 2 else x[0]
    yield Case(x, queries, FIRST, turn % 2, 1 + turn % 2)
    shares = bits_of(torch.full((2, 1), 0.9))
    words = (5, width + 300, width - width // 4)[turn]
    yield Case(x, queries, FIRST, 3, words + 2, shares)


def _told(told: Tensor, rank: int, ranks: int) -> tuple[Tensor, int]:
    """What ranks tell of whose first tokens are the same, and the others have less mass; one is wrong."""
    words = [told.clone() for _ in range(ranks)]
    for other, word in enumerate(words):
        word[:, 1] //= 1 if other == rank else other + 2
    words[-1][3] = torch.tensor([0xFF800000 - 2**32 << 32 | 0xFFFFFFFF, 0])  # a part that is ruled out
    words[0][2, 0] = words_of(torch.tensor(torch.nan), torch.tensor(-1))
    words[-1][1, 0] = words_of(torch.tensor(torch.inf), torch.tensor(-1))
    return torch.cat(words, 1), rank


def owned(x: Tensor, queries: Tensor, told: Tensor, rank: int, draws: int) -> Case:
    streams = torch.tensor([[7919 * row + 5, 3] for row in range(len(x))])
    return Case(x, queries, OWNED, rank, 1 + 9 * draws, torch.cat([told, streams], 1))


def rows_of(places: dict[int, float], width: int, other: float) -> tuple[Tensor, Tensor]:
    """A row that has these logits, and others in between; and queries about all of it."""
    x = torch.full((1, width), other)
    for place, logit in places.items():
        x[0, place] = logit
    one = torch.ones(1, 1)
    return x, open_queries(one, one)


def edge_cases() -> dict[str, Case]:
    """Draws about the edge between two chunks, and over chunks of which most have nothing."""
    found = {}
    for name, places, other in (
        ("at an edge", dict.fromkeys(range(BLOCK - 3, BLOCK + 3), 0.0), -12.0),
        ("far apart", dict.fromkeys((0, 700, 1300, 1301, 2400), 0.0), -torch.inf),
        ("at the end", {2499: 0.0}, -3e4),
    ):
        x, queries = rows_of(places, 2500, other)
        told = CPU_ENGINE.answer(x, Question(START, queries, FIRST, 1, 2))
        found[name] = owned(x, queries, told, 0, draws=24)
    return found


def flat_cases() -> dict[str, Case]:
    """Whether the first tokens are most of a row's mass; its second row is invalid."""
    x = torch.randn(2, 2500, generator=torch.Generator().manual_seed(1))
    x[1, 700] = torch.nan
    one, share = torch.ones(2, 1), bits_of(torch.full((2, 1), 0.5))
    rows = {"flat": x, "peaked": torch.where(torch.arange(2500) == 1234, x + 40, x)}
    return {name: Case(x, open_queries(one, one), FIRST, 2, 4, share) for name, x in rows.items()}


def answers_of(cases: dict[str, Case], how: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: case.answers(how) for name, case in cases.items()}


def named(job: Job) -> dict[str, Case]:
    return {f"{i}: {q.number} wants {q.wants}": q for i, q in zip(count(), job.cases())}


def main() -> None:
    from triton_interpreter import patch_once

    from fastsample.backends.triton import ENGINE

    torch.set_num_threads(1)
    patch_once()
    ENGINE.block = BLOCK
    with open(sys.argv[1]) as file:
        jobs = [Job(**job) for job in json.load(file)]
    found: dict[str, Any] = {"edges": answers_of(edge_cases(), ENGINE.answer)}
    found["flat"] = answers_of(flat_cases(), ENGINE.answer)
    for job in jobs:
        ENGINE.parts = job.parts
        found[job.name] = answers_of(named(job), ENGINE.answer)
    found["none"] = ENGINE.answer(
        torch.zeros(0, 5), Question(0, torch.zeros(0, 10, dtype=torch.int64), SUMS, 0, SUM_WORDS)
    )
    torch.save(found, sys.argv[2])


if __name__ == "__main__":
    main()
