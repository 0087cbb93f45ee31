"""A rollout on disk: what one engine has drawn, and what another makes of the same logits, seeds and positions.

TRITON_INTERPRET=1 python rollout.py ROLLOUT.pt FOUND.pt    # in a process of its own: Triton decides at import
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import fastsample as fs

SEQUENCES, STEPS, VOCAB = 5, 6, 300
ASKED: dict[str, Any] = {"kept": "ids", "kept_mass": True, "entropy": True, "logprobs": "processed"}
PARAMS: dict[str, list[Any]] = {
    "temperature": [0.7, 1.0, 1.3, 0.0, 0.9],
    "top_k": [0, 40, 0, 5, 20],
    "top_p": [0.9, 1.0, 0.6, 1.0, 0.95],
    "min_p": [0.0, 0.02, 0.0, 0.0, 0.05],
    "xtc_probability": [0.0, 0.0, 0.5, 0.0, 0.0],
}
GIVEN = ("logits", "seed", "offset", "params")
"""What a replay needs; all else of a rollout is what came out."""


def write(path: Path, backend: str, dtype: torch.dtype) -> None:
    """Decode a model whose logits are a table, step by step; rows are stored sequence by sequence.

    The last sequence comes to a token that leads to a NaN. What it draws from there on is -1 with a status.
    """
    g = torch.Generator().manual_seed(5)
    table = (torch.randn(VOCAB, VOCAB, generator=g) * 3).to(dtype)
    sampler = fs.Sampler(
        batch_size=SEQUENCES, seed=range(11, 11 + SEQUENCES), on_invalid="flag", **PARAMS, backend=backend
    )
    tokens, rows = torch.arange(SEQUENCES), []
    for step in range(STEPS):
        logits = table[tokens.clamp(min=0)].clone()
        logits[-1, 7] = torch.nan if step > 2 else logits[-1, 7]
        rows.append(logits)
        tokens = sampler(logits).tokens
    position = torch.arange(STEPS).repeat(SEQUENCES)
    given = {
        "logits": torch.stack(rows, 1).flatten(0, 1),
        "seed": torch.arange(11, 11 + SEQUENCES).repeat_interleave(STEPS),
        "offset": position,
        "params": fs.SamplingParams(**{k: [v for v in vs for _ in range(STEPS)] for k, vs in PARAMS.items()}),
    }
    rollout = {**given, **replay(given, backend)}
    assert torch.equal(rollout["tokens"].view(SEQUENCES, STEPS)[:, -1], tokens)
    torch.save(rollout, path)


def replay(rollout: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    """What an engine makes of a rollout's rows, all in one call."""
    given = {name: rollout[name] for name in GIVEN}
    out = fs.sample(**given, **ASKED, on_invalid="flag", backend=backend)
    return {name: value for name in out.__slots__ if (value := getattr(out, name)) is not None}


def main() -> None:
    from triton_interpreter import patch_once

    from fastsample.backends import triton as engine

    torch.set_num_threads(1)
    patch_once()
    engine.ENGINE.block, engine.ENGINE.parts = 128, 1  # several chunks of a small row
    torch.save(replay(torch.load(sys.argv[1], weights_only=True), "triton"), sys.argv[2])


if __name__ == "__main__":
    main()
