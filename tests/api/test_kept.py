"""Kept sets, their mass and the entropy: what is kept is what `filter_logits` shows, in every form and every call."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from conformance import LOGPROB_ULP, ulps

import fastsample as fs
from fastsample.reference import mass

# Inductor imports torch's own deprecated parts.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

BACKENDS = ("reference", "cpu")
B, V, K = 7, 203, 3
ALL: dict[str, Any] = {"kept_mass": True, "entropy": True}


def logits(*batch: int, seed: int = 0, vocab: int = V) -> torch.Tensor:
    """Rows of some spread, with ties, and a few tokens at -inf."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(*batch, vocab, generator=g) * 12).round() / 5
    return x.masked_fill(torch.rand(*batch, vocab, generator=g) < 0.1, -torch.inf)


LOGITS = logits(B)


def unpacked(words: torch.Tensor, vocab: int = V) -> torch.Tensor:
    """The sets of bitmasks [..., words], bool [..., vocab]; bits past the vocabulary must be 0."""
    bits = ((words[..., None] >> torch.arange(32)) & 1).flatten(-2).bool()
    assert not bits[..., vocab:].any()
    return bits[..., :vocab]


def listed(out: Any, vocab: int = V) -> torch.Tensor:
    """The sets of lists, bool [rows, vocab]; they must be ascending, with -1 behind them and nothing between."""
    starts = out.kept_row_ptr
    assert starts[0] == 0
    assert (out.kept_ids[starts[-1] :] == -1).all()
    found = torch.zeros(len(starts) - 1, vocab, dtype=torch.bool)
    for row, (start, end) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
        ids = out.kept_ids[start:end].long()
        assert (ids.diff() > 0).all()
        found[row, ids] = True
    return found


def forms(table: torch.Tensor, **fields: Any) -> torch.Tensor:
    """The sets of a call [B, V], which must be the same in every form."""
    masks, lists = (fs.sample(table, kept=kept, seed=1, **fields) for kept in ("bitmask", "ids"))
    both = fs.sample(table, kept="ids", kept_capacity=table.shape[1], seed=2, **fields)
    assert masks.kept_ids is None
    assert lists.kept_bitmask is None
    found = unpacked(masks.kept_bitmask, table.shape[1])
    assert torch.equal(listed(lists, table.shape[1]), found)
    assert torch.equal(listed(both, table.shape[1]), found)
    assert torch.equal(both.kept_bitmask, masks.kept_bitmask)
    for out in (masks, lists, both, fs.sample(table, kept="count", seed=3, num_samples=2, **fields)):
        assert torch.equal(out.kept_count, found.sum(-1, dtype=torch.int32))
    return found


# What is kept ---------------------------------------------------------------------------------------------------------


