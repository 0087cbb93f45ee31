"""Rows that are split over ranks, against `fastsample.sample` of the whole rows: equal to the bit on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import split
import torch
from cases import CASES, DTYPES, EXTRAS, MAKERS, PARAMS, Case
from conformance import assert_agree
from simt_engine import How, Simt, as_backend, build, compiler
from split import CUTS, LISTS, Job, answers_of, one_at_a_time
from tiers import quick_where_new

pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect without")  # among the cases on purpose

SMALL = tuple(case for case in CASES if case.vocab <= 2049)


def _jobs() -> Iterator[Job]:
    """Every case up to the medium sizes in three ways, in turns; the large ones as ranks list in earnest."""
    cuts = list(CUTS)
    for i, case in enumerate(SMALL):
        for j in range(3):
            n = 3 * i + j
            yield Job(case, cuts[n % len(cuts)], LISTS[(n // len(cuts) + j) % len(LISTS)])
    for i, case in enumerate(case for case in CASES if case.vocab > 2049):
        yield Job(case, cuts[i % len(cuts)])


def _aspects(job: Job) -> Iterator[Hashable]:
    case = job.case
    if case.vocab <= 2049:
        yield from ((case.params,), (case.maker, case.dtype), (case.extra, case.dtype), (job.cut, job.lists))


JOBS = tuple(_jobs())


def assert_all_ranks_agree(job: Job, found: list[list[split.Found]]) -> None:
    for rank in found:
        for ours, whole in zip(rank, job.some(answers_of(job.case)), strict=True):
            assert_agree(ours, whole)


@pytest.mark.parametrize("job", quick_where_new(JOBS, _aspects), ids=lambda job: job.name)
def test_equals_whole_rows(job: Job) -> None:
    assert_all_ranks_agree(job, job.ask())


def test_the_jobs_split_every_parameter_set_maker_and_extra_in_every_way() -> None:
    assert {job.case.params for job in JOBS} == set(PARAMS)
    assert {(job.case.maker, job.case.dtype) for job in JOBS} == {(m, d) for m in MAKERS for d in DTYPES}
    assert {job.case.extra for job in JOBS} == {None, *EXTRAS}
    assert {(job.cut, job.lists) for job in JOBS} == {(cut, lists) for cut in CUTS for lists in LISTS}
    assert {len(CUTS[job.cut](100)) - 1 for job in JOBS} == {1, 2, 3, 4, 8}


# Other engines -------------------------------------------------------------------------------------------------------

FEW = JOBS[5::193]
SHORT = tuple(replace(job, brief=True) for job in FEW if job.case.vocab <= 1025)
TINY = tuple(Job(Case("lm", *how), "2", (3, 8), brief=True) for how in (("all-hf", 16), ("rows", 33, "bf16")))


@pytest.mark.parametrize("job", FEW, ids=lambda job: job.name)
def test_the_reference_on_each_rank(job: Job) -> None:
    assert_all_ranks_agree(job, replace(job, backend="reference").ask())


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_cuda_on_fibers_on_each_rank(once: Callable[[str, Callable[[Path], object]], Path]) -> None:
    simt = Simt(once("simt", build) / "simt.so")
    simt.how = How("cluster", 2)
    with as_backend(simt), one_at_a_time("cuda"):
        for job in SHORT:
            assert_all_ranks_agree(job, replace(job, backend="cuda").ask())


@pytest.mark.parametrize("jobs", [TINY, pytest.param(SHORT[::3], marks=pytest.mark.slow)], ids=["tiny", "more"])
def test_triton_interpreted_on_each_rank(jobs: tuple[Job, ...], tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    given, found = tmp_path / "jobs.json", tmp_path / "found.pt"
    given.write_text(json.dumps([asdict(replace(job, backend="triton")) for job in jobs]))
    command = [sys.executable, split.__file__, given, found]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = torch.load(found)
    assert len(answers) == len(jobs) > 1
    for job in jobs:
        assert_all_ranks_agree(job, answers[job.name])
