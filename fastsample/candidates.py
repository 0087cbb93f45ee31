"""Best-of-N and self-consistency: several continuations of a prompt from one prefill, scored or voted on.

    result = fastsample.best_of_n(model, "The answer is", 8, tokenizer=tokenizer, seed=7, max_new_tokens=20)
    result.best.text, result.best.score

Best-of-N keeps the candidate that a scorer likes best (Stiennon et al. 2020; Nakano et al. 2021), self-consistency the
answer that most candidates agree on (Wang et al. 2023). Needs transformers.
"""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from fastsample.engines import LogprobsMode
from fastsample.params import specs
from fastsample.rows import Seed

__all__ = ["BestOfN", "Candidate", "best_of_n"]

Score: TypeAlias = "Literal['mean_logprob'] | Callable[[str, list[int], list[float]], float]"
Vote: TypeAlias = Callable[[str], Hashable]


@dataclass(frozen=True)
class Candidate:
    """One continuation.

    Attributes:
        index: which of the n draws it is, from 0.
        text: the new text, without special tokens; "" where no tokenizer was given.
        tokens: the new ids, up to and with the end-of-sequence token.
        logprobs: natural log-probability of each token, from the pass that drew it.
        score: what it is ranked by.
        answer: what it votes for; None without a vote, or where it abstains.
        truncated: whether its text is no whole text of the grammar; False without one.
    """

    index: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    score: float
    answer: Hashable = None
    truncated: bool = False


@dataclass(frozen=True)
class BestOfN:
    """The continuations of one prompt.

    Attributes:
        candidates: all n, best first.
        votes: the number of votes for each answer, the winner first; empty without a vote.
    """

    candidates: list[Candidate]
    votes: dict[Hashable, int]

    @property
    def best(self) -> Candidate:
        """The first candidate."""
        return self.candidates[0]

    @property
    def answer(self) -> Hashable:
        """The answer with the most votes; None without a vote, or where all abstain."""
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
    logprobs: LogprobsMode = "raw",
    grammar: Any = None,
    backend: str = "auto",
    **options: Any,
) -> BestOfN | list[BestOfN]:
    """Draw n continuations of a prompt, and rank them by score or by vote.

    The prompt runs through the model once. Its first step draws n tokens from one row of logits in one pass; then the
    n sequences go on as a batch. Candidate 0 is what one sequence alone would be (`fs_generate` with the same seed),
    and the candidates of a smaller n are the first of a larger one, up to the last bits of a model's own logits, which
    may depend on the size of a batch.

    Args:
        model: a language model of transformers, decoder-only or encoder-decoder.
        inputs: a prompt or a list of prompts (both need the tokenizer), ids [B, L] or [L], or what a tokenizer returns.
        n: candidates of each prompt, n >= 1.
        score: "mean_logprob", the mean of a candidate's log-probabilities, or a callable on (text, tokens, logprobs)
            that returns a number. Higher is better; of equal ones the candidate drawn first (lower index) comes first.
        vote: a callable on the text that returns a candidate's answer, None to abstain. Candidates then come in the
            order of their answers: most votes first; of equally many, that whose best candidate scores higher.
            Candidates that abstain come last; those of one answer in the order of their scores.
        tokenizer: makes texts of ids. Without one, `score` and `vote` get "".
        seed: an int s gives prompt i the seed splitmix64(splitmix64(s) + i); a sequence holds one seed per prompt.
            Candidate 0 goes on with its prompt's seed p, candidate j with splitmix64(splitmix64(p) + j). None takes a
            fresh one from torch's default CPU generator.
        logprobs: "raw", of the logits as the fused pass got them, or "processed", of the distribution drawn from.
        grammar: for all candidates, or one per candidate (n of each prompt after another); see `fs_generate`.
        backend: as for `fastsample.sample`.
        **options: SamplingParams fields go to `fs_generate`, all others to `model.generate` (max_new_tokens,
            stopping_criteria, eos_token_id, ...).

    Returns:
        A BestOfN; a list of them, one per prompt, for a list of prompts or ids of more than one row.

    Raises:
        TypeError, ValueError: bad argument; or a score that raised, is NaN or no number: the message names the
            candidate. What `fs_generate` refuses is refused.
    """
    from fastsample.integrations.transformers_loop import Loop, Record

    _check(n, score, vote, options)
    encoded, several = _encode(inputs, tokenizer, model)
    fields = {name: options.pop(name) for name, _ in specs() if name in options}
    record = Record()
    loop = Loop(seed, None, backend, grammar, fields, n, logprobs, record)
    sequences = model.generate(**encoded, **options, do_sample=True, custom_generate=loop)
    start = sequences.shape[1] - len(record.logprobs)
    steps = torch.stack(record.logprobs, dim=1).tolist()
    drawn = []
    for row, (ids, length) in enumerate(zip(sequences.tolist(), record.lengths, strict=True)):
        tokens = ids[start:length]
        cut = bool(record.truncated) and record.truncated[row]
        drawn.append((_text(tokenizer, tokens), tokens, steps[row][: len(tokens)], cut))
    results = [_rank(drawn[i : i + n], score, vote) for i in range(0, len(drawn), n)]
    return results if several else results[0]


