"""Torch's modes change nothing; tensors that are not what they seem are refused by name, before memory is touched."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from asked import EVERYTHING, sentinels
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastsample as fs
from fastsample import repeats
from fastsample.backends.cpu import native
from fastsample.backends.native import LOGITS_FIELDS, OUTPUT_FIELDS, ROW_FIELDS
from fastsample.inputs import Rows, pack_offsets
from fastsample.inputs.records import _pack_plain
from fastsample.inputs.seeds import _shared_offset

B, V = 3, 50
BACKENDS = ("reference", "cpu")
LOGITS = torch.randn(B, V, generator=torch.Generator().manual_seed(3))

# Modes ----------------------------------------------------------------------------------------------------------------


@contextmanager
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "another default device": lambda: torch.device("meta"),
    "another default dtype": double_by_default,
    "inference mode": torch.inference_mode,
    "deterministic algorithms": deterministic,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def forget() -> None:
    """As if nothing had been called yet."""
    _pack_plain.cache_clear()
    _shared_offset.cache_clear()
    repeats.forget()


def everything(backend: str) -> list[torch.Tensor]:
    """What every call gives, with arguments of every kind; scalars are packed anew."""
    forget()
    found = []
    for fields in (
        {"top_k": 9, "temperature": 0.7},
        {"top_p": [0.9, 0.8, 1.0], "order": ["joint", "joint", "min_p_first"]},
    ):
        inputs = {"bias": {3: 1.0}, "prompt_ids": [[1], [2], [3]], "output_ids": [[4, 4]] * B, "presence_penalty": 0.5}
        common = {**fields, **inputs, "backend": backend}
        torch.manual_seed(9)
        for seed in (None, 7, [1, 2, 3], np.arange(B)):
            out = fs.sample(LOGITS, **common, seed=seed, offset=2, num_samples=2, **EVERYTHING)
            found += [getattr(out, name) for name in fs.SampleOutput.__slots__]
        found += [fs.sample(LOGITS[0], backend=backend, seed=4).tokens]
        found += [fs.filter_logits(LOGITS, **common), fs.probabilities(LOGITS, **common)]
        sampler = fs.Sampler(batch_size=B, seed=5, **fields, backend=backend)
        found += [sampler(LOGITS).tokens, sampler(LOGITS).tokens]
        sampler.set_row(1, seed=8, offset=3)
        sampler.reset_row(2)
        found += [sampler(LOGITS).tokens, sampler.offsets]
        found += [sampler(LOGITS[:2], rows=rows).tokens for rows in ([2, 0], slice(1, 3))] + [sampler.offsets]
    return found


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_mode_changes_nothing(mode: Callable[[], AbstractContextManager[Any]], backend: str) -> None:
    want = everything(backend)
    with mode():
        inside = everything(backend)
    assert equal(inside, want)
    # What was kept inside serves outside.
    again = fs.sample(LOGITS, top_k=9, temperature=0.7, seed=7, backend=backend)
    assert torch.equal(again.tokens, fs.sample(LOGITS, top_k=9, temperature=[0.7] * B, seed=7, backend=backend).tokens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on_invalid", ["raise", "flag"])
def test_what_is_made_in_inference_mode_serves_outside(on_invalid: str, backend: str) -> None:
    plain = fs.Sampler(batch_size=B, seed=5, backend=backend)
    with torch.inference_mode():
        sampler = fs.Sampler(batch_size=B, seed=5, on_invalid=on_invalid, backend=backend)
        out = sampler(LOGITS)
        full = fs.filter_logits(LOGITS, top_k=3, backend=backend)
    assert out.tokens.is_inference()
    assert torch.equal(out.tokens, plain(LOGITS).tokens)
    for _ in range(2):
        assert sampler(LOGITS, out=out) is out
        assert torch.equal(out.tokens, plain(LOGITS).tokens)
    for one in (sampler, plain):
        one.set_row(0, seed=1, offset=5)
        one.reset_row(1)
    assert torch.equal(sampler(LOGITS, out=out).tokens, plain(LOGITS).tokens)
    for call in (fs.filter_logits, fs.probabilities):
        assert torch.equal(
            call(LOGITS, top_k=5, on_invalid=on_invalid, backend=backend, out=full), call(LOGITS, top_k=5)
        )


# Tensors without memory of their own ----------------------------------------------------------------------------------


class Wrapper(torch.Tensor):
    """As DTensor is one: shape, dtype and device, and the values elsewhere."""

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(function)


class Renamed(torch.Tensor):
    """A subclass that is nothing else."""


def freed(call: Callable[[torch.Tensor], Any], values: torch.Tensor) -> Any:
    values = values.clone()
    values.untyped_storage().resize_(0)  # as FSDP does to parameters that it has sharded
    return call(values)


HOLLOW: dict[str, Callable[[Callable[[torch.Tensor], Any], torch.Tensor], Any]] = {
    "freed": freed,
    "wrapper": lambda call, values: call(Wrapper(values)),
    "fake": lambda call, values: call(FakeTensorMode().from_tensor(values)),
    "vmap": lambda call, values: torch.func.vmap(call)(torch.stack([values, values])),
}

BIAS = (torch.arange(B + 1), torch.arange(B))
PLACES: dict[str, tuple[torch.Tensor, str]] = {
    "logits": (LOGITS, "logits"),
    "bitmask": (torch.full((B, 2), -1, dtype=torch.int32), "bitmask"),
    "prompt_ids": (torch.zeros(B, 4, dtype=torch.int64), "prompt_ids"),
    "output_ids": (torch.zeros(B, 4, dtype=torch.int32), "output_ids"),
    "dry_breakers": (torch.zeros(B, 4, dtype=torch.int64), "dry_breakers"),
    "bias": (torch.ones(B), "bias values"),
    "temperature": (torch.ones(B), "temperature"),
    "seed": (torch.arange(B), "seed"),
    "offset": (torch.arange(B), "offset"),
}


def put(place: str, values: torch.Tensor, call: Callable[..., Any], **more: Any) -> Any:
    if place == "logits":
        return call(values, **more)
    return call(LOGITS, **{place: (*BIAS, values) if place == "bias" else values}, **more)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hollow", HOLLOW.values(), ids=HOLLOW)
@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_without_memory(place: str, hollow: Callable[..., Any], backend: str) -> None:
    values, named = PLACES[place]
    calls = [fs.sample] if place in ("seed", "offset") else [fs.sample, fs.filter_logits, fs.probabilities]
    for call in calls:
        more = {"seed": 1} if call is fs.sample and place != "seed" else {}
        put(place, values, call, backend=backend, **more)
        with pytest.raises(ValueError, match=f"^{named}: expected a dense tensor with values, got a .* without memory"):
            hollow(lambda v, call=call, more=more: put(place, v, call, backend=backend, **more), values)
    if place not in ("temperature", "seed", "offset"):
        sampler = fs.Sampler(batch_size=B, seed=1, backend=backend)
        put(place, values, sampler)  # so that it knows the shapes
        with pytest.raises(ValueError, match=f"^{named}: .* without memory"):
            hollow(lambda v: put(place, v, sampler), values)
        assert sampler.offsets.tolist() == [1] * B


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hollow", [name for name in HOLLOW if name != "vmap"])
def test_a_buffer_without_memory(hollow: str, backend: str) -> None:
    def fill(buffer: torch.Tensor) -> None:
        fs.filter_logits(LOGITS, out=buffer, backend=backend)

    def draw(buffer: torch.Tensor) -> None:
        out = fs.SampleOutput(buffer, torch.zeros(B, dtype=torch.int32))
        fs.sample(LOGITS, out=out, on_invalid="flag", backend=backend)

    with pytest.raises(ValueError, match=r"^out: .* without memory"):
        HOLLOW[hollow](fill, torch.zeros(B, V))
    with pytest.raises(ValueError, match=r"^out.tokens: .* without memory"):
        HOLLOW[hollow](draw, torch.zeros(B, dtype=torch.int64))


def test_a_lazy_parameter() -> None:
    for call in (fs.sample, fs.filter_logits, fs.Sampler(batch_size=1)):
        with pytest.raises(ValueError, match=r"^logits: expected"):
            call(torch.nn.parameter.UninitializedParameter())


def test_a_mere_subclass_is_served(variant: str) -> None:
    got = fs.sample(LOGITS.as_subclass(Renamed), seed=1, backend=variant)
    assert torch.equal(got.tokens, fs.sample(LOGITS, seed=1, backend=variant).tokens)
    assert type(got.tokens) is torch.Tensor


def test_native_code_follows_no_null_pointer() -> None:
    """The last resort, where a mode of torch's makes buffers without memory."""
    address = LOGITS.data_ptr()
    columns = ("params", "seeds", "offsets")
    rows, nowhere = (record(ROW_FIELDS, mask_words=-1, **dict.fromkeys(columns, at)) for at in (address, 0))
    for own, logits, status in ((rows, 0, address), (rows, address, 0), (nowhere, address, address)):
        shape = {"rows": 1, "vocab": V, "num_samples": 1}
        call = record(LOGITS_FIELDS + OUTPUT_FIELDS, logits=logits, status=status, **shape)
        with pytest.raises(ValueError, match="a tensor without memory"):
            native().run(own, call, 1, False)


