"""Raw log-probabilities of rows that are split over ranks."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from fastsample.backends import Outputs
from fastsample.distributed.keys import IDS, LOWEST, NO_KEY, key, value
from fastsample.distributed.outputs import pick, put
from fastsample.distributed.wire import Wire
from fastsample.reference.mass import UNIT, mass_at, scale_of

Tensor = torch.Tensor


def write_raw(wire: Wire, logits: Tensor, start: int, out: Outputs) -> None:
    """log-softmax of whole rows as they were given, of which this rank has logits [B, V_r]."""
    x, rows = logits.float(), len(logits)
    assert out.tokens is not None
    tokens = out.tokens.view(rows, -1)
    n = tokens.shape[1]
    valid = (out.status.view(-1) == 0)[:, None]
    bad = x.isnan().any(-1) | (x == torch.inf).any(-1)
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
    w = mass_at((torch.where(sound, x, 0) - peak) * scale_of(torch.ones_like(peak)))
    above = (x[:, None, :] > own[:, :, None]).sum(-1)
    sums = wire.total(torch.cat([w.sum(-1, keepdim=True), above], 1))
    total = (sums[:, :1].double() / 2.0**UNIT).log()
    every = torch.arange(rows, device=x.device)
    put(out.logprobs, every, torch.where(sound, (own.double() - peak.double()) - total, torch.nan))
    put(out.ranks, every, torch.where(valid, sums[:, 1:] + 1, 0))
    if out.num_top:
        top = told[:, :, 1 + n :].transpose(0, 1).reshape(rows, -1).topk(out.num_top).values
        there = (top >= LOWEST) & sound
        put(out.top_ids, every, torch.where(there, IDS - (top & IDS), -1))
        logprobs = torch.where(there, (value(top >> 32).double() - peak.double()) - total, -torch.inf)
        put(out.top_logprobs, every, torch.where(sound, logprobs, torch.nan))
