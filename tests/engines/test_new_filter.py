"""CONTRIBUTING.md's example of a filter, applied to a copy of the tree: what it edits is all that a filter takes."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pybind11
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COPIED = ("csrc", "fastsample", "kernels", "tests", "pyproject.toml", "README.md")
FILTER = "max_bits"
NEEDS = {  # the only files that a filter may need an edit of
    "csrc/core/filters.h",
    "csrc/core/rows.h",
    "fastsample/params.py",
    "fastsample/reference/filters.py",
    "kernels/filters.py",
    "tests/contract/test_reference.py",
}


@dataclass(frozen=True)
class Hunk:
    file: str
    before: str
    after: str


def hunks() -> list[Hunk]:
    """The edits of the section's diff blocks. They have no line numbers: what they replace must occur once."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("\n## Add a filter\n")[1].split("\n## ")[0]
    found = []
    for block in re.findall(r"```diff\n(.*?)```", section, re.DOTALL):
        heading, *parts = block.split("@@\n")
        for part in parts:
            lines = part.splitlines()
            assert all(line[0] in " +-" for line in lines), part
            before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kinds) for kinds in (" -", " +"))
            found.append(Hunk(heading.removeprefix("--- ").strip(), before, after))
    return found


def test_the_example_edits_what_a_filter_needs() -> None:
    assert {hunk.file for hunk in hunks()} == NEEDS
    assert all(FILTER in hunk.after and FILTER not in hunk.before for hunk in hunks())


def test_the_example_fits_the_tree() -> None:
    for hunk in hunks():
        assert (ROOT / hunk.file).read_text().count(hunk.before) == 1, f"{hunk.file} has no such lines:\n{hunk.before}"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment like this one, but whose fastsample is a copy with the filter."""
    tree = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, tree / name)
    for hunk in hunks():
        file = tree / hunk.file
        file.write_text(file.read_text().replace(hunk.before, hunk.after))
    shutil.copytree(tree / "kernels", tree / "fastsample" / "kernels")
    compile_cpu(tree)
    return environment(tree)


def compile_cpu(tree: Path) -> None:
    """The CPU extension for any CPU: other instruction sets compile the same sources."""
    isa = "neon" if platform.machine() in ("aarch64", "arm64") else "baseline"
    flags = ["-std=gnu++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"]
    flags += [f"-DFASTSAMPLE_ISA={isa}", f"-DFASTSAMPLE_ISA_{isa}", f"-DFASTSAMPLE_HAS_{isa}"]
    flags += [f"-I{folder}" for folder in ("csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    sources = ["csrc/bindings/cpu.cc", *(f"csrc/cpu/{file.name}" for file in sorted((tree / "csrc/cpu").glob("*.cc")))]
    target = f"fastsample/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [os.environ.get("CXX") or "c++", *flags, *sources, "-o", target]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def environment(tree: Path) -> Path:
    """A virtual environment whose packages are ours, after the tree. Children that it starts have them too."""
    folder = tree / "env"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Paths in a .pth file are taken as they are: the .pth of an editable install, for another tree, is not read.
    (packages / "tree.pth").write_text("\n".join([str(tree), *(path for path in sys.path if os.path.isdir(path))]))
    return folder / "bin" / "python"


def run_tests(python: Path, file: str, chosen: str) -> str:
    """The output of the copy's own tests; pytest fails where it finds none."""
    tree = python.parents[2]
    command = [python, "-m", "pytest", "-q", "--rootdir", tree, "-c", tree / "pyproject.toml", "-m", "", "-k", chosen]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONPATH"))}
    options = ["-p", "no:cacheprovider", tree / "tests" / file]
    done = subprocess.run(
        [*map(str, command), *map(str, options)], cwd=python.parent, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    return done.stdout


def test_the_copy_is_what_is_tested(python: Path) -> None:
    code = "import fastsample, fastsample._cpu as cpu; print(fastsample.__file__, cpu.__file__, cpu.PARAM_FIELDS[-1])"
    done = subprocess.run([str(python), "-c", code], cwd=python.parent, capture_output=True, text=True)
    package, extension, last = done.stdout.split() or [done.stderr] * 3
    assert (Path(package).parent, Path(extension).parent) == (python.parents[2] / "fastsample",) * 2
    assert last == FILTER


@pytest.mark.parametrize(
    "file",
    [
        "api/test_explain.py",  # what it leaves out is told of
        "api/test_params.py",  # it has an effect, on the CPU engine and the reference, per row
        "contract/test_reference.py",  # the reference is the oracle
        "engines/test_parity.py",  # the CPU engine is the reference
        "engines/test_simt.py",  # the CUDA sources are
        "engines/test_triton.py",  # the Triton kernels are
        "robustness/test_errors.py",  # what is out of range is refused by name
    ],
)
def test_it_is_all_that_a_filter_takes(file: str, python: Path) -> None:
    if file == "engines/test_triton.py":
        pytest.importorskip("triton", reason="Triton is not installed")
    run_tests(python, file, FILTER)


def test_its_option_is_there(python: Path) -> None:
    done = subprocess.run(
        [str(python), "-c", "from fastsample.cli.app import app; app()", "generate", "--help"],
        cwd=python.parent,
        capture_output=True,
        text=True,
    )
    assert f"--{FILTER.replace('_', '-')}" in done.stdout, done.stderr
