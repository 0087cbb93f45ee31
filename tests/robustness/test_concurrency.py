"""Threads, processes, signals and time: the tokens are those of one thread, nothing hangs, nothing leaks."""

from __future__ import annotations

import copy
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch

import fastsample as fs

THREADS, STEPS, B, V = 16, 40, 3, 5000
LOGITS = torch.randn(B, V, generator=torch.Generator().manual_seed(2))
FIELDS: dict[str, Any] = {"batch_size": B, "seed": 5, "top_p": 0.95, "backend": "cpu"}
SOAK = float(os.environ.get("FASTSAMPLE_SOAK", "10"))
"""Seconds; `nox -s soak` asks for 600."""


def at_once(work: Callable[[int], Any], threads: int = THREADS) -> list[Any]:
    """work(0) to work(threads - 1), each on its own thread, all started together."""
    barrier = threading.Barrier(threads)

    def start(i: int) -> Any:
        barrier.wait(60)
        return work(i)

    with ThreadPoolExecutor(threads) as pool:
        return [call.result(timeout=120) for call in [pool.submit(start, i) for i in range(threads)]]


def serial(steps: int, **more: Any) -> list[list[int]]:
    sampler = fs.Sampler(**{**FIELDS, **more})
    return [sampler(LOGITS).tokens.tolist() for _ in range(steps)]


@pytest.mark.parametrize("buffers", ["fresh", "own"])
@pytest.mark.parametrize("on_invalid", ["raise", "flag"])
def test_a_shared_sampler(buffers: str, on_invalid: str) -> None:
    """Every call has an offset of its own, and the buffers of one call hold one call's tokens."""
    sampler = fs.Sampler(**FIELDS, on_invalid=on_invalid)

    def steps(i: int) -> list[list[int]]:
        out = copy.deepcopy(made) if buffers == "own" else None
        return [sampler(LOGITS, out=out).tokens.tolist() for _ in range(STEPS)]

    made = fs.Sampler(**FIELDS)(LOGITS)
    got = [tokens for line in at_once(steps) for tokens in line]
    want = serial(THREADS * STEPS)
    assert len({tuple(tokens) for tokens in want}) > 0.99 * len(want)  # one of another offset would show
    assert sorted(got) == sorted(want)
    assert sampler.offsets.tolist() == [THREADS * STEPS] * B


def test_a_shared_sampler_sees_shapes_and_errors() -> None:
    """A call that fails takes no offset from the others, whatever shapes and inputs follow each other."""
    sampler = fs.Sampler(**FIELDS)
    broken = LOGITS.clone()
    broken[1, 7] = torch.nan

    def steps(i: int) -> list[list[int]]:
        good = []
        for step in range(STEPS):
            if (i + step) % 3 == 0:
                with pytest.raises(ValueError, match="row 1 has a NaN"):
                    sampler(broken)
            elif (i + step) % 3 == 1:
                with pytest.raises(ValueError, match="3 rows"):
                    sampler(LOGITS[:2])
            wide = torch.cat([LOGITS, torch.full((B, 1 + i), -torch.inf)], 1)
            good.append(sampler(wide, bias={3: 0.0} if i % 2 else None).tokens.tolist())
        return good

    got = [tokens for line in at_once(steps) for tokens in line]
    assert sorted(got) == sorted(serial(THREADS * STEPS))


def test_separate_samplers() -> None:
    samplers = [fs.Sampler(**{**FIELDS, "seed": i}) for i in range(THREADS)]
    got = at_once(lambda i: [samplers[i](LOGITS).tokens.tolist() for _ in range(STEPS)])
    assert got == [serial(STEPS, seed=i) for i in range(THREADS)]


def test_slots_are_given_away_while_others_sample() -> None:
    """set_row and reset_row fall between calls, never into one: the slot's first token is that of its offset."""
    sampler = fs.Sampler(**FIELDS)
    first = fs.sample(LOGITS[2], seed=[99], offset=1000, top_p=0.95).tokens.item()
    restarted = fs.sample(LOGITS[2], seed=[99], offset=0, top_p=0.95).tokens.item()
    seen: set[int] = set()

    def work(i: int) -> None:
        for _ in range(STEPS):
            if i == 0:
                sampler.set_row(2, seed=99, offset=1000, top_p=0.95)
            elif i == 1:
                sampler.reset_row(2, seed=99)
            else:
                seen.add(sampler(LOGITS).tokens[2].item())

    at_once(work)
    assert {first, restarted} <= {*seen, first, restarted}
    after = sampler.offsets.tolist()
    assert after[:2] == [(THREADS - 2) * STEPS] * 2
    sampler.set_row(2, seed=99, offset=1000, top_p=0.95)
    assert sampler(LOGITS).tokens[2].item() == first


