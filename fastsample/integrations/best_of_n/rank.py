"""Candidates, what they are worth and what they vote for, and their order."""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

Vote: TypeAlias = Callable[[str], Hashable]
OnError: TypeAlias = Literal["warn", "raise"]


class Drawn(NamedTuple):
    """A candidate before it is judged; see Candidate."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    truncated: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Candidate:
    """One continuation.

    Attributes:
        index: which of the n draws it is, from 0.
        text: the new text, without special tokens; "" where no tokenizer was given.
        tokens: the new ids, up to and including the end-of-sequence token.
        logprobs: natural log-probability of each token; empty with logprobs=None.
        score: what it is ranked by; -inf if it could not be scored.
        answer: what it votes for; None without a vote, or if it abstains.
        truncated: whether its text is not a whole text of the grammar; False without a grammar.
        error: why it is not ranked (the scorer or the vote failed, or on_invalid="flag" ended it); else None.
    """

    index: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    score: float
    answer: Hashable = None
    truncated: bool = False
    error: str | None = None


@dataclass(frozen=True)
class BestOfN:
    """The continuations of one prompt.

    Attributes:
        candidates: all that were drawn, best first; those with an error last.
        votes: the number of votes for each answer, the winner first; empty without a vote.
    """

    candidates: list[Candidate]
    votes: dict[Hashable, int]

    @property
    def best(self) -> Candidate:
        """The first candidate; it has an error only if all have one."""
        return self.candidates[0]

    @property
    def answer(self) -> Hashable:
        """The answer with the most votes; None without a vote, or if all abstain."""
        return next(iter(self.votes), None)

    @property
    def drawn(self) -> int:
        """The number of candidates: n, or fewer where the vote was decided earlier (round_size)."""
        return len(self.candidates)


def judged(index: int, drawn: Drawn, score: float | Exception, vote: Vote | None, on_error: OnError) -> Candidate:
    """A candidate with its score and its answer, or with its error; a score may be why there is none."""
    text, tokens, logprobs, truncated, error = drawn
    value, answer = -math.inf, None
    if error is None:
        try:
            value = _number(index, text, score)
            answer = None if vote is None else _answer(index, vote, text)
        except (TypeError, ValueError) as failure:
            if on_error == "raise":
                raise
            error = str(failure)
    return Candidate(index, text, tokens, logprobs, value, answer, truncated, error)


def ranked(candidates: Sequence[Candidate]) -> BestOfN:
    """The candidates of a prompt in their order."""
    order = sorted(candidates, key=lambda candidate: (candidate.error is not None, -candidate.score, candidate.index))
    # Among equals, Counter keeps the order of first appearance: that of each answer's best candidate.
    votes = dict(Counter(c.answer for c in order if c.answer is not None).most_common())
    place = {answer: i for i, answer in enumerate(votes)}
    order.sort(key=lambda candidate: (candidate.error is not None, place.get(candidate.answer, len(place))))
    return BestOfN(order, votes)


def decided(candidates: Sequence[Candidate], left: int) -> bool:
    """Whether no `left` further votes can change which answer has the most, nor make it a tie."""
    votes = Counter(c.answer for c in candidates if c.answer is not None)
    first, second, *_ = *(count for _, count in votes.most_common(2)), 0, 0
    return first - second > left


def _number(index: int, text: str, score: Any) -> float:
    """A score as a number; TypeError or ValueError that names the candidate, where it is none."""
    if isinstance(score, Exception):
        raise ValueError(f"score: raised {type(score).__name__} on candidate {index} ({text!r}): {score}") from score
    if isinstance(score, torch.Tensor) and score.numel() == 1:
        score = score.item()
    if not isinstance(score, numbers.Real):
        raise TypeError(f"score: expected a number for candidate {index} ({text!r}), got {score!r}")
    if math.isnan(score):
        raise ValueError(f"score: expected a number for candidate {index} ({text!r}), got NaN")
    return float(score)


def _answer(index: int, vote: Vote, text: str) -> Hashable:
    try:
        answer = vote(text)
        if isinstance(answer, torch.Tensor):
            answer = answer.item()  # tensors hash by identity
        hash(answer)
    except Exception as error:
        raise ValueError(f"vote: raised {type(error).__name__} on candidate {index} ({text!r}): {error}") from error
    if isinstance(answer, numbers.Real) and math.isnan(answer):
        raise ValueError(f"vote: expected an answer or None for candidate {index} ({text!r}), got NaN")
    return answer
