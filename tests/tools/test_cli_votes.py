"""fastsample generate --best-of: rounds of a vote, and reward models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner

import fastsample as fs
from fastsample.cli import app as cli
from fastsample.cli.model import shipped_model
from fastsample.cli.output import RefusedError
from fastsample.cli.session import BATCH, Session

PROMPT = "The future of AI is"


@pytest.fixture(scope="module")
def session() -> Session:
    folder = str(shipped_model())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return Session(PROMPT, False, lm, tokenizer, ids, 6, None, [], {"temperature": 0.8}, 3, iter([3]))


def test_a_vote_ends_when_it_is_decided() -> None:
    options = ["--regex", "a[01]", "--vote", "^a", "--best-of", "60", "--seed", "2", "--max-new-tokens", "4"]
    result = CliRunner().invoke(cli.app, ["generate", PROMPT, *options])
    assert result.exit_code == 0
    drawn = -(-31 // BATCH) * BATCH  # of 60 that agree, 31 decide
    *rows, last = result.stderr.splitlines()
    assert last == f"fastsample: 'a' has {drawn} of {drawn} votes; {60 - drawn} more could not change that"
    assert sorted(int(row.split()[0]) for row in rows[1:]) == list(range(drawn))


def test_json_of_votes() -> None:
    options = ["--regex", "a[01]|b", "--vote", ".", "--best-of", "9", "--seed", "2", "--max-new-tokens", "4", "--json"]
    result = CliRunner().invoke(cli.app, ["generate", PROMPT, *options])
    found = json.loads(result.stdout)
    assert found["seed"] == 2
    assert sum(found["votes"].values()) == len(found["candidates"]) == 9
    assert sorted(each["index"] for each in found["candidates"]) == list(range(9))
    assert found["candidates"][0]["answer"] == max(found["votes"], key=found["votes"].get)
    assert "draw" not in result.stderr


def test_a_reward_model_needs_candidates() -> None:
    result = CliRunner().invoke(cli.app, ["generate", PROMPT, "--reward-model", "."])
    assert (result.exit_code, result.stderr) == (2, "fastsample: --reward-model needs --best-of\n")


def test_a_reward_model_ranks(session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=4096, num_attention_heads=2, num_labels=1, initializer_range=1.0, **sizes)
    judge = LlamaForSequenceClassification(config).eval()
    judge.save_pretrained(tmp_path)
    session.tokenizer.save_pretrained(tmp_path)
    assert session.best_of(5, 3, None, str(tmp_path)) == []
    out, err = capsys.readouterr()
    given: dict[str, Any] = {"tokenizer": session.tokenizer, "seed": [3], "max_new_tokens": 6, "temperature": 0.8}
    texts = {c.text for c in fs.best_of_n(session.lm, PROMPT, 5, **given).candidates}

    def reward(text: str) -> float:
        with torch.no_grad():
            return float(judge(torch.tensor([session.tokenizer(PROMPT + text)["input_ids"]])).logits)

    assert out == PROMPT + max(texts, key=reward) + "\n"
    rows = [re.split(r"  +", line) for line in err.splitlines() if re.match(r"(draw|\d)", line)]
    assert rows[0][1] == "reward"
    assert [float(row[1]) for row in rows[1:]] == pytest.approx(sorted(map(reward, texts), reverse=True), abs=6e-4)


def test_a_folder_without_a_reward_model_is_refused(session: Session, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=f"^--reward-model {re.escape(str(tmp_path))}: "):
        session.best_of(2, 3, None, str(tmp_path))
