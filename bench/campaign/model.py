"""What a step of the CUDA engine should take, from counts and constants: a prediction, not a measurement.

The counts are those of csrc/cuda on fibers, which tests hold (tests/engines/test_cuda_costs.py). The constants are
guesses, from what others have published of an H100, until `python -m bench gpu --step micro` has measured them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Counted:
    """What one row costs: barriers of its cluster, passes over the held row, wavefronts of shared memory per block."""

    barriers: int
    passes: float
    wavefronts: int


COUNTED = {
    ("k50 p.9", "float32"): Counted(3, 1.0, 3401),
    ("k50 p.9", "bfloat16"): Counted(3, 1.0, 2897),
    ("T", "float32"): Counted(3, 1.01, 1501),
    ("greedy", "float32"): Counted(2, 0.0, 661),
}
"""Of V = 128256 on an H100: a cluster of 8 blocks."""


@dataclass(frozen=True)
class Constants:
    """Of a GPU. Whatever micro.cu has not measured is a guess."""

    clock: float = 1.755e9  # Hz
    bandwidth: float = 3.0e12  # bytes/s of device memory, all multiprocessors together
    sm_bandwidth: float = 64.0  # bytes a cycle that one multiprocessor gets from the L2 cache
    latency: float = 800.0  # cycles of a load from device memory
    barrier: float = 500.0  # cycles of a cluster's barrier with its fence
    launch: float = 2.0e-6  # s between two kernels of a graph
    multiprocessors: int = 132
    clusters: int = 32  # of 8 blocks that are resident at once
    issue: float = 4.0  # warp instructions a cycle and multiprocessor
    scan: float = 8.0  # instructions a logit of the first pass
    collect: float = 4.0  # of a pass that compares, each logit once
    weigh: float = 30.0  # of a pass that computes masses
    finish: float = 2500.0  # cycles in which the leader sorts, filters and draws, and nobody else works


GUESSED = Constants()
PARTS, VOCAB, AHEAD, THREADS = 8, 128256, 8, 256


def step(mode: str, dtype: str, rows: int, c: Constants = GUESSED) -> float:
    """Seconds of a step, cold, in a graph."""
    counted = COUNTED[mode, dtype]
    itemsize = 4 if dtype == "float32" else 2
    share = VOCAB / PARTS
    resident = min(rows, c.clusters)
    turns = math.ceil(rows / resident)
    batches = math.ceil(share * itemsize / (16 * AHEAD * THREADS))
    alone = share * itemsize / c.sm_bandwidth + batches * c.latency
    together = resident * VOCAB * itemsize / c.bandwidth * c.clock
    work = c.scan + counted.passes * (c.collect if mode.startswith("k") else c.weigh)
    # Two blocks share a multiprocessor, and its issue slots, once there are as many.
    per_sm = max(1.0, resident * PARTS / c.multiprocessors)
    instructions = share * work / 32 / c.issue * per_sm
    ends = c.finish if mode.startswith("k") else c.finish / 4
    row = max(alone, together) + instructions + counted.wavefronts + (counted.barriers - 1) * c.barrier + ends
    # While one cluster of a multiprocessor computes, the other loads.
    overlapped = max(together, row / 2) if per_sm > 1 and turns > 1 else row
    return c.launch + (row + (turns - 1) * overlapped) / c.clock


def table() -> str:
    """The four targets of the cluster policy, as Markdown."""
    lines = ["| k50 p.9, V = 128256 | aimed at | predicted |", "|---|---|---|"]
    for rows, dtype, aim in ((1, "float32", 12), (64, "float32", 25), (64, "bfloat16", 18), (256, "float32", 55)):
        lines.append(f"| B = {rows}, {dtype} | {aim} us | {step('k50 p.9', dtype, rows) * 1e6:.0f} us |")
    return "\n".join(lines)
