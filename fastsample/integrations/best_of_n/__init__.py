"""Best-of-N and self-consistency: several continuations of a prompt from one prefill, scored or voted on.

    result = fastsample.best_of_n(model, "The answer is", 8, tokenizer=tokenizer, seed=7, max_new_tokens=20)
    result.best.text, result.best.score

Best-of-N keeps the candidate with the highest score (Stiennon et al. 2020; Nakano et al. 2021); self-consistency keeps
the answer that most candidates agree on (Wang et al. 2023). Needs transformers.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Literal

from fastsample.checks import is_one_of, whole
from fastsample.inputs import Seed
from fastsample.integrations.best_of_n.rank import BestOfN, Candidate, OnError, Vote, decided, judged, ranked
from fastsample.integrations.best_of_n.reward import RewardModel, Score, scores
from fastsample.outputs import LogprobsMode, OnInvalid
from fastsample.params import specs

__all__ = ["BestOfN", "Candidate", "RewardModel", "best_of_n"]


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
    batch_size: int | None = None,
    round_size: int | None = None,
    progress: bool = False,
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
        score: "mean_logprob", the mean of a candidate's log-probabilities; a callable on (text, tokens, logprobs) that
            returns a number; or a RewardModel, or the folder of one, which needs a tokenizer. Higher is better; among
            equals the lower index comes first.
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
        batch_size: candidates that run at once, at most, to bound the memory: prompts come chunk by chunk, and the
            candidates of a prompt too where there are more. The prompt then runs once per chunk. None runs all at once.
        round_size: with a vote, draw so many candidates of each prompt at a time, and no more once the votes that are
            still to come cannot change the answer. The answer is that of all n, and the candidates are the first of
            them; `drawn` tells how many. A fixed number of them, whatever batch_size is. None draws all n.
        progress: show a bar on stderr.
        **options: SamplingParams fields go to `fs_generate`, all others to `model.generate` (max_new_tokens,
            stop_strings, stopping_criteria, eos_token_id, ...).

    Returns:
        A BestOfN; for a list of prompts or for ids of more than one row, a list of them, one per prompt.
        Neither batch_size nor progress changes it (up to the last bits of the logits, as for n).

    Raises:
        TypeError, ValueError: bad argument, found before the model runs; what `fs_generate` refuses; with
            on_error="raise", a score or vote that failed (the message names the candidate).

    Warns:
        RuntimeWarning: some candidates are not ranked; how many, and the first one's error.
    """
    from fastsample.integrations.best_of_n.draw import Bar, Draws
    from fastsample.integrations.transformers.loop import Loop

    score = _scorer(score, tokenizer)
    _check(n, score, vote, logprobs, on_error, options)
    size, step = _size("batch_size", batch_size), _size("round_size", round_size)
    if step is not None and vote is None:
        raise ValueError("round_size: without effect unless there is a vote to decide")
    fields = {name: options.pop(name) for name, _ in specs() if name in options}
    loop = Loop(
        seed, None, backend, grammar, fields, offset, tokenizer, logprobs, on_invalid, dry_breakers=dry_breakers
    )
    draws = Draws(model, inputs, n, loop, size, options)
    found: list[list[Candidate]] = [[] for _ in range(draws.prompts)]
    step = step or n
    with Bar(n * draws.prompts, progress) as bar:
        for first in range(0, n, step):
            undecided = [i for i, own in enumerate(found) if vote is None or not decided(own, n - first)]
            if not undecided:
                break
            new = list(draws(undecided, first, min(step, n - first), bar))
            texts = [draws.texts[i] for i, *_ in new] if isinstance(score, RewardModel) else []
            values = scores(score, texts, [drawn for *_, drawn in new])
            for (i, index, drawn), value in zip(new, values, strict=True):
                found[i].append(judged(index, drawn, value, vote, on_error))
    results = [ranked(own) for own in found]
    _warn([c for result in results for c in sorted(result.candidates, key=lambda c: c.index)])
    return results if draws.several else results[0]


def _scorer(score: Any, tokenizer: Any) -> Score:
    """The scorer; a folder's reward model is loaded."""
    if is_one_of(score, "mean_logprob"):
        return "mean_logprob"
    if isinstance(score, os.PathLike) or (isinstance(score, str) and Path(score).is_dir()):
        score = RewardModel(score)
    if isinstance(score, RewardModel) and tokenizer is None:
        raise ValueError("tokenizer: expected one, since a reward model reads text")
    if not callable(score):
        raise TypeError(
            f"score = {score!r}: expected 'mean_logprob', a callable on (text, tokens, logprobs), a RewardModel or the "
            "folder of one"
        )
    return score  # type: ignore[no-any-return]


def _size(name: str, value: int | None) -> int | None:
    if value is not None and whole(name, value) < 1:
        raise ValueError(f"{name} = {value}: expected at least 1, or None")
    return value


def _check(n: Any, score: Any, vote: Any, logprobs: Any, on_error: Any, options: dict[str, Any]) -> None:
    if whole("n", n) < 1:
        raise ValueError(f"n = {n}: expected at least 1")
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


def _warn(candidates: list[Candidate]) -> None:
    """Say how many candidates failed, and why the first did."""
    errors = [c.error for c in candidates if c.error is not None]
    if errors:
        warnings.warn(
            f"{len(errors)} of {len(candidates)} candidates failed and come last; the first: {errors[0]}",
            RuntimeWarning,
            stacklevel=3,
        )
