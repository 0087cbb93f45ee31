"""Requests, a model that repeats itself, and guesses at its texts, for the tests of vLLM's rejection samplers."""

from __future__ import annotations

import random

import torch
from cases import MAKERS
from vllm_runners import VOCAB, Request

LENGTH = 20
STOPS = list(range(0, VOCAB, 7))
REQUESTS: dict[str, Request] = {
    "plain": ({}, [1, 2], []),
    "greedy": ({"temperature": 0.0}, [3], []),
    "top_k and min_p": ({"temperature": 0.7, "top_k": 40, "min_p": 0.05}, [4, 5], []),
    "bias and penalties": (
        {
            "logit_bias": {7: 4.0, 9: -100.0, 11: 3.0},
            "repetition_penalty": 1.4,
            "frequency_penalty": 0.6,
            "presence_penalty": 0.3,
            "top_p": 0.8,
        },
        [7, 11, 2],
        [],
    ),
    "greedy with bias": ({"temperature": 0.0, "logit_bias": {5: 2.0}, "frequency_penalty": 0.4}, [5], [5]),
    "bad words": (
        {"temperature": 0.6, "bad_words": [[1], [2, 3], *[[a, b] for a in range(9) for b in range(9)]]},
        [1],
        [],
    ),
    "min_tokens": ({"min_tokens": 11, "stop_token_ids": STOPS, "temperature": 0.8}, [6], []),
    "allowed": ({"allowed_token_ids": list(range(0, 60)), "min_p": 0.01}, [8], [9]),
    "filters": (
        {"min_p": 0.02, "extra_args": {"typical_p": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.02}},
        [1],
        [],
    ),
    "n-grams": ({"temperature": 0.5, "extra_args": {"no_repeat_ngram_size": 2, "top_a": 0.1}}, [4, 5, 4], [5]),
    "dry": (
        {"temperature": 0.9, "extra_args": {"dry_multiplier": 3.0, "dry_allowed_length": 1, "dry_breakers": [9]}},
        [4],
        [],
    ),
}
SEEDS = [5, 6, 2**40, 2**63 + 1, 7, 8, 9, 10, 11, 12, 13]


_TABLE = MAKERS["lm"](16, VOCAB, torch.Generator().manual_seed(0))


def model(history: list[int]) -> torch.Tensor:
    """Logits [V] that follow a text: a function of its last two tokens that likes a few low ids, so texts repeat."""
    last, before = history[-1], history[-2] if len(history) > 1 else 0
    row = _TABLE[(last * 3 + before) % 16].clone()
    row[:12] += 3.0
    row[(last + 1) % 12] += 2.0
    return row


def guess(text: list[int], done: int, chance: random.Random) -> list[int]:
    """Up to 3 drafts, many of which are right."""
    drafts = [*text[done : done + chance.randrange(4)]]
    for at in range(len(drafts)):
        if chance.random() < 0.25:
            drafts[at] = chance.choice([-1, chance.randrange(VOCAB)])
    return drafts
