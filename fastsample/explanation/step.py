"""A row explained: the reference's stages one by one, each beside what was there before it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from fastsample import reference as spec
from fastsample.explanation.cuts import cuts, ranked, values_of
from fastsample.explanation.result import Candidate, Cut, Draw, Edit, Record, Step
from fastsample.inputs import Bias, Rows
from fastsample.outputs import STATUS
from fastsample.params import SamplingParams
from fastsample.reference.draw import PLAIN_DRAW, XTC_COIN
from fastsample.reference.filters import Ranked
from fastsample.reference.process import Params, apply_bias, apply_bitmask, apply_history, apply_penalties, columns

Tensor = torch.Tensor

RECORDED = 512
"""How many tokens of a row the page knows one by one."""


class Words:
    """The texts of tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str | None:
        if self._tokenizer is None or token < 0:
            return None
        if token not in self._known:
            self._known[token] = self._text(token)
        return self._known[token]

    def _text(self, token: int) -> str:
        text = str(self._tokenizer.decode([token]))
        if hasattr(self._tokenizer, "convert_ids_to_tokens"):
            piece = self._tokenizer.convert_ids_to_tokens(token)
            if piece is None:
                return ""  # models have rows for more ids than their tokenizers have tokens
            if str(piece).startswith(("▁", "Ġ")) and not text.startswith(" "):  # decoders drop a text's first space
                return f" {text}"
        return text


def row_of(rows: Rows, row: int) -> Rows:
    """The inputs of one row as those of a batch."""

    def own(values: Tensor) -> Tensor:
        return values[min(row, len(values) - 1)][None]

    bias = rows.bias
    if bias is not None:
        start, end = bias.row_ptr[row : row + 2].tolist()
        ends = torch.tensor([0, end - start], device=bias.ids.device)
        bias = Bias(ends, bias.ids[start:end], bias.values[start:end], bias.vocab)
    found = Rows(own(rows.records), own(rows.seeds), own(rows.offsets), bias=bias)
    for name in ("bitmask", "prompt_ids", "output_ids", "breakers"):
        if (values := getattr(rows, name)) is not None:
            setattr(found, name, own(values))
    return found


def explained(logits: Tensor, rows: Rows, number: int, index: int, top: int, words: Words) -> Step:
    """The step of logits [1, V]; `number` is the row's in its batch, `index` its draw's."""
    params = columns(rows)
    edited = list(edits(logits, rows, params))
    x = edited[-1][1]
    status = int(spec.check(x))
    alive = int((x > spec.NEG_INF).sum())
    told: dict[str, Any] = {
        "row": number,
        "status": status,
        "problem": STATUS.get(status),
        "params": values_of(params),
        "seed": int(rows.seeds) % 2**64,
        "offset": int(rows.offsets) % 2**64,
        "index": index,
        "vocab": logits.shape[1],
        "alive": alive,
        "edits": tuple(Edit(name, *differences(a, b)) for (_, a), (name, b) in pairwise(edited)),
    }
    if status:
        lost = banned(edited, top, words)
        nothing: dict[str, Any] = {"cuts": (), "candidates": (), "kept_count": 0, "draw": None, "text": None}
        return Step(**told, **nothing, banned=lost, kept_mass=torch.nan, entropy=torch.nan, token=-1)
    dist = spec.distribution(logits, rows)
    draw, token = drawn(dist, rows, index)
    row = ranked(x, params)
    cut = cuts(row, params)
    shown = row.ids[0, : min(top, alive)].tolist()
    shown += [] if token in shown else [token]
    recorded = row.ids[0, : min(RECORDED, alive)]
    return Step(
        **told,
        cuts=tuple(c for c, _ in cut),
        candidates=tuple(candidates(shown, edited, row, cut, dist, words)),
        banned=banned(edited, top, words),
        kept_count=int(dist.kept.sum()),
        kept_mass=float(spec.log_kept_mass(dist).exp()),
        entropy=float(spec.entropy(dist)),
        token=token,
        text=words(token),
        draw=draw,
        record=Record(recorded.cpu(), [words(t) for t in recorded.tolist()], row.x[0, :alive].clone().cpu()),
    )


# Stages 0 to 3 -------------------------------------------------------------------------------------------------------


