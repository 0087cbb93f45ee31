"""The console script, beside the package: `import fastsample` loads torch, and Ctrl-C must end that quietly too."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run `fastsample` with the arguments of the process, and exit."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, _interrupted)
    _open_what_is_closed()
    from fastsample.cli.app import app

    app()


def _interrupted(_signal: int, _frame: FrameType | None) -> None:
    """End at once. A KeyboardInterrupt could get lost in native code that calls back, or end in a traceback at exit."""
    os.write(2, b"\n")  # the shell's prompt belongs on a line of its own
    os._exit(130)


def _open_what_is_closed() -> None:
    """No file that is opened later may become a standard stream."""
    closed = [stream is None for stream in (sys.stdin, sys.stdout, sys.stderr)]
    while any(closed) and (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        closed[null] = False
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")  # the null device; print(file=None) would print to stdout
    if sys.stdout is None:
        print("fastsample: standard output is closed", file=sys.stderr)
        raise SystemExit(2)
