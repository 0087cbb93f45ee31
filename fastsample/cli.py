"""The command line: `fastsample generate` and `fastsample info`."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import platform
import secrets
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch

import fastsample as fs
from fastsample.engines import ORDER, select
from fastsample.engines.cpu import native
from fastsample.params import specs
from fastsample.rows import pack_seeds

INSTALL = "pip install 'fastsample[hf]'"
DEFAULTS = {"temperature": 0.8, "top_p": 0.95}  # for readable text; the table's own defaults filter nothing

try:
    import typer
    from typer.core import TyperGroup
except ImportError:
    print(f"fastsample: the command line needs typer: {INSTALL}", file=sys.stderr)
    raise SystemExit(2) from None

# typer's base of all usage errors, wherever this version of it keeps its copy of click.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


class _RefusedError(Exception):
    """What cannot be done, in one line."""


class _Group(TyperGroup):
    """Commands whose errors are one line on stderr and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except (_RefusedError, _ClickException) as error:
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            print("fastsample:", " ".join(message.split()), file=sys.stderr)
            code = 2
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        if code == 130:
            print(file=sys.stderr)  # the shell's prompt belongs on a line of its own
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            return 0


app = typer.Typer(cls=_Group, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


def main() -> None:
    """The console script."""
    app()


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """From logits to token: the same token, to the bit, on every engine."""
    if show_version:
        print(f"fastsample {fs.__version__}")
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())


# Errors --------------------------------------------------------------------------------------------------------------


@contextmanager
def _told(kinds: tuple[type[Exception], ...], what: str = "") -> Iterator[None]:
    """Turn expected exceptions into refusals: the first line of their message after `what`."""
    try:
        yield
    except kinds as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _RefusedError(what + lines[0]) from None


# fastsample generate -------------------------------------------------------------------------------------------------


def _with_sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes **fields one option for each sampling parameter of the table."""
    signature = inspect.signature(command, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    kinds: dict[str, Any] = {"float": float, "int": int, "choice": str}
    for name, spec in specs():
        option = typer.Option(help=f"{spec.meaning} ({spec.range})")
        default = DEFAULTS.get(name, getattr(fs.SamplingParams, name))
        annotation: Any = Annotated[kinds[spec.kind], option]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )

    @functools.wraps(command)
    def wrapped(**kwargs: Any) -> None:
        command(**kwargs)

    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    vars(wrapped)["__signature__"] = signature.replace(parameters=parameters)
    return wrapped


@app.command()
@_with_sampling_options
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; may be empty.")],
    *,
    model: Annotated[
        str, typer.Option(help="Folder or hub name of a causal LM [default: the tiny one that ships]")
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per continuation, at most.")] = 64,
    num: Annotated[int, typer.Option(min=1, help="Number of continuations.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Repeats a run; continuation i uses splitmix64(seed + i).")] = None,
    backend: Annotated[str, typer.Option(help="auto, " + ", ".join(ORDER))] = "auto",
    stats: Annotated[bool, typer.Option("--stats", help="Measure against transformers' own sampler (stderr).")] = False,
    **fields: Any,
) -> None:
    """Continue a prompt with a causal language model, token by token."""
    with _told((TypeError, ValueError, RuntimeError)):
        fs.SamplingParams(**fields)
        select(backend, torch.empty(1, 1))
        seeds = pack_seeds(secrets.randbits(64) if seed is None else seed, num).tolist()
    with _quiet():
        lm, tokenizer = _load(model)
        ids, steps = _encode(prompt, lm, tokenizer, max_new_tokens)
        for number, own_seed in enumerate(seeds, 1):
            if num > 1:
                typer.echo(f"[{number}] ", nl=False)
            _continue(prompt, lm, tokenizer, ids, steps, seed=[own_seed], backend=backend, **fields)
            typer.echo("\n" if number < num else "")
        if stats:
            _print_stats(lm, ids, steps, seeds[0], backend, fields)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' advice and progress bars off the terminal."""
    advice = _transformers().utils.logging
    advice.set_verbosity(logging.CRITICAL)
    advice.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it reports each retry
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError:
        raise _RefusedError(f"generate needs transformers: {INSTALL}") from None


