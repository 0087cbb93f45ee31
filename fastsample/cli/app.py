"""The command line: `fastsample generate` and `fastsample info`."""

from __future__ import annotations

import functools
import inspect
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Annotated, Any

import torch

import fastsample as fs
from _fastsample_cli import main
from fastsample.backends import ORDER, select
from fastsample.cli.generate import (
    dry_breakers,
    encode,
    find_model,
    load,
    load_grammar,
    quiet,
    read_prompt,
    shipped_model,
    utf8,
)
from fastsample.cli.info import info
from fastsample.cli.output import INSTALL, RefusedError, discard, note, take_any_text, told
from fastsample.cli.session import Session
from fastsample.cli.stats import print_stats
from fastsample.inputs import pack_seeds, splitmix64
from fastsample.params import specs

__all__ = ["app", "main", "shipped_model"]

DEFAULTS = {"temperature": 0.8, "top_p": 0.95}  # for readable text; the table's own defaults filter nothing

try:
    import typer
    from typer.core import TyperGroup
except ImportError:
    note(f"the command line needs typer: {INSTALL}")
    raise SystemExit(2) from None

# The base class of all usage errors, wherever this version of typer keeps its copy of click.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


class _Group(TyperGroup):
    """Commands whose errors are one line on stderr and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        take_any_text(sys.stdout)
        code = 2
        try:
            status = super().main(*args, **kwargs)
            sys.stdout.flush()
            code = status if isinstance(status, int) else 0
        except BrokenPipeError:  # `| head` has read enough
            discard(sys.stdout)
            code = 0
        except OSError as error:
            discard(sys.stdout)
            note(f"cannot write: {error.strerror or error}" if error.filename is None else str(error))
        except (RefusedError, _ClickException) as error:
            note(error.format_message() if hasattr(error, "format_message") else str(error))
        except typer.Abort:
            code = 130
        except Exception as error:
            if os.environ.get("FASTSAMPLE_TRACEBACK"):
                raise
            note(f"{type(error).__name__}: {error} (a bug; with FASTSAMPLE_TRACEBACK=1 it shows where)")
        sys.exit(code)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # typer would turn it into exit status 1
            discard(sys.stdout)
            return 0


app = typer.Typer(cls=_Group, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


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
    """Give a command with **fields one option per sampling parameter of the table.

    The fields that it gets are those of --preset, or else the defaults, replaced by the options that were given.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, spec in specs():
        default = DEFAULTS.get(name, getattr(fs.SamplingParams, name))
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_option(name, spec))
        )

    @functools.wraps(command)
    def wrapped(ctx: typer.Context, **kwargs: Any) -> int:
        if (preset := kwargs["preset"]) is not None:
            with told((TypeError, ValueError)):
                params = fs.SamplingParams.preset(utf8("--preset", preset))
            kwargs |= {name: getattr(params, name) for name, _ in specs() if not _is_given(ctx, name)}
        return command(**kwargs)

    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters.insert(0, context)
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    vars(wrapped)["__signature__"] = signature.replace(parameters=parameters)
    return wrapped


def _option(name: str, spec: Any) -> Any:
    """The annotation of a sampling parameter's option."""
    if spec.kind == "bool":
        flag = name.replace("_", "-")
        return Annotated[bool, typer.Option(f"--{flag}/--no-{flag}", help=spec.meaning)]
    kind, metavar = {"float": (float, "X"), "int": (int, "N"), "choice": (str, "NAME")}[spec.kind]
    return Annotated[kind, typer.Option(metavar=metavar, help=f"{spec.meaning} ({spec.range})")]


