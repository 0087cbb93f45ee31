"""A table of text, for pages and documents."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Grid:
    """A table of text."""

    title: str
    header: list[str]
    lines: list[list[str]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        rows = [self.header, ["---"] * len(self.header), *self.lines]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
