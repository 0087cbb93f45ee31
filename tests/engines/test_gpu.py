"""The GPU engines on a real GPU against the reference on the CPU; graphs, streams, and that no step waits."""

from __future__ import annotations

import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, LARGE, Case
from conformance import ask, assert_agree, invalid_rows, named
from on_gpu import OnGpu
from sanitizers import TOOLS, command, verdict

import fastsample as fs
from fastsample.backends import engine
from fastsample.inputs import pack_bias

AVAILABLE = torch.cuda.is_available()
WHY = "there is no GPU that torch can use"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not AVAILABLE, reason=WHY),
    pytest.mark.filterwarnings("ignore:.*has no effect without"),  # among the cases on purpose
]
STEPS = 5

# Every seventh small case (which no cycle of the table divides) and a third of the large ones: each combination of
# dtype, alignment and extras costs a compilation.
SLICE = [case for i, case in enumerate(CASES) if i % 7 == 0 or (case.vocab in LARGE and i % 3 == 0)]


def backends() -> list[str]:
    """The GPU engines that can serve this GPU; both names where there is none, for tests that are then skipped."""
    names = ["triton", "cuda"]
    if not AVAILABLE:
        return names
    probe = torch.zeros(1, 1, device="cuda")
    return [name for name in names if engine(name).why_not(probe) is None]


@pytest.fixture(params=backends())
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_an_engine_serves_this_gpu() -> None:
    """Where none did, all that follow would have no backend and be skipped."""
    assert backends(), fs.engines()


needs_triton = pytest.mark.skipif("triton" not in backends(), reason="the Triton engine cannot serve this GPU")


expected = lru_cache(maxsize=2)(lambda case: ask(case, "reference", brief=True))


@pytest.mark.parametrize("case", SLICE, ids=lambda case: case.name)
def test_engine_equals_reference(case: Case, backend: str) -> None:
    assert_agree(ask(OnGpu(case), backend, brief=True), expected(case))


