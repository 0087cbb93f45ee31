"""The CUDA engine where there may be no GPU: the reasons it gives, the memory it lends, its machine code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastsample as fs
from fastsample._built import CUDA_LEFT_OUT
from fastsample.backends import Outputs, cuda, engine, select
from fastsample.inputs import Rows

HERE = Path(__file__).parent
BUILT = cuda.native()[0] is not None
WANTED = "FASTSAMPLE_CUDA=on" in os.environ.get("CMAKE_ARGS", "")  # CI's step for the extension says so
needs_build = pytest.mark.skipif(
    not BUILT and not WANTED, reason=f"CMAKE_ARGS has no FASTSAMPLE_CUDA=on, and {cuda.native()[1]}"
)


def test_it_is_built_where_it_is_wanted() -> None:
    assert BUILT or not WANTED, cuda.native()[1]


def test_it_says_why_it_cannot_serve() -> None:
    reason = fs.engines()["cuda"]
    if BUILT and torch.cuda.is_available():
        assert reason is None
        return
    assert reason is not None
    expected = "there is no NVIDIA GPU with a driver" if BUILT else f"fastsample was built without it: {CUDA_LEFT_OUT}"
    assert BUILT or CUDA_LEFT_OUT
    assert reason.startswith(expected)
    with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot serve these logits: {expected}"):
        fs.sample(torch.zeros(9), backend="cuda")


@needs_build
def test_it_imports_without_a_driver(tmp_path: Path) -> None:
    code = "import fastsample._cuda as m; print(m.why_not() or 'there is one', m.CUDA_VERSION >= 12000)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "there is no NVIDIA GPU" in done.stdout
    assert done.stdout.rstrip().endswith("True")


EXIT_WITH_CALLS_IN_FLIGHT = """
import threading, time, fastsample._cuda as m

def forever():
    while True:
        try:
            m.list_kept(0, 0, 0, 0, 0, 0, 0, 0)
        except RuntimeError:  # there is no GPU, which it finds out without the GIL
            failed.set()

failed = threading.Event()
for _ in range(4):
    threading.Thread(target=forever, daemon=True).start()
assert failed.wait(30)
time.sleep(0.2)
"""


@needs_build
def test_exit_with_calls_in_flight_does_not_abort(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT_WITH_CALLS_IN_FLIGHT],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_fastsample_loads_no_extension_of_cuda() -> None:
    code = "import sys, torch, fastsample as fs; fs.sample(torch.zeros(9), backend='cpu'); print(*sys.modules)"
    # Not from the root, where the source tree would be imported.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE)
    assert "fastsample._cpu" in done.stdout.split()
    assert "fastsample._cuda" not in done.stdout.split()


def serve(monkeypatch: pytest.MonkeyPatch, reason: str | None = None) -> None:
    module = SimpleNamespace(why_not_device=lambda index: f"GPU {index} is too old" if index == 1 else None)
    monkeypatch.setattr(cuda, "native", lambda: (module, reason))
    monkeypatch.setattr(cuda, "_why_not_device", cache(cuda._why_not_device.__wrapped__))


def test_it_serves_gpu_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch)
    on_gpu, on_old, on_cpu = (SimpleNamespace(device=torch.device(name)) for name in ("cuda:0", "cuda:1", "cpu"))
    assert select("auto", on_gpu).name == "cuda"  # type: ignore[arg-type]
    assert select("auto", on_cpu).name == "cpu"  # type: ignore[arg-type]
    assert engine("cuda").why_not(on_old) == "GPU 1 is too old"  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot serve these logits: .*the logits are on cpu"):
        fs.sample(torch.zeros(9), backend="cuda")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ModuleNotFoundError("no"), f"fastsample was built without it: {CUDA_LEFT_OUT}"),
        (ImportError("undefined symbol"), "fastsample._cuda cannot be imported: undefined symbol"),
        (None, "fastsample._cuda was built for other parameters"),
    ],
)
def test_what_is_wrong_with_the_extension_is_a_reason(
    failure: Exception | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> Any:
        if failure is not None:
            raise failure
        return SimpleNamespace(PARAM_FIELDS=("temperature",))

    monkeypatch.setattr(cuda, "import_module", load)
    monkeypatch.setattr(cuda, "native", cache(cuda.native.__wrapped__))
    found = engine("cuda").why_not(None)
    assert found is not None
    assert found.startswith(reason)


# Memory ---------------------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for the extension: needs some memory, and records what it is given."""

    def __init__(self, workspace: int, boards: int) -> None:
        self.needs = (workspace, boards)
        self.launches: list[tuple[Any, ...]] = []

    def run(
        self,
        rows: bytes,
        call: bytes,
        device: int,
        stream: int,
        workspace: Any,
        boards: Any,
        drafts: bytes | None,
        advance: bool,
    ) -> Any:
        if workspace[1] < self.needs[0] or boards[1] < self.needs[1]:
            return self.needs
        self.launches.append((rows, call, workspace[0], boards[0]))
        return None


