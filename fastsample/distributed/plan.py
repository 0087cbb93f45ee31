"""What the parameters of rows ask of the ranks that these are split over."""

from __future__ import annotations

from functools import cached_property

import torch

from fastsample.backends import Outputs
from fastsample.distributed.answers import open_queries
from fastsample.distributed.filters import steps_of, uses
from fastsample.distributed.keys import bits_of
from fastsample.distributed.local import Edits
from fastsample.params import GREEDY_BELOW
from fastsample.reference.process import choice, columns_of

Tensor = torch.Tensor

LISTED = 256
"""How many of its first tokens a rank tells the others, unless top-k alone decides."""
MOST_LISTED = 1024
RAW_LISTED = 128
"""How many first tokens of rows as they were given a rank tells besides, where edits may have changed them. Draws from
rows like a language model's hardly ever rank lower there. Where one does, that costs a message."""
FEW = 32
"""Draws, for each of which a rank may tell what it might be before it knows: 72 bytes each."""
MANY = 4096
"""Draws of a row that the CPU engine's own code has ranks tell, 32 KB in a message."""


class Plan:
    """What the parameters of rows ask for, which lasts while these stay the same."""

    def __init__(self, records: Tensor, vocab: int) -> None:
        self.records = records.clone()
        self.params = params = columns_of(self.records)
        self.used = uses(params)
        self.steps = steps_of(params, self.used)
        self.greedy = params["temperature"] < GREEDY_BELOW
        self.drawn_at = torch.where(self.greedy, 1.0, params["temperature"])
        self.judged_at = torch.where(choice(params, "order", "temperature_last"), 1.0, self.drawn_at)
        k = params["top_k"]
        cut = (k > 0) & (k < vocab) & (k <= MOST_LISTED)
        whole = (params["top_n_sigma"] > 0) | choice(params, "ties", "all")
        whole = whole | (choice(params, "order", "joint") & (params["top_p"] < 1))
        cut = self.greedy | (cut & ~whole)
        self.cut_short = bool(cut.all())
        # Where min-p comes before all that measures, it may cut everything off that is not listed.
        last, first_ = (choice(params, "order", order) for order in ("temperature_last", "min_p_first"))
        floors = (params["min_p"] > 0) & (params["top_n_sigma"] == 0) & ((params["top_p"] == 1) | first_)
        floors = floors & ~(last & (params["typical_p"] < 1)) & ~((k > MOST_LISTED) & (k < vocab))
        self.lists_may_do = bool((cut | floors).all())
        self.open = not self.used and not bool(self.greedy.any())  # all rows keep everything
        self.most = int(torch.where(cut & ~self.greedy, k, 1).max())
        self.wanted = any(name in self.used for name in ("typical", "eta", "p_less")), "top_n_sigma" in self.used
        searches = [name for name in ("top_k", "top_p", "typical") if name in self.used]
        self.searches_once = len(searches) <= 1 and self.used.keys() <= {*searches, "mass_floors"}
        # How much of a row's mass its list must have, at least, to decide it.
        share = torch.minimum(params["top_p"], params["typical_p"])
        share = torch.where(k > MOST_LISTED, torch.inf, torch.where(k > 0, 0.0, share))
        self.share = torch.where(self.greedy, 0.0, share)
        # Floors of the mass come before typical, and where rows ask for it before all.
        first_ = first_ | (params["typical_p"] < 1)
        self._starts_with_search = bool(searches) and "top_n_sigma" not in self.used and not self.lists_may_do
        self._starts_with_search &= not bool((first_ & (params["min_p"] > 0)).any())
        self._queries: Tensor | None = None
        self._raw_queries: Tensor | None = None

    @cached_property
    def edits(self) -> Edits:
        return Edits.of(self.records)

    def holds(self, records: Tensor) -> bool:
        """Whether these are still the parameters: a Sampler may have written to its records."""
        own = self.records
        return records.shape == own.shape and records.device == own.device and torch.equal(records, own)

    def count(self, out: Outputs | None, apart: bool = False) -> int:
        """How many tokens a rank lists; None where all that counts is what is kept. `apart`: rows as they were given
        are listed besides."""
        top = 0 if out is None or apart else out.num_top
        if self.cut_short and (out is None or out.log_kept_mass is None):
            return max(self.most, top if out is not None and out.mode == "raw" else 0)
        return max(self.most, LISTED, top)

    def raw_count(self, out: Outputs) -> int:
        """The same of rows as they were given, where edits may have changed them."""
        # Where lists decide alone, the message that tells masses can tell ranks, too.
        return max(RAW_LISTED if self.open or self.measures(out) else 1, out.num_top)

    def asks(self, out: Outputs) -> bool:
        """Whether ranks may tell what lists and sums do not as csrc/cpu/lists.h notes it."""
        return out.num_samples <= MANY

    def measures(self, out: Outputs) -> bool:
        """Whether lists alone cannot tell what some row keeps, or how much that is of all."""
        return not (self.lists_may_do or self.open) or out.log_kept_mass is not None

    def measures_at_all(self, out: Outputs) -> bool:
        """Whether sums of whole rows may tell what lists do not."""
        return self.measures(out) or not self.used.keys() <= {"top_k", "mass_floors"}

    def shows_flat(self, out: Outputs | None) -> bool:
        """Whether rows need a search first of all, if they are flat."""
        return self._starts_with_search and (out is None or out.log_kept_mass is None)

    def shares(self, rows: int) -> Tensor:
        """The bits of `share`, int64 [rows, 1]."""
        return bits_of(self.share.expand(rows, 1)).contiguous()

    def queries(self, rows: int) -> Tensor:
        """Questions about whole rows, to the CPU engine."""
        if self._queries is None or self._queries.shape[0] != rows:
            self._queries = open_queries(self.judged_at.expand(rows, 1), self.drawn_at.expand(rows, 1))
        return self._queries

    def raw_queries(self, rows: int) -> Tensor:
        """The same at temperature 1."""
        if self._raw_queries is None or self._raw_queries.shape[0] != rows:
            one = torch.ones(rows, 1)
            self._raw_queries = open_queries(one, one)
        return self._raw_queries


def is_of_kept(out: Outputs) -> bool:
    """Whether all that is asked is about kept tokens."""
    return out.mode != "raw" and out.log_kept_mass is None


def is_of_tokens(out: Outputs) -> bool:
    """Whether all that is asked is which tokens are drawn, and few of them."""
    others = (out.kept_count, out.kept_bitmask, out.log_kept_mass, out.entropy)
    return out.mode != "processed" and all(other is None for other in others) and out.num_samples <= FEW
