"""Best-of-N and self-consistency: several continuations of a prompt from one prefill, scored or voted on.

    result = fastsample.best_of_n(model, "The answer is", 8, tokenizer=tokenizer, seed=7, max_new_tokens=20)
    result.best.text, result.best.score

Best-of-N keeps the candidate with the highest score (Stiennon et al. 2020; Nakano et al. 2021); self-consistency keeps
the answer that most candidates agree on (Wang et al. 2023). Needs transformers.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from fastsample.checks import is_one_of, whole
from fastsample.inputs import Seed
from fastsample.outputs import LogprobsMode, OnInvalid
from fastsample.params import specs

__all__ = ["BestOfN", "Candidate", "best_of_n"]

Score: TypeAlias = "Literal['mean_logprob'] | Callable[[str, list[int], list[float]], float]"
Vote: TypeAlias = Callable[[str], Hashable]
OnError: TypeAlias = Literal["warn", "raise"]


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
        candidates: all n, best first; those with an error last.
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


def best_of_n(
    model: Any,
    inputs: Any,
    n: int,
    *,
    score: Score = "mean_logprob",
    vote: Vote | None = None,
    tokenizer: Any = None,
    seed: Seed | None = None,
    offset: Seed | Literal["prompt"] = 0,
    logprobs: LogprobsMode | None = "raw",
    grammar: Any = None,
    on_error: OnError = "warn",
    on_invalid: OnInvalid = "raise",
    backend: str = "auto",
    dry_breakers: Any = None,
    **options: Any,
) -> BestOfN | list[BestOfN]:
    """Draw n continuations of a prompt, and rank them by score or by vote.

    The prompt runs through the model once. The first step draws n tokens from one row of logits in one pass; then the n
    sequences continue as a batch. Candidate 0 is what a single sequence would be (`fs_generate` with the same seed),
    and the candidates for a smaller n are the first ones for a larger n (up to the last bits of the model's own logits,
    which may depend on the batch size). With a cache that cannot be copied (static, quantized, offloaded, or of linear
    attention), the prompt runs once per candidate.

    Args:
        model: a language model of transformers, decoder-only or encoder-decoder.
        inputs: a prompt or a list of prompts (both need the tokenizer); ids [B, L] or [L], a tensor, an array or lists;
            or what a tokenizer returns, tensors or lists. An empty prompt starts from the beginning-of-sequence token,
            or else the end-of-sequence token. In a tensor without an attention mask, those ids are padding that
            `generate` takes for padding (generation_config.pad_token_id, unless it also ends sequences). Lists of
            different lengths are padded on the left.
        n: candidates of each prompt, n >= 1.
        score: "mean_logprob", the mean of a candidate's log-probabilities, or a callable on (text, tokens, logprobs)
            that returns a number. Higher is better; among equals the lower index comes first.
        vote: a callable on the text that returns a candidate's answer, or None to abstain. Candidates are then ordered
            by answer: most votes first; among equals, the answer whose best candidate scores higher. Within an answer
            they are ordered by score. Candidates that abstain come last.
        tokenizer: decodes ids to text, and serves `stop_strings` and `dry_breakers`. Without one, `score` and `vote`
            get "".
        seed: an int s gives prompt i the seed splitmix64(splitmix64(s) + i); a sequence holds one seed per prompt.
            Candidate 0 keeps its prompt's seed p, candidate j gets splitmix64(splitmix64(p) + j). None takes a fresh
            seed from torch's default CPU generator.
        offset: position of the first new token, as for `fs_generate`; one for all or one per prompt.
        logprobs: "raw", of the model's own logits; "processed", of the distribution drawn from; None for none, which
            needs a `score` of your own.
        grammar: for all candidates, or one per candidate (n of each prompt after another) or per prompt; see
            `fs_generate`.
        on_error: what to do when `score` or `vote` raises, or returns NaN or a value that is not a number or cannot be
            counted. "warn" keeps the candidate with its `error`, behind all others and without a vote, and warns;
            "raise" raises. If all fail, the result still holds them.
        on_invalid: what to do with a candidate that can have no next token. "raise" raises; "flag" ends it with its
            `error`, behind all others.
        backend: as for `fastsample.sample`.
        dry_breakers: as for `fs_generate`, one list for all or one per prompt; the tokenizer reads its strings.
        **options: SamplingParams fields go to `fs_generate`, all others to `model.generate` (max_new_tokens,
            stop_strings, stopping_criteria, eos_token_id, ...).

    Returns:
        A BestOfN; for a list of prompts or for ids of more than one row, a list of them, one per prompt.

    Raises:
        TypeError, ValueError: bad argument, found before the model runs; what `fs_generate` refuses; with
            on_error="raise", a score or vote that failed (the message names the candidate).

    Warns:
        RuntimeWarning: some candidates are not ranked; how many, and the first one's error.
    """
    from fastsample.integrations.transformers.inputs import encode
    from fastsample.integrations.transformers.loop import Loop, Record

    _check(n, score, vote, logprobs, on_error, options)
    fields = {name: options.pop(name) for name, _ in specs() if name in options}
    record = Record()
    loop = Loop(seed, None, backend, grammar, fields, offset, tokenizer, logprobs, on_invalid, n, record, dry_breakers)
    encoded, several = encode(inputs, tokenizer, model)
    sequences = model.generate(**encoded, **options, do_sample=True, custom_generate=loop)
    steps = None if record.logprobs is None else record.logprobs.tolist()
    drawn = []
    for row, (ids, length) in enumerate(zip(sequences.tolist(), record.lengths, strict=True)):
        tokens = ids[record.start : length]
        own = [] if steps is None else steps[row][: len(tokens)]
        drawn.append(Drawn(_text(tokenizer, tokens), tokens, own, record.truncated[row], record.errors[row]))
    results = [_rank(drawn[i : i + n], score, vote, on_error) for i in range(0, len(drawn), n)]
    _warn([c for result in results for c in sorted(result.candidates, key=lambda c: c.index)])
    return results if several else results[0]


def _check(n: Any, score: Any, vote: Any, logprobs: Any, on_error: Any, options: dict[str, Any]) -> None:
    if whole("n", n) < 1:
        raise ValueError(f"n = {n}: expected at least 1")
    if not is_one_of(score, "mean_logprob") and not callable(score):
        raise TypeError(f"score = {score!r}: expected 'mean_logprob' or a callable on (text, tokens, logprobs)")
    if logprobs is None and not callable(score):
        raise ValueError("logprobs=None: score='mean_logprob' needs 'raw' or 'processed'; or give a score of your own")
    if vote is not None and not callable(vote):
        raise TypeError(f"vote = {vote!r}: expected a callable on the text, or None")
    if not is_one_of(on_error, "warn", "raise"):
        raise ValueError(f"on_error = {on_error!r}: expected 'warn' or 'raise'")
    given = {"num_return_sequences", "return_dict_in_generate", "custom_generate", "streamer"} & set(options)
    if given:
        raise ValueError(f"{sorted(given)[0]}: best_of_n sets it itself")
    if not options.get("do_sample", True):
        raise ValueError("do_sample=False: candidates are sampled; temperature=0 makes them greedy")
    options.pop("do_sample", None)


def _text(tokenizer: Any, tokens: list[int]) -> str:
    if tokenizer is None:
        return ""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Drawn(NamedTuple):
    """A candidate before it is ranked."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    truncated: bool = False
    error: str | None = None


