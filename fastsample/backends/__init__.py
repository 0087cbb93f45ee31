"""The engines that obey the contract, in the order in which `auto` tries them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from fastsample.inputs import Rows
from fastsample.outputs import InputKind, LogprobsMode
from fastsample.reports import Layout

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Dtypes of logits, each with its number in csrc/core/rows.h."""
MODES: dict[LogprobsMode | None, int] = {None: 0, "raw": 1, "processed": 2}
"""What log-probabilities are of, likewise."""
INPUTS: dict[str, int] = {"logits": 0, "probs": 1, "lists": 2}
"""What the rows hold, likewise. Lists are those of ranks, of rows that are split over these: for the CPU engine alone
(fastsample/distributed/split.py)."""


class Question(NamedTuple):
    """What a rank is asked about its part of rows that are split over ranks.

    Attributes:
        start: the id of its first token.
        queries: PartQuery (csrc/core/arguments.h) of each row, int64 [B, fields].
        number, wants: as csrc/cpu/question.h has them; csrc/cpu/part.h and owner.h say what is answered.
        words: of an answer.
        details: int64 [B, n], of the question.
        bitmask: int32 [B, ceil(V_r / 32)], to fill with the tokens of a kept set.
    """

    start: int
    queries: torch.Tensor
    number: int
    wants: int
    words: int
    details: torch.Tensor | None = None
    bitmask: torch.Tensor | None = None


@dataclass(slots=True)
class Outputs:
    """Contiguous buffers for an engine to fill; None means not wanted. Dimensions of size 1 may be missing."""

    status: torch.Tensor  # int32 [B]
    tokens: torch.Tensor | None = None  # int64 [B, num_samples]
    filtered: torch.Tensor | None = None  # float32 [B, V]
    probabilities: torch.Tensor | None = None  # float32 [B, V]
    mode: LogprobsMode | None = None  # what the four below are of
    logprobs: torch.Tensor | None = None  # float32 [B, num_samples]
    ranks: torch.Tensor | None = None  # int64 [B, num_samples]
    top_ids: torch.Tensor | None = None  # int64 [B, num_top]
    top_logprobs: torch.Tensor | None = None  # float32 [B, num_top]
    weights: torch.Tensor | None = None  # int64 [B, 2], the mass of the token and of all, in the law of draw 0
    masses: torch.Tensor | None = None  # int64 [B, V], of every token; never without the weights, like `given`
    given: torch.Tensor | None = None  # int64 [B], kept tokens that are not drawn; what is no token is drawn
    kept_count: torch.Tensor | None = None  # int32 [B], like the next three in every call that draws tokens
    kept_bitmask: torch.Tensor | None = None  # int32 [B, ceil(V / 32)]
    log_kept_mass: torch.Tensor | None = None  # float32 [B]
    entropy: torch.Tensor | None = None  # float32 [B]
    num_samples: int = 1
    num_top: int = 0
    input: InputKind = "logits"  # what the rows hold
    names: tuple[str, ...] | None = None  # of the buffers besides status and tokens, where they are known to stay
    advance: bool = False  # add 1 to every row's offset in passing; only for engines that do
    restore: bool = False  # put back what they held where a row is invalid; only for engines that can


