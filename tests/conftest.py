"""Fixtures: the engine variants under test, thread counts put back, and hypothesis that repeats itself."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

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
def fastest() -> str:
    """The CPU engine; tests that need speed or threads run on it."""
    return "cpu"


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads per test, whatever the last one chose."""
    monkeypatch.setattr("fastsample.threads._chosen", None)
    fs.set_num_threads(2)
