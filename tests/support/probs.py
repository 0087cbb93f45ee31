"""Probabilities for tests: rows of every kind, and the parameters that they can be sampled by."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor


def softmax(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    return (torch.randn(rows, vocab, generator=g) * 3).softmax(-1)


def flat(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    return torch.rand(rows, vocab, generator=g)


def ties(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    return torch.randint(6, (rows, vocab), generator=g) / 4


def equal(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    return torch.full((rows, vocab), 1 / vocab)


def zeros(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """Most have no probability, some with the sign of -0.0."""
    x = softmax(rows, vocab, g)
    gone = torch.rand(rows, vocab, generator=g)
    return torch.where(gone < 0.5, torch.where(gone < 0.25, -0.0, 0.0), x)


def one(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    at = torch.randint(vocab, (rows, 1), generator=g)
    return torch.zeros(rows, vocab).scatter(1, at, torch.rand(rows, 1, generator=g) + 0.01)


def subnormal(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """Every number is, the largest too; in 16 bits the smallest that there are."""
    return torch.randint(1, 2**20, (rows, vocab), generator=g, dtype=torch.int32).view(torch.float32)


def least(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """0, or the least number that there is, or some of them."""
    return torch.randint(4, (rows, vocab), generator=g, dtype=torch.int32).view(torch.float32)


def wide(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """Over all of the exponents."""
    return torch.randint(2**31 - 2**24, (rows, vocab), generator=g, dtype=torch.int32).view(torch.float32)


def near_unit(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """Whose masses are around 1, 2^20 and 2^40."""
    power = torch.tensor([0.0, 1, 19, 20, 21, 38, 39, 40, 41])[torch.randint(9, (rows, vocab), generator=g)]
    return torch.exp2(-power) * (1 + 2.0**-23 * torch.randint(-4, 4, (rows, vocab), generator=g))


def sorted_(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    return softmax(rows, vocab, g).sort(-1, descending=True).values


MAKERS = (softmax, flat, ties, equal, zeros, one, subnormal, least, wide, near_unit, sorted_)

SETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "k": {"top_k": 7},
    "k-all": {"top_k": 7, "ties": "all"},
    "p": {"top_p": 0.9},
    "k-p": {"top_k": 50, "top_p": 0.8},
    "k-p-joint": {"top_k": 50, "top_p": 0.8, "order": "joint"},
    "m": {"min_p": 0.05},
    "m-tiny": {"min_p": 1e-12},
    "epsilon": {"epsilon_cutoff": 1e-3},
    "top_a": {"top_a": 0.3},
    "p_less": {"p_less": True},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    "xtc-tiny": {"xtc_probability": 0.5, "xtc_threshold": 1e-30},
    "xtc-always": {"xtc_probability": 1.0, "xtc_threshold": 0.01},
    "all": {"top_k": 40, "top_p": 0.95, "min_p": 0.01, "epsilon_cutoff": 1e-4, "top_a": 0.1, "xtc_probability": 0.3},
    "all-vllm": {"top_k": 40, "top_p": 0.95, "min_p": 0.01, "p_less": True, "order": "min_p_first"},
    "last": {"top_p": 0.9, "min_p": 0.02, "epsilon_cutoff": 1e-3, "order": "temperature_last"},
    "rows": {
        "temperature": [0.0, 1.0, 1.0, 1.0, 1.0],
        "top_k": [0, 0, 5, 2**20, 30],
        "top_p": [0.5, 0.9, 1.0, 1.0, 0.99],
        "min_p": [0.0, 0.1, 0.0, 1.0, 0.0],
        "xtc_probability": [0.5, 0.0, 1.0, 0.0, 0.7],
        "order": ["joint", "top_k_first", "min_p_first", "temperature_last", "top_k_first"],
    },
}


def finish(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast; a row in which nothing is left above 0 gets the least number that there is."""
    x = x.clamp(max=torch.finfo(dtype).max).to(dtype)
    least = torch.tensor([1], dtype=torch.int16 if dtype.itemsize == 2 else torch.int32).view(dtype)
    x[:, 0] = torch.where((x > 0).any(-1), x[:, 0], least)
    return x


def allowed(words: Tensor, vocab: int) -> Tensor:
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32)) & 1
    return bits.reshape(len(words), -1)[:, :vocab].bool()


def invalid_probs(vocab: int, dtype: torch.dtype) -> Tensor:
    """Each of what makes a row invalid, in whole blocks and in the last, alone and with another."""
    values = [torch.nan, -torch.nan, torch.inf, -torch.inf, -1.0, -torch.finfo(dtype).smallest_normal, -0.0]
    rows = softmax(2 * len(values) + 3, vocab, torch.Generator().manual_seed(2))
    for i, value in enumerate(values):
        rows[2 * i, vocab - 1] = value
        rows[2 * i + 1, [0, vocab // 2]] = torch.tensor([-1.0, value])
    rows[-3], rows[-2], rows[-1] = 0.0, -0.0, -1.0
    return rows.to(dtype)
