"""`fastsample explain`: the text is that of `generate`, and what is told of it is what `fs.explain` tells."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fastsample as fs
from fastsample.cli import app as cli
from fastsample.cli import explain as cli_explain
from fastsample.params import specs

PROMPT = "The future of AI is"


def run(*args: str) -> Any:
    return CliRunner().invoke(cli.app, args)


def explained(*args: str, prompt: str = PROMPT, tokens: int = 4) -> dict[str, Any]:
    """What `explain --json` prints, after making sure that it prints nothing else."""
    result = run("explain", prompt, "--json", "--tokens", str(tokens), *args)
    assert (result.exit_code, result.stderr) == (0, "")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def text(found: dict[str, Any]) -> str:
    return found["prompt"] + "".join(step["text"] for step in found["steps"])


@pytest.mark.parametrize(
    "options",
    [
        ("--top-k", "40", "--min-p", "0.02"),
        ("--temperature", "0"),
        ("--repetition-penalty", "1.3", "--frequency-penalty", "0.2", "--presence-penalty", "0.1"),
        ("--dry-multiplier", "0.8", "--dry-allowed-length", "1", "--dry-breaker", "\n", "--no-repeat-ngram-size", "2"),
        ("--preset", "llama.cpp", "--xtc-probability", "0.5", "--backend", "reference"),
    ],
    ids=lambda options: options[0],
)
def test_the_text_is_that_of_generate(options: tuple[str, ...]) -> None:
    found = explained("--seed", "7", *options, tokens=6)
    same = run("generate", PROMPT, "--seed", "7", "--max-new-tokens", "6", *options).stdout
    assert f"{text(found)}\n" == same
    assert [step["offset"] for step in found["steps"]] == list(range(6))


def test_every_parameter_reaches_the_explanation() -> None:
    values: dict[str, Any] = {name: 3 if spec.kind == "int" else 0.5 for name, spec in specs() if spec.kind != "bool"}
    values |= {"ties": "all", "order": "joint", "dry_base": 2.0}
    arguments = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    found = explained("--seed", "1", "--p-less", *arguments, tokens=1)
    assert found["steps"][0]["params"] == values | {"p_less": True}


def test_defaults_are_those_of_generate() -> None:
    (step,) = explained("--seed", "1", tokens=1)["steps"]
    defaults = {name: getattr(fs.SamplingParams, name) for name, _ in specs()}
    assert step["params"] == defaults | {"temperature": 0.8, "top_p": 0.95}


def test_a_grammar_is_told_of_as_a_mask() -> None:
    found = explained("--seed", "3", "--choices", "yes,no", tokens=8)
    assert text(found).removeprefix(PROMPT).removesuffix("<|endoftext|>") in ("yes", "no")
    for step in found["steps"]:
        assert step["edits"][0]["name"] == "bitmask"
        assert step["edits"][0]["removed"] == step["vocab"] - step["alive"]


def test_plain_text_where_there_is_no_terminal() -> None:
    result = run("explain", PROMPT, "--seed", "7", "--tokens", "2", "--top", "3")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    steps = explained("--seed", "7", tokens=2)["steps"]
    for number, step in enumerate(steps, 1):
        assert f"step {number}  {json.dumps(step['text'])}  p " in result.stdout
    assert result.stdout.count("before   top-p   drawn") == 2


def test_colours_on_a_terminal() -> None:
    main, side = pty.openpty()
    code = "from fastsample.cli import main; main()"
    command = [sys.executable, "-c", code, "explain", PROMPT, "--seed", "7", "--tokens", "1", "--top", "3"]
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=side, env=env) as process:
        os.close(side)
        shown = b""
        try:
            while part := os.read(main, 4096):
                shown += part
        except OSError:  # the other side is closed
            pass
    os.close(main)
    assert process.returncode == 0
    assert b"\x1b[1mstep 1" in shown
    assert b"top-p" in shown


def test_the_page_is_written(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    result = run("explain", PROMPT, "--seed", "7", "--tokens", "2", "--html", str(file))
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "page.html: 2 steps" in result.stderr
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
    refused = run("explain", PROMPT, "--html", str(tmp_path / "none" / "page.html"), "--tokens", "1")
    assert refused.exit_code == 2
    assert "--html" in refused.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["explain"], "prompt"),
        (["explain", "x", "--tokens", "0"], "--tokens"),
        (["explain", "x", "--top-p", "2"], "top_p = 2.0"),
        (["explain", "x", "--seed", str(2**64)], "seed = 18446744073709551616"),
        (["explain", "x", "--backend", "abacus"], "backend = 'abacus'"),
        (["explain", "x", "--dry-breaker", "a"], "--dry-breaker: expected --dry-multiplier with it"),
        (["explain", "x", "--regex", "a", "--choices", "a"], "expected one of them"),
        (["explain", "x", "--model", "./none"], "--model ./none: no such folder"),
    ],
)
def test_refusals_are_one_line(args: list[str], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert message.lower() in result.stderr.lower()


def test_another_token_than_generates_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The explanation is computed anew; should it ever find another token, it does not explain the text."""
    real = fs.explain

    def other(*args: Any, **more: Any) -> fs.Explanation:
        return real(*args, **more | {"seed": [1] * len(more["seed"])})

    monkeypatch.setattr(cli_explain.fs, "explain", other)
    result = run("explain", PROMPT, "--seed", "7", "--tokens", "4")
    assert result.exit_code == 2
    assert "generate drew" in result.stderr
