"""Rows that are split over ranks: where they are cut, and everything that comes out, there and of whole rows.

TRITON_INTERPRET=1 python split.py JOBS.json RESULTS.pt    # Triton's interpreter does each rank's own work
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from cases import Case
from conformance import MODES, assert_agree, forms_of_kept, named
from ranks import on_ranks

import fastsample as fs
import fastsample.distributed as fd
from fastsample.backends import engine

Tensor = torch.Tensor
Found = dict[str, Tensor]

CUTS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "1": lambda v: (0, v),
    "2": lambda v: (0, v // 2, v),
    "3 uneven": lambda v: (0, v // 8, v - v // 3, v),
    "4 words": lambda v: (0, *(min(v, (v // 128 + 1) * 32 * i) for i in (1, 2, 3)), v),
    "8": lambda v: tuple(v * i // 8 for i in range(9)),
    "3 empty first": lambda v: (0, 0, v // 2 + 1, v),
    "3 empty in the middle": lambda v: (0, v // 3, v // 3, v),
    "3 empty last": lambda v: (0, v - v // 3, v, v),
    "4 all on one": lambda v: (0, 0, v, v, v),
    "8 of one token": lambda v: (*(min(v, i) for i in range(8)), v),
}
"""By the number of ranks: where the tokens of each begin, and where they end, in a vocabulary of v."""

LISTS = ((256, 1024), (1, 1024), (3, 8), (20, 1024))
"""How many of its first tokens a rank lists where more than top-k decides, and at most: plan.LISTED, MOST_LISTED."""

UNEVEN = (0, 45, 45, 200, 301)
"""A cut, of which one rank has nothing, for the rows of tests that have no case."""
VOCAB = UNEVEN[-1]
ROWS = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(6)) * 3


@dataclass(frozen=True)
class Job:
    """A case, and how its rows are split."""

    case: Case
    cut: str
    lists: tuple[int, int] = LISTS[0]
    backend: str = "cpu"
    brief: bool = False  # every second question will do: where calls are slow

    @property
    def name(self) -> str:
        return f"{self.case.name}-{self.cut}-{self.lists[0]} listed"

    def some(self, questions: list[Any]) -> list[Any]:
        return questions[self.case.vocab % 2 :: 2] if self.brief else questions

    def ask(self) -> list[list[Found]]:
        """What each rank answers to each question."""
        logits, questions = questions_of(self.case)
        questions, vocab = self.some(questions), self.case.vocab

        def on_rank(wire: Any, begin: int, end: int) -> list[Found]:
            own = {"vocab_start": begin, "vocab_size": vocab, "group": wire, "backend": self.backend}
            return [named(fd.sample(logits[:, begin:end], **own, **question)) for question in questions]

        with listing(*self.lists):
            return on_ranks(CUTS[self.cut](vocab), on_rank)


def questions_of(case: Case) -> tuple[Tensor, list[dict[str, Any]]]:
    """The logits, and all that can be asked of them: outputs beside log-probabilities of each kind and without."""
    inputs = case.build()
    common = {**inputs.kwargs, **inputs.draw, "on_invalid": "flag"}
    forms = forms_of_kept(case.vocab)
    reports = {"num_samples": 3, "top_logprobs": min(6, case.vocab)}
    questions = [{"logprobs": mode, **reports, **form} for mode, form in zip(MODES, forms, strict=True)]
    questions += [{}, {"kept": "bitmask", "entropy": True, "num_samples": 2}]
    return inputs.logits, [common | question for question in questions]


@lru_cache(maxsize=2)
def answers_of(case: Case) -> list[Found]:
    """What `fastsample.sample` answers of the whole rows."""
    logits, questions = questions_of(case)
    return [named(fs.sample(logits, backend="cpu", **question)) for question in questions]


def everywhere(
    call: Callable[..., Any], logits: Tensor, *given: Any, cuts: Sequence[int] = UNEVEN, vocab: int = 0, **more: Any
) -> list[Any]:
    """What a call returns on each rank, given its part of the logits."""

    def on_rank(wire: Any, begin: int, end: int) -> Any:
        part = {"vocab_start": begin, "vocab_size": vocab or logits.shape[-1], "group": wire}
        return call(logits[..., begin:end], *given, **part, **more)

    return on_ranks(cuts, on_rank)


def named_of(out: Any) -> dict[str, Tensor]:
    return {name: value for name in type(out).__slots__ if (value := getattr(out, name)) is not None}


def assert_equal(found: list[Any], whole: Any) -> None:
    for out in found:
        assert_agree(named_of(out), named_of(whole))


@contextmanager
def listing(listed: int, most: int) -> Iterator[None]:
    """Within this context, ranks list so many tokens."""
    names = {"LISTED": listed, "MOST_LISTED": most, "RAW_LISTED": min(listed, 128)}
    with patch.multiple("fastsample.distributed.plan", **names):
        yield


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Within this context, an engine that stands in for a GPU's serves one rank after the other."""
    lock, theirs = threading.Lock(), engine(name)
    before = {call: getattr(theirs, call) for call in ("run", "list_kept")}

    def locked(call: Callable[..., Any]) -> Callable[..., Any]:
        def alone(*args: Any) -> Any:
            with lock:
                return call(*args)

        return alone

    with patch.multiple(theirs, **{call: locked(function) for call, function in before.items()}):
        yield


def main() -> None:
    from triton_interpreter import patch_once

    from fastsample.backends.triton import ENGINE

    torch.set_num_threads(1)
    patch_once()
    ENGINE.block = 256
    with open(sys.argv[1]) as file:
        jobs = [Job(**job | {"case": Case(**job["case"]), "lists": tuple(job["lists"])}) for job in json.load(file)]
    with one_at_a_time("triton"):
        torch.save({job.name: job.ask() for job in jobs}, sys.argv[2])


if __name__ == "__main__":
    main()
