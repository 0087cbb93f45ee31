"""From checked arguments to tokens: kept sets, integer masses and draws.

Logits go to an engine unchanged. Probabilities are never turned into logits: a logarithm would merge neighbouring
values and move sums. Their mass is the probability itself as an integer (`scale`), and the draw is stage 8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastsample import reference as spec
from fastsample.backends import Outputs, select
from fastsample.inputs import Rows
from fastsample.integrations.flashinfer.arguments import (
    Limit,
    check_no_nan,
    check_order,
    count_outputs,
    limits,
    pack,
    pack_seed_offset,
    raise_where,
    table,
)
from fastsample.integrations.flashinfer.masses import scale

Tensor = torch.Tensor

TOP_P_SLACK = 2.0**-23
"""A prefix within this fraction of p counts as having reached p: float32 probabilities are no more precise."""

INF = float("inf")


def sample_logits(
    logits: Tensor,
    given: dict[str, Any],
    order: str,
    indices: Tensor | None,
    generator: torch.Generator | None,
    check_nan: bool,
    seed: Any,
    offset: Any,
) -> Tensor:
    x = table("logits", logits)
    check_order(order)
    checked = limits(given, len(x))
    outputs = count_outputs(indices, x)
    check_no_nan(check_nan, "logits", x)
    seeds, offsets = pack_seed_offset(seed, offset, generator, outputs, x.device)
    packed = pack(checked, order, x)
    if indices is None:
        tokens = _sample(x, packed, seeds, offsets)
    else:
        tokens = draw(*_logit_masses(_filter(x, packed)), seeds, offsets, indices)
    return _finish(tokens, "logits", x, checked, indices)


def sample_probs(
    probs: Tensor,
    given: dict[str, Any],
    order: str,
    indices: Tensor | None,
    generator: torch.Generator | None,
    check_nan: bool,
    seed: Any,
    offset: Any,
    return_valid: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    p = table("probs", probs)
    check_order(order)
    checked = limits(given, len(p))
    outputs = count_outputs(indices, p)
    check_no_nan(check_nan, "probs", p)
    seeds, offsets = pack_seed_offset(seed, offset, generator, outputs, p.device)
    tokens = draw(*_keep(p, checked, order), seeds, offsets, indices)
    if return_valid:
        tokens = _mark(tokens, checked, indices, p)
        return tokens.clamp(min=0).to(_dtype(indices)), tokens >= 0
    return _finish(tokens, "probs", p, checked, indices)


def renormalise(probs: Tensor, given: dict[str, Any]) -> Tensor:
    """Kept probabilities over their sum, 0 elsewhere; float32 [B, V]."""
    p = table("probs", probs)
    checked = limits(given, len(p))
    y, valid = _keep(p, checked, "top_k_first")
    if p.device.type == "cpu":
        raise_where(~valid, "probs", p)
    sound = valid & ~any_bad(checked, p)
    total = torch.where(sound[:, None], y.sum(-1, keepdim=True, dtype=torch.float64), INF)
    return (y / total).float()


def any_bad(given: tuple[Limit, ...], values: Tensor) -> Tensor:
    """Rows with an out-of-range parameter that raised no error (see `Limit`), bool [B]."""
    bad = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    for one in given:
        if one.bad is not None:
            bad |= one.bad.to(values.device)
    return bad


def _finish(tokens: Tensor, name: str, values: Tensor, given: tuple[Limit, ...], indices: Tensor | None) -> Tensor:
    """The outputs, or an error if that needs no wait for a GPU."""
    if values.device.type == "cpu":
        raise_where(tokens < 0, name, values, indices)
    return _mark(tokens, given, indices, values).to(_dtype(indices))


def _mark(tokens: Tensor, given: tuple[Limit, ...], indices: Tensor | None, values: Tensor) -> Tensor:
    """Put -1 into the outputs of rows with a bad parameter."""
    if all(one.bad is None for one in given) or len(values) == 0:
        return tokens
    bad = any_bad(given, values)
    return torch.where(bad if indices is None else bad[indices.clamp(0, len(values) - 1)], -1, tokens)


def _dtype(indices: Tensor | None) -> torch.dtype:
    return torch.int32 if indices is None else indices.dtype


# Logits --------------------------------------------------------------------------------------------------------------


def _sample(x: Tensor, packed: Tensor, seeds: Tensor, offsets: Tensor) -> Tensor:
    """One fused pass of an engine: token ids, int64 [B], -1 in invalid rows."""
    tokens = torch.empty(len(x), dtype=torch.int64, device=x.device)
    status = torch.empty(len(x), dtype=torch.int32, device=x.device)
    select("auto", x).run(x, Rows(packed, seeds, offsets), Outputs(status, tokens))
    return tokens


def _filter(x: Tensor, packed: Tensor) -> Tensor:
    """x where kept, -inf elsewhere and in invalid rows; float32 [B, V]."""
    filtered = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    status = torch.empty(len(x), dtype=torch.int32, device=x.device)
    zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    select("auto", x).run(x, Rows(packed, zeros, zeros), Outputs(status, filtered=filtered))
    return filtered


def _logit_masses(filtered: Tensor) -> tuple[Tensor, Tensor]:
    """The contract's stage 6 at T = 1: mass int64 [B, V] and which rows are valid, bool [B]."""
    valid = (filtered > spec.NEG_INF).any(-1)
    sound = torch.where(valid[:, None], filtered, torch.zeros_like(filtered))
    return spec.mass(sound, torch.ones_like(sound[:, :1])), valid


# Probabilities -------------------------------------------------------------------------------------------------------
#
# Masks are multiplied in: on a CPU torch.where takes several times as long.


