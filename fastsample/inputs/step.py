"""Inputs: what a sampling step is given besides logits and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from fastsample.arrays import ArrayLike
from fastsample.inputs.batch import flat
from fastsample.inputs.bias import BiasLike, pack_bias
from fastsample.inputs.ids import BreakerIds, TokenIds, pack_breakers, pack_token_ids
from fastsample.inputs.masks import Allowed, check_bitmask, restrict
from fastsample.inputs.rows import Rows


class Inputs(NamedTuple):
    """The arguments of a step as the caller gave them. A new one goes here, into `attach` and into `DETAILS`."""

    bitmask: ArrayLike | None = None
    allowed_ids: Allowed | None = None
    bias: BiasLike | None = None
    prompt_ids: TokenIds | None = None
    output_ids: TokenIds | None = None
    dry_breakers: BreakerIds | None = None

    def attach(self, rows: Rows, table: torch.Tensor) -> None:
        """Check the inputs and add them to the rows of logits [B, V]."""
        if self.bitmask is not None:
            rows.bitmask = check_bitmask(self.bitmask, table)
        if self.allowed_ids is not None:
            rows.bitmask = restrict(rows.bitmask, self.allowed_ids, table)
        if self.bias is not None:
            rows.bias = pack_bias(self.bias, table)
        if self.prompt_ids is not None:
            rows.prompt_ids = pack_token_ids("prompt_ids", self.prompt_ids, table)
        if self.output_ids is not None:
            rows.output_ids = pack_token_ids("output_ids", self.output_ids, table)
        if self.dry_breakers is not None:
            rows.breakers = pack_breakers(self.dry_breakers, table)

    def flat(self, batch: Sequence[int]) -> Inputs:
        """Inputs of logits [*batch, V] as those of the flattened table."""
        given = self._asdict()
        return Inputs(**{name: flat(name, v, batch, 1) if DETAILS[name].rows else v for name, v in given.items()})

    def same_as(self, other: Inputs) -> bool:
        """Whether every input is the very same object. Spelled out: a step takes a few microseconds in all."""
        return (
            self.bitmask is other.bitmask
            and self.allowed_ids is other.allowed_ids
            and self.bias is other.bias
            and self.prompt_ids is other.prompt_ids
            and self.output_ids is other.output_ids
            and self.dry_breakers is other.dry_breakers
        )


NO_INPUTS = Inputs()
"""The usual case; most calls are given none."""


def gather(
    bitmask: ArrayLike | None,
    allowed_ids: Allowed | None,
    bias: BiasLike | None,
    prompt_ids: TokenIds | None,
    output_ids: TokenIds | None,
    dry_breakers: BreakerIds | None,
) -> Inputs:
    """The inputs of a call: `NO_INPUTS` itself where there are none, which is quick to tell."""
    if bitmask is None and allowed_ids is None and bias is None and prompt_ids is None and output_ids is None:
        return NO_INPUTS if dry_breakers is None else Inputs(dry_breakers=dry_breakers)
    return Inputs(bitmask, allowed_ids, bias, prompt_ids, output_ids, dry_breakers)


class Detail(NamedTuple):
    """What must be known of an input in general."""

    rows: bool  # a tensor of it has a row per row of logits: [B, L], and [*batch, L] for logits [*batch, V]
    operator: str  # its type as an argument of a torch.library operator; "" where it cannot be one
    wanted: str  # what a trace accepts, for error messages


_TRACES = "under torch.compile and whatever else makes a graph"
DETAILS = {
    "bitmask": Detail(True, "Tensor?", f"a tensor {_TRACES}"),
    "allowed_ids": Detail(True, "", f"None {_TRACES}; pass a bitmask (fastsample.pack_bitmask)"),
    "bias": Detail(False, "Tensor[]", f"tensors (row_ptr, ids, values) {_TRACES}; a dict would be a constant"),
    "prompt_ids": Detail(True, "Tensor?", f"a tensor {_TRACES}; a list would be a constant"),
    "output_ids": Detail(True, "Tensor?", f"a tensor {_TRACES}; a list would be a constant"),
    "dry_breakers": Detail(True, "Tensor?", f"a tensor {_TRACES}; a list would be a constant"),
}


class Stamps:
    """What a step's inputs were, so that the next one can tell whether more than their values has changed."""

    def __init__(self, given: Inputs) -> None:
        self._given = given
        self._stamps = _stamps(given)

    def match(self, given: Inputs) -> bool:
        return given.same_as(self._given) and self._stamps == _stamps(given)


def _stamps(given: Iterable[Any]) -> list[tuple[Any, ...]]:
    """All of each tensor but its values that may change while it stays the same object."""
    return [(v.data_ptr(), v.dtype, v.shape, v.stride(), v.is_neg()) for v in given if v is not None]


def used_in_place(given: Inputs, rows: Rows) -> bool:
    """Whether the rows hold views of the very tensors that were given, so that they follow a change of values."""
    if given.bias is not None or given.allowed_ids is not None:
        return False
    return (
        _shares(given.bitmask, rows.bitmask)
        and _shares(given.prompt_ids, rows.prompt_ids)
        and _shares(given.output_ids, rows.output_ids)
        and _shares(given.dry_breakers, rows.breakers)
    )


def _shares(given: Any, packed: torch.Tensor | None) -> bool:
    if given is None:
        return True
    if type(given) is not torch.Tensor or packed is None:
        return False
    return given.data_ptr() == packed.data_ptr() and given.dtype == packed.dtype
