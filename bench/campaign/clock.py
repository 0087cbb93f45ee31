"""Microseconds of a step on a GPU: captured calls, on inputs that exceed the L2 cache (cold) and on one (hot)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from bench.modes import make_logits

REPLAYS = 5
MOST = 256  # calls in a graph

Call = Callable[[], Any]


def l2_bytes() -> int:
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 * 2**20))


def turns(input_bytes: int, cache: int) -> int:
    """How many inputs exceed twice the cache; at least 2."""
    return min(MOST, max(2, math.ceil(2 * cache / input_bytes)))


def make_inputs(batch: int, vocab: int, dtype: str, device: torch.device) -> list[torch.Tensor]:
    """Alternating logits [batch, vocab]: a few rows of a language model, rolled by different numbers of ids."""
    rows = make_logits("lm", min(batch, 8), vocab, getattr(torch, dtype)).to(device)
    first = torch.cat([rows.roll(977 * i, -1) for i in range(-(-batch // len(rows)))])[:batch].contiguous()
    count = turns(first.nbytes, l2_bytes()) if device.type == "cuda" else 2
    return [first] + [first.roll(97 * i, -1) for i in range(1, count)]


def timed(calls: Sequence[Call], device: torch.device) -> tuple[float, bool]:
    """Microseconds per call, the median of several replays, and whether a graph could be captured.

    On a CPU, in a rehearsal, the calls run once.
    """
    if device.type == "cpu":
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e6 / len(calls), False
    stream = lane()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        calls[0]()
        stream.synchronize()
        replay, captured = capture(calls, stream)
        replay()
        return median_replay(replay) / len(calls), captured


@cache
def lane() -> torch.cuda.Stream:
    """The stream of all that is timed: on a new one each engine would begin with new workspaces."""
    return torch.cuda.Stream()


def capture(calls: Sequence[Call], stream: torch.cuda.Stream) -> tuple[Call, bool]:
    """All calls as a graph, captured on the very stream where they will run, whose workspaces they have used before.

    Captured on another, a call would meet buffers that are new, and every replay would clear them first.
    """

    def all_of_them() -> None:
        for call in calls:
            call()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            all_of_them()
    except RuntimeError:
        torch.cuda.synchronize()
        return all_of_them, False
    return graph.replay, True


def median_replay(replay: Call) -> float:
    """Microseconds of one replay on the current stream."""
    samples = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3)
    return sorted(samples)[REPLAYS // 2]


def cold_and_hot(steps: Sequence[Call], device: torch.device) -> dict[str, Any]:
    """Figures of steps that do the same on other inputs."""
    cold, captured = timed(steps, device)
    hot, _ = timed([steps[0]] * min(len(steps), 16), device)
    return {"cold_us": round(cold, 3), "hot_us": round(hot, 3), "graph": captured}
