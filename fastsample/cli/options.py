"""Options that commands share, those of the table of sampling parameters among them. They need typer, and no torch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_type_hints

import typer

from fastsample.cli.output import told, utf8
from fastsample.params import SamplingParams, specs

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
Backend: TypeAlias = Annotated[str, typer.Option(metavar="NAME", help="auto, cuda, triton, cpu, reference")]
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


Seed: TypeAlias = Annotated[
    int | None,
    typer.Option(metavar="N", help="Repeats a run; each continuation of a prompt gets its own from it."),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@dataclass(frozen=True)
class Asked:
    """What commands that continue a prompt are asked alike."""

    prompt: Prompt = None
    prompt_file: PromptFile = None
    model: Model = None
    chat: Chat = False
    json_schema: JsonSchema = None
    regex: Regex = None
    choices: Choices = None
    choice: Choice = None
    grammar_backend: GrammarBackend = None
    seed: Seed = None
    backend: Backend = "auto"
    as_json: AsJson = False
    dry_breaker: DryBreaker = None
    preset: Preset = None
    params: Any = None  # a value for each field of SamplingParams

    @property
    def constrained(self) -> bool:
        """Whether there is a grammar."""
        return any(given is not None for given in (self.json_schema, self.regex, self.choices, self.choice))


def with_shared_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command that takes an Asked one option for each of its fields and for each sampling parameter.

    The parameters that it gets are those of --preset, or else the defaults, replaced by the options that were given.
    """
    signature = inspect.signature(command, eval_str=True)
    _, *own = signature.parameters.values()
    hints = get_type_hints(Asked, include_extras=True)
    shared = {f.name: _keyword(f.name, f.default, hints[f.name]) for f in fields(Asked) if f.name != "params"}
    first = [shared.pop(name) for name in ("prompt", "prompt_file", "model", "chat")]
    sampling = {
        name: _keyword(name, DEFAULTS.get(name, getattr(SamplingParams, name)), _option(name, spec))
        for name, spec in specs()
    }

    @functools.wraps(command)
    def wrapped(ctx: typer.Context, **given: Any) -> int:
        params = {name: given.pop(name) for name in sampling}
        if (preset := given["preset"]) is not None:
            with told((TypeError, ValueError)):
                known = SamplingParams.preset(utf8("--preset", preset))
            params |= {name: getattr(known, name) for name in params if not _is_given(ctx, name)}
        asked = Asked(params=params, **{f.name: given.pop(f.name) for f in fields(Asked) if f.name != "params"})
        return command(asked, **given)

    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context, *first, *own, *shared.values(), *sampling.values()]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    vars(wrapped)["__signature__"] = signature.replace(parameters=parameters)
    return wrapped


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


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
