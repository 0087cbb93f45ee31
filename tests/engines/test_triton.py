"""The Triton engine in Triton's interpreter, on CPU tensors, against the reference: equal to the bit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import EXTRAS, MAKERS, OLD_SETS, PARAMS, PENALTY_SETS, Case
from conformance import assert_agree
from tiers import quick_where_new
from triton_interpreter import LISTING, SUPPORT, Job, Rare, interpret

import fastsample as fs
from fastsample import reference
from fastsample.backends import engine, select
from fastsample.backends import triton as adapter
from fastsample.params import specs

# Penalties without ids are among the cases on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no effect without"),
    pytest.mark.usefixtures("remembered"),
]

pytest.importorskip("triton", reason="Triton is not installed")

KINDS = ("f32", "bf16", "f16")
PROCESSES = 2


def _jobs() -> list[Job]:
    """A slice of tests/support/cases.py that the interpreter runs in a minute or two.

    It takes as long for each row, so that only sets that say something of each, or toss coins, have several.
    """
    jobs = []
    sizes = (300, 257, 33, 513)
    for p, params in enumerate(OLD_SETS):
        extra = "ids" if "penalt" in params or params[:4] in ("repe", "freq", "pres") else None
        maker = ("ties", "lm", "steps", "half_masked", "flat")[p % 5]
        jobs.append(Job(Case(maker, params, sizes[p % 4], KINDS[p % 3], extra, 1 + 4 * ("rows" in params))))
    makers = list(MAKERS)
    for p, params in enumerate(name for name in PARAMS if name not in OLD_SETS):
        extra = ("repeats", "repeats_output")[p % 2] if params in PENALTY_SETS else None
        rows = 5 if "rows" in params else 4 if "+" in params or params in ("floors", "llama.cpp", "ngrams") else 1
        rows = max(rows, 2) if "xtc" in params else rows
        maker = ("lm", "ties", "flat", "half_masked", "steps", makers[p % len(makers)])[p % 6]
        case = Case(maker, params, (65, 100, 33, 129)[p % 4], KINDS[p % 3], extra, rows)
        jobs.append(Job(case, 1 + (p % 7 == 0), 64, top=6 if p % 5 == 0 else 0))
    for p, params in enumerate(OF_PROBS):
        extra = (None, "mask", None, "mask_short", None, "mask_empty")[p % 6]
        maker = ("lm", "ties", "flat", "half_masked", "lone")[p % 5]
        case = Case(maker, params, (65, 100, 33)[p % 3], KINDS[p % 3], extra, 3)
        jobs.append(Job(case, 1 + (p % 3 == 0), 32, probs=True))
    for kind, extra in zip(KINDS, (None, "mask", None), strict=True):
        jobs.append(Job(Case("flat", "p.9", 50, kind, extra, 7), 1, 64, probs=True))
    for m, maker in enumerate(MAKERS):
        params = ("all-hf-ties", "all-joint", "all-vllm", "k50-p.9")[m % 4]
        jobs.append(Job(Case(maker, params, sizes[m % 4], KINDS[(m // 4) % 3], None, 1), parts=1 + 2 * (m % 2)))
    for e, extra in enumerate(EXTRAS):
        params = ("penalties", "all-joint-ties", "rows-penalties", "greedy")[e % 4]
        jobs.append(Job(Case("ties", params, (300, 97)[e % 2], KINDS[e % 3], extra, 3), parts=1 + e % 2))
    for vocab in (1, 2, 3, 255, 256, 511, 1025):
        jobs.append(Job(Case("ties", "all-hf", vocab, KINDS[vocab % 3], None, 1)))
    jobs += [Job(Case("flat", "plain", 100, "f32", None, 0)), Job(Case("lm", "p.9", 4099, "bf16", None, 1), parts=4)]
    large = (("equal", "p.9", 2**20, "f32"), ("ties", "all-joint", 2**20, "bf16"), ("lm", "k50-p.9", 128256, "f32"))
    jobs += [Job(Case(m, p, vocab, dtype, None, 1), 1 + i, block=2**16) for i, (m, p, vocab, dtype) in enumerate(large)]
    for params, extra in (("all-hf", None), ("all-joint-ties", "ids"), ("greedy", None), ("plain", "bias")):
        jobs.append(Job(Case("ties", params, 700, "f32", extra, 2), parts=3, threads=True))
    jobs.append(Job(Case("zeros", "all-vllm", 1100, "bf16", None, 1), parts=3, threads=True))
    for params, kind in (("llama.cpp", "f16"), ("floors", "f32"), ("xtc-any", "bf16")):
        jobs.append(Job(Case("lm", params, 200, kind, None, 2), parts=3, block=64, threads=True, top=0))
    jobs.append(Job(Case("lm", "all-joint-ties", 200, "f32", None, 2), parts=3, block=64, threads=True, probs=True))
    return jobs


OF_PROBS = (
    *("plain", "greedy", "k2", "k50", "p.9", "m.05", "all-hf-ties", "all-vllm-ties", "all-joint-ties", "p-m-joint"),
    *("epsilon_cutoff=0.1", "top_a=0.6", "p_less=True", "xtc_probability=0.5", "xtc_probability=1.0", "xtc-any"),
)
"""Sets that have a meaning for probabilities."""

JOBS = _jobs()


def _rare_jobs() -> list[Job]:
    jobs = []
    for p, (params, makers) in enumerate(RARE_MAKERS.items()):
        for m, maker in enumerate(makers):
            rows = 3 if params == "xtc-cold" else 2  # as many as it has values
            case = Rare(maker, params, (100, 200)[m % 2], KINDS[(p + m) % 3], None, rows)
            jobs.append(Job(case, parts=(1, 2)[(p + m) % 2], block=64))
    jobs.append(Job(Rare("ties", "typical-xtc-cold", 150, "bf16", None, 3), parts=3, block=64, threads=True))
    for m, maker in enumerate(("halves", "cutoffs")):
        jobs.append(Job(Rare(maker, "xtc-all", 130, "f32", None, 4), 1 + m, 64, probs=True))
    return jobs


RARE_MAKERS = {
    "typical-cold": ("ties", "flat"),
    "typical-m": ("lm", "flat"),
    "typical-all": ("ties", "flat"),
    "xtc-cold": ("lm", "ties"),
    "typical-xtc-cold": ("flat", "lm"),
    "xtc-all": ("cutoffs", "halves"),
}
RARE_JOBS = _rare_jobs()


def _listing_jobs() -> list[Job]:
    """Rows longer than a list of candidates, in 64 groups or more: with few candidates, or more than are listed."""
    jobs = []
    for p, params in enumerate(LISTING):
        case = Rare(("steps", "lm", "ties")[p % 3], params, 1100, "f32", None, 4 if params == "k-rows" else 2)
        jobs.append(Job(case, 1 + (p % 5 == 4), 1024, top=0))
    for p, params in enumerate(("k50-p.9", "all-hf-ties", "all-joint-ties", "all-joint", "all-vllm", "k7-all")):
        kind = KINDS[p % 3]
        for maker in (("lm", "equal"), ("ties", "zeros"), ("tiny_spread", "flat"))[p % 3]:
            case = Case(maker, params, 700, kind, "everything" if params == "all-vllm" else None, 2)
            jobs.append(Job(case, 1 + (p % 3 == 1), 256 if kind == "f32" else 512, top=0))
    jobs.append(Job(Rare("half_masked", "k192", 300, "f32", None, 2), top=0))  # more than are allowed
    jobs.append(Job(Case("lone", "k50-p.9", 700, "f32", "mask", 2), 2, top=0))
    for maker in ("lm", "equal"):
        jobs.append(Job(Case(maker, "k50-p.9", 700, "f32", None, 1), 3, threads=True, top=0))
    jobs.append(Job(Case("lm", "all-joint-ties", 700, "f32", None, 3), probs=True))
    return jobs


LISTING_JOBS = _listing_jobs()


@pytest.fixture(scope="session")
def interpreted(
    request: pytest.FixtureRequest, once: Callable[[str, Callable[[Path], None]], Path]
) -> dict[str, dict[str, torch.Tensor]]:
    """Results of every job that this session asks for."""
    calls = (item.callspec for item in request.session.items if hasattr(item, "callspec"))
    jobs = [call.params["job"] for call in calls if isinstance(call.params.get("job"), Job)]

    def make(folder: Path) -> None:
        with ThreadPoolExecutor(PROCESSES) as pool:
            parts = pool.map(lambda i: interpret(jobs[i::PROCESSES], folder / str(i)), range(PROCESSES))
        torch.save({name: found for part in parts for name, found in part.items()}, folder / "found.pt")

    found: dict[str, dict[str, torch.Tensor]] = torch.load(once("interpreted", make) / "found.pt")
    return found


def _aspects(job: Job) -> tuple[Hashable, ...]:
    case = job.case
    if case.vocab > 2049:
        return ()  # minutes in the interpreter
    # Of the newer sets, the quick tier sees each filter alone, and beside some other.
    sets = (case.params,) if case.params in OLD_SETS else re.split(r"[+-]", case.params)
    return job.probs, *sets, case.maker, case.extra, case.dtype, (job.threads, job.parts), case.vocab < 97


@pytest.mark.parametrize("job", quick_where_new(JOBS, _aspects), ids=lambda job: job.name)
def test_equals_reference(job: Job, interpreted: dict[str, dict[str, torch.Tensor]]) -> None:
    assert_agree(interpreted[job.name], job.ask("reference"))


@pytest.mark.parametrize("job", quick_where_new(RARE_JOBS, lambda job: [job.case.params]), ids=lambda job: job.name)
def test_equals_reference_where_what_is_kept_may_weigh_nothing(
    job: Job, interpreted: dict[str, dict[str, torch.Tensor]]
) -> None:
    assert_agree(interpreted[job.name], job.ask("reference"))


def _listing_aspects(job: Job) -> tuple[Hashable, ...]:
    kind = ("overflows", job.case.maker == "equal"), ("threads", job.threads), ("probs", job.probs)
    return *kind, *({job.case.params} & LISTING.keys() if job.parts == 1 else ())


@pytest.mark.parametrize("job", quick_where_new(LISTING_JOBS, _listing_aspects), ids=lambda job: job.name)
def test_equals_reference_where_candidates_are_listed(
    job: Job, interpreted: dict[str, dict[str, torch.Tensor]]
) -> None:
    assert_agree(interpreted[job.name], job.ask("reference"))


def test_the_jobs_reach_every_parameter_set_maker_and_extra() -> None:
    cases = [job.case for job in JOBS]
    assert {case.params for case in cases} == set(PARAMS)
    assert {case.maker for case in cases} == set(MAKERS)
    assert {case.extra for case in cases} == {None, *EXTRAS}
    every = JOBS + RARE_JOBS + LISTING_JOBS
    assert len({job.name for job in every}) == len(every)


# Choosing the engine ------------------------------------------------------------------------------------------------


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, cwd=SUPPORT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_fastsample_and_sampling_on_a_cpu_does_not_import_triton() -> None:
    code = """
