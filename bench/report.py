"""One self-contained HTML page: plots, tables, machines, versions and commands."""

from __future__ import annotations

import base64
import tempfile
from datetime import date
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.campaign.grids import grids as gpu_grids
from bench.campaign.grids import remarks as gpu_remarks
from bench.grid import Grid
from bench.peers import PEERS
from bench.plots import TITLES, draw_all
from bench.record import Machine, load
from bench.summary import (
    SECTIONS,
    amax_grid,
    disturbed,
    filter_grid,
    generate_grid,
    peer_grid,
    section_grid,
    spread_grid,
)


def embedded(machine: Machine) -> list[dict[str, str]]:
    """Every plot as a data URL, with what it shows."""
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_all(machine, Path(folder, "plot"))
        return [
            {"title": TITLES[path.stem.removeprefix("plot-").split("-")[0]], "data": encoded(path)} for path in paths
        ]


def encoded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def grids(machine: Machine) -> list[Grid]:
    """All tables that there are figures for."""
    keys = ("vocab", "logits", "rows", "threads")
    places = {tuple(r[key] for key in keys) for r in machine.of("compare", section="peers")}
    ordered = sorted(places, key=lambda place: (place[0], place[1] != "lm", *place[2:]))
    found = [peer_grid(machine, **dict(zip(keys, place, strict=True))) for place in ordered]
    found += [generate_grid(machine), amax_grid(machine), filter_grid(machine), spread_grid(machine)]
    found += [section_grid(machine, name, *words) for name, words in SECTIONS.items()]
    return [grid for grid in [*found, *gpu_grids(machine)] if grid]


def remarks(machine: Machine) -> list[str]:
    """Refusals and absences, each once."""
    records = [r for kind, own in machine.results.items() for r in own if kind != "gpu"]
    lines = [*gpu_remarks(machine), *disturbed(records)]
    for r in records:
        if "refused" in r:
            who = next((r[key] for key in ("against", "sampler", "name") if key in r), "fastsample")
            lines.append(f"{who}, {r.get('mode', '')}: refused, {r['refused']}")
    lines += [f"{r['against']}: {r['missing']}" for r in records if "missing" in r]
    return list(dict.fromkeys(lines))


def write(files: list[Path], out: Path) -> None:
    """Render the page of these JSON files."""
    if not files:
        raise SystemExit("no JSON files: python -m bench compare makes one")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    parts = [{"machine": m, "plots": embedded(m), "grids": grids(m), "remarks": remarks(m)} for m in load(files)]
    page = environment.get_template("report.html").render(parts=parts, peers=PEERS, date=date.today().isoformat())
    out.write_text(page)
    print(f"written: {out}")
