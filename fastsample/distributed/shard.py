"""What a rank finds out about its own part of each row: integer sums, counts and keys, which ranks put together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch

from fastsample.distributed.keys import HIGHEST, LOWEST, NO_KEY, Kept, bits_of, everything, key, no_words, words_of
from fastsample.outputs import InputKind
from fastsample.reference.mass import UNIT, depth_at, halves, mass_at, scale_of, steps_below
from fastsample.reference.process import NEG_INF

Tensor = torch.Tensor

LEVELS = ((53, 11), (42, 11), (32, 10), (10, 10), (0, 10))
"""Of a search by histograms: the lowest bit of a key that tells one bin from the next, and how many bits do."""
BINS, FINE_BINS, COARSE = 2048, 1792, 64
"""Bins of logits from the row's maximum down: fine ones, those COARSE times as wide, and a last one for the rest."""
BINS_OF_OCTAVE = 128
"""Fine bins for each power of two of mass."""
SUM_WORDS = 9
VALUES = 3  # levels after which the logit is known; the others tell equal ones by their ids
SAME = (2**12 - 1) << 20  # bits of a key in between, which are the same for all ids below 2^20


@dataclass
class Drawn:
    """What draws are from: a kept set, with XTC's top choices and without."""

    kept: Kept
    top: Tensor  # int64 [B, 1]: what is kept above that key is a top choice
    coin: Tensor  # float32 [B, 1], how likely a draw leaves those out
    total: Tensor  # int64 [B], the mass of the set on all ranks, and
    rest: Tensor  # int64 [B], without the top choices


