"""What comes with a model is data: nothing in its folder is executed, and weights are read from safetensors alone."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastsample

SHIPPED = Path(fastsample.__file__).parent / "models" / "tiny-gpt2"
EVIL = "import pathlib\npathlib.Path({!r}).write_text('executed')\n"


class Payload:
    """Unpickled, it writes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (EVIL.format(str(self.marker)),)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def own_config(model: Path, marker: Path) -> None:
    (model / "evil.py").write_text(EVIL.format(str(marker)))
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(model / "config.json", model_type="evil", auto_map=auto_map)


def own_tokenizer(model: Path, marker: Path) -> None:
    (model / "evil.py").write_text(EVIL.format(str(marker)))
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    edit(model / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=auto_map)


def own_generate(model: Path, marker: Path) -> None:
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(EVIL.format(str(marker)))


def pickled_weights(model: Path, marker: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))


def pickle_for_safetensors(model: Path, marker: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").write_bytes(pickle.dumps(Payload(marker)))


HOSTILE = [own_config, own_tokenizer, own_generate, pickled_weights, pickle_for_safetensors]


@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda f: f.__name__)
def test_a_hostile_model(spoil: Callable[[Path, Path], None], tmp_path: Path) -> None:
    model, marker = tmp_path / "model", tmp_path / "marker"
    model.mkdir()
    for file in SHIPPED.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    spoil(model, marker)
    code = "from fastsample.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", "Hello", "--max-new-tokens", "2", "--model", str(model)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, input="y\n")
    assert not marker.exists()
    harmless = spoil in (own_generate, own_tokenizer)  # the model's own files suffice: the others are left alone
    assert harmless or done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    (tmp_path / "evil.py").write_text(EVIL.format(str(marker)))  # what would have been executed does leave the marker
    subprocess.run([sys.executable, "evil.py"], cwd=tmp_path, check=True)
    assert marker.read_text() == "executed"
