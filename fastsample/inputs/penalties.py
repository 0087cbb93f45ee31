"""Penalties count token ids. Without any they change nothing, and the caller is warned."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import torch

from fastsample.params import SamplingParams, specs

_COUNTED = {name: spec.counts for name, spec in specs() if spec.counts}  # penalty: what it is counted over
_NEUTRAL = {name: float(getattr(SamplingParams, name)) for name in _COUNTED}
_COLUMN = {name: (column, spec.kind) for column, (name, spec) in enumerate(specs()) if name in _COUNTED}


def active_penalties(params: SamplingParams) -> tuple[str, ...]:
    """Names of the penalties that are on in some row."""
    return tuple(name for name, neutral in _NEUTRAL.items() if _is_on(getattr(params, name), neutral))


def _is_on(value: Any, neutral: float) -> bool:
    return bool((value != neutral).any()) if isinstance(value, torch.Tensor) else value != neutral


def penalised_rows(records: torch.Tensor) -> dict[int, tuple[str, ...]]:
    """Row -> names of the penalties that are on in it, of packed records (int32 [B, fields] on the CPU)."""
    values = {"float": records.view(torch.float32), "int": records}
    on = {name: values[kind][:, at] != _NEUTRAL[name] for name, (at, kind) in _COLUMN.items()}
    rows = torch.stack(list(on.values())).any(0).nonzero()[:, 0].tolist()
    return {row: tuple(name for name in on if bool(on[name][row])) for row in rows}


def warn_without_ids(active: Collection[str], prompt_ids: Any, output_ids: Any, stacklevel: int) -> None:
    """UserWarning where a penalty that is on has no ids to count; an empty list is one. Once per place in the program.

    Args:
        active: names of the penalties that are on.
        prompt_ids, output_ids: as the call was given them.
        stacklevel: of the caller's caller, as for `warnings.warn`: 2 names the line that called whoever calls this.
    """
    if output_ids is not None:
        return
    told = [name for name, ids in _COUNTED.items() if prompt_ids is None or "prompt_ids" not in ids]
    idle = [name for name in told if name in active]
    if idle:
        what = "; ".join(f"{name} has no effect without {_COUNTED[name]}" for name in idle)
        how = "pass the ids so far, int64 [B, L] padded with -1 or a list per row, empty while there are none"
        warnings.warn(f"{what}: {how}", UserWarning, stacklevel=stacklevel + 1)
