"""Runs cases through the Triton engine in Triton's interpreter, in a process of its own: Triton decides at import.

TRITON_INTERPRET=1 python triton_interpreter.py JOBS.json RESULTS.pt
"""

from __future__ import annotations

import inspect
import json
import sys
import threading
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case
from conformance import ask


@dataclass(frozen=True)
class Job:
    """A case, and how its rows are split."""

    case: Case
    parts: int = 1  # programs per row
    block: int = 256  # tokens per chunk, so few that small rows have several chunks
    threads: bool = False  # one launch as on a GPU, barriers included, with each program in a thread

    @property
    def name(self) -> str:
        how = "threads" if self.threads else "launches"
        return self.case.name if self.parts == 1 else f"{self.case.name}-{self.parts} {how}"


def patch_once() -> None:
    """Patch triton.language once; the interpreter does it again at each call of a device function."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()

    def once(fn: Any) -> Any:
        modules = frozenset(id(m) for m in fn.__globals__.values() if m is tl or m is tl.core)
        if modules not in done:
            done.add(modules)
            patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once


def run_programs_in_threads() -> None:
    """Give each program a thread: the interpreter runs one after another, and a barrier would wait for ever."""
    from triton.runtime import interpreter

    place = threading.local()
    builder = interpreter.interpreter_builder
    type(builder).grid_idx = property(lambda _: place.index, lambda _, index: setattr(place, "index", index))

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        scope = interpreter._patch_lang(self.fn)
        known = inspect.getfullargspec(self.fn).args
        bound = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in known})
        bound = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in bound.items()}
        grid = (*self.grid, 1, 1)[:3]
        builder.set_grid_dim(*grid)
        failures: list[BaseException] = []

        def program(*index: int) -> None:
            place.index = index
            try:
                self.fn(**bound)
            except BaseException as error:
                failures.append(error)

        for row in range(grid[0]):
            threads = [threading.Thread(target=program, args=(row, part, 0), daemon=True) for part in range(grid[1])]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
                if thread.is_alive():
                    raise failures[0] if failures else TimeoutError("a program waits at a barrier for ever")
        if failures:
            raise failures[0]
        scope.restore()

    interpreter.GridExecutor.__call__ = call
    sys.setswitchinterval(1e-4)


def main() -> None:
    from fastsample.backends import triton as engine

    torch.set_num_threads(1)
    patch_once()
    with open(sys.argv[1]) as file:
        jobs = [Job(Case(**job.pop("case")), **job) for job in json.load(file)]
    found = {}
    for job in sorted(jobs, key=lambda job: job.threads):
        if job.threads and not engine.ENGINE.one_launch:
            engine.ENGINE.one_launch = True
            run_programs_in_threads()
        engine.ENGINE.block, engine.ENGINE.parts = job.block, job.parts
        found[job.name] = ask(job.case, "triton", brief=True)
    torch.save(found, sys.argv[2])


if __name__ == "__main__":
    main()
