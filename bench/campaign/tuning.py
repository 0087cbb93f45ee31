"""Step `tuning`: layouts of both engines against their own choice; `python -m bench tuned` prints the winners."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.campaign import site as place
from bench.campaign.clock import timed
from bench.campaign.headline import inputs_of
from bench.campaign.micro import ITEMSIZE
from bench.campaign.site import Site
from bench.campaign.steps import Outcome, Point, Record, found_in
from bench.modes import BY_NAME, prepare

MODE = "k50 p.95"
GAIN = 0.03  # a layout that saves less than this share of the time is no winner: it may be noise
UNAVAILABLE = "not available in this build"

Layout = tuple[int, int]
"""Blocks (or programs) per row, and threads of each; (0, 0) is what the engine chooses."""


@dataclass(frozen=True)
class Tuner:
    """How an engine is given a layout, for everything that it does from then on."""

    engine: str
    tune: Callable[[int, int], None]
    layouts: tuple[Layout, ...]


def tuners(site: Site) -> Iterator[Tuner]:
    for make in (cuda_tuner, triton_tuner):
        if (tuner := make(site)) is not None:
            yield tuner


def cuda_tuner(site: Site) -> Tuner | None:
    if site.dry:
        from simt_engine import How

        def simulated(parts: int, threads: int) -> None:
            place.simulated.how = How("cluster", parts, threads) if parts else How()

        return Tuner("cuda", simulated, ((1, 64), (2, 32))) if place.simulated is not None else None
    from fastsample.backends.cuda import native

    tune = getattr(native()[0], "tune", None)
    return None if tune is None else Tuner("cuda", tune, tuple((parts, 256) for parts in (1, 2, 4, 8, 16, 32)))


def triton_tuner(site: Site) -> Tuner:
    """The engine's own override of programs per row, each of which has the threads that it always has."""
    from fastsample.backends.triton import ENGINE
    from fastsample.backends.triton_launch import THREADS

    def tune(parts: int, _threads: int) -> None:
        ENGINE.parts = parts or None

    return Tuner("triton", tune, tuple((parts, THREADS) for parts in ((1, 2) if site.dry else (1, 2, 4, 8, 16, 32))))


def points(site: Site) -> Iterator[Point]:
    found = {tuner.engine: tuner for tuner in tuners(site)}
    for name in ("cuda", "triton"):
        if name not in found:
            yield {"engine": name, "what": "layouts"}, lambda: {"skipped": UNAVAILABLE}
    for vocab, dtype, batch in itertools.product(site.vocabs[:1], site.dtypes, site.batches):
        for tuner in found.values():
            for layout in ((0, 0), *tuner.layouts):
                key = {"engine": tuner.engine, "rows": batch, "vocab": vocab, "dtype": dtype}
                key |= dict(zip(("parts", "threads"), layout, strict=True))
                yield key, partial(measure, site, tuner, layout, (batch, vocab, dtype))
    for name in found:
        yield {"engine": name, "what": "winners"}, lambda name=name: {"winners": winners(site.records, name)}


def measure(site: Site, tuner: Tuner, layout: Layout, shape: tuple[int, int, str]) -> Outcome:
    """The layout's time; or why the engine does not take it. Results do not depend on it, as the gpu tests check."""
    inputs = inputs_of(*shape, site.device)
    try:
        tuner.tune(*layout)
        steps = [prepare(BY_NAME[MODE], logits, tuner.engine) for logits in inputs]
        return {"cold_us": round(timed(steps, site.device)[0], 3)}
    except (RuntimeError, ValueError) as error:
        return {"refused": f"{error}"[:200]}
    finally:
        tuner.tune(0, 0)


def winners(records: list[Record], engine: str) -> list[dict[str, Any]]:
    """For each shape the fastest layout; 0 blocks where none beats the engine's own choice by more than GAIN."""
    own = [r for r in records if r["step"] == "tuning" and r["engine"] == engine and "cold_us" in found_in(r)]
    own = [{**r, **r["found"]} for r in own if "meaningless" not in r["found"]]
    won = []
    for shape in dict.fromkeys((r["dtype"], r["rows"], r["vocab"]) for r in own):
        times = [r for r in own if (r["dtype"], r["rows"], r["vocab"]) == shape]
        chosen = next((r for r in times if not r["parts"]), None)
        best = min(times, key=lambda r: float(r["cold_us"]))
        if chosen is not None:
            best = best if best["cold_us"] < (1 - GAIN) * chosen["cold_us"] else chosen
            place = {"itemsize": ITEMSIZE[shape[0]], "rows": shape[1], "vocab": shape[2]}
            layout = {name: best[name] for name in ("parts", "threads")}
            won.append({**place, **layout, "cold_us": best["cold_us"], "chosen_us": chosen["cold_us"]})
    return sorted(won, key=lambda w: (w["itemsize"], w["vocab"], w["rows"]))


def as_code(where: dict[str, Any], records: list[Record]) -> str:
    """The winners as lines of csrc/cuda/tuned.h and of fastsample/backends/triton_tuned.py, below the file's name.

    The first line that fits a shape counts, so that a shape whose choice stands has one too, with 0 blocks.
    """
    arch = int(str(where.get("compute capability", "0.0")).replace(".", ""))
    cuda = [(f"{{{key(arch, w)}}},", gain(w)) for w in winners(records, "cuda")]
    width = max((len(line) for line, _ in cuda), default=0)
    cuda = [(line.ljust(width), why) for line, why in cuda]  # as clang-format aligns what follows
    triton = [(f"Tuned({key(arch, w)}),", gain(w)) for w in winners(records, "triton")]
    files = (("csrc/cuda/tuned.h", "//", cuda), ("fastsample/backends/triton_tuned.py", "#", triton))
    return "\n".join(pasted(where["gpu"], *of_file) for of_file in files)


def pasted(gpu: str, file: str, mark: str, lines: list[tuple[str, str]]) -> str:
    """A file's lines, as they stand in it."""
    if not lines:
        return f"{file}: no layouts were measured"
    return "\n".join([f"{file}:", f"    {mark} {gpu}", *(f"    {line}  {mark} {why}" for line, why in lines)])


def key(arch: int, winner: dict[str, Any]) -> str:
    """What both tables are looked up by, and the blocks or programs per row."""
    return ", ".join(map(str, (arch, *(winner[name] for name in ("itemsize", "rows", "vocab", "parts")))))


def gain(winner: dict[str, Any]) -> str:
    return f"{winner['cold_us']:.1f} us" + (f", not {winner['chosen_us']:.1f}" if winner["parts"] else "")
