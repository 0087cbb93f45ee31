"""FASTSAMPLE_CUDA: which GPUs CMake builds the CUDA extension for, and the reason it records where it builds none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[2]
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
ALL = "80-real;90;100-real;120-real"
NO_GPU = "there was no GPU of compute capability 8.0 or newer when it was built; FASTSAMPLE_CUDA=on builds it for all"

pytestmark = pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not on the path")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the path")


def configure(
    folder: Path, gpus: str | None, *options: str, nvcc: str | None = None
) -> subprocess.CompletedProcess[str]:
    """CMake's run on a machine with these GPUs (None: nvidia-smi finds no driver) and this nvcc."""
    smi = folder / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\n" + ("exit 9\n" if gpus is None else f"printf '{gpus}'\n"))
    smi.chmod(0o755)
    path = f"{smi.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CUDACXX": nvcc or "/there/is/no/nvcc"}
    command = ["cmake", "-S", str(ROOT), "-B", str(folder / "build"), f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    return subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("gpus", "options", "reason"),
    [
        (None, [], NO_GPU),
        ("", [], NO_GPU),
        ("7.5\\n6.1\\n", [], NO_GPU),
        ("9.0\\n", [], "no nvcc was found when it was built; FASTSAMPLE_CUDA=on demands one"),
        ("9.0\\n", ["-DFASTSAMPLE_CUDA=off"], "FASTSAMPLE_CUDA was off"),
    ],
)
def test_what_is_left_out_has_a_reason(gpus: str | None, options: list[str], reason: str, tmp_path: Path) -> None:
    done = configure(tmp_path, gpus, *options)
    assert done.returncode == 0, done.stderr
    assert f"The CUDA extension is left out: {reason}\n" in done.stdout
    recorded: dict[str, str] = {}
    exec((tmp_path / "build" / "_built.py").read_text(), recorded)
    assert recorded["CUDA_LEFT_OUT"] == reason


@pytest.mark.parametrize(
    ("option", "message"), [("on", "FASTSAMPLE_CUDA=on, but CMake finds no nvcc"), ("yes", "expected auto, on or off")]
)
def test_what_cannot_be_done_is_an_error(option: str, message: str, tmp_path: Path) -> None:
    done = configure(tmp_path, None, f"-DFASTSAMPLE_CUDA={option}")
    assert done.returncode != 0
    assert message in re.sub(r"\s+", " ", done.stderr)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "options", "architectures"),
    [
        ("9.0\\n8.6\\n9.0\\n", [], "90-real;86-real;90-virtual"),
        ("7.5\\n8.0\\n", [], "80-real;90-virtual"),
        ("99.0\\n", [], ALL),  # newer than nvcc
        ("9.0\\n", ["-DFASTSAMPLE_CUDA=on"], ALL),
        (None, ["-DFASTSAMPLE_CUDA=on"], ALL),
        (None, ["-DFASTSAMPLE_CUDA_ARCHITECTURES=90"], "90"),
    ],
)
def test_the_gpus_it_is_built_for(gpus: str | None, options: list[str], architectures: str, tmp_path: Path) -> None:
    done = configure(tmp_path, gpus, *options, nvcc=NVCC)
    assert done.returncode == 0, done.stderr
    assert f"The CUDA extension is built for {architectures}\n" in done.stdout
    assert 'CUDA_LEFT_OUT = ""' in (tmp_path / "build" / "_built.py").read_text()
