"""What decoders' texts are compared with: fs.sample on one row after the other. And the examples' models."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastsample as fs

EXAMPLES = Path(__file__).parents[2] / "examples" / "decoders"


def tiny_models() -> Any:
    """examples/decoders/tiny_models.py."""
    spec = importlib.util.spec_from_file_location("tiny_models", EXAMPLES / "tiny_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def output_of(example: str) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / f"{example}.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def drawn(
    logits: Callable[[list[int]], Any] | Iterable[Any], steps: int, seed: int, prompt: Sequence[int] = (), **fields: Any
) -> list[int]:
    """The tokens of a sequence, from its logits [V] step by step, or from a function of the new ids so far."""
    rows = None if callable(logits) else iter(logits)
    output: list[int] = []
    for offset in range(steps):
        row = logits(output) if callable(logits) else next(rows)
        history = {"prompt_ids": [list(prompt)], "output_ids": [output]}
        out = fs.sample(
            torch.as_tensor(row)[None], seed=[seed], offset=offset, backend="reference", **history, **fields
        )
        output.append(int(out.tokens[0]))
    return output
