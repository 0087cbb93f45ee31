"""The command line: `fastsample generate`, `fastsample explain` and `fastsample info`."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import Annotated, Any

import fastsample as fs
from _fastsample_cli import main
from fastsample.cli.generate import (
    breaker_texts,
    check_engine,
    dry_breakers,
    encode,
    grammar_texts,
    load_grammar,
    read_prompt,
    utf8,
)
from fastsample.cli.info import info
from fastsample.cli.model import find_model, load, quiet, shipped_model
from fastsample.cli.output import INSTALL, RefusedError, discard, note, take_any_text, told
from fastsample.cli.session import Session
from fastsample.cli.stats import print_stats
from fastsample.inputs import pack_seeds, splitmix64

__all__ = ["app", "main", "shipped_model"]

try:
    import typer
    from typer.core import TyperGroup
except ImportError:
    note(f"the command line needs typer: {INSTALL}")
    raise SystemExit(2) from None
else:
    from fastsample.cli.explain import explain
    from fastsample.cli.options import (
        Backend,
        Chat,
        Choice,
        Choices,
        DryBreaker,
        GrammarBackend,
        JsonSchema,
        Model,
        Preset,
        Prompt,
        PromptFile,
        Regex,
        with_sampling_options,
    )

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


@app.command()
@with_sampling_options
def generate(
    prompt: Prompt = None,
    *,
    prompt_file: PromptFile = None,
    model: Model = None,
    chat: Chat = False,
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
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choices: Choices = None,
    choice: Choice = None,
    grammar_backend: GrammarBackend = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Repeats a run; each continuation gets its own from it."),
    ] = None,
    backend: Backend = "auto",
    stats: Annotated[bool, typer.Option("--stats", help="Measure against transformers' own sampler (stderr).")] = False,
    dry_breaker: DryBreaker = None,
    preset: Preset = None,
    **fields: Any,
) -> int:
    """Continue a prompt with a causal language model, token by token.

    Exit status: 0, done; 1, --max-new-tokens ended a text before it matched --json-schema, --regex or --choices;
    2, refused, with the reason on stderr; 130, interrupted.
    """
    text = read_prompt(prompt, prompt_file)
    stops = [utf8("--stop", s) for s in stop or []]
    regex, picks = grammar_texts(json_schema, regex, choices, choice, grammar_backend)
    constrained = json_schema is not None or regex is not None or bool(picks)
    _check_together(num, best_of, vote, stats, stops, constrained)
    breakers = breaker_texts(dry_breaker, fields)
    with told((re.error, OverflowError), f"--vote {vote}: "):
        ballot = None if vote is None else re.compile(utf8("--vote", vote))
    with told((TypeError, ValueError, RuntimeError)):
        fs.SamplingParams(**fields)
        seeds = _seeds(secrets.randbits(64) if seed is None else seed)
    check_engine(backend)
    name, local = find_model(model)
    with quiet():
        lm, tokenizer = load(name, local)
        grammar = load_grammar(tokenizer, grammar_backend or "auto", json_schema, regex, picks)
        ids, steps = encode(text, lm, tokenizer, max_new_tokens, chat)
        sampling = {"backend": backend, **fields, **dry_breakers(tokenizer, breakers)}
        session = Session("" if chat else text, lm, tokenizer, ids, steps, grammar, stops, sampling)
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


def _check_together(
    num: int,
    best_of: int,
    vote: str | None,
    stats: bool,
    stops: Sequence[str],
    constrained: bool,
) -> None:
    if vote is not None and best_of == 1:
        raise RefusedError("--vote needs --best-of")
    if num > 1 and best_of > 1:
        raise RefusedError("--num and --best-of: expected one of them")
    if stats and (constrained or best_of > 1):
        raise RefusedError("--stats measures plain sampling, without --best-of, --json-schema, --regex and --choices")
    if stops and constrained:
        raise RefusedError("--stop: a text of --json-schema, --regex or --choices ends where it is whole")
    if not all(stops):
        raise RefusedError("--stop: expected a string that is not empty")


app.command()(with_sampling_options(explain))
app.command()(info)
