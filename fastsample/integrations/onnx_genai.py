"""ONNX Runtime GenAI: its generator computes the logits, fastsample draws the tokens.

    model = onnxruntime_genai.Model(folder)
    generate(model, ["The future of AI is", "Once upon a time"], seed=[7, 8], temperature=0.8, top_p=0.95)

The loop is that of `Generator.get_logits` and `Generator.append_tokens`. A generator of several sequences appends only
once; there the drawn tokens go in as logits that leave no other choice (`set_logits`, `generate_next_token`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

try:
    import onnxruntime_genai as og
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "fastsample.integrations.onnx_genai needs onnxruntime-genai: pip install onnxruntime-genai", name=error.name
    ) from error

from fastsample.checks import count
from fastsample.inputs import BreakerIds, Seed
from fastsample.integrations.sequences import Ids, Sequences, collected, end_ids, prompts_of
from fastsample.params import SamplingParams
from fastsample.sampler import Sampler

__all__ = ["generate", "stream"]


def generate(
    model: Any, prompts: Sequence[Any], params: SamplingParams | None = None, **options: Any
) -> list[list[int]]:
    """Continue prompts as one batch; the new ids of each, up to and including the end-of-sequence token.

    Arguments and errors as for `stream`. `Tokenizer.decode` makes text of ids.
    """
    steps = stream(model, prompts, params, **options)
    return collected(steps, len(prompts))


def stream(
    model: Any,
    prompts: Sequence[Any],
    params: SamplingParams | None = None,
    *,
    max_new_tokens: int = 20,
    seed: Seed | None = None,
    offset: Seed = 0,
    eos_token_ids: Any = None,
    pad_token_id: int | None = None,
    dry_breakers: BreakerIds | None = None,
    backend: str = "auto",
    **fields: Any,
) -> Iterator[dict[int, int]]:
    """The same step by step: each step's new ids by the number of their prompt.

    Args:
        model: an `onnxruntime_genai.Model`, a decoder of text.
        prompts: B lists of ids, or texts, for which the model's folder must have its tokenizer. Shorter ones are padded
            on the left, and the generator masks the padding.
        params: how to sample, one value for all prompts or one per prompt; `fields` override it.
        max_new_tokens: new ids of each sequence, at least 1.
        seed, offset: as for `fastsample.sample`. With one seed per prompt a text does not depend on the others.
        eos_token_ids: ids that end a sequence, those of the model's genai_config.json; None asks the tokenizer.
        pad_token_id: for prompts of different lengths, that of genai_config.json; None asks the tokenizer. The
            generator masks this id wherever it stands in a prompt.
        dry_breakers, backend: as for `fastsample.sample`.

    Raises:
        TypeError, ValueError: bad argument; the message names it, the prompt and the value.
    """
    if not isinstance(model, og.Model):
        raise TypeError(f"model: expected an onnxruntime_genai.Model, got {model!r}")
    own = Tokenizer(model)
    ids = prompts_of("prompts", prompts, own.encode)
    max_new_tokens = count("max_new_tokens", max_new_tokens, 1, 2**31 - 1)
    ends = own.ends() if eos_token_ids is None else end_ids("eos_token_ids", eos_token_ids)
    pad = own.pad if pad_token_id is None else lambda: count("pad_token_id", pad_token_id, 0, 2**31 - 1)
    table = _padded(ids, pad() if len({len(one) for one in ids}) > 1 else 0)
    sampler = Sampler(params, batch_size=len(ids), seed=seed, offset=offset, backend=backend, **fields)
    sequences = Sequences(sampler, dry_breakers)
    for row, prompt in enumerate(ids):
        sequences.start(row, prompt)
    batch = (Alone if len(ids) == 1 else Batch)(model, table, max_new_tokens)
    return sequences.run(batch.logits(range(len(ids))), batch.advance, ends, max_new_tokens)


def _padded(prompts: list[Ids], pad: int) -> Ids:
    """Prompts of any lengths as int32 [B, L], padded on the left."""
    table = np.full((len(prompts), max(map(len, prompts))), pad, dtype=np.int32)
    for row, prompt in enumerate(prompts):
        table[row, table.shape[1] - len(prompt) :] = prompt
    return table


class Tokenizer:
    """The model's own, which is loaded where it is needed; a folder need not have one."""

    def __init__(self, model: Any) -> None:
        self._model, self._made = model, None

    def encode(self, text: str) -> Any:
        return self._own("prompts: the texts need").encode(text)

    def ends(self) -> frozenset[int]:
        return frozenset(self._own("eos_token_ids: not given, which needs").eos_token_ids)

    def pad(self) -> int:
        return int(self._own("pad_token_id: not given, which prompts of different lengths need or").pad_token_id)

    def _own(self, why: str) -> Any:
        if self._made is None:
            try:
                self._made = og.Tokenizer(self._model)
            except RuntimeError as error:
                raise ValueError(f"{why} a tokenizer in the model's folder: {error}") from error
        return self._made


class Alone:
    """The generator of one sequence."""

    def __init__(self, model: Any, prompts: Ids, more: int) -> None:
        params = og.GeneratorParams(model)
        rows, length = prompts.shape
        params.set_search_options(batch_size=rows, max_length=length + more, do_sample=False)
        self._generator = og.Generator(model, params)
        self._generator.append_tokens(prompts)

    def logits(self, rows: Sequence[int]) -> torch.Tensor:
        """The last logits [n, V] of these rows. The generator hands out a copy of its own."""
        table = self._generator.get_logits()[:, -1]
        return torch.from_numpy(table if len(rows) == len(table) else table[list(rows)])

    def advance(self, tokens: dict[int, int]) -> torch.Tensor:
        self._generator.append_tokens(np.array(list(tokens.values()), dtype=np.int32))
        return self.logits(list(tokens))


class Batch(Alone):
    """The generator of several sequences, which appends but once: greedy search finds each drawn token the best."""

    _choice: Ids | None = None  # logits [B, V] of the last tokens

    def advance(self, tokens: dict[int, int]) -> torch.Tensor:
        if self._choice is None:
            self._choice = np.zeros(self._generator.get_logits()[:, -1].shape, dtype=np.float32)
        rows, ids = list(tokens), list(tokens.values())
        self._choice[rows, ids] = 1
        self._generator.set_logits(self._choice)
        self._generator.generate_next_token()
        self._choice[rows, ids] = 0
        taken = self._generator.get_next_tokens()[rows].tolist()
        if taken != ids or self._generator.is_done():
            row = next((row for row, token in tokens.items() if taken[rows.index(row)] != token), rows[0])
            raise ValueError(f"eos_token_ids: genai_config.json has ended sequence {row}: expected the ids it has")
        return self.logits(rows)
