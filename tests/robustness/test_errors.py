"""Every way to be wrong: the exact exception, a message with argument, row and value, and nothing written."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from asked import BY_ROW, EVERYTHING, sentinels

import fastsample as fs
from fastsample.backends import engine
from fastsample.inputs import Inputs, pack_bias
from fastsample.params import specs
from fastsample.spec import Spec

B, V = 3, 50
BACKENDS = ("reference", "cpu")
NAN, INF = math.nan, math.inf


def logits(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (B, V), device: str = "cpu") -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape).to(device, dtype)


def fails(exception: type[Exception], says: tuple[str, ...], call: Callable[[], Any]) -> None:
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    for part in says:
        assert part in str(caught.value)


def untouched(out: fs.SampleOutput) -> bool:
    return all(bool((getattr(out, name) == -77).all()) for name in fs.SampleOutput.__slots__)


def check_all_calls(
    exception: type[Exception], says: tuple[str, ...], x: torch.Tensor, kwargs: dict[str, Any], backend: str = "auto"
) -> None:
    """sample, filter_logits, probabilities and Sampler refuse it alike and leave `out` and the offsets alone."""
    kwargs = {"backend": backend, **kwargs}
    out = sentinels((B,), V)
    own = {**EVERYTHING, "out": out, **kwargs}
    fails(exception, says, lambda: fs.sample(x, **own))
    assert untouched(out)

    step_names = set(Inputs._fields)
    step = {name: value for name, value in kwargs.items() if name in step_names}
    rest = {name: value for name, value in own.items() if name not in {*step_names, "out"}}
    made: list[fs.Sampler] = []

    def use_a_sampler() -> None:
        made.append(fs.Sampler(batch_size=B, **rest))
        made[0](x, **step, out=out)

    fails(exception, says, use_a_sampler)
    assert untouched(out)
    for sampler in made:
        assert sampler.offsets.tolist() == [0] * B

    if not {"seed", "offset", "num_samples", "logprobs", "top_logprobs"} & kwargs.keys():
        full = torch.full((B, V), -77.0)
        for call in (fs.filter_logits, fs.probabilities):
            fails(exception, says, lambda call=call: call(x, **kwargs, out=full))
            assert bool((full == -77).all())


# Logits ---------------------------------------------------------------------------------------------------------------

LOGITS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "list": ([[1.0, 2.0]], TypeError, ("logits", "a tensor or an array", "list")),
    "float64 of numpy": (np.zeros((B, V)), TypeError, ("logits", "float32", "torch.float64")),
    "none": (None, TypeError, ("logits", "NoneType")),
    "float64": (logits(torch.float64), TypeError, ("logits", "float32", "torch.float64")),
    "int64": (logits(torch.int64), TypeError, ("logits", "torch.int64")),
    "int8": (logits(torch.int8), TypeError, ("logits", "torch.int8")),
    "bool": (logits(torch.bool), TypeError, ("logits", "torch.bool")),
    "complex": (logits(torch.complex64), TypeError, ("logits", "torch.complex64")),
    "float8": (logits().to(torch.float8_e4m3fn), TypeError, ("logits", "torch.float8_e4m3fn")),
    "sparse": (logits().to_sparse(), ValueError, ("logits", "sparse")),
    "meta": (logits(device="meta"), ValueError, ("logits", "meta")),
    "0-D": (torch.tensor(1.0), ValueError, ("logits", "()")),
    "V = 0": (torch.zeros(B, 0), ValueError, ("logits", "V = 0")),
    "V > 2^20": (torch.zeros(1).expand(B, 2**20 + 1).contiguous(), ValueError, ("logits", "V = 1048577")),
    "transposed": (logits(shape=(V, B)).t(), ValueError, ("logits", "contiguous", "stride 3")),
    "every other": (logits(shape=(B, 2 * V))[:, ::2], ValueError, ("logits", "contiguous", "stride 2")),
    "broadcast": (logits(shape=(B, 1)).expand(B, V), ValueError, ("logits", "contiguous", "stride 0")),
}


@pytest.mark.parametrize(("x", "exception", "says"), LOGITS.values(), ids=LOGITS)
def test_logits(x: Any, exception: type[Exception], says: tuple[str, ...]) -> None:
    check_all_calls(exception, says, x, {})


def with_value(at: dict[tuple[int, int], float]) -> torch.Tensor:
    x = logits()
    for (row, column), value in at.items():
        x[row, column] = value
    return x


INVALID: dict[str, tuple[torch.Tensor, dict[str, Any], tuple[str, ...]]] = {
    "nan": (with_value({(1, 7): NAN}), {}, ("logits", "row 1", "NaN")),
    "nan, last": (with_value({(2, V - 1): NAN}), {}, ("logits", "row 2", "NaN")),
    "inf": (with_value({(0, 0): INF}), {}, ("logits", "row 0", "+inf")),
    "nan and inf": (with_value({(1, 0): INF, (1, 1): NAN}), {}, ("logits", "row 1", "NaN")),
    "two rows": (with_value({(0, 5): NAN, (2, 5): INF}), {}, ("row 0 has a NaN", "row 2 has a +inf")),
    "-inf": (torch.full((B, V), -INF), {}, ("logits", "row 0", "row 1", "row 2", "-inf")),
    "greedy nan": (with_value({(1, 7): NAN}), {"temperature": 0.0}, ("row 1", "NaN")),
    "greedy -inf": (torch.full((B, V), -INF), {"temperature": 0.0}, ("row 0", "-inf")),
    "masked": (logits(), {"bitmask": torch.tensor([[-1, -1], [0, 0], [1, 0]]).int()}, ("row 1", "mask")),
    "mask past V": (logits(), {"bitmask": torch.tensor([[-1, -1], [0, -1 << 18], [1, 0]]).int()}, ("row 1", "mask")),
    "no words": (logits(), {"bitmask": torch.zeros(B, 0, dtype=torch.int32)}, ("row 0", "row 1", "row 2")),
    "biased away": (logits(), {"bias": [None, dict.fromkeys(range(V), -INF), {}]}, ("row 1", "-inf")),
    "bias overflow": (with_value({(2, 3): 3e38}), {"bias": {3: 3e38}}, ("row 2", "+inf")),
    "inf - inf": (with_value({(2, 3): INF}), {"bias": {3: -INF}}, ("row 2", "NaN")),
    "penalty": (
        with_value({(2, 3): 9.0}),
        {"repetition_penalty": 1e-38, "output_ids": [[], [], [3]]},
        ("row 2", "+inf"),
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("x", "kwargs", "says"), INVALID.values(), ids=INVALID)
def test_invalid_rows_raise(x: torch.Tensor, kwargs: dict[str, Any], says: tuple[str, ...], backend: str) -> None:
    check_all_calls(ValueError, ("on_invalid='flag'", *says), x, kwargs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_invalid_rows_are_counted(backend: str) -> None:
    fails(ValueError, ("row 3", "3 more rows"), lambda: fs.sample(torch.full((7, 9), NAN), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0}, {"top_k": 4, "top_p": 0.9, "min_p": 0.01}], ids=str)
def test_flagged_rows_leave_the_others_alone(fields: dict[str, float], backend: str) -> None:
    x = torch.randn(7, V, generator=torch.Generator().manual_seed(3))
    broken = x.clone()
    broken[1, 3], broken[3, 0], broken[5] = NAN, INF, -INF
    broken[3, 1], broken[1, 4] = -INF, INF
    good = [0, 2, 4, 6]
    kwargs = {**fields, "backend": backend, "on_invalid": "flag"}
    more = {"seed": 11, "num_samples": 3, **EVERYTHING}
    clean, out = fs.sample(x, **kwargs, **more), fs.sample(broken, **kwargs, **more)
    assert out.status.tolist() == [0, 1, 0, 2, 0, 3, 0]
    assert bool((out.tokens[1::2] == -1).all())
    assert bool(out.logprobs[1::2].isnan().all())
    assert bool((out.ranks[1::2] == 0).all())
    assert bool((out.top_ids[1::2] == -1).all())
    for name in BY_ROW:
        assert torch.equal(getattr(out, name)[good], getattr(clean, name)[good]), name
    listed, wanted = (o.kept_ids[: o.kept_row_ptr[-1]].split(o.kept_row_ptr.diff().tolist()) for o in (out, clean))
    assert [listed[row].tolist() for row in range(7)] == [wanted[row].tolist() * (row in good) for row in range(7)]
    for call, nothing in ((fs.filter_logits, -INF), (fs.probabilities, 0.0)):
        assert torch.equal(call(broken, **kwargs)[good], call(x, **kwargs)[good])
        assert bool((call(broken, **kwargs)[1::2] == nothing).all())


# Parameters: generated from the table ---------------------------------------------------------------------------------


def neighbour(value: float, towards: float) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float(np.nextafter(np.float32(value), np.float32(towards)))


def bad_numbers(spec: Spec) -> list[Any]:
    """Values out of range, nearest first."""
    if spec.kind == "int":
        return [int(spec.low) - 1, -(2**60)]
    if spec.kind == "bool":
        return [2, -1]
    below = [spec.low if spec.open_low else neighbour(spec.low, -INF)]
    above = [spec.high if spec.open_high else neighbour(spec.high, INF)]
    return [NAN, INF, -INF, 1e39, -1e39, -0.1 if spec.low == 0 else -INF, *below, *above]


BYTES = (bytes, bytearray, memoryview)
"""Sequences of small integers, which are never meant as such."""


def identity(shown: str) -> str:
    """A test's id: short, on one line, and the same in every process (an address is not)."""
    return re.sub(r" at 0x[0-9a-f]+", "", shown).replace("\n", "")[:60]


