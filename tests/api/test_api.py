"""The calls around the engines: shapes, seeds, draws, buffers, Sampler, choice of engine."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asked import BY_ROW, EVERYTHING, LISTS

import fastsample as fs
from fastsample.inputs import pack_bias, splitmix64

BACKENDS = ("reference", "cpu")
FIELDS = fs.SampleOutput.__slots__


def logits(rows: int = 4, vocab: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def same(a: fs.SampleOutput, b: fs.SampleOutput) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in FIELDS]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


# Shapes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("batch", [(), (1,), (4,), (0,)])
def test_shapes_and_dtypes(batch: tuple[int, ...], n: int, backend: str) -> None:
    x = torch.zeros(*batch, 9)
    out = fs.sample(x, num_samples=n, **EVERYTHING, seed=1, backend=backend)
    draws, rows = batch if n == 1 else (*batch, n), batch[0] if batch else 1
    shapes = {"tokens": draws, "status": batch, "logprobs": draws, "ranks": draws}
    shapes |= {"top_ids": (*batch, 2), "top_logprobs": (*batch, 2)}
    shapes |= {"kept_count": batch, "kept_bitmask": (*batch, 1), "log_kept_mass": batch, "entropy": batch}
    shapes |= {"kept_ids": (rows * EVERYTHING["kept_capacity"],), "kept_row_ptr": (rows + 1,)}
    kinds = dict.fromkeys(("tokens", "ranks", "top_ids", "kept_row_ptr"), torch.int64)
    kinds |= dict.fromkeys(("status", "kept_count", "kept_ids", "kept_bitmask"), torch.int32)
    for name in FIELDS:
        assert getattr(out, name).shape == shapes[name], name
        assert getattr(out, name).dtype == kinds.get(name, torch.float32), name
    for call in (fs.filter_logits, fs.probabilities):
        full = call(x.half(), backend=backend)
        assert (full.shape, full.dtype) == (x.shape, torch.float32)


def test_what_was_not_asked_for_is_none() -> None:
    out = fs.sample(logits())
    assert [name for name in FIELDS if getattr(out, name) is not None] == ["tokens", "status"]
    out = fs.sample(logits(), logprobs="processed")
    assert [name for name in FIELDS if getattr(out, name) is not None] == ["tokens", "status", "logprobs", "ranks"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_dimension_is_one_row(backend: str) -> None:
    x = logits(1)
    kwargs = {
        "top_k": 20,
        "bias": {3: 1.0},
        "prompt_ids": [1, 2],
        "output_ids": torch.tensor([5, 5]),
        "presence_penalty": 1.0,
        "bitmask": torch.full((7,), -2, dtype=torch.int32),
        "backend": backend,
    }
    more = {"seed": 3, "num_samples": 6, **EVERYTHING}
    flat, table = fs.sample(x[0], **kwargs, **more), fs.sample(x, **kwargs, **more)
    for name in BY_ROW:
        assert torch.equal(getattr(flat, name), getattr(table, name)[0]), name
    for name in LISTS:
        assert torch.equal(getattr(flat, name), getattr(table, name)), name
    for call in (fs.filter_logits, fs.probabilities):
        assert torch.equal(call(x[0], **kwargs), call(x, **kwargs)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_stay_out_of_it(backend: str) -> None:
    x = logits().requires_grad_()
    out = fs.sample(x, seed=1, logprobs="raw", backend=backend)
    results = [out.logprobs, fs.filter_logits(x, backend=backend), fs.probabilities(x, backend=backend)]
    assert not any(r.requires_grad for r in results)
    assert torch.equal(out.tokens, fs.sample(x.detach(), seed=1).tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_params_may_be_shared_by_any_number_of_rows(backend: str) -> None:
    params = fs.SamplingParams(temperature=0.7, top_k=[5])
    for rows in (1, 3):
        x = logits(rows)
        want = fs.filter_logits(x, temperature=0.7, top_k=5, backend=backend)
        assert torch.equal(fs.filter_logits(x, params, backend=backend), want)


# Seeds, offsets and draws ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63, 2**64 - 2, -1, np.int64(7), torch.tensor(9)], ids=str)
def test_a_scalar_seed_gives_every_row_its_own(seed: Any, backend: str) -> None:
    x = torch.zeros(6, 10_000)
    rows = np.array([splitmix64(splitmix64(int(seed)) + row) for row in range(6)], dtype=np.uint64)
    got = fs.sample(x, seed=seed, backend=backend).tokens
    assert torch.equal(got, fs.sample(x, seed=rows, backend=backend).tokens)
    assert got.unique().numel() == 6
    again = fs.sample(x[:2], seed=seed, backend=backend).tokens
    assert torch.equal(again, got[:2])


@pytest.mark.parametrize(
    "seeds",
    [
        [5, -1, 2**63],
        torch.tensor([5, -1, -(2**63)]),
        torch.tensor([5, 2**64 - 1, 2**63], dtype=torch.uint64),
        np.array([5, 2**64 - 1, 2**63], np.uint64),
        [5, 2**64 - 1, 2**63],
        np.array([5, -1, -(2**63)]),
        torch.tensor([5, 0, -1, 0, -(2**63), 0])[::2],
    ],
    ids=str,
)
def test_kinds_of_seeds_and_offsets(seeds: Any) -> None:
    x = torch.zeros(3, 100_000)
    want = [int(fs.sample(x[0], seed=[s]).tokens) for s in (5, 2**64 - 1, 2**63)]
    assert fs.sample(x, seed=seeds).tokens.tolist() == want
    if isinstance(seeds, torch.Tensor) or min(seeds) >= 0:  # int64 tensors hold bits, numbers below 0 are no position
        want = [int(fs.sample(x[0], seed=[1], offset=s).tokens) for s in (5, 2**64 - 1, 2**63)]
        assert fs.sample(x, seed=[1] * 3, offset=seeds).tokens.tolist() == want
        assert len(set(want)) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_bit_of_seed_and_offset_counts(backend: str) -> None:
    x = torch.zeros(1, 2**20).expand(128, 2**20) if backend == "cpu" else torch.zeros(1, 2**13).expand(128, 2**13)
    bits = [1 << i for i in range(64)]
    tokens = fs.sample(x, seed=[0] * 128, offset=bits + [0] * 64, backend=backend).tokens
    assert tokens[:64].unique().numel() > 62
    tokens = fs.sample(x, seed=bits + [0] * 64, backend=backend).tokens
    assert tokens[:64].unique().numel() > 62
    assert tokens[64:].unique().numel() == 1


def test_without_a_seed_torch_decides() -> None:
    x = torch.zeros(2, 100_000)
    torch.manual_seed(1)
    first = [fs.sample(x).tokens.tolist() for _ in range(3)]
    torch.manual_seed(1)
    second = [fs.sample(x).tokens.tolist() for _ in range(3)]
    assert first == second
    assert len({token for step in first for token in step}) == 6
    sampler = fs.Sampler(batch_size=2)
    assert sampler(x).tokens.tolist() not in first


def test_a_given_seed_leaves_torch_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fs.sample(logits(), seed=3)
    fs.filter_logits(logits())
    fs.Sampler(batch_size=4, seed=1)(logits())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_do_not_depend_on_their_number(backend: str) -> None:
    x = logits()
    many = fs.sample(x, seed=9, num_samples=40, logprobs="raw", backend=backend)
    few = fs.sample(x, seed=9, num_samples=3, logprobs="raw", backend=backend)
    one = fs.sample(x, seed=9, logprobs="raw", backend=backend)
    for name in ("tokens", "logprobs", "ranks"):
        assert torch.equal(getattr(many, name)[:, :3], getattr(few, name))
        assert torch.equal(getattr(many, name)[:, 0], getattr(one, name))
    assert many.tokens[0].unique().numel() > 10


# Buffers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on_invalid", ["raise", "flag"])
@pytest.mark.parametrize("batch", [(), (4,)])
def test_out_is_filled_and_returned(batch: tuple[int, ...], on_invalid: str, backend: str) -> None:
    x = logits()[: batch[0]] if batch else logits()[0]
    kwargs = {"on_invalid": on_invalid, "backend": backend}
    more = {"num_samples": 3, **EVERYTHING}
    out = fs.sample(x, seed=0, **kwargs, **more)
    addresses = [getattr(out, name).data_ptr() for name in FIELDS]
    fresh = fs.sample(x, seed=1, **kwargs, **more)
    assert not same(out, fresh)
    assert fs.sample(x, seed=1, **kwargs, **more, out=out) is out
    assert same(out, fresh)
    assert [getattr(out, name).data_ptr() for name in FIELDS] == addresses
    for call in (fs.filter_logits, fs.probabilities):
        buffer = torch.full_like(x, -77)
        assert call(x, top_k=3, **kwargs, out=buffer) is buffer
        assert torch.equal(buffer, call(x, top_k=3, **kwargs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_keeps_what_it_holds_where_a_row_is_invalid(backend: str) -> None:
    more = {"num_samples": 3, **EVERYTHING, "backend": backend}
    sampler, other = (fs.Sampler(batch_size=4, seed=5, **more) for _ in range(2))
    out = sampler(logits()[:4])
    before = copy.deepcopy(out)
    bad = logits()[:4].clone()
    bad[2, 1] = torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="row 2"):
            sampler(bad, out=out)
        assert same(out, before)
    assert sampler.offsets.tolist() == [1] * 4
    other(logits()[:4])
    assert same(sampler(logits()[:4], out=out), other(logits()[:4]))


@pytest.mark.parametrize("on_invalid", ["raise", "flag"])
def test_what_was_not_asked_for_is_not_written(on_invalid: str) -> None:
    out = fs.sample(logits(), seed=0, **EVERYTHING)
    before = copy.deepcopy(out)
    fs.sample(logits(), seed=1, top_k=3, out=out, on_invalid=on_invalid)
    assert torch.equal(out.tokens, fs.sample(logits(), seed=1, top_k=3).tokens)
    for name in FIELDS[2:]:
        assert torch.equal(getattr(out, name), getattr(before, name))
    # Nor looked at: these are no buffers for any engine.
    odd = fs.SampleOutput(out.tokens, out.status, logprobs=torch.zeros(1), ranks=torch.zeros(4), top_ids=out.status)
    fs.sample(logits(), seed=2, out=odd, on_invalid=on_invalid)
    assert torch.equal(odd.tokens, fs.sample(logits(), seed=2).tokens)
    assert (odd.logprobs.tolist(), odd.ranks.tolist(), odd.top_ids.tolist()) == ([0.0], [0.0] * 4, [0] * 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_packed_once(backend: str) -> None:
    bias = [{3: 2.0}, None, {5: -1.0, 199: 4.0}, {}]
    packed = pack_bias(bias, logits())
    assert pack_bias(packed, logits()).ids.tolist() == [3, 5, 199]
    sampler = fs.Sampler(batch_size=4, seed=3, backend=backend)
    for step in range(4):
        want = fs.filter_logits(logits(seed=step), bias=bias, backend=backend)
        assert torch.equal(fs.filter_logits(logits(seed=step), bias=packed, backend=backend), want)
        tokens = fs.sample(logits(seed=step), seed=3, offset=step, bias=bias, backend=backend).tokens
        assert torch.equal(sampler(logits(seed=step), bias=packed).tokens, tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_that_was_passed_in_is_written(backend: str) -> None:
    x, mask = logits(), torch.full((4, 7), -4, dtype=torch.int32)
    bias = (torch.tensor([0, 1, 2, 2, 2]), torch.tensor([5, 6]), torch.tensor([1.0, -2.0]))
    prompt, output = torch.tensor([[1, 2, -1]] * 4), torch.tensor([[3, 3]] * 4)
    seeds, offsets, temperature = torch.arange(4), torch.arange(4), torch.full((4,), 0.5)
    passed = [x, mask, *bias, prompt, output, seeds, offsets, temperature]
    before = [t.clone() for t in passed]
    kwargs = {"bitmask": mask, "bias": bias, "prompt_ids": prompt, "output_ids": output, "backend": backend}
    kwargs |= {"temperature": temperature, "repetition_penalty": 1.5, "frequency_penalty": 0.1, "top_p": 0.9}
    fs.sample(x, seed=seeds, offset=offsets, logprobs="raw", **kwargs)
    fs.filter_logits(x, **kwargs)
    fs.probabilities(x, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(passed, before, strict=True))


# Full distributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_sum_to_one_over_what_filter_logits_keeps(backend: str) -> None:
    x = logits()
    fields = {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "backend": backend}
    p, kept = fs.probabilities(x, **fields), fs.filter_logits(x, **fields).isfinite()
    assert torch.equal(p > 0, kept)
    assert bool(((p.double().sum(1) - 1).abs() < 1e-6).all())
    tokens = fs.sample(x, seed=1, num_samples=500, **fields).tokens
    assert bool(kept.gather(1, tokens).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_rows(backend: str) -> None:
    x = logits()
    best = x.argmax(1)
    out = fs.sample(x, temperature=0.0, top_k=5, num_samples=4, logprobs="raw", top_logprobs=2, backend=backend)
    assert torch.equal(out.tokens, best[:, None].expand(4, 4))
    torch.testing.assert_close(out.logprobs, x.log_softmax(1).gather(1, out.tokens))
    assert out.ranks.unique().tolist() == [1]
    one = torch.nn.functional.one_hot(best, 200).bool()
    kept = fs.filter_logits(x, temperature=0.0, backend=backend)
    assert torch.equal(kept, torch.where(one, x, -torch.inf))
    assert torch.equal(fs.probabilities(x, temperature=0.0, backend=backend), one.float())
    own = fs.sample(x, temperature=0.0, logprobs="processed", top_logprobs=2, backend=backend)
    assert own.logprobs.tolist() == [0.0] * 4
    assert own.top_ids[:, 1].tolist() == [-1] * 4


# Sampler --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampler_is_sample_at_rising_offsets(backend: str) -> None:
    fields = {"temperature": [0.5, 1.0, 2.0, 0.0], "top_p": 0.95}
    how = {"num_samples": 2, "logprobs": "processed", "top_logprobs": 3, "backend": backend}
    sampler = fs.Sampler(batch_size=4, seed=21, offset=2**32 - 2, **fields, **how)
    for step in range(4):
        x = logits(seed=step)
        more = {
            "bias": {step: 3.0},
            "output_ids": [[step]] * 4,
            "bitmask": torch.full((7,), -1 - step, dtype=torch.int32),
        }
        want = fs.sample(x, seed=21, offset=2**32 - 2 + step, **fields, **how, **more)
        assert same(sampler(x, **more), want)
        assert sampler.offsets.tolist() == [2**32 - 1 + step] * 4
    assert sampler.batch_size == 4
    # What came with one step is gone in the next.
    x = logits(seed=9)
    assert same(sampler(x), fs.sample(x, seed=21, offset=2**32 + 2, **fields, **how))


def test_offsets_wrap_and_are_a_copy() -> None:
    sampler = fs.Sampler(batch_size=2, seed=1, offset=[2**64 - 1, 2**63 - 1])
    sampler.offsets.zero_()
    x = torch.zeros(2, 100_000)
    want = [
        fs.sample(x, seed=1, offset=o).tokens.tolist() for o in ([2**64 - 1, 2**63 - 1], [0, 2**63], [1, 2**63 + 1])
    ]
    assert [sampler(x).tokens.tolist() for _ in range(3)] == want


def test_sampler_does_not_share_seeds_with_its_caller() -> None:
    seeds, offsets = torch.arange(3), torch.arange(3)
    sampler = fs.Sampler(batch_size=3, seed=seeds, offset=offsets)
    x = torch.zeros(3, 100_000)
    want = fs.sample(x, seed=seeds, offset=offsets).tokens
    seeds += 100
    offsets += 100
    assert torch.equal(sampler(x).tokens, want)
    assert offsets.tolist() == [100, 101, 102]


@pytest.mark.parametrize("backend", BACKENDS)
def test_set_row_makes_the_slot_not_matter(backend: str) -> None:
    x = logits(1, 5000)
    fields = {"temperature": 0.9, "top_k": 50}
    want = [int(fs.sample(x, seed=[77], offset=o, **fields).tokens) for o in (10, 11, 12)]
    for slot in range(3):
        sampler = fs.Sampler(batch_size=3, seed=1, temperature=0.0, backend=backend)
        sampler(x.expand(3, -1))
        sampler.set_row(slot, fs.SamplingParams(temperature=0.9, top_k=9), top_k=50, seed=77, offset=10)
        steps = [sampler(x.expand(3, -1)).tokens for _ in range(3)]
        assert [int(s[slot]) for s in steps] == want
        greedy = [int(s[other]) for s in steps for other in range(3) if other != slot]
        assert set(greedy) == {int(x.argmax())}
        assert sampler.offsets.tolist() == [13 if i == slot else 4 for i in range(3)]


def test_reset_row_starts_over() -> None:
    x = logits(2, 5000)
    sampler = fs.Sampler(batch_size=2, seed=3, top_k=40, offset=7)
    sampler(x)
    sampler.set_row(1, temperature=0.0, seed=8, offset=100)
    sampler(x)
    sampler.reset_row(1)
    assert sampler.offsets.tolist() == [9, 0]
    want = fs.sample(x, seed=[0, 8], top_k=40).tokens[1]
    assert sampler(x).tokens[1] == want
    sampler.reset_row(1, seed=44)
    want = fs.sample(x, seed=[0, 44], top_k=40).tokens[1]
    assert sampler(x).tokens[1] == want
    assert sampler.offsets.tolist() == [11, 1]


def test_one_slot_takes_one_dimension() -> None:
    sampler = fs.Sampler(batch_size=1, seed=3)
    x = logits(1)[0]
    out = sampler(x)
    assert out.tokens.shape == ()
    assert torch.equal(out.tokens, fs.sample(x, seed=3).tokens)


def test_sampler_fills_out() -> None:
    sampler, other = (fs.Sampler(batch_size=4, seed=3, logprobs="raw") for _ in range(2))
    out = sampler(logits())
    other(logits())
    assert sampler(logits(seed=1), out=out) is out
    assert same(out, other(logits(seed=1)))


def test_a_flagged_step_advances() -> None:
    sampler = fs.Sampler(batch_size=2, seed=3, on_invalid="flag")
    x = torch.zeros(2, 50)
    x[1] = torch.nan
    assert sampler(x).status.tolist() == [0, 1]
    assert sampler.offsets.tolist() == [1, 1]


# Engines, threads and the package -------------------------------------------------------------------------------------


def test_engines_says_why_not() -> None:
    engines = fs.engines()
    assert list(engines) == ["cuda", "triton", "cpu", "reference"]
    assert engines["cpu"] is None
    assert engines["reference"] is None
    assert all(reason is None or isinstance(reason, str) for reason in engines.values())


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the engines that serve."""
    from fastsample.backends import engine

    served: list[str] = []
    for name in BACKENDS:
        kind = type(engine(name))
        run = kind.run

        def wrapped(self: Any, *args: Any, run: Callable[..., Any] = run, name: str = name) -> Any:
            served.append(name)
            return run(self, *args)

        monkeypatch.setattr(kind, "run", wrapped)
    return served


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    served = spy(monkeypatch)
    fs.sample(logits(), seed=1)
    fs.sample(logits(), seed=1, backend="reference")
    fs.filter_logits(logits())
    fs.Sampler(batch_size=4, backend="reference")(logits())
    monkeypatch.setenv("FASTSAMPLE_BACKEND", "reference")
    fs.sample(logits(), seed=1)
    fs.sample(logits(), seed=1, backend="cpu")
    assert served == ["cpu", "reference", "cpu", "reference", "reference", "cpu"]


