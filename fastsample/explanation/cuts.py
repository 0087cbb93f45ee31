"""Stages 6 and 7 of a row explained: what each filter leaves out, and the numbers that decided."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastsample import reference as spec
from fastsample.explanation.result import Cut
from fastsample.explanation.why import why
from fastsample.params import GREEDY_BELOW, SamplingParams, specs
from fastsample.reference.filters import (
    SEQUENCES,
    Kept,
    Ranked,
    everything,
    is_kept,
    kept_mass,
    lowest_within,
    mean_logit,
    narrow_below,
    rank,
    top_p_target,
    xtc,
    xtc_floor,
)
from fastsample.reference.mass import spread, total_of
from fastsample.reference.process import Params

Tensor = torch.Tensor

_PARAMETER = {"typical": "typical_p", "epsilon": "epsilon_cutoff", "eta": "eta_cutoff"}
"""Filters of the reference whose parameter has another name."""


def values_of(params: Params) -> dict[str, Any]:
    """A row's parameters as Python values; floats are the shortest that are the same float32."""
    found: dict[str, Any] = {}
    for name, one in specs():
        value = params[name].item()
        if one.kind == "float":
            found[name] = float(str(np.float32(value)))
        else:
            found[name] = one.choices[int(value)] if one.choices else bool(value) if one.kind == "bool" else value
    return found


def ranked(x: Tensor, params: Params) -> Ranked:
    """A valid row [1, V] in rank order, as its filters judge it."""
    _, _, judged_at = spec.temperatures(params)
    return rank(x, spec.mass(x, judged_at), spec.depth(x, judged_at), judged_at)


def cuts(row: Ranked, params: Params) -> list[tuple[Cut, Tensor]]:
    """What each filter that is on leaves out, and what it keeps, bool [V] in rank order."""
    kept = everything(row)
    if bool(params["temperature"] < GREEDY_BELOW):
        first = kept._replace(low=torch.zeros_like(kept.low))
        return [_cut("temperature", kept, first, row, params)]
    neutral, own, vocab = SamplingParams(), values_of(params), row.x.shape[1]
    found = []
    for narrow in SEQUENCES[own["order"]]:
        name = _PARAMETER.get(narrow.__name__, narrow.__name__)
        before, kept = kept, narrow(kept, row, params)
        if own[name] != getattr(neutral, name) and (name != "top_k" or own[name] < vocab):
            found.append(_cut(name, before, kept, row, params))
    if own["xtc_probability"] > 0:
        rest = narrow_below(kept, xtc(kept, row, params))
        found.append(_cut("xtc_probability", kept, rest, row, params))
    return found


def _cut(name: str, before: Kept, after: Kept, row: Ranked, params: Params) -> tuple[Cut, Tensor]:
    was, now = is_kept(before, row)[0], is_kept(after, row)[0]
    total, mass = int(total_of(kept_mass(before, row))), int(total_of(kept_mass(after, row)))
    kept, value = int(now.sum()), values_of(params)[name]
    removed = int(was.sum()) - kept
    decided = limits(name, before, after, row, params)
    reason = why(name, value, removed, decided, total)
    return Cut(name, value, kept, removed, mass, total - mass, decided, reason), now


def limits(name: str, before: Kept, after: Kept, row: Ranked, params: Params) -> dict[str, float | int]:
    """The numbers that decided a cut; of a filter without a branch here, the mass that a token must have."""
    judged = kept_mass(before, row)
    if name in ("temperature", "top_k"):
        at = params["top_k"].to(torch.int64) - 1 if name == "top_k" else after.low
        return {"logit": float(row.x[0, int(at)])}
    if name == "top_n_sigma":
        sigma = float(spread(row.x, row.x[:, :1]))
        return {"sigma": sigma, "logit": float(lowest_within(row, params[name]))}
    if name in ("top_p", "typical_p"):
        mean = {"mean_logit": float(mean_logit(judged, row))} if name == "typical_p" else {}
        masses = {"target": top_p_target(params[name], total_of(judged)), "reached": total_of(kept_mass(after, row))}
        return {key: int(mass) for key, mass in masses.items()} | mean
    return {"floor": int(xtc_floor(before, row, params) if name == "xtc_probability" else after.floor)}