def _is_given(ctx: typer.Context, name: str) -> bool:
    """Whether the command line has this option."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


@app.command()
@_with_sampling_options
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The text to continue; may be empty. A - reads standard input."),
    ] = None,
    *,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Read the prompt from a file, without its last line break.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Folder or hub name of a causal LM [default: tiny-gpt2, which ships]"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens per continuation, at most.")] = 64,
    num: Annotated[int, typer.Option(metavar="N", min=1, help="Number of continuations.")] = 1,
    best_of: Annotated[
        int, typer.Option(metavar="N", min=1, max=4096, help="Print the best of so many (all of them on stderr).")
    ] = 1,
    vote: Annotated[
        str | None,
        typer.Option(
            metavar="RE", help="With --best-of: majority vote; a text's answer is its last match of this regex."
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End a text before this string; may be given several times."),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with a JSON schema; print JSON that validates, without the prompt."),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(metavar="RE", help="Print text that this regular expression matches, likewise.")
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Print one of these, likewise; spaces around the commas are left out."),
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="One of the choices, exactly as it stands; may be given several times."),
    ] = None,
    grammar_backend: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="auto, llguidance, xgrammar, outlines-core [default: auto]"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Repeats a run; each continuation gets its own from it."),
    ] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="auto, " + ", ".join(ORDER))] = "auto",
    stats: Annotated[bool, typer.Option("--stats", help="Measure against transformers' own sampler (stderr).")] = False,
    dry_breaker: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="With --dry-multiplier: a token that contains this ends a repetition; may be given several times.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Parameters known by a name, such as neutral or llama.cpp; the options below override them.",
        ),
    ] = None,
    **fields: Any,
) -> int:
    """Continue a prompt with a causal language model, token by token.

    Exit status: 0, done; 1, --max-new-tokens ended a text before it matched --json-schema, --regex or --choices;
    2, refused, with the reason on stderr; 130, interrupted.
    """
    text = read_prompt(prompt, prompt_file)
    stops = [utf8("--stop", s) for s in stop or []]
    picks = [utf8("--choice", c) for c in choice or []]
    picks += [] if choices is None else [c.strip() for c in utf8("--choices", choices).split(",")]
    regex = None if regex is None else utf8("--regex", regex)
    asked = [json_schema is not None, regex is not None, bool(picks)]
    _check_together(num, best_of, vote, stats, stops, grammar_backend, sum(asked))
    breakers = [utf8("--dry-breaker", b) for b in dry_breaker or []]
    if breakers and not fields["dry_multiplier"]:
        raise RefusedError("--dry-breaker: expected --dry-multiplier with it")
    with told((re.error, OverflowError), f"--vote {vote}: "):
        ballot = None if vote is None else re.compile(utf8("--vote", vote))
    with told((TypeError, ValueError, RuntimeError)):
        fs.SamplingParams(**fields)
        seeds = _seeds(secrets.randbits(64) if seed is None else seed)
    _check_engine(backend)
    name, local = find_model(model)
    with quiet():
        lm, tokenizer = load(name, local)
        grammar = load_grammar(tokenizer, grammar_backend or "auto", json_schema, regex, picks)
        ids, steps = encode(text, lm, tokenizer, max_new_tokens)
        sampling = {"backend": backend, **fields, **dry_breakers(tokenizer, breakers)}
        session = Session(text, lm, tokenizer, ids, steps, grammar, stops, sampling)
        first = next(seeds)
        if best_of > 1:
            cut = session.best_of(best_of, first, ballot)
        elif num == 1:
            cut = session.one(first)
        else:
            cut = session.several(islice(chain([first], seeds), num), labels=grammar is None)
        if stats:
            print_stats(lm, ids, steps, first, sampling)
    if cut:
        note(f"truncated at {steps} tokens: continuation {', '.join(map(str, cut))}; try --max-new-tokens")
    return int(bool(cut))


def _seeds(seed: int) -> Iterator[int]:
    """`row_seeds` of any number of continuations, one at a time."""
    pack_seeds(seed, 1)  # refuses what is no seed
    return (splitmix64(splitmix64(seed % 2**64) + number) for number in count())


def _check_engine(backend: str) -> None:
    """Refuse, before a model is loaded, an engine that cannot serve."""
    variable = "FASTSAMPLE_BACKEND: " if backend == "auto" and os.environ.get("FASTSAMPLE_BACKEND") else ""
    with told((TypeError, ValueError, RuntimeError), variable):
        logits = torch.zeros(1, 2)
        select(backend, logits)
        fs.sample(logits, seed=0, backend=backend)  # finds what an environment variable asks of the engine


def _check_together(
    num: int,
    best_of: int,
    vote: str | None,
    stats: bool,
    stops: Sequence[str],
    grammar_backend: str | None,
    grammars: int,
) -> None:
    if grammars > 1:
        raise RefusedError("--json-schema, --regex and --choices (or --choice): expected one of them")
    if vote is not None and best_of == 1:
        raise RefusedError("--vote needs --best-of")
    if num > 1 and best_of > 1:
        raise RefusedError("--num and --best-of: expected one of them")
    if stats and (grammars or best_of > 1):
        raise RefusedError("--stats measures plain sampling, without --best-of, --json-schema, --regex and --choices")
    if grammar_backend is not None and not grammars:
        raise RefusedError("--grammar-backend: expected --json-schema, --regex, --choices or --choice with it")
    if stops and grammars:
        raise RefusedError("--stop: a text of --json-schema, --regex or --choices ends where it is whole")
    if not all(stops):
        raise RefusedError("--stop: expected a string that is not empty")


app.command()(info)
