"""A campaign's answers as tables: what has been run, what it found, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.campaign.steps import STEPS, Record, answer_of, found_in, place_of, wrong_engines
from bench.campaign.tuning import winners
from bench.grid import Grid
from bench.record import Machine

REHEARSED = "rehearsed"  # in place of a figure


def grids(machine: Machine) -> list[Grid]:
    """All tables that there is something for; none where no campaign has run."""
    if not machine.of("gpu"):
        return []
    makers = (steps_grid, checks_grid, times_grid, constants_grid, tuning_grid, counters_grid, uses_grid)
    return [grid for make in makers if (grid := make(machine)).lines]


def warnings(machine: Machine) -> list[str]:
    """What a reader must know before any figure."""
    lines = [
        f"Parity failed ({engine}): its times mean nothing." for engine in sorted(wrong_engines(machine.of("gpu")))
    ]
    if machine.where.get("dry"):
        lines.append("A rehearsal: no figure of it is a GPU's.")
    if missing := [step.name for step in STEPS if state_of(machine, step.name) != "done"]:
        lines.append(f"Missing or unfinished: {', '.join(missing)}.")
    if len({state["sources"] for state in machine.steps.values()}) > 1:
        lines.append("The steps were not all run on the same sources.")
    return lines


def remarks(machine: Machine) -> list[str]:
    """What was replaced, and what has no figure for which reason."""
    records = machine.of("gpu")
    lines = sorted({f"Replaced: {r['replaced']}" for r in records if "replaced" in r})
    for r in records:
        for word in ("failed", "refused", "skipped", "inconclusive"):
            if word in (outcome := answer_of(r)) and r["step"] != "tuning":  # where many layouts do not fit
                lines.append(f"{r['step']}, {place_of(r)}: {word}, {first_line(outcome[word])}")
    return list(dict.fromkeys(lines))


def state_of(machine: Machine, step: str) -> str:
    return str(machine.steps.get(step, {}).get("state", "not run"))


def first_line(text: Any) -> str:
    return (str(text).splitlines() or [""])[0]


def figure(record: Record, name: str, style: str = ",.1f") -> str:
    """A cell."""
    if "dry" in record:
        return REHEARSED if name in record["dry"] else "-"
    value = found_in(record).get(name)
    if value is None:
        return next((word for word in ("refused", "failed", "skipped") if word in found_in(record)), "-")
    return f"{value:{style}}" if isinstance(value, (int, float)) else str(value)


def steps_grid(machine: Machine) -> Grid:
    grid = Grid("The campaign's steps", ["step", "state", "seconds", "answers", "sources"])
    for step in STEPS:
        state = machine.steps.get(step.name, {})
        answers = len(machine.of("gpu", step=step.name))
        seconds = f"{state['seconds']:.0f} of {step.seconds}" if state else f"of {step.seconds}"
        cells = [state_of(machine, step.name), seconds, str(answers), state.get("sources", "")]
        grid.lines.append([step.name, *cells])
    grid.note = " ".join(warnings(machine))
    return grid


def checks_grid(machine: Machine) -> Grid:
    grid = Grid("Is it right?", ["check", "engine", "verdict", "of which"])
    parity = machine.of("gpu", step="parity")
    for engine in dict.fromkeys(r["engine"] for r in parity):
        own = [answer_of(r) for r in parity if r["engine"] == engine]
        good = sum(r.get("passed") is True for r in own)
        wrong = [place_of(r) for r in parity if r["engine"] == engine and answer_of(r).get("passed") is not True]
        grid.lines.append(["equal to the reference", engine, f"{good} of {len(own)}", "; ".join(wrong)])
    for r in machine.of("gpu", step="tests"):
        found = answer_of(r)
        if "failures" in found:
            counts = f"{found['right']} passed, {len(found['failures'])} failed, {found['left_out']} skipped"
            grid.lines.append(["gpu tests", "both", counts, ", ".join(list(found["failures"])[:8])])
    for r in machine.of("gpu", step="sanitizers"):
        found = answer_of(r)
        verdict = next((word for word in ("passed", "inconclusive", "skipped") if word in found), "failed")
        cells = [REHEARSED, ""] if "dry" in r else [verdict, found.get("summary", "")]
        grid.lines.append([r["tool"], r["engine"], *cells])
    if machine.where.get("dry"):
        grid.note = "Of the stand-ins that the remarks name, not of a GPU."
    return grid


def times_grid(machine: Machine) -> Grid:
    """Microseconds on cold and on hot inputs, beside a plain read of as many bytes."""
    records = machine.of("gpu", step="times")
    names = list(dict.fromkeys(r["name"] for r in records))
    grid = Grid("Microseconds of a step, cold / hot", ["mode", "B", "V", "dtype", "one read, cold", *names])
    for key in dict.fromkeys((r["mode"], r["rows"], r["vocab"], r["dtype"]) for r in records):
        own = {r["name"]: r for r in records if (r["mode"], r["rows"], r["vocab"], r["dtype"]) == key}
        floor = next((figure(r, "floor_us") for r in own.values() if found_in(r).get("floor_us")), "-")
        cells = [times(own[name]) if name in own else "-" for name in names]
        grid.lines.append([key[0], *map(str, key[1:]), floor, *cells])
    grid.note = (
        "The median replay of a CUDA graph of calls: cold on inputs that exceed the L2 cache twice, hot on one input. "
        "* not in a graph, with Python's part of the call; ! parity had failed before, so the time means nothing."
    )
    return grid


def times(record: Record) -> str:
    cold, hot = figure(record, "cold_us"), figure(record, "hot_us")
    found = found_in(record)
    marks = "*" * (found.get("graph") is False) + "!" * ("meaningless" in found)
    return cold if cold == hot and "cold_us" not in found else f"{cold} / {hot}" + (f" {marks}" if marks else "")


def constants_grid(machine: Machine) -> Grid:
    grid = Grid("What the card's parts cost (bench/campaign/micro.cu)", ["what", "figures"])
    for r in machine.of("gpu", step="micro"):
        for constant in answer_of(r).get("constants", ()):
            named = {k: v for k, v in constant.items() if k not in ("figures", "failed")}
            what = ", ".join(str(v) if k in ("what", "of") else f"{k} {v}" for k, v in named.items())
            figures = ", ".join(f"{k} {v}" for k, v in constant.get("figures", {}).items())
            shown = REHEARSED if "dry" in r else figures or f"failed: {constant.get('failed')}"
            grid.lines.append([what, shown])
    return grid


def tuning_grid(machine: Machine) -> Grid:
    header = ["engine", "bytes a logit", "B", "V", "blocks a row", "threads", "us", "us as chosen"]
    grid = Grid("Layouts that beat the engine's choice", header)
    for engine in ("cuda", "triton"):
        for won in (w for w in winners(machine.of("gpu"), engine) if w["parts"]):
            layout = [str(won[name]) for name in ("itemsize", "rows", "vocab", "parts", "threads")]
            grid.lines.append([engine, *layout, f"{won['cold_us']:.1f}", f"{won['chosen_us']:.1f}"])
    grid.note = "python -m bench tuned FILE prints them as code."
    return grid


def counters_grid(machine: Machine) -> Grid:
    records = machine.of("gpu", step="counters")
    names = list(dict.fromkeys(name for r in records for name, v in answer_of(r).items() if isinstance(v, float)))
    grid = Grid("Nsight Compute, one cold launch of k50 p.95", ["engine", "B", "V", "dtype", *map(spaced, names)])
    for r in records:
        place = [str(r[name]) for name in ("engine", "rows", "vocab", "dtype")]
        grid.lines.append([*place, *(figure(r, name, ",.6g") for name in names)])
    return grid


def spaced(name: str) -> str:
    return name.replace("_", " ")


def uses_grid(machine: Machine) -> Grid:
    grid = Grid("In use", ["what", "where", "verdict", "figures"])
    for r in machine.of("gpu", step="uses"):
        found = answer_of(r)
        verdict = {True: "right", False: "WRONG"}.get(found.get("passed", ""), next(iter(words_in(found)), ""))
        shown = REHEARSED if "dry" in r else "; ".join(f"{spaced(k)} {shown_value(v)}" for k, v in figures_in(found))
        grid.lines.append([r["what"], r.get("engine") or f"{r['model']}, B = {r['rows']}", verdict, shown])
    return grid


def words_in(found: dict[str, Any]) -> Iterable[str]:
    return (word for word in ("failed", "refused", "skipped") if word in found)


def figures_in(found: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    return ((k, v) for k, v in found.items() if isinstance(v, (float, dict)))


def shown_value(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['median']:,.0f} ({value['p10']:,.0f} - {value['p90']:,.0f})"
    return f"{value:,.1f}"
