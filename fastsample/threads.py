"""How many threads the CPU engine spreads the rows of a batch over."""

from __future__ import annotations

import torch

from fastsample.checks import whole

MAX_THREADS = 4096
_chosen: int | None = None


def set_num_threads(n: int | None) -> None:
    """Spread rows over 1 <= n <= 4096 threads from the next call on; None goes back to torch's number.

    Tokens do not depend on it.

    On Linux the engine's threads keep off the core of the thread that calls, within those of the process; a call does
    not wait for a thread that is slow to wake.

    Raises:
        TypeError, ValueError: n is neither None nor an integer, or not between 1 and 4096.
    """
    if n is not None and not 1 <= (n := whole("n", n)) <= MAX_THREADS:
        raise ValueError(f"n = {n}: expected 1 <= n <= {MAX_THREADS} threads, or None for torch's number")
    global _chosen
    _chosen = n


def get_num_threads() -> int:
    """Threads that the CPU engine uses: what `set_num_threads` chose, else `torch.get_num_threads()`."""
    return torch.get_num_threads() if _chosen is None else _chosen
