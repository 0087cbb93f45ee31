"""How a prompt is continued, and what `fastsample generate` prints."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from textwrap import shorten
from typing import Any

import torch

import fastsample as fs
from fastsample.cli.output import RefusedError, note, print_json, print_table, progress, stderr_may_fail, told

BATCH = 16
"""Continuations that are drawn at once, at most: each has a cache of its own in memory."""

_REFUSALS = (ValueError, TypeError, RuntimeError)


@dataclass
class Continuation:
    """A continuation of the prompt, as --json shows it."""

    seed: int
    text: str  # the new text
    tokens: list[int]
    truncated: bool  # whether it is not a whole text of the grammar


@dataclass
class Session:
    """A loaded model, an encoded prompt, and how to continue it."""

    prompt: str
    chat: bool  # whether the prompt is what a user says, and not the text to continue
    lm: Any
    tokenizer: Any
    ids: torch.Tensor  # int64 [1, L]
    steps: int
    grammar: Any
    stops: Sequence[str]
    sampling: dict[str, Any]  # backend and SamplingParams fields
    seed: int
    seeds: Iterator[int]  # those of continuations, made of the seed

    @property
    def _echo(self) -> str:
        """What is printed before a continuation."""
        return "" if self.chat or self.grammar is not None else self.prompt

    def one(self, seed: int) -> list[int]:
        """Print a continuation as it is generated; with a grammar, only the new text, once it is complete.

        Returns the numbers, from 1, of truncated continuations, as do the two methods below.
        """
        if self.grammar is not None:
            return self.several(iter([seed]), 1)
        print(self._echo, end="", flush=True)
        try:
            self._draw([seed], 1, streamer=Writer(self.tokenizer, self.stops))
        finally:
            print(flush=True)
        return []

    def several(self, seeds: Iterator[int], num: int) -> list[int]:
        """Print a continuation for each of `num` seeds, batch by batch; where there is no grammar, with its number."""
        cut: list[int] = []
        for number, found in enumerate(self._continued(seeds, num), 1):
            between = "\n" if self.grammar is None and number > 1 else ""
            label = f"{between}[{number}] {self._echo}" if self.grammar is None else ""
            print(label + found.text, flush=True)
            cut += [number] if found.truncated else []
        return cut

    def as_json(self, seeds: Iterator[int], num: int) -> list[int]:
        """Print a continuation for each of `num` seeds as JSON, all at once."""
        found = list(self._continued(seeds, num))
        print_json({"prompt": self.prompt, "seed": self.seed, "continuations": list(map(asdict, found))})
        return [number for number, each in enumerate(found, 1) if each.truncated]

    def _continued(self, seeds: Iterator[int], num: int) -> Iterator[Continuation]:
        # Sequences that have ended are padded. If only the grammar knows their ends, there is no padding.
        size = 1 if self.grammar is not None and not self.ends() else BATCH
        with progress(num * self.steps, "token") as bar:
            for start in range(0, num, size):
                batch = list(islice(seeds, min(size, num - start)))
                found = self._draw(batch, start + 1, bar=bar)
                bar.update((start + len(batch)) * self.steps - bar.n)  # some may have ended early
                for each in found:
                    with bar.external_write_mode():
                        yield each

    def best_of(
        self, n: int, seed: int, vote: re.Pattern[str] | None, reward_model: str | None = None, *, as_json: bool = False
    ) -> list[int]:
        """Print the best of n continuations, and all that were drawn on stderr: with a vote, until it is decided."""
        sampling = {"seed": [seed], "grammar": self.grammar, "stopping_criteria": self._criteria(), **self.sampling}
        score = "mean_logprob" if reward_model is None else _reward_model(reward_model)
        with told(_REFUSALS):
            result = fs.best_of_n(
                self.lm,
                {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)},
                n,
                score=score,
                vote=None if vote is None else self._ballot(vote),
                tokenizer=self.tokenizer,
                max_new_tokens=self.steps,
                batch_size=BATCH,
                round_size=None if vote is None else BATCH,
                progress=sys.stderr.isatty(),
                **sampling,
            )
        assert not isinstance(result, list)  # one prompt, one result
        best = result.best
        if as_json:
            candidates = [asdict(c) | {"text": before(c.text, self.stops)} for c in result.candidates]
            print_json({"prompt": self.prompt, "seed": self.seed, "votes": result.votes, "candidates": candidates})
            return [1] if best.truncated else []
        text = before(best.text, self.stops)
        print(self._echo + text, flush=True)
        self._note_oddities(1, best.tokens, text)
        ranked_by = "mean logprob" if reward_model is None else "reward"
        rows = [("draw", ranked_by, "tokens", *(["answer"] if vote else []), "text")]
        for c in result.candidates:
            answer = [str(c.answer)] if vote else []
            shown = shorten(before(c.text, self.stops), 60)
            rows.append((str(c.index), f"{c.score:.3f}", str(len(c.tokens)), *answer, shown))
        with stderr_may_fail():
            print_table(rows, header=True, stream=sys.stderr)
        if vote and result.answer is not None:
            early = "" if result.drawn == n else f"; {n - result.drawn} more could not change that"
            note(f"{result.answer!r} has {result.votes[result.answer]} of {result.drawn} votes{early}")
        elif vote:
            note(f"--vote {vote.pattern}: no candidate matches; printed is the one with the best {ranked_by}")
        return [1] if best.truncated else []

    def _draw(self, seeds: Sequence[int], first: int, streamer: Any = None, bar: Any = None) -> list[Continuation]:
        """The continuation for each seed; `first` is the number of the first one."""
        out = self.generated(seeds, streamer, bar)
        decode = Decoder(self.tokenizer, self.ids[0].tolist())
        truncated = [False] * len(seeds) if self.grammar is None else out.truncated.tolist()
        drawn = []
        for seed, row, cut in zip(seeds, out.sequences[:, self.ids.shape[1] :].tolist(), truncated, strict=True):
            tokens = up_to(row, self.ends())
            drawn.append(Continuation(seed, before(decode(tokens), self.stops), tokens, cut))
            self._note_oddities(first + len(drawn) - 1, tokens, drawn[-1].text)
        return drawn

    def generated(self, seeds: Sequence[int], streamer: Any = None, bar: Any = None, **options: Any) -> Any:
        """What `generate` returns for a continuation of each seed; `options` are more of its own."""
        from fastsample.integrations.transformers import fs_generate

        sample = fs_generate(list(seeds), streamer=streamer, grammar=self.grammar, **self.sampling)
        ids = self.ids.expand(len(seeds), -1)
        with told(_REFUSALS):
            return self.lm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                max_new_tokens=self.steps,
                return_dict_in_generate=True,
                stopping_criteria=[*self._criteria(), *([] if bar is None else [Counted(bar)])],
                custom_generate=sample,
                **options,
            )

    def _note_oddities(self, number: int, tokens: list[int], text: str) -> None:
        """Note when the text does not show what was drawn."""
        if foreign := [token for token in tokens if token not in self._known]:
            note(f"continuation {number}: {len(foreign)} of its tokens are not in the tokenizer, like {foreign[0]}")
        elif not text:
            ended = not self.stops or tokens[0] in self.ends()
            why = "the model ended it at once" if ended else "a stop string came first"
            note(f"continuation {number} is empty: {why}")

    @cached_property
    def _known(self) -> set[int]:
        return set(self.tokenizer.get_vocab().values())

    def _criteria(self) -> list[Any]:
        return [StopAt(self.stops, Decoder(self.tokenizer, self.ids[0].tolist()))] if self.stops else []

    def ends(self) -> list[int]:
        """The model's end-of-sequence tokens."""
        given = self.lm.generation_config.eos_token_id
        return [] if given is None else [given] if isinstance(given, int) else list(given)

    def _ballot(self, vote: re.Pattern[str]) -> Callable[[str], str | None]:
        """A text's answer: the last match of the pattern (its first group, if there is one)."""

        def answer(text: str) -> str | None:
            matches = list(vote.finditer(before(text, self.stops)))
            return matches[-1][1 if vote.groups else 0] if matches else None

        return answer


