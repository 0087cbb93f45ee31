"""The table of measured layouts that the Triton engine consults; every line here is made up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsample.backends import triton as adapter
from fastsample.backends import triton_launch, triton_tuned
from fastsample.backends.triton_memory import Table, kernels
from fastsample.backends.triton_tuned import MAX_PARTS, Tuned, table

pytest.importorskip("triton", reason="Triton is not installed")

SUPPORT = Path(__file__).parents[1] / "support"
VOCAB = 128256


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of 132 multiprocessors and compute capability 9.0."""
    monkeypatch.setattr(adapter, "device_shape", lambda device: (132, 32))
    monkeypatch.setattr(adapter, "arch_of", lambda device: 90)


def parts(rows: int, vocab: int = VOCAB, dtype: torch.dtype = torch.float32, engine: object = None) -> int:
    """Programs per row of a call with such logits."""
    chosen = engine or adapter.TritonEngine()
    logits = torch.empty(1, vocab, dtype=dtype).expand(rows, -1)
    return chosen.layout(Table(logits, 8)).parts  # type: ignore[attr-defined,no-any-return]


ESTIMATED = {1: 126, 8: 33, 9: 29, 64: 4}  # by the number of rows, of 128256 float32


def use(monkeypatch: pytest.MonkeyPatch, *lines: Tuned) -> None:
    monkeypatch.setattr(triton_tuned, "TUNED", table(*lines))


@pytest.mark.usefixtures("h100")
def test_a_line_decides_for_what_it_fits_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    assert {rows: parts(rows) for rows in ESTIMATED} == ESTIMATED
    bfloat16 = parts(8, dtype=torch.bfloat16)
    use(monkeypatch, Tuned(90, 4, 8, VOCAB, 5))
    assert {rows: parts(rows) for rows in ESTIMATED} == ESTIMATED | {1: 5, 8: 5}
    assert parts(8, VOCAB - 1) == 5
    assert parts(8, VOCAB + 1) == ESTIMATED[8]
    assert parts(8, dtype=torch.bfloat16) == bfloat16 != 5
    use(monkeypatch, Tuned(80, 4, 8, VOCAB, 5))
    assert parts(8) == ESTIMATED[8]


@pytest.mark.usefixtures("h100")
def test_the_first_line_that_fits_counts_also_where_it_leaves_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Tuned(90, 4, 1, VOCAB, 0), Tuned(90, 4, 8, VOCAB, 5), Tuned(90, 4, 64, VOCAB, 3))
    assert {rows: parts(rows) for rows in ESTIMATED} == {1: ESTIMATED[1], 8: 5, 9: 3, 64: 3}


@pytest.mark.usefixtures("h100")
def test_a_line_gives_no_more_programs_than_can_meet_and_have_work(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Tuned(90, 4, 300, VOCAB, 32))
    assert parts(64) == ESTIMATED[64]  # 64 rows of 32 would wait for each other for ever
    assert parts(300) == 1
    assert parts(1, 3000) == 3  # chunks of 1024 tokens


@pytest.mark.usefixtures("h100")
def test_an_override_comes_before_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Tuned(90, 4, 8, VOCAB, 5))
    engine = adapter.TritonEngine()
    engine.parts = 2
    assert parts(8, engine=engine) == 2


def test_the_table_is_looked_up_by_the_compute_capability_of_nvidia_s_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    arch_of = triton_launch.arch_of.__wrapped__
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))  # also that of AMD's gfx90a
    monkeypatch.setattr(torch.version, "hip", None)
    assert arch_of(torch.device("cuda:0")) == 90
    assert arch_of(torch.device("cpu")) == 0
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert arch_of(torch.device("cuda:0")) == 0


INTERPRETED = """
import torch, triton_interpreter, fastsample as fs
from fastsample.backends import triton as adapter, triton_tuned
from fastsample.backends.triton_tuned import Tuned, table

triton_interpreter.patch_once()
adapter.device_shape, adapter.arch_of = lambda device: (132, 32), lambda device: 90
launched = []
plan = adapter.TritonEngine.layout
adapter.TritonEngine.layout = lambda self, rows: launched.append(plan(self, rows)) or launched[-1]
logits = torch.randn(2, 4000, generator=torch.Generator().manual_seed(5)) * 3
ask = lambda backend: fs.sample(logits, seed=3, num_samples=5, top_p=0.9, backend=backend).tokens.tolist()
want = ask("reference")
for lines in ((), (Tuned(90, 4, 2, 4000, 3),)):
    triton_tuned.TUNED = table(*lines)
    launched.clear()
    assert ask("triton") == want, lines
    print(*{layout.parts for layout in launched})
"""


def test_tokens_do_not_depend_on_the_table() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, cwd=SUPPORT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "3"]


# Lines that are refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ((9, 4, 8, VOCAB, 4), "expected arch = 80, or 120 for compute capability 12.0"),
        ((90, 16, 8, VOCAB, 4), "expected itemsize = 2 or 4"),
        ((90, 4, 0, VOCAB, 4), "expected rows >= 1"),
        ((90, 4, 8, -1, 4), "expected vocab >= 1"),
        ((90, 4, 8, VOCAB, -1), "expected 0 <= parts <= 256"),
        ((90, 4, 8, VOCAB, 257), "expected 0 <= parts <= 256"),
        ((90, 3, 0, VOCAB, 4), "expected itemsize = 2 or 4, rows >= 1"),
    ],
)
def test_a_line_that_is_wrong_says_what_is(line: tuple[int, ...], wrong: str) -> None:
    names = ("arch", "itemsize", "rows", "vocab", "parts")
    said = ", ".join(f"{name}={value}" for name, value in zip(names, line, strict=True))
    with pytest.raises(ValueError, match=f"^{re.escape(f'Tuned({said}): {wrong}')}$"):
        Tuned(*line)


@pytest.mark.parametrize("line", [(9.0, 4, 8, VOCAB, 4), (90, 4, 8, VOCAB, "4"), (90, 4, True, VOCAB, 4)])
def test_a_line_of_anything_but_whole_numbers_says_so(line: tuple[int, ...]) -> None:
    with pytest.raises(TypeError, match=r"^Tuned\(.*\): expected whole numbers$"):
        Tuned(*line)


@pytest.mark.parametrize("rows", [8, 7])
def test_a_line_that_never_counts_is_refused(rows: int) -> None:
    first, second = Tuned(90, 4, 8, VOCAB, 4), Tuned(90, 4, rows, 1000, 2)
    message = f"Tuned(arch=90, itemsize=4, rows={rows}, vocab=1000, parts=2) never counts: it stands after {first}, "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        table(first, second)
    others = (Tuned(90, 2, rows, 1000, 2), Tuned(80, 4, rows, 1000, 2), Tuned(90, 4, 9, 1000, 2))
    assert table(second, first, *others) == (second, first, *others)


def test_most_programs_are_as_many_as_the_kernels_take() -> None:
    assert kernels("workspace").MAX_PARTS.value == MAX_PARTS
