"""Raw log-probabilities of rows that are split over ranks."""

from __future__ import annotations

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
    valid = (out.status.view(-1) == 0)[:, None]
    most = x.amax(-1) if x.shape[1] else x.new_full((rows,), -torch.inf)
    most = torch.where(bad, torch.inf, most)
    local = tokens - start
    here = (local >= 0) & (local < x.shape[1])
    own = pick(x, local.clamp(0, max(x.shape[1] - 1, 0)), here, -torch.inf)
    words = torch.cat([most[:, None], own], 1).view(torch.int32).to(torch.int64)
    keys = key(x, torch.arange(start, start + x.shape[1], device=x.device))
    keys = torch.where(x > -torch.inf, keys, NO_KEY).topk(min(out.num_top, x.shape[1])).values
    keys = pad(keys, (0, out.num_top - keys.shape[1]), value=NO_KEY)
    told = wire.gather(torch.cat([words, keys], 1))
    values = told[:, :, : 1 + n].to(torch.int32).view(torch.float32).amax(0)
    peak, own = values[:, :1], values[:, 1:]
    sound = valid & peak.isfinite()
    peak = torch.where(sound, peak, 0)
    w = mass_of(kind, torch.where(sound, x, 0), peak, torch.ones_like(peak))
    above = (x[:, None, :] > own[:, :, None]).sum(-1)
    sums = wire.total(torch.cat([w.sum(-1, keepdim=True), above], 1))

    def logprobs(x: Tensor) -> Tensor:
        if kind == "probs":
            return (mass_of(kind, x, peak, torch.ones_like(peak)).double() / sums[:, :1].double()).log()
        return (x.double() - peak.double()) - (sums[:, :1].double() / 2.0**UNIT).log()

    every = torch.arange(rows, device=x.device)
    put(out.logprobs, every, torch.where(sound, logprobs(own), torch.nan))
    put(out.ranks, every, torch.where(valid, sums[:, 1:] + 1, 0))
    if out.num_top:
        top = told[:, :, 1 + n :].transpose(0, 1).reshape(rows, -1).topk(out.num_top).values
        there = (top >= LOWEST) & sound
        put(out.top_ids, every, torch.where(there, IDS - (top & IDS), -1))
        found = torch.where(there, logprobs(value(top >> 32)), -torch.inf)
        put(out.top_logprobs, every, torch.where(sound, found, torch.nan))