def _load(model: str) -> tuple[Any, Any]:
    """The language model and its tokenizer. Only a hub's name may reach for the network."""
    transformers = _transformers()
    name = model or str(shipped_model())
    local = not model or Path(model).is_dir()
    if not local and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise _RefusedError(f"--model {model}: no such folder")
    # Nothing that comes with a model is executed: no code of its own (asked outright, transformers does not ask at the
    # terminal), no pickles.
    safe = {"local_files_only": local, "trust_remote_code": False}
    wrong = (OSError, ValueError, KeyError, ImportError, import_module("safetensors").SafetensorError)
    with _told(wrong, f"--model {name}: "):
        lm = transformers.AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **safe).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **safe)
    if lm.dtype == torch.float16:
        lm = lm.float()  # CPUs are slow at float16
    # The command's options alone say how to sample.
    own = lm.generation_config
    lm.generation_config = transformers.GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    return lm, tokenizer


def shipped_model() -> Path:
    """Folder of the model that comes with the package."""
    return Path(str(files("fastsample") / "models" / "tiny-gpt2"))


def _encode(prompt: str, lm: Any, tokenizer: Any, max_new_tokens: int) -> tuple[torch.Tensor, int]:
    """The prompt's ids [1, L] and the number of tokens there is room for after them."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    if not ids.shape[1]:
        start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
        if start is None:
            raise _RefusedError("the prompt is empty, and this model has no token to start from")
        ids = torch.tensor([[start]])
    context = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return ids, max_new_tokens
    room = context - ids.shape[1]
    if room < 1:
        raise _RefusedError(f"the prompt has {ids.shape[1]} tokens and leaves no room in a context of {context}")
    if room < max_new_tokens:
        print(f"fastsample: room for {room} of {max_new_tokens} tokens in a context of {context}", file=sys.stderr)
    return ids, min(room, max_new_tokens)


def _continue(prompt: str, lm: Any, tokenizer: Any, ids: torch.Tensor, steps: int, **sampling: Any) -> None:
    from fastsample.integrations.transformers import fs_generate

    typer.echo(prompt, nl=False)
    sample = fs_generate(streamer=_Writer(tokenizer), **sampling)
    with _told((ValueError,)):
        lm.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=steps, custom_generate=sample
        )


class _Writer:
    """A streamer for `generate` that prints each token's text as soon as it is whole."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.printed: int | None = None  # characters of the decoded ids that are on the screen

    def put(self, ids: torch.Tensor) -> None:
        """The prompt, which is on the screen already, then one token at a time."""
        self.ids += ids.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if self.printed is None:
            self.printed = len(text)
        elif not text.endswith("\ufffd"):  # the first bytes of a character
            typer.echo(text[self.printed :], nl=False)
            self.printed = len(text)

    def end(self) -> None:
        """Print what is left, whole or not."""
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        typer.echo(text[self.printed or 0 :], nl=False)


# --stats -------------------------------------------------------------------------------------------------------------