@pytest.mark.parametrize("width", [1, 2])
def test_threads_with_slots_of_their_own(width: int) -> None:
    """Each draws what it would alone, whoever samples the other slots meanwhile."""
    sampler = fs.Sampler(**{**FIELDS, "batch_size": 2 * THREADS})
    x = LOGITS[:width]

    def steps(i: int) -> list[list[int]]:
        rows = [i, 2 * THREADS - 1 - i][:width]
        return [sampler(x, rows=rows).tokens.tolist() for _ in range(STEPS)]

    def alone(i: int) -> list[list[int]]:
        other = fs.Sampler(**{**FIELDS, "batch_size": width, "seed": seeds[[i, 2 * THREADS - 1 - i][:width]]})
        return [other(x).tokens.tolist() for _ in range(STEPS)]

    seeds = sampler.seeds
    assert at_once(steps) == [alone(i) for i in range(THREADS)]


def test_set_num_threads_while_running() -> None:
    x = torch.randn(64, 8000, generator=torch.Generator().manual_seed(1))
    want = fs.sample(x, seed=1, top_p=0.9, backend="cpu").tokens

    def work(i: int) -> bool:
        for step in range(STEPS):
            fs.set_num_threads(1 + (i + step) % 9)
            if not torch.equal(fs.sample(x, seed=1, top_p=0.9, backend="cpu").tokens, want):
                return False
        return True

    assert all(at_once(work, 8))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_goes_on_by_itself(duplicate: Callable[[fs.Sampler], fs.Sampler]) -> None:
    sampler = fs.Sampler(**FIELDS)
    want = serial(9)
    assert [sampler(LOGITS).tokens.tolist() for _ in range(4)] == want[:4]
    other = duplicate(sampler)
    for one in (sampler, other):
        assert [one(LOGITS).tokens.tolist() for _ in range(5)] == want[4:]
    other.reset_row(1)
    assert other.offsets.tolist() == [9, 0, 9]
    assert sampler.offsets.tolist() == [9, 9, 9]


# Processes ------------------------------------------------------------------------------------------------------------

PRELUDE = """
import multiprocessing, os, signal, sys, threading, time
import torch, fastsample as fs

torch.set_num_threads(1)
x = torch.randn(64, 8000, generator=torch.Generator().manual_seed(1))
make = lambda: fs.Sampler(batch_size=64, seed=5, top_p=0.9, backend="cpu")

def go_on(sampler, steps=3):
    "What the sampler draws next, and what one that got as far draws."
    offset = int(sampler.offsets[0])
    other = fs.Sampler(batch_size=64, seed=5, offset=offset, top_p=0.9, backend="cpu")
    return all(torch.equal(sampler(x).tokens, other(x).tokens) for _ in range(steps))

def busy(sampler, count=4):
    def forever():
        while True:
            sampler(x)
            fs.sample(x, seed=1, top_k=40, backend="cpu")
    for _ in range(count):
        threading.Thread(target=forever, daemon=True).start()
    time.sleep(0.3)
"""

