"""Parameters as a call needs them: packed into records, and kept where the next call has the same."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from fastsample.checks import has_memory, require_memory
from fastsample.inputs.penalties import active_penalties
from fastsample.params import SamplingParams, check_names


class Packed:
    """Parameters as a call needs them; not to be written to. Two are equal only if they are the same object."""

    __slots__ = ("penalties", "records")

    def __init__(self, params: SamplingParams) -> None:
        self.records = params.pack()  # int32 [B or 1, fields]
        self.penalties = active_penalties(params)  # those that are on


def pack_params(
    params: SamplingParams | None, fields: dict[str, Any], rows: int, others: tuple[str, ...] = ()
) -> torch.Tensor:
    """The records of `pack`."""
    return pack(params, fields, rows, others).records


def pack(params: SamplingParams | None, fields: dict[str, Any], rows: int, others: tuple[str, ...] = ()) -> Packed:
    """`params` overridden by `fields`; `others` are the call's other arguments, which a misspelt field may mean."""
    check_names(fields, others)
    if params is None and PLAIN.issuperset(types := tuple(map(type, fields.values()))):
        return _pack_plain(tuple(fields.items()), types)
    if params is None:
        params = SamplingParams(**fields)
    elif not isinstance(params, SamplingParams):
        raise TypeError(f"params: expected SamplingParams, got {type(params).__name__}")
    elif fields:
        params = params.replace(**fields)
    packed = _pack(params)
    if len(packed.records) not in (1, rows):
        names = ", ".join(params.per_row())
        wanted = "one value" if rows == 1 else f"one value for all rows or {rows} values (one per row of logits)"
        raise ValueError(f"{names}: expected {wanted}, got {len(packed.records)} values")
    return packed


PLAIN = frozenset((float, int, bool, str))
"""Types of the values that all rows share and that never change."""


@lru_cache(maxsize=256)
def _pack_plain(fields: tuple[tuple[str, Any], ...], types: tuple[type, ...]) -> Packed:
    """Scalar fields are the same call after call. Their types are part of the key: 1 == 1.0 == True."""
    packed = _pack(SamplingParams(**dict(fields)))
    require_memory("params", packed.records)  # a mode of torch's that makes fake tensors must not leave one here
    return packed


def _pack(params: SamplingParams) -> Packed:
    """Scalar params keep their records for the next step. Tensors are packed anew: their values may have changed."""
    packed = kept(params)
    if packed is not None:
        return packed
    packed = Packed(params)
    if len(packed.records) == 1 and not params.per_row() and has_memory(packed.records):
        object.__setattr__(params, "_packed", packed)
    return packed


def kept(params: SamplingParams) -> Packed | None:
    """What params have kept, which they do if all rows share their values."""
    found: Packed | None = params.__dict__.get("_packed")
    return found
