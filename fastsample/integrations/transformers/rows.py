"""The arguments of `fs_generate`: checked when it is called, spread over the sequences when `generate` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fastsample.backends import Engine, engine
from fastsample.checks import CPU, is_one_of
from fastsample.inputs import pack_offsets, pack_seeds, row_seeds
from fastsample.integrations.grammar import Grammar
from fastsample.params import SamplingParams


class Streamer(Protocol):
    """What a streamer must offer; every BaseStreamer of transformers does."""

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt's ids [B, L], then each step's tokens [B]."""

    def end(self) -> None:
        """Generation is over."""


def check_backend(backend: Any) -> None:
    """Raise unless this is "auto", an engine's name or, where rows are split over ranks, their engine."""
    if isinstance(backend, Engine):
        return
    if not isinstance(backend, str):
        raise TypeError(f"backend = {backend!r}: expected 'auto' or the name of an engine")
    if backend != "auto":
        engine(backend)


def check_seed(seed: Any) -> None:
    """Raise unless this is a seed, or one seed for each of some number of rows."""
    if isinstance(seed, (bytes, bytearray, memoryview)):
        raise TypeError(f"seed = {seed!r}: expected an integer or one per sequence; int.from_bytes makes one")
    count = length_of(seed)
    pack_seeds(seed, 1 if count is None else count)


def check_offset(offset: Any) -> None:
    """Raise unless this is "prompt", a position, or one position for each of some number of rows."""
    if is_one_of(offset, "prompt"):
        return
    if isinstance(offset, str):
        raise ValueError(f"offset = {offset!r}: expected an integer, one per sequence, or 'prompt'")
    count = length_of(offset)
    pack_offsets(offset, 1 if count is None else count)


def check_streamer(streamer: Any) -> None:
    """TypeError unless this object can receive tokens."""
    for method in ("put", "end"):
        if not callable(getattr(streamer, method, None)):
            raise TypeError(f"streamer: expected an object with put(ids) and end(), got {type(streamer).__name__}")


# One value per sequence ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """`each` sequences of every prompt; `unit` is the caller's word for one of them."""

    prompts: int
    each: int = 1
    unit: str = "sequence"

    @property
    def sequences(self) -> int:
        """The number of sequences."""
        return self.prompts * self.each

    def require(self, name: str, count: int) -> None:
        """ValueError unless there is one value per sequence, or per prompt of several sequences."""
        if count not in (self.sequences, self.prompts):
            one = "one" if name == "grammar" else "one value"
            per_prompt = f", or {self.prompts} (one per prompt)" if self.each > 1 else ""
            wanted = f"expected {one} or {self.sequences} (one per {self.unit}){per_prompt}"
            raise ValueError(f"{name}: {wanted}, got {count}")


def sequence_seeds(seed: Any, batch: Batch) -> torch.Tensor:
    """int64 bits, one for each sequence."""
    count = length_of(seed)
    if count is None or count == batch.sequences:
        return pack_seeds(seed, batch.sequences)
    batch.require("seed", count)
    return siblings(pack_seeds(seed, batch.prompts), batch.each)


def siblings(seeds: torch.Tensor, each: int) -> torch.Tensor:
    """Seeds of a prompt's sequences: the first keeps the prompt's seed p, the j-th gets row j of p."""
    own = torch.stack([row_seeds(seed % 2**64, each) for seed in seeds.tolist()])
    own[:, 0] = seeds
    return own.flatten()


def sequence_offsets(offset: Any, lengths: torch.Tensor, batch: Batch) -> torch.Tensor:
    """int64 bits, one for each sequence; "prompt" means each sequence's length so far."""
    if isinstance(offset, str):
        return lengths.to(CPU, torch.int64)
    count = length_of(offset)
    if count is None or count == batch.sequences:
        return pack_offsets(offset, batch.sequences).expand(batch.sequences)
    batch.require("offset", count)
    return pack_offsets(offset, batch.prompts).repeat_interleave(batch.each)


def sequence_params(params: SamplingParams, batch: Batch) -> SamplingParams:
    """Values given per prompt, repeated to one per sequence."""
    sizes = params.per_row()
    for name, size in sizes.items():
        batch.require(name, size)
    if not sizes or set(sizes.values()) == {batch.sequences}:
        return params
    return repeated(params, batch.each)


def repeated(params: SamplingParams, each: int) -> SamplingParams:
    """Each row's values, repeated `each` times."""
    values = {name: getattr(params, name) for name in params.per_row()}
    lists = {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
    return params.replace(**{name: [v for v in values for _ in range(each)] for name, values in lists.items()})


def sequence_grammars(grammar: Any, batch: Batch) -> list[Grammar | None]:
    """One grammar, or None, for each sequence."""
    if isinstance(grammar, Grammar):
        return [grammar] * batch.sequences
    given = list(grammar)
    batch.require("grammar", len(given))
    return given if len(given) == batch.sequences else [item for item in given for _ in range(batch.each)]


def length_of(values: Any) -> int | None:
    """The number of values; None if all sequences share one."""
    if isinstance(values, (torch.Tensor, np.ndarray)):
        return None if values.ndim == 0 else len(values)
    return len(values) if isinstance(values, Sequence) and not isinstance(values, str) else None
