"""From checked arguments to tokens: one call of an engine.

Probabilities are never turned into logits: a logarithm would merge neighbouring values and move sums. Engines take them
as they are (`input="probs"`).
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
    check_order,
    count_outputs,
    limits,
    pack,
    pack_seed_offset,
    raise_where,
    table,
)
from fastsample.outputs import InputKind

Tensor = torch.Tensor

COPIES = 4
"""With up to this many outputs per row of the table, each gets a row of its own; with more, rows are filtered once."""


def sample(
    kind: InputKind,
    values: Tensor,
    given: dict[str, Any],
    order: str,
    indices: Tensor | None,
    generator: torch.Generator | None,
    check_nan: bool,
    seed: Any,
    offset: Any,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A token for each output, from logits or probabilities as they are called; arguments as in the package."""
    x = table(kind, values)
    check_order(order)
    checked = limits(given, len(x))
    outputs = count_outputs(indices, x)
    if check_nan:
        raise_where(_status(kind, x, pack(checked, order, x)) == spec.NAN, kind, x)
    seeds, offsets = pack_seed_offset(seed, offset, generator, outputs, x.device)
    tokens = _tokens(kind, x, pack(checked, order, x), seeds, offsets, indices)
    dtype = torch.int32 if indices is None else indices.dtype
    if not return_valid and x.device.type == "cpu":
        raise_where(tokens < 0, kind, x, indices)
    tokens = _mark(tokens, checked, indices, x)
    return (tokens.clamp(min=0).to(dtype), tokens >= 0) if return_valid else tokens.to(dtype)


def renormalise(probs: Tensor, given: dict[str, Any]) -> Tensor:
    """Kept probabilities over their sum, 0 elsewhere; float32 [B, V]."""
    p = table("probs", probs)
    checked = limits(given, len(p))
    result, status = full("probabilities", "probs", p, pack(checked, "top_k_first", p))
    if p.device.type == "cpu":
        raise_where(status != 0, "probs", p)
    return fill_bad(result, checked, 0.0)


def any_bad(given: tuple[Limit, ...], values: Tensor) -> Tensor | None:
    """Rows with an out-of-range parameter that raised no error (see `Limit`), bool [B]; None where there is none."""
    bad = [one.bad.to(values.device) for one in given if one.bad is not None]
    return torch.stack(bad).any(0) if bad else None


def fill_bad(result: Tensor, given: tuple[Limit, ...], value: float) -> Tensor:
    """The result [B, V], overwritten in rows with such a parameter."""
    bad = any_bad(given, result)
    return result if bad is None else result.masked_fill_(bad[:, None], value)


def _mark(tokens: Tensor, given: tuple[Limit, ...], indices: Tensor | None, values: Tensor) -> Tensor:
    """Put -1 into the outputs of rows with such a parameter."""
    bad = any_bad(given, values)
    if bad is None or len(values) == 0:
        return tokens
    return torch.where(bad if indices is None else bad[indices.clamp(0, len(values) - 1)], -1, tokens)


# One call of an engine -----------------------------------------------------------------------------------------------


def draw(kind: InputKind, x: Tensor, packed: Tensor, seeds: Tensor, offsets: Tensor) -> Tensor:
    """Token ids, int64 [B], -1 in invalid rows."""
    tokens = torch.empty(len(x), dtype=torch.int64, device=x.device)
    status = torch.empty(len(x), dtype=torch.int32, device=x.device)
    select("auto", x).run(x, Rows(packed, seeds, offsets), Outputs(status, tokens, input=kind))
    return tokens


def full(name: str, kind: InputKind, x: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """The output of that name, "filtered" or "probabilities", float32 [B, V]; and the status, int32 [B]."""
    result = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return result, _status(kind, x, packed, **{name: result})


def _status(kind: InputKind, x: Tensor, packed: Tensor, **wanted: Any) -> Tensor:
    """Which rows are invalid and why, int32 [B]; other outputs are filled on the way."""
    status = torch.empty(len(x), dtype=torch.int32, device=x.device)
    zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    select("auto", x).run(x, Rows(packed, zeros, zeros), Outputs(status, input=kind, **wanted))
    return status


# Rows that outputs share ---------------------------------------------------------------------------------------------


def _tokens(
    kind: InputKind, x: Tensor, packed: Tensor, seeds: Tensor, offsets: Tensor, indices: Tensor | None
) -> Tensor:
    """For each output a token of its row, int64 [N]; -1 where the row is invalid or, on a GPU, does not exist."""
    if indices is None:
        return draw(kind, x, packed, seeds, offsets)
    batch, count = len(x), len(indices)
    if batch == 0:
        return torch.full((count,), -1, device=x.device)
    rows = indices.to(torch.int64)
    if x.device.type != "cpu":
        rows = rows.clamp(0, batch - 1)
    if count <= COPIES * batch:
        own = x.expand(count, -1) if batch == 1 else x[rows]
        tokens = draw(kind, own, packed if len(packed) == 1 else packed[rows], seeds, offsets)
    else:
        tokens = _draw_shared(*_masses(kind, x, packed), seeds, offsets, rows)
    return tokens if x.device.type == "cpu" else torch.where(rows == indices, tokens, -1)


def _masses(kind: InputKind, x: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """The contract's mass of what is kept, int64 [B, V], 0 elsewhere; and which rows are valid, bool [B]."""
    if kind == "probs":
        share, status = full("probabilities", kind, x, packed)  # 2^-60 or more of whatever has a mass
        return torch.where(share > 0, spec.mass_of_probs(x.float()), 0), status == 0
    filtered, status = full("filtered", kind, x, packed)
    valid = status == 0
    sound = torch.where(valid[:, None], filtered, torch.zeros_like(filtered))
    return spec.mass(sound, torch.ones_like(sound[:, :1])), valid


def _draw_shared(w: Tensor, valid: Tensor, seeds: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    """The contract's stage 8 for each output: the first id whose running mass exceeds its threshold.

    Found by bisection, so that rows are not copied for their outputs.
    """
    vocab = w.shape[1]
    running, start = w.cumsum(-1).flatten(), rows * vocab
    u = uniform60(seeds, offsets, torch.zeros(1, dtype=torch.int64, device=w.device))
    threshold = spec.multiply_high60(u, running[start + vocab - 1])
    low, high = torch.zeros_like(start), torch.full_like(start, vocab - 1)
    for _ in range(vocab.bit_length()):
        middle = (low + high) >> 1
        right = running[start + middle] <= threshold
        low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
    return torch.where(valid[rows], low.clamp(max=vocab - 1), -1)


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
