"""Runs cases through the Triton engine in Triton's interpreter, in a process of its own: Triton decides at import.

TRITON_INTERPRET=1 python triton_interpreter.py JOBS.json RESULTS.pt
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cases import Case, Fields, Inputs, cycle
from conformance import MODES, ask, ask_kept, named

import fastsample as fs

Tensor = torch.Tensor
SUPPORT = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """A case, and how its rows are split."""

    case: Case
    parts: int = 1  # programs per row
    block: int = 256  # tokens per chunk, so few that small rows have several chunks
    threads: bool = False  # one launch as on a GPU, barriers included, with each program in a thread
    top: int = 6  # how many of the most probable tokens are asked for, which takes two more passes
    probs: bool = False  # whether the rows are given as probabilities

    @property
    def name(self) -> str:
        how = "threads" if self.threads else "launches"
        name = f"{self.case.name}{'-probs' * self.probs}"
        return name if self.parts == 1 else f"{name}-{self.parts} {how}"

    def ask(self, backend: str) -> dict[str, Tensor]:
        """What the engine makes of it."""
        return ask_of_probs(self.case, backend) if self.probs else ask(self.case, backend, brief=True, top=self.top)


LAST = {"order": "temperature_last"}
RARE: dict[str, Callable[[int], Fields]] = {
    "typical-cold": lambda b: {**LAST, "temperature": cycle(b, 0.05, 0.01), "typical_p": cycle(b, 0.2, 0.5)},
    "typical-m": lambda b: {**LAST, "temperature": cycle(b, 0.6, 1.0), "typical_p": 0.3, "min_p": cycle(b, 0.5, 0.05)},
    "typical-all": lambda b: {**LAST, "typical_p": 0.5, "top_p": 0.9, "min_p": 0.4, "epsilon_cutoff": 0.01},
    "xtc-cold": lambda b: {
        **LAST,
        "temperature": cycle(b, 0.02, 0.05),
        "xtc_probability": cycle(b, 0.5, 0.9, 1.0),
        "xtc_threshold": 0.01,
    },
    "typical-xtc-cold": lambda b: {
        **LAST,
        "temperature": cycle(b, 0.02, 0.1),
        "typical_p": 0.4,
        "xtc_probability": 0.5,
    },
    "xtc-all": lambda b: {"xtc_probability": cycle(b, 0.5, 1.0), "xtc_threshold": 1e-30},
}
"""Sets by the number of rows: min-p after typical, and tokens that are kept but have no mass."""

LISTING: dict[str, Callable[[int], Fields]] = {
    "k-rows": lambda b: {
        "top_k": cycle(b, 50, 2, 0, 1, 193),
        "top_p": cycle(b, 0.9, 0.5, 0.5, 1.0),
        "ties": cycle(b, "first", "first", "all", "all"),
    },
    "k192": lambda b: {"top_k": 192},
    "k20-xtc": lambda b: {"top_k": 20, "xtc_probability": 0.5, "xtc_threshold": 0.02},
    "k20-typical": lambda b: {**LAST, "top_k": 20, "typical_p": 0.6, "top_p": 0.8},
    "k30-floors": lambda b: {"top_k": 30, "top_n_sigma": 1.5, "epsilon_cutoff": 0.01},
    "k30-cold": lambda b: {**LAST, "top_k": 30, "top_p": 0.9, "temperature": cycle(b, 0.02, 5.0), "min_p": 0.05},
}
"""Sets by the number of rows: top-k by a list of candidates, at its limits and beside each kind of filter."""

SETS = RARE | LISTING


class Rare(Case):
    """A case with one of these sets."""

    def build(self) -> Inputs:
        plain = Case(self.maker, "plain", self.vocab, self.dtype, self.extra, self.rows)
        return replace(plain.build(), params=SETS[self.params](self.rows))


def case_of(fields: dict[str, Any]) -> Case:
    return (Rare if fields["params"] in SETS else Case)(**fields)


def ask_of_probs(case: Case, backend: str) -> dict[str, Tensor]:
    """Everything that an engine can be asked about a case's probabilities, with one mode of log-probabilities."""
    inputs = case.build()
    p = probabilities_of(inputs)
    common = {**inputs.kwargs, "input": "probs", "backend": backend, "on_invalid": "flag"}
    mode = MODES[case.vocab % 2 == 0]
    more = {"num_samples": 3, "logprobs": mode, "top_logprobs": min(6, case.vocab)}
    found = {"probabilities": fs.probabilities(p, **common)}
    found |= named(fs.sample(p, **common, **inputs.draw, **more), f"{mode}.")
    return found | named(fs.sample(p, **common, **inputs.draw), "plain.") | ask_kept(p, **common, **inputs.draw)


def probabilities_of(inputs: Inputs) -> Tensor:
    """A case's logits as probabilities of any sum: tiny in the second row, large in the third; others are no such."""
    p = torch.softmax(inputs.logits.float(), -1)
    scales = (1.0, 2.0**-120 if inputs.logits.dtype != torch.float16 else 2.0**-18, 2.0**15)
    p = p * torch.tensor([scales[row % 3] for row in range(len(p))])[:, None]
    last = p.shape[1] - 1
    for row, (at, value) in enumerate([(last, -0.1), (0, torch.inf), (last // 2, torch.nan), (0, -0.0)], 3):
        if row < len(p):
            p[row] = 0 if row == 6 else p[row]
            p[row, at] = value
    return p.to(inputs.logits.dtype)


def patch_once() -> None:
    """Patch triton.language once; the interpreter does it again at each call of a device function.

    Nor does it look for overflows, which takes a third of its time and reports nothing.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()

    def once(fn: Any) -> Any:
        modules = frozenset(id(m) for m in fn.__globals__.values() if m is tl or m is tl.core)
        if modules not in done:
            done.add(modules)
            patch(fn)
        return getattr(interpreter, "_LangPatchScope", lambda: None)()  # which Triton 3.4 and 3.5 do not have

    interpreter._patch_lang = once
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


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


def run_interpreted(script: str | Path, *args: object) -> None:
    """Run a script where Triton interprets kernels."""
    path = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))  # which may have another Triton
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, str(script), *map(str, args)]
    done = subprocess.run(command, env=environment, cwd=SUPPORT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def interpret(jobs: list[Job], folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Results of these jobs, run in a process of their own."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    run_interpreted(__file__, folder / "jobs.json", folder / "out.pt")
    found: dict[str, dict[str, torch.Tensor]] = torch.load(folder / "out.pt")
    return found


def count_calls(*functions: Any) -> Counter[str]:
    """Counts from now on how often kernels call these functions, by name."""
    calls: Counter[str] = Counter()

    def counted(fn: Any) -> Callable[..., Any]:
        body = fn.rewrite()

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[fn.__name__] += 1
            return body(*args, **kwargs)

        return call

    for fn in functions:
        fn.rewritten_fn[fn.fn] = counted(fn)
    return calls


def main() -> None:
    from fastsample.backends import triton as engine

    torch.set_num_threads(1)
    patch_once()
    with open(sys.argv[1]) as file:
        jobs = [Job(case_of(job.pop("case")), **job) for job in json.load(file)]
    found = {}
    for job in sorted(jobs, key=lambda job: job.threads):
        if job.threads and not engine.ENGINE.one_launch:
            engine.ENGINE.one_launch = True
            run_programs_in_threads()
        engine.ENGINE.block, engine.ENGINE.parts = job.block, job.parts
        found[job.name] = job.ask("triton")
    torch.save(found, sys.argv[2])


if __name__ == "__main__":
    main()
