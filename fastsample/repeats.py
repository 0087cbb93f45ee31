"""Repeats: what a call with plain arguments leaves behind, so that the next one like it costs little Python.

A generation loop repeats the same call with other logits, seeds and offsets. Everything that depends only on the rest
is kept here: the checks, the packed parameters, the engine, and memory for seeds and offsets. A call takes its entry
out of the store and puts it back at its end, so calls and threads never share one, and nothing is put back after an
error. No tensor of the caller is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import torch

from fastsample.backends.environment import seen
from fastsample.checks import CPU, has_memory
from fastsample.inputs import Rows
from fastsample.inputs.records import PLAIN, Packed, kept
from fastsample.inputs.seeds import fill_offset, fill_seeds
from fastsample.outputs import Options
from fastsample.params import SamplingParams

LIMIT = 64  # calls that a thread keeps
SMALL = 4096  # rows and outputs of a call; with more of them, Python's share does not matter

C = TypeVar("C")


def key(kind: str, params: SamplingParams | None, fields: dict[str, Any], options: Options) -> Hashable | None:
    """What equal calls have in common, or None for a call that cannot be repeated. Types count: 1 == 1.0 == True."""
    numbers = type(options.num_samples), type(options.top_logprobs), type(options.kept_capacity)
    if numbers != (int, int, int) or (type(options.kept_mass), type(options.entropy)) != (bool, bool):
        return None
    if params is None:
        types = tuple(map(type, fields.values()))
        return (kind, *fields.items(), types, options, seen()) if PLAIN.issuperset(types) else None
    if fields or type(params) is not SamplingParams:
        return None
    packed = kept(params)
    return None if packed is None else (kind, packed, options, seen())


class Repeat(Generic[C]):
    """What is kept of one call."""

    def __init__(self, call: C, packed: Packed) -> None:
        self.call, self.packed = call, packed
        self._rows: Rows | None = None
        self._seed: int | None = None  # what is written in the rows
        self._offset: int | None = None

    def rows(self, seed: Any, offset: Any, count: int) -> Rows | None:
        """Rows on the CPU for one number as seed (None: a fresh one) and one number as offset."""
        if type(offset) is not int or (type(seed) is not int and seed is not None):
            return None
        if (self._rows is None or len(self._rows.seeds) != count) and not self._make(count):
            return None
        if seed is None:
            self._drawn.random_()
            seed = self._drawn.item()
        if seed != self._seed:
            fill_seeds(self._seeds, seed)
            self._seed = seed
        if offset != self._offset:
            fill_offset(self._offsets, offset)
            self._offset = offset
        return self._rows

    def _make(self, count: int) -> bool:
        """Memory for the words of this many rows; numpy writes to it in a tenth of torch's time."""
        with torch.inference_mode(False):
            seeds, offsets, self._drawn = (torch.zeros(n, dtype=torch.int64, device=CPU) for n in (count, 1, 1))
        if not has_memory(seeds):  # in a mode of torch's that makes fake tensors
            return False
        self._rows = Rows(self.packed.records, seeds, offsets)
        self._seeds, self._offsets = seeds.numpy(), offsets.numpy()
        self._seed, self._offset = None, 0
        return True


class _Store(threading.local):
    def __init__(self) -> None:
        self.repeats: dict[Hashable, Repeat[Any]] = {}


_store = _Store()


def take(name: Hashable | None) -> Repeat[Any] | None:
    """What the last call of that key has put back."""
    try:
        return None if name is None else _store.repeats.pop(name, None)
    except Exception:  # an option without a hash, whatever it raises; the checks are about to refuse it by name
        return None


def forget() -> None:
    """Empty this thread's store."""
    _store.repeats.clear()


def put_back(name: Hashable, repeat: Repeat[Any]) -> None:
    repeats = _store.repeats
    if len(repeats) >= LIMIT:
        forget()
    repeats[name] = repeat
