"""Figures as tables of text, for README, docs/performance.md and the report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from bench.campaign.grids import grids as gpu_grids
from bench.grid import Grid
from bench.peers import PEERS
from bench.record import Machine, Record, load
from bench.timing import duration, factor, three_digits

AMAX = "torch.amax"
BEGIN, END = "<!-- bench: begin, written by `python -m bench readme` -->", "<!-- bench: end -->"
SECTIONS = {
    "dtype": ("16-bit logits against float32", "float32 / 16 bits"),
    "isa": ("Instruction sets against the best", "best / this one"),
    "threads": ("All threads against one", "one / all"),
}
_ORDERS = {peer.name: peer.fields.get("order", "") for peer in PEERS}
IMAGES = {
    "vocab": "Microseconds per row against the size of the vocabulary",
    "batch": "Microseconds per step against the batch size, one thread and all",
    "logits": "Microseconds per row, one dot per distribution",
    "generate": "Tokens per second of generate, and the share of a step spent sampling",
    "gpu": "Microseconds per step on the GPU against the batch size, with one read of the rows",
}
HEADLINE = "k50 p.95"  # README's plot
Bar: TypeAlias = "tuple[str, float, float | None]"
ORDER = ("greedy", "k50 p.95", "min_p", "p.95", "T", "everything")


def middle(record: Record, name: str) -> float:
    return float(record[name]["median"])


def in_order(modes: Iterable[str]) -> list[str]:
    present = dict.fromkeys(modes)
    return [m for m in ORDER if m in present] + [m for m in present if m not in ORDER]


def peer_grid(machine: Machine, **place: Any) -> Grid | None:
    """Time per step: ours, then everybody with the same order of filters as time and how many times ours that is."""
    records = machine.of("compare", section="peers", **place)
    records = [r for r in records if "us" in r or "refused" in r]
    if not records:
        return None
    modes = in_order(r["mode"] for r in records)
    at = records[0]
    title = f"V = {at['vocab']:,}, B = {at['rows']}, {plural(at['threads'])}, {at['logits']} logits"
    grid = Grid(title, ["a step of", *modes])
    for order in sorted({order_of(r) for r in records}):
        alike = [r for r in records if order_of(r) == order]
        ours = {mode: own for mode in modes if (own := own_time(alike, mode))}
        who = f"fastsample, order {order!r}" if order else "fastsample"
        grid.lines.append([f"**{who}**", *(f"**{duration(ours[m])}**" if m in ours else "-" for m in modes)])
        for name in dict.fromkeys(r["against"] for r in alike):
            cells = {r["mode"]: cell(r, ours.get(r["mode"])) for r in alike if r["against"] == name}
            grid.lines.append([name, *(cells.get(mode, "-") for mode in modes)])
    return grid


def order_of(record: Record) -> str:
    """The order in which a peer has us apply the filters; "" for the default."""
    return str(_ORDERS.get(record["against"], ""))


def own_time(records: list[Record], mode: str) -> float | None:
    """Our time in a mode, the median over the peers in whose turns it was measured."""
    times = sorted(middle(r, "us") for r in records if r["mode"] == mode and "us" in r)
    return times[len(times) // 2] if times else None


def cell(record: Record, own: float | None) -> str:
    if "refused" in record or own is None:
        return "refused"
    its = middle(record, "against_us")
    return f"{duration(its)} ({factor(three_digits(its) / three_digits(own))})"


def plural(number: int, noun: str = "thread") -> str:
    return f"{number} {noun}{'s' * (number > 1)}"


def generate_grid(machine: Machine) -> Grid | None:
    """Tokens per second and the share of a step that is sampling."""
    records = [r for r in machine.of("generate") if "tokens_per_second" in r]
    if not records:
        return None
    threads = plural(records[0]["threads"])
    grid = Grid(
        f"transformers' generate, temperature 0.8, top-k 50, top-p 0.95, {threads}",
        ["model", "V", "B", "its sampler, tokens/s", "ours, tokens/s", "its share of a step", "our share"],
    )
    for key in dict.fromkeys((r["model"], r["vocab"], r["rows"]) for r in records):
        pair = {r["sampler"]: r for r in records if (r["model"], r["vocab"], r["rows"]) == key}
        if len(pair) == 2:
            hf, own = pair["Hugging Face"], pair["fastsample"]
            speeds = [f"{middle(r, 'tokens_per_second'):,.0f}" for r in (hf, own)]
            shares = [f"{middle(r, 'sampling_share'):.1%}" for r in (hf, own)]
            grid.lines.append([key[0], f"{key[1]:,}", str(key[2]), *speeds, *shares])
    return grid


def amax_grid(machine: Machine) -> Grid | None:
    """The `cpu` command's figures beside what is aimed at."""
    records = [r for r in machine.of("cpu") if "us" in r and "against" not in r]
    if not records:
        return None
    grid = Grid(
        "A step against torch.amax over the same logits", ["mode", "logits", "B", "V", "us", "ratio", "aimed at"]
    )
    for r in sorted(records, key=lambda r: (r["logits"], r["rows"])):
        aim = "" if r["limit"] is None else f"<= {r['limit']:g}"
        ratio = f"{middle(r, 'ratio'):.2f} ({r['ratio']['p10']:.2f} - {r['ratio']['p90']:.2f})"
        place = [r["mode"], r["logits"], str(r["rows"]), f"{r['vocab']:,}"]
        grid.lines.append([*place, f"{middle(r, 'us'):.1f}", ratio, aim])
    return grid


