"""The completions of llama_cpp.Llama, drawn by fastsample: one object in the place of llama.cpp's sampler chain."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import llama_cpp as lc
import numpy as np
import torch
from llama_cpp import _internals as internals

from fastsample.inputs import BreakerIds
from fastsample.integrations.llama_cpp.batch import logits_of
from fastsample.integrations.sequences import Sequences
from fastsample.params import SamplingParams, check_names
from fastsample.sampler import Sampler

NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repeat_penalty": "repetition_penalty",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
}
"""Arguments of `Llama.generate`, and what SamplingParams calls them."""


@contextlib.contextmanager
def sampling(
    llm: lc.Llama,
    params: SamplingParams | None = None,
    *,
    seed: int | None = None,
    offset: int = 0,
    dry_breakers: BreakerIds | None = None,
    backend: str = "auto",
    **fields: Any,
) -> Iterator[lc.Llama]:
    """In this context fastsample draws for `llm(...)`, `create_completion`, `create_chat_completion` and `generate`.

    The model, `stop`, streaming, `logprobs`, caches and draft models stay llama-cpp-python's own. A completion's first
    token is drawn at position `offset`, each further one at the next; a draft model does not change the text.

    Args:
        llm: a `llama_cpp.Llama`. One context at a time is its innermost.
        params: how to sample, whatever the call says. Without it the call's own arguments hold, in the order
            "temperature_last": temperature, top_k, top_p, min_p, typical_p, repeat_penalty, frequency_penalty and
            presence_penalty.
        fields: fields of SamplingParams, which override both.
        seed: 64-bit, the same for every completion; None takes the call's own `seed=`.
        offset: position of a completion's first token.
        dry_breakers: token ids, as for `fastsample.sample`.
        backend: as for `fastsample.sample`.

    Raises:
        TypeError, ValueError: bad argument, named; in a call, an argument that has no meaning here (mirostat_mode,
            tfs_z), or one out of its range.
        RuntimeError: this version of llama-cpp-python has no `Llama._init_sampler`; `llm.sample` before `generate`.
    """
    if not isinstance(llm, lc.Llama):
        raise TypeError(f"llm: expected a llama_cpp.Llama, got {llm!r}")
    if not hasattr(llm, "_init_sampler"):
        raise RuntimeError(f"llama-cpp-python {lc.__version__} has no Llama._init_sampler, which 0.3.36 has")
    check_names(fields)
    options: dict[str, Any] = {"offset": offset, "backend": backend}
    Sampler(params, batch_size=1, seed=[seed or 0], **options, **fields)  # bad arguments are noticed here

    def init_sampler(**given: Any) -> Draws:
        _refuse(given)
        asked = {} if params is not None else _asked(given)
        own = llm._seed if seed is None else seed
        fresh = seed is None and own == lc.LLAMA_DEFAULT_SEED  # which means none there too
        sampler = Sampler(params, batch_size=1, seed=None if fresh else [own], **options, **(asked | fields))
        return Draws(llm, Sequences(sampler, dry_breakers), _edits(llm, given))

    before = {name: vars(llm).get(name) for name in ("_init_sampler", "_sampler")}
    vars(llm).update(_init_sampler=init_sampler, _sampler=NoDraws())
    try:
        yield llm
    finally:
        for name, value in before.items():
            if value is None and name == "_init_sampler":
                vars(llm).pop(name, None)
            else:
                vars(llm)[name] = value


def _refuse(given: dict[str, Any]) -> None:
    if given["mirostat_mode"] != 0:
        raise ValueError(f"mirostat_mode = {given['mirostat_mode']!r}: expected 0: fastsample has no Mirostat")
    if given["tfs_z"] != 1.0:
        raise ValueError(f"tfs_z = {given['tfs_z']!r}: expected 1.0: neither llama.cpp nor fastsample has it")


def _asked(given: dict[str, Any]) -> dict[str, Any]:
    """The call's own arguments as fields of SamplingParams."""
    fields = {ours: given[theirs] for theirs, ours in NAMES.items()}
    fields["top_k"] = max(fields["top_k"], 0)  # negative: all
    for name in ("top_p", "typical_p"):
        fields[name] = min(fields[name], 1.0)
    return {"order": "temperature_last", **fields}


Edit = Callable[[Any], Any]
"""A step's logits [V], a NumPy array, to others."""


def _edits(llm: lc.Llama, given: dict[str, Any]) -> list[Any]:
    """What changes a step's logits before they are sampled: the call's processors, then its grammar."""
    found: list[Any] = [Processor(llm, one) for one in given["logits_processor"] or ()]
    return found if given["grammar"] is None else [*found, Grammar(llm, given["grammar"])]


class Processor:
    """A logits processor of the call's; `logit_bias` is one."""

    def __init__(self, llm: lc.Llama, process: Callable[[Any, Any], Any]) -> None:
        self._llm, self._process = llm, process

    def __call__(self, logits: Any) -> Any:
        return self._process(self._llm._input_ids, logits)

    def accept(self, token: int) -> None:
        pass


class Grammar:
    """llama.cpp's own grammar, which sets what it does not allow to -inf."""

    def __init__(self, llm: lc.Llama, grammar: Any) -> None:
        self._chain = internals.LlamaSampler()
        self._chain.add_grammar(llm._model, grammar)
        self._candidates = internals.LlamaTokenDataArray(n_vocab=llm.n_vocab())

    def __call__(self, logits: Any) -> Any:
        self._candidates.copy_logits(logits)
        lc.llama_sampler_apply(self._chain.sampler, ctypes.byref(self._candidates.candidates))
        return self._candidates.candidates_data.logit

    def accept(self, token: int) -> None:
        self._chain.accept(token)


class Draws:
    """In the place of llama_cpp._internals.LlamaSampler, for one completion."""

    def __init__(self, llm: lc.Llama, sequences: Sequences, edits: list[Any]) -> None:
        self._llm, self._sequences, self._edits = llm, sequences, edits
        self._started = False

    def sample(self, ctx: Any, idx: int = -1) -> int:
        """The next token of the sequence; `idx` is the one of the batch that it follows, from the end."""
        if not self._started:  # the ids so far are the prompt
            self._sequences.start(0, self._llm._input_ids.astype(np.int64))
            self._started = True
        logits = logits_of(ctx.ctx, [idx])
        if self._edits:
            row = logits[0].numpy().copy()
            for edit in self._edits:
                row = edit(row)
            logits = torch.from_numpy(np.ascontiguousarray(row, dtype=np.float32))[None]
        (token,) = self._sequences.draw(logits, [0]).tokens.tolist()
        for edit in self._edits:
            edit.accept(token)
        return int(token)

    def close(self) -> None:
        """As LlamaSampler has it."""


class NoDraws:
    """Before a completion has begun."""

    def sample(self, *_: Any) -> int:
        raise RuntimeError("llm.sample: no text has begun here yet; call the model, or its `generate`, first")