def bad_parameters() -> list[Any]:
    cases = []
    for name, spec in specs():
        default = getattr(fs.SamplingParams(), name)
        wrong_type = [None, object(), 1j, b"1"]
        wrong_type += [True, False, np.True_] if spec.kind != "bool" else [0.5, 1.0, NAN, "yes"]
        if spec.kind == "choice":
            wrong_value, wrong_type = ["nonsense", ""], [*wrong_type, 0, 1.0]
        else:
            wrong_value, wrong_type = bad_numbers(spec), [*wrong_type, "1"]
        if spec.kind in ("int", "bool"):
            wrong_type += [1.0, NAN, np.float32(1)]
        for exception, values in ((ValueError, wrong_value), (TypeError, wrong_type)):
            for value in values:
                cases.append((name, value, exception, (f" = {value!r}: expected",)))
                cases.append((name, [default, value, default], exception, ("row 1", repr(value))))
        cases.append((name, [default, default], ValueError, ("one per row", "got 2")))
        cases.append((name, [default] * 4, ValueError, ("one per row", "got 4")))
        cases.append((name, [], ValueError, ("one per row", "got 0")))
        cases.append((name, {"a": default}, TypeError, ()))
        cases.append((name, {default}, TypeError, ()))
        cases += [(name, text(b"abc"), TypeError, ("abc" if text is not memoryview else "memory",)) for text in BYTES]
        cases.append((name, [[default]] * 3, TypeError, ("row 0",)))
        if spec.kind != "bool":
            cases.append((name, torch.zeros(B, dtype=torch.bool), TypeError, ("torch.bool",)))
        cases.append((name, torch.zeros(B, dtype=torch.complex64), TypeError, ("torch.complex64",)))
        cases.append((name, np.array(["a"] * B), ValueError if spec.kind == "choice" else TypeError, ()))
        cases.append((name, np.array([None] * B), TypeError, ()))
        if spec.kind != "choice":
            kind = torch.float32 if spec.kind == "float" else torch.int64
            cases.append((name, torch.full((B, 1), default, dtype=kind), ValueError, ("1-D", "(3, 1)")))
            cases.append((name, torch.full((B,), default, dtype=kind, device="meta"), ValueError, ("meta",)))
            for value in bad_numbers(spec):
                cases.append((name, torch.tensor([default, default, value], dtype=kind), ValueError, ("row 2",)))
        if spec.kind in ("int", "bool"):
            cases.append((name, torch.tensor([1.0] * B), TypeError, ("torch.float32",)))
    return [pytest.param(*case, id=identity(f"{case[0]}={case[1]!r}")) for case in cases]


