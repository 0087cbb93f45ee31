"""The command line: what it prints, in which order, and how it refuses."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import fastsample as fs
import fastsample.integrations.transformers as drop_in
from fastsample.backends import ORDER
from fastsample.cli import app as cli
from fastsample.cli import info as cli_info
from fastsample.cli import model as cli_model
from fastsample.cli import output as cli_output
from fastsample.cli import session as cli_session
from fastsample.cli import start as cli_start
from fastsample.cli import stats as cli_stats
from fastsample.inputs import row_seeds
from fastsample.params import specs
from fastsample.presets import PRESETS

PROMPT = "The future of AI is"


def run(*args: str) -> Any:
    return CliRunner().invoke(cli.app, args)


def text(*args: str, prompt: str = PROMPT) -> str:
    """What `generate` prints, after making sure that it prints nothing else."""
    result = run("generate", prompt, "--max-new-tokens", "8", *args)
    assert (result.exit_code, result.stderr) == (0, "")
    return str(result.stdout)


def refusal(*args: str) -> str:
    """The one line on stderr of a command that fails."""
    result = run(*args)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("fastsample: ")
    return str(lines[0])


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    folder = str(cli_model.shipped_model())
    return AutoModelForCausalLM.from_pretrained(folder).float(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def sampled_with(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each fs_generate call."""
    calls: list[dict[str, Any]] = []
    real = drop_in.fs_generate

    def spy(seed: Any, **kwargs: Any) -> Callable[..., Any]:
        calls.append(kwargs)
        return real(seed, **kwargs)

    monkeypatch.setattr(drop_in, "fs_generate", spy)
    return calls


# generate -------------------------------------------------------------------------------------------------------------


def test_prints_the_prompt_and_what_the_drop_in_generates(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    seed = int(row_seeds(7, 1))
    sample = drop_in.fs_generate(seed=[seed], temperature=0.7, top_k=50, top_p=1.0, ties="first")
    tokens = model.generate(ids, do_sample=True, max_new_tokens=8, custom_generate=sample)
    expected = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert text("--seed", "7", "--temperature", "0.7", "--top-k", "50", "--top-p", "1") == expected + "\n"


def test_continuations_are_labelled_and_the_first_is_that_of_one(shipped: tuple[Any, Any]) -> None:
    one = text("--seed", "3")
    three = text("--seed", "3", "--num", "3")
    first, second, third = re.fullmatch(r"\[1\] (.*)\n\n\[2\] (.*)\n\n\[3\] (.*)\n", three, re.DOTALL).groups()
    assert first + "\n" == one
    assert len({first, second, third}) == 3
    assert all(t.startswith(PROMPT) for t in (second, third))
    assert text("--seed", "3", "--num", "3") == three


def test_without_a_seed_each_run_differs() -> None:
    assert len({text() for _ in range(3)}) > 1


def test_every_sampling_parameter_reaches_the_drop_in(sampled_with: list[dict[str, Any]]) -> None:
    values: dict[str, Any] = {"ties": "all", "order": "joint"}
    values |= {name: 3 if spec.kind == "int" else 0.5 for name, spec in specs() if spec.kind in ("int", "float")}
    values |= {"dry_base": 2.0}
    arguments = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    flags = {name: True for name, spec in specs() if spec.kind == "bool"}
    arguments += [f"--{name.replace('_', '-')}" for name in flags]
    values |= flags
    text("--seed", "1", "--backend", "reference", *arguments)
    (call,) = sampled_with
    assert {name: call[name] for name, _ in specs()} == values
    assert call["backend"] == "reference"


def test_defaults_and_help_are_the_tables_but_for_readable_text(sampled_with: list[dict[str, Any]]) -> None:
    shown = " ".join(run("generate", "--help").stdout.split())
    text("--seed", "1")
    for name, spec in specs():
        default = {"temperature": 0.8, "top_p": 0.95}.get(name, getattr(fs.SamplingParams, name))
        assert sampled_with[0][name] == default
        told = (
            f"({spec.range}) [default: {default}]" if spec.kind != "bool" else f"[default: no-{name.replace('_', '-')}]"
        )
        assert f"{spec.meaning} {told}" in shown


def test_breakers_reach_the_drop_in_as_the_ids_of_tokens_that_contain_them(
    shipped: tuple[Any, Any], sampled_with: list[dict[str, Any]]
) -> None:
    _, tokenizer = shipped
    text("--seed", "1", "--dry-multiplier", "0.8", "--dry-breaker", "\n", "--dry-breaker", ",")
    (call,) = sampled_with
    want = [i for i in range(len(tokenizer)) if {"\n", ","} & set(tokenizer.decode([i]))]
    assert call["dry_breakers"].tolist() == want
    assert len(want) > 2


def test_a_seed_repeats_a_text_with_xtc_and_dry_on() -> None:
    options = ("--seed", "5", "--xtc-probability", "0.5", "--dry-multiplier", "0.8", "--backend", "reference")
    texts = [text(*options, "--num", "3"), text(*options, "--num", "3")]
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"[1] {text(*options)}")
    assert texts[0] != text("--seed", "5", "--num", "3")
    best = [run("generate", PROMPT, "--best-of", "2", "--dry-breaker", "e", *options) for _ in range(2)]
    assert best[0].exit_code == 0
    assert best[0].output == best[1].output


