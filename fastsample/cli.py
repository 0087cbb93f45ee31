"""The command line: `fastsample generate` and `fastsample info`."""

from __future__ import annotations

import functools
import inspect
import json
import os
import platform
import secrets
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch

import fastsample as fs
from fastsample.cli_generate import Session, encode, load, load_grammar, quiet, shipped_model
from fastsample.cli_output import INSTALL, RefusedError, print_table, told
from fastsample.cli_stats import print_stats
from fastsample.engines import ORDER, select
from fastsample.engines.cpu import native
from fastsample.params import specs
from fastsample.rows import pack_seeds

DEFAULTS = {"temperature": 0.8, "top_p": 0.95}  # for readable text; the table's own defaults filter nothing

try:
    import typer
    from typer.core import TyperGroup
except ImportError:
    print(f"fastsample: the command line needs typer: {INSTALL}", file=sys.stderr)
    raise SystemExit(2) from None

# typer's base of all usage errors, wherever this version of it keeps its copy of click.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


class _Group(TyperGroup):
    """Commands whose errors are one line on stderr and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except (RefusedError, _ClickException) as error:
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


# fastsample generate -------------------------------------------------------------------------------------------------


def _with_sampling_options(command: Callable[..., int]) -> Callable[..., int]:
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
    def wrapped(**kwargs: Any) -> int:
        return command(**kwargs)

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
    best_of: Annotated[int, typer.Option(min=1, help="Print the best of so many (all of them on stderr).")] = 1,
    vote: Annotated[
        str, typer.Option(help="With --best-of: majority vote; a text's answer is its last match of this regex.")
    ] = "",
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema; print JSON that validates, without the prompt.")
    ] = None,
    regex: Annotated[str, typer.Option(help="Print text that this regular expression matches, likewise.")] = "",
    choices: Annotated[str, typer.Option(help="Print one of these, separated by commas, likewise.")] = "",
    grammar_backend: Annotated[str, typer.Option(help="auto, llguidance, xgrammar, outlines-core")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Repeats a run; each continuation gets its own from it.")] = None,
    backend: Annotated[str, typer.Option(help="auto, " + ", ".join(ORDER))] = "auto",
    stats: Annotated[bool, typer.Option("--stats", help="Measure against transformers' own sampler (stderr).")] = False,
    **fields: Any,
) -> int:
    """Continue a prompt with a causal language model, token by token.

    Exit status 1: --max-new-tokens cut a text off before it was what --json-schema, --regex or --choices ask for.
    """
    with told((TypeError, ValueError, RuntimeError)):
        fs.SamplingParams(**fields)
        select(backend, torch.empty(1, 1))
        seeds = pack_seeds(secrets.randbits(64) if seed is None else seed, num).tolist()
    _check_together(num, best_of, vote, stats, bool(json_schema or regex or choices))
    with quiet():
        lm, tokenizer = load(model)
        grammar = load_grammar(tokenizer, grammar_backend, json_schema, regex, choices)
        ids, steps = encode(prompt, lm, tokenizer, max_new_tokens)
        session = Session(prompt, lm, tokenizer, ids, steps, grammar, {"backend": backend, **fields})
        cut = []
        if best_of > 1:
            cut = [session.best_of(best_of, seeds[0], vote)]
        else:
            for number, own_seed in enumerate(seeds, 1):
                typer.echo(f"[{number}] " if num > 1 and grammar is None else "", nl=False)
                cut.append(session.continue_(own_seed))
                typer.echo("\n" if number < num and grammar is None else "")
        if stats:
            print_stats(lm, ids, steps, seeds[0], backend, fields)
    if any(cut):
        which = ", ".join(str(number) for number, flag in enumerate(cut, 1) if flag)
        print(f"fastsample: truncated at {steps} tokens: continuation {which}; try --max-new-tokens", file=sys.stderr)
    return int(any(cut))


def _check_together(num: int, best_of: int, vote: str, stats: bool, grammar: bool) -> None:
    if vote and best_of == 1:
        raise RefusedError("--vote needs --best-of")
    if num > 1 and best_of > 1:
        raise RefusedError("--num and --best-of: expected one of them")
    if stats and (grammar or best_of > 1):
        raise RefusedError("--stats measures plain sampling, without --best-of, --json-schema, --regex and --choices")


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
    print_table(rows)


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