def record(fields: tuple[str, ...], **values: int) -> bytes:
    """A record of the native ABI; what is not given is 0."""
    assert values.keys() <= set(fields)
    return struct.pack(f"{len(fields)}q", *(values.get(name, 0) for name in fields))


def test_a_fake_tensor_mode_leaves_nothing_behind() -> None:
    forget()
    with FakeTensorMode():
        with pytest.raises(ValueError, match=r"params: .* without memory"):
            fs.Sampler(batch_size=B, top_k=11, seed=1)
        with pytest.raises(ValueError, match=r"offset: .* without memory"):
            pack_offsets(12, B)
    want = fs.sample(LOGITS, top_k=[11] * B, seed=1, offset=[12] * B).tokens
    assert torch.equal(fs.sample(LOGITS, top_k=11, seed=1, offset=12).tokens, want)


# What records instead of running --------------------------------------------------------------------------------------

OTHER = torch.randn(B, V, generator=torch.Generator().manual_seed(8))
FULL = torch.zeros(B, V)
SEEDS, COLUMN = torch.arange(B), torch.arange(B)[:, None]
STATUS = torch.zeros(B, dtype=torch.int32)
RECORDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sample": lambda x: fs.sample(x, seed=1, top_k=5).tokens,
    "sample with tensors": lambda x: fs.sample(x, seed=SEEDS, offset=SEEDS + 2, temperature=[0.5, 0.0, 2.0]).tokens,
    "sample with arrays": lambda x: fs.sample(x, seed=np.arange(B), offset=np.int64(3), top_p=np.float32(0.5)).tokens,
    "logprobs": lambda x: fs.sample(x, seed=1, logprobs="raw", output_ids=COLUMN).logprobs,  # type: ignore[dict-item,return-value]
    "filter_logits": lambda x: fs.filter_logits(x, top_k=5),
    "probabilities": lambda x: fs.probabilities(x, top_p=0.9),
}
# (What a function closes over is no input, and torch takes a tensor there only if told so.)
MAKE_FX: dict[str, dict[str, Any]] = {
    "real": {},
    "fake": {"tracing_mode": "fake", "_allow_non_fake_inputs": True},
    "symbolic": {"tracing_mode": "symbolic", "_allow_non_fake_inputs": True},
    "pre-dispatch": {"pre_dispatch": True},
}


