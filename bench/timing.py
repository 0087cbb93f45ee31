"""Timing: contenders in alternation, medians and spread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Step = Callable[[], Any]
"""Logits to tokens, once. A step with a method `seconds` runs once and says how long the part that counts took."""

TURN = 2e-3  # seconds; a turn has as many calls as fit, so that a fast contender is not always measured cold
WARM = 5e-3  # steps that take longer get no warm-up call before each turn
LEAST, MOST = 5, 300  # turns
REST = 2e-2  # seconds before a multi-threaded turn: OpenMP's workers keep spinning for some ms on a core that we need


def seconds(step: Step) -> float:
    """One run."""
    own = getattr(step, "seconds", None)
    if own is not None:
        return float(own())
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def turn(step: Step, typical: float) -> float:
    """Median seconds of several consecutive calls; a fast step's first call does not count."""
    if torch.get_num_threads() > 1:
        time.sleep(REST)
    if typical < WARM:
        step()
    return float(np.median([seconds(step) for _ in range(max(1, min(50, int(TURN / typical))))]))


def in_turns(ours: Step, theirs: Step, budget: float) -> list[tuple[float, float]]:
    """A B A B within a time budget, at least LEAST turns each: seconds of ours and theirs, turn by turn."""
    return [(first, second) for first, second in rounds((ours, theirs), budget)]


def rounds(steps: Sequence[Step], budget: float) -> list[tuple[float, ...]]:
    """The same for any number of steps: seconds of each, round by round."""
    typical = [min(seconds(step) for _ in range(3)) for step in steps]
    found: list[tuple[float, ...]] = []
    end = time.perf_counter() + budget
    while len(found) < LEAST or (time.perf_counter() < end and len(found) < MOST):
        found.append(tuple(turn(step, t) for step, t in zip(steps, typical, strict=True)))
    return found


def spread(values: Any, digits: int = 2) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    low, middle, high = np.percentile(np.asarray(values), [10, 50, 90])
    return {"median": round(float(middle), digits), "p10": round(float(low), digits), "p90": round(float(high), digits)}


def bandwidth(megabytes: int = 256) -> float:
    """Bytes per second that torch.amax reads from a tensor far larger than a cache, with torch's current threads."""
    rows = torch.zeros(64, megabytes * 2**20 // 256)
    torch.amax(rows, -1)
    return rows.nbytes / min(seconds(lambda: torch.amax(rows, -1)) for _ in range(5))


class Others:
    """The number of cores that other processes kept busy since this was made; None if the system cannot tell."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.own, self.all = sum(os.times()[:4]), self.busy()

    @staticmethod
    def busy() -> float | None:
        """Seconds that all cores together have worked, without waiting for disks."""
        try:
            values = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _idle, _wait, *rest = map(int, values[:8])
        return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")

    def cores(self) -> float | None:
        now, elapsed = self.busy(), time.perf_counter() - self.start
        if now is None or self.all is None or elapsed < 0.1:  # the system counts in units of 10 ms
            return None
        used = now - self.all - (sum(os.times()[:4]) - self.own)
        return round(max(0.0, used / elapsed), 2)


def three_digits(value: float) -> float:
    """A figure rounded as `duration` shows it, so that ratios follow from the shown figures."""
    return float(f"{value:.3g}")


def duration(us: float) -> str:
    """Microseconds with three digits, as us, ms or s."""
    for scale, unit in ((1e6, "s"), (1e3, "ms")):
        if us >= scale:
            return f"{us / scale:.3g} {unit}"
    return f"{us:.3g} us"


def factor(ratio: float) -> str:
    """A ratio with at least two digits."""
    return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.2g}x"
