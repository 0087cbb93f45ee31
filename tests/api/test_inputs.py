"""What comes with the logits: token ids and allowed ids of every kind, leading dimensions, penalties without ids."""

from __future__ import annotations

import warnings
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import pack_bits

import fastsample as fs
from fastsample.inputs.masks import _by_sums

B, V = 4, 70
X = torch.randn(B, V, generator=torch.Generator().manual_seed(1))
FIELDS = fs.SampleOutput.__slots__

# Token ids ------------------------------------------------------------------------------------------------------------

IDS = torch.randint(V, (B, 9), generator=torch.Generator().manual_seed(2))
LISTS: list[list[int]] = IDS.tolist()
PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.25}

KINDS: dict[str, Any] = {
    "lists": LISTS,
    "tuples": tuple(map(tuple, LISTS)),
    "int32 tensor": IDS.int(),
    "int8 tensor": IDS.to(torch.int8),
    "uint8 tensor": IDS.to(torch.uint8),
    "uint64 tensor": IDS.to(torch.uint64),
    "array": IDS.numpy(),
    "backwards array": np.ascontiguousarray(IDS.numpy()[:, ::-1])[:, ::-1],
    "read-only array": np.broadcast_to(IDS.numpy(), (B, 9)),
    "other byte order": IDS.numpy().astype(">i4"),
    "uint16 array": IDS.numpy().astype(np.uint16),
    "uint64 array": IDS.numpy().astype(np.uint64),
    "array of objects": np.array(LISTS, dtype=object),
    "list of arrays": list(IDS.numpy()),
    "list of small arrays": [row.astype(np.int8) for row in IDS.numpy()],
    "list of tensors": list(IDS),
    "tuple of int32 tensors": tuple(IDS.int()),
    "list of array.array": [array("i", row) for row in LISTS],
    "numpy integers": [[np.int64(i) for i in row] for row in LISTS],
    "numpy and Python integers": [[np.uint8(i) if i % 2 else i for i in row] for row in LISTS],
    "deque": [deque(row) for row in LISTS],
    "all kinds": [LISTS[0], tuple(LISTS[1]), IDS[2].int(), IDS[3].numpy()],
    "with padding": [[*row, -1, V, 2**40, -(2**63)] for row in LISTS],
}


