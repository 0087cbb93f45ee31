"""Results on disk: the machine, files that survive an interruption, and reading them back."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results"  # the default place for results
KINDS = ("compare", "generate", "cpu", "gpu")


def packages(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of these packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(*names: str) -> dict[str, Any]:
    """This machine: CPU, instruction set, versions (including the packages named)."""
    import fastsample as fs  # here: the campaign on a GPU keeps a file before it has installed it
    from fastsample.backends.cpu import native

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = models[0] if models else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "isa": native().isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {"fastsample": fs.__version__, "torch": torch.__version__, **packages(names)},
    }


def slug(where: dict[str, Any]) -> str:
    """The machine's name as part of a file name."""
    text = where.get("gpu") or f"{where['cpu']} {where['isa']}"
    words = "".join(c if c.isalnum() else " " for c in text).lower().split()
    return "-".join(words)


def console() -> Console:
    """A console whose tables stay readable in a file."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def command() -> str:
    """The command line as typed."""
    return shlex.join(["python", "-m", "bench", *sys.argv[1:]])


class Results:
    """Figures in a JSON file that is valid after each of them, so that an interrupted run loses nothing.

    Args:
        path: the file; its folder is created. None keeps the figures in memory.
        kind: the command that made the figures.
        where: `machine()`.
        resume: keep existing figures; they must be from this machine and these versions.
        joins: note this command among those that made the file.
    """

    def __init__(
        self, path: Path | None, kind: str, where: dict[str, Any], resume: bool = False, joins: bool = True
    ) -> None:
        self.path = path
        self.data: dict[str, Any] = {"kind": kind, "machine": where, "runs": [], "results": []}
        if resume and path is not None and path.exists():
            found = json.loads(path.read_text())
            for name in ("kind", "machine"):
                if found[name] != self.data[name]:
                    raise SystemExit(
                        f"{path}: cannot resume, its {name} is {found[name]}, not {self.data[name]}; "
                        "give another --out or leave --resume out"
                    )
            self.data = found
        if joins:
            self.data["runs"].append({"date": date.today().isoformat(), "command": command()})
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.data["results"]  # type: ignore[no-any-return]

    def find(self, key: dict[str, Any]) -> Record | None:
        """The record with this key."""
        return next((record for record in self.records if key.items() <= record.items()), None)

    def add(self, record: Record, instead: Record | None = None) -> None:
        """Write a record at once, replacing one with the same key."""
        if instead is None:
            self.records.append(record)
        else:
            self.records[self.records.index(instead)] = record
        self.write()

    def write(self) -> None:
        """Write atomically: readers see the new file or the old one, never half of one."""
        if self.path is None:
            return
        lines = ",\n  ".join(json.dumps(record) for record in self.records)
        head = json.dumps({name: value for name, value in self.data.items() if name != "results"}, indent=1)
        text = f'{head[:-2]},\n "results": [\n  {lines}\n ]\n}}\n'
        aside = self.path.with_suffix(".part")
        aside.write_text(text)
        aside.replace(self.path)


@dataclass
class Machine:
    """All figures of one machine, from any number of files."""

    where: dict[str, Any]
    runs: list[Record] = field(default_factory=list)
    steps: dict[str, Record] = field(default_factory=dict)  # of a campaign on a GPU: what became of each
    results: dict[str, list[Record]] = field(default_factory=dict)  # by kind of file

    def of(self, kind: str, **wanted: Any) -> list[Record]:
        """The records of a kind that have these values."""
        return [r for r in self.results.get(kind, ()) if wanted.items() <= r.items()]

    @property
    def slug(self) -> str:
        return slug(self.where)

    @property
    def name(self) -> str:
        gpu = self.where.get("gpu")
        return gpu or f"{self.where['cpu']}, {self.where['cores']} cores, {self.where['isa']}"


def results_in(folder: Path) -> list[Path]:
    """The JSON files of a folder that `load` reads; other commands may keep files there too."""

    def readable(data: dict[str, Any]) -> bool:
        return data.get("kind") in KINDS and not data["machine"].get("dry")  # a rehearsal has no figures

    return [path for path in sorted(folder.glob("*.json")) if readable(json.loads(path.read_text()))]


def load(files: Iterable[Path]) -> list[Machine]:
    """One Machine per processor; a later figure replaces an earlier one of the same point, and a missing one."""
    found: dict[tuple[Any, ...], Machine] = {}
    for path in files:
        data = json.loads(path.read_text())
        if data.get("kind") not in KINDS:
            raise SystemExit(f"{path}: expected a file of python -m bench {', '.join(KINDS)}")
        where = data["machine"]
        key = tuple(where.get(name) for name in ("gpu", "cpu", "cores", "isa"))
        machine = found.setdefault(key, Machine({**where, "packages": {}}))
        machine.where["packages"] |= where["packages"]
        machine.steps |= data.get("steps", {})
        machine.runs += [run | {"file": path.name} for run in data["runs"]]
        merged = {point_of(r): r for r in machine.results.get(data["kind"], ())}
        for record in data["results"]:
            key = point_of(record)
            if "missing" not in record or key not in merged:
                merged[key] = record
        machine.results[data["kind"]] = list(merged.values())
    return list(found.values())


def point_of(record: Record) -> tuple[Any, ...]:
    """A record's key: its strings and whole numbers that are not figures or reasons."""
    skipped = ("missing", "refused", "skipped", "turns")
    return tuple((k, v) for k, v in record.items() if isinstance(v, (str, int)) and k not in skipped)
