"""What the Triton engine launches, without launching it: how many kernels, with which buffers, and whose those are."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastsample as fs
from fastsample.backends import Outputs, triton_call, triton_memory
from fastsample.backends import triton as adapter
from fastsample.backends.triton_memory import SEMAPHORES, Memory
from fastsample.inputs import Bias, Rows

pytest.importorskip("triton", reason="Triton is not installed")

# Penalties without ids are among the calls on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect without")


class Recorder:
    """Stands in for a module of kernels: records what would be launched, and with which buffers."""

    MAX_PARTS = 256

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[int, ...], dict[str, object]]] = []
        self.pointers: list[set[int]] = []

    def __getattr__(self, name: str) -> Kernel:
        return Kernel(self, name)

    def launch(self, name: str, grid: tuple[int, ...], *args: object, **options: object) -> None:
        self.launches.append((name, grid, options))
        self.pointers.append({a.data_ptr() for a in args if isinstance(a, torch.Tensor)})


class Kernel:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name, self.value = recorder, name, name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.recorder.launch, self.name, grid)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """An engine on a device of 132 multiprocessors, whose launches are recorded and not run."""
    recorder = Recorder()
    fresh = adapter.TritonEngine()
    monkeypatch.setattr(fresh, "why_not", lambda logits: None)
    monkeypatch.setattr("fastsample.call.select", lambda backend, logits: fresh)
    for module in (adapter, triton_call):
        monkeypatch.setattr(module, "kernels", lambda stem: recorder)
    monkeypatch.setattr(adapter, "device_shape", lambda device: (132, 32))
    return recorder


def test_one_launch_from_logits_to_token(recorded: Recorder) -> None:
    fs.sample(torch.zeros(8, 128256), top_k=50, top_p=0.9, seed=1, on_invalid="flag")
    ((name, grid, options),) = recorded.launches
    assert (name, grid) == ("sample", (8, 33))
    assert options["launch_cooperative_grid"]
    assert options["SPLIT"]
    assert not options["enable_fp_fusion"]


def test_three_launches_with_everything(recorded: Recorder) -> None:
    words = torch.zeros(8, 1000, dtype=torch.int32)
    more = {"bitmask": words, "bias": {3: 1.0}, "prompt_ids": words.long(), "output_ids": words.long()}
    fs.sample(torch.zeros(8, 32000), top_k=50, min_p=0.1, seed=1, on_invalid="flag", **more)
    assert [name for name, _, _ in recorded.launches] == ["prepare", "edit", "sample"]


@pytest.mark.parametrize(("batch", "parts"), [(1, 126), (2, 126), (8, 33), (64, 4), (132, 2), (133, 1), (1000, 1)])
def test_programs_per_row(batch: int, parts: int, recorded: Recorder) -> None:
    """As many as fit the device at once, which the barrier needs; a lone program waits for nobody."""
    fs.sample(torch.zeros(1, 128256).expand(batch, -1), seed=1, on_invalid="flag")
    ((_, grid, options),) = recorded.launches
    assert grid == (batch, parts)
    assert parts == 1 or batch * parts <= 264
    assert options["SPLIT"] == (parts > 1) == options.get("launch_cooperative_grid", False)


VIEWS = {"aten.view", "aten.slice", "aten.select", "aten.unsqueeze", "aten.expand", "aten.add_"}
COUNT_OF_INVALID_ROWS = {"aten.ne", "aten.sum", "aten._local_scalar_dense"}  # which no GPU is asked for


class NoAllocation(TorchDispatchMode):
    """Lets through only operations that allocate no memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert str(func.overloadpacket) in VIEWS | COUNT_OF_INVALID_ROWS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("extras", [(), ("bitmask", "output_ids"), ("bitmask", "bias", "prompt_ids", "output_ids")])
