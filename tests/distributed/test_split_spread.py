"""Rows that keep tokens past their lists: everything that may be asked of them, in many draws, against whole rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import flat, lm, ties
from split import assert_equal, everywhere, listing

import fastsample as fs
import fastsample.distributed as fd
from fastsample.distributed.engine import SplitEngine

ROWS, VOCAB = 5, 3000
CUTS = (0, 700, 700, 2999, VOCAB)  # one rank has nothing, one a single token
G = torch.Generator().manual_seed(11)
MADE = {"flat": flat(ROWS, VOCAB, G) * 0.7, "ties": ties(ROWS, VOCAB, G) / 4, "mixed": lm(ROWS, VOCAB, G)}
MADE["runs"] = flat(ROWS, VOCAB // 30, G).repeat_interleave(30, 1) * 0.7  # of neighbours that are equal
MADE["mixed"][::2] = MADE["flat"][::2]

PARAMS: dict[str, dict[str, Any]] = {
    "all": {},
    "top-p": {"top_p": 0.95},
    "typical": {"typical_p": 0.8},
    "top-k": {"top_k": 1500},
    "floors": {"epsilon_cutoff": 1e-4, "min_p": 1e-3, "top_a": 1e-3},
    "eta and p-less": {"eta_cutoff": 2e-3, "p_less": True},
    "n-sigma": {"top_n_sigma": 2.5},
    "two searches": {"top_k": 2000, "top_p": 0.9},
    "three searches": {"top_k": 2000, "top_p": 0.9, "typical_p": 0.8, "ties": "all"},
    "joint": {"top_k": 2000, "top_p": 0.9, "order": "joint", "top_n_sigma": 3.0},
    "min-p first": {"min_p": 0.01, "top_p": 0.9, "order": "min_p_first"},
    "temperature last": {"temperature": 1.7, "typical_p": 0.9, "top_p": 0.9, "order": "temperature_last"},
    "floors behind typical": {"typical_p": 0.5, "epsilon_cutoff": 2e-4, "p_less": True},
    "floors behind a low mean": {"typical_p": 0.3, "min_p": 0.1, "eta_cutoff": 1e-2},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 1e-3},
    "xtc past the lists": {"xtc_probability": 0.6, "xtc_threshold": 3e-4, "top_p": 0.95},
    "xtc always": {"xtc_probability": 1.0, "xtc_threshold": 4e-4, "typical_p": 0.9},
    "of each row": {"top_p": [0.9, 1.0, 0.99, 1.0, 0.8], "min_p": [0.0, 0.01, 0.001, 0.0, 0.0], "temperature": 1.1},
}
REPORTS = {"kept": "bitmask", "kept_mass": True, "entropy": True, "logprobs": "processed", "top_logprobs": 4}
ASKED: dict[str, dict[str, Any]] = {
    "reports": {"num_samples": 40, **REPORTS},
    "ids": {"num_samples": 3, "kept": "ids"},
    "draws": {"num_samples": 100},
    "raw": {"num_samples": 20, "logprobs": "raw", "top_logprobs": 2, "output_ids": [[5, 2500]] * ROWS},
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("made", MADE)
def test_equals_whole_rows(made: str, params: str, asked: str) -> None:
    how = PARAMS[params] | ASKED[asked] | {"seed": 3}
    how |= {"frequency_penalty": 0.5} if "output_ids" in how else {}
    whole = fs.sample(MADE[made], **how)
    for lists in ((256, 1024), (3, 16)):
        with listing(*lists):
            assert_equal(everywhere(fd.sample, MADE[made], cuts=CUTS, **how), whole)


OTHERS = ("temperature last", "xtc always")
"""Of these PyTorch tells the share of all mass that is kept, and the first tokens of a set that no list reaches."""


@pytest.mark.parametrize("params", [name for name in PARAMS if name not in OTHERS])
def test_the_engine_has_ranks_tell_all_of_it(params: str, monkeypatch: pytest.MonkeyPatch) -> None:

    def never(*_: Any) -> None:
        raise AssertionError("PyTorch has asked")

    monkeypatch.setattr(SplitEngine, "_ask", never)
    everywhere(fd.sample, MADE["flat"], cuts=CUTS, seed=3, num_samples=2, **PARAMS[params], **REPORTS)