def _check(n: Any, score: Any, vote: Any, options: dict[str, Any]) -> None:
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n = {n!r}: expected an integer")
    if n < 1:
        raise ValueError(f"n = {n}: expected at least 1")
    if score != "mean_logprob" and not callable(score):
        raise TypeError(f"score = {score!r}: expected 'mean_logprob' or a callable on (text, tokens, logprobs)")
    if vote is not None and not callable(vote):
        raise TypeError(f"vote = {vote!r}: expected a callable on the text, or None")
    given = {"num_return_sequences", "return_dict_in_generate", "custom_generate", "streamer"} & set(options)
    if given:
        raise ValueError(f"{sorted(given)[0]}: best_of_n sets it itself")
    if not options.get("do_sample", True):
        raise ValueError("do_sample=False: candidates are sampled; temperature=0 makes them greedy")
    options.pop("do_sample", None)


def _encode(inputs: Any, tokenizer: Any, model: Any) -> tuple[dict[str, Any], bool]:
    """The keyword arguments of `generate`, and whether there are several prompts."""
    if isinstance(inputs, torch.Tensor):
        ids = inputs if inputs.ndim > 1 else inputs[None]
        return {"inputs": ids, "attention_mask": torch.ones_like(ids)}, len(ids) > 1
    if isinstance(inputs, Mapping):
        return dict(inputs), max((len(value) for value in inputs.values()), default=1) > 1
    if tokenizer is None:
        raise ValueError("tokenizer: expected one, since the inputs are text")
    single = isinstance(inputs, str)
    if not single and not (isinstance(inputs, Sequence) and inputs and all(isinstance(text, str) for text in inputs)):
        raise TypeError(f"inputs: expected text, a list of texts, ids or a mapping, got {type(inputs).__name__}")
    padding = {} if single else {"padding": True, "padding_side": "left"}
    encoded = tokenizer([inputs] if single else list(inputs), return_tensors="pt", **padding)
    return dict(encoded.to(model.device)), not single


def _text(tokenizer: Any, tokens: list[int]) -> str:
    if tokenizer is None:
        return ""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _rank(drawn: list[tuple[str, list[int], list[float], bool]], score: Score, vote: Vote | None) -> BestOfN:
    candidates = []
    for index, (text, tokens, logprobs, truncated) in enumerate(drawn):
        value = _score(index, score, text, tokens, logprobs)
        answer = None if vote is None else _answer(index, vote, text)
        candidates.append(Candidate(index, text, tokens, logprobs, value, answer, truncated))
    candidates.sort(key=lambda candidate: (-candidate.score, candidate.index))
    # Counter keeps the order of first appearance among equals: that of each answer's best candidate.
    votes = dict(Counter(c.answer for c in candidates if c.answer is not None).most_common())
    place = {answer: i for i, answer in enumerate(votes)}
    candidates.sort(key=lambda candidate: place.get(candidate.answer, len(place)))
    return BestOfN(candidates, votes)


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
        hash(answer)
    except Exception as error:
        raise ValueError(f"vote: raised {type(error).__name__} on candidate {index} ({text!r}): {error}") from error
    return answer
