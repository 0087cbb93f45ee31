"""Searches of rows that are split over ranks, and where draws from them fall: what the CPU engine's own code makes of
all ranks' answers (csrc/cpu/search.cc), whichever engines these are from."""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

import torch

from fastsample.backends.cpu import native
from fastsample.backends.native import PART_FIELDS
from fastsample.distributed.keys import Kept, bits_of, by_row, narrow_above, narrow_below
from fastsample.distributed.shard import Shard
from fastsample.distributed.wire import Wire

Tensor = torch.Tensor

BY_MASS, BY_NUMBER, BY_DISTANCE = range(3)
MOST_TOLD = 4096
"""Tokens that a rank may tell of where a search ends: 32 KB, as much as its bins."""

_UNCERTAIN, _NEAR_SIDE, _THRESHOLDS = range(3)
_ASK = Struct(f"{len(PART_FIELDS)}q")


@dataclass
class Near:
    """What a search has found.

    Attributes:
        rows: int64 [b], the rows that were searched.
        kept: of these, with the tokens up to the place that was looked for.
        mass: int64 [R, b], what each rank has of that.
        tokens: int64 [R, b], and how many.
    """

    rows: Tensor
    kept: Kept
    mass: Tensor
    tokens: Tensor

    def shares(self, rows: Tensor, kept: Kept) -> tuple[Tensor, Tensor] | None:
        """Masses and numbers of tokens, if these rows are the same and keep nothing else."""
        if not torch.equal(rows, self.rows) or not all(map(torch.equal, kept, self.kept)):
            return None
        return self.mass, self.tokens


def find(
    wire: Wire,
    shard: Shard,
    kept: Kept,
    rows: Tensor,
    bins: Tensor,
    target: Tensor,
    by: int,
    mean: Tensor | None = None,
) -> Near | None:
    """Narrow a set to the tokens that reach a target, in rank order or by their distance from a mean: one message, of
    the tokens in those bins where the place may be. None where these are too many.

    Args:
        shard, kept, target, mean: of `rows` int64 [b]; the last two int64 and float32 [b, 1].
        bins: what `Shard.bins` has answered on each rank, int64 [R, b, ...].
    """
    how = torch.tensor([[wire.size, by]], device=rows.device).expand(len(rows), 2)
    mean = torch.zeros_like(shard.peak) if mean is None else mean
    details, queries = torch.cat([how, target, bits_of(mean), by_row(bins)], 1), shard.queries()
    uncertain = search(_UNCERTAIN, queries, details, 5)
    if (most := int(uncertain[:, 4].max())) > MOST_TOLD:
        return None
    if most:
        told = by_row(wire.gather(shard.within(kept, uncertain[:, :4], most)))
        details = torch.cat([details, told], 1)
    found = search(_NEAR_SIDE, queries, details, 2 + 2 * wire.size)
    kept = narrow_above(narrow_below(kept, found[:, :1]), found[:, 1:2])
    return Near(rows, kept, *found[:, 2:].view(len(rows), 2, wire.size).permute(1, 2, 0))


def thresholds(rank: int, shares: Tensor, streams: Tensor, queries: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Where draws fall in a rank's running mass, int64 [b, n] as `Shard.draws` takes them, and which of them leave
    XTC's top choices out, bool [b, n].

    Args:
        shares: int64 [R, b, 2], the masses of the set, and of that without top choices.
        streams: int64 [b, 2], seeds and offsets.
    """
    which = torch.tensor([[rank, len(shares)]], device=streams.device).expand(len(streams), 2)
    found = search(_THRESHOLDS, queries, torch.cat([streams, which, by_row(shares)], 1), 2 * draws)
    return found[:, :draws].contiguous(), found[:, draws:].bool()


def search(question: int, queries: Tensor, details: Tensor, words: int) -> Tensor:
    """Answers about rows, int64 [b, words]; `queries` has PartQuery of each, int64 [b, fields]."""
    device = details.device
    if device.type != "cpu":
        queries, details = queries.cpu(), details.cpu()
    answers = torch.empty(len(details), words, dtype=torch.int64)
    given, into = (details.shape[1], details.data_ptr()), (answers.data_ptr(), words)
    native().search(_ASK.pack(queries.data_ptr(), 0, question, 0, *given, *into, 0), len(details))
    return answers if device.type == "cpu" else answers.to(device)
