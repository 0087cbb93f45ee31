"""Sequences of one prompt never share random numbers: n equal completions would teach a trainer nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from table_model import TableModel
from transformers import GenerationConfig

import fastsample as fs
from fastsample.integrations.transformers import fs_generate
from fastsample.integrations.transformers.rows import Batch, sequence_seeds

PROMPTS, EACH, STEPS = 2, 3, 8
SEEDS: dict[str, Any] = {"one": 42, "zero": 0, "per prompt": [42, 43], "the same for both": [42, 42], "none": None}
ALIKE = torch.tensor([[5, 9, 7]] * PROMPTS)
"""The same prompt twice: nothing but the seeds can tell the sequences apart."""


@pytest.fixture(scope="module")
def uniform() -> TableModel:
    """Every token is as likely as any other, and eight random ones are never the same twice."""
    model = TableModel(torch.zeros(1000, 1000)).eval()
    model.generation_config = GenerationConfig(pad_token_id=1)
    return model


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_seeds_are_distinct(seed: Any) -> None:
    seeds = sequence_seeds(seed, Batch(PROMPTS, EACH)).view(PROMPTS, EACH)
    for row in seeds.tolist():
        assert len(set(row)) == EACH
    if seed != [42, 42]:
        assert len(set(seeds.flatten().tolist())) == PROMPTS * EACH


def test_neighbouring_seeds_share_none() -> None:
    """Neither as the seed of a call nor as that of a prompt."""
    calls = [sequence_seeds(seed, Batch(4, 64)) for seed in range(100)]
    prompts = sequence_seeds(list(range(100)), Batch(100, 256))
    assert torch.cat(calls).unique().numel() == 100 * 4 * 64
    assert prompts.unique().numel() == 100 * 256


def texts(model: TableModel, seed: Any, **more: Any) -> list[tuple[int, ...]]:
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": STEPS, "num_return_sequences": EACH}
    out = model.generate(ALIKE, **options | more, custom_generate=fs_generate(seed))
    return [tuple(row) for row in out[:, ALIKE.shape[1] :].tolist()]


@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_sequences_of_generate(uniform: TableModel, seed: Any, temperature: float) -> None:
    torch.manual_seed(3)
    found = texts(uniform, seed, temperature=temperature)
    alike = seed == [42, 42]  # as asked for: then the prompts' sequences are equal in pairs
    assert len(set(found)) == (EACH if alike else PROMPTS * EACH)
    for step in zip(*found, strict=True):  # nor does one run behind another
        assert len(set(step)) > len(found) // 3
    torch.manual_seed(3)
    assert texts(uniform, seed, temperature=temperature) == found
    if seed is None:
        assert not set(texts(uniform, seed, temperature=temperature)) & set(found)


def candidates(model: TableModel, seed: Any) -> list[list[tuple[int, ...]]]:
    results = fs.best_of_n(model, ALIKE, EACH, seed=seed, top_k=0, max_new_tokens=STEPS, temperature=50.0)
    assert isinstance(results, list)
    return [[tuple(c.tokens) for c in sorted(result.candidates, key=lambda c: c.index)] for result in results]


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_candidates_of_best_of_n(uniform: TableModel, seed: Any) -> None:
    torch.manual_seed(3)
    found = candidates(uniform, seed)
    for result in found:
        assert len(set(result)) == EACH
        assert len({tokens[0] for tokens in result}) == EACH
    if seed != [42, 42]:
        assert len({tokens for result in found for tokens in result}) == PROMPTS * EACH
    torch.manual_seed(3)
    assert candidates(uniform, seed) == found
