"""What the commands share: refusals in one line, and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

INSTALL = "pip install 'fastsample[hf]'"


class RefusedError(Exception):
    """What cannot be done, in one line."""


@contextmanager
def told(kinds: tuple[type[Exception], ...], what: str = "") -> Iterator[None]:
    """Turn expected exceptions into refusals: the first line of their message after `what`."""
    try:
        yield
    except kinds as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RefusedError(what + lines[0]) from None


def print_table(rows: Sequence[tuple[str, ...]], *, header: bool = False, stream: Any = None) -> None:
    """Aligned columns; with colours and a frame where a person looks."""
    stream = stream or sys.stdout
    if stream.isatty():
        _print_rich(rows, header, stream)
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=stream)


def _print_rich(rows: Iterable[tuple[str, ...]], header: bool, stream: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=header)
    rows = iter(rows)
    first = next(rows) if header else None
    for column in first or ("", ""):
        table.add_column(column)
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: a reason may hold [brackets]
    Console(file=stream).print(table)
