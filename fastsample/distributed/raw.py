"""Raw log-probabilities of rows that are split over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from fastsample.backends import Outputs
from fastsample.distributed.answers import Answers
from fastsample.distributed.keys import IDS, LOWEST, NO_KEY, bits_of, by_row, key, value, value_of, words_of
from fastsample.distributed.lists import mark_invalid, unpacked
from fastsample.distributed.outputs import pick, put
from fastsample.distributed.shard import mass_of
from fastsample.distributed.wire import Wire
from fastsample.outputs import InputKind
from fastsample.reference import NEG_INF, check, check_probs, order_of_probs
from fastsample.reference.mass import UNIT

Tensor = torch.Tensor


@dataclass
class RawPart:
    """A rank's part of rows as they were given.

    Attributes:
        x: [B, V_r], logits or probabilities, of the tokens from `start` on.
        answers: of these rows, if an engine has any; otherwise None,
        queries: as is what it is asked of whole rows, at temperature 1.
    """

    x: Tensor
    start: int
    kind: InputKind
    answers: Answers | None
    queries: Tensor | None

    @cached_property
    def _ranked(self) -> Tensor:
        """What ranks tokens, float32 [B, V_r]: probabilities of 0 are -inf."""
        x = self.x.float()
        return x if self.kind == "logits" else torch.where(order_of_probs(x) > NEG_INF, x, NEG_INF)

    def first(self, count: int) -> Tensor:
        """The first tokens in rank order, words int64 [B, count]; a NaN or an infinity first where a row is invalid."""
        if self.answers is not None and self.queries is not None:
            return self.answers.first_words(count, self.queries)
        ids = torch.arange(self.start, self.start + self.x.shape[1], device=self.x.device)
        keys = _first_keys(self._ranked, ids, count)
        words = words_of(value_of(keys), torch.where(keys >= LOWEST, IDS - (keys & IDS), -1))
        return mark_invalid(words, check(self.x.float()) if self.kind == "logits" else check_probs(self.x.float()))

    def own(self, tokens: Tensor) -> Tensor:
        """Of tokens int64 [B, n], float32; -inf where this rank does not have them."""
        local, width = tokens - self.start, self.x.shape[1]
        here = (local >= 0) & (local < width)
        x = self.x if self.answers is not None else self._ranked
        at, here = (t.to(x.device) for t in (local.clamp(0, max(width - 1, 0)), here))
        return pick(x, at, here, -torch.inf).float().to(tokens.device)

    def mass(self, words: Tensor, peak: Tensor, sound: Tensor) -> Tensor:
        """int64 [B, 1].

        Args:
            words: what all ranks list of each row.
            peak: float32 [B, 1], and whether it is one.
        """
        if self.answers is not None and self.queries is not None:
            return self.answers.whole_sums(words, self.queries, False, False)[:, :1]
        return mass_of(self.kind, torch.where(sound, self._ranked, 0), peak, torch.ones_like(peak)).sum(-1, True)

    def above(self, own: Tensor) -> Tensor:
        """How many tokens lie above others, int64 [B, n], given float32 [B, n]."""
        if self.answers is not None and self.queries is not None:
            return self.answers.above(own, self.queries)
        return (self._ranked[:, None, :] > own[:, :, None]).sum(-1)


def write_raw(wire: Wire, part: RawPart, out: Outputs, known: tuple[Tensor, Tensor] | None = None) -> None:
    """log-softmax of whole rows as they were given, or the logarithm of their probabilities.

    Args:
        known: what all ranks list of the same rows, words int64 [B, N], `num_top` of each rank or more, and the logits
            of the tokens, float32 [B, n]; None takes a message.
    """
    assert out.tokens is not None
    tokens = out.tokens.view(len(part.x), -1)
    if known is None:
        count = max(1, out.num_top)
        told = wire.gather(torch.cat([part.first(count), bits_of(part.own(tokens))], 1))
        known = by_row(told[:, :, :count]), told[:, :, count:].to(torch.int32).view(torch.float32).amax(0)
    words, own = known
    x, ids = unpacked(words)
    peak = x.amax(-1, keepdim=True)
    sound = (out.status.view(-1) == 0)[:, None] & peak.isfinite()
    peak = torch.where(sound, peak, 0)
    told = wire.total(torch.cat([part.mass(words, peak, sound), part.above(own)], 1))
    mass, above = told.tensor_split([1], 1)
    _write(Raw(own, above, _first_keys(x, ids, out.num_top), peak, mass, sound), out)


class Raw(NamedTuple):
    """Of rows [B] and their tokens [B, n]."""

    own: Tensor  # float32 [B, n]
    above: Tensor  # int64 [B, n], how many tokens rank above each
    keys: Tensor  # int64 [B, num_top or more], of the first tokens of all among others
    peak: Tensor  # float32 [B, 1]
    mass: Tensor  # int64 [B, 1]
    sound: Tensor  # bool [B, 1]


def _first_keys(x: Tensor, ids: Tensor, count: int) -> Tensor:
    """int64 [B, count], the highest first; NO_KEY past the last token above -inf."""
    if not count:
        return torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    keys = torch.where(x > -torch.inf, key(x, ids), NO_KEY).topk(min(count, x.shape[1])).values
    return pad(keys, (0, count - keys.shape[1]), value=NO_KEY)


def _write(raw: Raw, out: Outputs) -> None:
    peak, mass, sound, kind = raw.peak, raw.mass.double(), raw.sound, out.input
    valid = (out.status.view(-1) == 0)[:, None]

    def logprobs(x: Tensor) -> Tensor:
        if kind == "probs":
            return (mass_of(kind, x, peak, torch.ones_like(peak)).double() / mass).log()
        return (x.double() - peak.double()) - (mass / 2.0**UNIT).log()

    put(out.logprobs, None, torch.where(sound, logprobs(raw.own), torch.nan))
    put(out.ranks, None, torch.where(valid, raw.above + 1, 0))
    if out.num_top:
        top = raw.keys.topk(out.num_top).values
        there = (top >= LOWEST) & sound
        put(out.top_ids, None, torch.where(there, IDS - (top & IDS), -1))
        found = torch.where(there, logprobs(value(top >> 32)), -torch.inf)
        put(out.top_logprobs, None, torch.where(sound, found, torch.nan))