def edits(logits: Tensor, rows: Rows, params: Params) -> Iterator[tuple[str, Tensor]]:
    """The logits as given, then after each edit that is on: (name, float32 [1, V])."""
    x = logits.detach().to(torch.float32, copy=True)
    yield "", x
    if rows.bitmask is not None:
        yield "bitmask", (x := apply_bitmask(x, rows.bitmask))
    if rows.bias is not None:
        yield "bias", (x := apply_bias(x.clone(), rows.bias))
    neutral = columns(Rows(SamplingParams().pack().to(x.device), rows.seeds, rows.offsets))
    for names, apply in (
        (("repetition_penalty", "frequency_penalty", "presence_penalty"), apply_penalties),
        (("dry_multiplier", "no_repeat_ngram_size"), apply_history),
    ):
        for name in names:
            if bool(params[name] != neutral[name]):
                others = {other: neutral[other] for other in names if other != name}
                yield name, (x := apply(x.clone(), rows, {**params, **others}))


def differences(before: Tensor, after: Tensor) -> tuple[int, int]:
    """How many logits differ, and how many of them are now -inf."""
    changed = (before != after) & ~(before.isnan() & after.isnan())
    return int(changed.sum()), int((changed & (after == spec.NEG_INF)).sum())


def banned(edited: list[tuple[str, Tensor]], top: int, words: Words) -> tuple[Candidate, ...]:
    """Of the most probable tokens as given, those that an edit made -inf."""
    given, x = edited[0][1], edited[-1][1]
    likely = spec.rank_order(torch.where(given.isnan(), spec.NEG_INF, given))[0, :top].tolist()
    lost = [t for t in likely if x[0, t] == spec.NEG_INF and given[0, t] > spec.NEG_INF]
    found = []
    for token in lost:
        by = next(name for name, y in edited[1:] if y[0, token] == spec.NEG_INF)
        logits = (float(given[0, token]), spec.NEG_INF)
        found.append(Candidate(token, words(token), 0, *logits, edits_of(edited, token), 0.0, (), 0.0, by))
    return tuple(found)


def edits_of(edited: list[tuple[str, Tensor]], token: int) -> tuple[str, ...]:
    """Names of the edits that changed a token's logit."""
    return tuple(name for (_, a), (name, b) in pairwise(edited) if a[0, token] != b[0, token])


# The tokens and the draw ---------------------------------------------------------------------------------------------


def candidates(
    tokens: list[int],
    edited: list[tuple[str, Tensor]],
    row: Ranked,
    cut: list[tuple[Cut, Tensor]],
    dist: spec.Distribution,
    words: Words,
) -> Iterator[Candidate]:
    """The given tokens and what became of them."""
    place = torch.empty_like(row.ids[0]).scatter(0, row.ids[0], torch.arange(row.ids.shape[1], device=row.ids.device))
    total = int(row.mass.sum())
    final = spec.probabilities(dist)[0]
    for token in tokens:
        at = int(place[token])
        mass = int(row.mass[0, at])
        after = tuple(mass / max(1, c.mass) if bool(kept[at]) else 0.0 for c, kept in cut)
        by = next((c.name for c, kept in cut if not bool(kept[at])), None)
        drawable = bool(dist.kept[0, token])
        yield Candidate(
            token,
            words(token),
            at + 1,
            float(edited[0][1][0, token]),
            float(edited[-1][1][0, token]),
            edits_of(edited, token),
            mass / total,
            after,
            float(final[token]),
            None if drawable else by or "temperature",  # which left it no mass
        )


def drawn(dist: spec.Distribution, rows: Rows, index: int) -> tuple[Draw | None, int]:
    """How a valid row's token is drawn, and the token."""
    at = torch.tensor([index], device=dist.mass.device)
    if bool(dist.greedy):
        return None, int(dist.kept[0].nonzero())
    excludes = bool(spec.excludes(dist, rows, at))
    bits, coin = (
        int(spec.uniform60(rows.seeds[:, None], rows.offsets[:, None], at[None, :], purpose))
        for purpose in (PLAIN_DRAW, XTC_COIN)
    )
    running = (dist.rest if excludes else dist.mass).cumsum(-1)
    u = torch.tensor([[bits]], device=at.device)
    threshold = int(spec.multiply_high60(u, running[:, -1:]))
    token = int(spec.draw_at(running, u))
    start, end = int(running[0, token - 1]) if token else 0, int(running[0, token])
    probability = float(dist.coin)
    return Draw(
        bits,
        int(running[0, -1]),
        threshold,
        start,
        end,
        coin if probability > 0 else None,
        int(probability * 2.0**60),
        excludes,
    ), token
