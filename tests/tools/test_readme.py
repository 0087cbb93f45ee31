"""What the README says of the code is what the code says of itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastsample as fs
from fastsample.params import specs

README = (Path(__file__).parents[2] / "README.md").read_text()


def parameter_rows():
    for name, spec in specs():
        default = getattr(fs.SamplingParams, name)
        yield f"| `{name}` | `{default!r}` | {spec.range} | {spec.meaning} |"


@pytest.mark.parametrize("row", list(parameter_rows()))
def test_parameter_table(row):
    assert row in README


def test_every_public_name_is_shown():
    missing = [name for name in fs.__all__ if not re.search(rf"\b{name}\b", README)]
    assert missing == []


def test_every_engine_is_shown():
    missing = [name for name in fs.engines() if f"| `{name}` |" not in README]
    assert missing == []


LANGUAGES = {"python": [sys.executable, "-c"], "bash": ["bash", "-euc"]}


def blocks():
    """Every block of the page as (language, code), but for the first, whose commands install: CI runs those."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert found[0][0] == "bash"
    assert "pip install" in found[0][1]
    return found[1:]


@pytest.mark.parametrize(("language", "code"), blocks())
def test_blocks_run_as_they_stand(language, code, tmp_path):
    """Each by itself, in an empty folder, without a network."""
    scripts = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*LANGUAGES[language], code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_said_to_be_on_an_index():
    """Only a clone can be installed."""
    root = Path(__file__).parents[2]
    pages = [root / "README.md", root / "CONTRIBUTING.md", *root.glob("docs/*.md"), *root.glob("examples/*.md")]
    pages += Path(fs.__file__).parent.rglob("*.py")
    wrong = [page.name for page in pages if re.search(r"pip install \S*fastsample", page.read_text())]
    assert wrong == []