@pytest.mark.parametrize("name", ["prompt_ids", "output_ids"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_token_ids(kind: str, name: str, variant: str) -> None:
    other = {"prompt_ids", "output_ids"}.difference([name]).pop()
    common = {**PENALTIES, other: IDS.flip(1) % 50, "backend": variant}
    want = fs.filter_logits(X, **{name: IDS}, **common)
    assert torch.equal(fs.filter_logits(X, **{name: KINDS[kind]}, **common), want)
    sampler, plain = (fs.Sampler(batch_size=B, seed=3, **PENALTIES, backend=variant) for _ in range(2))
    for _ in range(2):
        got = sampler(X, **{name: KINDS[kind], other: IDS})
        assert got == plain(X, **{name: IDS, other: IDS})


@pytest.mark.parametrize(
    "row", [[1, 1, 2], (1, 1, 2), range(1, 3), np.array([1, 1, 2]), torch.tensor([1, 1, 2])], ids=str
)
def test_one_row_takes_its_ids_alone(row: Any) -> None:
    want = fs.filter_logits(X[:1], output_ids=[[int(i) for i in row]], **PENALTIES)
    assert torch.equal(fs.filter_logits(X[:1], output_ids=row, **PENALTIES), want)
    assert torch.equal(fs.filter_logits(X[0], output_ids=row, **PENALTIES), want[0])
    assert torch.equal(fs.filter_logits(X[0], output_ids=[row], **PENALTIES), want[0])


def test_rows_of_different_lengths_and_none() -> None:
    given = [[5, 5], None, torch.tensor([7]), np.zeros(0, np.int64)]
    table = torch.tensor([[5, 5], [-1, -1], [7, -1], [-1, -1]])
    want = fs.filter_logits(X, output_ids=table, **PENALTIES)
    assert torch.equal(fs.filter_logits(X, output_ids=given, **PENALTIES), want)
    assert torch.equal(fs.filter_logits(X, output_ids=[None] * B, **PENALTIES), X)
    assert torch.equal(fs.filter_logits(X[0], output_ids=[None], **PENALTIES), X[0])
    assert torch.equal(fs.filter_logits(X[0], output_ids=[], **PENALTIES), X[0])


def test_no_id_is_looked_at_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight lists of 8000 ids took 70 ms so, a tensor of them 1.1 ms; now twice as long as that."""

    def slow(*_: Any) -> int:
        raise AssertionError("an id was looked at by itself")

    monkeypatch.setattr("fastsample.inputs.ids.integer", slow)
    for row in (LISTS[0], [2**31 - 1, -(2**31)], [2**31, 5], [-(2**63), 2**63 - 1], [np.int64(3), 4], range(9), []):
        fs.filter_logits(X, output_ids=[row] * B, **PENALTIES)


# Allowed ids ----------------------------------------------------------------------------------------------------------

SETS = [{1, 2, 69}, {0}, {31, 32, 63, 64, 65}, set(range(0, V, 3))]
SHARED = {0, 5, 31, 32, 64, V - 1}


def bools(*sets: set[int] | None) -> torch.Tensor:
    return torch.tensor([[own is None or i in own for i in range(V)] for own in sets])


def padded(sets: list[set[int]]) -> torch.Tensor:
    longest = max(map(len, sets))
    return torch.tensor([[*sorted(own), *[-1] * (longest - len(own))] for own in sets])


ALLOWED: dict[str, tuple[Any, torch.Tensor]] = {
    "ids of all rows": (sorted(SHARED), bools(SHARED)[0]),
    "set": (SHARED, bools(SHARED)[0]),
    "repeated, in any order": ([V - 1, 5, 5, 0, 32, 31, 64, 5], bools(SHARED)[0]),
    "range": (range(40), bools(set(range(40)))[0]),
    "tensor of ids": (torch.tensor(sorted(SHARED)), bools(SHARED)[0]),
    "uint8 tensor": (torch.tensor(sorted(SHARED), dtype=torch.uint8), bools(SHARED)[0]),
    "array of ids": (np.array(sorted(SHARED), np.int16), bools(SHARED)[0]),
    "bools of all rows": (bools(SHARED)[0], bools(SHARED)[0]),
    "array of bools": (bools(SHARED)[0].numpy(), bools(SHARED)[0]),
    "lists of ids": ([sorted(own) for own in SETS], bools(*SETS)),
    "lists and None": ([[3], None, [4, 5], None], bools({3}, None, {4, 5}, None)),
    "sets, tensors, arrays, bools": (
        [SETS[0], torch.tensor(sorted(SETS[1])), np.array(sorted(SETS[2])), bools(SETS[3])[0]],
        bools(*SETS),
    ),
    "[B, n]": (padded(SETS), bools(*SETS)),
    "array [B, n]": (padded(SETS).numpy().astype(np.int32), bools(*SETS)),
    "[B, V]": (bools(*SETS), bools(*SETS)),
    "expanded, every second": (bools(SHARED).expand(B, V).repeat_interleave(2, 1)[:, ::2], bools(*[SHARED] * B)),
}


@pytest.mark.parametrize("kind", ALLOWED)
def test_allowed_ids(kind: str, variant: str) -> None:
    given, want = ALLOWED[kind]
    kept = torch.where(want, X, -torch.inf)
    assert torch.equal(fs.filter_logits(X, allowed_ids=given, backend=variant), kept)
    mask = fs.pack_bitmask(given, V)
    assert torch.equal(mask, pack_bits(want.reshape(-1, V)).reshape(mask.shape))
    assert mask.shape == (*want.shape[:-1], 3)
    more = {"seed": 5, "num_samples": 3, "backend": variant}
    tokens = fs.sample(X, allowed_ids=given, **more)
    assert tokens == fs.sample(X, bitmask=mask, **more)
    assert torch.equal(fs.probabilities(X, allowed_ids=given, backend=variant), fs.probabilities(kept, backend=variant))
    sampler = fs.Sampler(batch_size=B, **more)
    assert sampler(X, allowed_ids=given) == tokens
    assert sampler(X) == fs.sample(X, offset=1, **more)  # what came with one step is gone in the next


@pytest.mark.parametrize("words", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [None, 1, B])
def test_a_token_must_pass_both(words: int, rows: int | None, variant: str) -> None:
    """A short mask allows nothing past its end, a long one nothing more."""
    shape = (words,) if rows is None else (rows, words)
    mask = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(3)).int()
    before = mask.clone()
    for given in (list(range(10, 70)), [list(range(i, 70)) for i in range(B)], bools(set(range(60)))[0]):
        each = (fs.filter_logits(X, **{name: v}) for name, v in (("bitmask", mask), ("allowed_ids", given)))
        want = torch.where(torch.stack([e.isfinite() for e in each]).all(0), X, -torch.inf)
        got = fs.filter_logits(X, bitmask=mask, allowed_ids=given, backend=variant)
        assert torch.equal(got, want)
    assert torch.equal(mask, before)


def test_a_row_that_allows_nothing(variant: str) -> None:
    out = fs.sample(X, allowed_ids=[[1], [], None, [2]], seed=1, on_invalid="flag", backend=variant)
    assert out.status.tolist() == [0, 3, 0, 0]
    assert out.tokens[[0, 1, 3]].tolist() == [1, -1, 2]
    for nothing in ([], torch.zeros(V, dtype=torch.bool), torch.full((B, 2), -1), np.zeros(0, np.int64)):
        with pytest.raises(ValueError, match="row 3 has no logit above -inf"):
            fs.sample(X, allowed_ids=nothing, backend=variant)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 2**20])
def test_pack_bitmask_leaves_the_bits_past_v(vocab: int) -> None:
    everything = torch.ones(2, vocab, dtype=torch.bool)
    for given in ([None, None], everything, everything.numpy(), [range(vocab)] * 2):
        assert torch.equal(fs.pack_bitmask(given, vocab), pack_bits(everything))
    assert fs.pack_bitmask(everything[0], np.int64(vocab), device="cpu").tolist() == pack_bits(everything)[0].tolist()


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
def test_bools_on_a_gpu_are_packed_alike(vocab: int) -> None:
    """There by torch's operations, which run here too."""
    table = torch.rand(3, vocab, generator=torch.Generator().manual_seed(6)) < 0.5
    assert torch.equal(_by_sums(table), pack_bits(table))
    assert torch.equal(_by_sums(table[0]), fs.pack_bitmask(table[0], vocab))


@pytest.mark.parametrize(
    ("vocab", "error", "words"),
    [(0, ValueError, "vocab_size = 0"), (2**20 + 1, ValueError, "vocab_size = "), (5.0, TypeError, "vocab_size = 5.0")],
)
def test_pack_bitmask_needs_a_vocabulary(vocab: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fs.pack_bitmask([0], vocab)
    with pytest.raises(ValueError, match=r"allowed: id 9 \(row 1\): expected 0 <= id < 9"):
        fs.pack_bitmask([[1], [9]], 9)


# Leading dimensions ---------------------------------------------------------------------------------------------------

SHAPE = (2, 3)
N = 6
CUBE = torch.randn(*SHAPE, V, generator=torch.Generator().manual_seed(4))
FLAT = CUBE.view(N, V)
PER_ROW = torch.randint(0, V, (N, 5), generator=torch.Generator().manual_seed(5))
MASKS = fs.pack_bitmask([[*range(i, V)] for i in range(N)], V)

# Arguments of [2, 3, V], and of the six rows by hand.
LEADING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "shared": ({"temperature": 0.5, "top_k": 9, "bias": {3: 1.0}}, {"temperature": 0.5, "top_k": 9, "bias": {3: 1.0}}),
    "per row": ({"top_k": [1, 2, 3, 4, 5, 6]}, {"top_k": [1, 2, 3, 4, 5, 6]}),
    "[B, T]": ({"top_k": torch.arange(6).view(2, 3)}, {"top_k": [0, 1, 2, 3, 4, 5]}),
    "array [B, T]": ({"top_p": np.full((2, 3), 0.7), "order": "joint"}, {"top_p": 0.7, "order": "joint"}),
    "[B, 1]": ({"top_k": torch.tensor([[1], [4]])}, {"top_k": [1, 1, 1, 4, 4, 4]}),
    "names [B, 1]": (
        {"ties": np.array([["first"], ["all"]]), "top_k": 3},
        {"ties": ["first"] * 3 + ["all"] * 3, "top_k": 3},
    ),
    "[1, T]": ({"temperature": np.array([[0.0, 1.0, 2.0]])}, {"temperature": [0.0, 1.0, 2.0] * 2}),
    "params": ({"params": fs.SamplingParams(top_k=[1, 2, 3] * 2)}, {"top_k": [1, 2, 3] * 2}),
    "bitmask": ({"bitmask": MASKS}, {"bitmask": MASKS}),
    "bitmask [B, T, words]": ({"bitmask": MASKS.view(2, 3, -1)}, {"bitmask": MASKS}),
    "bitmask [B, 1, words]": ({"bitmask": MASKS[:2, None]}, {"bitmask": MASKS[:2].repeat_interleave(3, 0)}),
    "bitmask [words]": ({"bitmask": MASKS[3]}, {"bitmask": MASKS[3]}),
    "ids": ({"output_ids": PER_ROW, **PENALTIES}, {"output_ids": PER_ROW, **PENALTIES}),
    "ids [B, T, L]": ({"output_ids": PER_ROW.view(2, 3, 5), **PENALTIES}, {"output_ids": PER_ROW, **PENALTIES}),
    "ids of each sequence": (
        {"prompt_ids": PER_ROW[:2, None].numpy(), **PENALTIES, "output_ids": [[]] * N},
        {"prompt_ids": PER_ROW[:2].repeat_interleave(3, 0), **PENALTIES, "output_ids": [[]] * N},
    ),
    "allowed": ({"allowed_ids": [[i] for i in range(N)]}, {"allowed_ids": [[i] for i in range(N)]}),
    "allowed [B, T, V]": ({"allowed_ids": CUBE > 0}, {"allowed_ids": FLAT > 0}),
    "allowed [B, T, n]": ({"allowed_ids": PER_ROW.view(2, 3, 5)}, {"allowed_ids": PER_ROW}),
    "bias of rows": ({"bias": [{i: 3.0} for i in range(N)]}, {"bias": [{i: 3.0} for i in range(N)]}),
}
WORDS: dict[str, tuple[Any, Any]] = {
    "a number": (7, 7),
    "per row": ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
    "[B, T]": (torch.arange(6).view(2, 3), range(6)),
    "[B, 1]": (np.array([[5], [9]]), [5, 5, 5, 9, 9, 9]),
    "[1, T]": (torch.tensor([[5, 6, 7]]), [5, 6, 7] * 2),
}


def flattened(out: fs.SampleOutput) -> fs.SampleOutput:
    return fs.SampleOutput(*(None if v is None else v.flatten(0, 1) for v in (getattr(out, n) for n in FIELDS)))


@pytest.mark.parametrize("case", LEADING)
def test_leading_dimensions(case: str, variant: str) -> None:
    given, by_hand = LEADING[case]
    for call in (fs.filter_logits, fs.probabilities):
        got = call(CUBE, **given, backend=variant)
        assert got.shape == CUBE.shape
        assert torch.equal(got.view(N, V), call(FLAT, **by_hand, backend=variant))
        buffer = torch.full(CUBE.shape, -77.0)
        assert call(CUBE, **given, backend=variant, out=buffer) is buffer
        assert torch.equal(buffer, got)
    for draws in (1, 4):
        more = {"num_samples": draws, "logprobs": "processed", "top_logprobs": 2, "backend": variant}
        got = fs.sample(CUBE, seed=3, **given, **more)
        assert got.tokens.shape == (SHAPE if draws == 1 else (*SHAPE, draws))
        assert (got.status.shape, got.top_ids.shape) == (SHAPE, (*SHAPE, 2))
        assert flattened(got) == fs.sample(FLAT, seed=3, **by_hand, **more)


@pytest.mark.parametrize("offset", WORDS)
@pytest.mark.parametrize("seed", WORDS)
def test_seeds_and_offsets_of_leading_dimensions(seed: str, offset: str) -> None:
    got = fs.sample(CUBE, seed=WORDS[seed][0], offset=WORDS[offset][0], num_samples=2)
    want = fs.sample(FLAT, seed=WORDS[seed][1], offset=WORDS[offset][1], num_samples=2)
    assert flattened(got) == want


@pytest.mark.parametrize("on_invalid", ["raise", "flag"])
def test_out_of_leading_dimensions(on_invalid: str, variant: str) -> None:
    more = {"logprobs": "raw", "top_logprobs": 2, "num_samples": 3, "on_invalid": on_invalid, "backend": variant}
    want, out = fs.sample(CUBE, seed=1, **more), fs.sample(CUBE, seed=2, **more)
    assert out != want
    assert fs.sample(CUBE, seed=1, **more, out=out) is out
    assert out == want
    with pytest.raises(ValueError, match=r"out.tokens: expected torch.int64 \[2, 3, 3\] .* got torch.int64 \[6, 3\]"):
        fs.sample(CUBE, seed=1, **more, out=flattened(out))
    with pytest.raises(ValueError, match="out: shares memory with the logits"):
        fs.filter_logits(CUBE, out=CUBE)
    tail = CUBE[:, 1:]  # no view of it has two dimensions, so that a copy is read
    with pytest.raises(ValueError, match="out: shares memory with the logits"):
        fs.filter_logits(tail, out=CUBE.view(-1)[: 4 * V].view(2, 2, V))
    integers = CUBE.view(torch.int64).view(-1)
    with pytest.raises(ValueError, match=r"out.tokens: shares memory with the logits"):
        fs.sample(tail, seed=1, out=fs.SampleOutput(integers[36:40].view(2, 2), torch.zeros(2, 2, dtype=torch.int32)))


VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "last positions": lambda: CUBE[:, -2:],
    "transposed": lambda: CUBE.transpose(0, 1),
    "expanded": lambda: CUBE[:1].expand(4, 3, V),
    "part of a row": lambda: CUBE[..., 3:40],
    "half": lambda: CUBE.half(),
    "four dimensions": lambda: CUBE.view(1, 2, 3, V),
    "one of each": lambda: CUBE[:1, :1],
    "no rows": lambda: CUBE[:0],
    "no positions": lambda: CUBE[:, :0],
    "one token": lambda: CUBE[..., :1],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_with_leading_dimensions(view: str, variant: str) -> None:
    x = VIEWS[view]()
    table = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_zeros(0, V)
    before = x.clone()
    want = fs.filter_logits(table, top_k=5, backend=variant)
    assert torch.equal(fs.filter_logits(x, top_k=5, backend=variant), want.view(x.shape))
    tokens = fs.sample(x, seed=4, backend=variant).tokens
    assert torch.equal(tokens, fs.sample(table, seed=4, backend=variant).tokens.view(x.shape[:-1]))
    assert torch.equal(x, before)


def test_errors_of_leading_dimensions() -> None:
    bad = CUBE.clone()
    bad[1, 2, 7] = torch.nan
    for call in (fs.sample, fs.filter_logits, fs.probabilities):
        with pytest.raises(ValueError, match=r"row 5 \(1, 2\) has a NaN"):
            call(bad)
    assert fs.sample(bad, on_invalid="flag").status.tolist() == [[0, 0, 0], [0, 0, 1]]
    refused: list[tuple[dict[str, Any], str]] = [
        (
            {"top_k": torch.ones(3, 2, dtype=torch.int64)},
            r"top_k: expected shape \[2, 3\] like the logits', got \(3, 2\)",
        ),
        ({"seed": torch.ones(2, 2, dtype=torch.int64)}, r"seed: expected shape \[2, 3\]"),
        ({"offset": np.array([[0, 1, -2], [0, 0, 0]])}, r"offset = -2 \(row 2\)"),
        ({"top_p": torch.ones(2, 3).to_sparse()}, "top_p: expected a dense tensor"),
        ({"bitmask": MASKS.view(2, 3, -1).to("meta")}, "bitmask: expected a dense tensor"),
        ({"seed": [1, 2]}, r"seed: expected one int or 6 seeds \(one per row\), got 2"),
        ({"top_p": [0.5, 0.5]}, "top_p: expected one value for all rows or 6 values"),
        ({"bitmask": MASKS[:2]}, r"bitmask: expected shape \[6, words\]"),
        ({"bitmask": MASKS.view(3, 2, -1)}, r"bitmask: expected shape \[2, 3, ...\]"),
        ({"output_ids": [[1], [2]]}, r"output_ids: expected one list of token ids per row \(6\), got 2"),
        ({"allowed_ids": [[1], [2]]}, "allowed_ids: expected ids for all rows or 6 rows, got 2"),
        ({"top_k": np.array([[1, 2, -3], [1, 1, 1]])}, r"top_k = -3 \(row 2\)"),
    ]
    for kwargs, words in refused:
        with pytest.raises(ValueError, match=words):
            fs.sample(CUBE, **kwargs)


# Penalties without ids ------------------------------------------------------------------------------------------------

GIVEN = [[1]] * B
IDLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"presence_penalty": 0.5}, {}, "presence_penalty has no effect without output_ids"),
    ({"frequency_penalty": -0.5}, {"prompt_ids": GIVEN}, "frequency_penalty has no effect without output_ids"),
    ({"repetition_penalty": 1.1}, {}, "repetition_penalty has no effect without prompt_ids or output_ids"),
    ({"presence_penalty": [0.0, 0.0, 0.5, 0.0]}, {}, "presence_penalty has no effect"),
    (dict(PENALTIES), {}, "repetition_penalty .*; frequency_penalty .*; presence_penalty .* pass the ids so far"),
    (dict(PENALTIES), {"prompt_ids": GIVEN}, "^frequency_penalty .*; presence_penalty "),
    ({"dry_multiplier": 0.8}, {}, "dry_multiplier has no effect without prompt_ids or output_ids"),
    ({"dry_multiplier": 0.8}, {"dry_breakers": [3]}, "dry_multiplier has no effect"),
    ({"no_repeat_ngram_size": [0, 0, 2, 0]}, {}, "no_repeat_ngram_size has no effect without prompt_ids or output_ids"),
]
BUSY: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": [0.0] * B}, {}),
    ({"repetition_penalty": 1.1}, {"prompt_ids": GIVEN}),
    ({"dry_multiplier": 0.8, "no_repeat_ngram_size": 3}, {"prompt_ids": GIVEN, "dry_breakers": [3]}),
    ({"dry_multiplier": 0.0, "dry_base": 3.0, "dry_allowed_length": 1, "dry_range": 5}, {"dry_breakers": [3]}),
    ({"repetition_penalty": 1.1}, {"prompt_ids": [[]] * B}),
    (dict(PENALTIES), {"output_ids": [[]] * B}),
    (dict(PENALTIES), {"output_ids": torch.zeros(B, 0, dtype=torch.int64)}),
    (dict(PENALTIES), {"output_ids": GIVEN}),
]


