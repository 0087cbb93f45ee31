"""The command line: prompts, choices, stop strings, batches, and models that are not what they should be."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import fastsample.integrations.transformers as drop_in
from fastsample.cli import app as cli
from fastsample.cli import model as cli_model
from fastsample.cli import session as cli_session
from fastsample.cli import start as cli_start
from fastsample.inputs import row_seeds

PROMPT = "The future of AI is"


def run(*args: str, stdin: bytes = b"") -> Any:
    return CliRunner().invoke(cli.app, args, input=stdin)


def text(*args: str, stdin: bytes = b"") -> str:
    result = run("generate", *args, "--seed", "1", "--max-new-tokens", "8", stdin=stdin)
    assert (result.exit_code, result.stderr) == (0, "")
    return str(result.stdout)


def refusal(*args: str, stdin: bytes = b"") -> str:
    result = run("generate", *args, stdin=stdin)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("fastsample: ")
    return str(line)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    folder = str(cli_model.shipped_model())
    return AutoModelForCausalLM.from_pretrained(folder).float().eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(cli_model.shipped_model(), tmp_path / "own"))


# The prompt -----------------------------------------------------------------------------------------------------------


def test_a_prompt_from_a_file_and_from_standard_input(tmp_path: Path) -> None:
    expected = text(PROMPT)
    file = tmp_path / "prompt.txt"
    for ending in ("", "\n", "\r\n"):
        file.write_bytes((PROMPT + ending).encode())
        assert text("--prompt-file", str(file)) == expected
        assert text("-", stdin=file.read_bytes()) == expected
        assert text("--prompt-file", "-", stdin=file.read_bytes()) == expected
    file.write_bytes(b"\xef\xbb\xbfone\n\n")
    assert text("--prompt-file", str(file)) == text("one\n")


def test_prompts_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"a\xff")
    assert "not UTF-8: " in refusal("a\udcff")
    assert "standard input: " in refusal("-", stdin=b"a\xff")
    assert "byte 0xff in position 1" in refusal("--prompt-file", str(tmp_path / "bytes"))
    assert "No such file" in refusal("--prompt-file", str(tmp_path / "missing"))
    for arguments in ((), (PROMPT, "--prompt-file", str(tmp_path / "bytes"))):
        assert "PROMPT: expected it as an argument" in refusal(*arguments)


def test_an_argument_that_an_ascii_locale_could_not_decode_is_utf8() -> None:
    assert cli_start.utf8("PROMPT", "\udcc3\udca9") == "é"


def test_a_tokenizer_that_makes_no_tokens_of_a_prompt(shipped: tuple[Any, Any]) -> None:
    class Empty:
        bos_token_id, eos_token_id = None, 0

        def __call__(self, prompt: str, **_: Any) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.zeros(1, 0)}

    ids, _ = cli_start.encode("", shipped[0], Empty(), 1)
    assert ids.tolist() == [[0]]
    with pytest.raises(cli_start.RefusedError, match="makes no tokens"):
        cli_start.encode("text", shipped[0], Empty(), 1)


# Choices --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The choices that reach the compiler."""
    from fastsample.integrations.grammar import GrammarCompiler

    calls: list[list[str]] = []
    real = GrammarCompiler.choices

    def spy(self: Any, choices: list[str]) -> Any:
        calls.append(list(choices))
        return real(self, choices)

    monkeypatch.setattr(GrammarCompiler, "choices", spy)
    return calls


def test_choices_are_trimmed_and_each_choice_is_taken_as_it_is(chosen: list[list[str]]) -> None:
    assert text(PROMPT, "--choices", "yes, no ,may be").strip() in ("yes", "no", "may be")
    assert text(PROMPT, "--choice", " no") == " no\n"
    assert text(PROMPT, "--choice", "a, b", "--choice", "a, b") == "a, b\n"
    assert chosen == [["yes", "no", "may be"], [" no"], ["a, b", "a, b"]]
    for empty in (("--choice", ""), ("--choices", ""), ("--choices", "a, ")):
        assert "choices: " in refusal(PROMPT, *empty)


