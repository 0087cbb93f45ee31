"""Several sequences of a llama.cpp context: a step's logits where llama.cpp keeps them, and all tokens at once."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp as lc
import torch

from fastsample.checks import count, whole
from fastsample.inputs import BreakerIds, Seed
from fastsample.integrations.sequences import Sequences, collected, prompts_of, token_ids
from fastsample.outputs import LogprobsMode, SampleOutput
from fastsample.params import SamplingParams
from fastsample.sampler import Sampler

BYTES = 4  # of a logit
STEP = 256  # llama.cpp rounds the room of a sequence to multiples of it


def logits_of(context: Any, positions: Sequence[int]) -> torch.Tensor:
    """The logits of a decoded batch where llama.cpp keeps them, without a copy where they lie one after the other.

    They do where `positions` are those of all tokens, or of neighbours, that asked for logits, in rising order. Others
    are gathered.

    Args:
        context: a `llama_cpp.Llama`, or a llama_context after `llama_decode`.
        positions: tokens of the batch whose `logits` was set; -1 is the last that asked, as for `llama_get_logits_ith`.

    Returns:
        float32 [n, V] on the CPU. A view holds until the context's next `llama_decode`, and must not be written to.

    Raises:
        TypeError, ValueError: a position without logits; the message names it.
    """
    context = _context(context)
    vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(lc.llama_get_model(context)))
    starts = [_address(context, at, position) for at, position in enumerate(positions)]
    if not starts:
        return torch.empty(0, vocab)
    if all(start == starts[0] + i * vocab * BYTES for i, start in enumerate(starts)):
        return _view(starts[0], len(starts), vocab)
    return torch.cat([_view(start, 1, vocab) for start in starts])


def _context(given: Any) -> Any:
    context = given.ctx if isinstance(given, lc.Llama) else given
    if not context:
        raise TypeError(f"context: expected a llama_cpp.Llama or a llama_context, got {given!r}")
    return context


def _address(context: Any, at: int, position: Any) -> int:
    row = lc.llama_get_logits_ith(context, whole(f"positions[{at}]", position))
    if not row:
        raise ValueError(f"positions[{at}] = {position}: expected a token of the last batch that asked for its logits")
    return ctypes.addressof(row.contents)


def _view(address: int, rows: int, vocab: int) -> torch.Tensor:
    memory = _memory(rows * vocab).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, vocab)


@functools.lru_cache(maxsize=64)
def _memory(size: int) -> Any:
    """ctypes keeps every type that it makes."""
    return ctypes.c_float * size


class BatchSampler:
    """The sequences of a llama.cpp context, each with its own parameters, seed, position and history.

    A step is one call for all of them, on llama.cpp's own logits. What a sequence draws depends on its logits, its
    parameters, its seed and its position alone.

    Args:
        context: a `llama_cpp.Llama` or a llama_context, which the caller decodes with.
        batch_size: number of slots B >= 1.
        params: how a sequence samples that is admitted without parameters of its own; `fields` override it. Above
            llama.cpp's own: SamplingParams.preset("llama.cpp").
        logprobs, top_logprobs, on_invalid, backend: as for `fastsample.sample`.
        dry_breakers: token ids, as for `fastsample.sample`.

    Raises:
        TypeError, ValueError: bad argument; the message names it, the row and the value.
    """

    def __init__(
        self,
        context: Any,
        batch_size: int,
        params: SamplingParams | None = None,
        *,
        logprobs: LogprobsMode | None = None,
        dry_breakers: BreakerIds | None = None,
        backend: str = "auto",
        **fields: Any,
    ) -> None:
        self._context = _context(context)
        options: dict[str, Any] = {"batch_size": batch_size, "logprobs": logprobs, "backend": backend}
        self._sequences = Sequences(Sampler(params, **options, **fields), dry_breakers)
        self._free = list(range(batch_size))

    def admit(
        self,
        prompt_ids: Any,
        params: SamplingParams | None = None,
        *,
        seed: int | None = None,
        offset: int = 0,
        **fields: Any,
    ) -> int:
        """Take a sequence in; its slot, the lowest that is free.

        Args:
            prompt_ids: the prompt, a list or an array [L] of ids; only penalties and DRY read it.
            params, fields: as for `fastsample.Sampler.set_row`.
            seed: 64-bit, used as it is; None draws a fresh one from torch's default CPU generator.
            offset: position of the first new token.

        Raises:
            TypeError, ValueError: bad argument; the message names it and the value.
            RuntimeError: no slot is free.
        """
        ids = token_ids("prompt_ids", prompt_ids)
        if not self._free:
            raise RuntimeError(f"all {self._sequences.sampler.batch_size} slots are taken: release one first")
        if seed is None:
            seed = int(torch.randint(-(2**63), 2**63 - 1, ())) % 2**64
        slot = self._free[0]
        self._sequences.sampler.set_row(slot, params, seed=seed, offset=offset, **fields)
        self._sequences.start(slot, ids)
        return heapq.heappop(self._free)

    def release(self, slot: int) -> None:
        """Free a slot. ValueError if it is not taken."""
        self._require("slot", whole("slot", slot))
        heapq.heappush(self._free, slot)

    def __call__(self, positions: Sequence[int], slots: Sequence[int], **inputs: Any) -> SampleOutput:
        """Draw the next token of each of these slots, and advance them.

        Args:
            positions: token of the decoded batch whose logits are each slot's, as for `logits_of`.
            slots: n distinct slots that are taken.
            inputs: bitmask, allowed_ids and bias, as for `fastsample.sample`.

        Raises:
            TypeError, ValueError: bad argument, or a row that cannot be sampled; no slot has then moved.
        """
        slots = [whole(f"slots[{at}]", slot) for at, slot in enumerate(slots)]
        if len(positions) != len(slots):
            raise ValueError(f"positions: expected {len(slots)}, one for each slot, got {len(positions)}")
        for at, slot in enumerate(slots):
            self._require(f"slots[{at}]", slot)
        return self._sequences.draw(logits_of(self._context, positions), slots, **inputs)

    def _require(self, name: str, slot: int) -> None:
        if not 0 <= slot < self._sequences.sampler.batch_size or slot in self._free:
            raise ValueError(f"{name} = {slot}: expected a slot that `admit` has given and `release` not taken back")


def generate(
    llm: lc.Llama, prompts: Sequence[Any], params: SamplingParams | None = None, **options: Any
) -> list[list[int]]:
    """Continue several prompts as one batch; the new ids of each, up to and including an end-of-generation token.

    Arguments and errors as for `stream`. `llm.detokenize` makes bytes of ids.
    """
    steps = stream(llm, prompts, params, **options)
    return collected(steps, len(prompts))


def stream(
    llm: lc.Llama,
    prompts: Sequence[Any],
    params: SamplingParams | None = None,
    *,
    max_tokens: int = 16,
    seed: Seed | None = None,
    offset: Seed = 0,
    dry_breakers: BreakerIds | None = None,
    backend: str = "auto",
    **fields: Any,
) -> Iterator[dict[int, int]]:
    """The same step by step: each step's new ids by the number of their prompt.

    The sequences have a llama_context of their own on the model of `llm`, whose own state stays as it is. Each prompt
    is decoded alone; then a step decodes all sequences that have not ended and samples them in one call.

    Args:
        llm: a `llama_cpp.Llama`.
        prompts: B texts, which `llm.tokenize` turns into ids with the model's beginning of text, or lists of ids.
        params: how to sample, one value for all prompts or one per prompt; `fields` override it. llama.cpp's own:
            SamplingParams.preset("llama.cpp").
        max_tokens: new ids of each sequence, at least 1; with its prompt at most llm.n_ctx().
        seed, offset: as for `fastsample.sample`. With one seed per prompt a text does not depend on the others.
        dry_breakers, backend: as for `fastsample.sample`.

    Raises:
        TypeError, ValueError: bad argument; the message names it, the prompt and the value.
        RuntimeError: llama.cpp makes no context, or cannot decode.
    """
    if not isinstance(llm, lc.Llama):
        raise TypeError(f"llm: expected a llama_cpp.Llama, got {llm!r}")
    ids = prompts_of("prompts", prompts, lambda text: llm.tokenize(text.encode(), special=True))
    max_tokens = count("max_tokens", max_tokens, 1, 2**31 - 1)
    for row, prompt in enumerate(ids):
        if len(prompt) + max_tokens > llm.n_ctx():
            both = f"{len(prompt)} ids and max_tokens = {max_tokens}"
            raise ValueError(f"prompts[{row}]: {both}: expected at most llm.n_ctx() = {llm.n_ctx()} together")
    sampler = Sampler(params, batch_size=len(ids), seed=seed, offset=offset, backend=backend, **fields)
    return _steps(llm, ids, max_tokens, Sequences(sampler, dry_breakers))


def _steps(llm: lc.Llama, ids: Sequence[Any], max_tokens: int, sequences: Sequences) -> Iterator[dict[int, int]]:
    vocab = lc.llama_model_get_vocab(llm.model)
    with contextlib.closing(Context(llm, len(ids), max(map(len, ids)) + max_tokens)) as context:
        first = []
        for row, prompt in enumerate(ids):
            sequences.start(row, prompt)
            first.append(context.prefill(row, prompt.tolist()).clone())
        ends = functools.partial(lc.llama_vocab_is_eog, vocab)
        yield from sequences.run(torch.cat(first), context.advance, ends, max_tokens)


class Context:
    """A llama_context for several sequences on the model of a Llama, with that one's other settings."""

    def __init__(self, llm: lc.Llama, sequences: int, length: int) -> None:
        params = type(llm.context_params).from_buffer_copy(llm.context_params)
        params.n_seq_max, params.n_ctx = sequences, sequences * -(-length // STEP) * STEP
        params.n_batch = max(llm.n_batch, sequences)
        self._llm = llm  # which owns the model
        self._context = lc.llama_init_from_model(llm.model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {sequences} sequences of {length} tokens")
        self._room = params.n_batch
        self._batch = lc.llama_batch_init(self._room, 0, 1)
        self._ends = [0] * sequences

    def close(self) -> None:
        lc.llama_batch_free(self._batch)
        lc.llama_free(self._context)

    def prefill(self, sequence: int, ids: list[int]) -> torch.Tensor:
        """Decode a prompt; the logits [1, V] after it."""
        for start in range(0, len(ids), self._room):
            part = ids[start : start + self._room]
            self._decode([(sequence, token) for token in part], wanted=1)
        return logits_of(self._context, [-1])

    def advance(self, tokens: dict[int, int]) -> torch.Tensor:
        """Decode one more token of each of these sequences; the logits [n, V] after them."""
        self._decode(list(tokens.items()), wanted=len(tokens))
        return logits_of(self._context, range(len(tokens)))

    def _decode(self, tokens: list[tuple[int, int]], wanted: int) -> None:
        """Decode tokens of sequences; the last `wanted` of them ask for logits."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for at, (sequence, token) in enumerate(tokens):
            batch.token[at], batch.pos[at] = token, self._ends[sequence]
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = at >= len(tokens) - wanted
            self._ends[sequence] += 1
        if status := lc.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with status {status}")
