"""A rank's answers by the CPU engine's own code, against the same in PyTorch: equal to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from parts import ROWS, START, Asked

from fastsample.backends import engine
from fastsample.distributed.answers import Answers
from fastsample.distributed.keys import everything, key, ordinal, value, words_of
from fastsample.distributed.lists import list_first, unpacked
from fastsample.distributed.shard import BINS, Shard

Tensor = torch.Tensor


class Both(Asked):
    """The same, asked of either."""

    def both(self, question: str, *given: Any) -> None:
        want, got = (getattr(part, question)(*given) for part in self.parts)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.fixture(params=["f32", "f16", "bf16"])
def asked(request: pytest.FixtureRequest, maker: str, width: int) -> Both:
    return Both(maker, width, request.param)


pytestmark = [
    pytest.mark.parametrize("width", [1, 31, 256, 257, 2500]),
    pytest.mark.parametrize("maker", ["flat", "lm", "ties", "half_masked", "equal"]),
]


def test_first_words(asked: Both) -> None:
    """What a rank lists, and what it weighs beside its own maximum; a row that is invalid says so."""
    x = asked.x.clone()
    x[0, -1], x[1, 0], x[2] = torch.nan, torch.inf, -torch.inf
    drawn_at = asked.parts[0].drawn_at[3:]
    valid = Shard(x[3:], START, x[3:].float().amax(-1, keepdim=True), drawn_at, drawn_at)
    for count in (1, 7, 256):
        got = Answers(engine("cpu"), x, START).first_words(count, asked.queries, True)
        assert torch.equal(got[:, :count], list_first(engine("reference"), x, asked.rows, START, count))
        assert torch.equal(got[3:, -1], valid.drawn(everything(ROWS - 3, x.device)).sum(-1))
        assert not got[:3, -1].any()


def test_sums_of_whole_rows(asked: Both) -> None:
    """The maximum is found among what is listed; a row that is invalid has no sums."""
    words = list_first(engine("reference"), asked.x, asked.rows, START, 3)
    words[0, 1] = words_of(torch.tensor(torch.nan), torch.tensor(-1))
    part = replace(asked.parts[0], peak=asked.x.float().amax(-1, keepdim=True))
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        got = Answers(engine("cpu"), asked.x, START).whole_sums(words, asked.queries, *wanted)
        assert torch.equal(got[1:], part.sums(everything(ROWS, asked.x.device), *wanted)[1:])
        assert not got[0].any()


def test_sums(asked: Both) -> None:
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        asked.both("sums", asked.kept, *wanted)


def test_totals_and_bits(asked: Both) -> None:
    for first, count in ((True, True), (False, True), (True, False)):
        asked.both("totals", asked.drawn, first, count, None)
    bits = [torch.full((ROWS, -(-asked.x.shape[1] // 32)), 77, dtype=torch.int32) for _ in range(2)]
    for part, words in zip(asked.parts, bits, strict=True):
        part.totals(asked.drawn, False, True, words)
    assert torch.equal(*bits)
    held = asked.parts[0].held(asked.kept)
    assert torch.equal(
        held, (bits[0][:, torch.arange(held.shape[1]) >> 5] >> (torch.arange(held.shape[1]) & 31)) & 1 > 0
    )


def test_draws(asked: Both) -> None:
    totals = asked.parts[0].totals(asked.drawn, False, False, None)
    asked.drawn.total, asked.drawn.rest = totals[:, 0] + 5 * (totals[:, 0] == 0), totals[:, 1]
    n = 6
    share = torch.linspace(0, 1, n, dtype=torch.float64)
    whole, rest = ((totals[:, i : i + 1] * share).long().clamp(max=totals[:, i : i + 1] - 1) for i in range(2))
    turns = torch.arange(n) % 3
    thresholds = torch.where(turns == 0, whole, torch.where((turns == 1) & (rest >= 0), -2 - rest, -1))
    thresholds = torch.where(totals[:, :1] > 0, thresholds, -1)
    want, got = (part.draws(asked.drawn, thresholds, True) for part in asked.parts)
    assert torch.equal(got[:, : 2 * n], want[:, : 2 * n])
    entropies = (t[:, -1].contiguous().view(torch.float64) for t in (got, want))
    torch.testing.assert_close(*entropies, rtol=1e-8, atol=1e-9)


def test_above(asked: Both) -> None:
    asked.both("above", torch.cat([asked.x[:, :1].float(), asked.x[:, -1:].float() + 0.25], 1))


def test_bins_and_what_is_within(asked: Both) -> None:
    asked.both("bins", asked.kept)
    for wanted in ((True, True), (False, False)):
        asked.both("whole", *wanted)
    part = asked.parts[0]
    bins = part.bins(asked.kept)
    assert torch.equal(bins[:, :, 0].sum(1), part.sums(asked.kept)[:, 0])
    assert torch.equal(bins[:, :, 1].sum(1), part.held(asked.kept).sum(1))
    fullest = bins[:, :, 1].argmax(1, keepdim=True)
    for ranges in (
        (fullest, fullest + 1, fullest + 1, fullest + 1),
        (fullest * 0, fullest, fullest + 7, fullest + 2048),
    ):
        places = torch.cat(ranges, 1).clamp(max=BINS)
        inside = sum(bins[:, :, 1][r, b:e].sum() for r, p in enumerate(places.tolist()) for b, e in (p[:2], p[2:]))
        for more in (0, 3):
            count = asked.x.shape[1] + more
            asked.both("within", asked.kept, places, count)
            ids = unpacked(part.within(asked.kept, places, count))[1]
            assert int((ids >= 0).sum()) == inside


def test_keys_are_in_the_rank_order(asked: Both) -> None:
    x = asked.x.float()
    keys = key(x, torch.arange(x.shape[1]))
    order = (x + 0.0).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(keys.sort(-1, descending=True).indices, order)
    assert torch.equal(value(ordinal(x)), x + 0.0)
