"""Rows whose lists all ranks know, by the CPU engine's own code (csrc/cpu/split.cc)."""

from __future__ import annotations

from functools import partial
from struct import Struct

import torch

from fastsample.backends import DTYPES, Outputs
from fastsample.backends.cpu import native
from fastsample.backends.native import SPLIT_FIELDS, call_arguments, row_arguments
from fastsample.distributed.answers import Answers, answer_at
from fastsample.distributed.lists import Lists, RawLists
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
    count, wanted, keeps_all = len(x), plan.wanted[0] + 2 * plan.wanted[1], lists.with_mass is not lists.words
    sums = lists.words.new_empty(count, SUM_WORDS)
    bins = sums.new_empty(wire.size, count, 2 * BINS) if lists.flat else None
    # Of all else that is wanted of a row, its first tokens are listed.
    lists.tells_raw = lists.raw is not None or (lists.given and out.num_top <= lists.count)
    queries, raw_queries = plan.queries(count), plan.raw_queries(count) if lists.tells_raw else None
    split = _SPLIT.pack(
        *(part.start, vocab, wire.rank, wire.size),
        *(lists.with_mass.data_ptr(), lists.count + keeps_all, queries.data_ptr()),
        0 if raw_queries is None else raw_queries.data_ptr(),
        *(wanted, keeps_all, plan.measures(out) or lists.flat, plan.measures_at_all(out), lists.flat, plan.asks(out)),
        *(sums.data_ptr(), 0 if bins is None else bins.data_ptr()),
        *_raw_arguments(lists.raw, lists.given),
    )
    call, packed = call_arguments(x, out), rows.native or row_arguments(rows)
    parts = [part] if lists.raw is None else [part, lists.raw.own]
    answer = None if part.engine.name == "cpu" else partial(answer_at, parts)  # then the code here answers itself
    invalid, knows = native().sample_split(split, packed, call, get_num_threads(), wire.gather_at, answer)
    lists.sums = sums if knows else None
    lists.bins = bins
    lists.open = (out.status.view(-1, 1) == UNDECIDED) if invalid else None
    lists.tells_raw &= invalid != OPEN
    found: int = invalid
    return found


def _raw_arguments(raw: RawLists | None, given: bool) -> tuple[int, ...]:
    if raw is None:
        return (0,) * 7
    x = raw.own.x
    own = x.data_ptr(), x.stride()[0], DTYPES[x.dtype]
    return raw.words.data_ptr(), raw.count, raw.listed.data_ptr(), not given, *own
