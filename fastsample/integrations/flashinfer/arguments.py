"""FlashInfer's arguments, checked and packed for the engines."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from fastsample.arrays import as_tensor
from fastsample.checks import check_logits, whole
from fastsample.inputs import pack_offsets, pack_params, pack_seeds
from fastsample.integrations.flashinfer.bits import exactly, is_negative, rounded
from fastsample.params import write_columns

Tensor = torch.Tensor

_SMALLEST = 2.0**-126  # what the engines get instead of 0: as top_p, its target is 1, the most probable token
_RANGES = {
    "top_k": "1 <= value",
    "top_p": "0 <= value <= 1",
    "min_p": "0 <= value <= 1",
    "temperature": "a finite number, 0 <= value <= 2^20",
}


def table(name: str, values: Any) -> Tensor:
    """Logits or probabilities [B, V], checked; float64 becomes float32, as in FlashInfer."""
    values = as_tensor(name, values)
    if isinstance(values, Tensor):
        if values.ndim != 2:
            raise ValueError(f"{name}: expected shape [B, V], got {tuple(values.shape)}")
        values = values.detach()
        values = rounded(values) if values.dtype == torch.float64 else values
        values = values if values.shape[1] == 0 or values.stride(1) == 1 else values.contiguous()
    try:
        return check_logits(values)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("logits", name, 1)) from None


# Parameters ----------------------------------------------------------------------------------------------------------


@dataclass
class Limit:
    """top_k, top_p, min_p or temperature: a number, or one value per row of the table."""

    name: str
    value: Any  # int, float or Tensor [B]
    bad: Tensor | None = None  # bool [B]: out of range, where raising would mean waiting for the device


def limits(given: dict[str, Any], rows: int) -> tuple[Limit, ...]:
    return tuple(_limit(name, value, rows) for name, value in given.items())


def check_bound(top_k_max: Any) -> None:
    """TypeError or ValueError unless it may bound a top_k."""
    if top_k_max is not None and whole("top_k_max", top_k_max) < 1:
        raise ValueError(f"top_k_max = {top_k_max}: expected an integer >= 1, or None")


def _limit(name: str, value: Any, rows: int) -> Limit:
    """A checked parameter. A tensor on a GPU is not read: bad values make their rows invalid."""
    kind: Any = numbers.Integral if name == "top_k" else numbers.Real
    value = as_tensor(name, value)
    if not isinstance(value, Tensor):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} = {value!r}: expected a number, {_RANGES[name]}, or a tensor [{rows}] of them")
        if not _in_range(name, value):
            raise ValueError(f"{name} = {value!r}: expected {_RANGES[name]}")
        return Limit(name, min(int(value), 2**31 - 1) if name == "top_k" else float(value))
    if value.ndim != 1 or len(value) != rows:
        got = f"shape {tuple(value.shape)}"
        raise ValueError(f"{name}: expected a number or a tensor with one value per row, shape [{rows}], got {got}")
    if value.is_complex() or value.dtype == torch.bool or (name == "top_k" and value.is_floating_point()):
        raise TypeError(f"{name}: expected {'integers' if name == 'top_k' else 'numbers'}, got {value.dtype}")
    good = _in_range(name, value)
    if value.device.type != "cpu":
        return Limit(name, torch.where(good, value, 1), ~good)
    if not bool(good.all()):
        row = int((~good).nonzero()[0, 0])
        raise ValueError(f"{name} = {value[row].item()!r} (row {row}): expected {_RANGES[name]}")
    return Limit(name, value)


def _in_range(name: str, value: Any) -> Any:
    if name == "top_k":
        return value >= 1
    return (value >= 0) & (value <= (2**20 if name == "temperature" else 1))


def pack(given: tuple[Limit, ...], order: str, like: Tensor) -> Tensor:
    """The packed records for a table like this: int32 [B or 1, fields] on its device."""
    fixed = {one.name: _number(one.value) for one in given if not isinstance(one.value, Tensor)}
    packed = _packed(tuple(fixed.items()), order, like.device)
    columns = {one.name: _column(one).to(like.device) for one in given if isinstance(one.value, Tensor)}
    if columns:
        packed = packed.repeat(len(like), 1)
        write_columns(packed, columns)
    return packed


def _column(limit: Limit) -> Tensor:
    values: Tensor = limit.value
    if limit.name == "top_k":
        return values.clamp(max=2**31 - 1).int()
    return values.float().clamp(min=_SMALLEST)


def _number(value: float) -> float:
    return value if isinstance(value, int) else max(value, _SMALLEST)


@lru_cache(maxsize=256)
def _packed(fields: tuple[tuple[str, float], ...], order: str, device: torch.device) -> Tensor:
    """Records kept on the device, so that a captured graph copies nothing from the host."""
    return pack_params(None, {**dict(fields), "order": order}, 1).to(device)


# Seeds ---------------------------------------------------------------------------------------------------------------


def pack_seed_offset(
    seed: Any, offset: Any, generator: torch.Generator | None, rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Seeds [N] and offsets [N or 1] of the outputs, int64 bits on the device."""
    if seed is None:
        if offset is not None:
            raise ValueError("offset: expected a seed with it; without one, both come from the generator")
        seed, offset = _from_generator(generator)
    elif offset is None:
        offset = torch.zeros(1, dtype=torch.int64, device=device) if isinstance(seed, Tensor) else 0
    if isinstance(seed, Tensor) != isinstance(offset, Tensor):
        raise ValueError("seed, offset: expected two integers or two tensors")
    if not isinstance(seed, Tensor):
        return pack_seeds(seed, rows).to(device), pack_offsets(offset, rows).to(device)
    seeds, offsets = (_bits(name, value, rows, device) for name, value in (("seed", seed), ("offset", offset)))
    if len(seeds) != rows:  # one seed for all: each row needs its own stream
        seeds = row_seeds(seeds, rows)
    return seeds, offsets