@pytest.mark.parametrize("how", MAKE_FX.values(), ids=MAKE_FX)
@pytest.mark.parametrize("name", RECORDED)
def test_make_fx(name: str, how: dict[str, Any]) -> None:
    """What it records is the call, for logits that it has not seen."""
    call = RECORDED[name]
    graph = make_fx(lambda x: call(x * 2), **how)(LOGITS)
    assert any("fastsample" in str(node.target) for node in graph.graph.nodes)
    for x in (OTHER, LOGITS, OTHER.flip(0)):
        assert torch.equal(graph(x), call(x * 2))


def test_make_fx_without_a_seed_records_a_fresh_one() -> None:
    graph = make_fx(lambda x: fs.sample(x).tokens)(LOGITS)
    flat = torch.zeros(B, V)
    torch.manual_seed(4)
    want = [fs.sample(flat).tokens for _ in range(3)]
    torch.manual_seed(4)
    assert [graph(flat).tolist() for _ in range(3)] == [tokens.tolist() for tokens in want]


@pytest.mark.parametrize("how", MAKE_FX.values(), ids=MAKE_FX)
def test_make_fx_refuses_by_name(how: dict[str, Any]) -> None:
    sampler = fs.Sampler(batch_size=B, seed=1)
    refused: list[tuple[Callable[[torch.Tensor], Any], type[Exception], str]] = [
        (lambda x: sampler(x).tokens, RuntimeError, "cannot record a Sampler"),
        (lambda x: sampler(x[:1], rows=[0]).tokens, RuntimeError, "cannot record a Sampler"),
        (lambda x: fs.sample(x, bias={1: 2.0}).tokens, TypeError, "bias: expected tensors"),
        (lambda x: fs.sample(x, output_ids=[[1], [2], [3]]).tokens, TypeError, "output_ids: expected a tensor"),
        (lambda x: fs.sample(x, allowed_ids=[1]).tokens, TypeError, "allowed_ids: expected None"),
        (lambda x: fs.sample(x, out=fs.SampleOutput(SEEDS, STATUS)).tokens, TypeError, "out: expected None"),
        (lambda x: fs.filter_logits(x, out=FULL), TypeError, "out: expected None"),
        (lambda x: fs.sample(x, {"top_k": 1}).tokens, TypeError, "params: expected SamplingParams, got dict"),  # type: ignore[arg-type]
    ]
    for call, error, words in refused:
        with pytest.raises(error, match=words):
            make_fx(call, **how)(LOGITS)
    assert sampler.offsets.tolist() == [0] * B
    assert torch.equal(sampler(LOGITS).tokens, fs.sample(LOGITS, seed=1).tokens)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", [*RECORDED, "Sampler", "slots of a Sampler"])