def names_the_parameter(says: tuple[str, ...]) -> bool:
    """A wrong number of rows is reported for the parameters as a whole, which is when the rows are known."""
    return "one per row" not in says


@pytest.mark.parametrize(("name", "value", "exception", "says"), bad_parameters())
def test_parameters(name: str, value: Any, exception: type[Exception], says: tuple[str, ...]) -> None:
    says = (name, *says) if names_the_parameter(says) else says
    check_all_calls(exception, says, logits(), {name: value})
    if names_the_parameter(says):
        fails(exception, says, lambda: fs.SamplingParams(**{name: value}))


def test_a_python_int_too_large_for_a_float_is_out_of_range() -> None:
    for name, spec in specs():
        if spec.kind == "float":
            good = spec.examples[0]
            fails(ValueError, (name, "row 1"), lambda name=name, v=good: fs.SamplingParams(**{name: [v, 10**400]}))
            fails(ValueError, (name,), lambda name=name: fs.SamplingParams(**{name: -(10**400)}))


# Everything else ------------------------------------------------------------------------------------------------------

INT32 = torch.zeros(B, 2, dtype=torch.int32)
IDS = torch.zeros(B, 4, dtype=torch.int64)


def ragged_bias(row_ptr: Any, ids: Any, values: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(row_ptr), torch.tensor(ids), torch.tensor(values)


def wide_bias(row_ptr: Any, ids: Any, values: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(row_ptr), torch.tensor(ids), torch.tensor(values, dtype=torch.float64)


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"params": {"top_k": 3}}, TypeError, ("params", "SamplingParams", "dict")),
    ({"params": 3}, TypeError, ("params", "int")),
    ({"temprature": 1.0}, TypeError, ("temprature (did you mean temperature?)", "top_k", "order")),
    ({"topk": 1}, TypeError, ("topk (did you mean top_k?)",)),
    ({"temp": 1}, TypeError, ("temp (did you mean temperature?)",)),
    ({"seeds": [1]}, TypeError, ("seeds (did you mean seed?)",)),
    ({"xyz": 1}, TypeError, ("xyz: expected a field of SamplingParams: temperature",)),
    ({"top_k": -1}, ValueError, ("top_k = -1: expected an integer, 0 <= value; 0 is off",)),
    ({"top_k": [1, -1, 1]}, ValueError, ("top_k = -1 (row 1): expected an integer, 0 <= value; 0 is off",)),
    ({"top_k": np.array([1, -1, 1])}, ValueError, ("top_k = -1 (row 1)", "0 is off")),
    ({"top_k": torch.tensor([1, -1, 1])}, ValueError, ("top_k = -1 (row 1)", "0 is off")),
    ({"top_p": 0}, ValueError, ("top_p = 0: ", "1 is off")),
    ({"temperature": [1.0] * 3, "top_p": [0.5] * 2}, ValueError, ("temperature", "top_p", "3", "2")),
    # seed and offset
    *[
        case
        for name in ("seed", "offset")
        for case in [
            ({name: 2**64}, ValueError, (name, str(2**64))),
            ({name: -(2**63) - 1}, ValueError, (name, str(-(2**63) - 1))),
            ({name: [1, 2**64, 3]}, ValueError, (name, "row 1", str(2**64))),
            ({name: [1, 2]}, ValueError, (f"{name}: expected one int or 3 {name}s (one per row), got 2",)),
            ({name: []}, ValueError, (f"{name}: expected one int or 3 {name}s (one per row), got 0",)),
            ({name: torch.arange(4)}, ValueError, (f"{name}: expected one int or 3 {name}s (one per row), got 4",)),
            *[({name: text(b"abc")}, TypeError, (f"{name}: expected an integer",)) for text in BYTES],
            ({name: torch.zeros(B, 1, dtype=torch.int64)}, ValueError, (name, "(3, 1)")),
            ({name: torch.zeros(B, dtype=torch.int64, device="meta")}, ValueError, (name, "meta")),
            ({name: 1.0}, TypeError, (name, "1.0")),
            ({name: NAN}, TypeError, (name, "nan")),
            ({name: "1"}, TypeError, (name, "'1'")),
            ({name: True}, TypeError, (name, "True")),
            ({name: [1, True, 3]}, TypeError, (name, "row 1", "True")),
            ({name: [1, 2, 1.5]}, TypeError, (name, "row 2", "1.5")),
            ({name: torch.zeros(B)}, TypeError, (name, "torch.float32")),
            ({name: torch.zeros(B, dtype=torch.bool)}, TypeError, (name, "torch.bool")),
            ({name: torch.tensor(1.5)}, TypeError, (name,)),
            ({name: torch.tensor(True)}, TypeError, (name,)),
            ({name: np.zeros(B)}, TypeError, (name, "float64")),
            ({name: np.array(["a"] * B)}, TypeError, (name,)),
        ]
    ],
    ({"offset": None}, TypeError, ("offset", "None")),
    ({"offset": -1}, ValueError, ("offset = -1: expected an integer, 0 <= value < 2^64",)),
    ({"offset": np.int64(-1)}, ValueError, ("offset = -1: expected",)),
    ({"offset": [0, -1, 0]}, ValueError, ("offset = -1 (row 1)",)),
    ({"offset": np.array([0, 0, -2])}, ValueError, ("offset = -2 (row 2)",)),
    ({"offset": np.array(-1)}, ValueError, ("offset = -1: expected",)),
    ({"offset": torch.tensor([0, -3, 0], dtype=torch.int32)}, ValueError, ("offset = -3 (row 1)",)),
    # num_samples, logprobs, top_logprobs
    ({"num_samples": 0}, ValueError, ("num_samples", "0")),
    ({"num_samples": -3}, ValueError, ("num_samples", "-3")),
    ({"num_samples": 2**31}, ValueError, ("num_samples", str(2**31))),
    ({"num_samples": 2.0}, TypeError, ("num_samples", "2.0")),
    ({"num_samples": True}, TypeError, ("num_samples", "True")),
    ({"num_samples": None}, TypeError, ("num_samples", "None")),
    ({"logprobs": "all", "top_logprobs": 0}, ValueError, ("logprobs", "'all'", "raw", "processed")),
    ({"logprobs": True, "top_logprobs": 0}, ValueError, ("logprobs", "True")),
    ({"logprobs": None, "top_logprobs": 1}, ValueError, ("top_logprobs", "1", "logprobs=")),
    ({"top_logprobs": -1}, ValueError, ("top_logprobs", "-1")),
    ({"top_logprobs": V + 1}, ValueError, ("top_logprobs", "51", "V = 50")),
    ({"top_logprobs": 1.0}, TypeError, ("top_logprobs", "1.0")),
    ({"on_invalid": "ignore"}, ValueError, ("on_invalid", "'ignore'", "raise", "flag")),
    ({"on_invalid": None}, ValueError, ("on_invalid", "None")),
    # backend
    ({"backend": "cpp"}, ValueError, ("backend", "'cpp'", "reference", "cpu")),
    ({"backend": ""}, ValueError, ("backend", "''")),
    ({"backend": None}, ValueError, ("backend", "None")),
    # flags and ends that are excluded
    ({"p_less": 2}, ValueError, ("p_less = 2: expected True or False",)),
    ({"p_less": [True, 2, False]}, ValueError, ("p_less = 2 (row 1): expected True or False",)),
    ({"p_less": torch.tensor([0, 1, 2])}, ValueError, ("p_less = 2 (row 2): expected True or False",)),
    ({"p_less": np.ones(B)}, TypeError, ("p_less: expected True or False per row", "float")),
    ({"p_less": "yes"}, TypeError, ("p_less = 'yes': expected True or False",)),
    ({"epsilon_cutoff": 1}, ValueError, ("epsilon_cutoff = 1: expected a finite number, 0 <= value < 1; 0 is off",)),
    ({"eta_cutoff": [0.5, 1.0, 0.5]}, ValueError, ("eta_cutoff = 1.0 (row 1)", "value < 1")),
    ({"epsilon_cutoff": 1 - 1e-9}, ValueError, ("epsilon_cutoff = 0.999999999", "value < 1")),  # 1 as a float32
    # bitmask
    ({"bitmask": [[1]]}, TypeError, ("bitmask", "a tensor or an array", "list")),
    ({"bitmask": INT32.long()}, TypeError, ("bitmask", "int32", "torch.int64")),
    ({"bitmask": INT32.bool()}, TypeError, ("bitmask", "int32", "torch.bool")),
    ({"bitmask": INT32.float()}, TypeError, ("bitmask", "int32", "torch.float32")),
    ({"bitmask": INT32[:2]}, ValueError, ("bitmask", "[3, words]", "(2, 2)")),
    ({"bitmask": INT32[None]}, ValueError, ("bitmask", "(1, 3, 2)")),
    ({"bitmask": torch.tensor(1, dtype=torch.int32)}, ValueError, ("bitmask", "()")),
    ({"bitmask": INT32.to("meta")}, ValueError, ("bitmask", "cpu", "meta")),
    # bias
    ({"bias": {V: 1.0}}, ValueError, ("bias", "id 50", "row 0", "id < 50")),
    ({"bias": {-1: 1.0}}, ValueError, ("bias", "id -1", "row 0")),
    ({"bias": [None, None, {2**40: 1.0}]}, ValueError, ("bias", f"id {2**40}", "row 2")),
    ({"bias": [None, {}, {2**64: 1.0}]}, ValueError, ("bias", str(2**64), "row 2")),
    ({"bias": {3: NAN}}, ValueError, ("bias", "id 3", "row 0", "nan")),
    ({"bias": [None, {4: INF}, None]}, ValueError, ("bias", "id 4", "row 1", "inf")),
    ({"bias": {5: 1e39}}, ValueError, ("bias of id 5 (row 0)", "got 1e+39")),
    ({"bias": [None, {5: -1e39}, None]}, ValueError, ("bias of id 5 (row 1)", "got -1e+39")),
    ({"bias": {5: np.float64(1e39)}}, ValueError, ("bias of id 5 (row 0)", "got 1e+39")),
    ({"bias": {5: 10**400}}, ValueError, ("bias of id 5 (row 0)", "got 1000")),
    ({"bias": b"abc"}, TypeError, ("bias", "bytes")),
    ({"bias": {5: "1"}}, TypeError, ("bias", "id 5", "row 0", "'1'")),
    ({"bias": [None, {5: None}, None]}, TypeError, ("bias", "id 5", "row 1", "None")),
    ({"bias": {5: True}}, TypeError, ("bias", "id 5", "True")),
    ({"bias": {"5": 1.0}}, TypeError, ("bias", "row 0", "'5'")),
    ({"bias": {1.0: 1.0}}, TypeError, ("bias", "row 0", "1.0")),
    ({"bias": {True: 1.0}}, TypeError, ("bias", "row 0", "True")),
    ({"bias": [{}, {}]}, ValueError, ("bias", "(3)", "got 2")),
    ({"bias": [{}, 1.0, {}]}, TypeError, ("bias", "row 1", "float")),
    ({"bias": 1.0}, TypeError, ("bias", "float")),
    ({"bias": "abc"}, TypeError, ("bias", "str")),
    ({"bias": torch.zeros(B, V)}, TypeError, ("bias", "Tensor")),
    ({"bias": pack_bias({3: 1.0}, logits()[:2])}, ValueError, ("bias", "2 rows", f"have {B}")),
    ({"bias": pack_bias({3: 1.0}, logits()[:, :9])}, ValueError, ("bias", "V = 9", f"and {V}")),
    ({"bias": pack_bias({3: 1.0}, logits())._replace(ids=torch.full((B,), V))}, ValueError, ("bias", f"id {V}")),
    ({"bias": ragged_bias([0, 2, 2, 2], [3, 3], [1.0, 2.0])}, ValueError, ("bias", "id 3", "row 0", "once")),
    ({"bias": ragged_bias([0, 0, 3, 3], [3, 1, 3], [1.0, 2.0, 1.0])}, ValueError, ("bias", "id 3", "row 1", "once")),
    ({"bias": ragged_bias([0, 0, 1, 2], [3, V], [1.0, 2.0])}, ValueError, ("bias", "id 50", "row 2")),
    ({"bias": ragged_bias([0, 0, 1, 2], [3, 4], [1.0, NAN])}, ValueError, ("bias", "id 4", "row 2", "nan")),
    ({"bias": wide_bias([0, 1, 1, 2], [7, 9], [1.0, -1e39])}, ValueError, ("bias of id 9 (row 2)", "got -1e+39")),
    ({"bias": ragged_bias([0, 1], [3], [1.0])}, ValueError, ("bias", "row_ptr", "[0, 1]")),
    ({"bias": ragged_bias([0, 1, 0, 1], [3], [1.0])}, ValueError, ("bias", "row_ptr", "[0, 1, 0, 1]")),
    ({"bias": ragged_bias([1, 1, 1, 1], [3], [1.0])}, ValueError, ("bias", "row_ptr", "[1, 1, 1, 1]")),
    ({"bias": ragged_bias([0, 1, 1, 2], [3], [1.0])}, ValueError, ("bias", "row_ptr", "[0, 1, 1, 2]")),
    ({"bias": ragged_bias([0, 1, 1, 1], [3], [1.0, 2.0])}, ValueError, ("bias", "1 ids", "2 values")),
    ({"bias": ragged_bias([0, 1, 1, 1], [3.0], [1.0])}, TypeError, ("bias ids", "torch.float32")),
    ({"bias": ragged_bias([0, 1, 1, 1], [3], [1])}, TypeError, ("bias values", "torch.int64")),
    ({"bias": ragged_bias([0.0] * 4, [3], [1.0])}, TypeError, ("bias row_ptr", "torch.float32")),
    ({"bias": ragged_bias([0, 1, 1, 1], [[3]], [1.0])}, ValueError, ("bias ids", "(1, 1)")),
    ({"bias": (torch.zeros(4).long(), [1], [1.0])}, TypeError, ("bias ids", "list")),
    ({"bias": (torch.zeros(4).long(), torch.zeros(0).long())}, ValueError, ("bias", "2 parts")),
    # prompt_ids and output_ids
    *[
        case
        for name in ("prompt_ids", "output_ids")
        for case in [
            ({name: IDS.float()}, TypeError, (name, "torch.float32")),
            ({name: IDS.bool()}, TypeError, (name, "torch.bool")),
            ({name: IDS[:2]}, ValueError, (name, "[3, L]", "(2, 4)")),
            ({name: IDS[0]}, ValueError, (name, "[3, L]", "(4,)")),
            ({name: IDS[None]}, ValueError, (name, "(1, 3, 4)")),
            ({name: IDS.to("meta")}, ValueError, (name, "cpu", "meta")),
            ({name: [[1], [2]]}, ValueError, (name, "(3)", "got 2")),
            ({name: [1, 2, 3]}, TypeError, (name, "row 0", "1")),
            ({name: [[1], [2], [3, 1.5]]}, TypeError, (name, "row 2", "1.5")),
            ({name: [[1], [True], [3]]}, TypeError, (name, "row 1", "True")),
            ({name: [[1], ["2"], [3]]}, TypeError, (name, "row 1", "'2'")),
            ({name: [[1], "2", [3]]}, TypeError, (name, "row 1", "'2'")),
            ({name: [[1], [2], [2**63]]}, ValueError, (name, "row 2", str(2**63))),
            ({name: [[1], [2], [np.True_]]}, TypeError, (f"{name} id (row 2)", "True")),
            ({name: [[1], [2**40, True], [3]]}, TypeError, (f"{name} id (row 1)", "True")),
            ({name: [[1], [2], [-(2**63) - 1]]}, ValueError, (f"{name} id (row 2)", str(-(2**63) - 1))),
            ({name: [[1], torch.tensor([2.0]), [3]]}, TypeError, (f"{name} (row 1)", "torch.float32")),
            ({name: [[1], torch.tensor([True]), [3]]}, TypeError, (f"{name} (row 1)", "torch.bool")),
            ({name: [[1], np.array([2.0]), [3]]}, TypeError, (f"{name} (row 1)", "float64")),
            ({name: [[1], IDS[:1], [3]]}, ValueError, (f"{name} (row 1)", "(1, 4)")),
            ({name: [[1], IDS[0].to("meta"), [3]]}, ValueError, (f"{name} (row 1)", "meta")),
            ({name: [[1], {2}, [3]]}, TypeError, (f"{name} (row 1)", "{2}")),
            ({name: [[1], b"ab", [3]]}, TypeError, (f"{name} (row 1)", "b'ab'")),
            ({name: [None, None]}, ValueError, (name, "(3)", "got 2")),
            ({name: IDS.numpy().astype(float)}, TypeError, (name, "float64")),
            ({name: IDS.numpy().astype(bool)}, TypeError, (name, "bool")),
            ({name: IDS[:2].numpy()}, ValueError, (name, "[3, L]", "(2, 4)")),
            *[({name: text(b"abc")}, TypeError, (name, text.__name__)) for text in BYTES],
            ({name: "abc"}, TypeError, (name, "str")),
            ({name: 3}, TypeError, (name, "int")),
            ({name: {1: 2}}, TypeError, (name, "dict")),
        ]
    ],
    # dry_breakers
    ({"dry_breakers": IDS.float()}, TypeError, ("dry_breakers", "torch.float32")),
    ({"dry_breakers": IDS[0].float()}, TypeError, ("dry_breakers", "torch.float32")),
    ({"dry_breakers": IDS[0].bool()}, TypeError, ("dry_breakers", "torch.bool")),
    ({"dry_breakers": IDS[:2]}, ValueError, ("dry_breakers: expected ids [L] for all rows or [3, L]", "(2, 4)")),
    ({"dry_breakers": IDS[:1]}, ValueError, ("dry_breakers: expected ids [L] for all rows or [3, L]", "(1, 4)")),
    ({"dry_breakers": IDS[None]}, ValueError, ("dry_breakers: expected ids [L]", "(1, 3, 4)")),
    ({"dry_breakers": torch.tensor(3)}, ValueError, ("dry_breakers: expected ids [L]", "()")),
    ({"dry_breakers": IDS.to("meta")}, ValueError, ("dry_breakers", "cpu", "meta")),
    ({"dry_breakers": IDS[0].to("meta")}, ValueError, ("dry_breakers", "cpu", "meta")),
    ({"dry_breakers": IDS[0].numpy().astype(float)}, TypeError, ("dry_breakers", "float64")),
    ({"dry_breakers": [[1], [2]]}, ValueError, ("dry_breakers", "(3)", "got 2")),
    ({"dry_breakers": [[1], None, [3, 1.5]]}, TypeError, ("dry_breakers id (row 2)", "1.5")),
    ({"dry_breakers": [[1], IDS[:1], [3]]}, ValueError, ("dry_breakers (row 1)", "(1, 4)")),
    ({"dry_breakers": [1, 1.5]}, TypeError, ("dry_breakers id: expected an integer", "1.5")),
    ({"dry_breakers": [1, True]}, TypeError, ("dry_breakers id: expected an integer", "True")),
    ({"dry_breakers": ["\n", ":"]}, TypeError, ("dry_breakers id: expected an integer", r"'\n'")),
    ({"dry_breakers": [1, 2**63]}, ValueError, ("dry_breakers id", str(2**63))),
    ({"dry_breakers": 3}, TypeError, ("dry_breakers: expected ids for all rows", "int")),
    ({"dry_breakers": {1, 2}}, TypeError, ("dry_breakers: expected ids for all rows", "set")),
    ({"dry_breakers": "abc"}, TypeError, ("dry_breakers", "str")),
    *[({"dry_breakers": text(b"abc")}, TypeError, ("dry_breakers", text.__name__)) for text in BYTES],
    # allowed_ids
    ({"allowed_ids": 3}, TypeError, ("allowed_ids", "int")),
    ({"allowed_ids": "abc"}, TypeError, ("allowed_ids", "str")),
    ({"allowed_ids": b"abc"}, TypeError, ("allowed_ids", "bytes")),
    ({"allowed_ids": [1, V]}, ValueError, (f"allowed_ids: id {V}: expected 0 <= id < {V}",)),
    ({"allowed_ids": [-1]}, ValueError, ("allowed_ids: id -1",)),
    ({"allowed_ids": torch.tensor([1, -1])}, ValueError, ("allowed_ids: id -1",)),
    ({"allowed_ids": [[1], [2, 2**40], None]}, ValueError, (f"allowed_ids: id {2**40} (row 1)",)),
    ({"allowed_ids": torch.tensor([[1, -1], [2, -1], [V, -1]])}, ValueError, (f"allowed_ids: id {V} (row 2)",)),
    ({"allowed_ids": [1, 2.5]}, TypeError, ("allowed_ids id", "2.5")),
    ({"allowed_ids": [1, True]}, TypeError, ("allowed_ids id", "True")),
    ({"allowed_ids": [[1], [2], 3]}, TypeError, ("allowed_ids (row 2)", "3")),
    ({"allowed_ids": [[1], [2]]}, ValueError, ("allowed_ids", "3 rows", "got 2")),
    ({"allowed_ids": torch.ones(V)}, TypeError, ("allowed_ids", "torch.float32")),
    ({"allowed_ids": torch.ones(B, 2)}, TypeError, ("allowed_ids", "torch.float32")),
    ({"allowed_ids": torch.ones(V - 1, dtype=torch.bool)}, ValueError, ("allowed_ids", "[50]", "(49,)")),
    ({"allowed_ids": torch.ones(2, V, dtype=torch.bool)}, ValueError, ("allowed_ids", "3 rows", "got 2")),
    ({"allowed_ids": [None, torch.ones(4, dtype=torch.bool), None]}, ValueError, ("allowed_ids (row 1)", "(4,)")),
    ({"allowed_ids": torch.ones(1, 1, 1, dtype=torch.bool)}, ValueError, ("allowed_ids", "(1, 1, 1)")),
    ({"allowed_ids": torch.ones(V, dtype=torch.bool, device="meta")}, ValueError, ("allowed_ids", "cpu", "meta")),
]


