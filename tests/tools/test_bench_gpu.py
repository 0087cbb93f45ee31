"""The campaign on a GPU without one: its bounds, its file, what it makes of tools' output, and the pages.

Every figure here is made up. CI also runs the whole rehearsal: `python -m bench gpu --dry`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sanitizers import TOOLS, command, verdict
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind site-packages, where the fastsample under test is

from bench import peers, record, summary  # noqa: E402
from bench.__main__ import app  # noqa: E402
from bench.campaign import checks, clock, counters, grids, headline, install, micro, one, run  # noqa: E402
from bench.campaign.site import Site  # noqa: E402
from bench.campaign.steps import IN_ALL, PER_COMMAND, STEPS, Point, Step  # noqa: E402
from bench.modes import BY_NAME, make_logits  # noqa: E402

HERE = {"gpu": "Made-up GPU", "compute capability": "9.0", "packages": {"torch": "9.9"}}
TIMES = STEPS[5]


def site(**fields: Any) -> Site:
    return Site(**{"dry": False, "scratch": Path(gettempdir())} | fields)


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_the_steps_fit_a_loan():
    assert sum(step.seconds for step in STEPS) <= IN_ALL
    assert all(step.seconds <= PER_COMMAND for step in STEPS)
    readme = (ROOT / "bench/README.md").read_text()
    assert all(f"| `{step.name}` | {step.seconds} s |" in readme for step in STEPS)
    names = [step.name for step in STEPS]
    assert names[:2] == ["install", "micro"]
    assert names.index("parity") < names.index("sanitizers") < names.index("times") < names.index("tuning")


def test_it_says_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["gpu"])
    assert (result.exit_code, result.output.split(":")[0]) == (1, "there is no GPU that torch can use")
    assert "expected one of install, micro, parity" in CliRunner().invoke(app, ["gpu", "--step", "times,"]).output


# A step in its process ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Asked(Step):
    """A step with these questions, each of which returns or raises what stands here."""

    answers_of: tuple[Any, ...] = ()

    def points(self, site: Site) -> Iterator[Point]:
        for number, answer in enumerate(self.answers_of):

            def measure(answer: Any = answer) -> dict[str, Any]:
                if isinstance(answer, Exception):
                    raise answer
                return dict(answer)

            yield {"number": number}, measure


def asked(*answers: Any, **fields: Any) -> Asked:
    return Asked("times", 60, "?", divisible=True, **{"timed": True} | fields, answers_of=answers)


def test_a_step_goes_on_where_it_was_and_a_failure_ends_nothing(tmp_path):
    step = asked({"cold_us": 1.0}, ValueError("no such thing"), {"cold_us": 3.0})
    path = tmp_path / "r.json"
    for _ in range(2):
        assert one.run(step, site(), record.Results(path, "gpu", HERE, resume=True)) == one.DONE
    found = json.loads(path.read_text())
    assert "asking" not in found
    assert found["results"] == [
        {"step": "times", "number": 0, "found": {"cold_us": 1.0}},
        {"step": "times", "number": 1, "found": {"failed": "ValueError: no such thing"}},
        {"step": "times", "number": 2, "found": {"cold_us": 3.0}},
    ]
    assert one.run(asked({}, {}, {}, {}), site(end=0.0), record.Results(path, "gpu", HERE, True)) == one.UNFINISHED


def test_a_rehearsal_has_no_figure(tmp_path):
    results = record.Results(tmp_path / "r.json", "gpu", HERE)
    step = asked({"cold_us": 1.0, "replaced": "ncu"})
    assert one.run(step, site(dry=True, scratch=tmp_path), results) == one.DONE
    assert results.records == [{"step": "times", "number": 0, "replaced": "ncu", "dry": {"cold_us": 1.0}}]


def test_times_after_failed_parity_are_marked(tmp_path):
    results = record.Results(None, "gpu", HERE)
    results.records.append({"step": "parity", "engine": "cuda", "found": {"passed": False}})
    for engine, marked in (("cuda", True), ("triton", False)):
        found = one.record_of(site(records=results.records), TIMES, {"step": "times", "engine": engine}, {"cold_us": 1})
        assert ("meaningless" in found["found"]) is marked
    results.records.append({"step": "tests", "found": {"parity_failed": ["all"]}})
    found = one.record_of(site(records=results.records), TIMES, {"step": "times", "engine": "triton"}, {"cold_us": 1})
    assert "meaningless" in found["found"]


def test_a_device_that_is_lost_needs_another_process(monkeypatch):
    results = record.Results(None, "gpu", HERE)
    monkeypatch.setattr(one, "alive", lambda site: False)
    assert one.run(asked(RuntimeError("illegal memory access"), {}), site(), results) == one.LOST
    monkeypatch.setattr(one, "alive", lambda site: True)
    assert one.run(asked(RuntimeError("illegal memory access"), {}), site(), results) == one.DONE
    assert [r["found"] for r in results.records] == [{"failed": "RuntimeError: illegal memory access"}, {}]


# The run --------------------------------------------------------------------------------------------------------------


def campaign(monkeypatch, tmp_path, script: str, *steps: str, **plan: Any) -> tuple[int, dict[str, Any]]:
    """A call whose steps' processes run this script, with `data`, `step` and `save()` at hand."""
    head = (
        "import json, pathlib, sys, time; step, path = sys.argv[1], pathlib.Path(sys.argv[2]);"
        "data = json.loads(path.read_text()); save = lambda: path.write_text(json.dumps(data));\n"
    )
    monkeypatch.setattr(run, "machine", lambda dry: HERE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        run, "command", lambda step, plan, out, left: [sys.executable, "-c", head + script, step.name, str(out)]
    )
    out = tmp_path / "gpu.json"
    status = run.run(run.Plan(steps, out=out, **plan))
    return status, json.loads(out.read_text())


