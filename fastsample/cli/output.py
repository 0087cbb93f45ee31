"""Shared by the commands: one-line notes and refusals, tables, progress, and an output that takes any text."""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TextIO

INSTALL = "pip install '.[hf]' in a clone of fastsample"


_LONGEST = 500


class RefusedError(Exception):
    """A refusal, in one line."""


@contextmanager
def told(kinds: tuple[type[Exception], ...], what: str = "") -> Iterator[None]:
    """Turn expected exceptions into refusals: the first line of their message after `what`."""
    try:
        yield
    except RecursionError:
        raise RefusedError(f"{what}nested too deeply, or refers to itself without end") from None
    except kinds as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RefusedError(what + lines[0]) from None


def note(message: str) -> None:
    """One line on stderr, shortened; control characters in the user's text are shown, not obeyed."""
    line = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in " ".join(message.split()))
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
    with stderr_may_fail():
        print("fastsample:", line, file=sys.stderr)


def utf8(what: str, text: str) -> str:
    """Text from the command line; bytes that the locale could not decode are read as UTF-8."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    with told((UnicodeError,), f"{what}: not UTF-8: "):
        return os.fsencode(text).decode()


@contextmanager
def stderr_may_fail() -> Iterator[None]:
    """Ignore a closed stderr: the output on stdout still counts."""
    try:
        yield
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Send the rest of a broken stream to the null device; otherwise the interpreter's exit would fail on it."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def take_any_text(stream: TextIO) -> None:
    r"""Print characters that the stream's encoding lacks as JSON escapes, so that JSON stays valid."""
    if isinstance(stream, io.TextIOWrapper):
        codecs.register_error("fastsample.escape", _escape)
        stream.reconfigure(errors="fastsample.escape")


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    _note_escapes(error.encoding)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


@cache
def _note_escapes(encoding: str) -> None:
    note(rf"standard output is {encoding}: characters that it lacks are printed as \uXXXX")


def print_json(value: Any) -> None:
    """Print an object for other programs; a number that JSON lacks becomes null."""
    print(json.dumps(_finite(value), ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(rows: Sequence[tuple[str, ...]], *, header: bool = False, stream: Any = None) -> None:
    """Aligned columns; with colours and a frame on a terminal."""
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
        table.add_row(*map(Text, row))  # without markup: a reason may contain [brackets]
    Console(file=stream).print(table)


# Progress ------------------------------------------------------------------------------------------------------------


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say what takes a while, beside a spinner, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(file=sys.stderr).status(what):
        yield


def progress(total: int, unit: str) -> Any:
    """A tqdm bar on stderr, if that is a terminal, from the first second on; nothing is left of it at the end."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, delay=1, leave=False, file=sys.stderr, disable=not sys.stderr.isatty())