@pytest.mark.parametrize(
    ("kwargs", "exception", "says"),
    [pytest.param(*case, id=identity(str(case[0]))) for case in ARGUMENTS],
)
def test_arguments(kwargs: dict[str, Any], exception: type[Exception], says: tuple[str, ...]) -> None:
    check_all_calls(exception, says, logits(), kwargs)


# Buffers --------------------------------------------------------------------------------------------------------------


def replaced(**fields: Any) -> fs.SampleOutput:
    return dataclasses.replace(sentinels((B,), V), **fields)


OUT: list[tuple[Any, type[Exception], tuple[str, ...]]] = [
    (torch.zeros(B), TypeError, ("out", "SampleOutput", "Tensor")),
    (replaced(tokens=[0] * B), TypeError, ("out.tokens", "list")),
    (replaced(tokens=torch.full((B,), -77, dtype=torch.int32)), ValueError, ("out.tokens", "torch.int32")),
    (replaced(tokens=torch.full((B + 1,), -77)), ValueError, ("out.tokens", "[3]", "[4]")),
    (replaced(tokens=torch.full((B, 1), -77)), ValueError, ("out.tokens", "[3]", "[3, 1]")),
    (replaced(tokens=torch.full((2 * B,), -77)[::2]), ValueError, ("out.tokens", "contiguous")),
    (replaced(status=torch.full((B,), -77)), ValueError, ("out.status", "torch.int64")),
    (replaced(logprobs=torch.full((B,), -77.0).double()), ValueError, ("out.logprobs", "torch.float64")),
    (replaced(ranks=torch.full((B,), -77.0)), ValueError, ("out.ranks", "torch.float32")),
    (replaced(top_ids=torch.full((B, 3), -77)), ValueError, ("out.top_ids", "[3, 2]", "[3, 3]")),
    (replaced(top_logprobs=torch.full((B,), -77.0)), ValueError, ("out.top_logprobs", "[3, 2]", "[3]")),
    (replaced(kept_count=torch.full((B,), -77)), ValueError, ("out.kept_count", "torch.int64")),
    (replaced(kept_ids=torch.full((B * 5,), -77, dtype=torch.int32)), ValueError, ("out.kept_ids", "[18]", "[15]")),
    (replaced(kept_row_ptr=torch.full((B,), -77)), ValueError, ("out.kept_row_ptr", "[4]", "[3]")),
    (replaced(kept_bitmask=torch.full((B,), -77, dtype=torch.int32)), ValueError, ("out.kept_bitmask", "[3, 2]")),
    (replaced(entropy=torch.full((B,), -77.0).half()), ValueError, ("out.entropy", "torch.float16")),
]


