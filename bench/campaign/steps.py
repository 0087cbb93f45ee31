"""The steps of a campaign in their order, each with the seconds that it may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from bench.campaign.site import Site

Outcome: TypeAlias = "dict[str, Any]"
"""Figures; or why there are none: `refused`, `skipped` or `failed`. `replaced` says what a rehearsal did without."""

Record: TypeAlias = "dict[str, Any]"
"""A step's name, what was asked, and the outcome under `found`. A rehearsal's lies under `dry`: nobody takes it for a
GPU's."""

Point: TypeAlias = "tuple[dict[str, Any], Callable[[], Outcome]]"
"""What is asked, in words and whole numbers, and what answers it."""

PER_COMMAND, IN_ALL = 600, 1800 - 3 * 60  # seconds that a loan usually allows, less the start of three calls


@dataclass(frozen=True)
class Step:
    """A part of the campaign that has a process of its own."""

    name: str
    seconds: int  # at most; its process is then stopped
    answers: str
    divisible: bool = False  # whether it is worth starting with less time, to be continued by the next call
    timed: bool = False  # whether its times mean nothing after failed parity

    def points(self, site: Site) -> Iterator[Point]:
        """Its questions, the most valuable first."""
        module, _, function = WHERE[self.name].partition(":")
        found: Iterator[Point] = getattr(import_module(f"bench.campaign.{module}"), function)(site)
        return found


def found_in(record: Record) -> Outcome:
    """What a GPU has answered; {} in a rehearsal."""
    outcome: Outcome = record.get("found", {})
    return outcome


def answer_of(record: Record) -> Outcome:
    """The outcome, whether of a rehearsal or not."""
    outcome: Outcome = record.get("dry", record.get("found", {}))
    return outcome


def place_of(record: Record) -> str:
    """What was asked, in words."""
    return ", ".join(str(v) for k, v in record.items() if k not in ("step", "found", "dry", "replaced") and v != "")


def wrong_engines(records: list[Record]) -> set[str]:
    """Engines whose parity failed; "all" where a failed test of parity names none."""
    parity = {r["engine"] for r in records if r["step"] == "parity" and answer_of(r).get("passed") is False}
    tests = [r for r in records if r["step"] == "tests"]
    return parity | {engine for r in tests for engine in answer_of(r).get("parity_failed", ())}


WHERE = {
    "install": "install:points",
    "micro": "micro:points",
    "parity": "checks:parity",
    "tests": "checks:tests",
    "sanitizers": "checks:sanitizers",
    "times": "headline:points",
    "tuning": "tuning:points",
    "counters": "counters:points",
    "uses": "uses:points",
}
STEPS = (
    Step("install", 180, "does it build here, for this card alone, without a network?"),
    Step("micro", 60, "what do barriers, atomics, bank conflicts and a plain read cost on this card?"),
    Step("parity", 60, "are both engines' tokens the reference's?", divisible=True),
    Step("tests", 210, "which of the gpu tests fail?"),
    Step("sanitizers", 180, "do memcheck, synccheck, initcheck and racecheck find anything?", divisible=True),
    Step("times", 330, "how long is a step, beside others and beside one read?", divisible=True, timed=True),
    Step("tuning", 210, "which layout is fastest for which shape?", divisible=True, timed=True),
    Step("counters", 180, "what do the hardware's counters say of three shapes?", divisible=True, timed=True),
    Step("uses", 180, "graphs, streams, torch.compile and generate: right, and what are they worth?", True, True),
)
BY_NAME = {step.name: step for step in STEPS}