def calls(fields: dict[str, Any], ids: dict[str, Any]) -> list[Callable[[], Any]]:
    params = fs.SamplingParams(**fields)
    sampler = fs.Sampler(params, batch_size=B, seed=1)
    changed = fs.Sampler(batch_size=B, seed=1)
    changed.set_row(2, **{name: value[2] if isinstance(value, list) else value for name, value in fields.items()})
    return [
        lambda: fs.sample(X, **fields, **ids),
        lambda: fs.sample(X, params, **ids),
        lambda: fs.sample(X, params, **ids),  # its packed form is known now
        lambda: fs.filter_logits(X, **fields, **ids),
        lambda: fs.probabilities(X, params, **ids),
        lambda: sampler(X, **ids),
        lambda: changed(X, **ids),
    ]


@pytest.mark.parametrize(("fields", "ids", "words"), IDLE, ids=str)
def test_a_penalty_without_ids_is_told_of(fields: dict[str, Any], ids: dict[str, Any], words: str) -> None:
    for call in calls(fields, ids):
        with pytest.warns(UserWarning, match=words) as caught:
            call()
        assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize(("fields", "ids"), BUSY, ids=str)
def test_a_penalty_with_ids_is_not(fields: dict[str, Any], ids: dict[str, Any]) -> None:
    for call in calls(fields, ids):
        call()  # pytest makes an error of a warning


def test_once_per_place() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            fs.sample(X, presence_penalty=0.5)
        for _ in range(3):
            fs.filter_logits(X, presence_penalty=0.5)
    assert len(caught) == 2


def test_a_slot_that_is_reset_is_not_told_of() -> None:
    sampler = fs.Sampler(batch_size=B, seed=1)
    sampler.set_row(1, presence_penalty=0.5, seed=1)
    sampler.reset_row(1)
    sampler(X)


def test_what_is_wrong_comes_before_what_is_idle() -> None:
    with pytest.raises(ValueError, match="seed"):
        fs.sample(X, presence_penalty=0.5, seed=[1])
