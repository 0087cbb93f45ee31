"""The command line: `fastsample generate`, `fastsample explain` and `fastsample info`.

What they do is imported when they run: `--version` and `--help` wait for neither torch nor transformers.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from _fastsample_cli import main
from fastsample.cli.output import INSTALL, RefusedError, discard, note, take_any_text, told, utf8

__all__ = ["app", "main"]

try:
    import typer
    from typer.core import TyperGroup
except ImportError:
    note(f"the command line needs typer: {INSTALL}")
    raise SystemExit(2) from None
else:
    from fastsample.cli.options import AsJson, Asked, with_shared_options

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
        print(f"fastsample {version('fastsample')}")
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())


@app.command()
@with_shared_options
def generate(
    asked: Asked,
    *,
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
    reward_model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="With --best-of: rank by the score of this sequence-classification model."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End a text before this string; may be given several times."),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Measure against transformers' own sampler (stderr).")] = False,
) -> int:
    """Continue a prompt with a causal language model.

    Exit status: 0, done; 1, --max-new-tokens ended a text before it matched --json-schema, --regex or --choices;
    2, refused, with the reason on stderr; 130, interrupted.
    """
    stops = [utf8("--stop", s) for s in stop or []]
    _check_together(asked.constrained, num, best_of, vote, reward_model, stats, stops)
    with told((re.error, OverflowError), f"--vote {vote}: "):
        ballot = None if vote is None else re.compile(utf8("--vote", vote))

    from fastsample.cli.start import opened
    from fastsample.cli.stats import print_stats

    with opened(asked, max_new_tokens, stops) as session:
        first = next(session.seeds)
        if best_of > 1:
            cut = session.best_of(best_of, first, ballot, reward_model, as_json=asked.as_json)
        elif asked.as_json:
            cut = session.as_json(chain([first], session.seeds), num)
        elif num == 1:
            cut = session.one(first)
        else:
            cut = session.several(chain([first], session.seeds), num)
        if stats:
            print_stats(session.lm, session.ids, session.steps, first, session.sampling)
    if cut:
        note(f"truncated at {session.steps} tokens: continuation {', '.join(map(str, cut))}; try --max-new-tokens")
    return int(bool(cut))


def _check_together(
    constrained: bool,
    num: int,
    best_of: int,
    vote: str | None,
    reward_model: str | None,
    stats: bool,
    stops: Sequence[str],
) -> None:
    if vote is not None and best_of == 1:
        raise RefusedError("--vote needs --best-of")
    if reward_model is not None and best_of == 1:
        raise RefusedError("--reward-model needs --best-of")
    if num > 1 and best_of > 1:
        raise RefusedError("--num and --best-of: expected one of them")
    if stats and (constrained or best_of > 1):
        raise RefusedError("--stats measures plain sampling, without --best-of, --json-schema, --regex and --choices")
    if stops and constrained:
        raise RefusedError("--stop: a text of --json-schema, --regex or --choices ends where it is whole")
    if not all(stops):
        raise RefusedError("--stop: expected a string that is not empty")


@app.command()
@with_shared_options
def explain(
    asked: Asked,
    *,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to draw, at most.")] = 8,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that answers for other parameters too.")
    ] = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Tell of so many tokens at each step.")] = 10,
) -> int:
    """Continue a prompt, and tell why each token was drawn.

    For each it shows what was cut before the draw, by what, and where the draw fell.
    The text is that of generate with this seed. Exit status: 0, done; 2, refused, with the reason on stderr; 130,
    interrupted.
    """
    from fastsample.cli.explain import explained, show
    from fastsample.cli.start import opened

    with opened(asked, tokens) as session:
        explanation = explained(session, next(session.seeds), top)
    if html is not None:
        with told((OSError,), f"--html {html}: "):
            explanation.to_html(html)
        note(f"{html}: {len(explanation.steps)} steps, for a browser")
    if asked.as_json:
        print(explanation.to_json())
    elif html is None:
        show(explanation)
    return 0


@app.command()
def info(*, as_json: AsJson = False) -> None:
    """Print what can run on this machine.

    Engines, instruction set, threads, versions, and the model that ships.
    """
    from fastsample.cli.info import print_info

    print_info(as_json)
