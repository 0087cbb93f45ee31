"""The page of an explanation: one file of HTML with everything in it, which recomputes a row for other parameters."""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from typing import Any

import torch

from fastsample.explanation.result import Explanation, Record, Step, plain_of
from fastsample.params import SamplingParams, specs
from fastsample.reference.mass import depth_at, halves, mass_at, scale_of, steps_below
from fastsample.spec import Spec

Tensor = torch.Tensor

TEMPERATURES = tuple(round(0.05 * i, 2) for i in range(1, 41))
"""Those for which the page has the sums of the tokens that it does not know one by one, besides a row's own."""


def page(explanation: Explanation) -> str:
    """The text of the page."""
    parts = {name: _file(f"page.{name}") for name in ("html", "css", "js")}
    data = {
        "prompt": explanation.prompt,
        "parameters": {name: _parameter(name, one) for name, one in specs()},
        "steps": [_step(step) for step in explanation.steps],
    }
    # In a script, HTML ends at the first "</script" whatever it stands in.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    filled = {"/* css */": parts["css"], "/* law */": _file("law.js"), "/* page */": parts["js"], "/* data */": text}
    found: str = parts["html"]
    for place, part in filled.items():
        found = found.replace(place, part.strip())
    return found


def _parameter(name: str, one: Spec) -> dict[str, Any]:
    """What the page must know of a parameter: whether it is on, and whether the logits it reads have it already."""
    neutral = getattr(SamplingParams, name)
    return {
        "meaning": one.meaning,
        "choices": one.choices,
        "neutral": neutral,
        "edits": bool(one.counts or one.of_history),
    }


def _file(name: str) -> str:
    return (files("fastsample.explanation") / "web" / name).read_text(encoding="utf-8")


def _step(step: Step) -> dict[str, Any]:
    """A step as the page reads it; integers that JavaScript has no number for are strings."""
    plain: dict[str, Any] = plain_of(step)
    plain |= {"seed": str(step.seed), "offset": str(step.offset)}
    if step.draw is not None:
        plain["draw"] = {name: str(v) if type(v) is int else v for name, v in plain["draw"].items()}
    if step.record is not None:
        plain["record"] = _record(step.record, step)
    return plain


def _record(record: Record, step: Step) -> dict[str, Any]:
    size = len(record.ids)
    rest, peak = record.logits[size:], record.logits[:1]
    known = sorted({*map(_float32, TEMPERATURES), *([_float32(step.params["temperature"])] if step.draw else [])})
    listed: dict[str, Any] = {
        "count": len(rest),
        "temperatures": known,
        "spread": ["0", "0"],
        "sums": [],
        "surprise": [],
    }
    if len(rest):
        d = steps_below(rest, peak)
        listed |= {
            "first": float(rest[0]),
            "last": float(rest[-1]),
            "spread": [str(int(d.sum())), str(int((d * d).sum()))],
        }
        listed |= rest_sums(rest, peak, torch.tensor(known, dtype=torch.float32, device=rest.device))
    return {
        "ids": _base64(record.ids.to(torch.int32)),
        "logits": _base64(record.logits[:size]),
        "texts": record.texts,
        "rest": listed,
    }


def rest_sums(rest: Tensor, peak: Tensor, temperatures: Tensor) -> dict[str, Any]:
    """Z, EH, EL, HH, HL and LL of logits [n] at each temperature, and the sum of -w log w."""
    sums, surprise = [], []
    for temperature in temperatures:
        y = (rest - peak) * scale_of(temperature[None])
        w, e = mass_at(y), depth_at(y)
        h, low = halves(w)
        sums.append([str(int(part.sum())) for part in (w, h * e, low * e, h * h, h * low, low * low)])
        surprise.append(-float((w.double() * w.clamp(min=1).double().log()).sum()))
    return {"sums": sums, "surprise": surprise}


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _base64(values: Tensor) -> str:
    """The values' bytes, the lowest first."""
    array = values.cpu().contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()
