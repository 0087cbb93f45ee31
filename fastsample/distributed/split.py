"""Rows whose lists all ranks know, by the CPU engine's own code (csrc/cpu/split.cc)."""

from __future__ import annotations

from functools import partial
from struct import Struct

import torch

from fastsample.backends import DTYPES, Outputs
from fastsample.backends.cpu import native
from fastsample.backends.native import SPLIT_FIELDS, call_arguments, row_arguments
from fastsample.distributed.answers import Answers, answer_at
from fastsample.distributed.lists import Lists
from fastsample.distributed.plan import Plan
from fastsample.distributed.shard import BINS, SUM_WORDS
from fastsample.distributed.wire import Wire
from fastsample.inputs import Rows
from fastsample.threads import get_num_threads

Tensor = torch.Tensor

UNDECIDED = -1
"""In place of a row's status: ranks must tell more to decide it."""
OPEN = -1
"""In place of a number of invalid rows: some row is undecided."""

_SPLIT = Struct(f"{len(SPLIT_FIELDS)}q")


def sample_split(
    wire: Wire, part: Answers, vocab: int, plan: Plan, lists: Lists, rows: Rows, out: Outputs
) -> int | None:
    """Stages 7 and 8 of rows whose lists all ranks know, by these and by what ranks then tell; OPEN where that leaves
    some row undecided. `lists` gets what is known of them then. If these have masses, rows keep everything.

    Args:
        part: this rank's, which may be on another device than all else.
    """
    x = part.x
    told, given, wanted = lists.told, lists.given.x, plan.wanted[0] + 2 * plan.wanted[1]
    count, width = told.shape[1:]
    sums = told.new_empty(count, SUM_WORDS)
    bins = told.new_empty(wire.size, count, 2 * BINS) if lists.judges else None
    split = _SPLIT.pack(
        *(part.start, vocab, wire.rank, wire.size, told.data_ptr(), width, lists.count, lists.raw_count),
        *(lists.with_mass, lists.judges, lists.tells_edits, plan.queries(count).data_ptr()),
        plan.raw_queries(count).data_ptr() if out.mode == "raw" else 0,
        *(wanted, plan.measures(out), plan.measures_at_all(out), plan.asks(out)),
        *(sums.data_ptr(), 0 if bins is None else bins.data_ptr()),
        *(given.data_ptr(), given.stride()[0], DTYPES[given.dtype]),
    )
    call, packed = call_arguments(x, out), rows.native or row_arguments(rows)
    # If the CPU engine answers, the code here does.
    answer = None if part.engine.name == "cpu" else partial(answer_at, (part, lists.given))
    invalid, knows, raw = native().sample_split(split, packed, call, get_num_threads(), wire.gather_at, answer)
    lists.sums = sums if knows else None
    lists.bins = bins
    lists.open = (out.status.view(-1, 1) == UNDECIDED) if invalid else None
    lists.tells_raw = raw
    found: int = invalid
    return found