class _Clock:
    """A stopping criterion that never stops, but times each step.

    `generate` asks it as soon as a token is chosen. So from the end of the model's forward pass to the question is
    sampling (with the copy of the logits to float32), and from question to question is a step.
    """

    def __init__(self) -> None:
        self.forward_end = 0.0
        self.steps: list[float] = []
        self.sampling: list[float] = []
        self._last: float | None = None

    def after_forward(self, *_: Any) -> None:
        self.forward_end = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        now = time.perf_counter()
        if self._last is not None:  # the first step holds the prompt
            self.steps.append(now - self._last)
            self.sampling.append(now - self.forward_end)
        self._last = now
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _print_stats(lm: Any, ids: torch.Tensor, steps: int, seed: int, backend: str, fields: dict[str, Any]) -> None:
    """Time both samplers in turn on the same model and prompt: one warm-up and five rounds, medians over all steps."""
    from fastsample.integrations.transformers import fs_generate

    if steps < 3:
        raise _RefusedError("--stats needs at least 3 new tokens")
    steps = min(steps, 32)
    options, missing = _options_of_transformers(fields)
    lm.generation_config.eos_token_id = None  # every round is equally long
    sample = {"do_sample": True, "custom_generate": fs_generate(seed=[seed], backend=backend, **fields)}
    ways: dict[str, dict[str, Any]] = {"fastsample": sample, "transformers": options}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    for turn in range(6):
        for name, way in ways.items():
            clock = _time(lm, ids, steps, way)
            if turn:
                times[name][0].extend(clock.steps)
                times[name][1].extend(clock.sampling)
    rows = [("sampler", "tokens/s", "sampling, ms/token", "share of the step")]
    for name, (all_steps, sampling) in times.items():
        step, part = statistics.median(all_steps), statistics.median(sampling)
        rows.append((name, f"{1 / step:.0f}", f"{1e3 * part:.3f}", f"{part / step:.0%}"))
    print(file=sys.stderr)
    _print_table(rows, header=True, stream=sys.stderr)
    if missing:
        print(f"transformers has no {', '.join(missing)}: measured without", file=sys.stderr)


def _options_of_transformers(fields: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options of `generate` that ask its own sampler for the same, and the names it has no option for."""
    lacks = ("frequency_penalty", "presence_penalty", "ties", "order")
    missing = [name for name in lacks if fields[name] != getattr(fs.SamplingParams, name)]
    options = {name: value for name, value in fields.items() if name not in lacks}
    if not options["min_p"]:
        del options["min_p"]  # it would run for nothing
    greedy = options["temperature"] == 0
    if greedy:
        options = {"repetition_penalty": options["repetition_penalty"]}
    return {"do_sample": not greedy} | options, missing


def _time(lm: Any, ids: torch.Tensor, steps: int, options: dict[str, Any]) -> _Clock:
    clock = _Clock()
    hook = lm.register_forward_hook(clock.after_forward)
    mask = torch.ones_like(ids)
    with _told((ValueError,)):
        lm.generate(ids, attention_mask=mask, max_new_tokens=steps, stopping_criteria=[clock], **options)
    hook.remove()
    return clock


# fastsample info -----------------------------------------------------------------------------------------------------


@app.command()
def info() -> None:
    """Print what can run here: engines, instruction set, threads, versions and the model that ships."""
    rows = [("fastsample", fs.__version__)]
    rows += [(f"engine {name}", why_not or "ready") for name, why_not in fs.engines().items()]
    rows.append(("instruction set", _isa()))
    rows.append(("threads", str(fs.get_num_threads())))
    rows.append(("python", platform.python_version()))
    rows += [(name, _version(name)) for name in ("torch", "numpy", "transformers", "triton")]
    rows.append(("model", _describe(shipped_model())))
    _print_table(rows)


def _isa() -> str:
    """What the C++ engine runs, and what else this CPU could."""
    try:
        module = native()
    except RuntimeError as error:
        return str(error)
    others = [name for name in module.isas() if name != module.isa()]
    return f"{module.isa()} (also here: {', '.join(others)})" if others else str(module.isa())


def _version(package: str) -> str:
    """Installed version, read without importing the package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _describe(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = sum(file.stat().st_size for file in folder.iterdir())
    except OSError:
        return "not installed"
    shape = f"vocabulary {config['vocab_size']}, context {config['n_positions']}"
    return f"{folder.name}: {config['n_layer']} layers of {config['n_embd']}, {shape}, {size / 2**20:.1f} MiB"


def _print_table(rows: Sequence[tuple[str, ...]], *, header: bool = False, stream: Any = None) -> None:
    """Aligned columns; with colours and a frame where a person looks."""
    stream = stream or sys.stdout
    if stream.isatty():
        _print_rich(rows, header, stream)
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=stream)


def _print_rich(rows: Iterable[tuple[str, ...]], header: bool, stream: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=header)
    rows = iter(rows)
    first = next(rows) if header else None
    for column in first or ("", ""):
        table.add_column(column)
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: a reason may hold [brackets]
    Console(file=stream).print(table)