def _from_generator(generator: torch.Generator | None) -> tuple[int | None, int]:
    """A CPU generator gives a seed of 63 bits; a GPU's gives its seed and position and advances, without waiting."""
    if generator is None:
        return None, 0
    if generator.device.type == "cpu":
        return int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator)), 0
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return generator.initial_seed(), offset


def _bits(name: str, value: Tensor, rows: int, device: torch.device) -> Tensor:
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")
    if value.dtype not in (torch.int64, torch.uint64):
        raise ValueError(f"{name}: expected int64 or uint64, got {value.dtype}")
    if value.ndim != 1 or len(value) not in (1, rows):
        raise ValueError(f"{name}: expected shape [1] or [{rows}] (one per output), got {tuple(value.shape)}")
    return value.view(torch.int64).contiguous()


def row_seeds(seed: Tensor, rows: int) -> Tensor:
    """`fastsample.inputs.row_seeds` of a seed [1] on the device."""
    return _splitmix64(_splitmix64(seed) + torch.arange(rows, device=seed.device))


def _splitmix64(z: Tensor) -> Tensor:
    """int64 arithmetic wraps modulo 2^64."""
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


# The rest ------------------------------------------------------------------------------------------------------------


def temperatures(value: Any, x: Tensor) -> Limit:
    """The temperature; FlashInfer wants one per row or one number."""
    if isinstance(value, Tensor):
        if value.shape != x.shape[:1] or not value.is_floating_point() or value.device != x.device:
            got = f"{value.dtype} {list(value.shape)} on {value.device}"
            raise ValueError(f"temperature: expected a number or floats, shape [{len(x)}], on {x.device}, got {got}")
    elif not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"temperature = {value!r}: expected None, a number or a tensor [{len(x)}]")
    return _limit("temperature", value, len(x))


def check_order(order: str) -> None:
    if order not in ("top_k_first", "joint"):
        raise ValueError(f"filter_apply_order = {order!r}: expected 'top_k_first' or 'joint'")


def count_outputs(indices: Tensor | None, values: Tensor) -> int:
    """N, after checking the indices."""
    if indices is None:
        return len(values)
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64) or indices.ndim != 1:
        got = f"{indices.dtype} {list(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
        raise ValueError(f"indices: expected an int32 or int64 tensor [N], got {got}")
    if indices.device != values.device:
        raise ValueError(f"indices: expected a tensor on {values.device}, got one on {indices.device}")
    outside = (indices < 0) | (indices >= len(values))
    if indices.device.type == "cpu" and bool(outside.any()):
        at = int(outside.nonzero()[0, 0])
        raise ValueError(f"indices[{at}] = {int(indices[at])}: expected a row, 0 <= value < {len(values)}")
    return len(indices)


def raise_where(bad: Tensor, name: str, values: Tensor, row_of: Tensor | None = None) -> None:
    """ValueError that names the first bad row [V] of `values` and what is wrong; bad[i] belongs to row_of[i]."""
    if not bool(bad.any()):
        return
    at = tuple(bad.nonzero()[0].tolist())
    at = at if row_of is None else (int(row_of[at]),)
    x = values[at]
    if bool(x.isnan().any()):
        reason = "a NaN"
    elif bool((x == float("inf")).any()):
        reason = "a +inf"
    elif name == "logits":
        reason = "nothing above -inf"
    elif bool(is_negative(x).any()):
        reason = f"a negative value, {float(exactly(x).amin()):g}"
    else:
        reason = "nothing above 0"
    where = ", ".join(f"{label} {i}" for label, i in zip(("row", "position"), at, strict=False))
    raise ValueError(f"{name}: {where} has {reason}")
