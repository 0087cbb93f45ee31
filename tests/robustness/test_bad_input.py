"""Everything a stranger can send, wherever it can be sent: a result, or an error that names the argument.

Never anything else, and never another row's business. Which error says what is in test_errors.py.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from asked import BY_ROW, EVERYTHING
from hypothesis import given
from hypothesis import strategies as st

import fastsample as fs
from fastsample.inputs import Inputs
from fastsample.params import specs

B, V = 3, 50
NAN, INF = math.nan, math.inf
LOGITS = torch.randn(B, V, generator=torch.Generator().manual_seed(1))


class Hostile:
    """Raises whatever is asked of it, even where only its type or its name is wanted."""

    def __repr__(self) -> str:
        return "<hostile>"

    def __bool__(self) -> bool:
        raise ZeroDivisionError

    __len__ = __iter__ = __index__ = __float__ = __eq__ = __hash__ = __bool__  # type: ignore[assignment]


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)

with warnings.catch_warnings():  # some kinds of tensors are prototypes of torch's
    warnings.simplefilter("ignore")
    KINDS_OF_TENSORS: dict[str, torch.Tensor] = {
        "sparse": torch.eye(B).to_sparse(),
        "sparse rows": torch.eye(B).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(LOGITS, 0.1, 0, torch.qint8),
        "mkldnn": LOGITS.to_mkldnn() if torch.backends.mkldnn.is_available() else LOGITS.to_sparse(),
        "nested": torch.nested.nested_tensor([torch.ones(V), torch.ones(V)]),
        "jagged": torch.nested.nested_tensor([torch.ones(V), torch.ones(V)], layout=torch.jagged),
    }

ANYTHING: dict[str, Any] = {
    "None": None,
    "True": True,
    "0": 0,
    "-1": -1,
    "7": 7,
    "2^31": 2**31,
    "2^64": 2**64,
    "10^400": 10**400,
    "-10^400": -(10**400),
    "0.5": 0.5,
    "-0.0": -0.0,
    "nan": NAN,
    "inf": INF,
    "-inf": -INF,
    "1e39": 1e39,
    "1j": 1j,
    "Decimal": Decimal("0.5"),
    "Decimal nan": Decimal("sNaN"),
    "Fraction": Fraction(1, 3),
    "str": "0.5",
    "empty str": "",
    "surrogate": "\udc80",
    "bytes": b"123",
    "bytearray": bytearray(b"123"),
    "memoryview": memoryview(b"123"),
    "object": object(),
    "hostile": Hostile(),
    "type": int,
    "function": len,
    "empty list": [],
    "list": [0.5] * B,
    "short list": [1],
    "list of nan": [1, NAN, 1],
    "list of None": [None] * B,
    "list of str": ["a"] * B,
    "list of lists": [[1], [2], [3]],
    "list of dicts": [{}, {1: NAN}, {}],
    "endless list": ENDLESS,
    "tuple": (1, 2, 3),
    "range": range(B),
    "set": {1},
    "dict": {1: 0.5},
    "dict of str": {"a": "b"},
    "dict out of range": {V: 1.0},
    "generator": (i for i in range(B)),
    "numpy float32": np.float32(0.5),
    "numpy int64": np.int64(3),
    "numpy nan": np.float64(NAN),
    "numpy array": np.ones(B),
    "numpy objects": np.array([object()] * B),
    "numpy str": np.array(["a"] * B),
    "numpy structured": np.zeros(B, [("a", "f4")]),
    "numpy datetime": np.zeros(B, "M8[s]"),
    "numpy uint64": np.full(B, 2**64 - 1, np.uint64),
    "numpy float16 backwards": np.ones(B, ">f4")[::-1],
    "0-D": torch.tensor(0.5),
    "0-D nan": torch.tensor(NAN),
    "0-D bool": torch.tensor(True),
    "float32 [B]": torch.ones(B),
    "float64 [B]": torch.ones(B, dtype=torch.float64),
    "nan [B]": torch.full((B,), NAN),
    "int64 [B]": torch.arange(B),
    "uint8 [B]": torch.ones(B, dtype=torch.uint8),
    "list of tensors": [torch.arange(2)] * B,
    "list of arrays": [np.arange(2), None, np.ones(V, bool)],
    "uint64 [B]": torch.ones(B, dtype=torch.uint64),
    "bool [B]": torch.ones(B, dtype=torch.bool),
    "complex [B]": torch.ones(B, dtype=torch.complex64),
    "[0]": torch.zeros(0),
    "[B, 0]": torch.zeros(B, 0),
    "[0, V]": torch.zeros(0, V),
    "[B, V]": LOGITS,
    "float64 [B, V]": LOGITS.double(),
    "int32 [B, 2]": torch.full((B, 2), -1, dtype=torch.int32),
    "int64 [B, 2]": torch.full((B, 2), -1),
    "[1, 1, 1]": torch.ones(1, 1, 1),
    "transposed": torch.ones(V, B).t(),
    **KINDS_OF_TENSORS,
    "meta": torch.ones(B, device="meta"),
    "meta [B, V]": torch.ones(B, V, device="meta"),
    "requires grad": torch.ones(B, requires_grad=True),
    "[B, V] requires grad": LOGITS.clone().requires_grad_(),
    "parameter": torch.nn.Parameter(torch.ones(B)),
    "SamplingParams": fs.SamplingParams(top_k=3),
    "SampleOutput": fs.SampleOutput(None, None),  # type: ignore[arg-type]
    "full SampleOutput": fs.SampleOutput(torch.zeros(B).long(), torch.zeros(B).int()),
}

PARAMETERS = [name for name, _ in specs()]
SAMPLE = ["seed", "offset", "num_samples", "logprobs", "top_logprobs", "input"]
SAMPLE += ["kept", "kept_capacity", "kept_mass", "entropy"]
EVERY = ["params", *Inputs._fields, "on_invalid", "backend", "out"]
CALLS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "sample": (fs.sample, [*EVERY, *SAMPLE, *PARAMETERS]),
    "filter_logits": (fs.filter_logits, [*EVERY, *PARAMETERS]),
    "probabilities": (fs.probabilities, [*EVERY, "input", *PARAMETERS]),
    "Sampler": (fs.Sampler, ["params", "batch_size", "on_invalid", "backend", *SAMPLE, *PARAMETERS]),
}


def judge(name: str, call: Callable[[], Any]) -> bool:
    """Whether the call succeeds. It must, or say which argument is wrong."""
    try:
        call()
    except (TypeError, ValueError) as refusal:
        said = f"{type(refusal).__name__}: {refusal}"
    else:
        return True
    said = said.partition(": ")[2]
    assert name in said or (name == "allowed_ids" and "everything is masked" in said)
    return False


def objects() -> list[Any]:
    return [pytest.param(value, id=name) for name, value in ANYTHING.items()]


@pytest.mark.parametrize("value", objects())
@pytest.mark.filterwarnings("ignore")  # of torch, about prototypes among the objects
def test_anything_anywhere(value: Any) -> None:
    for function, names in CALLS.values():
        for name in names:
            first = () if function is fs.Sampler else (LOGITS,)
            more = {"batch_size": B} if function is fs.Sampler and name != "batch_size" else {}
            judge(name, lambda f=function, a=first, k={**more, name: value}: f(*a, **k))
        if function is not fs.Sampler:
            judge("logits", lambda f=function: f(value))
    sampler = fs.Sampler(batch_size=B, seed=1)
    fine = judge("logits", lambda: sampler(value))
    for name in (*Inputs._fields, "out"):
        fine = judge(name, lambda name=name: sampler(LOGITS, **{name: value})) or fine
    for name in ("row", "seed", "offset", "params", *PARAMETERS):
        own = {"row": 1, name: value}
        judge(name, lambda own=own: sampler.set_row(**own))
    judge("row", lambda: sampler.reset_row(value))
    judge("seed", lambda: sampler.reset_row(1, seed=value))
    before = fs.get_num_threads()
    judge("n", lambda: fs.set_num_threads(value))
    fs.set_num_threads(before)


# Odd, and served ------------------------------------------------------------------------------------------------------


def negated(x: torch.Tensor) -> torch.Tensor:
    """A view that torch negates when it reads it: the imaginary part of a conjugate is one."""
    view = torch._neg_view(x)
    assert view.is_neg()
    return view


SERVED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "requires grad": lambda x: x.clone().requires_grad_(),
    "a parameter": lambda x: torch.nn.Parameter(x),
    "with a history": lambda x: x.clone().requires_grad_() * 1.0,
    "negated": lambda x: negated(-x),
    "expanded rows": lambda x: x[:1].expand(B, -1),
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "backwards": lambda x: x.flip(0),
    "no rows": lambda x: x[:0],
    "from numpy": lambda x: torch.from_numpy(x.numpy().copy()),
    "in shared memory": lambda x: x.clone().share_memory_(),
}


@pytest.mark.parametrize("make", SERVED.values(), ids=SERVED)
def test_odd_logits_are_served(make: Callable[[torch.Tensor], torch.Tensor], variant: str) -> None:
    x = make(LOGITS)
    plain = x.detach().resolve_neg().clone()
    fields = {"top_k": 20, "seed": 4, "backend": variant}
    sampler, other = (fs.Sampler(batch_size=max(1, len(x)), **fields) for _ in range(2))
    for _ in range(2):
        got, want = fs.sample(x, **fields), fs.sample(plain, **fields)
        assert torch.equal(got.tokens, want.tokens)
        if len(x):
            other(-plain)
            other.reset_row(0)
            assert torch.equal(sampler(x).tokens, fs.sample(plain, **fields, offset=sampler.offsets - 1).tokens)
    full = fs.filter_logits(x, top_k=20, backend=variant)
    assert not full.requires_grad
    assert torch.equal(full, fs.filter_logits(plain, top_k=20, backend=variant))


def test_shared_memory_is_refused() -> None:
    """Filling a buffer that the logits are read from would change what is read."""
    wide = torch.randn(B + 1, V)
    for call in (fs.filter_logits, fs.probabilities):
        with pytest.raises(ValueError, match="out: shares memory with the logits"):
            call(wide[1:], out=wide[:-1])
        with pytest.raises(ValueError, match="out: shares memory with the logits"):
            call(wide, out=wide)
        assert torch.equal(call(wide[:1], out=wide[1:2]), call(wide[:1]))


def test_more_ids_than_can_be_counted() -> None:
    many = torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**29 + 1)
    for name in ("prompt_ids", "output_ids", "dry_breakers"):
        with pytest.raises(ValueError, match=f"{name}: expected at most 2\\^29"):
            fs.sample(LOGITS[:1], **{name: many})


# Any bits -------------------------------------------------------------------------------------------------------------

BITS = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0x7F800001, 0xFFC12345, 0x80000000, 1, 0x007FFFFF]))


@pytest.mark.parametrize(("name", "spec"), [case for case in specs() if case[1].kind == "float"])
@given(bits=BITS)
def test_any_float_is_refused_or_obeyed(name: str, spec: Any, bits: int) -> None:
    value = struct.unpack("f", struct.pack("I", bits))[0]
    inside = spec.accepts(torch.tensor(value)).item()
    good = spec.examples[0]
    kwargs = {name: [good, value, good], "output_ids": [[1, 1], [2], [3]]}
    if not inside:
        with pytest.raises(ValueError, match=rf"{name} = .* \(row 1\)"):
            fs.filter_logits(LOGITS, **kwargs)
        return
    kinds = [fs.filter_logits(LOGITS, **kwargs, on_invalid="flag", backend=b) for b in ("reference", "cpu")]
    assert torch.equal(*(kind.view(torch.int32) for kind in kinds))


@given(k=st.integers(-(2**80), 2**80))
def test_any_integer_is_refused_or_obeyed(k: int) -> None:
    if k < 0:
        with pytest.raises(ValueError, match=r"top_k = -"):
            fs.filter_logits(LOGITS, top_k=k)
    else:
        kept = fs.filter_logits(LOGITS, top_k=k, backend="cpu").isfinite().sum(1)
        assert kept.tolist() == [k if 0 < k < V else V] * B


@given(seed=st.integers(-(2**70), 2**70), offset=st.integers(-(2**70), 2**70))
def test_any_seed_and_offset(seed: int, offset: int) -> None:
    lowest = {"seed": -(2**63), "offset": 0}
    outside = [n for n, v in (("seed", seed), ("offset", offset)) if not lowest[n] <= v < 2**64]
    if outside:
        with pytest.raises(ValueError, match=f"{outside[0]} = "):
            fs.sample(LOGITS, seed=seed, offset=offset)
    else:
        tokens = [fs.sample(LOGITS, seed=seed, offset=offset, backend=b).tokens for b in ("reference", "cpu")]
        assert torch.equal(*tokens)


# One row's content is its own business --------------------------------------------------------------------------------

ROWS, WIDE = 7, 1500


def poison(row: torch.Tensor, kind: str) -> None:
    payloads = {"quiet nan": 0x7FC12345, "signalling nan": 0x7F800001, "negative nan": -0x000EDCBB}
    if kind in payloads:
        row.view(torch.int32)[row.numel() // 3] = payloads[kind]
    elif kind == "all nan":
        row.fill_(NAN)
    elif kind == "one inf":
        row[5] = INF
    elif kind == "all inf":
        row.fill_(INF)
    elif kind == "nothing":
        row.fill_(-INF)
    elif kind == "lowest":
        row.fill_(torch.finfo(torch.float32).min)
    elif kind == "both ends":
        row[::2], row[1::2] = 3.4e38, -3.4e38
    elif kind == "denormal":
        row.copy_(torch.arange(row.numel()) * 1e-45)
    else:
        row.copy_(torch.randint(-(2**31), 2**31 - 1, row.shape, dtype=torch.int32).view(torch.float32))


POISONS = ["quiet nan", "signalling nan", "negative nan", "all nan", "one inf", "all inf", "nothing", "lowest"]
POISONS += ["both ends", "denormal", "any bits"]

HARSH: dict[str, Any] = {
    "temperature": 2.0**20,
    "top_k": 2**31 - 1,
    "top_p": 1e-45,
    "min_p": 1.0,
    "repetition_penalty": 3e38,
    "frequency_penalty": -3e38,
    "presence_penalty": 3e38,
    "ties": "all",
    "order": "joint",
    "top_n_sigma": 1e-45,
    "typical_p": 1e-45,
    "epsilon_cutoff": 1 - 2.0**-24,
    "eta_cutoff": 1 - 2.0**-24,
    "top_a": 1.0,
    "p_less": True,
    "xtc_probability": 1.0,
    "xtc_threshold": 1e-45,
    "dry_multiplier": 3e38,
    "dry_base": 3e38,
    "dry_allowed_length": 1,
    "dry_range": 2**31 - 1,
    "no_repeat_ngram_size": 1,
}
MILD: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 200,
    "top_p": 0.95,
    "min_p": 0.001,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "ties": "first",
    "order": "top_k_first",
    "top_n_sigma": 3.0,
    "typical_p": 0.99,
    "epsilon_cutoff": 1e-4,
    "eta_cutoff": 1e-4,
    "top_a": 0.01,
    "p_less": False,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.1,
    "dry_multiplier": 0.8,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_range": 64,
    "no_repeat_ngram_size": 3,
}
assert PARAMETERS == [*HARSH] == [*MILD]


def everything(x: torch.Tensor, bad: list[int], backend: str) -> list[torch.Tensor]:
    """All outputs for all rows, where the bad rows have extreme parameters and inputs too."""
    rows = range(ROWS)
    kwargs: dict[str, Any] = {name: [HARSH[name] if r in bad else MILD[name] for r in rows] for name in MILD}
    kwargs["output_ids"] = [[2**62, -1, 0, 0, 0, WIDE] * 50 if r in bad else [3, 4, 3] for r in rows]
    kwargs["prompt_ids"] = [[] if r in bad else [5] for r in rows]
    kwargs["dry_breakers"] = [[0, -1, 2**62] if r in bad else [7] for r in rows]
    kwargs["bias"] = [dict.fromkeys(range(0, WIDE, 2), 3e38) if r in bad else {9: 1.0} for r in rows]
    kwargs["bitmask"] = torch.full((ROWS, WIDE // 32 + 1), -1, dtype=torch.int32)
    kwargs["bitmask"][bad, ::2] = 0
    common = {**kwargs, "on_invalid": "flag", "backend": backend}
    found = []
    for mode in ("raw", "processed"):
        out = fs.sample(x, **common, seed=range(ROWS), num_samples=2, **EVERYTHING | {"logprobs": mode})
        found += [getattr(out, name) for name in BY_ROW]
    return [*found, fs.filter_logits(x, **common), fs.probabilities(x, **common)]


@pytest.mark.parametrize("kind", POISONS)
def test_a_bad_row_is_alone(kind: str, variant: str) -> None:
    """Bit for bit, every output of the good rows is that of a batch without the bad ones, wherever those are."""
    torch.manual_seed(8)
    clean = torch.randn(ROWS, WIDE) * 4
    want = everything(clean, [], variant)
    for bad in ([0], [ROWS - 1], [3], [0, 2, 4, 6], [1, 2, 3, 4, 5]):
        x = clean.clone()
        for r in bad:
            poison(x[r], kind)
        good = [r for r in range(ROWS) if r not in bad]
        for got, own in zip(everything(x, bad, variant), want, strict=True):
            assert torch.equal(got[good].view(torch.int32), own[good].view(torch.int32))