def random_fields(seed: int) -> dict[str, Any]:
    """Some of all filters, in any order, one value per row for some."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Any:
        values = (low + (high - low) * torch.rand(B, generator=g)).tolist()
        return values if torch.rand(1, generator=g) < 0.5 else values[0]

    choices: dict[str, Callable[[], Any]] = {
        "temperature": lambda: uniform(0.2, 2.0),
        "top_k": lambda: torch.randint(0, 60, (B,), generator=g),
        "top_p": lambda: uniform(0.3, 1.0),
        "min_p": lambda: uniform(0.0, 0.2),
        "top_n_sigma": lambda: uniform(0.5, 3.0),
        "typical_p": lambda: uniform(0.2, 1.0),
        "epsilon_cutoff": lambda: uniform(0.0, 0.02),
        "eta_cutoff": lambda: uniform(0.0, 0.02),
        "top_a": lambda: uniform(0.0, 0.3),
        "p_less": lambda: bool(torch.rand(1, generator=g) < 0.5),
        "xtc_probability": lambda: [0.0, 0.5, 1.0, 0.99, 1.0, 0.0, 1.0],
        "order": lambda: ("top_k_first", "min_p_first", "joint", "temperature_last")[seed % 4],
        "ties": lambda: ("first", "all")[seed % 2],
    }
    return {name: make() for name, make in choices.items() if torch.rand(1, generator=g) < 0.4}


@pytest.mark.parametrize("seed", range(24))
def test_sets_are_what_filter_logits_shows(seed: int, variant: str) -> None:
    fields, table = random_fields(seed), logits(B, seed=seed)
    mask = torch.randint(-(2**31), 2**31, (B, 7), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    more = {"bias": {3: 4.0, 9: -torch.inf}, "bitmask": mask} if seed % 3 == 0 else {}
    if seed % 3 == 1:
        more = {"output_ids": [[5, 5, 6, 5, 5]] * B, "no_repeat_ngram_size": 2, "presence_penalty": 0.5}
    found = forms(table, **fields, **more, backend=variant)
    assert torch.equal(found, fs.filter_logits(table, **fields, **more, backend="reference") > -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sets_of_a_mass_floor_alone(dtype: torch.dtype, variant: str) -> None:
    """Few of them, all of them, and equal ones, in groups of 2048 tokens."""
    vocab = 2500
    table = logits(4, vocab=vocab) * torch.tensor([[4.0], [1.0], [0.2], [0.01]])
    table = torch.cat([table, torch.full((1, vocab), -2.5), table[1:2].sort().values]).to(dtype)
    found = forms(table, min_p=0.1, backend=variant)
    assert found.sum(-1).tolist()[4] == vocab
    assert torch.equal(found, fs.filter_logits(table, min_p=0.1, backend="reference") > -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 1000, 5003])
def test_every_vocabulary(vocab: int, dtype: torch.dtype, variant: str) -> None:
    table = logits(4, vocab=vocab).to(dtype)
    table[:, vocab // 2] = 0.0
    for fields in ({}, {"top_k": 40}, {"top_p": 0.9}, {"temperature": [0.0, 1.0, 0.5, 0.0], "min_p": 0.01}):
        found = forms(table, **fields, backend=variant)
        assert torch.equal(found, fs.filter_logits(table, **fields, backend="reference") > -torch.inf)


def test_greedy_rows_keep_their_maximum(variant: str) -> None:
    found = forms(LOGITS, temperature=0.0, top_k=9, backend=variant)
    assert torch.equal(found, torch.nn.functional.one_hot(LOGITS.argmax(-1), V).bool())
    out = fs.sample(LOGITS, temperature=0.0, **ALL, backend=variant)
    assert out.log_kept_mass.tolist() == out.entropy.tolist() == [0.0] * B


def test_invalid_rows_keep_nothing(variant: str) -> None:
    table = LOGITS.clone()
    table[1, 5], table[3, 0], table[4] = torch.nan, torch.inf, -torch.inf
    invalid = torch.tensor([row in (1, 3, 4) for row in range(B)])
    for fields in ({"top_p": 0.9}, {"temperature": [0.0] * B}, {"top_k": 4}):
        found = forms(table, **fields, backend=variant, on_invalid="flag")
        assert torch.equal(~found.any(-1), invalid)
        assert torch.equal(found[~invalid], forms(LOGITS, **fields, backend=variant)[~invalid])
        out = fs.sample(table, **fields, **ALL, backend=variant, on_invalid="flag", seed=1)
        assert torch.equal(out.log_kept_mass.isnan(), invalid)
        assert torch.equal(out.entropy.isnan(), invalid)
        with pytest.raises(ValueError, match="row 1 has a NaN"):
            fs.sample(table, **fields, kept="ids", backend=variant)


@pytest.mark.parametrize("fields", [{}, {"top_k": 9}, {"top_p": 0.8, "min_p": 0.01}, {"temperature": 0.0}], ids=str)
def test_probabilities(fields: dict[str, Any], variant: str) -> None:
    """None is so small that its mass is 0; so those are kept that can be drawn."""
    p = logits(B).clamp(min=-9).softmax(-1).masked_fill(LOGITS.isneginf(), 0.0)
    how = {**fields, "input": "probs", "backend": variant}
    assert torch.equal(forms(p, **how), fs.probabilities(p, **how) > 0)
    out, shares = fs.sample(p, **ALL, **how, seed=1), p.double() / p.double().sum(-1, keepdim=True)
    kept = fs.probabilities(p, **{**how, "backend": "reference"}).double()
    if fields != {"temperature": 0.0}:  # where the mass is that of a greedy row, which is certain
        want = torch.where(kept > 0, shares, 0.0).sum(-1).log()
        torch.testing.assert_close(out.log_kept_mass.double(), want, rtol=1e-6, atol=1e-9)
    want = -torch.special.xlogy(kept, kept).sum(-1)
    torch.testing.assert_close(out.entropy.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_draw_matters(backend: str) -> None:
    how = {"top_p": 0.8, "xtc_probability": 0.5, "kept": "ids", **ALL, "backend": backend}
    first = fs.sample(LOGITS, seed=1, **how)
    for more in ({"seed": 2}, {"seed": 1, "offset": 9}, {"seed": 1, "num_samples": 5}, {"seed": 1, "logprobs": "raw"}):
        out = fs.sample(LOGITS, **how, **more)
        for name in ("kept_count", "kept_ids", "kept_row_ptr", "log_kept_mass", "entropy"):
            assert torch.equal(getattr(out, name), getattr(first, name)), name


# Forms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [(), (0,), (1,), (B,), (2, 3), (2, 0), (2, 1, 3)], ids=str)
def test_shapes_and_dtypes(batch: tuple[int, ...], backend: str) -> None:
    x, rows = logits(*batch), math.prod(batch)
    kept = fs.filter_logits(x, top_k=9, backend=backend) > -torch.inf
    asked: list[dict[str, Any]] = [{"kept": "count"}, {"kept": "bitmask"}, {"kept": "ids"}]
    for form in (*asked, {"kept": "ids", "kept_capacity": 11}):
        out = fs.sample(x, top_k=9, **form, **ALL, backend=backend, seed=1)
        assert (out.kept_count.dtype, out.log_kept_mass.dtype, out.entropy.dtype) == (
            torch.int32,
            torch.float32,
            torch.float32,
        )
        assert out.kept_count.shape == out.log_kept_mass.shape == out.entropy.shape == batch
        assert torch.equal(out.kept_count, kept.sum(-1, dtype=torch.int32))
        if out.kept_bitmask is not None:
            assert (out.kept_bitmask.shape, out.kept_bitmask.dtype) == ((*batch, -(-V // 32)), torch.int32)
            assert torch.equal(unpacked(out.kept_bitmask), kept)
        if form["kept"] == "ids":
            capacity = form.get("kept_capacity", 9)
            assert (out.kept_ids.shape, out.kept_ids.dtype) == ((rows * capacity,), torch.int32)
            assert (out.kept_row_ptr.shape, out.kept_row_ptr.dtype) == ((rows + 1,), torch.int64)
            assert torch.equal(listed(out), kept.reshape(rows, V))
        given = {"count": 1, "bitmask": 2, "ids": 4 if form.get("kept_capacity") else 3}[form["kept"]]
        names = ("kept_count", "kept_ids", "kept_row_ptr", "kept_bitmask")
        assert sum(getattr(out, name) is not None for name in names) == given


def test_what_is_not_asked_for_is_none() -> None:
    for name in ("kept_mass", "entropy"):
        out = fs.sample(LOGITS, **{name: True})
        found = {field for field in fs.SampleOutput.__slots__ if getattr(out, field) is not None}
        assert found == {"tokens", "status", "log_kept_mass" if name == "kept_mass" else name}


@pytest.mark.parametrize("capacity", [1, 8, 9, V, 2 * V])
def test_a_capacity(capacity: int, variant: str) -> None:
    """Rows that keep no more are listed; the others have none, but a bitmask."""
    fields = {"top_k": [1, 8, 9, 10, 0, 30, 8], "backend": variant, "seed": 1}
    exact = fs.sample(LOGITS, **fields, kept="ids")
    out = fs.sample(LOGITS, **fields, kept="ids", kept_capacity=capacity)
    fits = exact.kept_count <= capacity
    assert torch.equal(out.kept_count, exact.kept_count)
    assert out.kept_ids.shape == (B * capacity,)
    assert torch.equal(listed(out), listed(exact) & fits[:, None])
    assert torch.equal(out.kept_row_ptr.diff(), exact.kept_count.masked_fill(~fits, 0).long())
    assert torch.equal(unpacked(out.kept_bitmask), listed(exact))


@pytest.mark.parametrize("on_invalid", ["raise", "flag"])
@pytest.mark.parametrize("capacity", [0, 20])
def test_out_is_filled_again(capacity: int, on_invalid: str, variant: str) -> None:
    how = {"kept": "ids", "kept_capacity": capacity, **ALL, "on_invalid": on_invalid, "backend": variant}
    sampler = fs.Sampler(batch_size=B, seed=3, top_p=0.7, **how)
    out = sampler(LOGITS)
    addresses = {name: v.data_ptr() for name in out.__slots__ if (v := getattr(out, name)) is not None}
    for step in range(1, 4):
        table = logits(B, seed=step)
        assert sampler(table, out=out) is out
        assert out == fs.sample(table, seed=3, offset=step, top_p=0.7, **how)
        for name, address in addresses.items():
            is_fresh = not capacity and name in ("kept_ids", "kept_row_ptr")
            assert is_fresh or getattr(out, name).data_ptr() == address, name
    before = copy.deepcopy(out)
    broken = LOGITS.clone()
    broken[2, 1] = torch.nan
    if on_invalid == "raise":
        with pytest.raises(ValueError, match="row 2"):
            sampler(broken, out=out)
        assert out == before
    # A buffer that has changed since is looked at again.
    out.kept_count = out.kept_count.double()
    with pytest.raises(ValueError, match=r"out\.kept_count: expected torch.int32"):
        sampler(LOGITS, out=out)
    if capacity:
        out.kept_count, out.kept_ids = before.kept_count, before.kept_ids[:-1].clone()
        with pytest.raises(ValueError, match=r"out\.kept_ids: expected torch.int32 \[140\]"):
            sampler(LOGITS, out=out)
    assert sampler.offsets.tolist() == [4] * B


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", [{"kept": "ids"}, {"kept": "ids", "kept_capacity": 30}, {"kept": "bitmask"}], ids=str)
def test_some_slots_of_a_sampler(form: dict[str, Any], backend: str) -> None:
    fields = {"top_k": torch.arange(1, B + 1)}
    sampler = fs.Sampler(batch_size=B, seed=range(B), **fields, **form, **ALL, backend=backend)
    for rows in ([4, 0, 2], slice(1, 3)):
        numbers = list(range(B))[rows] if isinstance(rows, slice) else rows
        out = sampler(LOGITS[numbers], rows=rows)
        assert out.kept_count.tolist() == [row + 1 for row in numbers]
        own = {"top_k": [row + 1 for row in numbers], "seed": numbers, "offset": sampler.offsets[numbers] - 1}
        assert out == fs.sample(LOGITS[numbers], **own, **form, **ALL, backend=backend)


def test_a_sampler_keeps_its_wishes() -> None:
    sampler = fs.Sampler(batch_size=B, seed=1, top_p=0.5, kept="ids", kept_capacity=3, **ALL)
    assert "kept='ids', kept_capacity=3, kept_mass=True, entropy=True" in repr(sampler)
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert twin(LOGITS) == fs.sample(LOGITS, seed=1, top_p=0.5, kept="ids", kept_capacity=3, **ALL)


def test_outputs_are_values() -> None:
    out = fs.sample(LOGITS, seed=1, top_p=0.5, kept="ids", **ALL)
    file = io.BytesIO()
    torch.save(out, file)
    file.seek(0)
    for twin in (copy.deepcopy(out), pickle.loads(pickle.dumps(out)), torch.load(file, weights_only=True)):
        assert twin == out
        twin.kept_ids[3] += 1
        assert twin != out
    assert out != fs.sample(LOGITS, seed=1, top_p=0.5, kept="ids", kept_capacity=V, **ALL)


def test_what_is_read_later_is_a_value() -> None:
    """On a CPU, reports become tensors when they are first read: the same ones ever after, each with its own memory."""
    out = fs.sample(LOGITS, seed=1, top_p=0.5, kept="ids", **ALL, backend="cpu")
    names = ("kept_count", "kept_ids", "kept_row_ptr", "log_kept_mass", "entropy")
    tensors = [getattr(out, name) for name in names]
    for name, tensor in zip(names, tensors, strict=True):
        assert getattr(out, name) is tensor
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.fill_(1)  # and nobody else's
    assert out != fs.sample(LOGITS, seed=1, top_p=0.5, kept="ids", **ALL, backend="cpu")
    assert [getattr(out, name).unique().tolist() for name in names] == [[1]] * len(names)
    for name in ("kept_counts", "filtered", "_names"):
        with pytest.raises(AttributeError, match=f"'SampleOutput' object has no attribute '{name}'"):
            getattr(out, name)


@pytest.mark.parametrize("inside", ["call", "read"])
def test_reads_in_inference_mode(inside: str) -> None:
    """What is made there must serve outside of it, too, where it may be changed or have gradients."""
    with torch.inference_mode(inside == "call"):
        out = fs.sample(LOGITS, seed=1, top_p=0.5, kept="bitmask", **ALL, backend="cpu")
    with torch.inference_mode(inside == "read"):
        count, bitmask, entropy = out.kept_count, out.kept_bitmask, out.entropy
    count += 1
    bitmask |= 1
    weight = torch.ones(B, requires_grad=True)
    (weight * entropy).sum().backward()
    assert torch.equal(weight.grad, entropy)


def test_a_buffer_that_was_not_read_is_filled_again() -> None:
    """Also where the call that left it had other reports than the one that fills it."""
    first = fs.sample(LOGITS, seed=1, top_p=0.5, kept="ids", **ALL, backend="cpu")
    twin = fs.sample(LOGITS, seed=1, top_p=0.5, kept="ids", **ALL, backend="cpu")
    for seed in (2, 3):  # the lists of the first of these calls are not read
        assert fs.sample(LOGITS, seed=seed, top_p=0.9, kept="ids", backend="cpu", out=first) is first
    want = fs.sample(LOGITS, seed=3, top_p=0.9, kept="ids", backend="cpu")
    want.log_kept_mass, want.entropy = twin.log_kept_mass, twin.entropy  # which these calls don't ask for
    assert first == want


def test_a_small_call_repeated() -> None:
    """What a call keeps for the next is scratch, and nothing of a result."""
    first = fs.sample(LOGITS, seed=1, top_p=0.5, kept="ids")
    before = copy.deepcopy(first)
    assert fs.sample(logits(B, seed=5), seed=1, top_p=0.5, kept="ids") != first
    assert first == before


# Masses ---------------------------------------------------------------------------------------------------------------


def weights(x: torch.Tensor, temperature: float) -> list[list[int]]:
    """The integer masses of each row."""
    return mass(x, torch.full((len(x), 1), temperature)).masked_fill(x.isneginf(), 0).tolist()


MASSES: dict[str, dict[str, Any]] = {
    "none": {},
    "top_k": {"top_k": 5},
    "nearly all": {"top_p": 0.999999},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.3},
    "one": {"top_k": 1},
    "llama.cpp": {"top_p": 0.6, "order": "temperature_last"},
}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("fields", MASSES.values(), ids=MASSES)
def test_of_integers(fields: dict[str, Any], temperature: float, variant: str) -> None:
    """Quotients of Python's integers are rounded once, so float64 is far more exact than 2 units of float32."""
    out = fs.sample(LOGITS, **fields, temperature=temperature, kept="bitmask", **ALL, backend=variant, seed=1)
    shares, entropies = [], []
    for row, w in enumerate(weights(LOGITS, temperature)):
        own = [w[token] for token in unpacked(out.kept_bitmask[row]).nonzero()[:, 0].tolist()]
        total, kept = sum(w), sum(own)
        shares.append(math.log1p(-((total - kept) / total)) if 2 * kept > total else math.log(kept / total))
        entropies.append(math.fsum(m / kept * math.log1p((kept - m) / m) for m in own if m))
    assert ulps(out.log_kept_mass, torch.tensor(shares)) <= LOGPROB_ULP
    assert ulps(out.entropy, torch.tensor(entropies)) <= LOGPROB_ULP


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("fields", MASSES.values(), ids=MASSES)
def test_of_softmax(fields: dict[str, Any], temperature: float, variant: str) -> None:
    """A mass is exp of a float32 that has three roundings, 2^-24 each of up to 60, where its own weight is below
    2^-60; what counts has an exponent below 20. So it is off by 20 * 3 * 2^-24 < 4e-6, the polynomial's 1e-7 included.
    """
    out = fs.sample(LOGITS, **fields, temperature=temperature, kept="bitmask", **ALL, backend=variant, seed=1)
    kept = unpacked(out.kept_bitmask)
    p = (LOGITS.double() / temperature).softmax(-1)
    share = torch.where(kept, p, 0.0).sum(-1)
    torch.testing.assert_close(out.log_kept_mass.double(), share.log(), rtol=0, atol=4e-6)
    q = torch.where(kept, p, 0.0) / share[:, None]
    torch.testing.assert_close(out.entropy.double(), -torch.special.xlogy(q, q).sum(-1), rtol=4e-6, atol=4e-6)


