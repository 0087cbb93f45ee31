"""What README and the pages of docs/ say of the code is what the code says of itself."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fastsample as fs
from fastsample import params

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = ("python", "bash")


def hooks() -> ModuleType:
    """The site's own code."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_parameter_table_has_every_parameter():
    table = hooks().parameter_table(params)
    for name, spec in params.specs():
        assert f"| `{name}` | `{getattr(fs.SamplingParams, name)!r}` | {spec.range} | {spec.meaning} |" in table
    assert hooks().PARAMETERS.search((ROOT / "docs" / "parameters.md").read_text())


def test_every_public_name_has_its_place_in_the_api():
    page = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in fs.__all__ if not re.search(rf"^::: fastsample\.(.*\.)?{name}$", page, re.MULTILINE)]
    assert missing == []


def test_every_engine_is_shown():
    missing = [name for name in fs.engines() if f"| `{name}` |" not in README]
    assert missing == []


def test_readme_is_short():
    body, _ = README.split("\n[architecture]: ", 1)  # what people read, without the addresses of its links
    assert len(body.splitlines()) <= 135


def test_links_of_readme():
    """Every link is defined at the end, where they become addresses of the repository once it has one."""
    body, definitions = README.split("\n[architecture]: ", 1)
    links = dict(re.findall(r"^\[(.*)\]: (.*)$", f"[architecture]: {definitions}", re.MULTILINE))
    assert not re.search(r"\]\((?!https:)", body)
    assert set(re.findall(r"\]\[([\w-]+)\]", body)) == links.keys()
    published = "[project.urls]" in (ROOT / "pyproject.toml").read_text()
    for target in links.values():
        assert target.startswith("https://") if published else (ROOT / target).is_file(), target


def stages(text: str) -> set[str]:
    """The stages that a text names: "stage 6b", "Stages 1 to 3", "stages 5 and 8"."""
    found = re.findall(r"[Ss]tages? (\d+b?)(?:(?:-| to | and |, )(\d+b?)\b)?", text)
    return {stage for pair in found for stage in pair if stage}


def test_every_stage_that_the_sources_name_is_in_the_contract():
    known = set(re.findall(r'^<a id="stage-(\w+)"></a>$', (ROOT / "docs" / "contract.md").read_text(), re.MULTILINE))
    assert known == {*map(str, range(9)), "6b"}
    sources = [p for d in ("csrc", "kernels", "fastsample", "tests") for p in (ROOT / d).rglob("*")]
    sources = [p for p in sources if p.suffix in {".py", ".h", ".cc", ".cu", ".cuh"} and p != Path(__file__)]
    named = {stage: path for path in sources for stage in stages(path.read_text())}
    assert len(named) > 5
    assert {stage: path for stage, path in named.items() if stage not in known} == {}


def blocks():
    """Every block that runs, of every page; but for README's first, whose commands install: CI runs those."""
    pages = [(page.stem, BLOCK.findall(page.read_text())) for page in [ROOT / "README.md", *PAGES]]
    language, code = pages[0][1].pop(0)
    assert language == "bash"
    assert "pip install" in code
    return [
        pytest.param(*block, id=f"{name}-{i}")
        for name, found in pages
        for i, block in enumerate(found)
        if block[0] in LANGUAGES
    ]


SCRIPTS = str(Path(sys.executable).parent)
ENVIRONMENT = os.environ | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def start():
    """Runs Python in a folder: its exit status, and what it prints."""
    command = [sys.executable, str(ROOT / "tests" / "support" / "blocks.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=ENVIRONMENT) as server:

        def run(folder, code):
            print(json.dumps([str(folder), code]), file=server.stdin, flush=True)
            return int(server.stdout.readline()), Path(f"{folder}.txt").read_text()

        yield run
        server.stdin.close()


@pytest.mark.parametrize(("language", "code"), blocks())
def test_blocks_run_as_they_stand(language, code, tmp_path, request):
    """Each by itself, in an empty folder, without a network."""
    folder = tmp_path / "empty"
    folder.mkdir()
    if language == "python":
        status, printed = request.getfixturevalue("start")(folder, code)
    else:
        done = subprocess.run(
            ["bash", "-euc", code],
            cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
        )  # fmt: skip
        status, printed = done.returncode, done.stdout
    assert status == 0, printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("print(7)", 0, "7"),
        ("import sys; print('no', file=sys.stderr); sys.exit(3)", 3, "no"),
        ("torch.zeros(1)", 1, "NameError"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_what_fails_is_told(code, status, told, start, tmp_path):
    """Also of what a block uses and does not import."""
    (tmp_path / "empty").mkdir()
    found, printed = start(tmp_path / "empty", code)
    assert found == status
    assert told in printed


def test_nothing_is_said_to_be_on_an_index():
    """Only a clone can be installed."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, *ROOT.glob("examples/*.md")]
    pages += Path(fs.__file__).parent.rglob("*.py")
    wrong = [page.name for page in pages if re.search(r"pip install \S*fastsample", page.read_text())]
    assert wrong == []