def test_torch_jit_trace_is_refused(name: str) -> None:
    sampler = fs.Sampler(batch_size=B, seed=1)
    more = {
        "Sampler": lambda x: sampler(x).tokens,
        "slots of a Sampler": lambda x: sampler(x[:2], rows=[0, 2]).tokens,
    }
    with pytest.raises(RuntimeError, match=r"^torch.jit.trace .* cannot record fastsample; use torch.export"):
        torch.jit.trace((RECORDED | more)[name], (LOGITS,), check_trace=False)
    assert sampler.offsets.tolist() == [0] * B
    RECORDED["sample"](LOGITS)  # and afterwards all is well


def test_a_proxy_is_refused() -> None:
    for call in RECORDED.values():
        with pytest.raises(TypeError, match="logits: expected a tensor or an array, got Proxy"):
            torch.fx.symbolic_trace(call)


def test_fake_tensors_in_their_mode_have_shapes() -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(LOGITS)
        out = fs.sample(fake, num_samples=4, **EVERYTHING)
        assert (out.tokens.shape, out.tokens.dtype) == ((B, 4), torch.int64)
        assert out.kept_ids is not None
        assert (out.kept_ids.shape, out.kept_ids.dtype) == ((B * EVERYTHING["kept_capacity"],), torch.int32)
        assert out.top_ids is not None
        assert out.top_ids.shape == (B, 2)
        assert fs.filter_logits(fake.half(), top_k=3).dtype == torch.float32
        with pytest.raises(ValueError, match="logits: expected a fake tensor under FakeTensorMode"):
            fs.sample(LOGITS, seed=1)
        with pytest.raises(RuntimeError, match="cannot record a Sampler"):
            SAMPLER(fake)


SAMPLER = fs.Sampler(batch_size=B, seed=1)


