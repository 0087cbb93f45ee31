"""Raw log-probabilities of rows that are split over ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from fastsample.backends import Outputs
from fastsample.distributed.keys import IDS, LOWEST, NO_KEY, key, value
from fastsample.distributed.outputs import pick, put
from fastsample.distributed.shard import mass_of
from fastsample.distributed.wire import Wire
from fastsample.reference import NAN, NEG_INF, POSITIVE_INFINITY, check, check_probs, order_of_probs
from fastsample.reference.mass import UNIT

Tensor = torch.Tensor


def write_raw(wire: Wire, logits: Tensor, start: int, out: Outputs) -> None:
    """log-softmax of whole rows as they were given, or the logarithm of their probabilities; this rank has [B, V_r]."""
    x, rows, kind = logits.float(), len(logits), out.input
    status = check(x) if kind == "logits" else check_probs(x)
    bad = (status == NAN) | (status == POSITIVE_INFINITY)
    x = x if kind == "logits" else torch.where(order_of_probs(x) > NEG_INF, x, NEG_INF)
    assert out.tokens is not None
    tokens = out.tokens.view(rows, -1)
    n = tokens.shape[1]
    most = x.amax(-1) if x.shape[1] else x.new_full((rows,), -torch.inf)
    most = torch.where(bad, torch.inf, most)
    local = tokens - start
    here = (local >= 0) & (local < x.shape[1])
    own = pick(x, local.clamp(0, max(x.shape[1] - 1, 0)), here, -torch.inf)
    words = torch.cat([most[:, None], own], 1).view(torch.int32).to(torch.int64)
    keys = _first_keys(x, torch.arange(start, start + x.shape[1], device=x.device), out.num_top)
    told = wire.gather(torch.cat([words, keys], 1))
    values = told[:, :, : 1 + n].to(torch.int32).view(torch.float32).amax(0)
    peak, own = values[:, :1], values[:, 1:]
    sound = (out.status.view(-1) == 0)[:, None] & peak.isfinite()
    peak = torch.where(sound, peak, 0)
    w = mass_of(kind, torch.where(sound, x, 0), peak, torch.ones_like(peak))
    above = (x[:, None, :] > own[:, :, None]).sum(-1)
    sums = wire.total(torch.cat([w.sum(-1, keepdim=True), above], 1))
    top = told[:, :, 1 + n :].transpose(0, 1).reshape(rows, -1)
    _write(Raw(own, sums[:, 1:], top, peak, sums[:, :1], sound), out)


def write_raw_listed(x: Tensor, ids: Tensor, mass: Tensor, out: Outputs) -> None:
    """The same of rows that nothing has changed and whose kept tokens are all listed.

    Args:
        x, ids: [B, N], as for `Lists.unpacked`, at least `num_top` tokens of each rank.
        mass: int64 [B, 1], of the whole rows at temperature 1.
    """
    assert out.tokens is not None
    tokens = out.tokens.view(len(x), -1)
    listed = ids[:, None, :] == tokens[:, :, None]
    own = torch.where(listed, x[:, None, :], -torch.inf).amax(-1)
    above = (x[:, None, :] > own[:, :, None]).sum(-1)
    sound = (out.status.view(-1) == 0)[:, None]
    peak = torch.where(sound, x.amax(-1, keepdim=True), 0)
    _write(Raw(own, above, _first_keys(x, ids, out.num_top), peak, mass, sound), out)


class Raw(NamedTuple):
    """Of rows [B] and their tokens [B, n]."""

    own: Tensor  # float32 [B, n]
    above: Tensor  # int64 [B, n], how many tokens rank above each
    keys: Tensor  # int64 [B, num_top or more], of the first tokens of all among others
    peak: Tensor  # float32 [B, 1]
    mass: Tensor  # int64 [B, 1]
    sound: Tensor  # bool [B, 1]


def _first_keys(x: Tensor, ids: Tensor, count: int) -> Tensor:
    """int64 [B, count], the highest first; NO_KEY past the last token above -inf."""
    keys = torch.where(x > -torch.inf, key(x, ids), NO_KEY).topk(min(count, x.shape[1])).values
    return pad(keys, (0, count - keys.shape[1]), value=NO_KEY)


def _write(raw: Raw, out: Outputs) -> None:
    peak, mass, sound, kind = raw.peak, raw.mass.double(), raw.sound, out.input
    valid = (out.status.view(-1) == 0)[:, None]

    def logprobs(x: Tensor) -> Tensor:
        if kind == "probs":
            return (mass_of(kind, x, peak, torch.ones_like(peak)).double() / mass).log()
        return (x.double() - peak.double()) - (mass / 2.0**UNIT).log()

    every = torch.arange(len(peak), device=peak.device)
    put(out.logprobs, every, torch.where(sound, logprobs(raw.own), torch.nan))
    put(out.ranks, every, torch.where(valid, raw.above + 1, 0))
    if out.num_top:
        top = raw.keys.topk(out.num_top).values
        there = (top >= LOWEST) & sound
        put(out.top_ids, every, torch.where(there, IDS - (top & IDS), -1))
        found = torch.where(there, logprobs(value(top >> 32)), -torch.inf)
        put(out.top_logprobs, every, torch.where(sound, found, torch.nan))
