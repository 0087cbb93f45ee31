"""`fastsample explain`: a continuation, and why each of its tokens was drawn."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fastsample as fs
from fastsample.cli.generate import (
    breaker_texts,
    check_engine,
    dry_breakers,
    encode,
    grammar_texts,
    load_grammar,
    read_prompt,
)
from fastsample.cli.model import find_model, load, quiet
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
)
from fastsample.cli.output import note, told
from fastsample.cli.session import Session, up_to
from fastsample.inputs import pack_seeds


def explain(
    prompt: Prompt = None,
    *,
    prompt_file: PromptFile = None,
    model: Model = None,
    chat: Chat = False,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to draw, at most.")] = 8,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that answers for other parameters too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Tell of so many tokens at each step.")] = 10,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choices: Choices = None,
    choice: Choice = None,
    grammar_backend: GrammarBackend = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Repeats a run: the text is that of generate with this seed.")
    ] = None,
    backend: Backend = "auto",
    dry_breaker: DryBreaker = None,
    preset: Preset = None,
    **fields: Any,
) -> int:
    """Continue a prompt, and tell of each token what was cut before it was drawn, and why it was the one.

    Exit status: 0, done; 2, refused, with the reason on stderr; 130, interrupted.
    """
    text = read_prompt(prompt, prompt_file)
    regex, picks = grammar_texts(json_schema, regex, choices, choice, grammar_backend)
    breakers = breaker_texts(dry_breaker, fields)
    with told((TypeError, ValueError)):
        fs.SamplingParams(**fields)
        own = int(pack_seeds(secrets.randbits(64) if seed is None else seed, 1)) % 2**64
    check_engine(backend)
    name, local = find_model(model)
    with quiet():
        lm, tokenizer = load(name, local)
        grammar = load_grammar(tokenizer, grammar_backend or "auto", json_schema, regex, picks)
        ids, steps = encode(text, lm, tokenizer, tokens, chat)
        sampling = {"backend": backend, **fields, **dry_breakers(tokenizer, breakers)}
        explanation = explained(Session(text, lm, tokenizer, ids, steps, grammar, [], sampling), own, top)
    if html is not None:
        with told((OSError,), f"--html {html}: "):
            explanation.to_html(html)
        note(f"{html}: {len(explanation.steps)} steps, for a browser")
    if as_json:
        print(explanation.to_json())
    elif html is None:
        show(explanation)
    return 0


def explained(session: Session, seed: int, top: int) -> fs.Explanation:
    """A continuation as `generate` draws it, explained."""
    out = session.generated([seed], output_logits=True)
    prompt = session.ids[0].tolist()
    tokens = up_to(out.sequences[0, len(prompt) :].tolist(), session.ends())
    logits = torch.cat(out.logits)[: len(tokens)]
    fields = {name: value for name, value in session.sampling.items() if name != "backend"}
    explanation = fs.explain(
        logits,
        seed=[seed] * len(tokens),
        offset=torch.arange(len(tokens)),
        prompt_ids=[prompt] * len(tokens),
        output_ids=[tokens[:i] for i in range(len(tokens))],
        bitmask=_bitmask(session, logits, tokens),
        top=top,
        tokenizer=session.tokenizer,
        prompt=session.prompt,
        **fields,
    )
    drawn = [step.token for step in explanation.steps]
    if drawn != tokens:
        raise RuntimeError(f"generate drew {tokens}, the explanation {drawn}")
    return explanation


def _bitmask(session: Session, logits: torch.Tensor, tokens: list[int]) -> torch.Tensor | None:
    """What the grammar allowed at each step, int32 [steps, words]."""
    if session.grammar is None:
        return None
    from fastsample.integrations.grammar import GrammarBatch

    followed, masks = GrammarBatch([session.grammar], session.ends()), []
    for row, token in zip(logits, tokens, strict=True):
        masks.append(followed.bitmask(row[None]).clone())
        followed.accept([token])
    return torch.cat(masks)


def show(explanation: fs.Explanation) -> None:
    """Print it, with colours on a terminal."""
    if not sys.stdout.isatty():
        print(explanation)
        return
    from rich.console import Console

    from fastsample.explanation.terminal import coloured

    coloured(explanation, Console(file=sys.stdout))
