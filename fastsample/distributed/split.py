"""Rows whose lists all ranks know, by the CPU engine's own code (csrc/cpu/split.cc)."""

from __future__ import annotations

from dataclasses import replace
from struct import Struct

import torch

from fastsample.backends import Outputs
from fastsample.backends.cpu import native
from fastsample.backends.native import SPLIT_FIELDS, call_arguments, row_arguments
from fastsample.distributed.keys import NO_KEY, value_of
from fastsample.distributed.lists import Lists
from fastsample.distributed.plan import Plan, is_of_tokens
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
    wire: Wire, x: Tensor, start: int, vocab: int, plan: Plan, lists: Lists, rows: Rows, out: Outputs
) -> int | None:
    """Stages 7 and 8 of rows whose lists all ranks know, by these and by what ranks then tell; OPEN where that leaves
    some row undecided. `lists` gets what is known of it then.

    Args:
        x: [B, V_r], this rank's part of the rows, of the tokens from `start` on.
    """
    count, wanted = len(x), plan.wanted[0] + 2 * plan.wanted[1]
    sums = lists.words.new_empty(count, SUM_WORDS)
    raw = keys = raw_queries = None
    if lists.given:
        raw, raw_queries = sums.new_zeros(count, 1), plan.raw_queries(count)
        keys = sums.new_full((count, out.num_samples), NO_KEY)
    bins = sums.new_empty(count, wire.size, 2 * BINS) if lists.flat else None
    queries, told = plan.queries(count), (sums, bins, raw, keys)
    split = _SPLIT.pack(
        *(start, vocab, wire.rank, wire.size, lists.words.data_ptr(), lists.count, queries.data_ptr()),
        0 if raw_queries is None else raw_queries.data_ptr(),
        *(wanted, plan.measures(out) or lists.flat, plan.measures_at_all(out), lists.flat, plan.asks(out)),
        *(0 if table is None else table.data_ptr() for table in told),
    )
    call, packed = call_arguments(x, _own_outputs(out)), rows.native or row_arguments(rows)
    invalid, knows = native().sample_split(split, packed, call, get_num_threads(), wire.gather_at)
    found: int = invalid
    lists.sums = sums if knows else None
    lists.bins = None if bins is None else bins.transpose(0, 1)
    lists.open = (out.status.view(-1, 1) == UNDECIDED) if invalid else None
    if keys is not None and bool((spread := keys > NO_KEY).any()):
        assert out.tokens is not None
        listed = lists.logits_of(out.tokens.view(count, -1))
        lists.own = torch.where(spread, value_of(keys), listed)
    if knows or lists.own is None:
        lists.raw = raw
    return found


def _own_outputs(out: Outputs) -> Outputs:
    """Without raw log-probabilities, which lists do not tell."""
    if is_of_tokens(out):
        return Outputs(out.status, out.tokens, num_samples=out.num_samples, names=())
    own = replace(out, names=None, restore=False)
    if out.mode == "raw":
        own.mode = own.logprobs = own.ranks = own.top_ids = own.top_logprobs = None
    return own
