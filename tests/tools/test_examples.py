"""The examples run as they are, offline, and are as short as they claim."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = sorted(path for path in EXAMPLES.glob("*.py") if path.stem not in {"grpo", "train_tiny_gpt2"})


def run(path: Path, *launcher: str) -> list[str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [sys.executable, *launcher, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_there_are_four() -> None:
    assert [path.stem for path in SHORT] == ["best_of_n", "json_output", "sampling", "split_head"]


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 40


def test_sampling() -> None:
    text = "\n".join(run(EXAMPLES / "sampling.py"))
    first, second = text.split("\n---\n")
    assert first.startswith("The future of AI is")
    assert second.startswith("She walked into the room and")
    assert len(first) > 60


def test_best_of_n() -> None:
    *candidates, vote = run(EXAMPLES / "best_of_n.py")
    scores = [float(line.split()[0]) for line in candidates]
    assert len(scores) == 8
    assert scores == sorted(scores, reverse=True)
    assert vote.startswith("most say ")


def test_json() -> None:
    objects = [json.loads(line) for line in run(EXAMPLES / "json_output.py")]
    assert len(objects) == 5
    assert all(set(one) == {"name", "kind", "arguments"} for one in objects)


def test_split_head() -> None:
    """Both ranks get the text of one process."""
    lines = run(EXAMPLES / "split_head.py", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    told = sorted(line for line in lines if line.startswith("rank"))
    assert len(told) == 2
    for rank, line in enumerate(told):
        start, text = line.split(": ", 2)[:2], ast.literal_eval(line.split(": ", 2)[2])
        assert start == [f"rank {rank}", "the same text is True"]
        assert text.startswith("She walked into the room and")
