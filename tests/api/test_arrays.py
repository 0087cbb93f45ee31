"""Arrays in the place of tensors: of NumPy, of whatever has DLPack or the array interface, and of real libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample.arrays import as_array, as_tensor
from fastsample.training import kept_logprobs

V = 700
X = np.random.default_rng(7).standard_normal((3, V)).astype(np.float32) * 4
FIELDS: dict[str, Any] = {"top_k": 40, "top_p": 0.9, "seed": 5, "logprobs": "processed", "kept": "ids"}


class DLPack:
    """An array of a library that has nothing but DLPack."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __dlpack__(self, **how: Any) -> Any:
        return self._values.__dlpack__(**how)

    def __dlpack_device__(self) -> Any:
        return self._values.__dlpack_device__()


class Interface:
    """An array of a library that has nothing but NumPy's interface."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self._values = values
        self.__array_interface__ = values.__array_interface__


class Broken:
    def __dlpack__(self, **how: Any) -> Any:
        raise BufferError("the memory is on another planet")

    def __dlpack_device__(self) -> Any:
        return (1, 0)

    def __array__(self, *_: Any, **how: Any) -> Any:
        raise RuntimeError("nor can it be copied")


def read_only(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values = values.copy()
    values.flags.writeable = False
    return values


def of_jax(values: np.ndarray[Any, Any]) -> Any:
    return pytest.importorskip("jax.numpy").asarray(values)


def of_mlx(values: np.ndarray[Any, Any]) -> Any:
    return pytest.importorskip("mlx.core").array(values)


def of_onnxruntime(values: np.ndarray[Any, Any]) -> Any:
    return pytest.importorskip("onnxruntime").OrtValue.ortvalue_from_numpy(values)


SAME_MEMORY: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "numpy": lambda values: values,
    "read-only": read_only,
    "padded rows": lambda values: np.concatenate([values, values], -1)[..., : values.shape[-1]],
    "dlpack": DLPack,
    "dlpack of torch": lambda values: DLPack(torch.from_numpy(values)),
    "array interface": Interface,
    "jax": of_jax,
    "mlx": of_mlx,
    "onnxruntime": of_onnxruntime,
}
COPIED: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "reversed": lambda values: values[..., ::-1].copy()[..., ::-1],
    "foreign byte order": lambda values: values.astype(values.dtype.newbyteorder()),
}
of_every_kind = pytest.mark.parametrize("kind", [*SAME_MEMORY, *COPIED])
of_torch = torch.from_numpy


def make(kind: str, values: np.ndarray[Any, Any]) -> Any:
    return (SAME_MEMORY | COPIED)[kind](values)


@of_every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_logits(kind: str, dtype: Any) -> None:
    x = X.astype(dtype)
    logits, tensor = make(kind, x), of_torch(x)
    assert fs.sample(logits, **FIELDS) == fs.sample(tensor, **FIELDS)
    assert torch.equal(fs.filter_logits(logits, min_p=0.1), fs.filter_logits(tensor, min_p=0.1))
    assert torch.equal(fs.probabilities(logits, min_p=0.1), fs.probabilities(tensor, min_p=0.1))
    own, theirs = (fs.Sampler(batch_size=3, seed=2, top_k=9) for _ in range(2))
    for _ in range(3):
        assert own(logits) == theirs(tensor)
    assert fs.explain(logits, seed=1).to_dict() == fs.explain(tensor, seed=1).to_dict()


@pytest.mark.parametrize("kind", SAME_MEMORY)
def test_the_memory_is_the_arrays_own(kind: str) -> None:
    given = make(kind, X)
    shared = as_tensor("logits", given)
    assert np.array_equal(shared.numpy(), X)
    if kind == "jax":
        where = given.unsafe_buffer_pointer()
    elif kind == "onnxruntime":
        where = given.data_ptr()
    elif kind == "mlx":
        where = np.array(given, copy=False).ctypes.data
    elif kind == "dlpack of torch":
        where = given._values.data_ptr()
    else:
        where = getattr(given, "_values", given).ctypes.data
    assert shared.data_ptr() == where


def test_the_array_lives_as_long_as_the_tensor() -> None:
    """The memory of a read-only array is not given back while a tensor over it is in use."""
    shared = as_tensor("logits", read_only(X))
    for _ in range(50):
        np.full(X.shape, np.nan, np.float32)
    assert np.array_equal(shared.numpy(), X)


def test_bfloat16() -> None:
    tensor = of_torch(X).bfloat16()
    want = fs.sample(tensor, **FIELDS)
    assert fs.sample(DLPack(tensor), **FIELDS) == want
    jax = pytest.importorskip("jax.numpy")
    assert fs.sample(jax.asarray(X, dtype=jax.bfloat16), **FIELDS) == want
    assert fs.sample(np.asarray(jax.asarray(X, dtype=jax.bfloat16)), **FIELDS) == want


@of_every_kind
def test_everything_beside_the_logits(kind: str) -> None:
    """Parameters, seeds, positions, masks, biases and ids."""
    rng = np.random.default_rng(1)
    ids = {name: rng.integers(0, V, (3, 6)) for name in ("prompt_ids", "output_ids")}
    given: dict[str, np.ndarray[Any, Any]] = {
        **ids,
        "temperature": np.array([0.5, 1, 2], np.float32),
        "top_k": np.array([5, 50, 0], np.int32),
        "frequency_penalty": np.array([0, 0.5, 1], np.float32),
        "seed": np.array([3, 4, 5]),
        "offset": np.array([0, 7, 2**30]),
        "bitmask": rng.integers(-(2**31), 2**31, (3, -(-V // 32))).astype(np.int32),
        "dry_breakers": np.array([1, 2]),
    }
    allowed = rng.random((3, V)) < 0.5
    bias = (np.array([0, 1, 1, 2]), np.array([4, 9]), np.array([3.0, -2.0], np.float32))
    more = {"dry_multiplier": 0.5, "allowed_ids": of_torch(allowed), "bias": tuple(map(of_torch, bias))}
    want = fs.sample(of_torch(X), **{name: of_torch(values) for name, values in given.items()}, **more)
    mine = {name: make(kind, values) for name, values in given.items()}
    more |= {"bias": tuple(make(kind, part) for part in bias)}
    more |= {"allowed_ids": make(kind, allowed) if kind != "onnxruntime" else allowed}
    assert fs.sample(make(kind, X), **mine, **more) == want
    assert fs.sample(X, **mine | {"prompt_ids": [make(kind, row) for row in ids["prompt_ids"]]}, **more) == want


@of_every_kind
def test_drafts(kind: str) -> None:
    logits = np.stack([X, X + 1, X[::-1]])
    drafts = fs.sample(of_torch(logits), seed=1).tokens.numpy()[:, :2]
    laws = np.random.default_rng(2).random((3, 2, V)).astype(np.float32)
    for options in ({}, {"rule": "chain", "draft_probs": laws}, {"rule": "block", "draft_logits": laws}):
        mine, theirs = dict(options), dict(options)
        for name in ("draft_probs", "draft_logits"):
            if name in options:
                mine[name], theirs[name] = make(kind, laws), of_torch(laws)
        got = fs.verify(make(kind, logits), make(kind, drafts), seed=4, **mine).numpy()
        want = fs.verify(of_torch(logits), of_torch(drafts), seed=4, **theirs).numpy()
        assert all(np.array_equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))
    parents = np.array([[-1, 0, 0]] * 3)
    nodes = np.concatenate([np.full((3, 1), -1), drafts], 1)
    tree = fs.verify_tree(make(kind, logits), make(kind, nodes), make(kind, parents), seed=4)
    assert torch.equal(tree.tokens, fs.verify_tree(*map(of_torch, (logits, nodes, parents)), seed=4).tokens)


@of_every_kind
def test_what_a_trainer_needs(kind: str) -> None:
    out = fs.sample(of_torch(X), **FIELDS).numpy()
    kept = (make(kind, out.kept_ids), make(kind, out.kept_row_ptr))
    found = kept_logprobs(make(kind, X), make(kind, out.tokens), kept, make(kind, np.ones(3, np.float32)))
    assert np.allclose(found.numpy(), out.logprobs, rtol=1e-6)


def test_negative_positions_of_an_array_are_no_bits() -> None:
    for make_array in (np.asarray, DLPack, Interface):
        with pytest.raises(ValueError, match=r"offset = -1 \(row 1\): expected"):
            fs.sample(X, seed=1, offset=make_array(np.array([0, -1, 2])))
    assert fs.sample(X, seed=1, offset=torch.tensor([0, -1, 2])).tokens.shape == (3,)


def test_slots() -> None:
    sampler, other = (fs.Sampler(batch_size=4, seed=2) for _ in range(2))
    assert sampler(X, rows=DLPack(np.array([3, 0, 1]))) == other(X, rows=[3, 0, 1])
    assert sampler(X, rows=Interface(np.array([True, False, True, True]))) == other(X, rows=[0, 2, 3])


def test_numbers_of_numpy_stay_numbers() -> None:
    want = fs.sample(X, seed=3, temperature=0.5, top_k=7)
    assert fs.sample(X, seed=np.int64(3), temperature=np.float64(0.5), top_k=np.int32(7)) == want
    assert fs.sample(X, seed=np.array(3), temperature=np.array(0.5), top_k=DLPack(np.array(7))) == want


def test_what_is_no_array_comes_back() -> None:
    for value in (None, 3, [1.0], "text", {1: 2.0}, torch.ones(2), object):
        assert as_array("x", value) is value
        assert as_tensor("x", value) is value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", [[0.0]], "logits: expected a tensor or an array, got list"),
        ("logits", np.array([["a"]]), "logits: expected numbers, got an array of <U1"),
        ("logits", X.astype(np.float64), "logits: expected float32, float16 or bfloat16, got torch.float64"),
        ("logits", Broken(), r"logits: cannot read the memory of a .*Broken \(__dlpack__: .*planet; np.asarray: nor"),
        ("bitmask", np.ones((3, 22)), "bitmask: expected int32 words, got torch.float64"),
        ("prompt_ids", np.ones((3, 2)), "prompt_ids: expected integers, got an array of float64"),
        ("bias", (np.array([0, 1]), np.array([1]), np.array([1])), "bias values: expected float32, got torch.int64"),
        ("temperature", Broken(), "temperature: cannot read the memory"),
        ("seed", Interface(np.array([0.5, 1, 2])), "seed: expected integers, got torch.float64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arrays(name: str, value: Any, message: str) -> None:
    given = {"logits": X, "frequency_penalty": 1.0, "output_ids": [[], [], []]} | {name: value}
    with pytest.raises((TypeError, ValueError), match=message):
        fs.sample(given.pop("logits"), **{"seed": 1, **given})


def test_outputs_as_arrays() -> None:
    out = fs.sample(X, **FIELDS, top_logprobs=3, kept_mass=True, entropy=True)
    arrays = out.numpy()
    assert arrays._fields == out.__slots__
    for name in arrays._fields:
        tensor, array = getattr(out, name), getattr(arrays, name)
        if tensor is None:
            assert array is None
            continue
        assert isinstance(array, np.ndarray)
        assert array.ctypes.data == tensor.data_ptr()
        assert torch.equal(of_torch(array), tensor)
    checked = fs.verify(X, [[], [], []], num_drafts=[0, 0, 0], **FIELDS)
    assert checked.numpy()._fields == checked.__slots__
    assert np.array_equal(checked.numpy().tokens, checked.tokens.numpy())
