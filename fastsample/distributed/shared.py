"""Memory that the ranks of one machine share: a message through it takes a few microseconds."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from collections.abc import Callable
from datetime import timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any
from weakref import finalize

import torch

from fastsample.backends import engines
from fastsample.backends.cpu import native

Tensor = torch.Tensor

FOLDER = Path("/dev/shm")
ROOM = 256 * 1024  # bytes of a message; longer ones go in parts
TIMED_OUT, GONE, OTHER_SIZE, STOPPED = range(1, 5)


class SharedMemory:
    """Memory that each rank of a group has mapped.

    It has no name any more, so that it goes with the last of their processes.

    Args:
        file: a descriptor of it, which is closed.
        processes: a descriptor of each rank's process.
        timeout: how long to wait for a rank.
    """

    def __init__(self, file: int, rank: int, processes: list[int], timeout: timedelta) -> None:
        with contextlib.closing(os.fdopen(file, "r+b", buffering=0)) as memory:
            mapped = mmap.mmap(memory.fileno(), native().exchange_bytes(len(processes), ROOM))
        self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
        self._rank, self._processes, self._seconds = rank, processes, timeout.total_seconds()
        self._round, self._broken = 0, False
        finalize(self, _close, processes)

    def exchange(self, own: int, size: int, found: int) -> tuple[int, int]:
        """Give every other rank so many bytes at an address, and put everybody's where `found` [R, bytes] is.

        Returns:
            0 and -1; or what has failed, and because of which rank. From then on nothing can be exchanged any more.
        """
        if self._broken:
            raise RuntimeError("group: an earlier message between its ranks has failed")
        self._broken = True
        at = self._memory.data_ptr(), ROOM, self._rank, len(self._processes), self._round
        what, rank, self._round = native().exchange(*at, own, size, found, self._seconds, self._processes)
        self._broken = what != 0
        return what, rank


def open_shared(rank: int, size: int, timeout: timedelta, gather: Callable[[Tensor], Tensor]) -> SharedMemory | None:
    """Memory for ranks whose processes are all on this machine and see each other; None where some are not.

    Args:
        timeout: how long ranks wait for each other.
        gather: gives what every rank gives, int64 [R, n] of [n]; every rank must make the same call.
    """
    name, file = secrets.randbits(62), -1
    if rank == 0:
        file = _try(_create, name, size)
    told = gather(torch.tensor([_machine(), name, os.getpid(), int(file >= 0 or rank > 0)])).tolist()
    path, processes = _path(told[0][1]), []
    if all(machine == told[0][0] and fine for machine, _, _, fine in told):
        file = file if rank == 0 else _try(os.open, path, os.O_RDWR | os.O_CLOEXEC)
        processes = [_try(_open_process, pid) for _, _, pid, _ in told]
    fine = file >= 0 and bool(processes) and min(processes) >= 0
    all_fine = bool(gather(torch.tensor([int(fine)])).all())
    if rank == 0:
        path.unlink(missing_ok=True)
    if all_fine:
        return SharedMemory(file, rank, processes, timeout)
    _close([file, *processes])
    return None


def _path(name: int) -> Path:
    return FOLDER / f"fastsample-{name:016x}"


def _create(name: int, size: int) -> int:
    """A file of zeros, whose memory is there."""
    path = _path(name)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(file, 0, native().exchange_bytes(size, ROOM))
    except OSError:
        os.close(file)
        path.unlink()
        raise
    return file


def _open_process(pid: int) -> int:
    return os.pidfd_open(pid)


def _try(open_: Callable[..., int], *given: Any) -> int:
    """A descriptor, -1 where there is none to be had."""
    try:
        return open_(*given)
    except (OSError, AttributeError, RuntimeError):  # of systems that have no such thing, or no CPU engine
        return -1


def _close(descriptors: list[int]) -> None:
    for opened in descriptors:
        if opened >= 0:
            os.close(opened)


def _machine() -> int:
    """A number that processes share which see the same processes on the same machine; else one of its own."""
    known: Any = secrets.token_hex()
    if engines()["cpu"] is None:
        with contextlib.suppress(OSError):
            namespace, boot = os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text()
            known = boot, namespace, FOLDER.stat().st_dev
    return int.from_bytes(blake2b(repr(known).encode(), digest_size=8).digest(), "little", signed=True)