NOTE = "data['results'].append({'step': step, 'n': len(data['results']), 'found': {}}); save()"


def test_steps_that_are_done_are_not_repeated_and_one_that_fails_ends_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "STEPS", STEPS[1:3])
    status, data = campaign(monkeypatch, tmp_path, f"{NOTE}\nsys.exit('no such module' if step == 'micro' else 0)")
    assert status == 1
    assert {name: state["state"] for name, state in data["steps"].items()} == {"micro": "failed", "parity": "done"}
    assert data["steps"]["micro"]["why"] == "no such module"
    monkeypatch.setattr(run, "STEPS", (*STEPS[1:3], TIMES))
    status, data = campaign(monkeypatch, tmp_path, NOTE)
    assert [r["step"] for r in data["results"]] == ["micro", "parity", "times"]
    status, data = campaign(monkeypatch, tmp_path, NOTE, "micro", again=True)
    assert status == 0
    assert [r["step"] for r in data["results"]] == ["parity", "times", "micro"]
    assert len(data["runs"]) == 3


def test_a_question_at_which_a_process_dies_or_hangs_is_not_asked_again(monkeypatch, tmp_path):
    ask = "done = len(data['results']); data['asking'] = {'step': step, 'number': done}; save()\n"
    dies = ask + "import os; os.abort() if done < 2 else (data.pop('asking'), save())"
    status, data = campaign(monkeypatch, tmp_path, dies, "times")
    assert (status, data["steps"]["times"]["state"]) == (0, "done")
    assert [r["number"] for r in data["results"]] == [0, 1]
    assert all(r["found"]["failed"].startswith("its process ended with status -6") for r in data["results"])

    short = dataclasses.replace(TIMES, seconds=2)
    monkeypatch.setattr(run, "STEPS", (short,))
    status, data = campaign(monkeypatch, tmp_path, ask + "time.sleep(60)", "times", again=True)
    assert data["steps"]["times"]["state"] == "unfinished"
    assert [r["found"] for r in data["results"]] == [{"failed": "no answer when 2 s were over"}]