@pytest.fixture
def step() -> Callable[[cuda.CudaEngine, Rows], None]:
    logits = torch.zeros(2, 50)
    out = Outputs(torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64))
    return lambda chosen, rows: chosen.run(logits, rows, out) and None


def make_rows(workspace: dict[Any, Any] | None = None) -> Rows:
    zeros = torch.zeros(2, dtype=torch.int64)
    return Rows(fs.SamplingParams().pack(), zeros, zeros, workspace=workspace)


def test_a_sampler_has_memory_of_its_own(step: Callable[..., None]) -> None:
    recorder = Recorder(1000, 64)
    chosen = cuda.CudaEngine(recorder)
    own: dict[Any, Any] = {}
    for rows in (make_rows(), make_rows(), make_rows(own), make_rows(own), make_rows({})):
        step(chosen, rows)
    used = [launch[2:] for launch in recorder.launches]
    assert used[0] == used[1], "a stream's calls share it"
    assert used[2] == used[3], "a Sampler's stays the same, so that a graph may hold it"
    assert len({used[0], used[2], used[4]}) == 3


class Busy(Recorder):
    """Records how many calls run at once. With a barrier, two calls wait for each other."""

    def __init__(self, barrier: threading.Barrier | None = None) -> None:
        super().__init__(1000, 64)
        self.barrier, self.inside, self.most = barrier, 0, 0

    def run(self, *arguments: Any) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        needs = super().run(*arguments)
        if self.barrier is None:
            time.sleep(0.01)
        elif needs is None:
            self.barrier.wait(10)
        self.inside -= 1
        return needs


def test_calls_that_share_memory_take_turns(step: Callable[..., None]) -> None:
    """Threads share one default stream, and a call's second launch reads what its first one wrote."""
    busy = Busy()
    chosen = cuda.CudaEngine(busy)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: step(chosen, make_rows()), range(12)))
    assert (len(busy.launches), busy.most) == (12, 1)


def test_calls_with_memory_of_their_own_do_not(step: Callable[..., None]) -> None:
    chosen = cuda.CudaEngine(Busy(threading.Barrier(2)))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: step(chosen, make_rows({})), range(2)))


def test_nothing_is_allocated_where_nothing_is_needed(step: Callable[..., None]) -> None:
    recorder = Recorder(0, 0)
    chosen = cuda.CudaEngine(recorder)
    step(chosen, make_rows())
    assert recorder.launches[0][2:] == (0, 0)


def test_memory_grows_and_boards_begin_as_zeros() -> None:
    buffers = cuda.Buffers(torch.device("cpu"))
    assert buffers.with_room(100, 4096, 3) is buffers
    first = buffers.workspace.data_ptr()
    assert buffers.with_room(50, 10, 3) is buffers
    assert buffers.workspace.data_ptr() == first
    assert (buffers.boards.numel(), buffers.arrivals.numel()) == (4096, 3)
    assert not buffers.boards.any()
    assert not buffers.arrivals.any()


