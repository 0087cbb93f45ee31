"""kept_logprobs: the sampler's own log-probabilities, their exact gradient, no second table, a divided vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conformance import LOGPROB_ULP, ulps
from ranks import in_processes
from torch.utils._python_dispatch import TorchDispatchMode

import fastsample as fs
from fastsample import training
from fastsample.training import kept_logprobs

FILTERS = {
    "none": {},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "joined": {"top_k": 200, "top_p": 0.9, "min_p": 0.01},
    "last": {"top_p": 0.9, "order": "temperature_last"},
}
TEMPERATURES = (0.02, 0.1, 0.35, 0.7, 1.0, 1.3, 4.0, 50.0)


def random_logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Rows that are flat, as peaked as a language model's, and nearly certain."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.5, 3.0, 12.0]).repeat(rows)[:rows, None]
    return (torch.randn(rows, vocab, generator=generator) * spread).to(dtype)


def sampled(logits: torch.Tensor, form: str, backend: str = "cpu", **options: Any) -> tuple[fs.SampleOutput, Any]:
    """What the sampler drew, and what it kept."""
    out = fs.sample(logits, seed=7, kept=form, logprobs="processed", backend=backend, **options)
    return out, (out.kept_ids, out.kept_row_ptr) if form == "ids" else out.kept_bitmask


def by_definition(logits: torch.Tensor, tokens: torch.Tensor, kept: torch.Tensor, temperature: Any) -> torch.Tensor:
    """The same in float64, by torch; `kept` is bool [N, V]."""
    scaled = (logits.double() / torch.as_tensor(temperature).double().reshape(-1, 1)).masked_fill(~kept, -torch.inf)
    return scaled.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def as_bools(bitmask: torch.Tensor, vocab: int) -> torch.Tensor:
    return (bitmask[:, :, None] >> torch.arange(32) & 1).flatten(1)[:, :vocab].bool()


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ids", "bitmask"])
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_they_are_the_samplers(dtype: torch.dtype, options: dict[str, Any], form: str) -> None:
    logits = random_logits(15, 700, dtype)
    for temperature, backend in itertools.product(TEMPERATURES, ("cpu", "reference")):
        out, kept = sampled(logits, form, backend, temperature=temperature, **options)
        found = kept_logprobs(logits, out.tokens, kept, temperature)
        assert found.dtype == torch.float32
        assert ulps(found, out.logprobs) <= LOGPROB_ULP


def test_a_float64_softmax_would_not_do() -> None:
    """Why the sampler's masses are taken: where logits are large, its rounding of y is far more than 2 ulp."""
    logits = random_logits(30, 2000)
    out, _ = sampled(logits, "bitmask", temperature=0.1)
    exact = by_definition(logits, out.tokens, torch.ones_like(logits, dtype=torch.bool), 0.1).float()
    assert ulps(exact, out.logprobs) > 10 * LOGPROB_ULP


def test_a_set_without_the_maximum() -> None:
    logits = random_logits(60, 2000)
    out, kept = sampled(logits, "ids", typical_p=0.4)
    assert bool((logits.argmax(-1) != kept_logprobs_argmax(logits, kept)).any())
    torch.testing.assert_close(kept_logprobs(logits, out.tokens, kept), out.logprobs, rtol=0, atol=1e-6)


def kept_logprobs_argmax(logits: torch.Tensor, kept: Any) -> torch.Tensor:
    ids, ptr = kept
    sets = [ids[a:b].long() for a, b in itertools.pairwise(ptr.tolist())]
    return torch.stack([own[row[own].argmax()] for row, own in zip(logits, sets, strict=True)])


def test_a_temperature_per_row_and_greedy_rows() -> None:
    logits = random_logits(6, 300)
    temperature = torch.tensor([0.5, 0.0, 1.0, 9e-6, 2.0, 1.1e-5])
    out, kept = sampled(logits, "ids", temperature=temperature, top_k=5)
    logits.requires_grad_()
    found = kept_logprobs(logits, out.tokens, kept, temperature)
    assert ulps(found, out.logprobs) <= LOGPROB_ULP
    assert found[[1, 3]].tolist() == [0, 0]
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert grad.any(-1).tolist() == [True, False, True, False, True, False]  # the last row is all but certain


