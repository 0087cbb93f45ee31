"""The table of outputs: names, shapes, dtypes and what invalid rows hold, as every engine fills them."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
import torch
from asked import KEPT, LISTS

import fastsample as fs
from fastsample.backends import Outputs
from fastsample.outputs import FIELD, FIELDS, SAMPLED, Field, LogprobsMode, Options, wanted

VOCAB = 40
OPTIONS = [
    Options(samples, mode, top, "flag")
    for samples in (1, 3)
    for mode in (None, *get_args(LogprobsMode))
    for top in ((0, 5) if mode else (0,))
]
OPTIONS += [Options(1, "raw", 2, "flag", **KEPT), Options(3, on_invalid="flag", kept="bitmask", entropy=True)]
OPTIONS += [Options(on_invalid="flag", kept="count"), Options(on_invalid="flag", kept_mass=True)]


def test_names() -> None:
    """A field of an output is a field of the engines' view of it."""
    assert {field.name for field in FIELDS} <= {field.name for field in dataclasses.fields(Outputs)}
    assert tuple(field.name for field in SAMPLED) == tuple(field.name for field in dataclasses.fields(fs.SampleOutput))
    assert set(FIELD) == {field.name for field in SAMPLED} | {"filtered", "probabilities", "weights", "masses"}


def invalid(field: Field, values: torch.Tensor) -> bool:
    assert field.invalid is not None
    return bool((values.isnan() if field.invalid != field.invalid else values == field.invalid).all())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_sampled(batch: tuple[int, ...], options: Options, variant: str) -> None:
    named: dict[str, Any] = {**options._asdict(), "backend": variant}
    out = fs.sample(torch.full((*batch, VOCAB), torch.nan), **named)
    assert wanted(options) == tuple(field.name for field in SAMPLED if field.wanted(options))
    for field in SAMPLED:
        value = getattr(out, field.name)
        assert (value is not None) == field.wanted(options)
        if value is not None:
            assert (value.shape, value.dtype) == (field.shape(batch, options, VOCAB), field.dtype)
            if field.name in LISTS:
                assert value.unique().tolist() == [-1 if field.name == "kept_ids" else 0]
            else:
                assert field.name == "status" or invalid(field, value)


@pytest.mark.parametrize(("name", "call"), [("filtered", fs.filter_logits), ("probabilities", fs.probabilities)])
def test_whole_rows(name: str, call: Any, variant: str) -> None:
    field = FIELD[name]
    for batch in ((), (2,), (2, 3)):
        value = call(torch.full((*batch, VOCAB), torch.nan), on_invalid="flag", backend=variant)
        assert (value.shape, value.dtype) == (field.shape(batch, Options(), VOCAB), field.dtype)
        assert invalid(field, value)
