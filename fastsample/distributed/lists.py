"""What ranks list of each row, its first tokens, as words: the bits of a logit above those of its id."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastsample.backends import Engine, Outputs
from fastsample.buffers import empty
from fastsample.distributed.keys import IDS
from fastsample.distributed.local import neutral
from fastsample.inputs import Rows
from fastsample.kept import fill_lists
from fastsample.reference.process import NAN, POSITIVE_INFINITY

Tensor = torch.Tensor


@dataclass
class Lists:
    """What all ranks list of each row.

    Attributes:
        words: int64 [B, N], in id order. A row that is invalid has a NaN, or an infinity, in front of some list.
        with_mass: int64 [B, ...], the same where each list ends in the mass of the rank's tokens, beside the first of
            these; otherwise the words themselves.
        sums: int64 [B, 9], `Shard.sums` of the whole rows, once they are known.
        given: whether it is known that these are logits as they were given.
        raw: int64 [B, 1], the mass of the whole rows at temperature 1, if that is known.
    """

    words: Tensor
    with_mass: Tensor
    sums: Tensor | None = None
    given: bool = False
    raw: Tensor | None = None

    @classmethod
    def of(cls, found: Tensor, count: int) -> Lists:
        """Of each rank's lists of `count` tokens, int64 [R, B, count or count + 1]."""
        words = by_row(found[:, :, :count])
        return cls(words, words if found.shape[2] == count else by_row(found))

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """Logits float32 [B, N], and ids int64 [B, N]; -inf and -1 past the end of each list."""
        ids = self.words & IDS
        return (self.words >> 32).to(torch.int32).view(torch.float32), torch.where(ids < IDS, ids, -1)


def by_row(found: Tensor) -> Tensor:
    """What ranks have told of each row, int64 [B, R n], given [R, B, n]."""
    ranks, rows, n = found.shape
    return found.transpose(0, 1).reshape(rows, ranks * n).contiguous()


def words_of(x: Tensor, ids: Tensor) -> Tensor:
    """int64, given float32 x and ids of -1 where there is no token."""
    found: Tensor = (x.view(torch.int32).to(torch.int64) << 32) | (ids & IDS)
    return found


def no_words(rows: int, count: int, device: torch.device) -> Tensor:
    """Lists of no tokens."""
    return words_of(torch.full((rows, count), -torch.inf, device=device), torch.tensor(-1, device=device))


def mark_invalid(words: Tensor, status: Tensor | None) -> Tensor:
    """Put a NaN, or an infinity, in front of the lists of rows of that status."""
    if status is not None:
        value = torch.where(status == NAN, torch.nan, torch.inf)
        wrong = (status == NAN) | (status == POSITIVE_INFINITY)
        words[:, 0] = torch.where(wrong, words_of(value, torch.full_like(words[:, 0], -1)), words[:, 0])
    return words


def list_first(engine: Engine, x: Tensor, rows: Rows, start: int, count: int) -> Tensor:
    """The first tokens of the rank order of each row, words int64 [B, count], by any engine.

    Args:
        x: [B, V_r], of the tokens from `start` on.
    """
    batch, width = x.shape
    device = x.device
    own = Rows(neutral(min(count, width)).to(device), rows.seeds, rows.offsets)
    out = Outputs(empty((batch,), torch.int32, device), empty((batch,), torch.int64, device))
    out.kept_count = empty((batch,), torch.int32, device)
    out.kept_bitmask = empty((batch, -(-width // 32)), torch.int32, device)
    engine.run(x, own, out)
    flat, row_ptr = (
        torch.empty(batch * count, dtype=torch.int32, device=device),
        empty((batch + 1,), torch.int64, device),
    )
    fill_lists(engine, out.kept_count, out.kept_bitmask, 0, flat, row_ptr)
    places = row_ptr[:-1, None] + torch.arange(count, device=device)
    there = torch.arange(count, device=device) < out.kept_count[:, None]
    ids = torch.where(there, flat[places.clamp(max=flat.numel() - 1)], -1).to(torch.int64)
    listed = torch.where(there, x.gather(1, ids.clamp(min=0)).float(), -torch.inf)
    return mark_invalid(words_of(listed, torch.where(there, ids + start, -1)), out.status)
