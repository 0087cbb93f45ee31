"""The scalar twin that the fuzzer trusts (tests/native/twin.h) equals the Python reference on every small case."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pybind11
import pytest
from cases import MEDIUM_CASES, SMALL_CASES
from conformance import ask, assert_agree

from fastsample.backends import cpu

pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect without")  # among the cases on purpose

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An extension like fastsample._cpu whose only kernel is the twin."""
    built = tmp_path_factory.mktemp("twin") / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    compiler = os.environ.get("CXX") or "c++"
    sources = ["csrc/bindings/cpu.cc", "csrc/cpu/dispatch.cc", "csrc/cpu/pool.cc", "tests/native/twin.cc"]
    folders = ["csrc", "tests/native", pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=gnu++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"]
    flags += ["-DFASTSAMPLE_HAS_baseline", *(f"-I{folder}" for folder in folders)]
    subprocess.run([compiler, *flags, *sources, "-o", str(built)], cwd=ROOT, check=True)
    spec = importlib.util.spec_from_file_location("_cpu", built)
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