@pytest.mark.parametrize(("out", "exception", "says"), OUT)
@pytest.mark.parametrize("on_invalid", ["raise", "flag"])
def test_out(out: Any, exception: type[Exception], says: tuple[str, ...], on_invalid: str) -> None:
    kwargs = {**EVERYTHING, "out": out, "on_invalid": on_invalid}
    fails(exception, says, lambda: fs.sample(logits(), seed=1, **kwargs))
    buffers = [out] if isinstance(out, torch.Tensor) else [getattr(out, n) for n in fs.SampleOutput.__slots__]
    assert all(bool((torch.as_tensor(b) <= 0).all()) for b in buffers)


@pytest.mark.parametrize("name", fs.SampleOutput.__slots__)
def test_out_lacks_what_is_asked_for(name: str) -> None:
    out = replaced(**{name: None})
    kwargs = {**EVERYTHING, "out": out}
    fails(TypeError, (f"out.{name}", "NoneType"), lambda: fs.sample(logits(), seed=1, **kwargs))


@pytest.mark.parametrize("call", [fs.filter_logits, fs.probabilities])
def test_full_out(call: Callable[..., torch.Tensor]) -> None:
    for out, exception, says in [
        ([0.0], TypeError, ("out", "list")),
        (torch.zeros(B, V + 1), ValueError, ("out", "[3, 50]", "[3, 51]")),
        (torch.zeros(B, V, dtype=torch.float16), ValueError, ("out", "torch.float16")),
        (torch.zeros(B, 2 * V)[:, ::2], ValueError, ("out", "contiguous")),
        (torch.zeros(B, V, device="meta"), ValueError, ("out", "meta")),
    ]:
        fails(exception, says, lambda out=out: call(logits(), out=out))