@pytest.mark.parametrize("mode", [None, "raw", "processed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sampler_given_out_allocates_nothing(
    dtype: torch.dtype, mode: Any, extras: tuple[str, ...], recorded: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"logprobs": mode, "top_logprobs": 5 if mode else 0}
    sampler = fs.Sampler(batch_size=2, seed=1, on_invalid="flag", top_p=0.9, repetition_penalty=1.1, **wanted)
    logits, ids = torch.zeros(2, 5000, dtype=dtype), torch.zeros(2, 7, dtype=torch.int64)
    bias = Bias(torch.tensor([0, 1, 2]), torch.tensor([3, 4]), torch.tensor([1.0, -1.0]), 5000)
    words = torch.full((2, 157), -1, dtype=torch.int32)
    inputs = {"bitmask": words, "bias": bias, "prompt_ids": ids, "output_ids": ids}
    inputs = {name: inputs[name] for name in extras}
    # On a GPU, a bias that was packed once is not checked again.
    monkeypatch.setattr("fastsample.inputs.step.pack_bias", lambda bias, _: bias)
    out = sampler(logits, **inputs)
    recorded.pointers.clear()
    with NoAllocation():
        for _ in range(2):
            sampler(logits, out=out, **inputs)
    half = len(recorded.pointers) // 2
    assert half
    assert recorded.pointers[:half] == recorded.pointers[half:]


WANTED = ({}, ["sample"]), ({"entropy": True}, ["sample", "keep"]), ({"kept": "bitmask"}, ["sample", "keep"])
LISTED = ({"kept": "ids", "kept_capacity": 9, "kept_mass": True}, ["sample", "keep", "list_ids"])


@pytest.mark.parametrize(("wanted", "launches"), [*WANTED, LISTED])
def test_one_launch_for_what_is_kept_and_one_for_lists(
    wanted: dict[str, Any], launches: list[str], recorded: Recorder
) -> None:
    fs.sample(torch.zeros(8, 32000), seed=1, on_invalid="flag", **wanted)
    assert [name for name, _, _ in recorded.launches] == launches


class NoWaiting(TorchDispatchMode):
    """Lets through what a GPU does by itself: no size depends on data, and no number is read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = VIEWS | {"aten.empty", "aten.empty_like", "aten.gt", "aten.masked_fill", "aten.zero_", "aten.cumsum"}
        # Those read numbers for a CPU only: how many rows are invalid, and how many ids there are.
        assert str(func.overloadpacket) in ours | COUNT_OF_INVALID_ROWS
        return func(*args, **(kwargs or {}))


def test_lists_of_a_limited_size_wait_for_nothing(recorded: Recorder) -> None:
    options: dict[str, Any] = {"kept": "ids", "kept_capacity": 9, "on_invalid": "flag"}
    sampler, logits = fs.Sampler(batch_size=2, seed=1, **options), torch.zeros(2, 5000)
    out = sampler(logits)
    with NoWaiting():
        sampler(logits, out=out)


def test_calls_that_share_memory_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share the default stream, and a call's later launches read what its earlier ones have left."""
    inside: list[int] = []
    most: list[int] = []

    def run(call: triton_call.Call) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()

    monkeypatch.setattr(triton_call.Call, "run", run)
    chosen, zeros = adapter.TritonEngine(), torch.zeros(2, dtype=torch.int64)
    rows = Rows(fs.SamplingParams().pack(), zeros, zeros)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: chosen.run(torch.zeros(2, 50), rows, Outputs(zeros.int(), zeros)), range(12)))
    assert most == [1] * 12
    most.clear()
    barrier = threading.Barrier(2)
    monkeypatch.setattr(triton_call.Call, "run", lambda call: most.append(barrier.wait(10)))  # a Sampler has its own
    with ThreadPoolExecutor(2) as pool:
        own = (replace(rows, workspace={}) for _ in range(2))
        list(pool.map(lambda rows: chosen.run(torch.zeros(2, 50), rows, Outputs(zeros.int(), zeros)), own))
    assert sorted(most) == [0, 1]


CPU = torch.device("cpu")


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Begins or ends what seems to be the capture of a CUDA graph."""
    return lambda on: monkeypatch.setattr(triton_memory, "is_capturing", lambda device: on)


def test_what_a_graph_was_captured_with_lives_on(capture: Callable[[bool], None]) -> None:
    memory = Memory(CPU)
    first = weakref.ref(memory("x", 4, torch.int32)._base)
    capture(True)
    memory("x", 3, torch.int32)
    capture(False)
    second = weakref.ref(memory("x", 5, torch.int32)._base)
    memory("x", 6, torch.int32)
    gc.collect()
    assert first() is not None
    assert second() is not None, "a capture may be anywhere between"


def test_what_no_graph_uses_is_freed_when_outgrown() -> None:
    memory = Memory(CPU)
    first = weakref.ref(memory("x", 4, torch.int32)._base)
    memory("x", 5, torch.int32)
    gc.collect()
    assert first() is None


def test_a_capture_that_needs_more_takes_it_from_the_graph(capture: Callable[[bool], None]) -> None:
    """What is allocated while capturing holds nothing before a replay, not even the zeros of semaphores."""
    memory = Memory(CPU)
    kept = memory(SEMAPHORES, 2, torch.int32).data_ptr()
    capture(True)
    of_graph, record = memory(SEMAPHORES, 5, torch.int32), memory.record(3)
    capture(False)
    assert memory(SEMAPHORES, 2, torch.int32).data_ptr() == kept != of_graph.data_ptr()
    assert memory.record(3).data_ptr() != record.data_ptr()
    assert torch.equal(memory.record(3), record)
    grown = memory(SEMAPHORES, 5, torch.int32)
    assert grown.data_ptr() != of_graph.data_ptr()
    assert not grown.any()


def test_memory_made_in_a_capture_is_the_graphs_alone(capture: Callable[[bool], None]) -> None:
    capture(True)
    memory = Memory(CPU)
    buffer = memory(SEMAPHORES, 2, torch.int32)
    assert memory(SEMAPHORES, 2, torch.int32).data_ptr() == buffer.data_ptr()
    assert memory.record(3).data_ptr() == memory.record(3).data_ptr()
