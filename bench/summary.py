"""Figures as tables of text, for README's performance section and for the report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers import PEERS
from bench.record import Machine, Record, load
from bench.timing import duration, factor, three_digits

BEGIN, END = "<!-- bench: begin, written by `python -m bench readme` -->", "<!-- bench: end -->"
SECTIONS = {
    "dtype": ("16-bit logits against float32", "float32 / 16 bits"),
    "isa": ("Instruction sets against the best", "best / this one"),
    "threads": ("All threads against one", "one / all"),
}
_ORDERS = {peer.name: peer.fields.get("order", "") for peer in PEERS}
ORDER = ("greedy", "k50 p.95", "min_p", "p.95", "T", "everything")


@dataclass
class Grid:
    """A table of text."""

    title: str
    header: list[str]
    lines: list[list[str]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        rows = [self.header, ["---"] * len(self.header), *self.lines]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


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


def plural(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


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
    records = [r for r in machine.of("cpu") if "us" in r]
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


def gpu_grid(machine: Machine) -> Grid | None:
    """`python -m bench gpu`: microseconds on cold and on hot inputs."""
    records = machine.of("gpu")
    if not records:
        return None
    names = list(dict.fromkeys(r["name"] for r in records))
    grid = Grid("Microseconds, cold / hot", ["mode", "B", "V", "dtype", *names])
    for key in dict.fromkeys((r["mode"], r["rows"], r["vocab"], r["dtype"]) for r in records):
        own = {r["name"]: r for r in records if (r["mode"], r["rows"], r["vocab"], r["dtype"]) == key}
        cells = [
            f"{r['cold_us']:.1f} / {r['hot_us']:.1f}" if (r := own.get(n)) and "cold_us" in r else "-" for n in names
        ]
        grid.lines.append([key[0], *map(str, key[1:]), *cells])
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


def section(machines: list[Machine], root: Path) -> str:
    """README's performance section."""
    parts = []
    for machine in machines:
        peers = machine.of("compare", section="peers", threads=1, logits="lm")
        shapes = sorted({(r["vocab"], r["rows"]) for r in peers})
        grids = [peer_grid(machine, vocab=v, rows=b, threads=1, logits="lm") for v, b in shapes]
        packages = ", ".join(f"{name} {number}" for name, number in machine.where["packages"].items())
        found = [g for g in grids if g]
        if found:
            how = "medians, in turns; in brackets, how many times ours"
            parts.append(f"Measured on {machine.name}, {dates(machine)}, with {packages}: {how}.")
            parts += [f"{line}." for line in disturbed(machine.of("compare", section="peers"))]
        parts += [f"{g.title}:\n\n{g.markdown()}" for g in found]
        generate = generate_grid(machine)
        if generate:
            parts.append(f"{generate.title}:\n\n{generate.markdown()}")
        image = f"bench/results/compare-{machine.slug}-vocab.png"
        if found and (root / image).exists():
            parts.append(f"![Microseconds per row against vocabulary size]({image})")
    return "\n\n".join(parts)


def details(machines: list[Machine], root: Path) -> str:
    """bench/README.md's tables."""
    parts = []
    for machine in machines:
        grids = [amax_grid(machine), spread_grid(machine)]
        grids += [section_grid(machine, name, *words) for name, words in SECTIONS.items()]
        found = [f"{g.title}:\n\n{g.markdown()}" for g in grids if g]
        if found:
            noise = disturbed(r for kind in machine.results.values() for r in kind)
            parts += [f"{machine.name}, {dates(machine)}.", *(f"{line}." for line in noise), *found]
    return "\n\n".join(parts)


def update(root: Path, files: list[Path], check: bool) -> int:
    """Put the sections of README.md and bench/README.md between their markers.

    Returns:
        The exit status: 1 where `check`, which writes nothing, finds one of them out of date.
    """
    machines, status = load(files), 0
    for name, write in (("README.md", section), ("bench/README.md", details)):
        text = (root / name).read_text()
        if BEGIN not in text or END not in text:
            raise SystemExit(f"{name}: expected a line {BEGIN!r} and a line {END!r}")
        head, rest = text.split(BEGIN, 1)
        new = f"{head}{BEGIN}\n\n{write(machines, root)}\n\n{END}{rest.split(END, 1)[1]}"
        if not check:
            (root / name).write_text(new)
        elif new != text:
            status = 1
        if check:
            print(f"{name} is {'up to date' if new == text else 'out of date: python -m bench readme'}")
    return status
