"""The campaign: steps in order, each in its own process and within its bound, found figures kept whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.campaign.one import DONE, LOST, UNFINISHED
from bench.campaign.site import HEADLINE, ROOT, machine, tree
from bench.campaign.steps import STEPS, Outcome, Step, answer_of, place_of, wrong_engines
from bench.record import RESULTS, Results, console, slug

WORTH_STARTING = 45.0  # seconds for a part of a step
NOTHING = "there is no GPU that torch can use: --dry rehearses the campaign without one"


@dataclass
class Budget:
    """A time budget: seconds since the start, and the limit."""

    seconds: float
    start: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.start)


@dataclass(frozen=True)
class Plan:
    """What a call was asked for."""

    names: tuple[str, ...] = ()  # of the steps; all where none is named
    minutes: float = 9.5
    out: Path | None = None
    resume: bool = True
    again: bool = False  # measure these steps anew
    dry: bool = False
    modes: tuple[str, ...] = HEADLINE


def run(plan: Plan) -> int:
    """Take the steps, print what became of each. The exit status: 1 where one failed or found something wrong."""
    screen, budget = console(), Budget(60 * plan.minutes)
    if not plan.dry and not torch.cuda.is_available():
        screen.print(NOTHING)
        return 1
    results = open_results(plan)
    assert results.path is not None
    for step in (step for step in STEPS if not plan.names or step.name in plan.names):
        if plan.again:
            forget(results, step)
        before = results.data["steps"].get(step.name, {}).get("state")
        # A step that is named may have new questions; `install` looks whether its build is on this machine.
        if before in ("done", "failed") and step.name not in ("install", *plan.names):
            screen.print(f"{step.name:11}was {before} before", markup=False)
            continue
        if budget.left < (WORTH_STARTING if step.divisible else min(step.seconds, 60 * plan.minutes - 1)):
            screen.print(f"{step.name:11}is left for the next call: {budget.left:.0f} s are not enough", markup=False)
            break
        results.write()
        state = take(step, plan, results.path, min(float(step.seconds), budget.left))
        results.data = json.loads(results.path.read_text())
        own = [answer_of(r) for r in results.records if r["step"] == step.name]
        if not step.divisible and own and "failed" in own[-1]:
            state["state"] = "failed"
        results.data["steps"][step.name] = state
        results.write()
        screen.print(f"{step.name:11}{line_of(state, own)}", markup=False)
        if step.name == "install" and state["state"] == "failed":
            screen.print("without an installed fastsample there is nothing to measure")
            break
    return conclude(results, screen)


def open_results(plan: Plan) -> Results:
    """The campaign's file, which holds what earlier calls have found."""
    where = machine(plan.dry)
    default = Path("gpu-dry.json") if plan.dry else RESULTS / f"gpu-{slug(where)}.json"
    results = Results((plan.out or default).resolve(), "gpu", where, plan.resume)
    results.data["runs"][-1]["sources"] = tree()
    results.data.setdefault("steps", {})
    return results


def forget(results: Results, step: Step) -> None:
    results.records[:] = [r for r in results.records if r["step"] != step.name]
    results.data["steps"].pop(step.name, None)


def take(step: Step, plan: Plan, out: Path, seconds: float) -> dict[str, Any]:
    """Run the step's process, and another where one was lost at a question, until all are asked or time is over."""
    budget = Budget(seconds)
    status, text = LOST, ""
    while status == LOST and budget.left > 1:
        status, text = process(command(step, plan, out, budget.left), environment(plan.dry), budget.left)
        died = f"its process ended with status {status}: {text}"
        reason = f"no answer when {seconds:.0f} s were over" if status == UNFINISHED else died
        if note_failure(out, reason) and status != UNFINISHED:
            status = LOST
    state = {DONE: "done", LOST: "unfinished", UNFINISHED: "unfinished"}.get(status, "failed")
    why = {"why": text} if state == "failed" else {}
    return {"state": state, "seconds": round(seconds - budget.left, 1), "sources": tree(), **why}


def process(words: list[str], env: dict[str, str], seconds: float) -> tuple[int, str]:
    """Exit status and last words. At the limit it is stopped with all that it has started."""
    with subprocess.Popen(
        words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as child:
        try:
            text, _ = child.communicate(timeout=seconds)
            return child.returncode, text.strip()[-800:]
        except subprocess.TimeoutExpired:
            return UNFINISHED, ""
        finally:
            if child.poll() is None:  # an interruption comes here too
                os.killpg(child.pid, signal.SIGKILL)


def command(step: Step, plan: Plan, out: Path, seconds: float) -> list[str]:
    modes = [word for mode in plan.modes for word in ("--mode", mode)]
    own = ["gpu-step", step.name, "--out", str(out), f"--seconds={seconds:.1f}", *(["--dry"] if plan.dry else [])]
    return [sys.executable, "-m", "bench", *own, *modes]


def environment(dry: bool) -> dict[str, str]:
    return {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry else dict(os.environ)


def note_failure(out: Path, reason: str) -> bool:
    """Whether a process ended at a question; it is not asked again, or it would take the time of the others."""
    data = json.loads(out.read_text())
    if (key := data.pop("asking", None)) is None:
        return False
    data["results"].append({**key, "found": {"failed": reason[-400:]}})
    out.write_text(json.dumps(data, indent=1))
    return True


def line_of(state: dict[str, Any], own: list[Outcome]) -> str:
    """What became of a step, in a line."""
    counts = {word: sum(word in r for r in own) for word in ("failed", "refused", "skipped", "inconclusive")}
    counts["wrong"] = sum(r.get("passed") is False for r in own)
    remarks = "".join(f", {count} {word}" for word, count in counts.items() if count)
    why = f": {state['why'].splitlines()[-1]}" if state.get("why") else ""
    return f"{state['state']} in {state['seconds']:.0f} s: {len(own)} answers{remarks}{why}"


def conclude(results: Results, screen: Console) -> int:
    """Print what is wrong and where all is written."""
    wrong = wrong_engines(results.records)
    for engine in sorted(wrong):
        screen.print(f"PARITY FAILED ({engine}): its times mean nothing", style="red", markup=False)
    for record in results.records:
        for word in ("failed", "refused"):
            if word in (found := answer_of(record)) and record["step"] != "tuning":  # where many layouts do not fit
                words = f"{word.upper()}, no figure: {record['step']}, {place_of(record)}: {found[word]}"
                screen.print(words, markup=False, style="red")
    screen.print(f"written: {results.path}\npython -m bench report {results.path}", markup=False, soft_wrap=True)
    return int(bool(wrong) or any(state["state"] == "failed" for state in results.data["steps"].values()))
