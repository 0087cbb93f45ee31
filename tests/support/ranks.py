"""Ranks for tests: threads of one process, which exchange messages as a process group would, or processes with Gloo.

python ranks.py FILE FUNCTION FOLDER RANK SIZE SECONDS ARGUMENTS    # one of the processes
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastsample.distributed.wire import Wire


class ThreadWire(Wire):
    """One of `size` ranks that share a barrier and a place for each one's message."""

    def __init__(self, rank: int, barrier: threading.Barrier, messages: list[Any]) -> None:
        self.rank, self.size, self.rounds, self.sent = rank, len(messages), 0, 0
        self._barrier, self._messages = barrier, messages

    def gather(self, words: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return words.unsqueeze(0)
        self.rounds += 1
        self.sent += words.nbytes
        self._messages[self.rank] = words.clone()
        self._barrier.wait(60)
        shapes = {message.shape for message in self._messages}
        found = torch.stack(self._messages) if len(shapes) == 1 else None
        self._barrier.wait(60)
        assert found is not None, f"messages of different shapes: {shapes}"
        return found


def on_ranks(cuts: Sequence[int], do: Callable[[ThreadWire, int, int], Any]) -> list[Any]:
    """What do(wire, begin, end) returns on each rank, whose tokens are begin to end - 1."""
    size = len(cuts) - 1
    barrier, messages = threading.Barrier(size), [None] * size

    def one(rank: int) -> Any:
        try:
            return do(ThreadWire(rank, barrier, messages), cuts[rank], cuts[rank + 1])
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        waiting = [pool.submit(one, rank) for rank in range(size)]
        errors = [error for future in waiting if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in waiting]


def in_processes(
    function: Callable[..., Any], size: int, folder: Path, *arguments: Any, seconds: int = 60
) -> list[Any]:
    """What a function of a module returns in each of `size` processes, which are a Gloo group; None of one that left.

    Args:
        folder: an empty one.
        arguments: the function's, which JSON can hold.
        seconds: after which the group gives up.
    """
    path, name = function.__code__.co_filename, function.__name__
    given = [path, name, str(folder)], [str(size), str(seconds), json.dumps(arguments)]
    command = [sys.executable, "-W", "ignore", __file__, *given[0]]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen([*command, str(rank), *given[1]], stdout=-1, stderr=-1, text=True, env=env)
        for rank in range(size)
    ]
    try:
        ended = [rank.communicate(timeout=240) for rank in started]
    finally:
        for rank in started:
            rank.kill()
    for rank, (_, errors) in zip(started, ended, strict=True):
        assert rank.returncode == 0, errors[-4000:]
    found = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(path) if path.exists() else None for path in found]


def main() -> None:
    path, name, folder, rank, size, seconds, arguments = sys.argv[1:]
    module = _imported(path)
    timeout = timedelta(seconds=int(seconds))
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=int(size), timeout=timeout)
    torch.set_num_threads(1)
    found = getattr(module, name)(*json.loads(arguments))
    torch.save(found, Path(folder) / f"{rank}.pt")
    sys.stdout.flush()
    os._exit(0)  # a thread of Gloo's that still frees a tensor would abort while Python's interpreter ends


def _imported(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
