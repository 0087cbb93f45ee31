"""Fixtures: the engine variants under test, thread counts put back, hypothesis that repeats itself; and pytest-xdist.

`pytest -n auto` runs the quick tier on every core; `pytest -n auto -m ""` runs all.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from remembered import remembered as remembering

import fastsample as fs
from fastsample.backends import ORDER, engine
from fastsample.backends.cpu import native

# The reference needs no threads for these sizes, and waking torch's pool costs more than the tests do.
torch.set_num_threads(1)

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=200, database=None)
hypothesis.settings.register_profile("long", deadline=None, max_examples=5000)  # pytest --hypothesis-profile=long
hypothesis.settings.load_profile("repeatable")


def variants() -> list[str]:
    """Engines for CPU tensors besides the reference, the CPU engine once per instruction set.

    The CPU engine is always listed: where it cannot be loaded its tests fail, since it must be.
    """
    logits = torch.zeros(1, 1)
    others = [n for n in ORDER if n not in ("cpu", "reference") and engine(n).why_not(logits) is None]
    isas = native().isas() if engine("cpu").why_not(logits) is None else ["?"]
    return [f"cpu:{isa}" for isa in isas] + others


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: the cores that this process may use, up to eight, since each worker imports torch."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each worker gets neighbouring tests, and takes over others' when it has none left.

    The variants of a case are neighbours: one worker computes what they are all compared with.
    """
    if config.getoption("dist") != "load":  # `load` is what -n stands for; any other was asked for
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`once(name, make)`: a folder that `make` has filled, in one worker for all of them."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared / name
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                unfinished = tmp_path_factory.mktemp(name)
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return get


@pytest.hookimpl(trylast=True)  # after the marks, so that the variants of one case follow each other
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", variants(), indirect=True)


@pytest.fixture
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Backend name, with its instruction set forced while the test runs."""
    backend, _, isa = request.param.partition(":")
    if not isa:
        yield backend
        return
    before = native().isa()
    native().force_isa(isa)
    yield backend
    native().force_isa(before)


@pytest.fixture
def remembered() -> Iterator[None]:
    """The reference works out the distribution of the same rows once for all tests that ask for this."""
    with remembering():
        yield


@pytest.fixture
def fastest() -> str:
    """The CPU engine; tests that need speed or threads run on it."""
    return "cpu"


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads per test, whatever the last one chose."""
    monkeypatch.setattr("fastsample.threads._chosen", None)
    fs.set_num_threads(2)
