"""What ranks list of each row, its first tokens, as words: the bits of a logit above those of its id."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from fastsample.backends import Engine, Outputs
from fastsample.buffers import empty
from fastsample.distributed.answers import Answers
from fastsample.distributed.keys import IDS, by_row, words_of
from fastsample.distributed.local import neutral
from fastsample.inputs import Rows
from fastsample.kept import fill_lists
from fastsample.reference.process import NAN, POSITIVE_INFINITY

Tensor = torch.Tensor


@dataclass
class Lists:
    """What all ranks have told in a call's first message.

    Attributes:
        told: int64 [R, B, words]: of each row a list of so many tokens; the mass of these, beside the first of them;
            whether the part is flat; whether edits may have changed it; then a list of so many tokens of the row as it
            was given, and the logits there of those on the first list, two to a word. A row that is invalid has a NaN,
            or an infinity, in front of some list.
        count, with_mass, judges, tells_edits, raw_count: which of these there are, and how many tokens.
        given: this rank's part of rows as they were given.
        sums: int64 [B, 9], `Shard.sums` of the whole rows, once they are known.
        tells_raw: whether raw log-probabilities have been told with all else.
        open: bool [B, 1], which rows lists do not decide, if that is known.
        own: float32 [B, n], the logits of the sampled tokens, if these are known.
        bins: int64 [R, B, 2 BINS], `Shard.bins` of the whole rows, if they are known.
    """

    told: Tensor
    count: int
    with_mass: bool
    judges: bool
    tells_edits: bool
    raw_count: int
    given: Answers
    sums: Tensor | None = None
    tells_raw: bool = False
    open: Tensor | None = None
    own: Tensor | None = None
    bins: Tensor | None = None

    @cached_property
    def words(self) -> Tensor:
        """Of each row, in id order, int64 [B, N]."""
        return by_row(self.told[:, :, : self.count])

    @cached_property
    def flat(self) -> bool:
        """Whether all ranks have found that lists probably decide no row."""
        return self.judges and bool(self.told[:, :, self.count + self.with_mass].all())

    @cached_property
    def as_given(self) -> bool:
        """Whether it is known that these are logits as they were given."""
        return self.tells_edits and not bool(self.told[:, :, self.count + self.with_mass + self.judges].any())

    def known(self, num_top: int) -> tuple[Tensor, Tensor] | None:
        """The words and the logits of the sampled tokens, if they are those of rows as these were given, and so many
        first tokens of each rank are listed."""
        if not self.as_given or self.own is None or num_top > self.count:
            return None
        return self.words, self.own

    @cached_property
    def unpacked(self) -> tuple[Tensor, Tensor]:
        """Logits float32 [B, N], and ids int64 [B, N]; -inf and -1 past the end of each list."""
        return unpacked(self.words)

    def logits_of(self, tokens: Tensor) -> Tensor:
        """Of tokens int64 [B, n] among those that are listed, float32; -inf where they are not."""
        x, ids = self.unpacked
        return torch.where(ids[:, None, :] == tokens[:, :, None], x[:, None, :], -torch.inf).amax(-1)


def unpacked(words: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 and int64, given words."""
    ids = words & IDS
    return (words >> 32).to(torch.int32).view(torch.float32), torch.where(ids < IDS, ids, -1)


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
