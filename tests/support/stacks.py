"""Serving stacks under test: whether one is installed, and scripts that run in a process of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parents[2] / "fastsample" / "models" / "tiny-gpt2"  # V = 4096


def missing(stack: str, *distributions: str) -> str | None:
    """Why the tests of a stack are skipped, or None where one of its distributions is installed."""
    for name in distributions:
        try:
            version(name)
            return None
        except PackageNotFoundError:
            pass
    return f"{stack} is not installed; `nox -s {stack.lower()}` installs it and runs these tests"


class Script:
    """A Python script in its own process; its arguments are the JSON files to read `ask` from and write `result` to.

    It has `seconds` from when its result is asked for; then it ends, and whatever it has started.
    """

    def __init__(self, source: str, ask: Any, seconds: int = 400, **environment: str) -> None:
        self._seconds = seconds
        folder = Path(tempfile.mkdtemp())
        self._result, self._log = folder / "result.json", folder / "log.txt"
        (folder / "script.py").write_text(source)
        (folder / "ask.json").write_text(json.dumps(ask))
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "script.py", "ask.json", "result.json"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                cwd=folder,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def result(self) -> Any:
        try:
            code = self._process.wait(self._seconds)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        assert code == 0, self.log[-4000:]
        return json.loads(self._result.read_text())