def test_rows_without_a_token() -> None:
    logits = random_logits(3, 40)
    logits[1] = torch.nan
    out, kept = sampled(logits, "ids", top_p=0.9, on_invalid="flag")
    assert out.tokens[1] == -1
    tokens = torch.where(torch.tensor([False, False, True]), -1, out.tokens)  # padding, with a kept set
    logits.requires_grad_()
    found = kept_logprobs(logits, tokens, kept)
    assert found[1:].tolist() == [0, 0]
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert grad.any(-1).tolist() == [True, False, False]
    assert not grad.isnan().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_wrong_shows(bad: float) -> None:
    logits = random_logits(2, 40)
    logits[0, 3] = bad
    logits[1, 3] = bad
    kept = torch.tensor([2, 3, 5, 2, 4, 5]), torch.tensor([0, 3, 6])
    logits.requires_grad_()
    found = kept_logprobs(logits, torch.tensor([2, 2]), kept)
    assert found.isnan().tolist() == [True, False]  # what is not kept is not looked at
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert grad.isnan().any(-1).tolist() == [True, False]


def test_minus_infinity_has_no_probability() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 5.0]] * 2, requires_grad=True)
    kept = torch.tensor([0, 1, 2] * 2), torch.tensor([0, 3, 6])
    found = kept_logprobs(logits, torch.tensor([2, 1]), kept)
    expected = logits.detach()[0, [0, 2]].log_softmax(-1)[1]
    torch.testing.assert_close(found, torch.stack([expected, torch.tensor(-torch.inf)]))
    (grad,) = torch.autograd.grad(found[0], logits)
    assert grad[0, [1, 3]].tolist() == [0, 0]