import sys, torch, fastsample as fs
from fastsample.backends import engine
engine("triton").why_not(torch.zeros(1, 9))
fs.sample(torch.zeros(9)), fs.engines()
print("triton" in sys.modules, any(name.startswith("fastsample.kernels") for name in sys.modules))
"""
    assert python(code, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="") == "False False"


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set")
def test_it_refuses_cpu_tensors_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_has_device", lambda: False)
    with pytest.raises(
        RuntimeError, match="backend 'triton' cannot serve these logits: there is no CUDA or HIP device"
    ):
        fs.sample(torch.zeros(9), backend="triton")
    monkeypatch.setattr(adapter, "_has_device", lambda: True)
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot serve these logits: .*the logits are on cpu"):
        fs.sample(torch.zeros(9), backend="triton")


def test_auto_takes_it_for_gpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_has_device", lambda: True)
    monkeypatch.setattr(adapter, "_why_not_kernels", lambda: None)
    on_gpu, on_cpu = (SimpleNamespace(device=torch.device(name)) for name in ("cuda:0", "cpu"))
    assert select("auto", on_gpu).name == "triton"  # type: ignore[arg-type]
    assert select("auto", on_cpu).name == "cpu"  # type: ignore[arg-type]


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_is_installed", lambda: False)
    assert engine("triton").why_not(None) == "triton is not installed"
    assert engine("triton").why_not(torch.zeros(1, 9)) == "triton is not installed"


def test_a_broken_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(stem: str) -> object:
        raise ImportError("no libtriton")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(adapter, "kernels", broken)
    monkeypatch.setattr(adapter, "_why_not_kernels", cache(adapter._why_not_kernels.__wrapped__))
    assert engine("triton").why_not(torch.zeros(1, 9)) == "the kernels cannot be imported: no libtriton"


def test_an_old_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("triton.__version__", "3.2.0")
    monkeypatch.setattr(adapter, "_why_not_kernels", cache(adapter._why_not_kernels.__wrapped__))
    reason = "Triton 3.2.0 is too old: before 3.3 it has no cooperative launches"
    assert engine("triton").why_not(torch.zeros(1, 9)) == reason


def test_the_environment_forces_it() -> None:
    code = "import torch, fastsample as fs; print(int(fs.sample(torch.arange(40.0) / 9, seed=7).tokens), fs.engines())"
    want = int(fs.sample(torch.arange(40.0) / 9, seed=7, backend="reference").tokens)
    token, engines = python(code, TRITON_INTERPRET="1", FASTSAMPLE_BACKEND="triton").split(" ", 1)
    assert int(token) == want
    assert "'triton': None" in engines


def test_the_kernels_take_columns_and_choices_from_the_table() -> None:
    code = """