def test_the_entropy_of_a_coins_mixture(variant: str) -> None:
    """XTC: of what is drawn from, with and without what it excludes; the set is the one with it."""
    coins = [0.0, 0.3, 0.5, 0.9, 0.1, 0.7, 0.2]
    fields = {"temperature": 1.5, "xtc_threshold": 0.02, "backend": variant, "xtc_probability": coins}
    out = fs.sample(LOGITS, **fields, kept="count", **ALL, seed=1)
    p = fs.probabilities(LOGITS, **{**fields, "backend": "reference"}).double()
    torch.testing.assert_close(out.entropy.double(), -torch.special.xlogy(p, p).sum(-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(out.kept_count.long(), (LOGITS.isfinite()).sum(-1))
    assert not out.log_kept_mass.any()
    assert len(set(out.entropy.tolist())) == B


# Errors ---------------------------------------------------------------------------------------------------------------


CALLS: dict[str, Callable[..., Any]] = {
    "sample": lambda **more: fs.sample(LOGITS, **more),
    "Sampler": lambda **more: fs.Sampler(batch_size=B, **more),
    "verify": lambda **more: fs.verify(LOGITS[None], torch.zeros(1, B - 1, dtype=torch.int64), **more),
    "verify_tree": lambda **more: fs.verify_tree(LOGITS[None], *torch.zeros(2, 1, B, dtype=torch.int64), **more),
}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kept": "list"}, ValueError, "kept = 'list': expected None, 'count', 'ids' or 'bitmask'"),
    ({"kept": True}, ValueError, "kept = True: expected"),
    ({"kept": ["ids"]}, ValueError, r"kept = \['ids'\]: expected"),
    ({"kept": "ids", "kept_capacity": -1}, ValueError, "kept_capacity = -1: expected"),
    ({"kept": "ids", "kept_capacity": 2**20 + 1}, ValueError, "kept_capacity = 1048577: expected"),
    ({"kept": "ids", "kept_capacity": 1.0}, TypeError, "kept_capacity = 1.0: expected"),
    ({"kept": "ids", "kept_capacity": True}, TypeError, "kept_capacity = True: expected"),
    ({"kept_capacity": 4}, ValueError, "kept_capacity = 4: needs kept='ids'"),
    ({"kept": "bitmask", "kept_capacity": 4}, ValueError, "kept_capacity = 4: needs kept='ids'"),
    ({"kept_mass": 1}, TypeError, "kept_mass = 1: expected True or False"),
    ({"kept_mass": None}, TypeError, "kept_mass = None: expected True or False"),
    ({"entropy": "yes"}, TypeError, "entropy = 'yes': expected True or False"),
    ({"entropie": True}, TypeError, r"entropie \(did you mean entropy\?\)"),
]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("wrong", "kind", "message"), BAD, ids=str)
def test_bad_arguments(call: Callable[..., Any], wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(**wrong)


# Verification ---------------------------------------------------------------------------------------------------------


N = 4
TARGET = torch.randn(N, K + 1, V, generator=torch.Generator().manual_seed(2)) * 2
DRAFT = TARGET[:, :K] + 0.5 * torch.randn(N, K, V, generator=torch.Generator().manual_seed(3))
SEEDS = torch.arange(N) + 11
FIELDS: dict[str, Any] = {"top_k": 60, "top_p": 0.9, "temperature": 0.9}
REPORTS = ("kept_count", "kept_bitmask", "log_kept_mass", "entropy")


def drafts(rule: str) -> dict[str, Any]:
    """Drafts of which some are accepted, by the rule."""
    ids = fs.sample(DRAFT, seed=5, **FIELDS).tokens
    if rule != "exact":
        return {"draft_ids": ids, "draft_logits": DRAFT, "rule": rule}
    right = fs.sample(
        TARGET, seed=SEEDS[:, None].expand(-1, K + 1), offset=torch.arange(K + 1).expand(N, -1), **FIELDS
    ).tokens[:, :K]
    wrong = torch.tensor([[False] * 3, [False, False, True], [False, True, False], [True, False, False]])
    return {"draft_ids": torch.where(wrong, (right + 1) % V, right)}


def check_verified(out: fs.VerifyOutput, rows: fs.SampleOutput, where: torch.Tensor) -> None:
    """Lists and all else of the tokens that came out, against those of the rows `where` int64 [N, K + 1], or none."""
    past = out.tokens < 0
    sets = unpacked(rows.kept_bitmask)[where] & ~past[:, :, None]
    if out.kept_bitmask is not None:
        assert torch.equal(unpacked(out.kept_bitmask), sets)
    if out.kept_row_ptr is not None:
        assert out.kept_row_ptr.shape == (out.tokens.numel() + 1,)
        assert torch.equal(listed(out), sets.flatten(0, 1))
    assert torch.equal(out.kept_count, sets.sum(-1, dtype=torch.int32))
    for name in ("log_kept_mass", "entropy"):
        want = getattr(rows, name)[where].masked_fill(past, torch.nan)
        found = getattr(out, name)
        assert torch.equal(found.isnan(), past)
        assert ulps(found, want) <= 2 * LOGPROB_ULP  # of two engines' passes


@pytest.mark.parametrize("form", [{"kept": "ids"}, {"kept": "ids", "kept_capacity": V}, {"kept": "bitmask"}], ids=str)
@pytest.mark.parametrize("rule", ["exact", "chain", "block"])
def test_verification(rule: str, form: dict[str, Any], variant: str) -> None:
    how = {"seed": SEEDS, **FIELDS, "backend": variant}
    out = fs.verify(TARGET, **drafts(rule), **how, **form, **ALL)
    plain = fs.verify(TARGET, **drafts(rule), **how)
    assert torch.equal(out.tokens, plain.tokens)
    assert 0 < int(out.num_accepted.sum()) < N * K
    rows = fs.sample(TARGET.flatten(0, 1), seed=1, **FIELDS, kept="bitmask", **ALL, backend="reference")
    check_verified(out, rows, torch.arange(N * (K + 1)).view(N, K + 1))
    assert (out.kept_bitmask is None) == (form == {"kept": "ids"})
    again = copy.deepcopy(out)
    assert fs.verify(TARGET + 1, **{**drafts(rule), **how, **form, **ALL, "seed": SEEDS + 1}, out=again) is again
    assert fs.verify(TARGET, **drafts(rule), **how, **form, **ALL, out=again) is again
    for name in out.__slots__:
        a, b = getattr(out, name), getattr(again, name)
        assert (a is None and b is None) or torch.equal(a.nan_to_num(7), b.nan_to_num(7)), name


@pytest.mark.parametrize("rule", ["exact", "chain"])
def test_a_result_that_ends_at_an_invalid_row(rule: str, variant: str) -> None:
    broken = TARGET.clone()
    broken[0, 1, 3] = torch.nan
    how = {"seed": SEEDS, **FIELDS, "backend": variant, "on_invalid": "flag"}
    out = fs.verify(broken, **drafts(rule), **how, kept="ids", **ALL)
    rows = fs.sample(TARGET.flatten(0, 1), seed=1, **FIELDS, kept="bitmask", **ALL, backend="reference")
    check_verified(out, rows, torch.arange(N * (K + 1)).view(N, K + 1))
    assert bool((out.tokens[0, 1:] == -1).all())


@pytest.mark.parametrize("form", [{"kept": "ids"}, {"kept": "ids", "kept_capacity": 32}, {"kept": "bitmask"}], ids=str)
def test_a_tree(form: dict[str, Any], variant: str) -> None:
    """Sets follow the path; of a row with more than a capacity there is no list."""
    tree = torch.randn(2, 5, V, generator=torch.Generator().manual_seed(6)) * 2
    parents = torch.tensor([[-1, 0, 0, 1, 2]] * 2)
    depth = torch.tensor([0, 1, 1, 2, 2])
    seeds = torch.tensor([3, 4])
    drawn = fs.sample(tree, seed=seeds[:, None].expand(-1, 5), offset=depth.expand(2, -1), **FIELDS).tokens
    ids = torch.stack([torch.tensor([0, (t[0] + 1) % V, t[0], 7, t[2]]) for t in drawn])
    out = fs.verify_tree(tree, ids, parents, seed=seeds, **FIELDS, backend=variant, **form, **ALL)
    assert out.path[0].tolist() == [0, 2, 4, -1, -1]
    rows = fs.sample(tree.flatten(0, 1), seed=1, **FIELDS, kept="bitmask", **ALL, backend="reference")
    where = out.path.clamp(min=0) + 5 * torch.arange(2)[:, None]
    if form.get("kept_capacity"):
        count = out.kept_count.flatten()
        assert 0 < (count > 32).sum() < (count > 0).sum()
        assert torch.equal(out.kept_row_ptr.diff(), count.masked_fill(count > 32, 0).long())
        out.kept_ids = out.kept_row_ptr = None
    check_verified(out, rows, where)


# Under torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


TRACED: dict[str, dict[str, Any]] = {
    "ids": {"kept": "ids", "kept_capacity": 30, **ALL},
    "bitmask": {"kept": "bitmask", "logprobs": "raw"},
    "count": {"kept": "count", "kept_mass": True},
    "entropy": {"entropy": True},
}


@pytest.mark.parametrize("how", TRACED.values(), ids=TRACED)
def test_a_trace_equals_an_eager_call(how: dict[str, Any], fresh: None) -> None:
    once = torch.compile(lambda x: fs.sample(x, seed=1, top_k=20, **how), fullgraph=True, backend="aot_eager")
    for x in (LOGITS, LOGITS[0], logits(2, 3)):
        assert once(x) == fs.sample(x, seed=1, top_k=20, **how)
    mine, eager = (fs.Sampler(batch_size=B, seed=2, top_k=20, **how) for _ in range(2))
    step = torch.compile(lambda x: mine(x), fullgraph=True, backend="aot_eager")
    some = torch.compile(lambda x: mine(x, rows=[2, 0]), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert step(LOGITS) == eager(LOGITS)
        assert some(LOGITS[:2]) == eager(LOGITS[:2], rows=[2, 0])
    assert torch.equal(mine.offsets, eager.offsets)


@pytest.mark.parametrize("rule", ["exact", "chain"])
def test_a_traced_verification(rule: str, fresh: None) -> None:
    given = {**drafts(rule), "seed": SEEDS, **FIELDS, "kept": "ids", "kept_capacity": 70, **ALL}
    once = torch.compile(lambda x: fs.verify(x, **given), fullgraph=True, backend="aot_eager")
    found, want = once(TARGET), fs.verify(TARGET, **given)
    for name in want.__slots__:
        a, b = getattr(found, name), getattr(want, name)
        assert (a is None and b is None) or torch.equal(a.nan_to_num(7), b.nan_to_num(7)), name


def test_a_trace_needs_a_capacity(fresh: None) -> None:
    """Lists of an exact size have none before the call."""
    sampler = fs.Sampler(batch_size=B, kept="ids")
    given = drafts("exact")
    calls: list[Callable[[torch.Tensor], Any]] = [
        lambda x: fs.sample(x, kept="ids"),
        lambda x: sampler(x),
        lambda x: fs.verify(TARGET, **given, kept="ids"),
    ]
    for call in calls:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="kept_capacity"):
            torch.compile(call, fullgraph=True, backend="aot_eager")(LOGITS)
