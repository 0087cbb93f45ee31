"""Options that commands share, those of the table of sampling parameters among them. They need typer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

import fastsample as fs
from fastsample.backends import ORDER
from fastsample.cli.generate import utf8
from fastsample.cli.output import told
from fastsample.params import specs

DEFAULTS = {"temperature": 0.8, "top_p": 0.95}  # for readable text; the table's own defaults filter nothing

Prompt: TypeAlias = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", help="The text to continue; may be empty. A - reads standard input."),
]
PromptFile: TypeAlias = Annotated[
    str | None, typer.Option(metavar="FILE", help="Read the prompt from a file, without its last line break.")
]
Model: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Folder, GGUF file or hub name of a causal LM, or smollm2 [default: tiny-gpt2, which ships]",
    ),
]
Chat: TypeAlias = Annotated[
    bool, typer.Option("--chat", help="The prompt is a user's message; print the model's answer, without the prompt.")
]
JsonSchema: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File with a JSON schema; print JSON that validates, without the prompt."),
]
Regex: TypeAlias = Annotated[
    str | None, typer.Option(metavar="RE", help="Print text that this regular expression matches, likewise.")
]
Choices: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="A,B,...", help="Print one of these, likewise; spaces around the commas are left out."),
]
Choice: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="One of the choices, exactly as it stands; may be given several times."),
]
GrammarBackend: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="auto, llguidance, xgrammar, outlines-core [default: auto]"),
]
Backend: TypeAlias = Annotated[str, typer.Option(metavar="NAME", help="auto, " + ", ".join(ORDER))]
DryBreaker: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="With --dry-multiplier: a token that contains this ends a repetition; may be given several times.",
    ),
]
Preset: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Parameters known by a name, such as neutral or llama.cpp; the options below override them.",
    ),
]


def with_sampling_options(command: Callable[..., int]) -> Callable[..., int]:
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