# Engines, Sampler and threads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_named_engine_is_never_replaced(backend: str) -> None:
    reason = engine(backend).why_not(logits())
    assert reason is not None
    for call in (fs.sample, fs.filter_logits, fs.probabilities):
        fails(RuntimeError, (backend, reason), lambda call=call: call(logits(), backend=backend))


def test_the_environment_names_an_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSAMPLE_BACKEND", "cpp")
    fails(ValueError, ("'cpp'", "reference"), lambda: fs.sample(logits()))
    assert fs.sample(logits(), backend="reference").status.tolist() == [0] * B


@pytest.mark.parametrize(
    ("kwargs", "exception", "says"),
    [
        ({"batch_size": 0}, ValueError, ("batch_size", "0")),
        ({"batch_size": -1}, ValueError, ("batch_size", "-1")),
        ({"batch_size": 1.0}, TypeError, ("batch_size", "1.0")),
        ({"batch_size": True}, TypeError, ("batch_size", "True")),
        ({"batch_size": 2, "temperature": [1.0] * 3}, ValueError, ("temperature", "or 2 values (one per row", "got 3")),
        ({"batch_size": 2, "tempreature": 1.0}, TypeError, ("tempreature (did you mean temperature?)",)),
        ({"batch_size": 2, "seed": [1] * 3}, ValueError, ("seed", "2")),
        ({"batch_size": 2, "offset": [1] * 3}, ValueError, ("offset", "2")),
    ],
    ids=str,
)
def test_sampler(kwargs: dict[str, Any], exception: type[Exception], says: tuple[str, ...]) -> None:
    fails(exception, says, lambda: fs.Sampler(**kwargs))