@runtime_checkable
class Engine(Protocol):
    """One implementation of the contract."""

    name: str
    restores: bool = False
    """Whether it can put back what buffers held."""

    advances: bool = False
    """Whether `run` can advance offsets in passing, which saves a launch."""

    def why_not(self, logits: torch.Tensor | None) -> str | None:
        """Why this engine cannot serve these logits (None: any at all), or None when it can."""

    def run(self, logits: torch.Tensor, rows: Rows, out: Outputs) -> int | None:
        """Fill `out` from logits [B, V].

        Returns the number of invalid rows, or None where to know it would mean waiting for the device.
        """

    takes_parts: bool = False
    """Whether logits may be a part of rows (`Rows.part`), whose ids and biases are of the whole rows."""

    verifies: bool = False
    """Whether it has `verify`, which saves time: other engines sample all rows, and what comes out is found after."""

    def verify(
        self,
        table: torch.Tensor,
        rows: Rows,
        out: Outputs,
        ids: torch.Tensor,
        accepted: torch.Tensor,
        ends: torch.Tensor,
    ) -> int | None:
        """Fill `out` from the K + 1 rows of each request, one behind the other, as far as its drafts are right.

        Args:
            table: [B (K + 1), V].
            rows: seeds and offsets are those of a request's first row; all else is of each row.
            out: the tokens and what goes with them, of each row; padding after each result.
            ids: int64 [B, K], the drafts.
            accepted, ends: int32 [B], to fill with the number of accepted drafts and the status after them.

        Returns the number of results that end at an invalid row, or None where to know it would mean waiting.
        """
        raise RuntimeError(f"engine {self.name!r} samples rows, and does not look at drafts")

    rejection: Any = None
    """What compares laws of rows that only it can read, in place of `fastsample.rejection.Rejection`."""

    reports: bool = False
    """Whether it has `report`, which saves time where a step takes microseconds."""

    def report(self, logits: torch.Tensor, rows: Rows, out: Outputs, layout: Layout) -> tuple[int, bytearray]:
        """`run`, with the layout's outputs in memory of their own; what that returns, and the memory."""
        raise RuntimeError(f"engine {self.name!r} fills the tensors that it is given")

    def end_kept(self, counts: torch.Tensor, capacity: int, row_ptr: torch.Tensor) -> int | None:
        """Fill int64 [B + 1] with where each row's ids begin, and end, given B counts; how many there are in all.

        A row that has more than `capacity`, if that is not 0, lists none. Returns None where to know it would mean
        waiting for the device.
        """
        counts = counts.view(-1)
        if capacity:
            counts = counts.masked_fill(counts > capacity, 0)
        row_ptr[:1].zero_()
        torch.cumsum(counts, 0, out=row_ptr[1:])
        return None if counts.is_cuda else int(row_ptr[-1])

    def list_kept(self, bitmask: torch.Tensor, row_ptr: torch.Tensor, ids: torch.Tensor) -> None:
        """Write the ids of each row's set to ids[row_ptr[i] : row_ptr[i + 1]], ascending, and -1 past the last.

        Args:
            bitmask: int32 [B, words], the sets.
            row_ptr: int64 [B + 1], what `end_kept` made of the counts; a row without a place is left out.
            ids: int32.
        """
        places = torch.arange(32, dtype=torch.int32, device=bitmask.device)
        bits = ((bitmask[:, :, None] >> places) & 1).flatten(1).bool() & (row_ptr.diff() > 0)[:, None]
        listed = bits.nonzero()[:, 1]
        ids.fill_(-1)
        ids[: len(listed)] = listed.to(ids.dtype)

    def answers(self) -> bool:
        """Whether it has `answer`; where it has not, PyTorch answers (`fastsample.distributed.shard.Shard`)."""
        return False

    def answer(self, x: torch.Tensor, question: Question) -> torch.Tensor:
        """What a rank of rows that are split over ranks tells the others, int64 [B, words].

        Args:
            x: logits [B, V_r], the rank's part of the rows, one token or more.
        """
        raise RuntimeError(f"engine {self.name!r} answers nothing about parts of rows")

    def advance(self, rows: Rows) -> None:
        """Add 1 to every offset, in place and in the order of the device's other work."""
        rows.offsets += 1


ORDER = ("cuda", "triton", "cpu", "reference")
"""Engine names, fastest first where several can serve; each is the module of that name."""


@cache
def engine(name: str) -> Engine:
    """The engine of that name; imported on first use, so that `import fastsample` loads no compiler and no driver."""
    if name not in ORDER:
        raise ValueError(_unknown(name))
    found: Engine = import_module(f"fastsample.backends.{name}").ENGINE
    return found


def _unknown(name: object, said: str = "backend") -> str:
    return f"{said} = {name!r}: expected 'auto' or one of {', '.join(map(repr, ORDER))}"


def select(backend: str | Engine, logits: torch.Tensor) -> Engine:
    """The engine for these logits. `auto` takes the first that can; any other name serves or raises with the reason."""
    said = "backend"
    if not isinstance(backend, str):  # may not even be hashable
        if isinstance(backend, Engine):
            return backend
        raise ValueError(_unknown(backend, said))
    if backend == "auto" and (wanted := os.environ.get("FASTSAMPLE_BACKEND")):
        backend, said = wanted, "FASTSAMPLE_BACKEND"
    if backend != "auto":
        if backend not in ORDER:
            raise ValueError(_unknown(backend, said))
        chosen = engine(backend)
        reason = chosen.why_not(logits)
        if reason is not None:
            raise RuntimeError(f"{said} {backend!r} cannot serve these logits: {reason}")
        return chosen
    for name in ORDER[:-1]:
        if (found := engine(name)).why_not(logits) is None:
            return found
    return engine(ORDER[-1])  # serves whatever there is


def engines() -> dict[str, str | None]:
    """What can run here: engine name -> None where it can, else the reason why not, in the order `auto` tries them."""
    return {name: engine(name).why_not(None) for name in ORDER}
