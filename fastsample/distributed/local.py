"""Rows as one rank sees them: global ids become its own, and an engine processes and lists its part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fastsample.backends import Engine, Outputs
from fastsample.buffers import empty
from fastsample.inputs import Bias, Rows
from fastsample.params import SamplingParams, specs
from fastsample.reference.process import apply_bitmask, columns_of

Tensor = torch.Tensor

_EDITS = (
    *("repetition_penalty", "frequency_penalty", "presence_penalty", "no_repeat_ngram_size"),
    *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_range"),
)


@lru_cache(maxsize=64)
def neutral(top_k: int = 0) -> Tensor:
    """A record that changes nothing, or keeps the first tokens only, int32 [1, fields]. Not to be written to."""
    return SamplingParams(top_k=top_k).pack()


@lru_cache(maxsize=1)
def _is_edit() -> Tensor:
    return torch.tensor([[name in _EDITS for name, _ in specs()]])


def without_edits(records: Tensor) -> Tensor:
    """Records for logits that have been edited."""
    return torch.where(_is_edit().to(records.device), neutral().to(records.device), records)


def is_edited(rows: Rows) -> bool:
    return bool(rows.lists) or rows.bias is not None or rows.bitmask is not None


def slice_mask(mask: Tensor, start: int, width: int) -> Tensor:
    """The words of tokens start to start + width of a mask int32 [B or 1, words]."""
    first, shift, words = start // 32, start % 32, -(-width // 32)
    part = mask[:, first : first + words + 1].to(torch.int64) & (2**32 - 1)
    if shift:
        following = torch.nn.functional.pad(part[:, 1:], (0, 1))
        part = (part >> shift | following << (32 - shift)) & (2**32 - 1)
    return part[:, :words].to(torch.int32).contiguous()


def both_masks(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """What both masks allow; tokens past the last word of either are not allowed."""
    if one is None or other is None:
        return other if one is None else one
    shorter = min(one.shape[1], other.shape[1])
    return one[:, :shorter] & other[:, :shorter]


def slice_bias(bias: Bias | None, start: int, width: int) -> Bias | None:
    """The entries of a bias for tokens start to start + width, by their own ids."""
    if bias is None:
        return None
    own = (bias.ids >= start) & (bias.ids < start + width)
    before = torch.nn.functional.pad(own.cumsum(0), (1, 0))
    return Bias(before[bias.row_ptr], bias.ids[own] - start, bias.values[own], width)


class LocalIds:
    """Global ids as those of a rank's own columns.

    DRY and the ban of n-grams compare all of a history, whichever rank has its tokens: each of the others gets a column
    behind the rank's own.
    """

    def __init__(self, rows: Rows, start: int, width: int, vocab: int, compares: bool) -> None:
        self._start, self._width, self._vocab = start, width, vocab
        self.others = torch.empty(0, dtype=torch.int64)
        if compares:
            given = [ids.flatten() for ids in (*rows.lists, rows.breakers) if ids is not None]
            everyone = torch.cat(given) if given else self.others
            other = (everyone >= 0) & (everyone < vocab) & ~self._is_own(everyone)
            self.others = torch.unique(everyone[other])

    def _is_own(self, ids: Tensor) -> Tensor:
        return (ids >= self._start) & (ids < self._start + self._width)

    def of(self, ids: Tensor | None) -> Tensor | None:
        """int64 of the same shape; outside of all columns where an id has none, and is padding."""
        if ids is None or not self.others.shape[0]:
            return ids if ids is None or not self._start else ids - self._start
        at = torch.searchsorted(self.others, ids.contiguous()).clamp(max=len(self.others) - 1)
        other = torch.where(self.others[at] == ids, self._width + at, -1)
        return torch.where(self._is_own(ids), ids - self._start, other)


@dataclass
class Edits:
    """What parameters ask of stages 1 to 3.

    Attributes:
        records: these parameters, int32 [B or 1, fields], which filter nothing.
        compares: whether ids are compared with each other, for DRY or a ban of n-grams.
    """

    records: Tensor
    compares: bool

    @classmethod
    def of(cls, records: Tensor) -> Edits:
        params = columns_of(records)
        compares = bool(((params["dry_multiplier"] > 0) | (params["no_repeat_ngram_size"] > 0)).any())
        return cls(torch.where(_is_edit().to(records.device), records, neutral().to(records.device)), compares)


def process(
    engine: Engine, logits: Tensor, rows: Rows, edits: Edits, mask: Tensor | None, start: int, vocab: int
) -> tuple[Tensor, Tensor | None]:
    """Stages 1 to 3 of a rank's logits [B, V_r]: float32 [B, V_r], and what is wrong with each row, int32 [B]; None
    where it is known that nothing is.

    `mask` int32 [B or 1, ceil(V_r / 32)] is of the rank's own tokens, that of `rows` of all.
    """
    width = logits.shape[1]
    mask = both_masks(mask, None if rows.bitmask is None else slice_mask(rows.bitmask, start, width))
    own = Rows(edits.records.to(logits.device), rows.seeds, rows.offsets, mask, requests=rows.requests)
    if engine.takes_parts:
        own.part, own.bias, own.breakers = (start, vocab), rows.bias, rows.breakers
        own.prompt_ids, own.output_ids, own.drafted_ids = rows.prompt_ids, rows.output_ids, rows.drafted_ids
    else:
        local = LocalIds(rows, start, width, vocab, edits.compares)
        if others := local.others.shape[0]:
            logits = torch.nn.functional.pad(logits, (0, others), value=-torch.inf)
        own.bias, own.breakers = slice_bias(rows.bias, start, width), local.of(rows.breakers)
        lists = rows.prompt_ids, rows.output_ids, rows.drafted_ids
        own.prompt_ids, own.output_ids, own.drafted_ids = map(local.of, lists)
    x = empty(logits.shape, torch.float32, logits.device)
    status = empty((logits.shape[0],), torch.int32, logits.device)
    invalid = engine.run(logits, own, Outputs(status, filtered=x))
    return x[:, :width], None if invalid == 0 else status


def process_probs(probs: Tensor, rows: Rows, mask: Tensor | None, start: int) -> Tensor:
    """Stage 1 of a rank's probabilities [B, V_r], with masks as for `process`, float32 [B, V_r].

    They rank and fail as logits do: what is 0 becomes -inf, what is negative +inf.
    """
    p, allowed = probs.float(), rows.bitmask
    mask = both_masks(mask, None if allowed is None else slice_mask(allowed, start, p.shape[1]))
    p = p if mask is None else apply_bitmask(p, mask, 0.0)
    bits = p.view(torch.int32)
    size = bits & 0x7FFFFFFF  # from the bits, so that no mode of torch's takes a subnormal number for 0
    x = torch.where(size == 0, -torch.inf, p)
    return torch.where((bits < 0) & (size > 0) & ~p.isnan(), torch.inf, x)