def filter_grid(machine: Machine) -> Grid | None:
    """What each filter adds: the `cpu` command's figures of modes that are measured beside another."""
    records = [r for r in machine.of("cpu") if "us" in r and "against" in r]
    if not records:
        return None
    grid = Grid("What a filter adds", ["mode", "logits", "B", "V", "us", "against", "its us", "ratio", "aimed at"])
    for r in sorted(records, key=lambda r: (r["logits"], r["rows"])):
        aim = "" if r["limit"] is None else f"<= {r['limit']:g}"
        ratio = f"{middle(r, 'ratio'):.2f} ({r['ratio']['p10']:.2f} - {r['ratio']['p90']:.2f})"
        place = [r["mode"], r["logits"], str(r["rows"]), f"{r['vocab']:,}", f"{middle(r, 'us'):.1f}"]
        grid.lines.append([*place, r["against"], f"{middle(r, 'against_us'):.1f}", ratio, aim])
    return grid


def section_grid(machine: Machine, section: str, title: str, sense: str) -> Grid | None:
    """Any section in long form: the time, its contender's, and their ratio with 10th and 90th percentile."""
    records = [r for r in machine.of("compare", section=section) if "us" in r]
    if not records:
        return None
    grid = Grid(title, ["mode", "logits", "B", "V", "ours", "against", "us", "its us", sense])
    for r in records:
        how = ", ".join(filter(None, (r["dtype"], r["isa"], plural(r["threads"]))))
        ratio = f"{middle(r, 'ratio'):.2f} ({r['ratio']['p10']:.2f} - {r['ratio']['p90']:.2f})"
        figures = [f"{middle(r, 'us'):.1f}", f"{middle(r, 'against_us'):.1f}", ratio]
        place = [r["mode"], r["logits"], str(r["rows"]), f"{r['vocab']:,}"]
        grid.lines.append([*place, how, r["against"], *figures])
    return grid


def spread_grid(machine: Machine) -> Grid | None:
    """Worst over best distribution, mode by mode."""
    records = [r for r in machine.of("compare", section="logits") if "us" in r]
    if not records:
        return None
    grid = Grid(
        f"Worst and best logits, V = {records[0]['vocab']:,}, B = 1",
        ["mode", "best", "us", "worst", "us", "worst / best"],
    )
    for mode in in_order(r["mode"] for r in records):
        own = sorted((middle(r, "us"), r["logits"]) for r in records if r["mode"] == mode)
        (best, at), (worst, to) = own[0], own[-1]
        grid.lines.append([mode, at, f"{best:.1f}", to, f"{worst:.1f}", f"{worst / best:.2f}"])
    return grid


def disturbed(records: Iterable[Record]) -> list[str]:
    """A warning where other processes were busy meanwhile."""
    loads = [r["others"] for r in records if r.get("others") is not None]
    noisy = [load for load in loads if load > 0.2]
    if not noisy:
        return []
    text = f"other processes kept up to {max(noisy):.1f} cores busy: long steps suffer more than short ones"
    return [f"Not alone: during {len(noisy)} of {len(loads)} figures {text}"]


def dates(machine: Machine) -> str:
    found = sorted({run["date"] for run in machine.runs})
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


def log_bars(bars: list[Bar], width: int = 32) -> str:
    """A bar chart in text, on a logarithmic axis: name, time, bar, how many times ours."""
    low = min(value for _, value, _ in bars) / 2
    scale = width / math.log(max(value for _, value, _ in bars) / low)
    lines = []
    for name, value, ratio in bars:
        bar = "\u2588" * round(scale * math.log(value / low))
        lines.append(f"{name:<18}{duration(value):>8}  {bar}{'' if ratio is None else ' ' + factor(ratio)}")
    return "\n".join(lines)