def test_sampler_of_other_rows() -> None:
    sampler = fs.Sampler(batch_size=2, seed=1)
    fails(ValueError, ("logits", "[2, V]", "(2, 1, 50)"), lambda: sampler(logits()[:2, None]))
    fails(ValueError, ("logits", "[2, V]", "(1, 2, 50)"), lambda: sampler(logits()[None, :2]))
    fails(ValueError, ("logits", "2 rows", "got 3"), lambda: sampler(logits()))
    fails(ValueError, ("logits", "2 rows", "got 1"), lambda: sampler(logits()[0]))
    assert sampler.offsets.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("row", "kwargs", "exception", "says"),
    [
        (3, {}, ValueError, ("row", "3")),
        (-1, {}, ValueError, ("row", "-1")),
        (1.0, {}, TypeError, ("row", "1.0")),
        (True, {}, TypeError, ("row", "True")),
        (1, {"temperature": NAN}, ValueError, ("temperature", "nan")),
        (1, {"top_k": [1, 2]}, ValueError, ("top_k", "got 2")),
        (1, {"params": 3}, TypeError, ("params", "int")),
        (1, {"seed": 2**64}, ValueError, ("seed", str(2**64))),
        (1, {"seed": 1.5}, TypeError, ("seed", "1.5")),
        (1, {"seed": True}, TypeError, ("seed", "True")),
        (1, {"offset": -(2**64)}, ValueError, ("offset", str(-(2**64)))),
        (1, {"offset": "1"}, TypeError, ("offset", "'1'")),
    ],
    ids=str,
)
def test_set_row(row: Any, kwargs: dict[str, Any], exception: type[Exception], says: tuple[str, ...]) -> None:
    spoiled, other = (fs.Sampler(batch_size=B, seed=5, offset=9, temperature=2.0) for _ in range(2))
    fails(exception, says, lambda: spoiled.set_row(row, **{"temperature": 0.0, **kwargs}))
    if not {"temperature", "top_k", "params", "offset"} & kwargs.keys():
        fails(exception, says, lambda: spoiled.reset_row(row, **kwargs))
    assert spoiled.offsets.tolist() == [9] * B
    x = torch.zeros(B, V)
    for _ in range(5):
        assert torch.equal(spoiled(x).tokens, other(x).tokens)


