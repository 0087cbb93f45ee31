"""csrc/cuda on fibers (tests/simt), behind the CUDA engine's own adapter: any case, any policy, no GPU.

python simt_engine.py JOBS.json RESULTS.pt    # in a process of its own, which AddressSanitizer needs
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from cases import Case
from conformance import ask

from fastsample.backends import engine
from fastsample.backends.cuda import CudaEngine
from fastsample.backends.native import mismatch

HERE = Path(__file__).parents[1]
CSRC = HERE.parent / "csrc"
FLAGS = ("-std=c++17", "-O2", "-g1", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")
QUIET = ("-Wno-unknown-pragmas", "-Wno-psabi")
COUNTED = ("-O1", "-fsanitize=thread")  # calls at every access, to the functions of counts.cc
SANITIZERS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
POLICIES = {"auto": -1, "cluster": 0, "block": 1, "grid": 2}
ORDERS = ("ascending", "descending", "shuffled", "warp by warp")
H100 = (90, 132, 227 * 1024, 228 * 1024, 16)
A100 = (80, 108, 163 * 1024, 164 * 1024, 1)


def compiler() -> str | None:
    """A host compiler, if there is one."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def build(folder: Path, sanitize: bool = False, count: bool = False, engine: Path | None = None) -> Path:
    """The library, compiled from the same .cuh files that nvcc gets.

    Args:
        folder: where it goes.
        sanitize: with AddressSanitizer and UBSan.
        count: with all of `Counters`, which takes ten times as long to run.
        engine: another engine.cc.
    """
    chosen = compiler()
    assert chosen is not None, "there is no C++ compiler"
    target = folder / ("simt-sanitized.so" if sanitize else "simt-counted.so" if count else "simt.so")
    flags = [*FLAGS, *QUIET, *(SANITIZERS if sanitize else ()), f"-I{CSRC}", f"-I{HERE / 'simt'}"]
    objects = []
    for name in ("simt", "engine", *(("counts",) if count else ())):
        objects.append(folder / f"{target.stem}-{name}.o")
        more = COUNTED if count and name == "engine" else ()
        source = engine if engine is not None and name == "engine" else HERE / "simt" / f"{name}.cc"
        command = [chosen, *flags, *more, "-c", str(source), "-o", str(objects[-1])]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    done = subprocess.run([chosen, *flags, "-o", target, *objects], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


@dataclass(frozen=True)
class How:
    """Which kernel, how it splits rows, and in which order its threads run."""

    policy: str = "auto"
    parts: int = 1
    threads: int = 64
    teams: int = 2
    order: str = "ascending"
    device: tuple[int, ...] = H100
    resident: int = -1  # clusters at once, as a driver would say
    skip: tuple[str, int] | None = None  # a barrier that is left out


@dataclass(frozen=True)
class Counters:
    """What the last call did: see simt.h. The last four are of a library that counts."""

    launches: int
    logit_bytes: int
    other_bytes: int
    written_bytes: int
    barriers: int
    team_barriers: int
    warp_operations: int
    atomics: int
    wide_shared_atomics: int
    held_bytes: int
    remote: int
    phases: int
    wavefronts: int


@dataclass(frozen=True)
class Chosen:
    """How the last call was served."""

    policy: int
    parts: int
    threads: int
    teams: int
    shared: int
    workspace: int
    boards: int
    outputs_teams: int
    far_bitmap: int


class Simt:
    """Stands in for the module fastsample._cuda."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.simt_run.restype = ctypes.c_char_p
        self._library.simt_list.restype = ctypes.c_char_p
        self._library.simt_record.restype = ctypes.POINTER(ctypes.c_char_p)
        index = 0
        while found := self._library.simt_record(index):
            setattr(self, found[0].decode(), tuple(found[1].decode().replace(",", "").split()))
            index += 1
        assert mismatch(self) is None, mismatch(self)
        self.how = How()
        self.seed = 1
        self.chosen: Chosen | None = None

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
    ) -> None:
        how = self.how
        skip = (None, 0) if how.skip is None else (how.skip[0].encode(), how.skip[1])
        self._library.simt_settings(ORDERS.index(how.order), ctypes.c_uint64(self.seed), *skip)
        plan = (*how.device, how.resident, POLICIES[how.policy], how.parts, how.threads, how.teams)
        chosen = (ctypes.c_int64 * 9)()
        failure = self._library.simt_run(rows, call, drafts, ctypes.c_int64(advance), _array(plan), chosen)
        self.chosen = Chosen(*chosen)
        if failure is not None:
            raise RuntimeError(failure.decode())

    def list_kept(
        self, bitmask: int, rows: int, words: int, row_ptr: int, ids: int, size: int, device: int, stream: int
    ) -> None:
        self._library.simt_settings(ORDERS.index(self.how.order), ctypes.c_uint64(self.seed), None, 0)
        given = map(ctypes.c_int64, (bitmask, rows, words, row_ptr, ids, size, self.how.threads))
        if (failure := self._library.simt_list(*given)) is not None:
            raise RuntimeError(failure.decode())

    def plan(
        self,
        device: tuple[int, ...],
        rows: int,
        vocab: int,
        itemsize: int,
        edits: bool,
        parts: int = 0,
        resident: int = -1,
        shrinks: int = 0,
    ) -> tuple[int, ...]:
        """What tuning.h says: policy, blocks per row, threads, rows in flight, bytes of shared memory."""
        chosen = (ctypes.c_int64 * 5)()
        given = map(ctypes.c_int64, (rows, vocab, itemsize, edits, shrinks))
        self._library.simt_plan(_array((*device, parts, resident)), *given, chosen)
        return tuple(chosen)

    def counters(self) -> Counters:
        found = (ctypes.c_int64 * len(fields(Counters)))()
        self._library.simt_counters(found)
        return Counters(*found)


def _array(values: tuple[int, ...]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


@contextmanager
def as_backend(module: Simt) -> Iterator[None]:
    """Within this context, backend "cuda" is the simulated one and serves CPU tensors."""
    ours = CudaEngine(module)
    theirs = engine("cuda")
    before = {name: getattr(theirs, name) for name in ("why_not", "run", "verify", "list_kept")}
    theirs.why_not = lambda logits: None  # type: ignore[method-assign]
    for name in ("run", "verify", "list_kept"):
        setattr(theirs, name, getattr(ours, name))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(theirs, name, value)


@dataclass(frozen=True)
class Job:
    """A case and how to run it."""

    case: Case
    how: How

    @property
    def name(self) -> str:
        how = self.how
        return f"{self.case.name}-{how.policy}{how.parts}x{how.threads}-{how.order.replace(' ', '-')}"


def main() -> None:
    torch.set_num_threads(1)
    module = Simt(Path(sys.argv[1]))
    with open(sys.argv[2]) as file:
        jobs = [Job(Case(**job["case"]), How(**job["how"])) for job in json.load(file)]
    found = {}
    with as_backend(module):
        for job in jobs:
            module.how = job.how
            found[job.name] = ask(job.case, "cuda", brief=True)
    torch.save(found, sys.argv[3])


if __name__ == "__main__":
    main()
