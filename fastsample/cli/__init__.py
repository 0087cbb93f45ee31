"""The command line: `fastsample generate` and `fastsample info`. Its parts are imported when it runs."""

from _fastsample_cli import main

__all__ = ["main"]
