"""The candidates of prompts, drawn a chunk at a time: whatever the chunks, the same candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.utils import ALL_CACHE_NAMES

from fastsample.integrations.best_of_n.rank import Drawn
from fastsample.integrations.transformers.breakers import is_per_sequence
from fastsample.integrations.transformers.inputs import encode
from fastsample.integrations.transformers.loop import Loop, Record
from fastsample.integrations.transformers.rows import Batch, length_of, sequence_seeds
from fastsample.params import SamplingParams


class Draws:
    """What draws candidates of a batch of prompts.

    Args:
        model, inputs, n: of `best_of_n`.
        loop: what draws, with the arguments for all prompts.
        size: candidates that are drawn at once, at most; None draws all that are asked for.
        options: of `generate`.
    """

    def __init__(self, model: Any, inputs: Any, n: int, loop: Loop, size: int | None, options: dict[str, Any]) -> None:
        self._model, self._inputs, self._n, self._loop, self._size = model, inputs, n, loop, size
        self._encoded, self.several = encode(inputs, loop.tokenizer, model)
        first = next(self._encoded[name] for name in ("inputs", "input_ids", *self._encoded) if name in self._encoded)
        self.prompts = len(first)
        batch = Batch(self.prompts, unit="prompt")
        self._seeds = sequence_seeds(loop.seed, batch)
        self._params = SamplingParams(**loop.fields).per_row()
        sizes = self._params | {"offset": length_of(loop.offset)}
        sizes |= {"dry_breakers": length_of(loop.dry_breakers)} if is_per_sequence(loop.dry_breakers) else {}
        for name, count in sizes.items():
            if count is not None:
                batch.require(name, count)
        if isinstance(loop.grammar, Sequence):
            Batch(self.prompts, n, "candidate").require("grammar", len(loop.grammar))
        self._given = options | self._encoded

    @cached_property
    def texts(self) -> list[str]:
        """The prompts as text."""
        if isinstance(self._inputs, str):
            return [self._inputs]
        if isinstance(self._inputs, Sequence) and isinstance(self._inputs[0], str):
            return list(self._inputs)
        ids = self._encoded.get("input_ids", self._encoded.get("inputs"))
        if ids is None:
            raise ValueError("score: a reward model reads the prompts, and these inputs have no ids")
        mask = self._encoded.get("attention_mask", torch.ones_like(ids)).bool()
        return [text_of(self._loop.tokenizer, row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]

    def __call__(self, prompts: Sequence[int], first: int, count: int, bar: Bar) -> Iterator[tuple[int, int, Drawn]]:
        """Draw `count` candidates of some prompts, from number `first` on; yields prompt, number, candidate."""
        size = self._size or len(prompts) * count
        each = min(count, size)
        for start in range(0, len(prompts), size // each):
            group = prompts[start : start + size // each]
            for at in range(first, first + count, each):
                yield from self._chunk(group, at, min(each, first + count - at), bar)

    def _chunk(self, prompts: Sequence[int], first: int, count: int, bar: Bar) -> Iterator[tuple[int, int, Drawn]]:
        if len(prompts) < self.prompts or count < self._n:
            for name in (*ALL_CACHE_NAMES, "past_key_values"):
                if self._given.get(name) is not None:
                    raise ValueError(f"{name}: serves one run of the model; leave batch_size and round_size out")
        record = Record()
        loop = dataclasses.replace(self._loop, **self._arguments(prompts, first, count), record=record)
        given = {name: self._rows(name, value, prompts) for name, value in self._given.items()}
        with bar.chunk(self._model, given, len(prompts) * count) as watched:
            sequences = self._model.generate(**watched, do_sample=True, custom_generate=loop)
        steps = None if record.logprobs is None else record.logprobs.tolist()
        for row, (ids, length) in enumerate(zip(sequences.tolist(), record.lengths, strict=True)):
            tokens = ids[record.start : length]
            own = [] if steps is None else steps[row][: len(tokens)]
            text = text_of(self._loop.tokenizer, tokens)
            drawn = Drawn(text, tokens, own, record.truncated[row], record.errors[row])
            yield prompts[row // count], first + row % count, drawn

    def _arguments(self, prompts: Sequence[int], first: int, count: int) -> dict[str, Any]:
        """Those of the loop that belong to some of the prompts and candidates."""
        loop = self._loop
        grammar, breakers = loop.grammar, loop.dry_breakers
        if isinstance(grammar, Sequence) and len(grammar) == self.prompts:
            grammar = _picked(grammar, prompts)
        elif isinstance(grammar, Sequence):
            grammar = [grammar[i * self._n + j] for i in prompts for j in range(first, first + count)]
        return {
            "seed": _picked(self._seeds, prompts),
            "offset": loop.offset if length_of(loop.offset) is None else _picked(loop.offset, prompts),
            "fields": loop.fields | {name: _picked(loop.fields[name], prompts) for name in self._params},
            "grammar": grammar,
            "dry_breakers": _picked(breakers, prompts) if is_per_sequence(breakers) else breakers,
            "copies": count,
            "first_copy": first,
        }

    def _rows(self, name: str, value: Any, prompts: Sequence[int]) -> Any:
        """An argument of `generate` for some of the prompts: tensors with a row per prompt are cut, options are not."""
        if len(prompts) == self.prompts or name in _OPTIONS or not isinstance(value, torch.Tensor):
            return value
        return _picked(value, prompts) if value.ndim and len(value) == self.prompts else value


_OPTIONS = frozenset(vars(GenerationConfig()))  # type: ignore[no-untyped-call]


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    """The text of some ids, without special tokens; "" without a tokenizer."""
    if tokenizer is None:
        return ""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _picked(values: Any, prompts: Sequence[int]) -> Any:
    """What belongs to some of the prompts."""
    if isinstance(values, (torch.Tensor, np.ndarray)):
        return values[list(prompts)]
    return [values[i] for i in prompts]


class Bar(StoppingCriteria):
    """A progress bar over candidates, on stderr. As a criterion that stops nothing, it sees every step.

    A candidate counts step by step, as far as the number of steps is known, and whole at the end of its chunk.
    """

    def __init__(self, total: int, shown: bool) -> None:
        self._bar = tqdm(total=total, leave=False, disable=not shown, bar_format=_FORMAT)
        self._whole = self._part = 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    @contextmanager
    def chunk(self, model: Any, given: dict[str, Any], candidates: int) -> Iterator[dict[str, Any]]:
        """Watch a run of `generate`; yields its arguments."""
        if self._bar.disable:
            yield given
            return
        configs = (given.get("generation_config"), model.generation_config)
        steps = given.get("max_new_tokens") or next((n for at in configs if (n := getattr(at, "max_new_tokens", 0))), 0)
        self._part = candidates / steps if steps else 0.0
        yield given | {"stopping_criteria": [*(given.get("stopping_criteria") or []), self]}
        self._whole += candidates
        self._move_to(self._whole)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        """Counts a step of each candidate of the chunk."""
        self._move_to(self._bar.n + self._part)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]

    def _move_to(self, place: float) -> None:
        self._bar.update(place - self._bar.n)


_FORMAT = "{l_bar}{bar}| {n:.0f} of {total} candidates [{elapsed}<{remaining}]"