@needs_triton
@pytest.mark.parametrize("parts", [1, 2, 7, 100])
@pytest.mark.parametrize("one_launch", [True, False])
def test_triton_however_rows_are_split(parts: int, one_launch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a barrier in device memory between phases, and with a launch per phase."""
    adapter = engine("triton")
    monkeypatch.setattr(adapter, "parts", parts)
    monkeypatch.setattr(adapter, "one_launch", one_launch)
    for params in ("all-hf-ties", "all-joint", "p.9"):
        for dtype in ("f32", "bf16"):
            case = Case("ties", params, 128256, dtype, None, 2)
            assert_agree(ask(OnGpu(case), "triton", brief=True), expected(case))


@pytest.mark.parametrize("mode", [None, "raw", "processed"])
def test_invalid_rows(mode: str | None, backend: str) -> None:
    logits = invalid_rows()
    kwargs = {"top_p": 0.9, "seed": 3, "on_invalid": "flag", "logprobs": mode, "top_logprobs": 4 if mode else 0}
    want = fs.sample(logits, backend="reference", **kwargs)
    got = fs.sample(logits.cuda(), backend=backend, **kwargs)
    assert_agree(named(got), named(want))
    with pytest.raises(ValueError, match="row 0 has a NaN logit"):
        fs.sample(logits.cuda(), seed=3, backend=backend)


def steps(logits: torch.Tensor, backend: str, count: int, **fields: Any) -> list[list[int]]:
    sampler = fs.Sampler(batch_size=len(logits), seed=11, backend=backend, **fields)
    return [sampler(logits).tokens.tolist() for _ in range(count)]


def test_a_captured_step_is_replayed_at_the_next_offsets(backend: str) -> None:
    """Offsets are on the device, so each replay draws the next step's tokens."""
    logits = torch.randn(4, 50257, generator=torch.Generator().manual_seed(1))
    want = steps(logits, "reference", 3 + STEPS, top_p=0.95, top_k=200)
    sampler = fs.Sampler(batch_size=4, seed=11, backend=backend, on_invalid="flag", top_p=0.95, top_k=200)
    static = logits.cuda()
    out = sampler(static)
    sampler(static, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler(static, out=out)
    found = []
    for _ in range(STEPS):
        graph.replay()
        found.append(out.tokens.tolist())
    assert found == want[2 : 2 + STEPS]


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("mode", [None, "raw", "processed"])
def test_a_step_neither_waits_nor_allocates(mode: Any, edited: bool, backend: str) -> None:
    wanted = {"logprobs": mode, "top_logprobs": 5 if mode else 0}
    sampler = fs.Sampler(
        batch_size=8, seed=1, backend=backend, on_invalid="flag", top_p=0.9, repetition_penalty=1.1, **wanted
    )
    logits = torch.randn(8, 32000, device="cuda")
    ids = torch.randint(32000, (8, 100), device="cuda")
    inputs: dict[str, Any] = {}
    if edited:
        words = torch.full((8, 1000), -2, dtype=torch.int32, device="cuda")
        inputs = {"bitmask": words, "bias": pack_bias({3: 1.0}, logits), "prompt_ids": ids, "output_ids": ids}
    out = sampler(logits, **inputs)
    sampler(logits, out=out, **inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS):
            sampler(logits, out=out, **inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_lists_of_a_limited_size_wait_for_nothing(backend: str) -> None:
    logits = torch.randn(8, 32000, generator=torch.Generator().manual_seed(1))
    wanted: dict[str, Any] = {"kept": "ids", "kept_capacity": 300, "kept_mass": True, "entropy": True}
    options = {"seed": 1, "on_invalid": "flag", "top_p": [0.1, 0.9] * 4, **wanted}
    out = fs.Sampler(batch_size=8, backend="reference", **options)(logits)
    sampler, on_gpu = fs.Sampler(batch_size=8, backend=backend, **options), logits.cuda()
    found = sampler(on_gpu)
    sampler.offsets.zero_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler(on_gpu, out=found)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_agree(named(found), named(out))


def test_streams_do_not_disturb_each_other(backend: str) -> None:
    logits = torch.randn(16, 32000, generator=torch.Generator().manual_seed(2))
    want = [fs.sample(logits, seed=i, top_p=0.9, backend="reference").tokens for i in range(8)]
    on_gpu, streams = logits.cuda(), [torch.cuda.Stream() for _ in range(8)]
    torch.cuda.synchronize()
    got = []
    for i, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            got.append(fs.sample(on_gpu, seed=i, top_p=0.9, backend=backend, on_invalid="flag").tokens)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b.cpu()) for a, b in zip(want, got, strict=True))


def test_cuda_however_rows_are_split() -> None:
    """Batches and vocabularies that reach every policy of csrc/cuda/tuning.h that this GPU has."""
    if "cuda" not in backends():
        pytest.skip("the CUDA engine cannot serve this GPU")
    for vocab, rows, dtype in ((128256, 1, "f32"), (128256, 3, "bf16"), (2**20, 1, "f32"), (1000, 300, "f16")):
        for params in ("all-hf-ties", "all-joint", "p.9"):
            case = Case("ties", params, vocab, dtype, None, rows)
            assert_agree(ask(OnGpu(case), "cuda", brief=True), expected(case))


@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None or "cuda" not in backends():
        pytest.skip("compute-sanitizer or the CUDA engine is not here")
    done = subprocess.run(command(sanitizer, tool), capture_output=True, text=True, cwd=Path(__file__).parent)
    found = verdict(tool, done.stdout + done.stderr)
    if "inconclusive" in found:
        pytest.xfail(f"{tool} is not certain: {found['summary']}")
    assert found.get("passed"), found


def test_another_device_than_the_current_one(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    logits = torch.randn(4, 32000, generator=torch.Generator().manual_seed(5))
    want = fs.sample(logits, seed=1, top_p=0.9, backend="reference").tokens
    with torch.cuda.device(0):
        got = fs.sample(logits.to("cuda:1"), seed=1, top_p=0.9, backend=backend, on_invalid="flag").tokens
        assert torch.cuda.current_device() == 0
    assert got.device == torch.device("cuda:1")
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("outputs", [False, True])
def test_cuda_launches_one_kernel_from_logits_to_token(outputs: bool) -> None:
    if "cuda" not in backends():
        pytest.skip("the CUDA engine cannot serve this GPU")
    logits = torch.randn(8, 32000, device="cuda")
    ids = torch.randint(32000, (8, 100), device="cuda")
    more = {"logprobs": "raw"} if outputs else {}
    sampler = fs.Sampler(batch_size=8, seed=1, backend="cuda", on_invalid="flag", repetition_penalty=1.1, **more)
    out = sampler(logits, output_ids=ids)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sampler(logits, output_ids=ids, out=out)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "_kernel" in event.name and "fastsample" in event.name]
    assert len(names) == 1 + outputs


@needs_triton
def test_at_most_three_kernels_from_logits_to_token() -> None:
    logits = torch.randn(8, 32000, device="cuda")
    ids = torch.randint(32000, (8, 100), device="cuda")
    sampler = fs.Sampler(batch_size=8, seed=1, backend="triton", on_invalid="flag", top_p=0.9, repetition_penalty=1.1)
    out = sampler(logits, output_ids=ids)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sampler(logits, output_ids=ids, out=out)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.name in ("prepare", "edit", "sample")]
    assert sorted(names) == ["edit", "prepare", "sample"]


def test_auto_takes_a_gpu_engine() -> None:
    logits = torch.randn(2, 1000, device="cuda")
    assert next(name for name, why in fs.engines().items() if why is None) in ("cuda", "triton")
    assert fs.sample(logits, seed=1).tokens.device == logits.device


def test_a_row_alone_gets_the_token_it_gets_in_a_batch(backend: str) -> None:
    logits = torch.randn(300, 5000, device="cuda")
    seeds = torch.arange(300) * 7919
    batch = fs.sample(logits, seed=seeds, top_p=0.9, backend=backend).tokens
    alone = [int(fs.sample(logits[i], seed=seeds[i : i + 1], top_p=0.9, backend=backend).tokens) for i in (0, 7, 299)]
    assert alone == batch[[0, 7, 299]].tolist()