@dataclass
class Shard:
    """A rank's part of rows, after stages 1 to 3.

    Attributes:
        x: float32, float16 or bfloat16 [B, V_r]: logits, or probabilities with -inf for 0.
        start: the id of its first token.
        peak: float32 [B, 1], the maxima of the whole rows.
        judged_at, drawn_at: float32 [B, 1], the temperatures of the masses that filters judge by, and of draws.
        kind: what x is.
    """

    x: Tensor
    start: int
    peak: Tensor
    judged_at: Tensor
    drawn_at: Tensor
    kind: InputKind = "logits"
    _of_rows: ClassVar[tuple[str, ...]] = ("x", "peak", "judged_at", "drawn_at")

    def of(self, rows: Tensor) -> Shard:
        parts = {name: getattr(self, name)[rows] for name in self._of_rows}
        return replace(self, **parts)

    def among(self, rows: Tensor) -> Shard:
        """The same for rows in ascending order, which copies nothing where these are all."""
        return self if len(rows) == len(self.x) else self.of(rows)

    def as_drawn(self) -> Shard:
        """The same, judged by the masses of draws."""
        return replace(self, judged_at=self.drawn_at)

    def logits(self) -> Tensor:
        return self.x.float()

    def ids(self) -> Tensor:
        """int64 [B or 1, V_r], ascending."""
        return torch.arange(self.start, self.start + self.x.shape[1], device=self.x.device)[None]

    def keys(self) -> Tensor:
        """int64 [B, V_r]."""
        return key(self.logits(), self.ids())

    def keys_of(self, ids: Tensor) -> Tensor:
        """int64 [B, n], of any ids; NO_KEY where this rank does not have the token."""
        local, width = ids - self.start, self.x.shape[1]
        here = (local >= 0) & (local < width)
        x = self.x.gather(1, torch.where(here, local, 0)).float() if width else here.float()
        return torch.where(here, key(x, torch.where(here, ids, 0)), NO_KEY)

    def mass_of(self, x: Tensor, temperature: Tensor) -> Tensor:
        """What tokens at x float32 [B, n] weigh in their rows, int64 [B, n]."""
        return mass_of(self.kind, x, self.peak, temperature)

    def alone(self, x: Tensor) -> Tensor:
        """What each would weigh if it were its row's maximum, int64 [B, n]."""
        return mass_of(self.kind, x, x, self.drawn_at)

    def depth_of(self, x: Tensor) -> Tensor:
        """e of tokens, int64 [B, n]; of probabilities it means nothing."""
        return depth_at((x - self.peak) * scale_of(self.judged_at))

    def held(self, kept: Kept) -> Tensor:
        """Which tokens are kept, bool [B, V_r]."""
        if bool(kept.whole().all()):
            return self.logits() > NEG_INF
        return kept.holds(self.keys(), self.mass_of(self.logits(), self.judged_at))

    def drawn(self, kept: Kept) -> Tensor:
        """What kept tokens weigh in draws, int64 [B, V_r]."""
        return self.mass_of(self.logits(), self.drawn_at) * self.held(kept)

    def queries(self, kept: Kept | None = None, drawn: Drawn | None = None) -> Tensor:
        """PartQuery (csrc/core/arguments.h) of each row, int64 [B, fields]. Not to be written to."""
        if kept is None and drawn is None:
            return self._queries
        queries = self._queries.clone()
        if kept is not None:
            torch.cat(list(kept), 1, out=queries[:, :3])
        if drawn is not None:
            queries[:, 3:4], queries[:, 4:5] = drawn.top, bits_of(drawn.coin)
            queries[:, 8], queries[:, 9] = drawn.total, drawn.rest
        return queries

    @cached_property
    def _queries(self) -> Tensor:
        """The same of everything, from which nothing is drawn."""
        floats = bits_of(torch.cat([self.peak, scale_of(self.drawn_at), scale_of(self.judged_at)], 1))
        place = torch.tensor([[HIGHEST, LOWEST, 0, HIGHEST, 0]], device=floats.device).expand(len(floats), -1)
        return torch.cat([place, floats, torch.zeros_like(floats[:, :2])], 1)

    def sums(self, kept: Kept, products: bool = True, spread: bool = False) -> Tensor:
        """Z, EH, EL, HH, HL, LL of a set, and n, D1, D2 of all above -inf, int64 [B, 9]; 0 where not asked for."""
        w = self.mass_of(self.logits(), self.judged_at) * self.held(kept)
        found = torch.zeros(len(w), SUM_WORDS, dtype=torch.int64, device=w.device)
        found[:, 0] = w.sum(-1)
        if products:
            e, (high, low) = self.depth_of(self.logits()), halves(w)
            for i, part in enumerate((high * e, low * e, high * high, high * low, low * low), 1):
                found[:, i] = part.sum(-1)
        if spread:
            d = steps_below(self.logits(), self.peak)
            for i, part in enumerate((self.logits() > NEG_INF, d, d * d), 6):
                found[:, i] = part.sum(-1)
        return found

    def whole(self, products: bool, spread: bool) -> Tensor:
        """`sums` of all above -inf, and their bins, int64 [B, SUM_WORDS + 2 BINS]."""
        all_ = everything(len(self.x), self.x.device)
        return torch.cat([self.sums(all_, products, spread), self.bins(all_).flatten(1)], 1)

    def totals(self, drawn: Drawn, first: bool, count: bool, bits: Tensor | None) -> Tensor:
        """The mass of what is drawn from, with top choices and without, the first key of either, and how many tokens
        are kept, int64 [B, 5]; NO_KEY and 0 where not asked for. `bits` int32 [B, ceil(V_r / 32)] gets the kept."""
        held = self.held(drawn.kept)
        w = self.mass_of(self.logits(), self.drawn_at) * held
        chosen = bool((drawn.top < HIGHEST).any())
        sets = held, held & (self.keys() <= drawn.top) if chosen else held
        firsts = [_highest(self.keys(), set_) if first else w.new_full((len(w),), NO_KEY) for set_ in sets]
        if bits is not None:
            _write_bits(bits, held)
        rest = w * sets[1] if chosen else w
        return torch.stack([w.sum(-1), rest.sum(-1), *firsts, held.sum(-1) * count], -1)

    def draws(self, drawn: Drawn, thresholds: Tensor, entropy: bool) -> Tensor:
        """Keys and masses of the tokens at thresholds of the running mass, and this rank's part of the entropy.

        Args:
            thresholds: int64 [B, n]; t among all that is kept, -2 - t without the top choices, -1 for none.

        Returns:
            int64 [B, 2 n + 1]: n keys, n masses, and the bits of a float64.
        """
        w, keys = self.drawn(drawn.kept), self.keys()
        rest = w * (keys <= drawn.top)
        own = torch.zeros(len(w), 1, dtype=torch.float64, device=w.device)
        if entropy:
            own = _entropy(w, rest, keys, drawn)[:, None]
        if not w.shape[1]:
            nothing = torch.full_like(thresholds, NO_KEY)
            return torch.cat([nothing, nothing * 0, own.view(torch.int64)], 1)
        leaves = thresholds < -1
        at = [torch.searchsorted(t.cumsum(-1), thresholds.clamp(min=0), right=True) for t in (w,)]
        at += [torch.searchsorted(rest.cumsum(-1), (-2 - thresholds).clamp(min=0), right=True)]
        place = torch.where(leaves, at[1], at[0]).clamp(max=w.shape[1] - 1)
        there = thresholds != -1
        found = torch.where(there, keys.gather(1, place), NO_KEY), torch.where(there, w.gather(1, place), 0)
        return torch.cat([*found, own.view(torch.int64)], 1)

    def above(self, x: Tensor) -> Tensor:
        """How many tokens lie above logits, int64 [B, n], given float32 [B, n]."""
        return (self.logits()[:, None, :] > x[:, :, None]).sum(-1)

    def first(self, kept: Kept, count: int) -> Tensor:
        """The first kept keys in rank order, int64 [B, count]; NO_KEY past the last."""
        keys = torch.where(self.held(kept), self.keys(), NO_KEY).topk(min(count, self.x.shape[1])).values
        return torch.cat([keys, keys.new_full((len(keys), count - keys.shape[1]), NO_KEY)], 1)

    def ends(self, kept: Kept) -> Tensor:
        """The first and the last key of a set, the mass of its heaviest token and their number, int64 [B, 4]."""
        if not self.x.shape[1]:
            return torch.tensor([NO_KEY, HIGHEST, 0, 0], device=self.x.device).expand(len(self.x), 4)
        keys, w = self.keys(), self.mass_of(self.logits(), self.judged_at)
        held = kept.holds(keys, w)
        last = torch.where(held, keys, HIGHEST).amin(-1)
        return torch.stack([_highest(keys, held), last, (w * held).amax(-1), held.sum(-1)], -1)

    def bins(self, kept: Kept) -> Tensor:
        """Mass and number of a set's tokens in each bin, int64 [B, BINS, 2]."""
        w, held = self.mass_of(self.logits(), self.judged_at), self.held(kept)
        at = self._bin_of_each()
        found = torch.zeros(len(w), BINS, 2, dtype=torch.int64, device=w.device)
        for i, weight in enumerate((w * held, held.to(torch.int64))):
            found[:, :, i].scatter_add_(1, at, weight)
        return found

    def within(self, kept: Kept, bins: Tensor, count: int) -> Tensor:
        """A set's tokens in bins from bins[:, 0] to bins[:, 1] - 1 and from bins[:, 2] to bins[:, 3] - 1, as words.

        Args:
            bins: int64 [B, 4].
            count: at least as many as there are.

        Returns:
            int64 [B, count], in id order.
        """
        at, ids = self._bin_of_each(), self.ids().expand(self.x.shape)
        begin, in_, out, end = bins[:, :, None].unbind(1)
        wanted = self.held(kept) & (((at >= begin) & (at < in_)) | ((at >= out) & (at < end)))
        order = torch.argsort(wanted.to(torch.int8), dim=1, descending=True, stable=True)[:, :count]
        there = wanted.gather(1, order)
        x = torch.where(there, self.logits().gather(1, order), -torch.inf)
        words = words_of(x, torch.where(there, ids.gather(1, order), -1))
        missing = count - words.shape[1]
        return torch.cat([words, no_words(len(words), missing, words.device)], 1) if missing else words

    def _bin_of_each(self) -> Tensor:
        fine = (self.peak - self.logits()) * (scale_of(self.judged_at) * BINS_OF_OCTAVE)
        place = torch.minimum(fine, FINE_BINS + (fine - FINE_BINS) / COARSE)
        return place.nan_to_num(nan=BINS - 1).clamp(0, BINS - 1).to(torch.int64)

    def histogram(self, kept: Kept, base: Tensor, level: int, mean: Tensor | None = None) -> Tensor:
        """Mass and number of the tokens of a set in each bin of a level, int64 [B, bins, 2].

        Args:
            base: int64 [B, 1], where the bins begin.
            mean: float32 [B, 1]: go by the distance from it instead of the key.
        """
        keys, w = self.keys(), self.mass_of(self.logits(), self.judged_at)
        held = kept.holds(keys, w)
        places = keys if mean is None else distance(self.logits(), mean) << 32
        shift, bits = LEVELS[level]
        bins = (places >> shift) - (base >> shift)
        inside = held & (bins >= 0) & (bins < 2**bits)
        bins = torch.where(inside, bins, 0)
        found = torch.zeros(len(places), 2**bits, 2, dtype=torch.int64, device=places.device)
        for i, weight in enumerate((w * inside, inside.to(torch.int64))):
            found[:, :, i].scatter_add_(1, bins, weight)
        return found


