"""The parameter table: defaults, ranges, packing, and that every parameter has an effect, per row, on every engine."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import struct
from typing import Any

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample.backends.cpu import native
from fastsample.params import specs, write_columns
from fastsample.spec import Spec

BACKENDS = ("reference", "cpu")
NAMES = [name for name, _ in specs()]
NUMBERS = [(name, spec) for name, spec in specs() if spec.kind != "choice"]

IDS = {"prompt_ids": [[0, 1, 2, 3, 0]] * 3, "output_ids": [[1, 2, 3, 0, 1, 2]] * 3}

EXAMPLES = [pytest.param(name, value, id=f"{name}={value}") for name, spec in specs() for value in spec.examples]


def logits() -> torch.Tensor:
    return torch.tensor([[1.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.5, 0.0, 0.0, 0.0]]).repeat(3, 1)


def defaults() -> fs.SamplingParams:
    return fs.SamplingParams()


def test_the_table_is_the_signature() -> None:
    assert [f.name for f in dataclasses.fields(fs.SamplingParams)] == NAMES
    assert tuple(NAMES) == native().PARAM_FIELDS
    assert all(spec.examples for _, spec in specs()), "a new parameter needs a value that has an effect"


@pytest.mark.parametrize(("name", "spec"), specs())
def test_every_parameter_is_documented(name: str, spec: Spec) -> None:
    assert f"{name}: " in str(fs.SamplingParams.__doc__) or f"{name}, " in str(fs.SamplingParams.__doc__)
    assert spec.meaning
    assert spec.range


@pytest.mark.parametrize("backend", BACKENDS)
def test_defaults_are_neutral(backend: str) -> None:
    x = logits()
    assert torch.equal(fs.filter_logits(x, **IDS, backend=backend), x)
    for name in NAMES:
        assert torch.equal(fs.filter_logits(x, **{name: getattr(defaults(), name)}, **IDS, backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "value"), EXAMPLES)
def test_every_parameter_has_an_effect(name: str, value: Any, backend: str) -> None:
    beside = dict(specs())[name].beside
    beside = {other: held for other, held in beside.items() if other != name}

    def seen(**fields: Any) -> torch.Tensor:
        """What is kept, and what is drawn from, row by row."""
        calls = (fs.filter_logits, fs.probabilities)
        return torch.cat([call(logits(), **fields, **beside, **IDS, backend=backend) for call in calls], 1)

    plain, changed = seen(), seen(**{name: value})
    assert not torch.equal(plain, changed)
    # One value per row: each row as if it were alone, the others as if the parameter were not there.
    default = getattr(defaults(), name)
    mixed = seen(**{name: [default, value, default]})
    assert torch.equal(mixed, torch.stack([plain[0], changed[1], plain[2]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.66, {"top_k_first": 2, "min_p_first": 2, "joint": 3}),  # of .92, .84 and 1.00
        (0.40, {"top_k_first": 2, "min_p_first": 1, "joint": 2}),
    ],
)
def test_order_says_what_top_p_is_measured_over(top_p: float, kept: dict[str, int], backend: str) -> None:
    x = torch.tensor([0.34, 0.30, 0.20, 0.08, 0.08]).log()
    for order, count in kept.items():
        got = fs.filter_logits(x, top_k=4, top_p=top_p, min_p=0.5, order=order, backend=backend)
        assert got.isfinite().tolist() == [i < count for i in range(5)]


# Ranges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "spec"), NUMBERS)
def test_the_ends_of_the_range_belong_to_it(name: str, spec: Spec) -> None:
    for value in (spec.low, spec.high):
        if value == spec.low and spec.open_low:
            value = 1e-45  # the smallest float32 above 0
        if value == spec.high and spec.open_high:
            value = 1 - 2.0**-24
        value = value if spec.kind == "float" else int(value)
        params = fs.SamplingParams(**{name: value})
        assert getattr(params, name) == pytest.approx(value, rel=1e-6)
        assert fs.SamplingParams(**{name: [value, value]}).per_row() == {name: 2}
        kind = torch.float32 if spec.kind == "float" else torch.int64
        assert fs.SamplingParams(**{name: torch.tensor([value], dtype=kind)}).per_row() == {name: 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_below_1e_5_as_float32(backend: str) -> None:
    x = torch.tensor([1.0, 1.0 + 1e-6, 0.0])
    edge = float(np.float32(1e-5))
    below = float(np.nextafter(np.float32(1e-5), np.float32(0)))
    kept = {t: fs.filter_logits(x, temperature=t, backend=backend).isfinite().sum().item() for t in (edge, below, 0.0)}
    assert kept == {edge: 3, below: 1, 0.0: 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_takes_the_lowest_of_the_maxima(backend: str) -> None:
    for vocab in (2, 17, 300, 5000):
        for first in (0, vocab // 2, vocab - 1):
            x = torch.full((1, vocab), -1.0)
            x[0, first:] = 4.0
            out = fs.sample(x, temperature=0.0, num_samples=3, backend=backend)
            assert out.tokens.tolist() == [[first] * 3]
    zeros = torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]])
    assert fs.sample(zeros, temperature=0.0, backend=backend).tokens.tolist() == [1, 1]


# Values and packing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        [0.25, 0.5, 1.0],
        (0.25, 0.5, 1.0),
        np.array([0.25, 0.5, 1.0]),
        np.array([9, 0.25, 9, 0.5, 9, 1.0], np.float32)[1::2],
        torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64),
        torch.tensor([0.25, 0.5, 1.0], dtype=torch.bfloat16),
        [np.float32(0.25), np.float64(0.5), 1],
    ],
    ids=str,
)
def test_kinds_of_values(value: Any) -> None:
    want = fs.SamplingParams(top_p=torch.tensor([0.25, 0.5, 1.0]))
    assert torch.equal(fs.SamplingParams(top_p=value).pack(), want.pack())


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float16(0.5), np.array(0.5), torch.tensor(0.5)], ids=repr)
def test_kinds_of_scalars(value: Any) -> None:
    want = fs.SamplingParams(top_p=0.5).pack()
    assert torch.equal(fs.SamplingParams(top_p=value).pack().expand_as(want), want)
    x = logits()
    assert torch.equal(fs.filter_logits(x, top_p=value), fs.filter_logits(x, top_p=0.5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_kinds_of_integers(dtype: torch.dtype) -> None:
    want = fs.SamplingParams(top_k=[1, 0, 4]).pack()
    assert torch.equal(fs.SamplingParams(top_k=torch.tensor([1, 0, 4], dtype=dtype)).pack(), want)
    assert torch.equal(
        fs.SamplingParams(temperature=torch.tensor([2, 0, 4], dtype=dtype)).pack()[:, 0].view(torch.float32),
        torch.tensor([2.0, 0, 4]),
    )


@pytest.mark.parametrize(
    "value",
    [
        [True, False, True],
        [1, 0, 1],
        (np.True_, np.False_, np.int64(1)),
        np.array([True, False, True]),
        np.array([1, 0, 1], np.uint8),
        torch.tensor([True, False, True]),
        torch.tensor([1, 0, 1], dtype=torch.int8),
        torch.tensor([1, 0, 1], dtype=torch.uint64),
    ],
    ids=str,
)
def test_kinds_of_flags(value: Any) -> None:
    at = NAMES.index("p_less")
    assert fs.SamplingParams(p_less=value).pack()[:, at].tolist() == [1, 0, 1]
    for one in value:
        own = fs.SamplingParams(p_less=one)
        assert own.p_less is bool(one)
        assert own == fs.SamplingParams(p_less=bool(one))
    assert fs.SamplingParams(p_less=torch.tensor(True)) == fs.SamplingParams(p_less=True)


@pytest.mark.parametrize(
    ("value", "exception"),
    [
        (2, ValueError),
        (-1, ValueError),
        (0.5, TypeError),
        (1.0, TypeError),
        ("yes", TypeError),
        (None, TypeError),
        ([True, 2], ValueError),
        ([0, 0.5], TypeError),
        (torch.tensor([0, 3]), ValueError),
        (torch.tensor([0.0, 1.0]), TypeError),
        (np.array([0.0, 1.0]), TypeError),
    ],
    ids=str,
)
def test_no_flag(value: Any, exception: type[Exception]) -> None:
    with pytest.raises(exception, match=r"^p_less.*: expected True or False"):
        fs.SamplingParams(p_less=value)


@pytest.mark.parametrize("name", [name for name, spec in specs() if spec.open_high])
@pytest.mark.parametrize("value", [1, 1.0, 1 - 1e-9, [0.5, 1.0], torch.tensor([0.5, 1.0])], ids=str)
def test_an_end_that_is_excluded(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} = .*: expected a finite number, 0 <= value < 1; 0 is off"):
        fs.SamplingParams(**{name: value})


def test_top_k_saturates() -> None:
    top_k = NAMES.index("top_k")
    assert fs.SamplingParams(top_k=2**62).pack()[0, top_k] == 2**31 - 1
    assert fs.SamplingParams(top_k=torch.tensor([2**62])).pack()[0, top_k] == 2**31 - 1
    assert fs.SamplingParams(top_k=[2**80]).pack()[0, top_k] == 2**31 - 1


def test_values_are_rounded_to_float32() -> None:
    for value in (0.1, [0.1], torch.tensor([0.1], dtype=torch.float64)):
        bits = fs.SamplingParams(temperature=value).pack()[0, NAMES.index("temperature")]
        assert int(bits) == struct.unpack("i", struct.pack("f", 0.1))[0]


POSITIONAL = (0.5, 7, 0.25, 0.125, 2.0, -1.0, 3.0, "all", "joint")


def test_positional_arguments_keep_their_meaning() -> None:
    first = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    assert tuple(NAMES[: len(POSITIONAL)]) == (*first, "ties", "order")


def test_the_record_is_one_word_per_field() -> None:
    params = fs.SamplingParams(*POSITIONAL)
    words = params.pack()
    assert words.shape == (1, len(NAMES))
    assert words.dtype == torch.int32
    floats = words.view(torch.float32)[0]
    assert floats[[0, 2, 3, 4, 5, 6]].tolist() == [0.5, 0.25, 0.125, 2.0, -1.0, 3.0]
    assert words[0, [1, 7, 8]].tolist() == [7, 1, 2]
    mixed = params.replace(ties=["first", "all"], order=("min_p_first", "top_k_first"), top_k=[1, 2])
    assert mixed.per_row() == {"ties": 2, "order": 2, "top_k": 2}
    assert mixed.pack()[:, [1, 7, 8]].tolist() == [[1, 0, 1], [2, 1, 0]]
    assert mixed.pack().view(torch.float32)[1, [0, 2, 3, 4, 5, 6]].tolist() == [0.5, 0.25, 0.125, 2.0, -1.0, 3.0]


@pytest.mark.parametrize(("name", "spec"), specs())
def test_a_written_column_is_a_packed_one(name: str, spec: Spec) -> None:
    """`write_columns` is how the integrations fill records on a device."""
    values = [*spec.examples, getattr(defaults(), name)]
    codes = [spec.choices.index(v) for v in values] if spec.kind == "choice" else values
    records = defaults().pack().repeat(len(values), 1)
    untouched = "min_p" if name != "min_p" else "top_p"
    write_columns(records, {name: torch.tensor(codes), untouched: None})
    assert torch.equal(records, fs.SamplingParams(**{name: values}).pack())
    write_columns(records, {name: codes[0]})
    assert torch.equal(records, fs.SamplingParams(**{name: values[0]}).pack().expand_as(records))


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">u4", ">i8"])
def test_arrays_of_any_integers(dtype: str) -> None:
    values = np.array([1, 0, 4], dtype=dtype)
    fields = {"top_k": values, "temperature": values, "presence_penalty": values[::-1]}
    want = fs.SamplingParams(top_k=[1, 0, 4], temperature=[1.0, 0.0, 4.0], presence_penalty=[4.0, 0.0, 1.0])
    assert fs.SamplingParams(**fields) == want
    scalars = {name: array[0] for name, array in fields.items()}
    assert fs.SamplingParams(**scalars) == fs.SamplingParams(top_k=1, temperature=1.0, presence_penalty=4.0)
    assert fs.SamplingParams(top_k=values[1:2].reshape(())) == fs.SamplingParams()


def test_the_largest_unsigned_integers() -> None:
    for largest in (
        np.array([2**64 - 1], np.uint64),
        torch.tensor([2**64 - 1], dtype=torch.uint64),
        np.uint64(2**64 - 1),
    ):
        params = fs.SamplingParams(top_k=largest)
        assert params.pack()[0, NAMES.index("top_k")] == 2**31 - 1


# Equality -------------------------------------------------------------------------------------------------------------

SPELLINGS: list[list[dict[str, Any]]] = [
    [{}, {"temperature": 1}, {"top_p": np.float32(1.0), "order": "top_k_first"}, {"min_p": -0.0}],
    [
        {"top_p": 0.1},
        {"top_p": np.float32(0.1)},
        {"top_p": torch.tensor(0.1, dtype=torch.float64)},
        {"top_p": np.array(0.1)},
    ],
    [{"top_k": [3, 4]}, {"top_k": (3, 4)}, {"top_k": torch.tensor([3, 4])}, {"top_k": np.array([3, 4], np.uint16)}],
    [{"top_p": [0.1, 1.0]}, {"top_p": torch.tensor([0.1, 1.0], dtype=torch.float64)}],
    [{"ties": ["all", "all"]}, {"ties": np.array(["all", "all"])}, {"ties": ("all", "all")}],
    [{"ties": "all"}],
    [{"top_k": [3, 5]}],
    [{"top_k": [3]}],
    [{"top_k": 3}],
    [{"temperature": 0.1}],
]


def test_equal_values_are_equal_and_hash() -> None:
    made = [[fs.SamplingParams(**fields) for fields in group] for group in SPELLINGS]
    for i, group in enumerate(made):
        for j, others in enumerate(made):
            for one in group:
                for other in others:
                    assert (one == other) == (i == j), (one, other)
                    assert (one != other) == (i != j)
        assert len({hash(one) for one in group}) == 1
    assert len({one for group in made for one in group}) == len(SPELLINGS)
    assert fs.SamplingParams() != {"temperature": 1.0}


def test_a_used_copy_is_equal() -> None:
    params = fs.SamplingParams(top_k=3, presence_penalty=0.5)
    fs.sample(logits(), params, output_ids=[[1]] * 3)
    for twin in (copy.copy(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params)), params.replace()):
        assert twin == params
        assert hash(twin) == hash(params)
        assert torch.equal(twin.pack(), params.pack())


@pytest.mark.parametrize(
    ("name", "meant"),
    [("temprature", "temperature"), ("topk", "top_k"), ("Top_P", "top_p"), ("temp", "temperature"), ("minp", "min_p")],
)
def test_an_unknown_name_is_told_the_nearest(name: str, meant: str) -> None:
    words = rf"^{name} \(did you mean {meant}\?\): expected a field of SamplingParams: temperature, .*, {NAMES[-1]}$"
    for call in (
        lambda: fs.SamplingParams(**{name: 1}),
        lambda: fs.SamplingParams().replace(**{name: 1}),
        lambda: fs.sample(logits(), **{name: 1}),
        lambda: fs.sample(logits(), fs.SamplingParams(), **{name: 1}),
        lambda: fs.filter_logits(logits(), **{name: 1}),
        lambda: fs.probabilities(logits(), **{name: torch.ones(3)}),
        lambda: fs.Sampler(batch_size=3, **{name: 1}),
        lambda: fs.Sampler(batch_size=3).set_row(0, **{name: 1}),
    ):
        with pytest.raises(TypeError, match=words):
            call()
    with pytest.raises(TypeError, match=r"^sed \(did you mean seed\?\)"):
        fs.sample(logits(), sed=1)
    with pytest.raises(TypeError, match=r"^sed: expected"):
        fs.SamplingParams(sed=1)


def test_replace_validates_and_leaves_the_original() -> None:
    params = fs.SamplingParams(temperature=0.5, top_k=3)
    other = params.replace(top_k=4)
    assert (params.top_k, other.top_k, other.temperature) == (3, 4, 0.5)
    with pytest.raises(ValueError, match="top_p"):
        params.replace(top_p=0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 5  # type: ignore[misc]


def test_a_tensor_changed_later_changes_nothing() -> None:
    for value in (torch.tensor([0.5, 0.5, 0.5]), np.array([0.5, 0.5, 0.5], np.float32)):
        params = fs.SamplingParams(top_p=value)
        value[:] = -7.0
        assert params.pack().view(torch.float32)[:, NAMES.index("top_p")].tolist() == [0.5] * 3


def test_rows_that_disagree() -> None:
    with pytest.raises(ValueError, match=r"top_k.*2.*top_p.*3"):
        fs.SamplingParams(top_k=[1, 2], top_p=[0.5] * 3).pack()


def test_fields_override_params() -> None:
    x = logits()
    params = fs.SamplingParams(top_k=1, temperature=0.5)
    for call in (fs.filter_logits, fs.probabilities):
        assert torch.equal(call(x, params, top_k=2), call(x, top_k=2, temperature=0.5))
        assert torch.equal(call(x, params), call(x, top_k=1, temperature=0.5))
    assert params.top_k == 1