def test_what_is_started_ends_with_its_step(tmp_path):
    child = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run.process([sys.executable, "-c", parent], run.environment(False), 0.7) == (run.UNFINISHED, "")
    time.sleep(1.2)
    assert not (tmp_path / "late").exists()


def test_a_step_that_no_time_is_left_for_waits_for_the_next_call(monkeypatch, tmp_path, capsys):
    slow = f"{NOTE}; time.sleep(0.4)"
    _, data = campaign(monkeypatch, tmp_path, slow, "micro", "times", minutes=0.02)
    assert list(data["steps"]) == ["micro"]
    assert "left for the next call" in capsys.readouterr().out


def test_without_an_installation_nothing_is_measured(monkeypatch, tmp_path):
    fails = "data['results'].append({'step': step, 'found': {'failed': 'no nvcc'}}); save()"
    status, data = campaign(monkeypatch, tmp_path, fails, "install", "micro")
    assert (status, list(data["steps"]), data["steps"]["install"]["state"]) == (1, ["install"], "failed")


def test_the_installation_is_for_this_card_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    words = install.command(site())
    assert "cmake.define.FASTSAMPLE_CUDA_ARCHITECTURES=120-real" in words
    assert {"--no-deps", "--no-build-isolation"} <= set(words)


# Times ----------------------------------------------------------------------------------------------------------------


def test_nothing_is_timed_that_is_wrong(monkeypatch):
    right = peers.BY_NAME["torch"]
    wrong = dataclasses.replace(right, name="wrong", make=lambda mode, logits: right.make(BY_NAME["T"], logits))
    monkeypatch.setattr(headline, "inputs_of", lambda *_: [make_logits("flat", 2, 600, torch.float32)] * 3)
    here, shape = site(dry=True), (2, 600, "float32")
    good, bad = (headline.measure(here, headline.of_peer(p), BY_NAME["k50 p.95"], shape) for p in (right, wrong))
    assert {"cold_us", "hot_us", "graph", "floor_us"} == good.keys()
    assert "outside" in bad["refused"]
    assert "cold_us" not in bad


def test_cold_inputs_exceed_the_cache_twice():
    row, cache = 128256 * 4, 50 * 2**20
    assert clock.turns(row, cache) * row > 2 * cache
    assert clock.turns(10**9, cache) == 2


