"""The command line: `fastsample generate`, `explain` and `info`. Its parts are imported when it runs."""

from _fastsample_cli import main

__all__ = ["main"]