def _reward_model(folder: str) -> Any:
    from fastsample.integrations.best_of_n import RewardModel

    if not os.path.isdir(folder):
        raise RefusedError(f"--reward-model {folder}: no such folder")
    with told((OSError, *_REFUSALS), f"--reward-model {folder}: "):
        return RewardModel(folder)


def up_to(tokens: list[int], ends: list[int]) -> list[int]:
    """The ids without the padding after an end of sequence."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)


# Text of tokens ------------------------------------------------------------------------------------------------------


class Decoder:
    """Decodes new tokens in the context of the prompt: some tokenizers drop a leading space otherwise."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer, self.prompt = tokenizer, prompt
        self._start = len(self._decode([]))

    def __call__(self, tokens: list[int]) -> str:
        return self._decode(tokens)[self._start :]

    def _decode(self, tokens: list[int]) -> str:
        ids = self.prompt + tokens
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class StopAt:
    """A stopping criterion: the new text contains a stop string, however many tokens it spans."""

    def __init__(self, stops: Sequence[str], decode: Decoder) -> None:
        self._stops, self._decode = stops, decode
        self._prompt = len(decode.prompt)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        texts = map(self._decode, input_ids[:, self._prompt :].tolist())
        found = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)


class Counted:
    """A stopping criterion that never stops, but moves a progress bar by a token of each sequence."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._bar.update(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Writer:
    """A streamer for `generate` that prints text once it is final: whole characters, and no part of a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._decode: Decoder | None = None
        self._tokens: list[int] = []
        self._printed = 0

    def put(self, ids: torch.Tensor) -> None:
        """Receive the prompt, which is already printed, then one token at a time."""
        if self._decode is None:
            self._decode = Decoder(self._tokenizer, ids.flatten().tolist())
            return
        self._tokens += ids.flatten().tolist()
        text = self._decode(self._tokens)
        if not text.endswith("\ufffd"):  # the first bytes of a character
            self._print(before(text, self._stops), held=self._may_be_a_stop(text))

    def end(self) -> None:
        """Print what is left, whole or not."""
        if self._decode is not None:
            self._print(before(self._decode(self._tokens), self._stops), held=0)

    def _print(self, text: str, held: int) -> None:
        sure = text[self._printed : len(text) - held]
        self._printed += len(sure)
        print(sure, end="", flush=True)

    def _may_be_a_stop(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        return max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
