"""Whether ranks agree about what they sample: found out once, before anything depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch

from fastsample.backends import DTYPES, INPUTS, MODES, Outputs
from fastsample.distributed.wire import Wire
from fastsample.inputs import Rows

Tensor = torch.Tensor

DRAFTS = ("rule", "draft_ids", "draft_logits or draft_probs", "draft_params")
"""What else the rules "chain" and "block" compare, an integer of each; 0 of other calls."""
_REPORTS = {"kept": ("kept_count", "kept_bitmask"), "kept_mass": ("log_kept_mass",), "entropy": ("entropy",)}
"""Arguments, and the buffers that they ask for."""


def require_agreement(
    wire: Wire,
    start: int,
    vocab: int,
    own: Tensor,
    rows: Rows,
    out: Outputs,
    same_seeds: bool,
    native: bool,
    drafts: Sequence[int],
) -> bool:
    """Compare, in one message, everything that ranks must have in common.

    Args:
        own: [B, V_r], this rank's part of the rows.
        out: what is asked.
        native: whether this rank's engine answers for it.
        drafts: an integer for each of `DRAFTS`.

    Returns:
        Whether every rank's engine does: these exchange other messages.

    Raises:
        ValueError: on every rank alike; the message names the argument and the ranks.
    """
    numbers = {"vocab_size": vocab, "rows of logits": len(own)}
    numbers |= {"num_samples": out.num_samples, "top_logprobs": out.num_top}
    codes = {"logits.dtype": DTYPES[own.dtype], "input": INPUTS[out.input], "logprobs": MODES[out.mode]}
    codes |= {name: sum(getattr(out, buffer) is not None for buffer in _REPORTS[name]) for name in _REPORTS}
    codes |= dict(zip(DRAFTS, drafts, strict=True))
    digests: dict[str, Any] = {"the sampling parameters": rows.records, "offset": rows.offsets}
    digests |= {"seed": rows.seeds if same_seeds else None, "bias": rows.bias and rows.bias.tensors}
    digests |= {"prompt_ids": rows.prompt_ids, "output_ids": rows.output_ids, "dry_breakers": rows.breakers}
    digests |= {"draft_ids": rows.drafted_ids}
    split = [start, own.shape[1], native]
    words = [*split, *numbers.values(), *codes.values(), *map(digest, digests.values())]
    told = wire.gather(torch.tensor(words, dtype=torch.int64)).tolist()
    for at, name in enumerate((*numbers, *codes, *digests), len(split)):
        for rank, theirs in enumerate(told):
            if theirs[at] != told[0][at]:
                has = f" ({theirs[at]}, and {told[0][at]} on rank 0)" if name in numbers else ""
                raise ValueError(f"{name}: expected the same on every rank, rank {rank} differs from rank 0{has}")
    end = 0
    for rank, (begin, width, *_) in enumerate(told):
        if begin != end and (width or begin < end):
            raise ValueError(f"vocab_start = {begin} (rank {rank}): expected {end}, where the tokens before it end")
        end = begin + width if width else end
    if end != vocab:
        raise ValueError(f"vocab_size = {vocab}: expected {end}, where the tokens of the last rank end")
    return all(theirs[2] for theirs in told)


def digest(values: Any) -> int:
    """64 bits that tell tensors from others."""
    state = blake2b(digest_size=8)
    for part in values if isinstance(values, tuple) else (values,):
        if part is not None:
            state.update(repr((part.dtype, part.shape)).encode())
            state.update(part.detach().cpu().contiguous().numpy().tobytes())
    return int.from_bytes(state.digest(), "little", signed=True)
