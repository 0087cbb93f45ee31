"""Where a campaign runs: on a GPU, or in a rehearsal on whatever machine this is.

A rehearsal's CUDA engine is csrc/cuda on fibers (tests/simt), its Triton engine is interpreted, its rows are tiny.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from math import inf
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from zlib import crc32

import torch

from bench.record import Record, packages

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
NAMES = ("torch", "triton", "transformers", "flashinfer-python", "vllm")
HEADLINE = ("k50 p.95", "p.95", "min_p", "T", "greedy")  # modes of bench/modes.py


@dataclass
class Site:
    """What every step is given."""

    dry: bool
    scratch: Path  # where the campaign keeps what it builds
    end: float = inf  # of the step's time, as time.perf_counter() tells it
    modes: tuple[str, ...] = HEADLINE
    records: list[Record] = field(default_factory=list)  # what earlier steps found

    @property
    def left(self) -> float:
        """Seconds that are left to the step."""
        return self.end - time.perf_counter()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def batches(self) -> tuple[int, ...]:
        return (2,) if self.dry else (1, 64, 8, 256)

    @property
    def vocabs(self) -> tuple[int, ...]:
        return (300,) if self.dry else (128256, 151936)

    @property
    def dtypes(self) -> tuple[str, ...]:
        return ("float32", "bfloat16")

    @cached_property
    def engines(self) -> list[str]:
        """The GPU engines that serve here."""
        from fastsample.backends import engine

        probe = torch.zeros(1, 1, device=self.device)
        return [name for name in ("cuda", "triton") if engine(name).why_not(probe) is None]

    @property
    def arch(self) -> int:
        """The compute capability as 90; 0 in a rehearsal."""
        return 0 if self.dry else 10 * (found := torch.cuda.get_device_capability())[0] + found[1]

    def of(self, step: str) -> list[Record]:
        """What a step has found so far."""
        return [record for record in self.records if record["step"] == step]

    def open(self) -> None:
        """The path to the tests' helpers; and the stand-ins of a rehearsal, for as long as the process lives."""
        sys.path.append(str(ROOT / "tests" / "support"))
        self.scratch.mkdir(parents=True, exist_ok=True)
        if self.dry:
            simulate(self.scratch)
            interpret()


def scratch_of(results: Path) -> Path:
    """The folder where the campaign that keeps this file builds, the same in every call on one machine."""
    return Path(gettempdir()) / f"fastsample-{results.stem}-{crc32(str(results).encode()):08x}"


def library(scratch: Path) -> Path:
    """csrc/cuda on fibers, which the step `install` builds in a rehearsal."""
    return scratch / "simt.so"


simulated: Any = None
"""The stand-in for fastsample._cuda (tests/support/simt_engine.py), once there is one."""
_until_the_end = ExitStack()


def simulate(scratch: Path) -> None:
    global simulated
    from simt_engine import Simt, as_backend

    if library(scratch).exists():
        simulated = Simt(library(scratch))
        _until_the_end.enter_context(as_backend(simulated))


def interpret() -> None:
    """Triton was asked to interpret by the environment; this makes it faster."""
    if find_spec("triton") is not None:
        from triton_interpreter import patch_once

        patch_once()


def machine(dry: bool) -> dict[str, Any]:
    """The card and the versions, as the results' file notes them. fastsample need not be installed yet."""
    where = {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
    if dry:
        return {"gpu": "no GPU: a rehearsal", **where, "dry": True, "packages": packages(NAMES)}
    card = torch.cuda.get_device_properties(0)
    return {
        "gpu": card.name,
        "compute capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory": f"{card.total_memory / 2**30:.0f} GiB",
        "l2_bytes": int(getattr(card, "L2_cache_size", 0)),
        "driver": asked("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": asked("nvcc", "--version").rpartition("release ")[2].partition(",")[0],
        "cuda": torch.version.cuda,
        **where,
        "packages": packages(NAMES),
    }


def asked(tool: str, *arguments: str) -> str:
    """What a tool prints, in one line; "" where it is not here or has nothing to say."""
    if (path := shutil.which(tool)) is None:
        return ""
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    return done.stdout.strip().replace("\n", " ") if done.returncode == 0 else ""


def tree() -> str:
    """A digest of the sources that are measured."""
    found = hashlib.sha256()
    for folder in ("csrc", "kernels", "fastsample"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cc", ".py"):
                found.update(path.read_bytes())
    return found.hexdigest()[:12]