from fastsample.kernels import record
from fastsample.params import specs
for at, (name, spec) in enumerate(specs()):
    assert record.column(name) == at
    assert record.is_float(name) == (spec.kind == "float")
    assert [record.choice(name, value) for value in spec.choices] == list(range(len(spec.choices)))
"""
    python(code)


def test_another_table_gives_other_columns_and_other_kernels() -> None:
    """Triton caches kernels on disk: one that was compiled for a table must not serve another."""
    code = """
import sys, fastsample.params as params
if REVERSED:
    table = params.specs()[::-1]
    params.specs = lambda: table
from fastsample.kernels import filters, outputs, record, sample
kernels = (record.param, filters.min_p, sample.sample, outputs.write)
print(record.column("temperature"), *(kernel.cache_key for kernel in kernels))
"""
    one, again, other = (python(f"REVERSED = {flag}" + code).split() for flag in (False, False, True))
    assert one == again
    assert (int(one[0]), int(other[0])) == (0, len(specs()) - 1)
    assert not set(one) & set(other)


def test_old_tritons_too_find_no_kernel_of_other_constants() -> None:
    """Their keys have no constexprs, so what the kernels are made of is put into their sources."""
    code = """
from fastsample.backends import triton_memory
from fastsample.kernels import outputs, versions
versions.OLD = True
if NO_TABLE:
    triton_memory.specs = lambda: ()
print(triton_memory.kernels("outputs").write.cache_key)
"""
    one, again, other = (python(f"NO_TABLE = {flag}" + code) for flag in (False, False, True))
    assert one == again
    assert one != other


def test_the_kernels_read_every_parameter() -> None:
    source = "".join(path.read_text() for path in (Path(__file__).parents[2] / "kernels").glob("*.py"))
    assert set(re.findall(r'\bparam\(.+?, "(\w+)"\)', source)) == {name for name, _ in specs()}


def test_the_coefficients_are_the_references() -> None:
    """A wrong last bit shows in one token of 10^5, more than the interpreter can run."""
    code = "from fastsample.kernels import mass; print(*(getattr(mass, f'C{i}').value.hex() for i in range(5, 0, -1)))"
    assert [float.fromhex(c) for c in python(code).split()] == list(reference.POLYNOMIAL[:5])
