"""A model's folder that brings fastsample along, for generate, pipeline and transformers' server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, pipeline
from transformers.generation.streamers import BaseStreamer

from fastsample.cli.model import shipped_model
from fastsample.integrations.transformers import fs_generate
from fastsample.integrations.transformers.folder import export

PROMPT = "The future of AI is"
FIELDS: dict[str, Any] = {"seed": 7, "top_n_sigma": 1.5, "presence_penalty": 0.5}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(shipped_model())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(shipped_model(), dtype="float32")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    return Path(shutil.copytree(shipped_model(), tmp_path / "model"))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")


def test_a_loaded_model_draws_as_its_folder_says(folder: Path, model: Any, tokenizer: Any) -> None:
    written = export(folder, **FIELDS)
    assert sorted(path.name for path in written.iterdir()) == ["generate.py", "requirements.txt"]
    ids = tokenizer([PROMPT, PROMPT], return_tensors="pt")
    lm = load(folder)
    want = model.generate(**ids, **SAMPLED, custom_generate=fs_generate(**FIELDS))
    assert lm.generate(**ids, **SAMPLED).tolist() == want.tolist()
    make: Any = GenerationConfig
    config = make(**SAMPLED)
    assert lm.generate(ids["input_ids"], config, attention_mask=ids["attention_mask"]).tolist() == want.tolist()
    other = model.generate(**ids, **SAMPLED, custom_generate=fs_generate(**FIELDS | {"seed": 8}))
    assert other.tolist() != want.tolist()
    assert lm.generate(**ids, **SAMPLED, fastsample={"seed": 8}).tolist() == other.tolist()
    config = make(**SAMPLED, fastsample={"seed": 8})
    assert lm.generate(**ids, generation_config=config).tolist() == other.tolist()
    own = fs_generate(3)
    want = model.generate(**ids, **SAMPLED, custom_generate=own)
    assert lm.generate(**ids, **SAMPLED, custom_generate=own).tolist() == want.tolist()


def test_pipelines_get_it_too(folder: Path, model: Any, tokenizer: Any) -> None:
    export(folder, **FIELDS)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | SAMPLED))  # beside it, as ever
    write = pipeline("text-generation", str(folder), trust_remote_code=True, dtype="float32")
    ids = tokenizer(PROMPT, return_tensors="pt")
    for call, seed in (({}, 7), ({"fastsample": {"seed": 8}}, 8)):
        want = model.generate(**ids, **SAMPLED, custom_generate=fs_generate(**FIELDS | {"seed": seed}))[0]
        assert write(PROMPT, **call)[0]["generated_text"] == tokenizer.decode(want)


def test_a_repository_without_a_model(tmp_path: Path, folder: Path, model: Any, tokenizer: Any) -> None:
    export(tmp_path / "sampler")
    assert not (tmp_path / "sampler" / "generation_config.json").exists()
    ids = tokenizer(PROMPT, return_tensors="pt")
    place: dict[str, Any] = {"custom_generate": str(tmp_path / "sampler"), "trust_remote_code": True}
    got = model.generate(**ids, **SAMPLED, **place, fastsample=FIELDS)
    assert got.tolist() == model.generate(**ids, **SAMPLED, custom_generate=fs_generate(**FIELDS)).tolist()


def test_greedy_search_needs_no_draw(
    folder: Path, model: Any, tokenizer: Any, recwarn: pytest.WarningsRecorder
) -> None:
    export(folder, **FIELDS)
    ids = tokenizer(PROMPT, return_tensors="pt")
    want = model.generate(**ids, max_new_tokens=12, custom_generate=fs_generate(presence_penalty=0.5))
    assert load(folder).generate(**ids, max_new_tokens=12).tolist() == want.tolist()
    assert not [w for w in recwarn if "fs_generate" in str(w.message)]


def test_without_a_seed_torch_repeats_a_text(folder: Path, tokenizer: Any) -> None:
    export(folder)
    lm, ids, texts = load(folder), tokenizer(PROMPT, return_tensors="pt"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(lm.generate(**ids, **SAMPLED).tolist())
    assert texts[0] == texts[1] != texts[2]


def test_streamers_and_breakers(folder: Path, model: Any, tokenizer: Any) -> None:
    class Seen(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ids.append(-1)

    dry: dict[str, Any] = {"dry_multiplier": 0.8, "dry_breakers": ["\n", "."], "seed": 7}
    export(folder, **dry)
    ids, seen = tokenizer(PROMPT, return_tensors="pt"), Seen()
    want = model.generate(**ids, **SAMPLED, custom_generate=fs_generate(**dry, tokenizer=tokenizer))
    assert load(folder).generate(**ids, **SAMPLED, streamer=seen).tolist() == want.tolist()
    assert seen.ids == [*want[0].tolist(), -1]


def test_what_stands_in_a_folder_stays(folder: Path) -> None:
    before = json.loads((folder / "generation_config.json").read_text())
    export(folder, seed=1)
    export(folder, top_a=0.2)
    assert json.loads((folder / "generation_config.json").read_text()) == before | {"fastsample": {"top_a": 0.2}}
    export(folder)
    assert json.loads((folder / "generation_config.json").read_text()) == before
    (folder / "custom_generate" / "generate.py").write_text("def generate(): ...\n")
    with pytest.raises(FileExistsError, match="not fastsample's"):
        export(folder)


def test_a_folder_with_its_options_in_config_json(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=9, eos_token_id=5, bos_token_id=3, **sizes)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    export(tmp_path, seed=1)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert (config.eos_token_id, config.bos_token_id, getattr(config, "fastsample", None)) == (5, 3, {"seed": 1})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"temperature": 0.5}, ValueError, "temperature: is an option of generate's own"),
        ({"grammar": None}, ValueError, "grammar: no file can hold it"),
        ({"top_n_sigma": torch.tensor(1.0)}, TypeError, "top_n_sigma = tensor.*JSON"),
        ({"top_n_sigma": float("nan")}, TypeError, "top_n_sigma = nan"),
        ({"top_n_sigma": -1.0}, ValueError, "top_n_sigma"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ],
)
def test_bad_fields(tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        export(tmp_path / "new", **fields)
    assert not (tmp_path / "new").exists()


def test_bad_fields_of_a_call(folder: Path, tokenizer: Any) -> None:
    export(folder, seed=1)
    lm, ids = load(folder), tokenizer(PROMPT, return_tensors="pt")
    with pytest.raises(ValueError, match="top_p: is an option of generate's own"):
        lm.generate(**ids, **SAMPLED, fastsample={"top_p": 0.5})
    with pytest.raises(TypeError, match="fastsample: expected a dict"):
        lm.generate(**ids, **SAMPLED, fastsample=7)
    with pytest.raises(ValueError, match="num_beams"):
        lm.generate(**ids, num_beams=2, max_new_tokens=2)


# transformers serve --------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(folder: Path) -> Iterator[Callable[..., str]]:
    """Asks `transformers serve` for a completion."""
    for package in ("accelerate", "fastapi", "openai", "uvicorn"):
        pytest.importorskip(package)
    export(folder, **FIELDS)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"do_sample": True}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    main = "from transformers.cli.transformers import main; main()"
    options = ["--trust-remote-code", "--device", "cpu", "--dtype", "float32", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-c", main, "serve", str(folder), *options],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "home")},
    )

    def request(path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return str(answer.read().decode())

    def completion(**body: Any) -> str:
        return request("v1/completions", {"model": str(folder), "prompt": PROMPT} | body)

    try:
        for _ in range(120):
            try:
                request("health")
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None
                time.sleep(0.5)
        yield completion
    finally:
        server.terminate()
        server.wait(30)


def test_the_server_draws_as_the_folder_says(ask: Callable[..., str], model: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT, return_tensors="pt")
    body: dict[str, Any] = {"temperature": 0.8, "max_tokens": 12}

    def text(seed: int) -> str:
        tokens = model.generate(**ids, **SAMPLED, custom_generate=fs_generate(**FIELDS | {"seed": seed}))
        return str(tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :]))

    assert json.loads(ask(**body))["choices"][0]["text"] == text(7)
    pieces = [line[6:] for line in ask(**body, stream=True).splitlines() if line.startswith("data: {")]
    assert "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces) == text(7)
    own = json.dumps({"do_sample": True, "fastsample": {"seed": 8}})
    assert json.loads(ask(**body, generation_config=own))["choices"][0]["text"] == text(8)
