"""An explanation as lines of text: coloured by rich on a terminal, plain elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastsample.explanation.result import Candidate, Explanation, Step

if TYPE_CHECKING:
    from rich.console import Console

Line = list[tuple[str, str]]
"""Pieces of a line, each with its style."""

_SHORT = {
    "temperature": "greedy",
    "top_n_sigma": "n-sigma",
    "typical_p": "typical",
    "epsilon_cutoff": "epsilon",
    "eta_cutoff": "eta",
    "xtc_probability": "xtc",
    "no_repeat_ngram_size": "n-gram",
    "dry_multiplier": "dry",
}
_DIM, _DRAWN, _HEAD = "dim", "bold green", "bold"


def plain(explanation: Explanation) -> str:
    """The text without colours."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines(explanation))


def coloured(explanation: Explanation, console: Console) -> None:
    """Print to a terminal; a line that is too long for it is cut off."""
    from rich.text import Text

    for line in lines(explanation):
        console.print(Text.assemble(*line), no_wrap=True, overflow="ellipsis", soft_wrap=False)


def lines(explanation: Explanation) -> Iterator[Line]:
    for number, step in enumerate(explanation.steps, 1):
        if number > 1:
            yield []
        yield from _lines_of(number, step)


def _lines_of(number: int, step: Step) -> Iterator[Line]:
    token = "no token" if step.token < 0 else quoted(step.text, step.token)
    yield [(f"step {number}  ", _HEAD), (token, _DRAWN), (f"  {_summary(step)}", "")]
    for edit in step.edits:
        removed = f", {edit.removed} of them to -inf" if edit.removed else ""
        yield [(f"  {short(edit.name):12}", _HEAD), (f"changed {_tokens(edit.changed)}{removed}", "")]
    for cut in step.cuts:
        may = "may leave" if cut.name == "xtc_probability" and cut.value != 1 else "left"
        size = f"{may} {cut.kept} of {cut.kept + cut.removed}"
        yield [(f"  {short(cut.name):12}", _HEAD), (size, ""), (f"  {cut.why}", _DIM)]
    if step.draw is not None:
        yield [(f"  {'draw':12}", _HEAD), (_fell(step), "")]
    yield from _table(step)


def _summary(step: Step) -> str:
    if step.problem is not None:
        return f"the row has {step.problem}"
    chosen = step.chosen
    assert chosen is not None
    share = f"{step.kept_mass:.4f} of the probability"
    return f"p {chosen.probability:.4f}; {step.kept_count} of {step.vocab} kept, {share}; entropy {step.entropy:.3f}"


def _fell(step: Step) -> str:
    draw = step.draw
    assert draw is not None
    where = f"u {draw.u:.6f} fell in {draw.start / draw.total:.6f} to {draw.end / draw.total:.6f}"
    coin = "" if draw.coin is None else f"; XTC's coin {draw.coin / 2**60:.4f}: top choices {_out(draw.excludes)}"
    return where + coin


def _out(excluded: bool) -> str:
    return "out" if excluded else "in"


def _table(step: Step) -> Iterator[Line]:
    """A line for each candidate: its probability before, after each cut, and in the end; what cut it; its text."""
    listed = [*step.banned, *step.candidates]
    if not listed:
        return
    names = ["rank", "before", *(short(cut.name) for cut in step.cuts), "drawn", "cut by"]
    table = [_cells(candidate, len(step.cuts)) for candidate in listed]
    widths = [max(map(len, column)) for column in zip(names, *table, strict=True)]
    yield [("  " + _aligned(names, widths) + "  token", _DIM)]
    for candidate, cells in zip(listed, table, strict=True):
        style = _DRAWN if candidate.token == step.token else _DIM if candidate.cut_by is not None else ""
        yield [("  " + _aligned(cells, widths) + "  " + quoted(candidate.text, candidate.token), style)]


def _cells(candidate: Candidate, cuts: int) -> list[str]:
    after = candidate.after or (0.0,) * cuts
    chances = (candidate.before, *after, candidate.probability)
    by = "" if candidate.cut_by is None else short(candidate.cut_by)
    return [str(candidate.rank or "-"), *(f"{p:.4f}" if p else "-" for p in chances), by]


def _aligned(cells: list[str], widths: list[int]) -> str:
    *numbers, last = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join([*numbers, last.strip().ljust(widths[-1])])


def short(name: Any) -> str:
    """A parameter's name, short and with hyphens."""
    return _SHORT.get(name, str(name).removesuffix("_penalty").replace("_", "-"))


def quoted(text: str | None, token: int) -> str:
    """A token's text on one line, or its id."""
    if not text:
        return f"#{token}"
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in json.dumps(text, ensure_ascii=False))


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"
