"""What an explanation consists of, and the forms that it can be given."""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Edit:
    """What a mask, a bias, a penalty or a history edit did to a row's logits, in the contract's order.

    Attributes:
        name: the argument or parameter: "bitmask", "bias", "repetition_penalty", ...
        changed: number of tokens whose logit is another one.
        removed: number of those that are now -inf.
    """

    name: str
    changed: int
    removed: int


@dataclass(frozen=True)
class Cut:
    """What a filter left out of what the filters before it had kept.

    Attributes:
        name: its parameter; "temperature" where a row is greedy, "xtc_probability" for what a draw may leave out.
        value: the parameter's value.
        kept: number of tokens that it left.
        removed: number of tokens that it took.
        mass: mass of the tokens that it left, in units of 2^-40 of the row's maximum.
        removed_mass: mass of those that it took.
        limits: the numbers that decided: "logit" (the lowest that stays), "target" and "reached" (the mass that the
            kept must have together, and have) or "floor" (the mass that each must have), and what they were made of.
        why: the same in words.
    """

    name: str
    value: float | int | bool
    kept: int
    removed: int
    mass: int
    removed_mass: int
    limits: dict[str, float | int]
    why: str


@dataclass(frozen=True)
class Candidate:
    """A token and what became of it.

    Attributes:
        token: its id.
        text: its text; None without a tokenizer.
        rank: its place in the rank order, from 1; 0 where an edit made it -inf.
        given: its logit as given, float32.
        logit: its logit after bitmask, bias, penalties and history edits.
        edits: the names of those that changed it.
        before: its probability before any filter, at the temperature that the filters see.
        after: its probability after each of the step's cuts, in their order.
        probability: what it is drawn with, float32, as in `probabilities`.
        cut_by: name of the cut, or of the edit, that left it out; None if it can be drawn.
    """

    token: int
    text: str | None
    rank: int
    given: float
    logit: float
    edits: tuple[str, ...]
    before: float
    after: tuple[float, ...]
    probability: float
    cut_by: str | None


@dataclass(frozen=True)
class Draw:
    """How the token was drawn: it is the first, by id, whose running mass exceeds `threshold`.

    Attributes:
        bits: the 60 random bits u.
        total: the mass Z that was drawn from.
        threshold: floor(u * Z / 2^60).
        start, end: the running mass before the token and with it: start <= threshold < end.
        coin: the 60 bits of XTC's coin; None where XTC is off.
        coin_limit: the coin falls to excluding the top choices where it is below this.
        excludes: whether this draw left the top choices out.
    """

    bits: int
    total: int
    threshold: int
    start: int
    end: int
    coin: int | None
    coin_limit: int
    excludes: bool

    @property
    def u(self) -> float:
        """The random bits as a number in [0, 1)."""
        return self.bits / 2**60


@dataclass(frozen=True, eq=False)
class Record:
    """What the page recomputes from: the first tokens of the rank order, and every logit above -inf."""

    ids: torch.Tensor  # int64 [n]
    texts: list[str | None]
    logits: torch.Tensor  # float32, descending


@dataclass(frozen=True)
class Step:
    """One row, from its logits to its token.

    Attributes:
        row: its number in the flattened table of logits.
        status: 0, or why it is invalid, as in SampleOutput; such a row has neither cuts nor candidates nor a draw.
        problem: the status in words; None for a valid row.
        params: its parameters, as the engines see them.
        seed, offset, index: unsigned 64-bit words that key its random bits, and which of its draws this is.
        vocab: V.
        alive: number of tokens above -inf, after the edits.
        edits: what changed its logits.
        cuts: what the filters that are on left out, in the order of `params["order"]`; XTC last.
        candidates: the most probable tokens, and the one that was drawn, in rank order.
        banned: of those that would be the most probable as given, the ones that an edit made -inf.
        kept_count: number of tokens that can be drawn, as `sample` counts them.
        kept_mass: what they weighed before the filters, at the row's temperature: 1 is all. NaN in an invalid row.
        entropy: in nats, of what is drawn from. NaN in an invalid row.
        token: the id that was drawn; -1 in an invalid row.
        text: its text; None without a tokenizer.
        draw: how; None where nothing is random.
    """

    row: int
    status: int
    problem: str | None
    params: dict[str, Any]
    seed: int
    offset: int
    index: int
    vocab: int
    alive: int
    edits: tuple[Edit, ...]
    cuts: tuple[Cut, ...]
    candidates: tuple[Candidate, ...]
    banned: tuple[Candidate, ...]
    kept_count: int
    kept_mass: float
    entropy: float
    token: int
    text: str | None
    draw: Draw | None
    record: Record | None = field(default=None, repr=False, compare=False)

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that was drawn; None in an invalid row."""
        return next((c for c in self.candidates if c.token == self.token), None)


@dataclass(frozen=True)
class Explanation:
    """Why each token was drawn. `print` shows it as text, a notebook as its page.

    Attributes:
        steps: one for each row.
        prompt: the text before them.
    """

    steps: tuple[Step, ...]
    prompt: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers. What JSON has no number for is a string: "nan", "inf", "-inf"."""
        return {"prompt": self.prompt, "steps": [plain_of(step) for step in self.steps]}

    def to_json(self) -> str:
        """`to_dict` as JSON. Integers have up to 64 bits."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_html(self, file: str | Path | None = None) -> str:
        """A page that needs nothing else, also written to `file` if given.

        It recomputes kept sets and probabilities for other parameters, to the bit, from the 512 highest logits and sums
        of the rest, which it holds for temperatures from 0.05 to 2 in steps of 0.05.
        """
        from fastsample.explanation.page import page

        text = page(self)
        if file is not None:
            Path(file).write_text(text, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.to_html())}" title="Why each token was drawn" '
            'style="width: 100%; height: 720px; border: 0"></iframe>'
        )

    def __str__(self) -> str:
        from fastsample.explanation.terminal import plain

        return plain(self)


def plain_of(value: Any) -> Any:
    """A value of an explanation as JSON has it."""
    if is_dataclass(value):
        return {f.name: plain_of(getattr(value, f.name)) for f in fields(value) if f.name != "record"}
    if isinstance(value, dict):
        return {name: plain_of(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain_of(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