@pytest.mark.parametrize(("n", "exception"), [(0, ValueError), (-2, ValueError), (1.0, TypeError), (True, TypeError)])
def test_set_num_threads(n: Any, exception: type[Exception]) -> None:
    fails(exception, (f"n = {n!r}",), lambda: fs.set_num_threads(n))
    assert fs.get_num_threads() == 2


# What looks wrong and is defined ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_short_mask_allows_nothing_past_its_end(backend: str) -> None:
    kept = fs.filter_logits(logits(), bitmask=torch.full((B, 1), -1, dtype=torch.int32), backend=backend).isfinite()
    assert kept.tolist() == [[i < 32 for i in range(V)]] * B


@pytest.mark.parametrize("backend", BACKENDS)
def test_words_and_bits_past_the_vocabulary_are_ignored(backend: str) -> None:
    mask = torch.tensor([[0b1010, 1 << 17, -1, -1]] * B, dtype=torch.int32)
    kept = fs.filter_logits(logits(), bitmask=mask, backend=backend).isfinite()
    assert kept.tolist() == [[i in (1, 3, 49) for i in range(V)]] * B


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_outside_the_vocabulary_are_padding(backend: str) -> None:
    x = logits()
    fields = {"repetition_penalty": 2.0, "frequency_penalty": 1.0, "presence_penalty": 1.0, "backend": backend}
    stray = [-1, V, V + 1, 2**31, 2**40, -(2**63), 2**63 - 1, -V]
    assert torch.equal(fs.filter_logits(x, **fields, prompt_ids=[stray] * B, output_ids=[stray] * B), x)
    got = fs.filter_logits(x, **fields, prompt_ids=[[*stray, 8]] * B, output_ids=[[7, *stray, 7]] * B)
    want = x.clone()
    want[:, 8] /= 2
    want[:, 7] = want[:, 7] / 2 - 2 - 1
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fields", [{"top_k": 2**31 - 1}, {"top_k": 2**80}, {"top_k": V}, {"top_p": 1 + 1e-9}], ids=str)
def test_values_that_round_into_the_range_are_off(fields: dict[str, Any], backend: str) -> None:
    assert torch.equal(fs.filter_logits(logits(), **fields, backend=backend), logits())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_extras_change_nothing(backend: str) -> None:
    x = logits()
    for kwargs in (
        {"bias": {}},
        {"bias": [None] * B},
        {"bias": (torch.zeros(B + 1).long(), torch.zeros(0).long(), torch.zeros(0))},
        {"output_ids": [[]] * B, "frequency_penalty": 2.0},
        {"prompt_ids": torch.zeros(B, 0, dtype=torch.int64), "repetition_penalty": 2.0},
        {"repetition_penalty": 2.0, "presence_penalty": 1.0, "output_ids": [None] * B},
        {"repetition_penalty": 2.0, "prompt_ids": [None, [], torch.zeros(0, dtype=torch.int64)]},
    ):
        assert torch.equal(fs.filter_logits(x, **kwargs, backend=backend), x)