def mass_of(kind: InputKind, x: Tensor, peak: Tensor, temperature: Tensor) -> Tensor:
    """What tokens at x float32 [B, n] weigh, int64 [B, n], given their rows' maxima, float32 [B, 1 or n]."""
    if kind == "probs":
        exponent = UNIT - peak.clamp(min=0).double().frexp().exponent.to(torch.int64)
        power = (exponent + 1023 << 52).view(torch.float64)  # 2^exponent, from its bits
        return (x.clamp(min=0).double() * power).to(torch.int64)
    return mass_at((x - peak) * scale_of(temperature))


def distance(x: Tensor, mean: Tensor) -> Tensor:
    """The bits of |x - mean| as float32, which are in its order, int64."""
    return (x - mean).abs().view(torch.int32).to(torch.int64)


def mixture(w: Tensor, rest: Tensor, drawn: Drawn) -> Tensor:
    """The probability of tokens, float64 [B, n], by their mass in draws with top choices and without."""
    total, left = (sum_.double()[:, None] for sum_ in (drawn.total, drawn.rest))
    coin = drawn.coin.double()
    mixed = (1 - coin) * w.double() / total + coin * rest.double() / left.clamp(min=1)
    return torch.where(drawn.total[:, None] != drawn.rest[:, None], mixed, w.double() / total)