SCRIPTS = {
    "fork while other threads are in a call": """
fs.set_num_threads(4)
sampler = make()
busy(sampler)
for _ in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if go_on(sampler) else 3)
    assert os.waitpid(child, 0)[1] == 0
print("same", flush=True)
os._exit(0)  # torch's calls in the other threads would abort at the end of Python
""",
    "spawn": """
def child(sampler, pipe):
    pipe.send((go_on(sampler), sampler.offsets.tolist()))

if __name__ == "__main__":
    sampler = make()
    sampler(x)
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(False)
    process = context.Process(target=child, args=(sampler, send))
    process.start()
    assert receive.poll(60)
    assert receive.recv() == (True, [4] * 64)
    process.join(60)
    assert process.exitcode == 0 and sampler.offsets.tolist() == [1] * 64
    print("same")
""",
    "exit with calls in flight": """
# The engine alone: torch, whose own calls a step makes too, aborts where they meet the end of Python.
def forever():
    sampler = fs.Sampler(batch_size=64, seed=5, top_p=0.9, backend="cpu", on_invalid="flag")
    sampler(x)
    buffers = sampler._call.fresh()
    run, rows = sampler._call._engine.run, sampler._rows
    ready.wait()
    while True:
        run(x, rows, buffers)

ready = threading.Barrier(7)
fs.set_num_threads(3)
for _ in range(6):
    threading.Thread(target=forever, daemon=True).start()
ready.wait()
time.sleep(0.3)
print("same", flush=True)
""",
    "one core after the other": """
allowed = getattr(os, "sched_getaffinity", lambda process: set())(0)
fs.set_num_threads(3)
sampler = make()
for cores in [*({core} for core in allowed), allowed, allowed]:
    if cores:
        os.sched_setaffinity(0, cores)
    for _ in range(10):
        assert go_on(sampler)
        time.sleep(0.005)  # the engine's threads sleep meanwhile
if allowed:
    assert all(os.sched_getaffinity(int(thread)) <= allowed for thread in os.listdir("/proc/self/task"))
print("same")
""",
    "off the core of the thread that calls": """
def helpers():
    return set(os.listdir("/proc/self/task")) - before

def call():
    os.sched_setaffinity(threading.get_native_id(), {core})  # a thread that it starts inherits that
    while not done.is_set():
        assert go_on(sampler, 1)

if len(cores := getattr(os, "sched_getaffinity", lambda process: set())(0)) > 1:
    core, sampler, done = min(cores), make(), threading.Event()
    assert go_on(sampler)
    fs.set_num_threads(2)
    caller = threading.Thread(target=call)
    before = set(os.listdir("/proc/self/task"))
    caller.start()
    before.add(str(caller.native_id))
    for _ in range(3000):
        if [os.sched_getaffinity(int(helper)) for helper in helpers()] == [cores - {core}]:
            print("same", flush=True)
            break
        time.sleep(0.01)
    done.set()
    caller.join()
else:
    print("same")
""",
    "KeyboardInterrupt": """
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
fs.set_num_threads(2)
sampler, drawn = make(), 0
for _ in range(20):
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    before, got = int(sampler.offsets[0]), 0
    try:
        timer.start()
        while True:
            sampler(x)
            got += 1
    except KeyboardInterrupt:
        pass
    timer.join()
    assert before + got <= int(sampler.offsets[0]) <= before + got + 1
    assert go_on(sampler)
print("same")
""",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_processes(script: str, tmp_path: Path) -> None:
    """The script prints `same`, complains about nothing and exits with 0."""
    file = tmp_path / "script.py"
    file.write_text(PRELUDE + script)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("same\n", "", 0)


# Time -----------------------------------------------------------------------------------------------------------------


def resident() -> float:
    """Memory of this process, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
def test_soak() -> None:
    """Sampling of all kinds on four threads: the tokens stay the same and the memory stays flat."""
    shared = fs.Sampler(**FIELDS, on_invalid="flag")
    kinds: list[dict[str, Any]] = [
        {"top_p": 0.9, "num_samples": 3},
        {"top_k": 40, "logprobs": "processed", "top_logprobs": 5},
        {"temperature": 0.0, "bias": {3: 1.0}},
        {"repetition_penalty": 1.2, "output_ids": [[1, 2, 3]] * B, "logprobs": "raw"},
        {"bitmask": torch.full((B, V // 32), -1, dtype=torch.int32), "min_p": 0.02},
    ]
    want = [fs.sample(LOGITS, **kind, seed=4).tokens for kind in kinds]
    broken = LOGITS.clone()
    broken[0, 0] = torch.inf
    end, calls, wrong = time.monotonic() + SOAK, [0] * 4, []

    def work(i: int) -> None:
        rng = random.Random(i)
        while time.monotonic() < end and not wrong:
            n = rng.randrange(len(kinds))
            if not torch.equal(fs.sample(LOGITS, **kinds[n], seed=4).tokens, want[n]):
                wrong.append(n)
            shared(LOGITS)
            with pytest.raises(ValueError, match="row 0"):
                fs.sample(broken, out=None)
            own = fs.Sampler(**{**FIELDS, "seed": i})
            own(LOGITS)
            own(LOGITS[:, : rng.randrange(1, V)])
            fs.set_num_threads(rng.randrange(1, 4))
            calls[i] += 5

    times, sizes = [], []
    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        times.append(time.monotonic())
        sizes.append(resident())
        time.sleep(SOAK / 200)
    for worker in workers:
        worker.join()
    late = slice(len(times) // 4, None)  # after the scratch of every thread has reached its size
    slope = scipy.stats.linregress(times[late], sizes[late]).slope
    print(f"{sum(calls)} calls in {SOAK:g} s, RSS {sizes[-1]:.1f} MiB, slope {60 * 1024 * slope:.1f} KiB/min")
    assert not wrong
    assert slope * SOAK < 4  # MiB over the whole run; one leaked row of logits per call would be a thousand times that
