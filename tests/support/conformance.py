"""What it means that two engines agree: equal to the bit, log-probabilities to 2 units in the last place."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from remembered import remembered

import fastsample as fs
from fastsample import rejection
from fastsample.backends import engine
from fastsample.inputs import Inputs, Rows, pack_offsets, pack_params, pack_seeds

LOGPROB_ULP = 2
MODES = ("raw", "processed")


def ask(case: Any, backend: str, brief: bool = False, top: int = 6) -> dict[str, torch.Tensor]:
    """Everything that an engine can be asked about a case (tests/support/cases.py), by name.

    Args:
        brief: one mode of log-probabilities will do, in which cases take turns: where calls are slow.
        top: how many of the most probable tokens to ask for.
    """
    with remembered() if backend == "reference" else nullcontext():
        return _ask(case, backend, brief, top)


def _ask(case: Any, backend: str, brief: bool, top: int) -> dict[str, torch.Tensor]:
    inputs = case.build()
    before = inputs.logits.clone()
    common = {**inputs.kwargs, "backend": backend, "on_invalid": "flag"}
    found = {
        "filter_logits": fs.filter_logits(inputs.logits, **common),
        "probabilities": fs.probabilities(inputs.logits, **common),
    }
    kept = dict(zip(MODES, forms_of_kept(case.vocab), strict=True))
    for mode in (MODES[case.vocab % 2 == 0],) if brief else MODES:
        more = {"num_samples": 3, "logprobs": mode, "top_logprobs": min(top, case.vocab)}
        more |= kept[mode]
        found |= named(fs.sample(inputs.logits, **common, **inputs.draw, **more), f"{mode}.")
    found |= named(fs.sample(inputs.logits, **common, **inputs.draw), "plain.")  # no log-probabilities: a shorter path
    found |= law(inputs.logits, backend, **inputs.kwargs, **inputs.draw)
    assert torch.equal(bits(inputs.logits), bits(before)), "the logits were written to"
    return found


def forms_of_kept(vocab: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What can be asked about what is kept: bits, and lists of any size or, for a third of all sizes, a limited one."""
    bits = {"kept": "bitmask", "kept_mass": True, "entropy": True}
    return bits, {"kept": "ids", "kept_capacity": 7 if vocab % 3 == 0 else 0}


def ask_kept(given: torch.Tensor, **call: Any) -> dict[str, torch.Tensor]:
    """What is kept and what it weighs."""
    forms = zip(("kept.", "listed."), forms_of_kept(given.shape[1]), strict=True)
    return {k: v for prefix, form in forms for k, v in named(fs.sample(given, **call, **form), prefix).items()}


def law(logits: torch.Tensor, backend: str, params: Any = None, seed: Any = 0, offset: Any = 0, **more: Any) -> Any:
    """What draw 0 of each row is from, with tokens that are given in some rows (fastsample/rejection.py)."""
    kind = more.pop("input", "logits")
    given = Inputs(**{name: more.pop(name) for name in Inputs._fields if name in more})
    rows = Rows(
        pack_params(params, more, len(logits)), pack_seeds(seed, len(logits)), pack_offsets(offset, len(logits))
    )
    given.attach(rows, logits)
    vocab = logits.shape[1]
    tokens = torch.tensor([-1, 0, vocab - 1, vocab, vocab // 2, -(2**40)])[torch.arange(len(logits)) % 6]
    masses = torch.full(logits.shape, 7)  # to be overwritten
    found = rejection.weigh(engine(backend), logits, rows, tokens, kind, masses)
    return {f"law.{name}": value for name, value in found._asdict().items()}


def named(out: fs.SampleOutput, prefix: str = "") -> dict[str, torch.Tensor]:
    """The outputs that were asked for."""
    values = {name: getattr(out, name) for name in fs.SampleOutput.__slots__}
    return {f"{prefix}{name}": value for name, value in values.items() if value is not None}


def assert_agree(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """AssertionError that tells which outputs differ, where, and by which bits."""
    wrong = disagreements(found, expected)
    assert not wrong, "\n".join(wrong)


def disagreements(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """A line for each output that differs. The outputs may be on any device."""
    assert found.keys() == expected.keys()
    lines = (_difference(name, found[name].cpu(), expected[name].cpu()) for name in expected)
    return [line for line in lines if line is not None]


def _difference(name: str, found: torch.Tensor, expected: torch.Tensor) -> str | None:
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        shapes = (f"{value.dtype} {list(value.shape)}" for value in (found, expected))
        return f"{name} is {' and not '.join(shapes)}"
    near = name.endswith(("logprobs", "log_kept_mass", "entropy"))
    differs = ulps_apart(found, expected) > LOGPROB_ULP if near else bits(found) != bits(expected)
    if not bool(differs.any()):
        return None
    at = tuple(differs.nonzero()[0].tolist())
    pair = " and not ".join(f"{value[at].item()!r} ({_hex(value[at])})" for value in (found, expected))
    where = ", ".join(f"{label} {i}" for label, i in zip(("row", "position"), at, strict=False))
    return f"{name} differs in {int(differs.sum())} of {differs.numel()}, first in {where}: {pair}"


def _hex(value: torch.Tensor) -> str:
    return hex(int(bits(value)) % 2 ** (8 * value.dtype.itemsize))


def bits(x: torch.Tensor) -> torch.Tensor:
    sizes = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
    return x.view(sizes.get(x.dtype, x.dtype))


def ulps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distances in units in the last place; a NaN is only near a NaN."""
    a, b = (torch.where(x.isnan(), torch.nan, x + 0.0) for x in (a, b))
    i, j = (torch.where(x < 0, -(2**31) - x, x) for x in (bits(a).long(), bits(b).long()))
    return (i - j).abs()


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance in units in the last place."""
    return int(ulps_apart(a, b).max()) if a.numel() else 0


def invalid_rows() -> torch.Tensor:
    """Rows with each status, NaN and infinities in first, middle and last place, alone and together."""
    x = torch.randn(16, 1030, generator=torch.Generator().manual_seed(1))
    nan, inf = torch.nan, torch.inf
    for row, (at, value) in enumerate([(0, nan), (513, nan), (1029, nan), (0, inf), (700, inf), (1029, inf)]):
        x[2 * row, at] = value
    x[12] = -inf
    x[13, 5], x[13, 900] = inf, nan
    x[14], x[14, 1029] = -inf, nan
    return x
