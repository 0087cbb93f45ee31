"""Many draws of a row: the same tokens, in no more time than torch takes, and Ctrl-C is heard."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import assert_agree, named

import fastsample as fs
from fastsample.backends import cpu

pytestmark = pytest.mark.usefixtures("remembered")

NATIVE = cpu.native()
ISAS = NATIVE.isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = NATIVE.isa()
    NATIVE.force_isa(request.param)
    yield request.param
    NATIVE.force_isa(before)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(fs.threads, "_chosen", request.param)
    return int(request.param)


def rows(batch: int, vocab: int, dtype: torch.dtype = torch.float32, spread: float = 2.0) -> torch.Tensor:
    x = torch.randn(batch, vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    return x.to(dtype)


def same(got: fs.SampleOutput, want: fs.SampleOutput) -> None:
    assert_agree(named(got), named(want))


FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 3.0},
    "cold": {"temperature": 0.05},
    "k": {"top_k": 50},
    "k1": {"top_k": 1},
    "p": {"top_p": 0.9},
    "min_p": {"min_p": 0.02},
    "all": {"top_k": 300, "top_p": 0.95, "min_p": 1e-4},
    "joint": {"top_k": 300, "top_p": 0.7, "order": "joint"},
    "greedy": {"temperature": 0.0},
    "xtc": {"xtc_probability": 0.4, "xtc_threshold": 0.02},
    "xtc-k": {"xtc_probability": 0.9, "xtc_threshold": 1e-30, "top_k": 40},
    "xtc-last": {"xtc_probability": 0.5, "temperature": 0.05, "order": "temperature_last"},
    "typical": {"typical_p": 0.3, "xtc_probability": 0.5, "xtc_threshold": 0.01},
}


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("vocab", [1, 2, 17, 300, 4099])
@pytest.mark.parametrize("mode", [None, "raw", "processed"])
def test_equals_the_reference(mode: Any, vocab: int, fields: str, isa: str) -> None:
    """Numbers of draws on both sides of what the engine does differently."""
    for dtype in (torch.float32, torch.bfloat16):
        for n in (7, 8, 21, 129, 700):
            same(draw("cpu", fields, vocab, dtype, n, mode), draw_by_reference(fields, vocab, dtype, n, mode))


def draw(backend: str, fields: str, vocab: int, dtype: torch.dtype, n: int, mode: Any) -> fs.SampleOutput:
    x = rows(2, vocab, dtype)
    x[1, ::3] = -torch.inf
    x[1, vocab // 2] = 1
    more: dict[str, Any] = {"num_samples": n, "seed": torch.tensor([3, -5]), "offset": 9, "logprobs": mode}
    more |= {"top_logprobs": min(4, vocab) if mode else 0}
    return fs.sample(x, backend=backend, **FIELDS[fields], **more)


draw_by_reference = cache(partial(draw, "reference"))


@pytest.mark.parametrize("mode", [None, "raw", "processed"])
def test_parts_of_a_row(mode: Any, threads: int) -> None:
    """More draws than one thread takes at once; an invalid row among them; bias, penalties and a mask."""
    x = rows(3, 1500)
    x[1, 7] = torch.nan
    more: dict[str, Any] = {"num_samples": 300_001, "seed": 11, "logprobs": mode, "on_invalid": "flag"}
    more |= {"bias": {5: 2.0, 9: -torch.inf}, "output_ids": [[1, 2, 2]] * 3, "frequency_penalty": 0.5, "top_p": 0.97}
    more |= {"top_logprobs": 3 if mode else 0}
    got, want = (fs.sample(x, backend=b, **more) for b in ("cpu", "reference"))
    same(got, want)


def test_more_than_a_part(threads: int) -> None:
    x, n = rows(1, 40), 3 * 2**20 + 5
    tokens = fs.sample(x, seed=2, num_samples=n).tokens
    want = fs.sample(x, seed=2, num_samples=n, backend="reference").tokens
    assert torch.equal(tokens, want)


def test_skewed_masses(isa: str) -> None:
    """One token that has nearly all, among thousands that share one entry of the table's guide."""
    x = torch.full((1, 9000), -12.0)
    x[0, 4500] = 15.0
    x[0, 100:4000] = -13.0 - torch.rand(3900)
    same(*(fs.sample(x, seed=1, num_samples=50_000, backend=b, logprobs="processed") for b in ("cpu", "reference")))
    equal = torch.zeros(1, 9000)
    same(*(fs.sample(equal, seed=1, num_samples=50_000, backend=b, logprobs="raw") for b in ("cpu", "reference")))