def test_calls_are_captured_on_the_stream_that_has_run_them_and_replays_them(monkeypatch):
    """On a stand-in for torch.cuda that notes on which stream everything happens."""
    seen: list[tuple[str, Any]] = []
    current = ["default"]

    @contextmanager
    def stream(name: Any) -> Iterator[None]:
        before, current[0] = current[0], name
        yield
        current[0] = before

    @contextmanager
    def graph(graph: Any, stream: Any) -> Iterator[None]:
        seen.append(("capture", stream))
        yield

    class Timer:
        def __init__(self, **_: Any) -> None: ...
        def record(self) -> None:
            seen.append(("event", current[0]))

        def synchronize(self) -> None: ...
        def elapsed_time(self, end: Any) -> float:
            return 0.5  # ms

    class Graph:
        def replay(self) -> None:
            seen.append(("replay", current[0]))

    lane = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(clock, "lane", lambda: lane)
    for name, fake in (("stream", stream), ("graph", graph), ("Event", Timer), ("CUDAGraph", Graph)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    us, captured = clock.timed([lambda: seen.append(("call", current[0]))] * 5, torch.device("cuda"))
    assert (us, captured) == (100.0, True)
    assert all(where is lane for _, where in seen)
    assert [what for what, _ in seen].count("replay") == clock.REPLAYS + 1


def test_the_floor_is_the_read_that_was_measured():
    constants = [
        {"what": "read", "bytes": 4 * 600, "figures": {"us": 1.25}},
        {"what": "read", "bytes": 8, "failed": "no memory"},
    ]
    records = [{"step": "micro", "what": "constants", "found": {"constants": constants}}]
    assert micro.read_floor(records, micro.bytes_of(1, 600, "float32")) == 1.25
    assert micro.read_floor(records, 8) is None
    assert micro.read_floor([{"step": "micro", "dry": {"constants": constants}}], 2400) is None


# Tools ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
@pytest.mark.parametrize("arch", [80, 90, 120])
def test_the_card_s_constants_compile(arch, tmp_path):
    assert micro.compile_for(arch, tmp_path) is None
    done = subprocess.run([tmp_path / "micro", "1000"], capture_output=True, text=True)
    first = micro.parse(done.stdout)[0]
    assert first["what"] == "device"
    assert ("figures" in first) is torch.cuda.is_available()


def test_samples_hold_no_figure_and_are_read():
    """A rehearsal's stand-ins for tools have the tools' form, and nothing that looks like a measurement."""
    constants = micro.parse(micro.SAMPLE.read_text())
    assert {c["what"] for c in constants} == set(re.findall(r'\\"what\\": \\"([\w ]+)\\"', micro.SOURCE.read_text()))
    numbers = [v for c in constants for v in c.get("figures", {}).values() if type(v) in (int, float)]
    assert set(numbers) == {0}
    counted = counters.parse(counters.SAMPLE.read_text())
    assert counted == {"time_ns": 0, "read_bytes": 0, "bank_conflicts": 0, "stalled_barrier": 0}


def test_nsight_compute_s_figures_are_read_with_their_thousands():
    text = counters.SAMPLE.read_text().replace('"byte","0"', '"byte","513,024"').replace('"ns","0"', '"ns","9984"')
    counted = counters.parse(text)
    assert (counted["read_bytes"], counted["time_ns"]) == (513024, 9984)
    assert counters.parse("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission") == {}
    words = counters.command("ncu", "regex:sample_kernel")
    assert tuple(words[-2:]) == ("--clock-control", "none")  # the card's settings are left as they are


def test_compute_sanitizer_is_told_which_kernels_as_it_wants_to_be():
    for tool in TOOLS:
        words = command("compute-sanitizer", tool)
        assert ("--kernel-name" in words) is (tool != "initcheck")
        assert not any(word.startswith("regex:") for word in words)
    source = (ROOT / "csrc/cuda/sample.cuh").read_text()
    pattern = command("x", "memcheck")[6].removeprefix("regex=")
    assert "sample_kernel" in source
    assert re.search(pattern, "_ZN10fastsample13sample_kernelIfLNS_6PolicyE0EEEvNS_5BatchENS_9WorkspaceEi")


@pytest.mark.parametrize(
    ("tool", "output", "word"),
    [
        ("memcheck", "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", "passed"),
        (
            "memcheck",
            "========= COMPUTE-SANITIZER\n========= Invalid read\n========= ERROR SUMMARY: 1 error\n",
            "failed",
        ),
        ("memcheck", "========= ERROR SUMMARY: 10 errors\n", "failed"),
        ("memcheck", "========= COMPUTE-SANITIZER\nSegmentation fault\n", "failed"),
        ("racecheck", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "passed"),
        ("racecheck", "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n", "inconclusive"),
    ],
)
def test_what_a_sanitizer_says(tool, output, word):
    found = verdict(tool, output)
    assert {"passed", "failed", "inconclusive"} & found.keys() == {word}


def test_failed_tests_are_listed_and_parity_s_name_the_engine(tmp_path):
    failure = '<failure message="tokens differs in 1 of 3"/>'
    names = {"test_engine_equals_reference[cuda-lm]": failure, "test_engine_equals_reference[triton-lm]": ""}
    names |= {"test_invalid_rows[None]": failure, "test_a_step_neither_waits[triton]": failure, "x": "<skipped/>"}
    cases = "".join(f'<testcase name="{name}">{inner}</testcase>' for name, inner in names.items())
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    found = checks.read_report(tmp_path / "tests.xml")
    assert (found["right"], found["left_out"], len(found["failures"])) == (1, 1, 3)
    assert found["parity_failed"] == ["all", "cuda"]


# Pages ----------------------------------------------------------------------------------------------------------------


def made_up(path: Path, dry: bool = False) -> Path:
    """A campaign's file of which half the steps have run; every figure is made up."""
    word = "dry" if dry else "found"
    place = {"step": "times", "mode": "k50 p.95", "vocab": 128256, "dtype": "float32"}
    results: list[dict[str, Any]] = []
    for rows in (1, 64):
        for name, us in (("fastsample cuda", 11.0), ("torch", 222.0)):
            figures = {"cold_us": us * rows, "hot_us": 5.0, "graph": name != "torch", "floor_us": 3.5 * rows}
            results.append({**place, "rows": rows, "name": name, word: figures})
    results[1][word]["meaningless"] = "parity failed before this was timed"
    results += [
        {"step": "parity", "engine": "cuda", "maker": "lm", "vocab": 300, word: {"passed": True}},
        {"step": "parity", "engine": "triton", "maker": "lm", "vocab": 301, word: {"passed": False}},
        {
            "step": "sanitizers",
            "engine": "cuda",
            "tool": "racecheck",
            word: {"summary": "3 hazards", "inconclusive": "x"},
        },
        {"step": "micro", "what": "constants", word: {"constants": [{"what": "bins", "figures": {"cycles": 77}}]}},
        {"step": "counters", "engine": "cuda", "rows": 1, "vocab": 9, "dtype": "float32", word: {"read_bytes": 4e5}},
        {"step": "uses", "engine": "cuda", "what": "graph", word: {"passed": True, "replay_us": 12.5}},
    ]
    state = {"state": "done", "seconds": 12.0, "sources": "abc"}
    steps = {
        "parity": state,
        "times": state | {"sources": "def"},
        "micro": state,
        "tuning": state | {"state": "unfinished"},
    }
    runs = [{"date": "2031-02-03", "command": "python -m bench gpu"}]
    machine = HERE | ({"dry": True} if dry else {})
    path.write_text(json.dumps({"kind": "gpu", "machine": machine, "runs": runs, "steps": steps, "results": results}))
    return path


def test_the_page_says_which_card_what_was_found_and_what_is_missing(tmp_path):
    result = CliRunner().invoke(app, ["report", str(made_up(tmp_path / "g.json")), "--out", str(tmp_path / "r.html")])
    assert result.exit_code == 0, result.output
    page = re.sub(r"\s+", " ", (tmp_path / "r.html").read_text())
    for words in (
        *("Made-up GPU", "torch 9.9", "11.0 / 5.0", "222.0 / 5.0 *!", "3.5", "bins", "cycles 77", "400,000", "12.5"),
        "Missing or unfinished: install, tests, sanitizers, tuning, counters, uses",
        "Parity failed (triton): its times mean nothing",
        "The steps were not all run on the same sources",
        "racecheck: inconclusive",
    ):
        assert words in page, words
    assert page.count("data:image/png;base64,") == 1


def test_a_rehearsal_s_page_shows_no_figure(tmp_path):
    (machine,) = record.load([made_up(tmp_path / "g.json", dry=True)])
    text = "\n".join(grid.markdown() for grid in grids.grids(machine))
    assert grids.REHEARSED in text
    for figure in ("11.0", "222.0", "77", "400,000", "12.5"):
        assert figure not in text
    assert "A rehearsal: no figure of it is a GPU's." in grids.grids(machine)[0].note
    assert record.results_in(tmp_path) == []


def test_the_documents_get_the_tables(tmp_path):
    machines = record.load([made_up(tmp_path / "g.json")])
    text = summary.performance(machines, tmp_path)
    assert "### Made-up GPU" in text
    assert "Missing or unfinished: install" in text
    assert "| k50 p.95 | 1 | 128256 | float32 | 3.5 | 11.0 / 5.0 | 222.0 / 5.0 *! |" in text