def test_a_preset_fills_what_no_option_gives(
    sampled_with: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def preset(name: str) -> fs.SamplingParams:
        if name != "house style":
            raise ValueError(f"preset = {name!r}: expected 'house style'")
        return fs.SamplingParams(temperature=0.6, top_k=40, min_p=0.1, order="temperature_last")

    monkeypatch.setattr(fs.SamplingParams, "preset", preset)
    text("--seed", "1", "--preset", "house style", "--min-p", "0.0", "--top-p", "0.95")
    params = fs.SamplingParams(temperature=0.6, top_k=40, order="temperature_last")
    fields = {name: getattr(params, name) for name, _ in specs()}
    assert {name: sampled_with[0][name] for name in fields} == fields | {"top_p": 0.95}
    text("--seed", "1", "--preset", "house style")
    assert sampled_with[1]["top_p"] == 1.0
    assert sampled_with[1]["min_p"] == fs.SamplingParams(min_p=0.1).min_p
    assert refusal("generate", "x", "--preset", "y").endswith("preset = 'y': expected 'house style'")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_the_table(name: str, sampled_with: list[dict[str, Any]]) -> None:
    text("--seed", "1", "--preset", name)
    params = fs.SamplingParams.preset(name)
    assert {field: sampled_with[0][field] for field, _ in specs()} == {f: getattr(params, f) for f, _ in specs()}


def test_greedy(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    tokens = model.generate(ids, do_sample=False, max_new_tokens=8)
    assert text("--temperature", "0") == tokenizer.decode(tokens[0], skip_special_tokens=True) + "\n"


def test_the_model_is_loaded_at_a_dtype_that_cpus_are_quick_at() -> None:
    with cli_model.quiet():
        model, _ = cli_model.load(*cli_model.find_model(None))
    assert model.dtype == torch.float32
    assert not model.training


def test_a_model_of_ones_own_is_sampled_as_the_options_say(tmp_path: Path) -> None:
    folder = shutil.copytree(cli_model.shipped_model(), tmp_path / "own")
    config = folder / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"do_sample": True, "top_k": 1, "typical_p": 0.1}))
    assert text("--seed", "3", "--model", str(folder)) == text("--seed", "3")


def test_only_a_hub_name_may_reach_for_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def from_pretrained(name: str, *, local_files_only: bool, trust_remote_code: bool, **options: bool) -> None:
        asked.append(local_files_only)
        assert not trust_remote_code
        assert options["use_safetensors"]
        raise OSError("enough\nmore")

    monkeypatch.setattr(cli_model, "_why_no_hub", lambda hub: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert "enough" in refusal("generate", "x")
    assert "enough" in refusal("generate", "x", "--model", str(tmp_path))
    assert refusal("generate", "x", "--model", "gpt2") == "fastsample: --model gpt2: enough"
    assert asked == [True, True, False]
    assert "no such folder" in refusal("generate", "x", "--model", "./missing")
    assert len(asked) == 3


def test_an_empty_prompt_starts_from_nothing() -> None:
    assert text("--seed", "1", prompt="").strip()


def test_a_prompt_that_fills_the_context() -> None:
    assert "leaves no room in a context of 256" in refusal("generate", "word " * 300)


def test_a_prompt_that_leaves_little_room(shipped: tuple[Any, Any]) -> None:
    _, tokenizer = shipped
    prompt = tokenizer.decode([300] * 250)
    length = len(tokenizer(prompt)["input_ids"])
    assert 200 < length < 256
    result = run("generate", prompt, "--seed", "1")
    assert result.exit_code == 0
    assert result.stderr == f"fastsample: room for {256 - length} of 64 tokens in a context of 256\n"


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], **_: bool) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_the_writer_waits_for_whole_characters(capsys: pytest.CaptureFixture[str]) -> None:
    writer = cli_session.Writer(Bytes())
    writer.put(torch.tensor([[*b"on screen already"]]))
    shown = []
    for byte in "aé€".encode() + b"\xe2":
        writer.put(torch.tensor([byte]))
        shown.append(capsys.readouterr().out)
    writer.end()
    assert shown == ["a", "", "é", "", "", "€", ""]
    assert capsys.readouterr().out == "\ufffd"


