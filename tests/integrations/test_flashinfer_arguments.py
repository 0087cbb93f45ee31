"""FlashInfer's functions: seeds, generators, dtypes, and what becomes of bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flashinfer_calls import CALLS, call, each_call, probs, rows

from fastsample import reference as spec
from fastsample.inputs import row_seeds
from fastsample.integrations import flashinfer as fi
from fastsample.integrations.flashinfer import arguments, pipeline

# Seeds ----------------------------------------------------------------------------------------------------------------


@each_call
def test_an_output_does_not_depend_on_its_slot(name: str) -> None:
    p = probs(1, 400, 7).expand(16, -1).contiguous()
    seeds = torch.arange(16) * 12345
    whole = call(name, p, seed=seeds, offset=torch.full((16,), 3))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(call(name, p, seed=seeds[order], offset=torch.full((16,), 3)), whole[order])
    alone = [call(name, p[:1], seed=seeds[i : i + 1], offset=torch.tensor([3])) for i in range(16)]
    assert torch.equal(torch.cat(alone), whole)
    assert torch.equal(call(name, p, seed=seeds.to(torch.uint64), offset=torch.tensor([3], dtype=torch.uint64)), whole)


@each_call
def test_seeds_and_offsets_matter(name: str) -> None:
    p = probs(1, 4000, 7, 1.0).expand(64, -1)
    base = call(name, p, seed=1, offset=0)
    assert torch.equal(base, call(name, p, seed=1))
    assert torch.equal(base, call(name, p, seed=torch.tensor([1])))  # one for all rows, like an int
    assert torch.equal(base, call(name, p, seed=row_seeds(1, 64)))
    distinct = len(set(base.tolist()))
    assert distinct > 3, "rows share their noise"
    assert not torch.equal(base, call(name, p, seed=2, offset=0))
    assert not torch.equal(base, call(name, p, seed=1, offset=1))
    assert not torch.equal(base, call(name, p, seed=1, offset=2**63 + 5))


@each_call
def test_generators(name: str) -> None:
    p = probs(32, 500, 8)
    g = torch.Generator().manual_seed(11)
    again = g.clone_state()
    first, second = call(name, p, generator=g), call(name, p, generator=g)
    assert not torch.equal(first, second)
    assert torch.equal(first, call(name, p, generator=again))
    torch.manual_seed(5)
    one, two = call(name, p), call(name, p)
    torch.manual_seed(5)
    assert torch.equal(one, call(name, p))
    assert not torch.equal(one, two)


def test_seeds_of_rows_on_tensors() -> None:
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 0x1234567890ABCDEF):
        assert torch.equal(arguments.row_seeds(torch.tensor([seed]), 70), row_seeds(seed % 2**64, 70))


def test_uniform60_is_the_references() -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (2, 9), generator=torch.Generator().manual_seed(2))
    for seeds, offsets, index in (
        (words[0], words[1], torch.zeros(1, dtype=torch.int64)),
        (words[0], words[1, :1], torch.tensor([3])),
        (words[0][:, None], words[1][:, None], torch.arange(5)),
    ):
        assert torch.equal(pipeline.uniform60(seeds, offsets, index), spec.uniform60(seeds, offsets, index))


# Outputs and errors ---------------------------------------------------------------------------------------------------


@each_call
def test_dtypes_and_shapes(name: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        p = probs(3, 50).to(dtype)
        assert call(name, p, seed=1).dtype == torch.int32
        assert call(name, p, seed=1).shape == (3,)
        for kind in (torch.int32, torch.int64):
            got = call(name, p, indices=torch.tensor([2, 2, 0, 1, 1], dtype=kind), seed=1)
            assert (got.dtype, got.shape) == (kind, (5,))
    assert call(name, probs(3, 50), indices=torch.empty(0, dtype=torch.int64)).shape == (0,)
    assert call(name, torch.empty(0, 50)).shape == (0,)
    wide = probs(3, 100)[:, ::2]
    assert torch.equal(call(name, wide, seed=1), call(name, wide.contiguous(), seed=1))


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("logits")])
def test_return_valid(name: str) -> None:
    p = probs(6, 60)
    clean = call(name, p, seed=4)
    broken = p.clone()
    broken[0] = torch.nan
    broken[2, 9] = torch.nan
    broken[3] = 0
    broken[4, 1] = torch.inf
    broken[5, 3] = -0.1
    samples, valid = call(name, broken, seed=4, return_valid=True)
    assert valid.dtype == torch.bool
    assert valid.tolist() == [False, True, False, False, False, False]
    assert torch.equal(samples, torch.where(valid, clean, 0))
    samples, valid = call(name, broken, seed=4, return_valid=True, indices=torch.tensor([1, 3, 1]))
    assert valid.tolist() == [True, False, True]
    assert samples[1] == 0
    assert call(name, p, seed=4, return_valid=True)[1].all()


@pytest.mark.parametrize(
    ("value", "words"),
    [(torch.nan, "a NaN"), (torch.inf, r"a \+inf"), (-0.5, "a negative value, -0.5"), (None, "nothing above 0")],
)
def test_bad_probabilities(value: float | None, words: str) -> None:
    p = probs(4, 30)
    if value is None:
        p[2] = 0
    else:
        p[2, 3] = value
    for name in CALLS:
        if not name.startswith("logits"):
            with pytest.raises(ValueError, match=f"^probs: row 2 has {words}$"):
                call(name, p)
            with pytest.raises(ValueError, match=f"^probs: row 2 has {words}$"):
                call(name, p, indices=torch.tensor([0, 2, 1]))
            call(name, p, indices=torch.tensor([0, 3, 1]))  # nobody needs the bad row
    for function, limit in ((fi.top_p_renorm_probs, 0.5), (fi.top_k_renorm_probs, 5)):
        with pytest.raises(ValueError, match=f"^probs: row 2 has {words}$"):
            function(p, limit)


@pytest.mark.parametrize(
    ("value", "words"), [(torch.nan, "a NaN"), (torch.inf, r"a \+inf"), (None, "nothing above -inf")]
)
def test_bad_logits(value: float | None, words: str) -> None:
    x = rows(4, 30)
    if value is None:
        x[2] = -torch.inf
    else:
        x[2, 3] = value
    for function in (
        fi.sampling_from_logits,
        fi.softmax,
        lambda x: fi.top_k_top_p_sampling_from_logits(x, 3, 0.5),
        lambda x: fi.sampling_from_logits(x, torch.tensor([1, 2])),
    ):
        with pytest.raises(ValueError, match=f"^logits: row 2 has {words}$"):
            function(x)


@each_call
def test_check_nan(name: str) -> None:
    p = probs(3, 20)
    call(name, p, check_nan=True)
    p[1, 1] = torch.nan
    more = {} if name.startswith("logits") else {"return_valid": True}
    with pytest.raises(ValueError, match=r"(probs|logits): row 1 has a NaN"):
        call(name, p, check_nan=True, indices=torch.tensor([0]), **more)


@pytest.mark.parametrize(
    ("limit", "value", "error", "words"),
    [
        ("top_k", 0, ValueError, "top_k = 0: expected 1 <= value"),
        ("top_k", 2.5, TypeError, "top_k = 2.5: expected a number"),
        ("top_k", True, TypeError, "top_k = True: expected a number"),
        ("top_k", torch.tensor([3, -1, 3]), ValueError, r"top_k = -1 \(row 1\): expected 1 <= value"),
        ("top_k", torch.tensor([1.0, 2, 3]), TypeError, "top_k: expected integers, got torch.float32"),
        ("top_p", 1.5, ValueError, "top_p = 1.5: expected 0 <= value <= 1"),
        ("top_p", float("nan"), ValueError, "top_p = nan"),
        ("top_p", "0.5", TypeError, "top_p = '0.5': expected a number"),
        ("top_p", torch.tensor([0.5, 0.5, torch.nan]), ValueError, r"top_p = nan \(row 2\)"),
        ("top_p", torch.tensor(0.5), ValueError, r"top_p: expected .* shape \[3\], got shape \(\)"),
        ("top_p", torch.rand(1), ValueError, r"shape \[3\], got shape \(1,\)"),
        ("top_p", torch.rand(3, 1), ValueError, r"shape \[3\], got shape \(3, 1\)"),
        ("min_p", -0.1, ValueError, r"min_p = -0.1: expected 0 <= value <= 1"),
        ("min_p", torch.rand(4), ValueError, r"min_p: expected .* shape \[3\], got shape \(4,\)"),
    ],
)
def test_bad_parameters(limit: str, value: Any, error: type[Exception], words: str) -> None:
    p = probs(3, 20)
    with pytest.raises(error, match=words):
        getattr(fi, f"{limit}_sampling_from_probs")(p, value)
    if limit != "min_p":
        with pytest.raises(error, match=words):
            getattr(fi, f"{limit}_renorm_probs")(p, value)
        both = {"top_k": 3, "top_p": 0.5} | {limit: value}
        for function in (fi.top_k_top_p_sampling_from_logits, fi.top_k_top_p_sampling_from_probs):
            with pytest.raises(error, match=words):
                function(p, **both)


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"seed": torch.tensor([1]), "offset": 3}, ValueError, "seed, offset: expected two integers or two tensors"),
        ({"seed": 1, "offset": torch.tensor([3])}, ValueError, "seed, offset: expected two integers or two tensors"),
        ({"seed": torch.tensor(1)}, ValueError, r"seed: expected shape \[1\] or \[3\] \(one per output\), got \(\)"),
        ({"seed": torch.arange(2)}, ValueError, r"seed: expected shape \[1\] or \[3\]"),
        ({"seed": torch.arange(3, dtype=torch.int32)}, ValueError, "seed: expected int64 or uint64, got torch.int32"),
        ({"seed": torch.arange(3), "offset": torch.arange(2)}, ValueError, r"offset: expected shape \[1\] or \[3\]"),
        ({"seed": torch.arange(3, device="meta")}, ValueError, "seed: expected a tensor on cpu, got one on meta"),
        ({"offset": 3}, ValueError, "offset: expected a seed with it"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"seed": 2**64}, ValueError, "seed = 18446744073709551616"),
        ({"indices": torch.tensor([0, 3])}, ValueError, r"indices\[1\] = 3: expected a row, 0 <= value < 3"),
        ({"indices": torch.tensor([-1])}, ValueError, r"indices\[0\] = -1"),
        ({"indices": torch.zeros(2)}, ValueError, "indices: expected an int32 or int64 tensor"),
        ({"indices": [0]}, ValueError, "indices: expected an int32 or int64 tensor"),
    ],
)
def test_bad_seeds_and_indices(more: dict[str, Any], error: type[Exception], words: str) -> None:
    for name in CALLS:
        with pytest.raises(error, match=words):
            call(name, probs(3, 20), **more)


@pytest.mark.parametrize(
    "bad", [torch.rand(5), torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), [[0.5, 0.5]]]
)
def test_bad_tables(bad: Any) -> None:
    for function in (fi.sampling_from_probs, fi.sampling_from_logits, fi.softmax):
        name = "probs" if function is fi.sampling_from_probs else "logits"
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            function(bad)
    with pytest.raises(ValueError, match=r"temperature = -1: expected a finite number, 0 <= value"):
        fi.softmax(torch.rand(2, 3), -1)
    with pytest.raises(ValueError, match=r"temperature = nan \(row 1\)"):
        fi.softmax(torch.rand(2, 3), torch.tensor([1, torch.nan]))
    with pytest.raises(ValueError, match=r"temperature: expected a number or floats, shape \[2\]"):
        fi.softmax(torch.rand(2, 3), torch.rand(3))


def test_parameters_that_cannot_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU tensor with a bad value does, which raising would mean waiting for: that row's outputs are invalid."""

    def unchecked(given: dict[str, Any], rows: int) -> tuple[arguments.Limit, ...]:
        good = {name: arguments._in_range(name, value) for name, value in given.items()}
        return tuple(arguments.Limit(n, torch.where(good[n], v, 1), ~good[n]) for n, v in given.items())

    monkeypatch.setattr(pipeline, "limits", unchecked)
    p, bad = probs(3, 40), torch.tensor([0.5, -1.0, 0.5])
    clean, seeds = torch.tensor([0.5, 1.0, 0.5]), torch.arange(3)
    samples, valid = fi.top_p_sampling_from_probs(p, bad, seed=seeds, return_valid=True)
    assert valid.tolist() == [True, False, True]
    assert torch.equal(samples[valid], fi.top_p_sampling_from_probs(p, clean, seed=seeds)[valid])
    assert fi.top_p_sampling_from_probs(p, bad, seed=seeds)[1] == -1
    assert fi.top_p_sampling_from_probs(p, bad, torch.tensor([1, 0, 1]), seed=seeds).tolist()[::2] == [-1, -1]
    assert fi.top_p_renorm_probs(p, bad)[1].tolist() == [0] * 40


@pytest.mark.parametrize("source", ["logits", "probs"])
def test_no_result_depends_on_top_k_max(source: str) -> None:
    function: Any = getattr(fi, f"top_k_top_p_sampling_from_{source}")
    x = rows(4, 500, 3) if source == "logits" else probs(4, 500, 3)
    given = x, torch.tensor([1, 20, 256, 500]), 0.9
    for bound in (1, 256, 10**12):
        assert torch.equal(function(*given, seed=5, top_k_max=bound), function(*given, seed=5))
    with pytest.raises(ValueError, match=r"top_k_max = 0: expected an integer >= 1, or None"):
        function(*given, top_k_max=0)
    for bad in (2.0, True, "2"):
        with pytest.raises(TypeError, match=r"top_k_max = .*: expected an integer"):
            function(*given, top_k_max=bad)
