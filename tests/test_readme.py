"""What the README says of the code is what the code says of itself."""

import re
from pathlib import Path

import pytest

import fastsample as fs
from fastsample.params import specs

README = (Path(__file__).parents[1] / "README.md").read_text()


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


def quick_start():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return [block for block in blocks if "model" not in block]  # those need one of the reader's


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor imports torch's own deprecated parts
@pytest.mark.parametrize("block", quick_start())
def test_examples_run(block):
    exec(compile(block, "README.md", "exec"), {})