def test_memory_that_a_graph_may_hold_is_never_freed() -> None:
    buffers = cuda.Buffers(torch.device("cpu"))
    seen = []
    for size in (100, 101, 5000):
        buffers.with_room(size, size, size)
        seen += [weakref.ref(t) for t in (buffers.workspace, buffers.boards, buffers.arrivals)]
    assert all(ref() is not None for ref in seen)
    assert buffers.workspace.numel() == 5000
    assert sum(t.numel() for t in buffers._retired) <= 3 * 5000


def test_a_capture_never_changes_memory_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its zeros are only recorded: they are there when the graph runs, and not before."""
    buffers = cuda.Buffers(torch.device("cpu")).with_room(100, 64, 2)
    before = buffers.workspace, buffers.boards, buffers.arrivals
    monkeypatch.setattr(cuda, "capturing", lambda device: True)
    assert buffers.with_room(100, 64, 2) is buffers
    own = buffers.with_room(10, 65, 0)
    assert own is not buffers
    assert (own.workspace.numel(), own.boards.numel()) == (10, 65)
    assert all(a is b for a, b in zip(before, (buffers.workspace, buffers.boards, buffers.arrivals), strict=True))


def test_a_launch_in_a_capture_gets_all_of_its_memory_anew(
    step: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, own = Recorder(1000, 64), dict[Any, Any]()
    chosen = cuda.CudaEngine(recorder)
    step(chosen, make_rows(own))
    recorder.needs = (1000, 8192)
    monkeypatch.setattr(cuda, "capturing", lambda device: True)
    step(chosen, make_rows(own))
    monkeypatch.undo()
    recorder.needs = (1000, 64)
    step(chosen, make_rows(own))
    before, captured, after = (launch[2:] for launch in recorder.launches)
    assert before == after
    assert not set(before) & set(captured)


# Gates read from the binaries -----------------------------------------------------------------------------------------


@needs_build
def test_gates(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="Triton's wheel has the tools that read binaries")
    from cuda_gates import DTYPES, KERNELS, LIST, TARGETS, Kernel, extension, measure_extension, ptx_targets, table

    library = extension()
    assert library is not None
    found = measure_extension(library)
    with capsys.disabled():
        print(f"\n{table(found)}")
    targets = TARGETS if WANTED else {kernel.target for kernel in found}  # FASTSAMPLE_CUDA=auto: those of this machine
    wanted = {Kernel(name, dtype, target) for name in KERNELS for dtype in DTYPES.values() for target in targets}
    wanted |= {Kernel(LIST, "any", target) for target in targets}
    assert set(found) >= wanted, "every policy, for every dtype and architecture"
    assert ptx_targets(library), "PTX for GPUs to come"
    assert {kernel: broken for kernel, m in found.items() if (broken := m.broken(kernel))} == {}


@needs_build
@pytest.mark.parametrize(("fmad", "broken"), [("false", []), ("true", ["fused multiply-adds"])])
def test_contraction_breaks_a_gate(fmad: str, broken: list[str], tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton's wheel has the tools that read binaries")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the path")
    from cuda_gates import CSRC, Kernel, measure, run

    (tmp_path / "mass.cu").write_text(
        '#include "core/mass.h"\n'
        "__global__ void mass(const float4* x, unsigned long long* w, float max, float scale) {\n"
        "  w[threadIdx.x] = fastsample::mass_of(__ldg(x + threadIdx.x).x, max, scale);\n}\n"
    )
    command = [nvcc, "-std=c++17", f"-I{CSRC}", f"-fmad={fmad}", "-arch=sm_90", "-cubin", "-o", "mass.cubin", "mass.cu"]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    found = measure(run("nvdisasm", "-c", tmp_path / "mass.cubin"), 40, 0)
    assert [
        gate for gate in found.broken(Kernel("sample block", "float32", "sm_90")) if gate != "16-byte loads"
    ] == broken