def test_a_token_whose_probability_has_vanished() -> None:
    """Its mass is 0 once a trainer has moved the logits so far; a loss must still be finite, and pull it back."""
    logits = torch.tensor([[0.0, -100.0, 3.0]], requires_grad=True)
    found = kept_logprobs(logits, torch.tensor([1]), (torch.tensor([0, 1]), torch.tensor([0, 2])))
    torch.testing.assert_close(found, torch.tensor([-100.0]))
    (grad,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(grad, torch.tensor([[-1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("form", ["ids", "bitmask"])
def test_chunks_change_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(40, 333).requires_grad_()
    out, kept = sampled(logits.detach(), form, top_p=0.9)
    whole = kept_logprobs(logits, out.tokens, kept)
    (grad,) = torch.autograd.grad(whole.sum(), logits)
    for size in (32, 64, 97, 1000):
        monkeypatch.setattr(training, "CHUNK", size)
        parts = kept_logprobs(logits, out.tokens, kept)
        assert torch.equal(parts, whole)
        assert torch.equal(torch.autograd.grad(parts.sum(), logits)[0], grad)


# Shapes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ids", "bitmask"])
def test_more_dimensions_and_strides(form: str) -> None:
    """What trainers have: [B, T, V] without its last position."""
    table = random_logits(12, 100).view(3, 4, 100).requires_grad_()
    logits = table[:, :-1]
    out, kept = sampled(logits.detach().contiguous(), form, top_k=9)
    assert out.tokens.shape == (3, 3)
    found = kept_logprobs(logits, out.tokens, kept, torch.full((3, 3), 1.0))
    assert ulps(found, out.logprobs) <= LOGPROB_ULP
    flat = kept if form == "ids" else kept.flatten(0, 1)
    same = kept_logprobs(logits.flatten(0, 1), out.tokens.flatten(), flat)
    assert torch.equal(found.flatten(), same)
    (grad,) = torch.autograd.grad(found.sum(), table, retain_graph=True)
    assert torch.equal(grad, torch.autograd.grad(same.sum(), table)[0])
    every_other = kept_logprobs(torch.stack([logits, logits], -1).flatten(-2)[..., ::2], out.tokens, kept)
    assert torch.equal(found, every_other)


def test_some_rows_of_a_batch() -> None:
    logits = random_logits(9, 100)
    out, (ids, ptr) = sampled(logits, "ids", top_p=0.9)
    part = kept_logprobs(logits[3:7], out.tokens[3:7], (ids, ptr[3:8]))
    assert ulps(part, out.logprobs[3:7]) <= LOGPROB_ULP


def test_lists_of_a_limited_size() -> None:
    logits = random_logits(9, 100)
    out, kept = sampled(logits, "ids", top_k=5, kept_capacity=8)
    assert len(out.kept_ids) == 72
    assert ulps(kept_logprobs(logits, out.tokens, kept), out.logprobs) <= LOGPROB_ULP
    out, kept = sampled(logits, "ids", top_k=9, kept_capacity=8)
    with pytest.raises(ValueError, match=r"tokens = \d+ \(row 0\).* 0 kept ids; a set larger than kept_capacity"):
        kept_logprobs(logits, out.tokens, kept)


def test_no_rows() -> None:
    kept = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    logits = torch.zeros(0, 5, requires_grad=True)
    found = kept_logprobs(logits, torch.zeros(0, dtype=torch.int64), kept)
    assert found.shape == (0,)
    assert torch.autograd.grad(found.sum(), logits)[0].shape == (0, 5)


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ids", "bitmask"])
def test_gradcheck(form: str) -> None:
    logits = random_logits(5, 40).double()
    temperature = torch.tensor([0.7, 1.0, 2.0, 0.0, 1.3])
    out, kept = sampled(logits.float(), form, temperature=temperature, top_p=0.9)
    tokens = torch.where(torch.arange(5) == 4, -1, out.tokens)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kept_logprobs(x, tokens, kept, temperature), (logits,))
    found = kept_logprobs(logits, tokens, kept, temperature)
    assert found.dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"kept_logprobs: .*create_graph"):
        torch.autograd.grad(found.sum(), logits, create_graph=True)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=str
)
def test_gradients_are_those_of_a_masked_softmax(dtype: torch.dtype, rtol: float) -> None:
    logits = random_logits(30, 500, dtype)
    temperature = torch.rand(30, generator=torch.Generator().manual_seed(1)) + 0.5
    out, kept = sampled(logits, "bitmask", temperature=temperature, top_p=0.9)
    bools, weight = as_bools(kept, 500), torch.linspace(-2, 2, 30)
    exact = logits.double().requires_grad_()
    (by_definition(exact, out.tokens, bools, temperature) * weight).sum().backward()
    logits.requires_grad_()
    (kept_logprobs(logits, out.tokens, kept, temperature) * weight).sum().backward()
    assert logits.grad.dtype == dtype
    assert not logits.grad[~bools].any()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rtol, atol=1e-6)


class Largest(TorchDispatchMode):
    """Sizes in bytes of the fresh tensors that operations give, the largest first."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if is_tensor(t)
        }
        for value in torch.utils._pytree.tree_leaves(result):
            if is_tensor(value) and value.untyped_storage().data_ptr() not in given:
                self.sizes.append(value.untyped_storage().nbytes())
        return result


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("form", ["ids", "bitmask"])
def test_there_is_no_second_table(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where everything is kept. The backward pass makes one table: the gradient, as wide as the logits are."""
    monkeypatch.setattr(training, "CHUNK", 4096)
    rows, vocab = 64, 4096
    table = rows * vocab
    logits = random_logits(rows, vocab, torch.bfloat16).requires_grad_()
    out, kept = sampled(logits.detach(), form)
    with Largest() as forward:
        found = kept_logprobs(logits, out.tokens, kept)
    assert max(forward.sizes) <= 4096 * 32  # of int64 pairs and bits
    with Largest() as backward:
        found.sum().backward()
    first, second = sorted(backward.sizes)[:-3:-1]
    assert first == table * 2
    assert second <= 4096 * 32
    assert logits.grad.dtype == torch.bfloat16


# Refusals ------------------------------------------------------------------------------------------------------------

X = torch.zeros(3, 40)
TOKENS = torch.tensor([1, 2, 39])
IDS, PTR = torch.tensor([1, 5, 2, 39], dtype=torch.int32), torch.tensor([0, 2, 3, 4])
WORDS = torch.full((3, 2), -1, dtype=torch.int32)

WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "logits: a list": (TypeError, "logits: expected a tensor or an array, got list", {"logits": [[0.0]]}),
    "logits: integers": (TypeError, "logits: expected float32, .* got torch.int64", {"logits": X.long()}),
    "logits: one row": (ValueError, r"logits: expected shape \[N, V\].*\(40,\)", {"logits": X[0]}),
    "logits: no vocabulary": (ValueError, "logits: expected 1 <= V <= 2.20, got V = 0", {"logits": X[:, :0]}),
    "logits: meta": (ValueError, "logits: expected a dense tensor", {"logits": X.to("meta")}),
    "tokens: a list": (TypeError, "tokens: expected a tensor or an array, got list", {"tokens": [1, 2, 3]}),
    "tokens: floats": (TypeError, "tokens: expected torch.int64 or torch.int32", {"tokens": TOKENS.float()}),
    "tokens: too few": (ValueError, r"tokens: expected shape \(3,\), got \(2,\)", {"tokens": TOKENS[:2]}),
    "tokens: not kept": (
        ValueError,
        r"tokens = 3 \(row 1\): expected -1 or one of its 1 kept ids",
        {"tokens": TOKENS + torch.tensor([0, 1, 0])},
    ),
    "tokens: outside": (ValueError, r"tokens = 40 \(row 2\)", {"tokens": TOKENS + torch.tensor([0, 0, 1])}),
    "tokens: below": (ValueError, r"tokens = -2 \(row 0\)", {"tokens": TOKENS - torch.tensor([3, 0, 0])}),
    "tokens: masked out": (
        ValueError,
        r"tokens = 2 \(row 1\): expected -1 or one of its 39 kept ids",
        {"kept": WORDS - torch.tensor([[0, 0], [4, 0], [0, 0]]).int()},
    ),
    "kept: nothing": (TypeError, "kept: expected .kept_ids, kept_row_ptr. or a bitmask, got NoneType", {"kept": None}),
    "kept: ids alone": (TypeError, "kept: expected .*, got tuple", {"kept": (IDS,)}),
    "kept: bools": (TypeError, r"kept \(a bitmask\): expected torch.int32, got torch.bool", {"kept": X.bool()}),
    "kept: few words": (ValueError, r"kept .*\[3, ceil\(V / 32\) = 2\], got \[3, 1\]", {"kept": WORDS[:, :1]}),
    "kept: few rows": (ValueError, r"kept .*got \[2, 2\]", {"kept": WORDS[:2]}),
    "ids: floats": (TypeError, "kept_ids: expected torch.int32 or torch.int64", {"kept": (IDS.float(), PTR)}),
    "ids: a table": (ValueError, r"kept_ids: expected shape \[n\]", {"kept": (IDS[None], PTR)}),
    "ids: outside": (
        ValueError,
        r"kept_ids: id 40 \(row 0\): expected 0 <= id < 40",
        {"kept": (IDS + torch.tensor([0, 35, 0, 0]).int(), PTR)},
    ),
    "ids: below": (
        ValueError,
        r"kept_ids: id -1 \(row 1\)",
        {"kept": (IDS - torch.tensor([0, 0, 3, 0]).int(), PTR)},
    ),
    "row_ptr: too short": (ValueError, r"kept_row_ptr: expected shape \(4,\), got \(3,\)", {"kept": (IDS, PTR[:3])}),
    "row_ptr: falls": (
        ValueError,
        r"kept_row_ptr \(row 1\): expected an end from 2 on, got 1",
        {"kept": (IDS, torch.tensor([0, 2, 1, 4]))},
    ),
    "row_ptr: too far": (ValueError, "kept_row_ptr: expected 0 to 4, .*got 0 to 5", {"kept": (IDS, PTR + PTR // 4)}),
    "row_ptr: below": (ValueError, "kept_row_ptr: expected 0 to 4, .*got -1 to 3", {"kept": (IDS, PTR - 1)}),
    "temperature: negative": (
        ValueError,
        r"temperature = -1.0 \(row 1\)",
        {"temperature": torch.tensor([1.0, -1.0, 1.0])},
    ),
    "temperature: text": (TypeError, "temperature = 'warm'", {"temperature": "warm"}),
    "temperature: too few": (ValueError, "temperature: .*3 values", {"temperature": torch.ones(2)}),
    "temperature: learnt": (
        ValueError,
        "temperature: gets no gradient",
        {"temperature": torch.ones(3, requires_grad=True)},
    ),
    "on_invalid": (ValueError, "on_invalid = 'ignore'", {"on_invalid": "ignore"}),
    "vocab_start": (ValueError, "vocab_start = -1", {"vocab_start": -1}),
    "group": (ValueError, "group: needs vocab_start", {"group": object()}),
}


@pytest.mark.parametrize(("exception", "says", "given"), WRONG.values(), ids=WRONG)
def test_refusals(exception: type[Exception], says: str, given: dict[str, Any]) -> None:
    good: dict[str, Any] = {"logits": X, "tokens": TOKENS, "kept": (IDS, PTR), "temperature": 1.0}
    kept_logprobs(**good)
    with pytest.raises(exception, match=says):
        kept_logprobs(**good | given)


def test_flagged_rows() -> None:
    logits = random_logits(3, 40).requires_grad_()
    ids = torch.tensor([1, 5, 40, 2, -7, 39], dtype=torch.int32)
    kept = ids, torch.tensor([0, 3, 5, 6])
    found = kept_logprobs(logits, torch.tensor([1, 3, 39]), kept, on_invalid="flag")
    assert found[1] == -torch.inf
    assert found[2] == 0
    torch.testing.assert_close(found[0], logits[0, [1, 5]].log_softmax(-1)[0])
    (grad,) = torch.autograd.grad(found.exp().sum(), logits)
    assert grad.any(-1).tolist() == [True, False, False]
    assert not grad.isnan().any()


# A divided vocabulary ------------------------------------------------------------------------------------------------


def as_one_rank(*cuts: int) -> int:
    """What a rank finds equal to the undivided form; how often it has compared."""
    rank = dist.get_rank()
    low, high = cuts[rank : rank + 2]
    generator = torch.Generator().manual_seed(3)
    compared = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = (3 * torch.randn(12, cuts[-1], generator=generator)).to(dtype)
        temperature = torch.rand(12, generator=generator) + 0.5
        weight = torch.randn(12, generator=generator)
        for form, options in itertools.product(("ids", "bitmask"), ({"top_p": 0.9}, {"top_k": 3}, {})):
            half = x.float() if dtype == torch.float64 else x
            out, kept = sampled(half, form, "auto", temperature=temperature, **options)
            tokens = out.tokens.clone()
            tokens[4] = -1
            whole, part = x.clone().requires_grad_(), x[:, low:high].clone().requires_grad_()
            one = kept_logprobs(whole, tokens, kept, temperature)
            many = kept_logprobs(part, tokens, kept, temperature, vocab_start=low, group=dist.group.WORLD)
            (one * weight.to(one.dtype)).sum().backward()
            (many * weight.to(many.dtype)).sum().backward()
            # The sums of float64 depend on their order.
            near = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(many, one, **near)
            torch.testing.assert_close(part.grad, whole.grad[:, low:high], **near)
            compared += 1
    bad = x.clone()
    bad[2, cuts[-1] - 1] = torch.nan  # in the last rank's slice
    everything = torch.full((12, -(-cuts[-1] // 32)), -1, dtype=torch.int32)
    with_nan = kept_logprobs(bad[:, low:high], torch.zeros(12, dtype=torch.int64), everything, vocab_start=low)
    assert with_nan.isnan().nonzero().tolist() == [[2]]
    ids, ptr = torch.arange(12) + cuts[-1] - 6, torch.arange(13)
    with pytest.raises(
        ValueError, match=r"kept_ids .row 6.: expected each of 1 ids in one rank's slice, found 0 there"
    ):
        kept_logprobs(x[:, low:high], ids.clone(), (ids, ptr), vocab_start=low)
    with pytest.raises(ValueError, match=r"tokens = 0 .row 0.: expected -1 or one of its 1 kept ids"):
        kept_logprobs(x[:, low:high], torch.zeros(12).long(), (ids % cuts[-1], ptr), vocab_start=low)
    return compared


@pytest.mark.parametrize("cuts", [(0, 70, 100), (0, 32, 32, 101)], ids=str)
def test_ranks_that_share_a_vocabulary(cuts: tuple[int, ...], tmp_path: Path) -> None:
    """As the undivided form, to the bit, values and gradients; one rank may have nothing."""
    ranks = len(cuts) - 1
    assert in_processes(as_one_rank, ranks, tmp_path, *cuts) == [18] * ranks


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("form", ["ids", "bitmask"])
def test_on_a_gpu(form: str) -> None:
    logits = random_logits(64, 32000, torch.bfloat16)
    out, kept = sampled(logits, form, top_p=0.9, temperature=0.8)
    there = logits.cuda().requires_grad_()
    moved = tuple(part.cuda() for part in kept) if form == "ids" else kept.cuda()
    found = kept_logprobs(there, out.tokens.cuda(), moved, 0.8)
    assert ulps(found.detach().cpu(), out.logprobs) <= LOGPROB_ULP
    logits.requires_grad_()
    kept_logprobs(logits, out.tokens, kept, 0.8).sum().backward()
    found.sum().backward()
    torch.testing.assert_close(there.grad.cpu(), logits.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_is_not_waited_for() -> None:
    logits = random_logits(64, 32000)
    out, kept = sampled(logits, "ids", top_k=50, kept_capacity=64)
    there, tokens = logits.cuda().requires_grad_(), out.tokens.cuda()
    moved = tuple(part.cuda() for part in kept)
    call: Callable[[], torch.Tensor] = lambda: kept_logprobs(there, tokens, moved, 0.8, on_invalid="flag")  # noqa: E731
    call().sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
