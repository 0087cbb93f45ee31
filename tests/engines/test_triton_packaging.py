"""The folder kernels/ becomes fastsample.kernels, and shadows no package `kernels` when run from the root."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEMS = tuple(sorted(path.stem for path in (ROOT / "kernels").glob("*.py")))


def python(code: str, cwd: Path, path: str = "") -> list[str]:
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    # `python -c` puts the working directory first on the path, as `python -m pytest` does.
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("stem", STEMS)
def test_every_stem_is_a_module_of_the_package(stem: str) -> None:
    spec = importlib.util.find_spec(f"fastsample.kernels.{stem}")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).read_text() == (ROOT / "kernels" / f"{stem}.py").read_text()


def test_it_is_found_from_outside_the_tree(tmp_path: Path) -> None:
    code = "import importlib.util as u; print(u.find_spec('fastsample.kernels.mass').origin)"
    assert Path(python(code, tmp_path)[0]).parts[-2:] == ("kernels", "mass.py")


def test_a_package_called_kernels_wins_from_the_root(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHO = 'the real one'")
    assert python("import kernels; print(*kernels.WHO.split())", ROOT, str(tmp_path)) == ["the", "real", "one"]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_imports_from_the_root() -> None:
    """Also beside the real `kernels` of Hugging Face, where that is installed."""
    code = """
import transformers
from transformers import AutoModelForCausalLM
from transformers.integrations import hub_kernels
import kernels
print(hub_kernels.__name__, kernels.__file__)
"""
    name, file = python(code, ROOT)
    assert name == "transformers.integrations.hub_kernels"
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        assert file == "None"  # the folder, without the file that would make it a package
    else:
        assert not Path(file).is_relative_to(ROOT / "kernels")