def test_raw_ranks_beside_a_masked_nan() -> None:
    x = rows(1, 2000)
    x[0, :600] = torch.nan
    mask = torch.full((1, 63), -1, dtype=torch.int32)
    mask[0, :19] = 0
    for n in (5, 900):
        more: dict[str, Any] = {"bitmask": mask, "logprobs": "raw", "num_samples": n, "seed": 4}
        same(*(fs.sample(x, backend=b, **more) for b in ("cpu", "reference")))


# Signals and memory ---------------------------------------------------------------------------------------------------

HERE = Path(__file__).parent  # from the root, the source tree would be imported
INTERRUPTED = """
import sys, threading, time
import torch, fastsample as fs
fs.set_num_threads({threads})
x = torch.randn(1, 4096)
want = fs.sample(x, seed=1, num_samples=100).tokens
big = torch.randn(64, 50_000)
want_big = fs.sample(big, seed=1, backend="reference").tokens
fs.sample(big, seed=1)
before = threading.active_count()
for call in ({calls}):
    print("ready", flush=True)
    start = time.perf_counter()
    try:
        call()
    except KeyboardInterrupt:
        print("interrupted", time.perf_counter() - start, flush=True)
    assert threading.active_count() == before
    assert torch.equal(fs.sample(x, seed=1, num_samples=100).tokens, want)
    assert torch.equal(fs.sample(big, seed=1).tokens, want_big)
    print("works", flush=True)
"""
BATCH = "torch.randn(1, 100_000).expand(1_000_000, -1)"
LONG = {
    "draws": "fs.sample(x, seed=1, num_samples=600_000_000)",
    "draws of rows": "fs.sample(x.expand(9, -1), seed=1, num_samples=60_000_000)",
    "rows": f"fs.sample({BATCH}, seed=1, top_p=0.9)",
    "a sampler": f"fs.Sampler(batch_size=1_000_000, seed=1)({BATCH})",
    "probabilities": "fs.filter_logits(torch.randn(1, 100_000).expand(60_000, -1), top_p=0.9)",
}


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or sys.platform == "win32", reason="no SIGINT to send")
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c(threads: int) -> None:
    """Of one call after the other, in one process."""
    code = INTERRUPTED.format(threads=threads, calls=", ".join(f"lambda: {call}" for call in LONG.values()))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=HERE) as run:
        assert run.stdout is not None
        try:
            for name in LONG:
                assert run.stdout.readline() == "ready\n", name
                time.sleep(0.5)
                run.send_signal(signal.SIGINT)
                sent = time.perf_counter()
                line = run.stdout.readline()
                heard = time.perf_counter() - sent
                assert line.startswith("interrupted"), (name, line)
                assert heard < 3, name  # 1 on a machine that does nothing else
                assert run.stdout.readline() == "works\n", name
            assert run.wait(timeout=120) == 0
        finally:
            run.kill()


def test_an_interrupted_call_keeps_what_out_held() -> None:
    """With on_invalid="raise" an error leaves `out` as it was, this one too."""
    code = """
import signal, threading, time
import torch, fastsample as fs
def stop(*_): raise TimeoutError
signal.signal(signal.SIGALRM, stop)
x = torch.randn(1, 50_000).expand(200_000, -1)
out = fs.SampleOutput(torch.full((200_000,), -7), torch.full((200_000,), -7, dtype=torch.int32))
signal.setitimer(signal.ITIMER_REAL, 0.4)
try:
    fs.sample(x, seed=1, out=out)
except TimeoutError:
    assert (out.tokens == -7).all() and (out.status == -7).all()
    print("kept")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, timeout=120, check=False
    )
    assert run.stdout == "kept\n", run.stderr


def test_a_handler_may_sample_itself() -> None:
    code = """
import signal
import torch, fastsample as fs
x = torch.randn(1, 50_000).expand(100_000, -1)
y = torch.randn(3, 70_000)
want = fs.sample(x, seed=1, num_samples=9).tokens, fs.sample(y, seed=2, num_samples=900).tokens
times = []
def handler(*_):
    times.append(torch.equal(fs.sample(y, seed=2, num_samples=900).tokens, want[1]))
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.15, 0.15)
got = fs.sample(x, seed=1, num_samples=9).tokens
signal.setitimer(signal.ITIMER_REAL, 0)
assert torch.equal(got, want[0])
print(bool(times) and all(times))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, timeout=120, check=False
    )
    assert run.stdout == "True\n", run.stderr


def test_draws_without_memory() -> None:
    with pytest.raises((RuntimeError, MemoryError), match=r"memory|alloc"):
        fs.sample(torch.randn(2**16, 4), num_samples=2**31 - 1)  # 2^50 bytes
