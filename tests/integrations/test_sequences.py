"""The loop that adapters to decoders share, around a decoder that is a table: its logits follow from the last id."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest
import torch
from decoded import drawn

import fastsample as fs
from fastsample.integrations.sequences import Sequences, collected, end_ids, prompts_of, token_ids

VOCAB, STEPS = 50, 20
TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3)) * 2
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
SEEDS = [7, 2**64 - 1, 9]
FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": -0.2},
    {"dry_multiplier": 0.8, "dry_allowed_length": 1},
    {"no_repeat_ngram_size": 2},
]


def run(prompts: list[list[int]], seeds: list[int], ends: Any = (), steps: int = STEPS, **fields: Any) -> Any:
    breakers = fields.pop("dry_breakers", None)
    sequences = Sequences(fs.Sampler(batch_size=len(prompts), seed=seeds, **fields), breakers)
    for row, prompt in enumerate(prompts):
        sequences.start(row, np.array(prompt))
    return sequences.run(TABLE[[p[-1] for p in prompts]], lambda new: TABLE[list(new.values())], ends, steps)


def by_hand(row: int, steps: int = STEPS, **fields: Any) -> list[int]:
    prompt = PROMPTS[row]
    return drawn(lambda new: TABLE[[*prompt, *new][-1]], steps, SEEDS[row], prompt, **fields)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_sequence_is_the_same_in_any_batch(fields: dict[str, Any]) -> None:
    wanted = [by_hand(row, **fields) for row in range(3)]
    assert collected(run(PROMPTS, SEEDS, **fields), 3) == wanted
    assert collected(run(PROMPTS[::-1], SEEDS[::-1], **fields), 3) == wanted[::-1]
    assert collected(run(PROMPTS[1:2], SEEDS[1:2], **fields), 1) == wanted[1:2]


def test_a_text_that_outgrows_its_table() -> None:
    """The table of ids has room for 64 at first."""
    found = collected(run(PROMPTS[:1], SEEDS[:1], steps=70, frequency_penalty=0.5), 1)
    assert found == [by_hand(0, 70, frequency_penalty=0.5)]


def test_breakers_reach_dry() -> None:
    fields = {"dry_multiplier": 3.0, "dry_allowed_length": 1, "dry_breakers": list(range(25))}
    found = collected(run(PROMPTS, SEEDS, **fields), 3)
    assert found == [by_hand(row, **fields) for row in range(3)]
    assert found != [by_hand(row, **(fields | {"dry_breakers": None})) for row in range(3)]


def test_parameters_of_each_row() -> None:
    found = collected(run(PROMPTS, SEEDS, temperature=[0.0, 1.0, 2.0], repetition_penalty=[1.0, 1.5, 1.0]), 3)
    rows = [(0.0, 1.0), (1.0, 1.5), (2.0, 1.0)]
    assert found == [by_hand(at, temperature=t, repetition_penalty=r) for at, (t, r) in enumerate(rows)]


def test_sequences_end_one_by_one() -> None:
    whole = [by_hand(row, temperature=1.5) for row in range(3)]
    end = whole[1][4]
    wanted = [ids[: ids.index(end) + 1] if end in ids else ids for ids in whole]
    assert len({len(ids) for ids in wanted}) > 1
    for ends in (end_ids("eos", end), [end, end], lambda token: token == end):
        assert collected(run(PROMPTS, SEEDS, ends, temperature=1.5), 3) == wanted


def test_a_decoder_is_not_asked_for_more_than_is_drawn() -> None:
    asked: list[dict[int, int]] = []
    sequences = Sequences(fs.Sampler(batch_size=1, seed=[1]))
    sequences.start(0, np.array([1]))
    steps = sequences.run(TABLE[1:2], lambda new: asked.append(new) or TABLE[list(new.values())], (), 3)
    assert len(list(steps)) == 3
    assert len(asked) == 2


def test_a_slot_starts_anew() -> None:
    sampler = fs.Sampler(batch_size=2, seed=[1, 2], frequency_penalty=5.0)
    sequences = Sequences(sampler)
    for prompt in ([1, 2, 3], [4]):
        sequences.start(1, np.array(prompt))
        sampler.set_row(1, seed=9)
        row = TABLE[7:8]
        found = [int(sequences.draw(row, [1]).tokens[0]) for _ in range(10)]
        assert found == drawn([TABLE[7]] * 10, 10, 9, prompt, frequency_penalty=5.0)


def test_a_row_that_cannot_be_sampled_moves_nothing() -> None:
    sequences = Sequences(fs.Sampler(batch_size=1, seed=[1], presence_penalty=1.0))
    sequences.start(0, np.array([1]))
    with pytest.raises(ValueError, match="row 0"):
        sequences.draw(torch.full((1, VOCAB), torch.nan), [0])
    assert [int(sequences.draw(TABLE[:1], [0]).tokens[0])] == drawn(TABLE[:1], 1, 1, [1], presence_penalty=1.0)


@pytest.mark.parametrize(
    ("adapter", "needs", "command"),
    [
        ("llama_cpp", "llama_cpp", "pip install llama-cpp-python"),
        ("onnx_genai", "onnxruntime_genai", "pip install onnxruntime-genai"),
        ("mlx_lm", "mlx.core", "pip install mlx-lm"),
    ],
)
def test_a_missing_package_is_named(adapter: str, needs: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"fastsample.integrations.{adapter}"
    for module in [module for module in sys.modules if module.startswith(name)]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, needs, None)
    with pytest.raises(ModuleNotFoundError, match=f"{name} needs .*: {command}"):
        importlib.import_module(name)


@pytest.mark.parametrize(
    ("ids", "error", "told"),
    [
        ("text", TypeError, r"p: expected a list or an array \[L\] of token ids, got 'text'"),
        (7, TypeError, "p: expected a list"),
        (None, TypeError, "p: expected a list"),
        ([1.0, 2.0], TypeError, "p: expected a list"),
        ([True], TypeError, "p: expected a list"),
        ([[1], [2]], TypeError, "p: expected a list"),
        ([[1], [2, 3]], TypeError, "p: expected a list"),
        (["a"], TypeError, "p: expected a list"),
        ([2**70], TypeError, "p: expected a list"),
        ([1, -1], ValueError, r"p\[1\] = -1: expected a token id, 0 <= id < 2\^20"),
        (np.array([2**20]), ValueError, r"p\[0\] = 1048576: expected a token id"),
        ([], ValueError, "p: expected at least 1 token id, got none"),
    ],
)
def test_bad_ids(ids: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        token_ids("p", ids, 1)


@pytest.mark.parametrize("ids", [[3, 4], (3, 4), np.array([3, 4], dtype=np.uint16), torch.tensor([3, 4])])
def test_ids(ids: Any) -> None:
    assert token_ids("p", ids).tolist() == [3, 4]
    assert token_ids("p", ids[:0]).tolist() == []


def test_prompts() -> None:
    found = prompts_of("prompts", ["ab", [3]], lambda text: list(text.encode()))
    assert [one.tolist() for one in found] == [[97, 98], [3]]
    for bad, error, told in [
        ("text", TypeError, "prompts: expected a list of prompts, got 'text'"),
        (5, TypeError, "prompts: expected a list of prompts, got 5"),
        ([], ValueError, "prompts: expected at least one prompt"),
        ([[1], []], ValueError, r"prompts\[1\]: expected at least 1 token id"),
        ([[1], "text"], TypeError, r"prompts\[1\]: expected a list or an array"),
    ]:
        with pytest.raises(error, match=told):
            prompts_of("prompts", bad)