def test_output_is_flushed_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []

    class Stream(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Stream())
    writer = cli_session.Writer(Bytes())
    writer.put(torch.tensor([[]], dtype=torch.int64))
    for byte in b"ab":
        writer.put(torch.tensor([byte]))
        assert flushed[-1][-1] == chr(byte)


def test_stats_compare_with_the_sampler_of_transformers() -> None:
    result = run("generate", PROMPT, "--seed", "1", "--max-new-tokens", "4", "--top-k", "20", "--stats")
    assert result.exit_code == 0
    assert "sampler" not in result.stdout
    header, ours, theirs = (line.split() for line in result.stderr.strip().splitlines())
    assert header[:2] == ["sampler", "tokens/s"]
    for line, name in ((ours, "fastsample"), (theirs, "transformers")):
        assert line[0] == name
        assert all(float(number.rstrip("%")) > 0 for number in line[1:])


def test_stats_ask_transformers_for_the_same() -> None:
    fields = {name: getattr(fs.SamplingParams, name) for name, _ in specs()}
    same = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
    options, missing = cli_stats.options_of_transformers(fields | same)
    assert (options, missing) == ({"do_sample": True} | same, [])
    options, missing = cli_stats.options_of_transformers(fields | {"temperature": 0.0, "frequency_penalty": 0.1})
    assert (options["do_sample"], missing) == (False, ["frequency_penalty"])
    more = {"typical_p": 0.9, "epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "no_repeat_ngram_size": 3}
    options, missing = cli_stats.options_of_transformers(fields | same | more | {"p_less": True, "top_a": 0.1})
    assert (options, missing) == ({"do_sample": True} | same | more, ["top_a", "p_less"])
    options, missing = cli_stats.options_of_transformers(fields | {"temperature": 0.0, "no_repeat_ngram_size": 3})
    assert options == {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 3}


# Grammars and Best-of-N -----------------------------------------------------------------------------------------------


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"enum": [True, None, "é"]}},
    "required": ["age", "ok"],
    "additionalProperties": False,
}


@pytest.fixture
def schema(tmp_path: Path) -> str:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    return str(file)


@pytest.mark.parametrize("backend", ["auto", "llguidance"])
def test_json_of_a_schema_is_printed_alone(schema: str, backend: str) -> None:
    arguments = ("--json-schema", schema, "--num", "4", "--seed", "5", "--max-new-tokens", "60")
    lines = text(*arguments, "--grammar-backend", backend).splitlines()
    assert len(lines) == 4
    for line in lines:
        jsonschema.validate(json.loads(line), SCHEMA)
    assert text(*arguments).splitlines() == lines
    assert text("--json-schema", schema, "--seed", "5", "--max-new-tokens", "60").splitlines() == lines[:1]


def test_regex_and_choices() -> None:
    for line in text("--regex", "[0-9]{2}-[a-c]{1,4}x", "--num", "3", "--max-new-tokens", "60").splitlines():
        assert re.fullmatch("[0-9]{2}-[a-c]{1,4}x", line)
    assert set(text("--choices", "yes,no,may be", "--num", "3").splitlines()) <= {"yes", "no", "may be"}


def test_truncation_is_an_exit_status_and_a_line(schema: str) -> None:
    result = run("generate", PROMPT, "--json-schema", schema, "--max-new-tokens", "3", "--num", "2", "--seed", "1")
    assert result.exit_code == 1
    assert result.stderr == ("fastsample: truncated at 3 tokens: continuation 1, 2; try --max-new-tokens\n")
    assert len(result.stdout.splitlines()) == 2
    best = run("generate", PROMPT, "--json-schema", schema, "--max-new-tokens", "3", "--best-of", "2", "--seed", "1")
    assert best.exit_code == 1
    assert "truncated at 3 tokens" in best.stderr


