"""Speculative decoding: which drafted tokens are accepted, and the token after them."""

from __future__ import annotations

from typing import Any

import torch

from fastsample import reference as spec
from fastsample.arrays import as_tensor
from fastsample.integrations.flashinfer.arguments import pack, pack_seed_offset, raise_where, table
from fastsample.integrations.flashinfer.bits import exactly, excess
from fastsample.integrations.flashinfer.eager import eager
from fastsample.integrations.flashinfer.pipeline import draw, uniform60

Tensor = torch.Tensor


@eager
def chain_speculative_sampling(
    draft_probs: Tensor,
    draft_token_ids: Tensor,
    target_probs: Tensor,
    maybe_output_accepted_token_num: Tensor | None = None,
    maybe_output_emitted_draft_token_num: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Verify n drafted tokens per row so that the emitted tokens follow the target's distribution (Chen et al. 2023).

    Draft i is accepted with probability min(1, target / draft) of its token. The first rejected one is replaced by a
    draw from max(0, target - draft), and nothing follows it. After n accepted drafts, one more token is drawn from the
    last target.

    Args:
        draft_probs: [B, n, V], the distributions that the drafts were drawn from.
        draft_token_ids: int32 or int64 [B, n]. An id outside the vocabulary raises (on a GPU it is rejected).
        target_probs: [B, n + 1, V]. Like draft_probs it must sum to 1, since the ratio compares the two.
        maybe_output_accepted_token_num: int32 or int64 [B], incremented in place by the number of drafts that pass
            their own test, whatever happened before them. (FlashInfer tests the first rejected one a second time.)
        maybe_output_emitted_draft_token_num: likewise, by the number of drafts emitted.
        deterministic, generator, seed, offset: as in the package, with N = B. Draft i is tested with draw i + 1 at the
            offset; the last token is draw 0.

    Returns:
        Token ids int32 [B, n + 1], padded with -1 after the last; the two counters (new int32 [B] if not given).

    Raises:
        TypeError, ValueError: bad shapes, ids or (not on a GPU) probabilities. The counters are unchanged.
    """
    draft, target = _tables(draft_probs, draft_token_ids, target_probs)
    batch, count, _ = draft.shape
    seeds, offsets = pack_seed_offset(seed, offset, generator, batch, draft.device)
    accepted = _counter("maybe_output_accepted_token_num", maybe_output_accepted_token_num, draft)
    emitted = _counter("maybe_output_emitted_draft_token_num", maybe_output_emitted_draft_token_num, draft)

    ids = draft_token_ids.to(torch.int64)
    passes = _passes(draft, target, ids, seeds, offsets)
    prefix = passes.int().cumprod(-1).sum(-1)
    wanted = _wanted(draft, target, prefix)
    last = draw("probs", wanted, pack((), "top_k_first", wanted), seeds, offsets)
    if draft.device.type == "cpu":
        raise_where(last < 0, "target_probs", wanted)

    position = torch.arange(count + 1, device=draft.device)
    tokens = torch.where(position < prefix[:, None], torch.nn.functional.pad(ids, (0, 1)), -1)
    tokens = torch.where(position == prefix[:, None], last[:, None], tokens)
    accepted += passes.sum(-1)
    emitted += prefix
    return tokens.to(torch.int32), accepted, emitted


def _passes(draft: Tensor, target: Tensor, ids: Tensor, seeds: Tensor, offsets: Tensor) -> Tensor:
    """Whether each draft passes its own test, bool [B, n]."""
    count, vocab = draft.shape[1:]
    at = ids.clamp(0, vocab - 1)[:, :, None]
    p, q = (exactly(x.gather(2, at)[:, :, 0]) for x in (draft, target[:, :count]))
    steps = torch.arange(1, count + 1, device=draft.device)
    # 53 of the 60 bits are exact in a float64, so one product and one comparison are the same on every device.
    u = (uniform60(seeds[:, None], offsets[:, None], steps) >> 7).double() * 2.0**-53
    return (u * p < q) & (ids >= 0) & (ids < vocab)


def _wanted(draft: Tensor, target: Tensor, prefix: Tensor) -> Tensor:
    """The distribution of the token after the accepted ones, float32 [B, V] up to a factor."""
    batch, count = draft.shape[:2]
    rows = torch.arange(batch, device=draft.device)
    wanted = target[rows, prefix].float()
    if count == 0:
        return wanted
    proposed = draft[rows, prefix.clamp(max=count - 1)].float()
    rest = excess(wanted, torch.where((prefix < count)[:, None], proposed, 0))
    # If draft and target differ by rounding alone, nothing is left: then draw from the target.
    some = (rest > 0).any(-1, keepdim=True) | rest.isnan().any(-1, keepdim=True)
    return torch.where(some, rest, wanted)


def _tables(draft_probs: Any, draft_token_ids: Any, target_probs: Any) -> tuple[Tensor, Tensor]:
    """Draft and target probabilities as float32, float16 or bfloat16 [B, n, V] and [B, n + 1, V]."""
    ids = draft_token_ids
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"draft_token_ids: expected an int32 or int64 tensor [B, n], got {got}")
    if ids.ndim != 2:
        raise ValueError(f"draft_token_ids: expected shape [B, n], got {tuple(ids.shape)}")
    batch, count = ids.shape
    draft = _table("draft_probs", draft_probs, batch, count)
    target = _table("target_probs", target_probs, batch, count + 1)
    vocab = target.shape[2]
    if draft.shape[2] != vocab or not draft.device == target.device == ids.device:
        parts = ", ".join(f"V = {x.shape[2]} on {x.device}" for x in (draft, target))
        raise ValueError(
            f"draft_probs, target_probs: expected one V and one device with the ids ({ids.device}), got {parts}"
        )
    outside = (ids < 0) | (ids >= vocab)
    if ids.device.type == "cpu" and bool(outside.any()):
        row, at = outside.nonzero()[0].tolist()
        raise ValueError(f"draft_token_ids[{row}, {at}] = {int(ids[row, at])}: expected 0 <= id < {vocab}")
    return draft, target


def _table(name: str, probs: Any, batch: int, count: int) -> Tensor:
    probs = as_tensor(name, probs)
    if not isinstance(probs, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(probs).__name__}")
    if probs.ndim != 3 or probs.shape[:2] != (batch, count):
        raise ValueError(f"{name}: expected shape [{batch}, {count}, V], got {tuple(probs.shape)}")
    checked = table(name, probs.reshape(batch * count, probs.shape[2])).view(probs.shape)
    if checked.device.type == "cpu" and checked.numel():
        status = spec.check_probs(checked.float())
        raise_where((status == spec.NAN) | (status == spec.POSITIVE_INFINITY), name, checked)
    return checked


def _counter(name: str, given: Any, draft: Tensor) -> Tensor:
    batch = len(draft)
    if given is None:
        return torch.zeros(batch, dtype=torch.int32, device=draft.device)
    if not isinstance(given, Tensor) or given.dtype not in (torch.int32, torch.int64):
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"{name}: expected an int32 or int64 tensor [{batch}], got {got}")
    if given.shape != (batch,) or given.device != draft.device:
        raise ValueError(
            f"{name}: expected shape [{batch}] on {draft.device}, got {list(given.shape)} on {given.device}"
        )
    return given
