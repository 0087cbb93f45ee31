"""One step in this process: `python -m bench gpu-step`, which bench/campaign/run.py starts."""

from __future__ import annotations

from typing import Any

import torch

from bench.campaign.site import Site
from bench.campaign.steps import Outcome, Record, Step, wrong_engines
from bench.record import Results

TIME_TO_STOP = 5.0  # seconds of a step's time in which no question is begun
DONE, UNFINISHED, LOST = 0, 3, 4  # exit statuses: all asked; out of time; the device no longer answers
STAND_INS = {"cuda": "the GPU by threads on fibers (tests/simt)", "triton": "the GPU by Triton's interpreter"}


def run(step: Step, site: Site, results: Results) -> int:
    """Ask what is not answered yet, until the time is over; each answer is on disk before the next question."""
    site.records = results.records
    site.open()
    for key, measure in step.points(site):
        key = {"step": step.name, **key}
        if results.find(key) is not None:
            continue
        if site.left <= 0:
            return UNFINISHED
        results.data["asking"] = key  # should this process be stopped meanwhile, it is known at what
        results.write()
        outcome = answer(measure)
        results.data.pop("asking")
        results.add(record_of(site, step, key, outcome))
        if not alive(site):
            return LOST
    return DONE


def answer(measure: Any) -> Outcome:
    """What it returns, or its failure, which must not end the step."""
    try:
        found: Outcome = measure()
        return found
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:400]}


def alive(site: Site) -> bool:
    """Whether the device still answers this process: after a fault in a kernel it never does again."""
    if site.dry or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def record_of(site: Site, step: Step, key: dict[str, Any], outcome: Outcome) -> Record:
    """The record; in a rehearsal with what stood in for what."""
    if site.dry:
        replaced = outcome.pop("replaced", STAND_INS.get(key.get("engine", "")))
        return {**key, **({"replaced": replaced} if replaced else {}), "dry": outcome}
    if step.timed and wrong_engines(site.records) & {key.get("engine"), "all"}:
        outcome["meaningless"] = "parity failed before this was timed"
    return {**key, "found": outcome}
