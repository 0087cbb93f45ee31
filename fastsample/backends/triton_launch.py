"""How the Triton engine compiles and launches kernels on a device."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

THREADS = 256  # of a program
PROGRAMS_PER_SM = 2  # as many as fit at once, which the barrier relies on (test_triton_compile.py checks it)
REGISTERS = 65536  # of a multiprocessor, on every NVIDIA GPU


def interpreted() -> bool:
    """Whether Triton was asked to interpret kernels, which works on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@cache
def device_shape(device: torch.device) -> tuple[int, int]:
    """Number of multiprocessors and of threads per warp. The interpreter runs one program at a time."""
    if device.type != "cuda":
        return 1, 32
    found = torch.cuda.get_device_properties(device)
    return int(found.multi_processor_count), int(found.warp_size)


@cache
def arch_of(device: torch.device) -> int:
    """The compute capability as 90; 0 where there is none. AMD's GPUs have numbers that may be those of NVIDIA's."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch_options(device: torch.device) -> dict[str, Any]:
    """Those of a kernel that is compiled; the interpreter has none."""
    return {} if interpreted() else compile_options(device_shape(device)[1], nvidia=torch.version.hip is None)


def compile_options(warp_size: int, nvidia: bool) -> dict[str, Any]:
    """How every kernel is compiled: each float operation rounded by itself, two programs to a multiprocessor."""
    options: dict[str, Any] = {"num_warps": THREADS // warp_size, "enable_fp_fusion": False}
    if nvidia:
        options["maxnreg"] = REGISTERS // (THREADS * PROGRAMS_PER_SM)
    return options
