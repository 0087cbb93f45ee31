"""Devices and kernels of the CUDA engine before a launch, where there may be no GPU: contexts, and what is loaded."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"


@pytest.mark.parametrize("version", [12000, 13000])  # of CUDA, which asks the driver in two ways
def test_no_context_is_created_on_the_way_back(version: int, tmp_path: Path) -> None:
    """The caller's device becomes current again, but where that would create a context."""
    flags = ["-std=gnu++17", "-O0", "-Icsrc", "-Itests/native/fake_cuda", f"-DCUDART_VERSION={version}"]
    program = str(tmp_path / "on_device")
    command = [os.environ.get("CXX") or "c++", *flags, "tests/native/on_device.cc", "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_devices_are_made_current_in_one_place() -> None:
    found = [path.name for path in CSRC.rglob("*") if path.is_file() and "cudaSetDevice(" in path.read_text()]
    assert found == ["on_device.h"]


def _body(source: str, function: str) -> str:
    """From a function's opening brace to its end, which is a brace at the start of a line."""
    start = re.search(rf"^.*\b{function}\([^;{{]*\{{$", source, re.MULTILINE)
    assert start, function
    return source[start.end() : source.index("\n}", start.end())]


def _kernels(text: str) -> set[str]:
    """The kernels that a text names, or takes by plan."""
    found = set(re.findall(r"\b(\w+_kernel)<|\b(\w+_kernel)\b(?=[,)])|\b(\w+_kernel)<<<", text))
    names = {name for groups in found for name in groups if name}
    return {"sample_kernel" if name == "with_sample_kernel" else name for name in names}


def test_every_kernel_is_loaded_before_it_is_launched() -> None:
    """The driver loads a kernel when it is first used, which would end a capture."""
    defined = set()
    for path in (CSRC / "cuda").glob("*.cu*"):
        defined |= set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", path.read_text()))
    sample, lists = ((CSRC / "cuda" / name).read_text() for name in ("sample.cu", "list.cu"))
    loaded = _kernels(_body(sample, "prepare")) | _kernels(_body(lists, "prepare_lists"))
    assert "sample_kernel" in defined
    assert loaded == defined


def test_every_variant_of_a_kernel_is_loaded() -> None:
    """Every policy, plain or not; every dtype; and the engine is chosen only after that."""
    tuning, sample = (CSRC / "cuda" / "tuning.h").read_text(), (CSRC / "cuda" / "sample.cu").read_text()
    policies = set(re.findall(r"^  (k\w+Policy) = ", tuning, re.MULTILINE))
    loop = re.search(r"for \(const Policy policy : \{([^}]*)\}\)", _body(sample, "prepare"))
    assert loop
    assert set(loop[1].split(", ")) == policies
    assert "for (const bool plain : {false, true})" in _body(sample, "prepare")

    launches = re.search(r"extern const Launches ([^;]*);", (CSRC / "cuda" / "launch.h").read_text())
    bindings = (CSRC / "bindings" / "cuda.cc").read_text()
    assert launches
    known = bindings[bindings.index("explicit Known(int index)") :]
    known = known[: known.index("\n  }\n")]
    assert set(re.findall(r"&(launches_\w+)", known)) == set(launches[1].split(", "))
    assert "launches->prepare(device_)" in known
    assert "prepare_lists()" in known
    assert "Known::at(index)" in _body(bindings, "why_not_device")
