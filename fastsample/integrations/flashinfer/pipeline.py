"""From checked arguments to tokens: kept sets, integer masses and draws.

Logits go to an engine as they are. Probabilities are never turned into logits: a logarithm would merge neighbours and
move sums. Their mass is the probability itself, as an integer (`masses`), and the draw is the contract's stage 8 on it.
"""

from __future__ import annotations

from typing import Any

import torch

from fastsample import reference as spec
from fastsample.engines import Outputs, select
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
from fastsample.rows import Rows

Tensor = torch.Tensor

TOP_P_SLACK = 2.0**-23
"""A prefix within this fraction of p has reached p: float32 probabilities and their sum are no more exact than that."""

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
    w, valid = _kept_masses(p, checked, order)
    tokens = draw(w, valid, seeds, offsets, indices)
    if return_valid:
        tokens = _mark(tokens, checked, indices, p)
        return tokens.clamp(min=0).to(_dtype(indices)), tokens >= 0
    return _finish(tokens, "probs", p, checked, indices)


def renormalise(probs: Tensor, given: dict[str, Any]) -> Tensor:
    """Kept probabilities over their sum, 0 elsewhere; float32 [B, V]."""
    p = table("probs", probs)
    checked = limits(given, len(p))
    w, valid = _kept_masses(p, checked, "top_k_first")
    if p.device.type == "cpu":
        raise_where(~valid, "probs", p)
    sound = valid & ~any_bad(checked, p)
    kept = torch.where((w > 0) & sound[:, None], p, 0).double()
    return (kept / torch.where(sound[:, None], kept.sum(-1, keepdim=True), 1)).float()


def any_bad(given: tuple[Limit, ...], values: Tensor) -> Tensor:
    """Rows with a parameter that is out of range and was not raised for (see `Limit`), bool [B]."""
    bad = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    for one in given:
        if one.bad is not None:
            bad |= one.bad.to(values.device)
    return bad


def _finish(tokens: Tensor, name: str, values: Tensor, given: tuple[Limit, ...], indices: Tensor | None) -> Tensor:
    """The outputs, or an error where that needs no waiting."""
    if values.device.type == "cpu":
        raise_where(tokens < 0, name, values, indices)
    return _mark(tokens, given, indices, values).to(_dtype(indices))


def _mark(tokens: Tensor, given: tuple[Limit, ...], indices: Tensor | None, values: Tensor) -> Tensor:
    """-1 in the outputs of rows with a bad parameter."""
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


def masses(p: Tensor) -> tuple[Tensor, Tensor]:
    """Mass trunc(p 2^s) as int64 [B, V] and which rows are valid, bool [B].

    s differs from row to row: the largest p has a mass in [2^39, 2^40), so that sums fit the contract's 60 bits. The
    scaling is exact, and so is the mass of every float32 p down to 2^-16 of the largest; below 2^-40 of it, it is 0.
    """
    low, high = p.amin(-1), p.amax(-1)  # NaN where there is one
    valid = (low >= 0) & (high > 0) & (high < INF)
    exponent = torch.where(valid, high, 1).double().frexp().exponent.to(torch.int64)
    scale = ((40 - exponent + 1023) << 52).view(torch.float64)
    return (torch.where(valid[:, None], p, 0).double() * scale[:, None]).to(torch.int64), valid


def _kept_masses(p: Tensor, given: tuple[Limit, ...], order: str) -> tuple[Tensor, Tensor]:
    """Mass of the kept tokens, 0 elsewhere, and which rows are valid."""
    whole, valid = masses(p)
    w = whole
    for one in given:  # top_k comes before top_p
        if one.name == "min_p":
            w = torch.where(_keep_min_p(p, one), w, 0)
        elif one.name == "top_k":
            w = torch.where(keep_top_k(p, (one,)), w, 0)
        else:
            w = torch.where(_keep_top_p(p, whole if order == "joint" else w, one), w, 0)
    return w, valid


def keep_top_k(values: Tensor, given: tuple[Limit, ...]) -> Tensor:
    """The k highest, lower ids first; bool [B, V]. An engine ranks probabilities as it would rank logits."""
    return _filter(values, pack(given, "top_k_first", values)) > spec.NEG_INF