class Passing(TorchDispatchMode):
    """A mode of a user's that lets everything through."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Watching(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Passing, Watching, FlopCounterMode])
def test_modes_that_record_nothing(mode: Callable[[], Any]) -> None:
    more = {"display": False} if mode is FlopCounterMode else {}
    want = everything("cpu")
    with mode(**more):
        assert equal(everything("cpu"), want)


# Views and numbers that are not what they seem ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*has no effect without")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [name for name in PLACES if name != "logits"])
def test_a_negated_view(place: str, backend: str) -> None:
    values = PLACES[place][0]
    if place == "bitmask":
        values = torch.tensor([[6, 0], [-1, 8], [-(2**31), 1]], dtype=torch.int32)
    elif not values.is_floating_point():
        values = values + 5
    view = torch._neg_view(-values)
    assert view.is_neg()
    fields = {"temperature": 2.0, "repetition_penalty": 3.0, "frequency_penalty": 2.0, "num_samples": 50, "seed": 1}
    fields.pop(place, None)
    if place == "dry_breakers":  # 4 5 is repeated, but for the breaker 5
        fields |= {"dry_multiplier": 20.0, "dry_allowed_length": 1, "output_ids": [[4, 5, 3, 4, 5]] * B}
    got, want = (put(place, v, fs.sample, **fields, backend=backend) for v in (view, values))
    assert torch.equal(got.tokens, want.tokens)
    assert not torch.equal(
        got.tokens, put(place, -values if place != "temperature" else values / 9, fs.sample, **fields).tokens
    )


def read_only(values: Any) -> np.ndarray[Any, Any]:
    array = np.asarray(values)
    array.flags.writeable = False
    return array


def test_read_only_and_broadcast_arrays(variant: str) -> None:
    """Without torch's warning that an array could be written to, which nothing here does."""
    want = fs.sample(LOGITS, temperature=[0.5] * B, top_k=[4, 5, 6], seed=[7, 8, 9], offset=[1, 2, 3], backend=variant)
    got = fs.sample(
        LOGITS,
        temperature=np.broadcast_to(np.float32(0.5), B),
        top_k=read_only([4, 5, 6]),
        seed=read_only([7, 8, 9]),
        offset=np.array([3, 2, 1])[::-1],
        backend=variant,
    )
    assert torch.equal(got.tokens, want.tokens)


def test_numpy_integers_are_integers() -> None:
    n = np.int64(2)
    out = fs.sample(LOGITS, seed=np.uint64(2**64 - 1), offset=np.int8(3), num_samples=n, logprobs="raw", top_logprobs=n)
    assert torch.equal(out.tokens, fs.sample(LOGITS, seed=2**64 - 1, offset=3, num_samples=2).tokens)
    assert out.top_ids is not None
    assert out.top_ids.shape == (B, 2)
    sampler = fs.Sampler(batch_size=np.int32(B), seed=1)
    sampler.set_row(np.int64(1), seed=2)
    sampler.reset_row(np.int64(1))
    fs.set_num_threads(np.int16(3))
    assert fs.get_num_threads() == 3


def test_seeds_on_another_device_are_fetched() -> None:
    """As where seeds are on a GPU and logits are not; `meta` takes the place of one."""
    here, there = torch.zeros(1, 9, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    device = torch.device("meta")
    for rows in (Rows(here.to(device), there, there), Rows(here, there.to(device), there), Rows(here, there, there)):
        moved = rows.to(device)
        assert {moved.records.device, moved.seeds.device, moved.offsets.device} == {device}


# Buffers that share memory --------------------------------------------------------------------------------------------


def buffers(**own: torch.Tensor) -> fs.SampleOutput:
    return sentinels((B,), V, **own)


MEMORY = torch.full((64,), -77)
FLOATS = MEMORY.view(torch.float32)
SHARED: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "one tensor twice": (
        {"tokens": MEMORY[:B], "ranks": MEMORY[:B]},
        {},
        r"out\.(ranks|tokens): .* out\.(ranks|tokens)",
    ),
    "one off": ({"tokens": MEMORY[:B], "ranks": MEMORY[1 : B + 1]}, {}, r"out\.ranks: .* out\.tokens"),
    "of another dtype": ({"tokens": MEMORY[:B], "logprobs": FLOATS[5:8]}, {}, r"out\.logprobs: .* out\.tokens"),
    "seeds": ({"tokens": MEMORY[:B]}, {"seed": MEMORY[2 : 2 + B]}, r"out\.tokens: .* seed"),
    "offsets": ({"ranks": MEMORY[:B]}, {"offset": MEMORY[2 : 2 + B]}, r"out\.ranks: .* offset"),
    "output": ({"tokens": MEMORY[3:6]}, {"output_ids": MEMORY[:12].view(B, 4)}, r"out\.tokens: .* output_ids"),
    "prompt": (
        {"top_ids": MEMORY[6:12].view(B, 2)},
        {"prompt_ids": MEMORY[:9].view(B, 3)},
        r"out\.top_ids: .* prompt_ids",
    ),
    "breakers": ({"tokens": MEMORY[3:6]}, {"dry_breakers": MEMORY[:12].view(B, 4)}, r"out\.tokens: .* dry_breakers"),
    "breakers of all": ({"tokens": MEMORY[3:6]}, {"dry_breakers": MEMORY[5:9]}, r"out\.tokens: .* dry_breakers"),
    "mask": (
        {"tokens": MEMORY[:B]},
        {"bitmask": MEMORY.view(torch.int32)[: 2 * B].view(B, 2)},
        r"out\.tokens: .* bitmask",
    ),
    "bias": ({"logprobs": FLOATS[2:5]}, {"bias": (*BIAS, FLOATS[:B])}, r"out\.logprobs: .* bias"),
    "a mask for the next step": (
        {"kept_bitmask": MEMORY.view(torch.int32)[: 2 * B].view(B, 2)},
        {"bitmask": MEMORY.view(torch.int32)[: 2 * B].view(B, 2)},
        r"out\.kept_bitmask: .* bitmask",
    ),
    "lists": (
        {"kept_ids": MEMORY.view(torch.int32)[: 6 * B], "kept_row_ptr": MEMORY[4 : 5 + B]},
        {},
        r"out\.kept_row_ptr: .* out\.kept_ids",
    ),
}


