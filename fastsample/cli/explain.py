"""What `fastsample explain` tells: a continuation, and why each of its tokens was drawn."""

from __future__ import annotations

import sys

import torch

import fastsample as fs
from fastsample.cli.output import progress
from fastsample.cli.session import Session, up_to


def explained(session: Session, seed: int, top: int) -> fs.Explanation:
    """A continuation as `generate` draws it, explained."""
    with progress(session.steps, "token") as bar:
        out = session.generated([seed], bar=bar, output_logits=True)
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