def _entropy(w: Tensor, rest: Tensor, keys: Tensor, drawn: Drawn) -> Tensor:
    """float64 [B]."""
    alone = (drawn.rest[:, None] == 0) & (keys == drawn.top)
    p = mixture(w, rest, drawn) + torch.where(alone & (drawn.total[:, None] > 0), drawn.coin.double(), 0.0)
    surprise = torch.log1p((drawn.total[:, None] - w).double() / w.clamp(min=1).double())
    surprise = torch.where((drawn.total != drawn.rest)[:, None], -p.log(), surprise)
    return torch.where(p > 0, p * surprise, 0.0).sum(-1)


def _highest(keys: Tensor, held: Tensor) -> Tensor:
    """The highest of the keys that are held, int64 [b]."""
    if not keys.shape[1]:
        return torch.full((len(keys),), NO_KEY, device=keys.device)
    return torch.where(held, keys, NO_KEY).amax(-1)


def _write_bits(words: Tensor, held: Tensor) -> None:
    flat = torch.zeros(words.shape, dtype=torch.int64, device=words.device)
    ids = torch.arange(held.shape[1], device=held.device)
    flat.scatter_add_(1, (ids >> 5).expand_as(held), held.to(torch.int64) << (ids & 31))
    words.copy_(flat.to(torch.int32))