@pytest.mark.parametrize(("own", "inputs", "says"), SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("on_invalid", ["raise", "flag"])
def test_buffers_share_no_memory(own: dict[str, Any], inputs: dict[str, Any], says: str, on_invalid: str) -> None:
    """Native code reads the tokens back, and ids twice: what is written there in between would be followed anywhere."""
    fields = {**EVERYTHING, "on_invalid": on_invalid}
    out = buffers(**own)
    MEMORY.fill_(0)
    before = MEMORY.clone()
    with pytest.raises(ValueError, match=says + "; pass another tensor"):
        fs.sample(LOGITS, **inputs, **fields, out=out)
    assert torch.equal(MEMORY, before)
    if not inputs.keys() & {"seed", "offset"}:
        sampler = fs.Sampler(batch_size=B, **fields)
        with pytest.raises(ValueError, match=says):
            sampler(LOGITS, **inputs, out=out)
        assert sampler.offsets.tolist() == [0] * B


@pytest.mark.parametrize("on_invalid", ["raise", "flag"])
def test_later_steps_are_checked_too(on_invalid: str) -> None:
    """The buffers are known by then; the logits and the inputs are others each step."""
    sampler, out = fs.Sampler(batch_size=1, seed=3, on_invalid=on_invalid), None
    memory = torch.zeros(80)
    out = fs.SampleOutput(memory[78:].view(torch.int64), torch.zeros(1, dtype=torch.int32))
    sampler(LOGITS[:1], out=out)
    sampler(memory[:V].unsqueeze(0), out=out)
    with pytest.raises(ValueError, match=r"out\.tokens: shares memory with the logits"):
        sampler(memory[30:].unsqueeze(0), out=out)
    with pytest.raises(ValueError, match=r"out\.tokens: shares memory with bitmask"):
        sampler(LOGITS[:1], bitmask=memory.view(torch.int32)[70:], out=out)
    assert sampler.offsets.tolist() == [2]


def test_buffers_side_by_side_are_fine(variant: str) -> None:
    memory = torch.zeros(100, dtype=torch.int64)
    floats = memory.view(torch.float32)
    out = buffers(tokens=memory[:3], ranks=memory[3:6], top_ids=memory[6:12].view(3, 2), logprobs=floats[24:27])
    x = floats[40 : 40 + B * V].view(B, V)[:, :V].copy_(LOGITS)
    fields = {**EVERYTHING, "seed": 3, "backend": variant, "on_invalid": "flag"}
    got, want = fs.sample(x, **fields, out=out), fs.sample(LOGITS, **fields)
    assert all(torch.equal(getattr(got, name), getattr(want, name)) for name in fs.SampleOutput.__slots__)


@pytest.mark.parametrize("on_invalid", ["raise", "flag"])
def test_buffers_with_a_gradient(on_invalid: str) -> None:
    """Autograd would know nothing of what is written there."""
    out = buffers(logprobs=torch.zeros(B, requires_grad=True))
    sampler = fs.Sampler(batch_size=B, **EVERYTHING, on_invalid=on_invalid)
    with pytest.raises(ValueError, match=r"out\.logprobs: .* no gradient"):
        sampler(LOGITS, out=out)
    assert sampler.offsets.tolist() == [0] * B
    for call in (fs.filter_logits, fs.probabilities):
        with pytest.raises(ValueError, match=r"^out: .* no gradient"):
            call(LOGITS, out=torch.zeros(B, V, requires_grad=True), on_invalid=on_invalid)


# A Sampler's inputs, kept from the last step --------------------------------------------------------------------------


def swap_ids(t: torch.Tensor) -> None:
    t.data = t.flip(1)


CHANGES: dict[str, tuple[str, Callable[[], Any], Callable[[Any], Any]]] = {
    "values": ("bitmask", lambda: torch.full((B, 2), -1, dtype=torch.int32), lambda t: t.fill_(0b1010)),
    "values behind a view": ("bitmask", lambda: torch.full((2,), -1, dtype=torch.int32), lambda t: t.fill_(0b1010)),
    "values of int32 ids": ("output_ids", lambda: torch.zeros(B, 4, dtype=torch.int32), lambda t: t.fill_(7)),
    "values of strided ids": ("output_ids", lambda: torch.zeros(B, 8, dtype=torch.int64)[:, ::2], lambda t: t.fill_(7)),
    "a list": ("output_ids", lambda: [[0], [0], [0]], lambda t: [row.extend([3, 7]) for row in t]),
    "shape": ("prompt_ids", lambda: torch.full((B, 6), 7), lambda t: t.resize_(B, 3).fill_(5)),
    "strides": ("prompt_ids", lambda: torch.arange(B * B).view(B, B), lambda t: t.t_()),
    "memory": ("prompt_ids", lambda: torch.arange(B * 4).view(B, 4), swap_ids),
    "storage": ("output_ids", lambda: torch.zeros(B, 4, dtype=torch.int64), lambda t: t.set_(torch.full((B, 2), 9))),
    "sign": ("output_ids", lambda: torch.full((B, 2), -7), lambda t: t.neg_()),
}


@pytest.mark.filterwarnings("ignore:.*has no effect without")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "make", "change"), CHANGES.values(), ids=CHANGES)
def test_a_step_sees_what_changed_since_the_last(
    name: str, make: Callable[[], Any], change: Callable[[Any], Any], backend: str
) -> None:
    fields = {"temperature": 2.0, "repetition_penalty": 3.0, "frequency_penalty": 1.5}
    sampler = fs.Sampler(batch_size=B, seed=5, logprobs="processed", backend=backend, **fields)
    given = make()
    for step in range(6):
        if step == 3:
            change(given)
        got = sampler(LOGITS, **{name: given})
        want = fs.sample(LOGITS, seed=5, offset=step, logprobs="processed", backend=backend, **{name: given}, **fields)
        for field in ("tokens", "logprobs", "ranks"):
            assert torch.equal(getattr(got, field), getattr(want, field)), (step, field)


def test_what_no_longer_fits_is_refused_at_later_steps_too() -> None:
    sampler = fs.Sampler(batch_size=B, seed=5, repetition_penalty=2.0)
    ids = torch.zeros(B, 4, dtype=torch.int64)
    for _ in range(2):
        sampler(LOGITS, prompt_ids=ids)
    ids.resize_(B + 1, 4)
    with pytest.raises(ValueError, match=r"prompt_ids: expected shape \[3, L\], got \(4, 4\)"):
        sampler(LOGITS, prompt_ids=ids)
    ids.resize_(B, 4).data = torch.zeros(B, 4)
    with pytest.raises(TypeError, match="prompt_ids: expected integer token ids"):
        sampler(LOGITS, prompt_ids=ids)
    ids.data = torch.zeros(B, 4, dtype=torch.int64)
    ids.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="without memory of its own"):
        sampler(LOGITS, prompt_ids=ids)
