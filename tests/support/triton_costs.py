"""Counts, in Triton's interpreter, what a row costs on a GPU whatever its clock: barriers and passes over the row.

TRITON_INTERPRET=1 python triton_costs.py COUNTS.json    # prints the table too
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from triton_interpreter import count_calls, patch_once

import fastsample as fs
from fastsample.backends.triton_launch import THREADS

VOCAB = 16384
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "T": {"temperature": 0.8},
    "min-p": {"min_p": 0.05},
    "k50": {"top_k": 50},
    "k50 p.9": {"top_k": 50, "top_p": 0.9},
    "k50 p.9 min-p": {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "order": "min_p_first"},
    "k50 p.9 joint": {"top_k": 50, "top_p": 0.9, "order": "joint"},
    "k50 p.9, 8 draws": {"top_k": 50, "top_p": 0.9, "num_samples": 8},
    "k50 p.9, 9 draws": {"top_k": 50, "top_p": 0.9, "num_samples": 9},
    "k50 p.9 temperature last": {"top_k": 50, "top_p": 0.9, "temperature": 2.0, "order": "temperature_last"},
    "k50 typical.9 p.9 last": {"top_k": 50, "typical_p": 0.9, "top_p": 0.9, "order": "temperature_last"},
    "k50 xtc": {"top_k": 50, "xtc_probability": 0.5},
    "k192": {"top_k": 192},
    "k193": {"top_k": 193},
    "p.9": {"top_p": 0.9},
}
BASIC = ("greedy", "T", "k50 p.9")  # which rows of bfloat16 are asked too


def rows() -> dict[str, torch.Tensor]:
    """Rows as of a language model, and one of equal logits, of which no list holds all that tie."""
    x = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    return {"f32": x, "bf16": x.bfloat16(), "equal": torch.zeros(1, VOCAB)}


def count() -> dict[str, tuple[int, float, list[int]]]:
    """Barriers among the programs of a row, how many times it is read, and its tokens, by row and mode."""
    from fastsample.backends import triton as engine
    from fastsample.kernels import row as kernel

    patch_once()
    engine.ENGINE.parts = 1  # a lone program comes to the barriers of many
    calls = count_calls(kernel.meet, kernel.ids_of)
    found = {}
    for name, logits in rows().items():
        chunks = VOCAB / (16 // logits.element_size() * THREADS)
        for mode in {"f32": MODES, "bf16": BASIC, "equal": ["k50 p.9"]}[name]:
            calls.clear()
            tokens = fs.sample(logits, seed=1, backend="triton", **MODES[mode]).tokens
            found[f"{name}: {mode}"] = calls["meet"], calls["ids_of"] / chunks, tokens.flatten().tolist()
    return found


def main() -> None:
    torch.set_num_threads(1)
    found = count()
    for name, (barriers, passes, _) in found.items():
        print(f"{name:32}{barriers:4} barriers {passes:6.2f} passes")
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
