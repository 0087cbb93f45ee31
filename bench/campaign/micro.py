"""Step `micro`: the card's own constants, which micro.cu measures."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.campaign.site import CSRC, Site
from bench.campaign.steps import Outcome, Point, Record, found_in

SOURCE = Path(__file__).with_name("micro.cu")
SAMPLE = Path(__file__).with_name("samples") / "micro.jsonl"
NO_NVCC = "there is no nvcc on the path"
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


def points(site: Site) -> Iterator[Point]:
    yield {"what": "constants"}, lambda: rehearsed(site) if site.dry else measured(site)


def rehearsed(site: Site) -> Outcome:
    """Compiles it where there is an nvcc, and reads a line of each kind, whose figures are zeros."""
    compiler = shutil.which("nvcc")
    if compiler is not None and (reason := compile_for(90, site.scratch)) is not None:
        return {"failed": reason}
    found = {"constants": parse(SAMPLE.read_text()), "compiled": NO_NVCC if compiler is None else "for sm_90"}
    return found | {"replaced": "micro.cu's run by samples/micro.jsonl, all of whose figures are 0"}


def measured(site: Site) -> Outcome:
    if shutil.which("nvcc") is None:
        return {"skipped": NO_NVCC}
    if (reason := compile_for(site.arch, site.scratch)) is not None:
        return {"failed": reason}
    sizes = sorted({bytes_of(b, v, d) for b in site.batches for v in site.vocabs for d in site.dtypes})
    done = subprocess.run([program(site.scratch), *map(str, sizes)], capture_output=True, text=True, timeout=site.left)
    if not (found := parse(done.stdout)):
        return {"failed": f"micro.cu printed nothing: {done.stderr[-500:]}"}
    return {"constants": found}


def compile_for(arch: int, folder: Path) -> str | None:
    """What nvcc says against it, or None."""
    options = ("-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{arch}", f"-I{CSRC}", "-o", program(folder))
    done = subprocess.run(["nvcc", *options, str(SOURCE)], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr[-1500:]


def program(folder: Path) -> str:
    return str(folder / "micro")


def parse(text: str) -> list[dict[str, Any]]:
    """One constant per line: what it is, then `figures` or `failed`."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def bytes_of(rows: int, vocab: int, dtype: str) -> int:
    return rows * vocab * ITEMSIZE[dtype]


def read_floor(records: list[Record], size: int) -> float | None:
    """Microseconds that a plain kernel takes to read so many bytes from device memory, where this was measured."""
    for record in records:
        for constant in found_in(record).get("constants", ()) if record["step"] == "micro" else ():
            if (constant["what"], constant.get("bytes")) == ("read", size) and "figures" in constant:
                return float(constant["figures"]["us"])
    return None