def test_a_grammar_backend_needs_a_grammar() -> None:
    assert "--grammar-backend: expected --json-schema, " in refusal(PROMPT, "--grammar-backend", "auto")
    assert "expected one of them" in refusal(PROMPT, "--choice", "a", "--regex", "")


@pytest.mark.parametrize("schema", ['{"$ref": "#"}', "[" * 100_000], ids=["itself", "deep"])
def test_schemas_without_end_are_refused(schema: str, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(schema)
    refusal(PROMPT, "--json-schema", str(file))


def test_a_text_that_generate_refuses_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last word is the validation of the whole text: nothing may be on the screen before it."""

    def fs_generate(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        def loop(*args: Any, **kwargs: Any) -> Any:
            raise ValueError("text of sequence 0 does not validate\nat $")

        assert kwargs["streamer"] is None
        return loop

    monkeypatch.setattr(drop_in, "fs_generate", fs_generate)
    for more in ((), ("--num", "3")):
        assert "does not validate" in refusal(PROMPT, "--regex", "[a-z]{3}", *more)


# Stop strings ---------------------------------------------------------------------------------------------------------


def test_a_text_ends_before_the_first_stop_string() -> None:
    whole = text(PROMPT)
    new = whole[len(PROMPT) : -1]
    assert len(new) > 12
    spanning = new[3:9]  # of more than one token, and the first of the two that occurs counts
    for stops in ((spanning,), (new[8:12], spanning), (spanning, "not in it")):
        arguments = [part for stop in stops for part in ("--stop", stop)]
        assert text(PROMPT, *arguments) == PROMPT + new[: new.find(spanning)] + "\n"
    assert text(PROMPT, "--stop", "not in it") == whole


def test_stop_strings_of_several_continuations() -> None:
    def split(output: str) -> list[str]:
        return [part[part.index("] ") + 2 :] for part in output[:-1].split("\n\n")]

    free = split(text(PROMPT, "--num", "4"))
    stopped = split(text(PROMPT, "--num", "4", "--stop", "e", "--stop", "\n"))
    for whole, cut in zip(free, stopped, strict=True):
        assert cut == PROMPT + cli_session.before(whole[len(PROMPT) :], ["e", "\n"])
    result = run("generate", PROMPT, "--best-of", "4", "--stop", "e", "--seed", "1", "--max-new-tokens", "8")
    assert result.exit_code == 0
    assert "e" not in result.stdout[len(PROMPT) :]
    rows = [line.split(maxsplit=3) for line in result.stderr.splitlines() if line[0].isdigit()]
    assert len(rows) == 4
    assert all("e" not in row[3] for row in rows if len(row) > 3)


def test_nothing_of_a_stop_string_is_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    class Letters:
        def decode(self, ids: list[int], **_: bool) -> str:
            return "".join(map(chr, ids))

    writer = cli_session.Writer(Letters(), ["STOP", "TON"])
    writer.put(torch.tensor([[ord("S")]]))  # the prompt's own S begins nothing
    shown = []
    for letter in "aSTaSTOP!":
        writer.put(torch.tensor([ord(letter)]))
        shown.append(capsys.readouterr().out)
    writer.end()
    assert shown == ["a", "", "", "STa", "", "", "", "", ""]
    assert capsys.readouterr().out == ""


def test_stop_strings_refused() -> None:
    assert "--stop: expected a string" in refusal(PROMPT, "--stop", "")
    assert "ends where it is whole" in refusal(PROMPT, "--stop", "a", "--regex", "a+")


# Batches --------------------------------------------------------------------------------------------------------------


def test_continuations_are_drawn_in_batches_and_are_those_of_one(
    shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = shipped
    batches: list[int] = []
    real = drop_in.fs_generate

    def spy(seed: list[int], **kwargs: Any) -> Any:
        batches.append(len(seed))
        return real(seed, **kwargs)

    monkeypatch.setattr(drop_in, "fs_generate", spy)
    monkeypatch.setattr(cli_session, "BATCH", 4)
    printed = text(PROMPT, "--num", "10")
    assert batches == [4, 4, 2]
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = []
    for number, seed in enumerate(row_seeds(1, 10).tolist(), 1):
        sample = real([seed], temperature=0.8, top_p=0.95, top_k=0, ties="first")
        tokens = model.generate(ids, do_sample=True, max_new_tokens=8, custom_generate=sample)
        expected.append(f"[{number}] {tokenizer.decode(tokens[0], skip_special_tokens=True)}\n")
    assert printed == "\n".join(expected)


def test_a_batch_is_not_padded_into_its_texts(folder: Path) -> None:
    """The padding is an ordinary token here, and sequences end at different steps."""
    config = folder / "generation_config.json"
    tokens = AutoTokenizer.from_pretrained(folder)
    (end,) = tokens(" e", add_special_tokens=False)["input_ids"][:1]
    fields = {"eos_token_id": [end, *range(300, 1500)], "pad_token_id": 50}
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    common = ("--model", str(folder), "--max-new-tokens", "8", "--seed")
    several = run("generate", PROMPT, "--num", "6", *common, "3").stdout
    pad = tokens.decode([50])
    parts = [part[part.index("] ") + 2 :] for part in several[:-1].split("\n\n")]
    assert len(parts) == 6
    assert len({len(tokens(part)["input_ids"]) for part in parts}) > 1
    assert not any(part.endswith(pad) for part in parts)


def test_an_empty_continuation_is_said() -> None:
    result = run("generate", PROMPT, "--stop", " ", "--stop", "\n", "--seed", "1", "--num", "3")
    assert result.exit_code == 0
    empty = [n for n, part in enumerate(result.stdout[:-1].split("\n\n"), 1) if part.endswith(PROMPT)]
    assert empty
    said = [f"fastsample: continuation {n} is empty: a stop string came first" for n in empty]
    assert result.stderr.splitlines() == said


# Models ---------------------------------------------------------------------------------------------------------------


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def no_tokenizer(folder: Path) -> str:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return "no tokenizer there"


def no_vocabulary(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "no tokenizer there"


def broken_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{")
    return "its tokenizer: "


def foreign_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "none"}}')
    return "its tokenizer: "


def nameless_config(folder: Path) -> str:
    (folder / "config.json").write_text("{}")
    return "Unrecognized model"


def broken_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return "not a valid JSON file"


def no_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "no file named model.safetensors"


def cut_weights(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    return "incomplete"


def missing_layer(folder: Path) -> str:
    edit_weights(folder, lambda weights: {name: w for name, w in weights.items() if ".h.2." not in name})
    return "the file of weights lacks 12 "


def other_shape(folder: Path) -> str:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"n_embd": 96}))
    return "weights of another shape"


def masked_model(folder: Path) -> str:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["BertForMaskedLM"]}))
    return "a masked language model"


def smaller_vocabulary(folder: Path) -> str:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 300}))
    edit_weights(folder, lambda w: {n: t[:300].clone() if ".wte." in n else t for n, t in w.items()})
    return "the tokenizer has 4096 tokens, the model 300"


SPOILT = [no_tokenizer, no_vocabulary, broken_tokenizer, foreign_tokenizer, nameless_config, broken_config, no_weights]
SPOILT += [cut_weights, missing_layer, other_shape, masked_model, smaller_vocabulary]


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__name__)
@pytest.mark.parametrize("prompt", [PROMPT, ""], ids=["prompt", "empty"])
def test_a_folder_that_is_no_whole_model_is_refused(spoil: Callable[[Path], str], prompt: str, folder: Path) -> None:
    message = spoil(folder)
    refused = refusal(prompt, "--model", str(folder))
    assert f"--model {folder}: " in refused
    assert message in refused


def test_a_token_that_the_model_lacks_is_refused(shipped: tuple[Any, Any]) -> None:
    model, _ = shipped
    more = AutoTokenizer.from_pretrained(cli_model.shipped_model())
    more.add_tokens(["<new>"])
    cli_model._check_tokenizer("", model, more)  # an added token that nobody uses does no harm
    with pytest.raises(cli_start.RefusedError, match=r"holds the token '<new>' \(4096\), and the model has 4096"):
        cli_start.encode("a<new>", model, more, 1)


def test_tokens_that_the_tokenizer_lacks_are_said(shipped: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = shipped
    session = cli_session.Session(PROMPT, False, model, tokenizer, torch.zeros(1, 1), 1, None, (), {}, 0, iter([0]))
    session._note_oddities(2, [300, 5000, 0], "x")
    assert "continuation 2: 1 of its tokens are not in the tokenizer, like 5000" in capsys.readouterr().err
    session._note_oddities(1, [0], "")
    assert "continuation 1 is empty: the model ended it at once" in capsys.readouterr().err


def test_the_shipped_model_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert text(PROMPT, "--model", "tiny-gpt2") == text(PROMPT)
    (tmp_path / "tiny-gpt2").mkdir()  # a folder of one's own comes first
    assert "--model tiny-gpt2: " in refusal(PROMPT, "--model", "tiny-gpt2")


def test_a_name_that_is_no_folder_fails_at_once_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(cli_start, "load", None)  # it would not even come to that
    start = time.monotonic()
    message = refusal(PROMPT, "--model", "gpt2")
    assert "no folder of that name here" in message
    assert "http://127.0.0.1:9 cannot be reached" in message
    assert time.monotonic() - start < 5
    assert "no name that a model on the hub could have" in refusal(PROMPT, "--model", "a b")
    assert "expected a folder" in refusal(PROMPT, "--model", __file__)
    assert "no such folder" in refusal(PROMPT, "--model", "")


def test_a_cached_model_of_the_hub_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "somewhere/config.json")
    monkeypatch.setattr(cli_model, "_why_no_hub", lambda _: "unreachable")
    assert cli_model.find_model("someone/something") == ("someone/something", True)
    monkeypatch.setattr(cli_model, "_why_no_hub", lambda _: None)
    assert cli_model.find_model("someone/something") == ("someone/something", False)


# Votes ----------------------------------------------------------------------------------------------------------------


def test_votes_that_nobody_casts_are_said() -> None:
    arguments = ("generate", PROMPT, "--best-of", "2", "--seed", "1", "--max-new-tokens", "4", "--vote", "zzzz[0-9]{9}")
    result = run(*arguments)
    assert result.exit_code == 0
    assert "fastsample: --vote zzzz[0-9]{9}: no candidate matches" in result.stderr
    plain = run(*arguments[:-2])
    assert result.stdout == plain.stdout


def test_a_vote_that_is_no_regex_is_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_start, "load", None)
    assert "--vote (: " in refusal(PROMPT, "--best-of", "2", "--vote", "(")


# Engines --------------------------------------------------------------------------------------------------------------


def test_info_shows_what_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def row() -> str:
        result = run("info")
        assert result.exit_code == 0
        return next(str(line) for line in result.stdout.splitlines() if line.startswith("backend auto "))

    monkeypatch.delenv("FASTSAMPLE_BACKEND", raising=False)
    assert "(FASTSAMPLE_BACKEND is not set)" in row()
    monkeypatch.setenv("FASTSAMPLE_BACKEND", "reference")
    assert row().endswith("reference (FASTSAMPLE_BACKEND = 'reference')")
    monkeypatch.setenv("FASTSAMPLE_BACKEND", "abacus")
    assert "refused: FASTSAMPLE_BACKEND: " in row()
    assert "'abacus'" in row()
    monkeypatch.setattr(cli_start, "find_model", None)
    assert "FASTSAMPLE_BACKEND: " in refusal(PROMPT)


def test_seeds_of_any_number_of_continuations_are_those_of_rows() -> None:
    for seed in (0, 7, -1, 2**64 - 1):
        seeds = cli_start.seeds_of(seed)
        assert [next(seeds) for _ in range(5)] == [s % 2**64 for s in row_seeds(seed % 2**64, 5).tolist()]
    with pytest.raises(ValueError, match="seed"):
        cli_start.seeds_of(2**64)
