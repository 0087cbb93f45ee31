"""Stage 8 and the outputs of rows whose kept tokens are all listed, and what other outputs share with them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from fastsample.backends import Engine, Outputs
from fastsample.backends.reference import write
from fastsample.buffers import empty
from fastsample.distributed.keys import HIGHEST, Kept, everything
from fastsample.distributed.local import neutral
from fastsample.distributed.row import SplitRow
from fastsample.inputs import Rows
from fastsample.outputs import InputKind
from fastsample.params import write_columns
from fastsample.reference import Distribution, drawn_masses, first, log_share

Tensor = torch.Tensor


@dataclass
class Found:
    """What stage 7 leaves of rows."""

    row: SplitRow
    kept: Kept
    top: Tensor  # int64 [B, 1]: what is kept above that key XTC may exclude
    status: Tensor  # int32 [B]
    greedy: Tensor  # bool [B, 1]
    coin: Tensor  # float32 [B or 1, 1]

    def spread(self) -> Tensor:
        """Whether a row keeps tokens that are not listed, bool [B]."""
        return self.row.spread(self.kept, self.row.valid & ~self.greedy)[:, 0]

    def is_plain(self) -> bool:
        """Whether all rows keep their maximum, whatever XTC may do, and are drawn from by the masses that judge."""
        at = self.row.shard.judged_at == self.row.shard.drawn_at
        return bool((at & (self.top == HIGHEST) & (self.kept.high == HIGHEST)).all())

    def all_mass(self) -> Tensor:
        """The mass of all tokens above -inf, as they are drawn, int64 [B, 1]."""
        row = self.row
        if torch.equal(row.shard.judged_at, row.shard.drawn_at):
            return row.whole()[:, :1]
        all_ = everything(len(row.peak), row.peak.device)
        return row.wire.total(row.shard.as_drawn().sums(all_, products=False))[:, :1]


def distribution(found: Found, listed: Tensor, with_rest: bool) -> Distribution:
    """The listed tokens of rows that keep no others as if they were all there are, in id order.

    Args:
        listed: float32 [B, N].
        with_rest: whether a last column has the mass of all tokens that are not listed.
    """
    row, valid = found.row, (found.status == 0)[:, None]
    kept = row.held(found.kept) & valid
    excluded = kept & (row.keys > found.top)
    kept = kept & ~(excluded & (found.coin == 1))
    w = row.shard.mass_of(listed, row.shard.drawn_at) * (listed > -torch.inf)
    weighs = (kept & (w.gather(1, row.order) > 0)).any(-1, keepdim=True)
    kept, excluded = torch.where(weighs, kept, first(kept)), excluded & weighs
    alone = row.shard.alone(listed)
    whole, rest = (drawn_masses(w, alone, set_, row.order) for set_ in (kept, kept & ~excluded))
    by_id = torch.zeros_like(kept).scatter(1, row.order, kept)
    if not with_rest:
        return Distribution(listed, found.status, by_id, found.greedy[:, 0], whole, rest, w, found.coin)
    x, by_id, whole, rest = (pad(t, (0, 1)) for t in (listed, by_id, whole, rest))
    x[:, -1] = -torch.inf
    w = torch.cat([w, found.all_mass() - w.sum(-1, keepdim=True)], 1)
    return Distribution(x, found.status, by_id, found.greedy[:, 0], whole, rest, w, found.coin)


def as_given(x: Tensor, kind: InputKind) -> Tensor:
    """Logits, or probabilities with -inf for 0, as an engine takes them."""
    return torch.where(x == -torch.inf, 0, x) if kind == "probs" else x


def compact(out: Outputs, ids: Tensor) -> Outputs:
    """Buffers like those of `out` for rows of the tokens `ids` [B, N] alone: what tells no id is the same buffer."""
    own = replace(out, kept_bitmask=None, names=None, restore=False)
    if out.kept_bitmask is not None:
        own.kept_bitmask = empty((len(ids), -(-ids.shape[1] // 32)), torch.int32, ids.device)
    if out.given is not None:
        at = (ids == out.given[:, None]) & (ids >= 0)
        own.given = torch.where(at.any(-1), at.to(torch.int32).argmax(-1), -1)
        own.weights = empty((len(ids), 2), torch.int64, ids.device)  # of what is listed, which nobody reads
    return own


def translate(own: Outputs, ids: Tensor, out: Outputs) -> None:
    """Give `out` the ids [B, N] of the places that `own` has."""
    for name in ("tokens", "top_ids"):
        if (places := getattr(own, name)) is not None:
            table = places.view(len(ids), -1)
            table.copy_(torch.where(table < 0, -1, ids.gather(1, table.clamp(min=0))))
    if own.kept_bitmask is not None and out.kept_bitmask is not None:
        set_bits(out.kept_bitmask, listed_bits(own.kept_bitmask, ids.shape[1]), ids)


def listed_bits(words: Tensor, width: int) -> Tensor:
    """The bits of masks int32 [B, words], bool [B, width]."""
    places = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> places) & 1).flatten(1)[:, :width].bool()


def set_bits(words: Tensor, held: Tensor, ids: Tensor) -> None:
    """Make masks int32 [B, words] of those ids [B, N] that are held."""
    flat = torch.zeros(words.shape, dtype=torch.int64, device=words.device)
    flat.view(len(ids), -1).scatter_add_(1, (ids.clamp(min=0) >> 5), held.to(torch.int64) << (ids.clamp(min=0) & 31))
    words.copy_(flat.to(torch.int32))


def write_listed(engine: Engine, found: Found, listed: Tensor, ids: Tensor, rows: Rows, out: Outputs) -> int:
    """The outputs of rows whose kept tokens are all listed; those of others mean nothing yet."""
    if bool(found.spread().all()):  # then all are valid
        out.status.zero_()
        return 0
    plain = found.is_plain()
    dist = None if plain else distribution(found, listed, out.log_kept_mass is not None)
    ids = ids if dist is None else pad(ids, (0, dist.x.shape[1] - ids.shape[1]), value=-1)
    own = compact(out, ids)
    if out.mode == "raw":
        own.mode = own.logprobs = own.ranks = own.top_ids = own.top_logprobs = None
    if dist is None:
        write_plain(engine, found, listed, rows, own)
    else:
        write(dist, listed, rows, own)
    translate(own, ids, out)
    return int((found.status != 0).sum())


def write_plain(engine: Engine, found: Found, listed: Tensor, rows: Rows, own: Outputs) -> None:
    """The outputs of rows that keep their maximum and are drawn from as they are judged: once all else is left out,
    nothing is left to filter."""
    row = found.row
    held = torch.zeros_like(listed, dtype=torch.bool).scatter(1, row.order, row.held(found.kept))
    kept = torch.where(held, listed, -torch.inf)
    records = neutral().to(kept.device).repeat(len(kept), 1)
    write_columns(records, {"temperature": row.shard.drawn_at[:, 0]})
    own_rows = Rows(records, rows.seeds, rows.offsets)
    engine.run(as_given(kept, own.input), own_rows, replace(own, log_kept_mass=None))
    own.status.copy_(found.status.view(own.status.shape))
    if own.ranks is not None and own.tokens is not None:
        # Among all tokens, since a floor may leave out some that rank above others.
        at = own.tokens.view(len(kept), -1)
        x = kept.gather(1, at.clamp(min=0))
        ranks = (listed[:, None, :] > x[:, :, None]).sum(-1) + 1
        own.ranks.copy_(torch.where(at < 0, 0, ranks).view(own.ranks.shape))
    if own.log_kept_mass is not None:
        mass = (row.mass * row.held(found.kept)).sum(-1)
        share = torch.where(found.greedy[:, 0], 0.0, log_share(mass, found.all_mass()[:, 0]))
        own.log_kept_mass.copy_(torch.where(found.status == 0, share, torch.nan).view(own.log_kept_mass.shape))


def pick(table: Tensor, at: Tensor, here: Tensor, other: float) -> Tensor:
    return torch.where(here, table.gather(1, at), other) if table.shape[1] else table.new_full(at.shape, other)


def put(buffer: Tensor | None, index: Tensor | None, values: Tensor) -> None:
    """Write the values of some rows, which `index` has in ascending order; None for all."""
    if buffer is None:
        return
    rows = buffer.view(-1, *values.shape[1:]) if values.ndim > 1 else buffer.view(-1)
    if index is None or len(index) == len(rows):
        rows.copy_(values)
    else:
        rows[index] = values.to(buffer.dtype)