def _rank(drawn: list[Drawn], score: Score, vote: Vote | None, on_error: OnError = "warn") -> BestOfN:
    candidates = [_judged(index, each, score, vote, on_error) for index, each in enumerate(drawn)]
    candidates.sort(key=lambda candidate: (candidate.error is not None, -candidate.score, candidate.index))
    # Among equals, Counter keeps the order of first appearance: that of each answer's best candidate.
    votes = dict(Counter(c.answer for c in candidates if c.answer is not None).most_common())
    place = {answer: i for i, answer in enumerate(votes)}
    candidates.sort(key=lambda candidate: (candidate.error is not None, place.get(candidate.answer, len(place))))
    return BestOfN(candidates, votes)


def _judged(index: int, drawn: Drawn, score: Score, vote: Vote | None, on_error: OnError) -> Candidate:
    """A candidate with its score and its answer, or with its error."""
    text, tokens, logprobs, truncated, error = drawn
    value, answer = -math.inf, None
    if error is None:
        try:
            value = _score(index, score, text, tokens, logprobs)
            answer = None if vote is None else _answer(index, vote, text)
        except (TypeError, ValueError) as failure:
            if on_error == "raise":
                raise
            error = str(failure)
    return Candidate(index, text, tokens, logprobs, value, answer, truncated, error)


def _warn(candidates: list[Candidate]) -> None:
    """Say how many candidates failed, and why the first did."""
    errors = [c.error for c in candidates if c.error is not None]
    if errors:
        warnings.warn(
            f"{len(errors)} of {len(candidates)} candidates failed and come last; the first: {errors[0]}",
            RuntimeWarning,
            stacklevel=3,
        )


def _score(index: int, score: Score, text: str, tokens: list[int], logprobs: list[float]) -> float:
    if not callable(score):
        return math.fsum(logprobs) / len(logprobs)
    try:
        value = score(text, list(tokens), list(logprobs))
    except Exception as error:
        raise ValueError(f"score: raised {type(error).__name__} on candidate {index} ({text!r}): {error}") from error
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError(f"score: expected a number for candidate {index} ({text!r}), got {value!r}")
    if math.isnan(value):
        raise ValueError(f"score: expected a number for candidate {index} ({text!r}), got NaN")
    return float(value)


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
