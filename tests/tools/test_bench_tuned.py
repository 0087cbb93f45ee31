"""From tuning sweeps to the tables of layouts: what `python -m bench tuned` prints is what they are made of.

Every figure here is made up, and so is the compute capability, which no line of the tables themselves can have.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from simt_engine import compiler
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind site-packages, where the fastsample under test is

from bench.__main__ import app  # noqa: E402
from bench.campaign import tuning  # noqa: E402
from bench.campaign.site import Site  # noqa: E402

HERE, ARCH = {"gpu": "Made-up GPU", "compute capability": "77.7"}, 777
CUDA, TRITON = "csrc/cuda/tuned.h", "fastsample/backends/triton_tuned.py"
VOCAB = 128256


def layout(engine: str, rows: int, parts: int, us: float, **more: Any) -> dict[str, Any]:
    key = {"step": "tuning", "engine": engine, "rows": rows, "vocab": VOCAB, "dtype": "bfloat16"}
    return {**key, "parts": parts, "threads": 256 if parts else 0, "found": {"cold_us": us, **more}}


SWEPT = [
    *(layout("cuda", 64, 0, 20.0), layout("cuda", 64, 8, 15.0), layout("cuda", 64, 16, 14.0)),
    *(layout("cuda", 1, 0, 10.0), layout("cuda", 1, 4, 9.9)),  # within the noise
    *(layout("triton", 64, 0, 30.0), layout("triton", 64, 3, 20.0)),
    *(layout("triton", 1, 0, 9.0), layout("triton", 1, 2, 8.9)),
    *(layout("triton", 8, 0, 30.0), layout("triton", 8, 2, 20.0, meaningless="parity failed")),
]
# A shape whose own choice stands has a line too, so that the line for more rows does not count for it.
LINES = {
    CUDA: """\
    // Made-up GPU
    {777, 2, 1, 128256, 0},    // 10.0 us
    {777, 2, 64, 128256, 16},  // 14.0 us, not 20.0
""",
    TRITON: """\
    # Made-up GPU
    Tuned(777, 2, 1, 128256, 0),  # 9.0 us
    Tuned(777, 2, 8, 128256, 0),  # 30.0 us
    Tuned(777, 2, 64, 128256, 3),  # 20.0 us, not 30.0
""",
}


def printed(folder: Path, records: list[dict[str, Any]]) -> str:
    """What `python -m bench tuned` prints for a campaign's file."""
    path = folder / "gpu.json"
    path.write_text(json.dumps({"machine": HERE, "results": records}))
    result = CliRunner().invoke(app, ["tuned", str(path)])
    assert result.exit_code == 0, result.output
    return result.output


def test_winners_are_printed_as_lines_below_the_name_of_their_file(tmp_path: Path) -> None:
    assert printed(tmp_path, SWEPT) == "".join(f"{file}:\n{lines}" for file, lines in LINES.items())
    assert printed(tmp_path, []) == f"{CUDA}: no layouts were measured\n{TRITON}: no layouts were measured\n"
    only_cuda = printed(tmp_path, [record for record in SWEPT if record["engine"] == "cuda"])
    assert only_cuda == f"{CUDA}:\n{LINES[CUDA]}{TRITON}: no layouts were measured\n"


def with_lines(file: str, head: str, lines: str) -> str:
    """A table's source, with these lines pasted in as its first."""
    source = (ROOT / file).read_text()
    assert source.count(head) == 1
    return source.replace(head, head + lines)


def test_the_lines_for_triton_are_its_table_s(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("made_up")
    monkeypatch.setitem(sys.modules, "made_up", module)  # where dataclasses look for it
    exec(with_lines(TRITON, "TUNED = table(\n", LINES[TRITON]), vars(module))
    asked = (1, 2, 8, 9, 64, 65)
    assert [module.known_parts(ARCH, 2, rows, VOCAB) for rows in asked] == [0, 0, 0, 3, 3, 0]
    assert module.known_parts(ARCH, 4, 9, VOCAB) == module.known_parts(ARCH, 2, 9, VOCAB + 1) == 0


def compiled(folder: Path, lines: str, parts_of: dict[int, int]) -> str:
    """What a compiler says against CUDA's table with these lines and what they give to so many rows."""
    (folder / "cuda").mkdir(exist_ok=True)
    (folder / "cuda/tuned.h").write_text(with_lines(CUDA, "constexpr Tuned kTuned[] = {\n", lines))
    known = f"known_parts(Device{{{ARCH}, 132, 0, 0, 16, 0}}, Shape{{%d, {VOCAB}, 2, false}}) == %d"
    checks = "".join(f'static_assert({known % asked}, "{asked[0]} rows");\n' for asked in parts_of.items())
    (folder / "asked.cc").write_text(f'#include "cuda/tuning.h"\nnamespace fastsample {{\n{checks}}}\n')
    command = [str(compiler()), "-std=c++17", "-fsyntax-only", f"-I{folder}", f"-I{ROOT / 'csrc'}", "asked.cc"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stderr


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_the_lines_for_cuda_are_its_table_s(tmp_path: Path) -> None:
    assert compiled(tmp_path, LINES[CUDA], {1: 0, 2: 16, 64: 16, 65: 0}) == ""
    assert "64 rows" in compiled(tmp_path, LINES[CUDA], {64: 8})
    refused = compiled(tmp_path, LINES[CUDA].replace("16}", "12}"), {})
    assert "tuned.h: parts is 0 or a power of two" in refused


def test_an_engine_that_cannot_be_tuned_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "tuners", lambda site: iter(()))
    points = list(tuning.points(Site(True, tmp_path)))
    assert [(key["engine"], measure()["skipped"]) for key, measure in points] == [
        ("cuda", "not available in this build"),
        ("triton", "not available in this build"),
    ]
