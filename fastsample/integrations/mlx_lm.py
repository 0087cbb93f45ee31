"""MLX-LM: a `sampler=` for `generate_step`, `stream_generate`, `generate` and BatchGenerator.

    sampler = MlxSampler(temperature=0.8, top_p=0.95, seed=7)
    stream_generate(model, tokenizer, prompt, sampler=sampler)

MLX-LM hands a sampler log-probabilities [1, V], and the ids so far to its logits processors alone. So the filters and
the draw are the sampler, and the penalties, which read the ids, are a processor:

    sampler = MlxSampler(temperature=0.8, repetition_penalty=1.1, seed=7)
    stream_generate(model, tokenizer, prompt, sampler=sampler, logits_processors=sampler.logits_processors)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

try:
    import mlx.core as mx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'fastsample.integrations.mlx_lm needs MLX: pip install mlx-lm, on Linux also pip install "mlx[cpu]"',
        name=error.name,
    ) from error

from fastsample.api import filter_logits
from fastsample.inputs import BreakerIds
from fastsample.inputs.penalties import active_penalties
from fastsample.params import SamplingParams, specs
from fastsample.sampler import Sampler

__all__ = ["MlxSampler"]

_HISTORY = [name for name, spec in specs() if spec.counts or spec.of_history]


class MlxSampler:
    """Draws one sequence's tokens from MLX-LM's log-probabilities; make one for each text.

    Calling it reads the log-probabilities where MLX keeps them, without a copy, which waits for the model.

    Args:
        params: how to sample, one value each; `fields` override it. Penalties, DRY and no_repeat_ngram_size take effect
            in `logits_processors`.
        seed: 64-bit, used as it is; None draws a fresh one from torch's default CPU generator.
        offset: position of the first new token.
        dry_breakers: token ids, as for `fastsample.sample`.
        backend: as for `fastsample.sample`.

    Raises:
        TypeError, ValueError: bad argument; the message names it and the value.
    """

    def __init__(
        self,
        params: SamplingParams | None = None,
        *,
        seed: int | None = None,
        offset: int = 0,
        dry_breakers: BreakerIds | None = None,
        backend: str = "auto",
        **fields: Any,
    ) -> None:
        own = None if seed is None else [seed]
        whole = SamplingParams(**fields) if params is None else params.replace(**fields)
        if several := whole.per_row():
            name, count = next(iter(several.items()))
            raise ValueError(f"{name}: expected one value, since a sampler draws one sequence, got {count}")
        neutral = {name: getattr(SamplingParams, name) for name in _HISTORY}
        self._sampler = Sampler(whole.replace(**neutral), batch_size=1, seed=own, offset=offset, backend=backend)
        self._penalties = active_penalties(whole)
        self._edit = {name: getattr(whole, name) for name in _HISTORY}
        self._breakers, self._backend = dry_breakers, backend
        self._start = self._next = int(self._sampler.offsets[0])
        self._prompt: int | None = None  # its length, once a processor has seen it

    @property
    def logits_processors(self) -> list[Any]:
        """For the argument of that name: applies the penalties, and knows the position that is drawn next.

        With it a draft model does not change the text, since a draft is drawn with the random number of its position.
        """
        return [self._process]

    def _process(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """The ids so far [L] and the next logits [1, V] to logits."""
        if self._prompt is None:
            self._prompt = len(tokens)
        self._go_to(self._start + len(tokens) - self._prompt)
        if not self._penalties:
            return logits
        ids = np.asarray(tokens).astype(np.int64)
        prompt, output = (torch.from_numpy(part)[None] for part in (ids[: self._prompt], ids[self._prompt :]))
        history: dict[str, Any] = {"prompt_ids": prompt, "output_ids": output, "dry_breakers": self._breakers}
        edited = filter_logits(_tensor("logits", logits), **history, **self._edit, backend=self._backend)
        return mx.array(edited.float().numpy()).astype(logits.dtype)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities [1, V], float32, float16 or bfloat16, to the next id, uint32 [1].

        Raises:
            TypeError, ValueError: another shape or type, or a row that cannot be sampled.
            ValueError: a penalty is on, and `logits_processors` is not in use.
        """
        if logprobs.ndim != 2 or len(logprobs) != 1:
            raise ValueError(
                f"logprobs: expected shape [1, V], got {tuple(logprobs.shape)}: every sequence of a batch needs a "
                "sampler of its own (BatchGenerator.insert has samplers=), and a draft model needs logits_processors"
            )
        if self._penalties and self._prompt is None:
            raise ValueError(f"{self._penalties[0]}: expected logits_processors=sampler.logits_processors beside it")
        tokens = self._sampler(_tensor("logprobs", logprobs)).tokens
        self._next += 1
        return mx.array(tokens.tolist(), dtype=mx.uint32)

    def _go_to(self, position: int) -> None:
        """Draw there next, which is elsewhere only after drafts."""
        if position != self._next:
            self._sampler.set_row(0, offset=position)
            self._next = position


def _tensor(name: str, array: mx.array) -> torch.Tensor:
    """An MLX array as a tensor over its memory, whatever device it is used on."""
    if array.dtype == mx.bfloat16:  # which Python's buffers lack
        return torch.from_numpy(np.asarray(array.view(mx.uint16))).view(torch.bfloat16)
    if array.dtype not in (mx.float32, mx.float16):
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {array.dtype}")
    return torch.from_numpy(np.asarray(array))