def test_best_of_prints_the_best_and_shows_all() -> None:
    result = run("generate", PROMPT, "--best-of", "3", "--seed", "4", "--max-new-tokens", "6")
    assert result.exit_code == 0
    header, *rows = result.stderr.splitlines()
    assert header.split()[:2] == ["draw", "mean"]
    scores = [float(row.split()[1]) for row in rows]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert result.stdout.startswith(PROMPT)
    seed = [int(row_seeds(4, 1))]
    folder = str(cli_model.shipped_model())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).float(), AutoTokenizer.from_pretrained(folder)
    options = {"tokenizer": tokenizer, "seed": seed, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 6}
    best = fs.best_of_n(model, PROMPT, 3, top_k=0, ties="first", **options).best
    assert result.stdout == PROMPT + best.text + "\n"


def test_vote() -> None:
    arguments = ("--best-of", "6", "--seed", "2", "--regex", "[01]{2}", "--vote", "[01]$", "--max-new-tokens", "6")
    result = run("generate", PROMPT, *arguments)
    answer, votes = re.search(r"fastsample: '([01])' has (\d) of 6 votes\n", result.stderr).groups()
    assert result.stdout[-2] == answer
    assert int(votes) >= 3


# info and the rest ----------------------------------------------------------------------------------------------------


def test_info_lists_engines_and_versions() -> None:
    result = run("info")
    assert result.exit_code == 0
    table = dict(re.split(r"  +", line, maxsplit=1) for line in result.stdout.splitlines())
    for name, why_not in fs.engines().items():
        assert table[f"engine {name}"] == (why_not or "ready")
    for name in ("torch", "numpy", "transformers"):
        assert table[name] == importlib.metadata.version(name)
    assert table["threads"] == str(fs.get_num_threads())
    assert table["model"].startswith("tiny-gpt2")
    assert "context 256" in table["model"]
    columns = {re.match(r".*?  +", line).end() for line in result.stdout.splitlines()}
    assert len(columns) == 1  # aligned


def test_info_names_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    class Native:
        isa = staticmethod(lambda: "avx2")
        isas = staticmethod(lambda: ["avx512", "avx2"])

    def missing() -> None:
        raise RuntimeError("not built")

    monkeypatch.setattr(cli_info, "native", Native)
    assert re.search(r"instruction set +avx2 \(also here: avx512\)\n", run("info").stdout)
    monkeypatch.setattr(cli_info, "native", missing)
    assert re.search(r"instruction set +not built\n", run("info").stdout)
    monkeypatch.setattr(Native, "isa", staticmethod(missing))
    monkeypatch.setattr(cli_info, "native", Native)
    assert re.search(r"instruction set +not built\n", run("info").stdout)


def test_a_terminal_gets_a_frame() -> None:
    stream = Terminal()
    cli_output.print_table([("name", "value"), ("a", "[b]")], header=True, stream=stream)
    assert "name" in stream.getvalue()
    assert "[b]" in stream.getvalue()
    assert "─" in stream.getvalue()


def test_version_and_help() -> None:
    assert run("--version").stdout == f"fastsample {fs.__version__}\n"
    for shown in (run().stdout, run("--help").stdout):
        commands = shown.partition("Commands:\n")[2]
        assert [line.split()[0] for line in commands.splitlines()] == ["generate", "explain", "info"]
        assert "..." not in commands
    assert ", ".join(("auto", *ORDER)) in run("generate", "--help").stdout


def test_json_of_continuations() -> None:
    asked = ("--num", "3", "--seed", "7", "--max-new-tokens", "5", "--top-k", "9")
    plain = run("generate", PROMPT, *asked).stdout
    found = json.loads(run("generate", PROMPT, *asked, "--json").stdout)
    assert (found["prompt"], found["seed"]) == (PROMPT, 7)
    texts = [f"[{number}] {PROMPT}{each['text']}\n" for number, each in enumerate(found["continuations"], 1)]
    assert "\n".join(texts) == plain
    assert [each["seed"] for each in found["continuations"]] == [s % 2**64 for s in row_seeds(7, 3).tolist()]
    assert all(len(each["tokens"]) == 5 and not each["truncated"] for each in found["continuations"])


