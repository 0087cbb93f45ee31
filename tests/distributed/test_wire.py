"""Messages between ranks: through memory that they share, and as Gloo carries them where they share none."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import in_processes

from fastsample.backends.cpu import native
from fastsample.distributed import shared
from fastsample.distributed.wire import Wire, memories

SECONDS = 3
BY_GLOO = {"memory": False, "gloo": True}


def message(rank: int, words: int, turn: int) -> torch.Tensor:
    return torch.randint(-(2**62), 2**62, (words,), generator=torch.Generator().manual_seed(1000 * turn + rank))


def on_threads(size: int, do: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(do, range(size)))


@pytest.mark.parametrize("room", [8, 64, 1000, 4096])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_messages_of_any_length_arrive(size: int, room: int) -> None:
    """Shorter and longer than a place of the memory, which is used again and again; no rank is faster than others."""
    memory = torch.zeros(native().exchange_bytes(size, room) + 64, dtype=torch.uint8)
    at = (memory.data_ptr() + 63) // 64 * 64
    ended = [os.pidfd_open(os.getpid())] * size
    lengths = [1, 0, 7, 200, 3, 1, 1, 1, 50] * 3

    def one(rank: int) -> list[torch.Tensor]:
        turns, found = 0, []
        for turn, words in enumerate(lengths):
            own, all_ = message(rank, words, turn), torch.zeros(size, words, dtype=torch.int64)
            given = own.data_ptr(), own.nbytes, all_.data_ptr(), 60.0, ended
            what, _, turns = native().exchange(at, room, rank, size, turns, *given)
            assert what == 0
            found.append(all_)
        return found

    for found in on_threads(size, one):
        for turn, (words, all_) in enumerate(zip(lengths, found, strict=True)):
            assert torch.equal(all_, torch.stack([message(rank, words, turn) for rank in range(size)]))
    os.close(ended[0])


def exchanged(by_gloo: bool, room: int) -> list[Any]:
    """What arrives, by which way, and what it leaves behind."""
    before = set(os.listdir(shared.FOLDER))
    with patch.object(shared, "ROOM", room):
        wire = _wire(by_gloo)
        found = [wire.gather(message(wire.rank, 1 + 37 * turn, turn)) for turn in range(20)]
    left = [name for name in set(os.listdir(shared.FOLDER)) - before if name.startswith("fastsample")]
    return [found, memories[dist.group.WORLD] is not None, left, (wire.rounds, wire.sent)]


def _wire(by_gloo: bool) -> Wire:
    if by_gloo:
        memories[dist.group.WORLD] = None
    return Wire(None)


@pytest.mark.parametrize("by_gloo", BY_GLOO.values(), ids=BY_GLOO)
def test_processes_exchange_messages(by_gloo: bool, tmp_path: Path) -> None:
    size = 3
    expected = [torch.stack([message(rank, 1 + 37 * t, t) for rank in range(size)]) for t in range(20)]
    counts = 20, 8 * sum(1 + 37 * t for t in range(20))
    for found, by_memory, left, counted in in_processes(exchanged, size, tmp_path, by_gloo, 1024):
        assert all(map(torch.equal, found, expected))
        assert by_memory is not by_gloo
        assert not left
        assert counted == counts


def hindered(what: str) -> list[Any]:
    """Where one rank cannot have the memory, none uses it."""
    hindrances = {
        "another machine": patch.object(shared, "_machine", lambda: 100 + dist.get_rank()),
        "no folder": patch.object(shared, "FOLDER", Path("/no/such/folder")),
        "no room": patch.object(shared, "ROOM", 2**60),
        "no descriptors": patch.object(shared, "_open_process", lambda pid: os.pidfd_open(2**22 + 1)),
    }
    before = len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    wire = Wire(None)
    if what == "another machine" or dist.get_rank() == 0:
        with hindrances[what]:
            found = wire.gather(message(wire.rank, 5, 0))
    else:
        found = wire.gather(message(wire.rank, 5, 0))
    left = [name for name in set(os.listdir("/dev/shm")) - before[1] if name.startswith("fastsample")]
    return [found, memories[dist.group.WORLD] is None, len(os.listdir("/proc/self/fd")) - before[0], left]


@pytest.mark.parametrize("what", ["another machine", "no folder", "no room", "no descriptors"])
def test_ranks_that_share_no_memory_still_exchange(what: str, tmp_path: Path) -> None:
    for found, by_gloo, descriptors, left in in_processes(hindered, 2, tmp_path, what):
        assert torch.equal(found, torch.stack([message(rank, 5, 0) for rank in range(2)]))
        assert by_gloo
        assert descriptors <= 0
        assert not left


def failing(how: str, by_gloo: bool) -> list[Any]:
    wire = _wire(by_gloo)
    wire.gather(torch.zeros(1, dtype=torch.int64))
    if dist.get_rank() == 1 and how == "ends":
        os._exit(0)
    if dist.get_rank() == 1 and how == "is late":
        time.sleep(SECONDS + 3)
    begun = time.monotonic()
    told = []
    for _ in range(2):  # and what comes after a failure
        try:
            wire.gather(torch.zeros(2 + (how == "differs") * dist.get_rank(), dtype=torch.int64))
        except RuntimeError as error:
            told.append(str(error))
    return [told, time.monotonic() - begun]


@pytest.mark.parametrize(
    ("how", "by_gloo", "text"),
    [
        ("ends", False, "rank 0 of 2: lost the connection to rank 1 in round 2"),
        ("ends", True, "rank 0 of 2: lost the connection to rank 1 in round 2"),
        ("is late", False, "rank 0 of 2: no answer from rank 1 in round 2"),
        ("is late", True, "rank 0 of 2: no answer from rank 1 in round 2"),
        ("differs", False, "rank 0 of 2: rank 1 has sent a message of another size in round 2"),
    ],
)
def test_a_rank_that_fails_is_named(how: str, by_gloo: bool, text: str, tmp_path: Path) -> None:
    told, seconds = in_processes(failing, 2, tmp_path, how, by_gloo, seconds=SECONDS)[0]
    assert told[0].startswith(text), told
    assert seconds < 2 * SECONDS + 3
    if not by_gloo:
        assert told[1] == "group: an earlier message between its ranks has failed"