def bars_of(records: list[Record], mode: str) -> list[Bar]:
    """Name, time and how many times ours it is: ours, then everybody with the same order of filters, fastest first."""
    bars: list[Bar] = []
    for order in sorted({order_of(r) for r in records}):
        alike = sorted((r for r in records if order_of(r) == order), key=lambda r: middle(r, "against_us"))
        ours = own_time(alike, mode)
        assert ours is not None  # of records with figures
        bars.append((f"fastsample, {order}" if order else "fastsample", ours, None))
        times = [(r["against"], middle(r, "against_us")) for r in alike]
        bars += [(name, its, three_digits(its) / three_digits(ours)) for name, its in times]
    return bars


def measured_on(machine: Machine) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in machine.where["packages"].items())
    return f"{machine.name}, {dates(machine)}, with {packages}"


def section(machines: list[Machine]) -> str:
    """README's performance section: one plot and one table, of the machine where most others were measured."""

    def records(machine: Machine) -> list[Record]:
        own = machine.of("compare", section="peers", mode=HEADLINE, threads=1, logits="lm")
        own = [r for r in own if "us" in r]
        at = min(((-r["vocab"], r["rows"]) for r in own), default=None)
        return [r for r in own if (-r["vocab"], r["rows"]) == at]

    parts = []
    best = max(machines, key=lambda machine: len(records(machine)))
    if own := records(best):
        vocab, rows = own[0]["vocab"], own[0]["rows"]
        parts.append(
            f"The time from {vocab:,} logits to a token ({plural(rows, 'row')}, 1 thread), with temperature 0.8,"
            " top-k 50 and top-p 0.95. The axis is logarithmic; behind each bar stands how many times our time it is."
            " `joint` is the order of filters that SGLang uses; `fill` includes filling llama.cpp's list of candidates."
        )
        parts.append(f"```text\n{log_bars(bars_of(own, HEADLINE))}\n```")
    if generate := generate_grid(best):
        parts.append(
            f"What that is worth to a whole model, for a vocabulary of V tokens and B sequences at once.\n"
            f"{generate.title}:\n\n{generate.markdown()}"
        )
    parts.append(f"Medians of alternating turns. {measured_on(best)}.")
    return "\n\n".join(parts)


def performance(machines: list[Machine], root: Path) -> str:
    """The tables and plots of docs/performance.md, machine by machine."""
    parts = []
    for machine in machines:
        found = [*peer_parts(machine), *(f"#### {g.title}\n\n{g.markdown()}" for g in detail_grids(machine))]
        found += [f"#### {g.title}\n\n{g.markdown()}\n\n{g.note}".rstrip() for g in gpu_grids(machine)]
        if found:
            noise = disturbed(r for kind in machine.results.values() for r in kind)
            parts += [f"### {machine.name}", f"Measured on {measured_on(machine)}.", *(f"{n}." for n in noise)]
            parts += [*found, *images(machine, root)]
    return "\n\n".join(parts)


def peer_parts(machine: Machine) -> list[str]:
    peers = machine.of("compare", section="peers", threads=1, logits="lm")
    shapes = sorted({(r["vocab"], r["rows"]) for r in peers})
    grids = [peer_grid(machine, vocab=v, rows=b, threads=1, logits="lm") for v, b in shapes]
    return [f"#### {g.title}\n\n{g.markdown()}" for g in (*grids, generate_grid(machine)) if g]


def detail_grids(machine: Machine) -> list[Grid]:
    grids = [amax_grid(machine), filter_grid(machine), spread_grid(machine)]
    grids += [section_grid(machine, name, *words) for name, words in SECTIONS.items()]
    return [grid for grid in grids if grid]


def images(machine: Machine, root: Path) -> list[str]:
    """The plots that are in the repository."""
    paths = {name: f"bench/results/compare-{machine.slug}-{name}.png" for name in IMAGES}
    return [f"![{IMAGES[name]}](../{path})" for name, path in paths.items() if (root / path).exists()]


def update(root: Path, files: list[Path], check: bool) -> int:
    """Put the generated sections of README.md and docs/performance.md between their markers.

    Returns:
        The exit status: 1 where `check`, which writes nothing, finds one of them out of date.
    """
    machines, status = load(files), 0
    for name, new_text in (("README.md", section(machines)), ("docs/performance.md", performance(machines, root))):
        text = (root / name).read_text()
        if BEGIN not in text or END not in text:
            raise SystemExit(f"{name}: expected a line {BEGIN!r} and a line {END!r}")
        head, rest = text.split(BEGIN, 1)
        new = f"{head}{BEGIN}\n\n{new_text}\n\n{END}{rest.split(END, 1)[1]}"
        if not check:
            (root / name).write_text(new)
        elif new != text:
            status = 1
        if check:
            print(f"{name} is {'up to date' if new == text else 'out of date: python -m bench readme'}")
    return status
