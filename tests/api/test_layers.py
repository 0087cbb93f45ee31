"""The package's modules import each other in one direction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fastsample

ROOT = Path(fastsample.__file__).parent
PARTS = ("", "inputs", "backends", "reference")


def modules() -> dict[str, Path]:
    """The core's modules by name. The package's own __init__ only gathers public names, and nobody may import it."""
    files = [path for part in PARTS for path in (ROOT / part).glob("*.py") if path != ROOT / "__init__.py"]
    names = [".".join(("fastsample", *path.relative_to(ROOT).with_suffix("").parts)) for path in files]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, files, strict=True)}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, and every name from one: at any depth, for type checking too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def owner(name: str, known: dict[str, Path]) -> str | None:
    """The module of the core that an imported name is, or is in."""
    if name.split(".")[0] != "fastsample" or name.startswith("fastsample._"):  # what the build makes imports nothing
        return None
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def graph() -> dict[str, set[str]]:
    known = modules()
    edges: dict[str, set[str]] = {}
    for name, path in known.items():
        found = {owner(other, known) for other in imported(path)}
        edges[name] = {other for other in found if other is not None and other != name}
    return edges


def test_imports_have_no_circle() -> None:
    edges = graph()
    assert len(edges) > 15
    assert edges["fastsample.api"] >= {"fastsample.call", "fastsample.ops"}  # found at the top and in a function
    try:
        order = list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
    assert "fastsample" not in order, "the package's own __init__ gathers what the modules define"


@pytest.mark.parametrize("above", ["api", "verification", "sampler", "ops", "ops_verify", "untraced"])
def test_nobody_in_the_core_imports_the_public_calls(above: str) -> None:
    """Those that trace are imported by the public calls, and by nothing that they import themselves."""
    users = {name for name, others in graph().items() if f"fastsample.{above}" in others}
    assert users <= {f"fastsample.{name}" for name in ("api", "verification", "sampler", "ops_verify")}