def test_threads_follow_torch_until_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsample.threads._chosen", None)
    assert fs.get_num_threads() == torch.get_num_threads()
    fs.set_num_threads(7)
    assert fs.get_num_threads() == 7
    fs.set_num_threads(None)
    assert fs.get_num_threads() == torch.get_num_threads()
    with pytest.raises(ValueError, match="n = 0: expected 1 <= n <= 4096 threads, or None for torch's number"):
        fs.set_num_threads(0)


def test_a_backend_in_the_environment_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSAMPLE_BACKEND", "foo")
    for call in (fs.sample, fs.filter_logits, fs.probabilities, fs.Sampler(batch_size=4)):
        with pytest.raises(ValueError, match=r"^FASTSAMPLE_BACKEND = 'foo': expected 'auto' or one of 'cuda'"):
            call(logits())
    fs.sample(logits(), backend="cpu")
    monkeypatch.setenv("FASTSAMPLE_BACKEND", "cuda")
    if fs.engines()["cuda"] is not None:
        with pytest.raises(RuntimeError, match=r"^FASTSAMPLE_BACKEND 'cuda' cannot serve these logits: "):
            fs.sample(logits())


@pytest.mark.filterwarnings("ignore:You are using .torch.load:FutureWarning")  # torch 2.4 to itself
def test_params_and_output_survive_copy_and_pickle() -> None:
    params = fs.SamplingParams(top_k=[1, 2], temperature=0.5, ties=["first", "all"])
    out = fs.sample(logits(), seed=1, logprobs="raw")
    for twin in (copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))):
        assert torch.equal(twin(params).pack(), params.pack())
        assert same(twin(out), out)


