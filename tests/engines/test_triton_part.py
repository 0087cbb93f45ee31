"""What a rank answers about its part of rows by Triton's kernels, interpreted, against the CPU's: equal to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import parts
import pytest
import torch
from parts import BLOCK, CPU_ENGINE, Case, Job, answers_of, edge_cases, named
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import run_interpreted

from fastsample.backends import triton as adapter
from fastsample.backends import triton_call, triton_part
from fastsample.distributed.answers import DRAWS, FIRST
from fastsample.distributed.keys import IDS

pytest.importorskip("triton", reason="Triton is not installed")

Tensor = torch.Tensor

JOBS = (
    Job("lm", 1, "f32"),
    Job("ties", 31, "bf16"),
    Job("flat", 256, "f16"),
    Job("half_masked", 257, "f32", parts=2),
    Job("lm", 2500, "bf16", parts=3),
    Job("ties", 701, "f16", parts=2),
    Job("equal", 600, "f32"),
)


@pytest.fixture(scope="session")
def interpreted(once: Callable[[str, Callable[[Path], None]], Path]) -> dict[str, Any]:
    """The Triton engine's answers to all that is asked here."""

    def make(folder: Path) -> None:
        (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in JOBS]))
        run_interpreted(parts.__file__, folder / "jobs.json", folder / "found.pt")

    found: dict[str, Any] = torch.load(once("answers", make) / "found.pt")
    return found


def assert_same(case: Case, found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    got, want = found[0], wanted[0]
    exact = want.shape[1]
    if case.number == FIRST and case.wants & 2:
        exact -= 1  # an estimate, of other tokens
    if case.number == DRAWS:
        exact -= 1
        entropies = (answers[:, -1].contiguous().view(torch.float64) for answers in (got, want))
        torch.testing.assert_close(*entropies, rtol=1e-8, atol=1e-9)
    assert torch.equal(got[:, :exact], want[:, :exact])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_equals_the_cpu(job: Job, interpreted: dict[str, Any]) -> None:
    cases = named(job)
    wanted = answers_of(cases, CPU_ENGINE.answer)
    assert interpreted[job.name].keys() == wanted.keys()
    assert {case.number for case in cases.values()} == set(range(len(LAUNCHES)))
    for name, case in cases.items():
        assert_same(case, interpreted[job.name][name], wanted[name])


@pytest.mark.parametrize("name", edge_cases())
def test_guesses_where_chunks_meet(name: str, interpreted: dict[str, Any]) -> None:
    case = edge_cases()[name]
    found, wanted = interpreted["edges"][name], case.answers(CPU_ENGINE.answer)
    assert_same(case, found, wanted)
    ids = IDS - (found[0][:, 1:].view(-1, 9)[:, 2::2] & IDS) - parts.START
    chunks = torch.where(found[0][:, 1:].view(-1, 9)[:, 2::2] != 0, ids // BLOCK, -1)
    met = {"at an edge": [0, 0, 1, 1], "far apart": [0, 2, 5, 5], "at the end": [9, -1, -1, -1]}[name]
    assert met in chunks.tolist()


def test_a_part_is_flat_where_its_first_tokens_are_a_small_share(interpreted: dict[str, Any]) -> None:
    """Told by some of its tokens; a row that is invalid is not flat."""
    for name in ("flat", "peaked"):
        got = interpreted["flat"][name][0][:, -1]
        assert torch.equal(got, parts.flat_cases()[name].answers(CPU_ENGINE.answer)[0][:, -1])
        assert got.tolist() == [int(name == "flat"), 0]


def test_no_rows_have_no_answers(interpreted: dict[str, Any]) -> None:
    assert interpreted["none"].shape == (0, 9)


LAUNCHES = (
    ("sample", "count_first", "tell"),
    ("sums",),
    ("sums",),
    ("totals",),
    ("weigh", "draw"),
    ("above",),
    ("sums",),
    ("count_within", "tell"),
    ("weigh_own", "guess"),
    ("sample", "count_first", "tell", "given"),
    ("bits",),
    ("ends",),
)
"""Of each question, by its number."""


class OnlyAllocates(TorchDispatchMode):
    """Lets through what neither waits for a device nor computes anything there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert str(func.overloadpacket) in {
            "aten.detach",
            "aten.new_empty",
            "aten.new_zeros",
            "aten.select",
            "aten.slice",
            "aten.view",
        }
        return func(*args, **(kwargs or {}))


class Recorded:
    """Stands in for a kernel: notes that it would be launched."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launched.append(self.name)


@pytest.mark.parametrize("number", range(len(LAUNCHES)))
def test_launches_of_a_question(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than these, which the host does not wait for."""
    launched: list[str] = []
    real = triton_part.kernels

    def kernels(stem: str) -> SimpleNamespace:
        fakes = {name: Recorded(name, launched) for name in LAUNCHES[number]}
        return SimpleNamespace(**vars(real(stem)) | fakes)

    monkeypatch.setattr(triton_part, "kernels", kernels)
    monkeypatch.setattr(triton_call, "kernels", kernels)
    engine = adapter.TritonEngine()
    case = next(q for q in Job("lm", 257, "f32").cases() if q.number == number)
    case.answers(engine.answer)  # makes the memory that later calls use
    launched.clear()
    with OnlyAllocates():
        engine.answer(case.x, case.question)
    assert tuple(launched) == LAUNCHES[number]
