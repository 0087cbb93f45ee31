"""What is tested in C++.

The scalar twin that the fuzzer trusts (tests/native/twin.h) equals the Python reference on every small case; every
instruction set honours kept sets of every form (tests/native/kept.cc).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pybind11
import pytest
from cases import MEDIUM_CASES, SMALL_CASES
from conformance import ask, assert_agree

from fastsample import _cpu
from fastsample.backends import cpu

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no effect without"),  # among the cases on purpose
    pytest.mark.usefixtures("remembered"),
]

ROOT = Path(__file__).parents[2]


NAME = f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"


def build(folder: Path) -> None:
    compiler = os.environ.get("CXX") or "c++"
    engine = [f"csrc/cpu/{name}.cc" for name in ("dispatch", "exchange", "pool", "search", "split", "split_raw")]
    sources = ["csrc/bindings/cpu.cc", *engine, "tests/native/twin.cc"]
    includes = ["csrc", "tests/native", pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=gnu++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"]
    flags += ["-DFASTSAMPLE_HAS_baseline", *(f"-I{include}" for include in includes)]
    subprocess.run([compiler, *flags, *sources, "-o", str(folder / NAME)], cwd=ROOT, check=True)


@pytest.fixture(scope="session")
def twin(once: Callable[[str, Callable[[Path], None]], Path]) -> Any:
    """An extension like fastsample._cpu whose only kernel is the twin."""
    spec = importlib.util.spec_from_file_location("_cpu", once("twin", build) / NAME)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.isas() == ["twin"]
    return module


@pytest.mark.parametrize("vocab", sorted({case.vocab for case in (*SMALL_CASES, *MEDIUM_CASES)}))
def test_the_twin_is_the_reference(vocab: int, twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_native", twin)
    for case in (*SMALL_CASES, *MEDIUM_CASES):
        if case.vocab != vocab:
            continue
        assert_agree(*(ask(case, backend, top=20) for backend in ("cpu", "reference")))


AVX2 = ["-mavx2", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
FLAGS = {"baseline": [], "neon": [], "avx2": AVX2, "avx512": AVX2 + AVX512}


@pytest.mark.parametrize("isa", _cpu.isas())
def test_kept_sets_of_every_form(isa: str, tmp_path: Path) -> None:
    """Also those with an upper end, which few filters make; and no filter is bypassed by the plan."""
    flags = ["-std=gnu++17", "-O0", "-ffp-contract=off", "-Wno-psabi", "-Icsrc", *FLAGS[isa]]
    flags += [f"-DFASTSAMPLE_ISA={isa}", f"-DFASTSAMPLE_ISA_{isa}", "tests/native/kept.cc", "csrc/cpu/search.cc"]
    program = str(tmp_path / "kept")
    subprocess.run([os.environ.get("CXX") or "c++", *flags, "-o", program], cwd=ROOT, check=True)
    subprocess.run([program], check=True)