def _keep_min_p(p: Tensor, min_p: Limit) -> Tensor:
    """p >= min_p max(p), exactly: the product of two float32 fits a float64."""
    threshold = min_p.column(p.device).float().double() * p.amax(-1, keepdim=True).double()
    return p >= threshold


def _keep_top_p(p: Tensor, w: Tensor, top_p: Limit) -> Tensor:
    """The shortest ranked prefix of the tokens with mass w that reaches p of it, lower ids first; bool [B, V]."""
    share = top_p.column(p.device)
    total = w.sum(-1, keepdim=True)
    target = (share * total.double() * (1 - TOP_P_SLACK)).to(torch.int64).clamp(min=1)
    kept = prefix_by_cutoff(p, w, target, top_p) if p.device.type == "cpu" else prefix_by_sort(p, w, target)
    return torch.where(share == 1, w > 0, kept)


def prefix_by_sort(p: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """The shortest ranked prefix whose mass reaches the target. No step depends on the data: no GPU is waited for."""
    ranked = torch.where(w > 0, p, -1).sort(dim=-1, descending=True, stable=True).indices
    mass = w.gather(1, ranked)
    before = mass.cumsum(-1) - mass
    return torch.zeros_like(w, dtype=torch.bool).scatter(1, ranked, (before < target) & (mass > 0))


def prefix_by_cutoff(p: Tensor, w: Tensor, target: Tensor, top_p: Limit) -> Tensor:
    """The same, seldom sorting: an engine's top-p over log(p) guesses the least kept p, and exact sums confirm it."""
    guess = _filter(torch.where(w > 0, p, 0).float().log(), pack((top_p,), "top_k_first", p))
    cutoff = torch.where(guess > spec.NEG_INF, p, INF).amin(-1, keepdim=True)
    above = (p > cutoff) & (w > 0)
    tied = (p == cutoff) & (w > 0)
    each = torch.where(tied, w, 0).amax(-1, keepdim=True).clamp(min=1)
    count = tied.sum(-1, keepdim=True)
    missing = target - torch.where(above, w, 0).sum(-1, keepdim=True)
    needed = (missing + each - 1).div(each, rounding_mode="floor")
    kept = above | tied
    if bool((needed < count).any()):
        kept &= ~tied | (tied.cumsum(-1) <= needed)
    wrong = (needed < 1) | (needed > count)
    if bool(wrong.any()):
        rows = wrong[:, 0].nonzero()[:, 0]
        kept[rows] = prefix_by_sort(p[rows], w[rows], target[rows])
    return kept


# Draws ---------------------------------------------------------------------------------------------------------------


def draw(w: Tensor, valid: Tensor, seeds: Tensor, offsets: Tensor, indices: Tensor | None) -> Tensor:
    """The contract's stage 8 for each output, int64 [N]; -1 where row `indices[i]` (default i) is invalid."""
    batch, vocab = w.shape
    rows = torch.arange(batch, device=w.device) if indices is None else indices.to(torch.int64)
    if batch == 0:
        return torch.full_like(rows, -1)
    inside = (rows >= 0) & (rows < batch)
    rows = torch.where(inside, rows, 0)
    running = w.cumsum(-1)
    first_draw = torch.zeros((), dtype=torch.int64, device=w.device)
    threshold = spec.multiply_high60(spec.uniform60(seeds, offsets, first_draw), running[rows, -1])
    tokens = _first_above(running.flatten(), rows * vocab, vocab, threshold)
    return torch.where(inside & valid[rows], tokens, -1)


def _first_above(running: Tensor, start: Tensor, vocab: int, threshold: Tensor) -> Tensor:
    """The first id whose running mass exceeds the threshold, by bisection: no row is copied for its outputs."""
    low, high = torch.zeros_like(start), torch.full_like(start, vocab - 1)
    for _ in range(vocab.bit_length()):
        middle = (low + high) >> 1
        right = running[start + middle] <= threshold
        low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
    return low.clamp(max=vocab - 1)