def test_equal_outputs_are_equal() -> None:
    x = logits()
    x[1, 3] = torch.nan
    how = {**EVERYTHING, "on_invalid": "flag"}
    out = fs.sample(x, seed=1, **how)
    assert bool(out.logprobs.isnan().any())
    assert out == fs.sample(x, seed=1, **how)
    for name in FIELDS:
        value = getattr(out, name)
        others = [None, value[:-1], value.double(), value.clone().fill_(77), value.to("meta"), [1], np.zeros(4)]
        for other in others:
            changed = copy.copy(out)
            setattr(changed, name, other)
            assert out != changed, name
            assert changed != out, name
    assert out != fs.sample(x, seed=1, on_invalid="flag")
    assert out != out.tokens.tolist()
    assert out in [out]
    with pytest.raises(TypeError, match="unhashable"):
        hash(out)


def test_output_and_params_load_with_weights_only(tmp_path: Path) -> None:
    out = fs.sample(logits(), seed=1, **EVERYTHING)
    params = fs.SamplingParams(top_k=[1, 2], ties="all", temperature=0.3)
    torch.save({"out": out, "params": params, "plain": fs.sample(logits(), seed=2)}, tmp_path / "saved.pt")
    code = """
import sys, torch
import fastsample as fs
found = torch.load(sys.argv[1], weights_only=True)
x = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
kept = {"kept": "ids", "kept_capacity": 6, "kept_mass": True, "entropy": True}
assert found["out"] == fs.sample(x, seed=1, logprobs="raw", top_logprobs=2, **kept)
assert found["plain"] == fs.sample(x, seed=2)
assert found["params"] == fs.SamplingParams(top_k=[1, 2], ties="all", temperature=0.3)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "saved.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_numpy_integers_everywhere() -> None:
    """Of every size; what a Python int gives."""
    x = logits()
    for kind in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
        n = kind(2)
        how = {
            "top_k": n,
            "num_samples": n,
            "logprobs": "raw",
            "top_logprobs": n,
            "bias": {n: 3.0},
            "allowed_ids": None,
        }
        how |= {"output_ids": [[n, 1], [n], [], [kind(3)]], "presence_penalty": 0.5}
        want = {"top_k": 2, "num_samples": 2, "logprobs": "raw", "top_logprobs": 2, "bias": {2: 3.0}}
        want |= {"output_ids": [[2, 1], [2], [], [3]], "presence_penalty": 0.5}
        for seed in (n, kind([1, 2, 3, 4]), [n, kind(5), 6, 7], np.array(n)):
            plain = (
                seed.tolist() if isinstance(seed, np.ndarray) else [int(s) for s in seed] if type(seed) is list else 2
            )
            assert fs.sample(x, seed=seed, offset=seed, **how) == fs.sample(x, seed=plain, offset=plain, **want)
        assert fs.sample(x, allowed_ids=[n, kind(9)], seed=1) == fs.sample(x, allowed_ids=[2, 9], seed=1)
        sampler, other = fs.Sampler(batch_size=kind(4), seed=n, offset=n), fs.Sampler(batch_size=4, seed=2, offset=2)
        sampler.set_row(n, seed=kind(7), offset=kind(3))
        other.set_row(2, seed=7, offset=3)
        assert sampler(x) == other(x)
        sampler.reset_row(n, seed=n)
        other.reset_row(2, seed=2)
        assert sampler(x) == other(x)


def test_offsets_go_round(variant: str) -> None:
    """What a Sampler reports serves as an offset, past 2^63 too, where its int64 is negative."""
    x = torch.zeros(2, 10_000)
    sampler = fs.Sampler(batch_size=2, seed=1, offset=[2**63 - 1, 2**64 - 1], backend=variant)
    sampler(x)
    assert sampler.offsets.tolist() == [-(2**63), 0]
    again = fs.Sampler(batch_size=2, seed=1, offset=sampler.offsets, backend=variant)
    assert again(x) == sampler(x)
    assert fs.sample(x, seed=1, offset=again.offsets, backend=variant) == sampler(x)


def test_version_and_names() -> None:
    from importlib.metadata import version

    assert fs.__version__ == version("fastsample")
    assert all(hasattr(fs, name) for name in fs.__all__)


def test_import_does_no_work(tmp_path: Path) -> None:
    """No compiler, driver, model library or thread is loaded or started, and nothing is printed."""
    code = """
import sys, threading, torch
before, threads = set(sys.modules), threading.active_count()
state = torch.get_rng_state()
import fastsample
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert threading.active_count() == threads
assert torch.equal(torch.get_rng_state(), state)
assert not new & {"transformers", "triton", "vllm", "sglang", "flashinfer", "typer", "rich", "scipy"}, new
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