def test_json_tells_the_seed_that_was_taken() -> None:
    first = run("generate", PROMPT, "--max-new-tokens", "6", "--json").stdout
    again = run("generate", PROMPT, "--max-new-tokens", "6", "--json", "--seed", str(json.loads(first)["seed"])).stdout
    assert again == first


def test_json_of_truncated_texts() -> None:
    result = run("generate", PROMPT, "--regex", "[a-z]{40}", "--max-new-tokens", "3", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["continuations"][0]["truncated"]


def test_json_of_info() -> None:
    found = json.loads(run("info", "--json").stdout)
    assert found["engines"] == {name: why_not or "ready" for name, why_not in fs.engines().items()}
    assert found["threads"] == fs.get_num_threads()
    assert found["torch"] == torch.__version__


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    times = iter(range(1000))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(times)))  # tqdm shows nothing in the first second
    with cli_output.working("loading"):
        pass
    with cli_output.progress(10, "token") as bar:
        for _ in range(9):
            bar.update(1)
        shown = stream.getvalue()
    assert ("loading" in shown and "9/10" in shown) if terminal else shown == ""


def test_a_session_counts_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    def spy(total: int, unit: str) -> Any:
        bars.append(tqdm(total=total, unit=unit, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr(cli_session, "progress", spy)
    assert run("generate", PROMPT, "--num", "3", "--max-new-tokens", "4", "--seed", "1").exit_code == 0
    assert [(bar.n, bar.total) for bar in bars] == [(12, 12)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "x", "--top-p", "1.5"], "top_p = 1.5"),
        (["generate", "x", "--ties", "some"], "ties = 'some'"),
        (["generate", "x", "--top-k", "many"], "'--top-k'"),
        (["generate", "x", "--typical-p", "0"], "typical_p = 0.0"),
        (["generate", "x", "--order", "cold"], "'temperature_last'"),
        (["generate", "x", "--dry-breaker", "a"], "--dry-breaker: expected --dry-multiplier with it"),
        (
            ["generate", "x", "--dry-multiplier", "1", "--dry-breaker", "§§§"],
            "--dry-breaker: no token contains '§§§'; ",
        ),
        (["generate", "x", "--dry-multiplier", "1", "--dry-breaker", ""], "--dry-breaker: '' is in every token"),
        (["generate", "x", "--num", "0"], "'--num'"),
        (["generate", "x", "--seed", str(2**64)], "seed = 18446744073709551616"),
        (["generate", "x", "--backend", "abacus"], "backend = 'abacus'"),
        (["generate", "x", "--colour"], "--colour"),
        (["generate", "x", "--stats", "--max-new-tokens", "2"], "--stats needs"),
        (["generate", "x", "--regex", "(a"], "regex (a: not a pattern: "),
        (["generate", "x", "--choices", "a,,b"], "choices: "),
        (["generate", "x", "--json-schema", "missing.json"], "--json-schema: [Errno 2]"),
        (["generate", "x", "--regex", "a", "--choices", "a"], "expected one of them"),
        (["generate", "x", "--regex", "a", "--grammar-backend", "none"], "backend = 'none'"),
        (["generate", "x", "--vote", "a"], "--vote needs --best-of"),
        (["generate", "x", "--vote", "(", "--best-of", "2"], "--vote (: "),
        (["generate", "x", "--best-of", "2", "--num", "2"], "--num and --best-of"),
        (["generate", "x", "--best-of", "2", "--stats"], "--stats measures plain sampling"),
        (["generate"], "prompt"),
        (["divine"], "'divine'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_are_one_line(args: list[str], message: str) -> None:
    assert (
        message.lower() in refusal(*args).lower()
    )  # whether typer puts an argument in capitals changes with its versions


def test_an_engine_that_cannot_serve_is_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_start, "load", None)
    absent = [name for name, why_not in fs.engines().items() if why_not]
    for name in absent:
        assert f"backend '{name}' cannot serve" in refusal("generate", "x", "--backend", name)


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hint = "pip install '.[hf]' in a clone of fastsample"
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert hint in refusal("generate", "x")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(cli.__file__)
    assert stopped.value.code == 2
    assert hint in capsys.readouterr().err
