"""Sampler: some of its slots in a step (`rows=`), what set_row keeps, and what it tells of itself."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample.params import specs

B, V = 6, 300
BACKENDS = ("reference", "cpu")
LOGITS = torch.randn(B, V, generator=torch.Generator().manual_seed(4)) * 2
FIELDS: dict[str, Any] = {"temperature": [0.5, 0.8, 1.0, 1.3, 0.0, 2.0], "top_k": [0, 5, 40, 9, 3, 100]}
IDS = torch.randint(-1, V, (B, 9), generator=torch.Generator().manual_seed(5))
MASK = torch.randint(-(2**31), 2**31, (B, 10), generator=torch.Generator().manual_seed(6)).to(torch.int32)


def made(**more: Any) -> fs.Sampler:
    return fs.Sampler(**{"batch_size": B, "seed": 7, **FIELDS, **more})


def drawn(sampler: fs.Sampler, slots: list[int], x: torch.Tensor, **inputs: Any) -> fs.SampleOutput:
    """What a step of these slots must give, drawn without the Sampler."""
    params = sampler.params
    fields = {name: getattr(params, name) for name in params.__dataclass_fields__}
    fields = {
        name: value[slots] if isinstance(value, torch.Tensor) else [value[s] for s in slots]
        for name, value in fields.items()
    }
    return fs.sample(x, seed=sampler.seeds[slots], offset=sampler.offsets[slots], **fields, **inputs)


# Which slots ----------------------------------------------------------------------------------------------------------

INDICES: dict[str, tuple[Any, list[int]]] = {
    "list": ([4, 0, 3], [4, 0, 3]),
    "tuple": ((5, 1), [5, 1]),
    "range": (range(5, 0, -2), [5, 3, 1]),
    "neighbours": ([2, 3, 4], [2, 3, 4]),
    "slice": (slice(1, 4), [1, 2, 3]),
    "slice with a step": (slice(None, None, 3), [0, 3]),
    "tensor": (torch.tensor([3, 1, 0, 5]), [3, 1, 0, 5]),
    "int32 tensor": (torch.tensor([3, 1], dtype=torch.int32), [3, 1]),
    "strided tensor": (torch.tensor([3, 9, 1, 9])[::2], [3, 1]),
    "array": (np.array([4, 2]), [4, 2]),
    "numbers of numpy's": ([np.int64(4), np.int8(2)], [4, 2]),
    "mask": (torch.tensor([True, False, False, True, True, False]), [0, 3, 4]),
    "mask in an array": (np.array([False, True, False, False, False, True]), [1, 5]),
    "number": (3, [3]),
    "all": (range(B), list(range(B))),
    "all in another order": (list(range(B))[::-1], list(range(B))[::-1]),
    "none": ([], []),
}


@pytest.mark.parametrize(("rows", "slots"), INDICES.values(), ids=INDICES)
def test_rows(rows: Any, slots: list[int], variant: str) -> None:
    """Row i of the logits belongs to slot rows[i]: its parameters, seed and offset, which alone advances."""
    sampler = made(offset=[0, 10, 20, 30, 40, 50], logprobs="processed", backend=variant)
    for step in range(3):
        x = LOGITS[slots] + step
        want = drawn(sampler, slots, x, logprobs="processed", backend=variant)
        assert sampler(x, rows=rows) == want
    assert sampler.offsets.tolist() == [10 * s + 3 * (s in slots) for s in range(B)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_a_step_of_all_and_of_others_take_turns(backend: str) -> None:
    """At random, with slots given away in between, held against one Sampler per slot."""
    rng = random.Random(0)
    together = fs.Sampler(batch_size=B, seed=3, temperature=1.5, backend=backend)
    alone = [fs.Sampler(batch_size=1, seed=[int(s)], temperature=1.5, backend=backend) for s in together.seeds]
    indices: list[Any] = [[4, 0, 3], [0, 1], slice(2, 5), torch.tensor([5, 2]), None]
    for _ in range(150):
        if rng.random() < 0.2:
            slot, seed, offset = rng.randrange(B), rng.randrange(99), rng.randrange(9)
            for sampler, row in ((together, slot), (alone[slot], 0)):
                sampler.set_row(row, seed=seed, offset=offset, temperature=0.5 + seed)
        elif rng.random() < 0.1:
            slot = rng.randrange(B)
            together.reset_row(slot)
            alone[slot].reset_row(0)
        else:
            rows = rng.choice(indices)
            slots = list(range(B)) if rows is None else torch.arange(B)[rows].tolist()
            x = LOGITS[slots].roll(rng.randrange(V), 1)
            want = torch.cat([alone[slot](row[None]).tokens for slot, row in zip(slots, x, strict=True)])
            assert torch.equal(together(x, rows=rows).tokens, want)
    assert together.offsets.tolist() == [int(sampler.offsets) for sampler in alone]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [[4, 0, 3], slice(1, 4)], ids=str)
@pytest.mark.parametrize(
    "inputs",
    [
        {"bitmask": MASK[:3], "prompt_ids": IDS[3:], "output_ids": IDS[:3]},
        {"bias": [{5: 9.0}, None, {7: -torch.inf, 8: 3.0}]},
        {"bias": {5: 9.0}, "prompt_ids": [[5], [], [7, 8]]},
        {"output_ids": [[5, 5], [], [7, 8]], "prompt_ids": IDS[:3].int()},
        {"allowed_ids": [[5, 6], [7], [1, 2, 3]]},
    ],
    ids=lambda value: " ".join(value),
)
def test_inputs_belong_to_the_rows_given(inputs: dict[str, Any], rows: Any, backend: str) -> None:
    counted = {"prompt_ids", "output_ids"} <= inputs.keys()
    penalties = {"repetition_penalty": 1.7, "frequency_penalty": 0.5} if counted else {}
    sampler = made(**penalties, backend=backend)
    slots = torch.arange(B)[rows].tolist()
    out = None
    for _ in range(3):
        want = drawn(sampler, slots, LOGITS[slots], **inputs, backend=backend)
        got = sampler(LOGITS[slots], rows=rows, out=out, **inputs)
        assert got == want
        assert out is None or got is out
        out = got


def test_slots_are_gathered_by_torch_as_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does."""
    monkeypatch.setattr("fastsample.slots._is_numpys", lambda tensor: False)
    sampler = made()
    for step in range(4):
        want = drawn(sampler, [4, 0, 3], LOGITS[:3])
        with torch.inference_mode(step == 2):
            assert torch.equal(sampler(LOGITS[:3], rows=[4, 0, 3]).tokens, want.tokens)
        sampler.set_row(3, seed=step, offset=9)
    assert sampler.offsets.tolist() == [4, 0, 0, 9, 4, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
def test_some_slots_on_a_gpu() -> None:
    """Also in a captured graph, which sees what set_row changes between its replays."""
    rows, x = [4, 0, 3], LOGITS[:3].cuda()
    here, there = (made(on_invalid="flag") for _ in range(2))
    for _ in range(3):
        assert torch.equal(there(x, rows=rows).tokens.cpu(), here(LOGITS[:3], rows=rows).tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = there(x, rows=rows).tokens
    for step in range(3):
        graph.replay()
        assert torch.equal(tokens.cpu(), here(LOGITS[:3], rows=rows).tokens), step
        for sampler in (here, there):
            sampler.set_row(3, seed=step, offset=9, temperature=0.5 + step)
    assert torch.equal(there.offsets.cpu(), here.offsets)


def test_an_index_may_change_in_place() -> None:
    """A list and a tensor are read at each step."""
    for rows in ([0, 1, 3], torch.tensor([0, 1, 3]), np.array([0, 1, 3])):
        sampler = made()
        sampler(LOGITS[:3], rows=rows)
        rows[2] = 5
        want = drawn(sampler, [0, 1, 5], LOGITS[:3])
        assert sampler(LOGITS[:3], rows=rows) == want
        assert sampler.offsets.tolist() == [2, 2, 0, 1, 0, 1]


def test_a_mask_is_no_list_of_numbers() -> None:
    """[False, True] == [0, 1], which a step before may have had."""
    sampler = fs.Sampler(batch_size=2, seed=1)
    sampler(LOGITS[:2], rows=[0, 1])
    sampler(LOGITS[:1], rows=torch.tensor([False, True]))
    assert sampler.offsets.tolist() == [1, 2]
    with pytest.raises(TypeError, match=r"rows\[0\] = False: expected the number of a slot"):
        sampler(LOGITS[:2], rows=[False, True])
    with pytest.raises(TypeError, match=r"rows: expected integers or a mask of bool, got torch\.float32"):
        sampler(LOGITS[:2], rows=torch.tensor([0.0, 1.0]))


def test_shapes_of_rows() -> None:
    sampler = made(num_samples=2)
    assert sampler(LOGITS[3], rows=3).tokens.shape == (2,)
    assert sampler(LOGITS[3:4], rows=3).tokens.shape == (1, 2)
    assert sampler(LOGITS[:0], rows=[]).tokens.shape == (0, 2)
    assert sampler(LOGITS[:0], rows=slice(0, 0)).status.shape == (0,)
    assert sampler.offsets.tolist() == [0, 0, 0, 2, 0, 0]


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "twice": ([0, 4, 0], ValueError, r"rows\[2\] = 0: expected distinct slots, and rows\[0\] is 0 too"),
    "too high": ([0, 1, 6], ValueError, r"rows\[2\] = 6: expected a slot, 0 <= slot < 6"),
    "negative": ([0, 1, -1], ValueError, r"rows\[2\] = -1: expected a slot, 0 <= slot < 6"),
    "tensor": (torch.tensor([2, 2, 1]), ValueError, r"rows\[1\] = 2: expected distinct"),
    "fewer": ([0, 1], ValueError, "logits: expected 2 rows, one for each slot of `rows`, got 3"),
    "more": (slice(0, 4), ValueError, "logits: expected 4 rows, one for each slot of `rows`, got 3"),
    "fraction": ([0, 1, 2.0], TypeError, r"rows\[2\] = 2.0: expected the number of a slot"),
    "floats": (np.array([0.0, 1, 2]), TypeError, r"rows"),
    "words": ("abc", TypeError, r"rows = 'abc': expected the number of a slot, or a list"),
    "bool": (True, TypeError, "rows = True: expected the number of a slot"),
    "table": (torch.tensor([[0, 1, 2]]), ValueError, r"rows: expected shape \[n\], got \(1, 3\)"),
    "short mask": (torch.ones(3, dtype=torch.bool), ValueError, r"rows: expected shape \[6\] of a mask, got \(3,\)"),
    "slice": (slice("a", None), TypeError, "rows = slice.*: expected a slice of integers"),
    "fake": (torch.tensor([0, 1, 2], device="meta"), ValueError, "rows: expected a dense tensor"),
}


@pytest.mark.parametrize(("rows", "error", "words"), BAD.values(), ids=BAD)
def test_bad_rows(rows: Any, error: type[Exception], words: str) -> None:
    sampler = made()
    for _ in range(2):
        with pytest.raises(error, match=f"^{words}"):
            sampler(LOGITS[:3], rows=rows)
        assert sampler.offsets.tolist() == [0] * B
        sampler(LOGITS[:3], rows=[0, 1, 2])  # what is known of another index changes nothing
        sampler.reset_row(0), sampler.reset_row(1), sampler.reset_row(2)


def test_logits_of_three_dimensions_are_no_slots() -> None:
    sampler = made()
    with pytest.raises(ValueError, match=r"logits: expected \[3, V\], a row per slot"):
        sampler(LOGITS[:3, None], rows=[0, 1, 3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [[4, 0, 3], slice(1, 4)], ids=str)
def test_after_an_error_no_offset_has_moved(rows: Any, backend: str) -> None:
    sampler = made(backend=backend)
    out = copy.deepcopy(sampler(LOGITS[:3], rows=rows))
    before, held = sampler.offsets, copy.deepcopy(out)
    broken = LOGITS[:3].clone()
    broken[1, 3] = torch.nan
    for target in (None, out):
        with pytest.raises(ValueError, match="logits: row 1 has a NaN logit"):
            sampler(broken, rows=rows, out=target)
        with pytest.raises(TypeError, match="bitmask: expected int32"):
            sampler(LOGITS[:3], rows=rows, bitmask=MASK[:3].long(), out=target)
    assert torch.equal(sampler.offsets, before)
    assert out == held
    flagged = made(backend=backend, on_invalid="flag")
    assert flagged(broken, rows=rows).status.tolist() == [0, 1, 0]
    assert flagged.offsets.sum() == 3


def test_buffers_apart_from_the_slots_read() -> None:
    sampler = made()
    memory = torch.zeros(3, V)
    out = fs.SampleOutput(memory[0, :6].view(torch.int64), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"out\.tokens: shares memory with the logits"):
        sampler(memory, rows=[0, 2, 5], out=out)


def test_rows_in_inference_mode_and_outside() -> None:
    plain, mixed = made(), made()
    for step in range(4):
        want = plain(LOGITS[:2], rows=[5, 1])
        with torch.inference_mode(step % 2 == 0):
            got = mixed(LOGITS[:2], rows=[5, 1])
        assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(mixed.offsets, plain.offsets)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_has_slots_of_its_own(duplicate: Callable[[fs.Sampler], fs.Sampler]) -> None:
    sampler = made()
    sampler(LOGITS[:2], rows=[5, 1])
    sampler.set_row(2, top_p=0.5, seed=9)
    other = duplicate(sampler)
    assert repr(other) == repr(sampler)
    assert other(LOGITS[:2], rows=[5, 1]) == sampler(LOGITS[:2], rows=[5, 1])
    other(LOGITS[:2], rows=[5, 1])
    assert sampler.offsets.tolist() == [0, 2, 0, 0, 0, 2]
    other.reset_row(2)
    assert other.params.top_p.tolist() == [1.0] * B  # type: ignore[union-attr]


def test_a_pickle_from_before_a_parameter_existed() -> None:
    """Its slots have the default of what is newer; its options too."""
    sampler = made(logprobs="raw", p_less=False)
    sampler.set_row(2, top_p=0.5, seed=9, offset=3)
    state = sampler.__getstate__()
    known = [name for name, _ in specs()].index("top_n_sigma")  # the first that version 0.1 had not
    initial, records, *words = state["columns"]
    old = {**state, "options": state["options"][:5]}
    old["columns"] = [[row[:known] for row in initial], [row[:known] for row in records], *words]
    restored = fs.Sampler.__new__(fs.Sampler)
    restored.__setstate__(old)
    assert repr(restored) == repr(sampler)
    assert restored.params == sampler.params
    assert restored(LOGITS) == sampler(LOGITS)
    restored.set_row(1, typical_p=0.5)
    restored.reset_row(1)
    sampler.reset_row(1)
    assert restored(LOGITS) == sampler(LOGITS)


# What a slot is given -------------------------------------------------------------------------------------------------


def test_set_row_keeps_what_is_not_given() -> None:
    """The Sampler's own value of a field, whatever set_row gave the slot since; the slot's seed."""
    sampler = fs.Sampler(batch_size=3, seed=5, temperature=0.7, top_p=[0.5, 0.6, 0.9], top_k=4, order="joint")
    seeds = sampler.seeds
    sampler.set_row(2, temperature=0.2)
    params = sampler.params
    assert torch.equal(torch.as_tensor(params.temperature), torch.tensor([0.7, 0.7, 0.2]))
    assert torch.equal(torch.as_tensor(params.top_p), torch.tensor([0.5, 0.6, 0.9]))
    assert params.order == ("joint", "joint", "joint")
    sampler.set_row(2, top_k=9)
    params = sampler.params
    assert torch.equal(torch.as_tensor(params.temperature), torch.tensor([0.7, 0.7, 0.7]))
    assert torch.equal(torch.as_tensor(params.top_k), torch.tensor([4, 4, 9]))
    assert torch.equal(sampler.seeds, seeds)
    sampler.set_row(2, seed=11, offset=4)
    sampler.set_row(2)
    assert sampler.seeds.tolist() == [*seeds[:2].tolist(), 11]
    assert sampler.offsets.tolist() == [0, 0, 0]
    assert torch.equal(torch.as_tensor(sampler.params.top_k), torch.tensor([4, 4, 4]))


def test_set_row_with_params_gives_every_field() -> None:
    sampler = fs.Sampler(batch_size=2, seed=5, temperature=0.7, top_p=0.5)
    sampler.set_row(1, fs.SamplingParams(top_k=3), temperature=0.4)
    params = sampler.params
    for name, value in {"temperature": [0.7, 0.4], "top_p": [0.5, 1.0], "top_k": [0, 3]}.items():
        assert torch.equal(torch.as_tensor(getattr(params, name)).float(), torch.tensor(value))


def test_set_row_refuses_before_anything_changes() -> None:
    sampler = fs.Sampler(batch_size=2, seed=5, temperature=0.7)
    before = repr(sampler), sampler.seeds
    for more in ({"temperature": -1.0}, {"seed": 2**64}, {"offset": -1}, {"temprature": 1.0}, {"top_k": [1, 2]}):
        with pytest.raises((TypeError, ValueError), match=next(iter(more))):
            sampler.set_row(1, **{"temperature": 0.1, **more})
    assert (repr(sampler), sampler.seeds.tolist()) == (before[0], before[1].tolist())


# What it tells of itself ----------------------------------------------------------------------------------------------


def test_attributes_are_copies() -> None:
    sampler = made(offset=[2**64 - 1, *range(1, B)])
    assert (sampler.seeds.dtype, sampler.offsets.dtype) == (torch.int64, torch.int64)
    assert sampler.offsets.tolist() == [-1, *range(1, B)]
    want = [drawn(sampler, list(range(B)), LOGITS), drawn(sampler, list(range(B)), LOGITS)]
    sampler.seeds.zero_()
    sampler.offsets.fill_(99)
    torch.as_tensor(sampler.params.temperature).zero_()
    assert [sampler(LOGITS)] == want[:1]
    twin = fs.Sampler(sampler.params, batch_size=B, seed=sampler.seeds, offset=sampler.offsets)
    assert twin(LOGITS) == sampler(LOGITS)


def test_repr() -> None:
    assert repr(fs.Sampler(batch_size=3, seed=1)) == "Sampler(batch_size=3, offsets=0)"
    sampler = fs.Sampler(batch_size=3, seed=1, temperature=0.8, top_p=[0.9, 0.9, 0.5], logprobs="raw", backend="cpu")
    sampler.set_row(1, seed=2, offset=2**64 - 1, ties="all")
    told = (
        "Sampler(batch_size=3, temperature=0.8, top_p=[0.9, 0.9, 0.5], ties=['first', 'all', 'first'], "
        "logprobs='raw', backend='cpu', offsets=[0, 18446744073709551615, 0])"
    )
    assert repr(sampler) == told
    flags = fs.Sampler(batch_size=2, seed=1, p_less=[True, False], dry_range=8, input="probs")
    told = "Sampler(batch_size=2, p_less=[True, False], dry_range=8, input='probs', offsets=0)"
    assert repr(flags) == told
    long = fs.Sampler(batch_size=100, seed=1, offset=torch.arange(100))
    assert repr(long) == "Sampler(batch_size=100, offsets=[0, 1, 2, 3, ..., 98, 99])"
