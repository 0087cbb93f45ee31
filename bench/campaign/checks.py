"""Steps `parity`, `tests` and `sanitizers`: is it right?"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.campaign.site import ROOT, Site
from bench.campaign.steps import Outcome, Point

SAMPLE = Path(__file__).with_name("samples") / "memcheck.txt"
TO_REPORT = 10.0  # seconds that pytest has for its report
WORKERS = 8  # processes: a new specialisation of the Triton kernels compiles for seconds
PARITY = ("equals_reference", "however_rows_are_split", "invalid_rows")  # in the names of tests of parity
QUESTIONS = (
    ("lm", "all-hf", 128256, "f32", None),
    ("lm", "k50", 128256, "bf16", None),
    ("flat", "p.9", 128256, "f32", None),
    ("ties", "all-joint", 50257, "f16", None),
    ("lm", "greedy", 128256, "f32", None),
    ("lm", "penalties", 32001, "f32", "everything"),
    ("equal", "all-vllm", 2**18 + 1, "bf16", None),
    ("half_masked", "m.05", 151936, "f32", None),
    ("lm", "rows", 128256, "bf16", "mask"),
    ("lm", "plain", 1000, "f32", None),
)
"""Maker, parameters, vocabulary, dtype and extra inputs of tests/support/cases.py."""


# Parity ---------------------------------------------------------------------------------------------------------------


def parity(site: Site) -> Iterator[Point]:
    """A minute's selection of the gpu tests: tokens, log-probabilities and kept sets, equal to the bit."""
    for maker, params, vocab, dtype, extra in QUESTIONS[: 3 if site.dry else None]:
        for engine in site.engines:
            case = (maker, params, 300 if site.dry else vocab, dtype, extra)
            key = dict(zip(("maker", "params", "vocab", "dtype"), case, strict=False))
            yield {"engine": engine, **key, "extra": extra or ""}, partial(agrees, site, engine, case)


def agrees(site: Site, engine: str, case: tuple[Any, ...]) -> Outcome:
    from conformance import disagreements

    wrong = disagreements(ask(case, engine, site.device.type), expected(case))
    return {"passed": not wrong, "disagreements": wrong}


def ask(case: tuple[Any, ...], engine: str, device: str) -> dict[str, Any]:
    from cases import Case
    from conformance import named
    from on_gpu import OnGpu

    import fastsample as fs

    asked = Case(*case, rows=3)
    inputs = (OnGpu(asked) if device == "cuda" else asked).build()
    common = {**inputs.kwargs, **inputs.draw, "backend": engine, "on_invalid": "flag"}
    plain = fs.sample(inputs.logits, **common)
    more = fs.sample(inputs.logits, **common, num_samples=3, logprobs="raw", top_logprobs=4, kept="bitmask")
    return named(plain, "plain.") | named(more, "more.")


@lru_cache(maxsize=1)
def expected(case: tuple[Any, ...]) -> dict[str, Any]:
    return ask(case, "reference", "cpu")


# The gpu tests --------------------------------------------------------------------------------------------------------


def tests(site: Site) -> Iterator[Point]:
    yield {"what": "gpu tests"}, partial(run_tests, site)


def run_tests(site: Site) -> Outcome:
    """In several processes, and from a folder without the sources: the installed fastsample is what is tested."""
    report = site.scratch / "tests.xml"
    report.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "not sanitizer", "-p", "no:cacheprovider"),
        *("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), f"--junitxml={report}"),
        *(("-n", str(WORKERS)) if find_spec("xdist") is not None and not site.dry else ()),
        str(ROOT / "tests" / "engines" / "test_gpu.py"),
    ]
    with subprocess.Popen(command, cwd=ROOT / "tests", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as pytest:
        ended = within(pytest, site.left - TO_REPORT)
        if not ended:
            pytest.send_signal(signal.SIGINT)  # upon which it reports what it has
            if not within(pytest, TO_REPORT):
                pytest.kill()
    found = read_report(report) if report.exists() else {}
    return found if ended and found else {**found, "failed": "no end within the step's time, or no report"}


def within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ends in that time."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(max(seconds, 0.0))
    return process.returncode is not None


def read_report(path: Path) -> Outcome:
    """Numbers, the failures with their first lines, and the engines whose parity failed ("all": no engine named)."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failures = {}
    for case in cases:
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        if problem is not None:
            failures[case.get("name", "")] = (problem.get("message") or problem.text or "")[:300]
    skipped = sum(case.find("skipped") is not None for case in cases)
    wrong = {engine_in(name) for name in failures if any(words in name for words in PARITY)}
    found: Outcome = {"right": len(cases) - len(failures) - skipped, "left_out": skipped, "failures": failures}
    return found | {"parity_failed": sorted(wrong)}


def engine_in(test: str) -> str:
    return next((engine for engine in ("cuda", "triton") if engine in test), "all")


# Sanitizers -----------------------------------------------------------------------------------------------------------


def sanitizers(site: Site) -> Iterator[Point]:
    """The sharpest first: racecheck may not understand a cluster's shared memory, and then says nothing for certain."""
    from sanitizers import TOOLS

    for tool in TOOLS:
        yield {"engine": "cuda", "tool": tool}, partial(sanitize, site, tool)


def sanitize(site: Site, tool: str) -> Outcome:
    from sanitizers import command, verdict

    if site.dry:
        return verdict(tool, SAMPLE.read_text()) | {"replaced": "compute-sanitizer by samples/memcheck.txt"}
    if (found := shutil.which("compute-sanitizer")) is None:
        return {"skipped": "compute-sanitizer is not on the path"}
    start, limit = time.perf_counter(), min(120.0, site.left)
    try:
        done = subprocess.run(command(found, tool), cwd=site.scratch, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"no end within {limit:.0f} s"}
    return verdict(tool, done.stdout + done.stderr) | {"seconds": round(time.perf_counter() - start, 1)}
