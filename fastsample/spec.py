"""Spec: what one parameter may be. It needs no torch, so that the command line's help can read the table at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Spec:
    """What one parameter may be. Numbers are compared as the float32 (or int) that the engines will see."""

    kind: Literal["float", "int", "bool", "choice"]
    meaning: str
    low: float = -FLOAT32_MAX
    high: float = FLOAT32_MAX
    open_low: bool = False
    choices: tuple[str, ...] = ()
    off: str = ""  # the neutral value, where other libraries have another one
    counts: str = ""  # for a penalty: the ids without which it has no effect
    open_high: bool = False
    of_logits: bool = False  # measured on logits, so that it has no meaning for probabilities
    of_history: bool = False  # reads the ids of the text in their order
    examples: tuple[Any, ...] = ()  # for tests: values that each change what is kept, or its logits,
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # with these fields beside them

    @property
    def range(self) -> str:
        """The range in words, for error messages and documentation."""
        if self.kind == "choice":
            return "one of " + ", ".join(repr(c) for c in self.choices)
        if self.kind == "bool":
            return "True or False"
        low = "" if self.low == -FLOAT32_MAX else f"{_number(self.low)} {'<' if self.open_low else '<='} "
        high = (
            "" if self.high in (FLOAT32_MAX, INT32_MAX) else f" {'<' if self.open_high else '<='} {_number(self.high)}"
        )
        noun = "an integer" if self.kind == "int" else "a finite number"
        return noun if not low and not high else f"{noun}, {low}value{high}"

    @property
    def wanted(self) -> str:
        """The range as an error tells it, with the value that means off."""
        return f"{self.range}; {self.off} is off" if self.off else self.range

    def accepts(self, value: Any) -> Any:
        """Whether a number, or each element of a tensor, lies in the range (NaN does not)."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above & below


def _number(value: float) -> str:
    return "2^20" if value == 2**20 else f"{value:g}"


def real(default: float, meaning: str, **bounds: Any) -> Any:
    return dataclasses.field(default=default, metadata={"spec": Spec("float", meaning, **bounds)})


def integer(default: int, meaning: str, low: int, high: int = INT32_MAX, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"spec": Spec("int", meaning, low, high, **more)})


def flag(meaning: str, **more: Any) -> Any:
    spec = Spec("bool", meaning, 0, 1, examples=(True,), **more)
    return dataclasses.field(default=False, metadata={"spec": spec})


def choice(meaning: str, *choices: str, **more: Any) -> Any:
    spec = Spec("choice", meaning, choices=choices, examples=choices[1:], **more)
    return dataclasses.field(default=choices[0], metadata={"spec": spec})