def _keep(p: Tensor, given: tuple[Limit, ...], order: str) -> tuple[Tensor, Tensor]:
    """Scaled probabilities of the kept tokens, 0 elsewhere, and which rows are valid."""
    whole, valid = scale(p)
    y = whole
    for one in given:  # top_k comes before top_p
        if one.name == "min_p":
            y = y * _keep_min_p(y, one)
        elif one.name == "top_k":
            y = y * keep_top_k(y, (one,))
        else:
            y = y * _keep_top_p(whole if order == "joint" else y, one)
    return y, valid


def keep_top_k(values: Tensor, given: tuple[Limit, ...]) -> Tensor:
    """The k highest, lower ids first; bool [B, V]. An engine ranks probabilities as it would rank logits."""
    return _filter(values, pack(given, "top_k_first", values)) > spec.NEG_INF


def _keep_min_p(y: Tensor, min_p: Limit) -> Tensor:
    """y >= min_p max(y), exactly: the product of two float32 fits a float64."""
    return y >= min_p.column(y.device).float().double() * y.amax(-1, keepdim=True)


def _keep_top_p(y: Tensor, top_p: Limit) -> Tensor:
    """The shortest ranked prefix that reaches p of the mass, lower ids first; bool [B, V]."""
    share = top_p.column(y.device)
    total = y.to(torch.int64).sum(-1, keepdim=True)
    target = (share * total.double() * (1 - TOP_P_SLACK)).to(torch.int64).clamp(min=1)
    kept = prefix_by_cutoff(y, target, top_p) if y.device.type == "cpu" else prefix_by_sort(y, target)
    return kept | (share == 1)


def prefix_by_sort(y: Tensor, target: Tensor) -> Tensor:
    """The shortest ranked prefix whose mass reaches the target; no step depends on the data or waits for a GPU."""
    ranked = y.sort(dim=-1, descending=True, stable=True).indices
    mass = y.gather(1, ranked).to(torch.int64)
    before = mass.cumsum(-1) - mass
    return torch.zeros_like(y, dtype=torch.bool).scatter(1, ranked, (before < target) & (mass > 0))


def prefix_by_cutoff(y: Tensor, target: Tensor, top_p: Limit) -> Tensor:
    """The same with few sorts: an engine's top-p over log(y) guesses the least kept y, and exact sums confirm it."""
    guess = _filter(y.log(), pack((top_p,), "top_k_first", y)) > spec.NEG_INF
    # The smallest positive float32 has the smallest bits; those of 0 wrap to the largest.
    bits = (y * guess).view(torch.int32).sub_(1).bitwise_and_(2**31 - 1)
    cutoff = (bits.amin(-1, keepdim=True) + 1).view(torch.float32)
    above, tied = y > cutoff, y == cutoff
    each, count = cutoff.to(torch.int64).clamp(min=1), tied.sum(-1, keepdim=True)
    missing = target - (y * above).to(torch.int64).sum(-1, keepdim=True)
    needed = (missing + each - 1).div(each, rounding_mode="floor")
    kept = above | tied
    if bool((needed < count).any()):
        kept &= ~tied | (tied.cumsum(-1) <= needed)
    wrong = (needed < 1) | (needed > count)
    if bool(wrong.any()):
        rows = wrong[:, 0].nonzero()[:, 0]
        kept[rows] = prefix_by_sort(y[rows], target[rows])
    return kept


# Draws ---------------------------------------------------------------------------------------------------------------


def draw(w: Tensor, valid: Tensor, seeds: Tensor, offsets: Tensor, indices: Tensor | None) -> Tensor:
    """The contract's stage 8 with mass trunc(w), for each output: int64 [N]; -1 where its row is invalid."""
    batch, vocab = w.shape
    running = w.to(torch.int64).cumsum_(-1)
    u = uniform60(seeds, offsets, torch.zeros(1, dtype=torch.int64, device=w.device))
    if indices is None:
        threshold = spec.multiply_high60(u, running[:, -1])
        tokens = torch.searchsorted(running, threshold[:, None], right=True)[:, 0].clamp(max=vocab - 1)
        return torch.where(valid, tokens, -1)
    if batch == 0:
        return torch.full((len(indices),), -1, device=w.device)
    inside = (indices >= 0) & (indices < batch)
    rows = torch.where(inside, indices, 0).to(torch.int64)
    threshold = spec.multiply_high60(u, running[rows, -1])
    tokens = _first_above(running.flatten(), rows * vocab, vocab, threshold)
    return torch.where(inside & valid[rows], tokens, -1)


def _first_above(running: Tensor, start: Tensor, vocab: int, threshold: Tensor) -> Tensor:
    """The first id whose running mass exceeds the threshold, by bisection; rows are not copied for their outputs."""
    low, high = torch.zeros_like(start), torch.full_like(start, vocab - 1)
    for _ in range(vocab.bit_length()):
        middle = (low + high) >> 1
        right = running[start + middle] <= threshold
        low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
    return low.clamp(max=vocab - 1)


def uniform60(seeds: Tensor, offsets: Tensor, index: Tensor) -> Tensor:
    """60 uniform bits per (seed, offset, draw index), as in the reference."""
    if seeds.device.type != "cpu":
        return spec.uniform60(seeds, offsets, index)
    # The same words from numpy: its calls cost a fraction of torch's, and there are hundreds.
    seed: Any = seeds.numpy()
    offset: Any = offsets.numpy()
    zero: Any = np.zeros_like((offsets + index).numpy())
    counter = (zero + spec.low32(offset), zero + spec.low32(offset >> 32), zero + index.numpy(), zero)
    words: Any = spec.philox4x32(counter, (spec.low32(seed), spec.low32(seed >> 32)))
    return torch.from_numpy((words[0] << 28) | (words[1] >> 4))
