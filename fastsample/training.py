"""For trainers: log-probabilities of tokens in the law that they were drawn from, with gradients.

A sampler with top-k, top-p or min-p draws from softmax(x / T) renormalised over the tokens that it keeps. A trainer
that takes the softmax of the whole vocabulary gives the same tokens other probabilities, even with the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist

from fastsample.arrays import ArrayLike, as_tensor
from fastsample.checks import FLOATS, MAX_VOCAB, count, require_dense, require_tensor
from fastsample.inputs import pack_params
from fastsample.outputs import OnInvalid, check_on_invalid
from fastsample.params import GREEDY_BELOW, specs
from fastsample.reference.mass import UNIT, mass_at, scale_of

__all__ = ["kept_logprobs"]

Kept: TypeAlias = "ArrayLike | tuple[ArrayLike, ArrayLike]"

CHUNK = 2**20
"""Kept ids that are looked at together: 50 bytes of scratch each."""


def kept_logprobs(
    logits: ArrayLike,
    tokens: ArrayLike,
    kept: Kept,
    temperature: float | ArrayLike = 1.0,
    *,
    vocab_start: int | None = None,
    group: dist.ProcessGroup | None = None,
    on_invalid: OnInvalid = "raise",
) -> torch.Tensor:
    """The log-probability of each row's token in softmax(logits / temperature), renormalised over the row's kept ids.

    Where the logits are those that the sampler had, it is the sampler's "processed" log-probability within 2 units in
    the last place, since the masses are those of the contract's stage 6; so the ratio of a trainer that has changed
    nothing yet is 1. The kept sets are the sampler's, and stay as they are when logits change (DeepSeek-V3.2, arXiv
    2512.02556, section 3.1, "keep sampling mask").

    The logits are what the temperature divides: masks, bias and penalties are the caller's to apply. `typical_p` may
    leave a row's maximum out of its set; masses are then measured from another token than the sampler's, and
    results agree to 1e-6. XTC with a probability below 1 draws from a mixture, which no kept set describes.

    Beside the logits there is scratch for 2^20 kept ids, and in the backward pass the gradient, in the logits' dtype.

    Args:
        logits: float32, float16, bfloat16 or float64 [N, V]; any strides, any device. More leading dimensions, as in
            [B, T, V], are rows like those of `fastsample.sample`, and no copy is made of them.
        tokens: int64 or int32 [N] (or [B, T]), the sampled ids. -1 marks a row that has none: an invalid row, padding.
        kept: what `fastsample.sample` reports: the pair `(kept_ids, kept_row_ptr)`, [n] and [N + 1], or the bitmask,
            int32 [N, ceil(V / 32)] (or [B, T, ceil(V / 32)]). Ids before the first row's and after the last one's are
            not looked at, so rows i to j of a batch are `(kept_ids, kept_row_ptr[i : j + 1])`; nor are bits past V.
            A row must not list an id twice.
        temperature: a number or one per row, 0 <= T <= 2^20; below 1e-5 the row is greedy. A tensor on a GPU is read by
            the host, which waits for it.
        vocab_start: given, the logits are this rank's slice of a vocabulary that the ranks of `group` share: [N, V_r],
            ids vocab_start to vocab_start + V_r - 1; slices have any size, 0 too. Tokens and kept ids are those of the
            whole vocabulary, and all ranks pass the same ones. Ranks exchange five numbers per row.
        group: the ranks that share the vocabulary; None is torch's default group.
        on_invalid: what becomes of a row whose token is not in its kept set, or whose ids are not all in [0, V).
            "raise" raises ValueError; on a GPU this waits for the device. "flag" gives such a token -inf and its row no
            gradient, and leaves such ids out; it waits for no GPU, unless the sets are bitmasks.

    Returns:
        float32 [N] (or [B, T]); float64 for float64 logits. 0 without a gradient in rows that are greedy or whose token
        is -1; NaN in rows with NaN, +inf or nothing above -inf among the kept logits. Every rank gets the whole result.

        The gradient by a kept logit is ([it is the token's] - p) / temperature, and 0 by any other. A rank gets its own
        slice's, and all ranks must pass back the same gradient.

    Raises:
        TypeError, ValueError: bad argument; the message names it, the row and the value. All ranks raise alike.
        RuntimeError: in a backward pass with create_graph=True, since there is no second derivative.
    """
    check_on_invalid(on_invalid)
    shard = _shard(vocab_start, group)
    table: Any = as_tensor("logits", logits)
    _check_logits(table, shard)
    strict = on_invalid == "raise"
    ids = _check_tokens(as_tensor("tokens", tokens), table)
    scale, greedy = _check_temperature(temperature, table)
    sets = _check_kept(kept, table, shard, strict)
    result: torch.Tensor = _KeptLogprobs.apply(  # type: ignore[no-untyped-call]
        table, ids, sets, scale, greedy, shard, strict
    )
    return result.view(table.shape[:-1])


class _KeptLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        sets: _Sets,
        scale: torch.Tensor,
        greedy: torch.Tensor,
        shard: _Shard,
        strict: bool,
    ) -> torch.Tensor:
        law = _law(logits, tokens, sets, scale, shard)
        if strict:
            _refuse(tokens, sets, law, shard, logits.shape[-1])
        held, drawn = law.hits > 0, tokens != -1
        ctx.save_for_backward(logits)
        ctx.law, ctx.live, ctx.rest = law, held & drawn & ~greedy, (tokens, sets, scale, shard)
        return torch.where(greedy | ~drawn, 0.0, torch.where(held, law.logprob(scale), -torch.inf))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("kept_logprobs: has no second derivative; call backward without create_graph=True")
        (logits,) = ctx.saved_tensors
        law, (tokens, sets, scale, shard) = ctx.law, ctx.rest
        total = law.total.double()
        by_exponent = torch.where(ctx.live, grad.double() * scale.double() * math.log(2), 0.0)
        result = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
        for rows, ids, mine, x in _chunks(logits, sets, shard):
            w, whole = _mass((x - law.peak[rows]) * scale[rows]).double(), total[rows]
            one_minus_p = torch.where(ids + shard.start == tokens[rows], whole, 0.0) - w
            slope = torch.where(mine & ctx.live[rows], by_exponent[rows] * (one_minus_p / whole), 0.0)
            result.view(-1).index_add_(0, rows * logits.shape[-1] + ids, slope.to(result.dtype))
        return result, *[None] * 6


# A vocabulary that ranks share ---------------------------------------------------------------------------------------


class _Shard(NamedTuple):
    """Which part of the vocabulary the logits are."""

    start: int = 0
    shared: bool = False
    group: dist.ProcessGroup | None = None

    def reduced(self, values: torch.Tensor, maximum: bool = False) -> torch.Tensor:
        """The sums, or maxima, over the ranks; in place."""
        if self.shared:
            dist.all_reduce(values, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=self.group)
        return values


def _shard(start: int | None, group: dist.ProcessGroup | None) -> _Shard:
    if start is not None:
        return _Shard(count("vocab_start", start, 0, MAX_VOCAB), True, group)
    if group is not None:
        raise ValueError("group: needs vocab_start, the first id of this rank's logits")
    return _Shard()


# Kept sets -----------------------------------------------------------------------------------------------------------


class _Listed(NamedTuple):
    """Kept sets as ids; `first` and `last` bound those that belong to rows."""

    ids: torch.Tensor
    row_ptr: torch.Tensor
    first: int
    last: int

    def chunks(self, low: int, high: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows and ids [n], of which those with an id in [low, high) are wanted. Ids of no row have row -1 or N."""
        for begin in range(self.first, self.last, CHUNK):
            end = min(begin + CHUNK, self.last)
            ptr = torch.nn.functional.pad(self.row_ptr.clamp(begin, end), (1, 0), value=begin)
            ptr = torch.nn.functional.pad(ptr, (0, 1), value=end)
            rows = torch.arange(-1, len(self.row_ptr), device=ptr.device)
            yield rows.repeat_interleave(ptr.diff(), output_size=end - begin), self.ids[begin:end].long()


class _Masked(NamedTuple):
    """Kept sets as the bits of words [N, W]."""

    words: torch.Tensor

    def chunks(self, low: int, high: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As above. Only words with a bit are unpacked: most have none."""
        first, last = low // 32, -(-high // 32)
        bit = torch.arange(32, dtype=torch.int32, device=self.words.device)
        height = max(1, CHUNK // (last - first))
        for top in range(0, len(self.words), height):
            block = self.words[top : top + height, first:last]
            for row, word in (some.unbind(1) for some in torch.split(block.nonzero(), CHUNK // 32)):
                which, place = ((block[row, word][:, None] >> bit) & 1).nonzero(as_tuple=True)
                yield row[which] + top, (word[which] + first) * 32 + place


_Sets: TypeAlias = "_Listed | _Masked"


def _chunks(logits: torch.Tensor, sets: _Sets, shard: _Shard) -> Iterator[_Entries]:
    """All kept logits of this rank."""
    width = logits.shape[-1]
    if width and logits.numel():
        for rows, ids in sets.chunks(shard.start, shard.start + width):
            yield _entries(logits, rows, ids - shard.start)


class _Entries(NamedTuple):
    """Some logits [n]. Where there is none, row and id are those of another."""

    rows: torch.Tensor
    ids: torch.Tensor  # local
    mine: torch.Tensor  # whether there is one
    values: torch.Tensor  # float32, or float64; -inf where there is none


def _entries(logits: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor) -> _Entries:
    *batch, width = logits.shape
    mine = (ids >= 0) & (ids < width) & (rows >= 0) & (rows < math.prod(batch))
    rows, ids = rows.clamp(0, math.prod(batch) - 1), ids.clamp(0, width - 1)
    place, left = [ids], rows
    for size in reversed(batch):
        place.append(left % size)
        left = left // size
    x = logits[tuple(reversed(place))].to(_precision(logits))
    return _Entries(rows, ids, mine, torch.where(mine, x, -torch.inf))


def _precision(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# The law -------------------------------------------------------------------------------------------------------------


class _Law(NamedTuple):
    """What a row's kept logits come to, over all ranks; [N] each."""

    peak: torch.Tensor  # the largest
    own: torch.Tensor  # the token's
    total: torch.Tensor  # their masses together: int64, or float64 of float64 logits
    found: torch.Tensor  # how many there are
    hits: torch.Tensor  # how many are the token's

    def logprob(self, scale: torch.Tensor) -> torch.Tensor:
        """Of the sampler's mass; where that is 0, since logits have changed, of the power that it stands for."""
        y, total = (self.own - self.peak) * scale, self.total.double()
        w = _mass(y).double()
        beyond = y.double() * math.log(2) - (total.log() - UNIT * math.log(2))
        return torch.where(w > 0, (w / total).log(), beyond).to(self.peak.dtype)


def _law(logits: torch.Tensor, tokens: torch.Tensor, sets: _Sets, scale: torch.Tensor, shard: _Shard) -> _Law:
    peak = torch.full_like(scale, -torch.inf)
    for rows, _, _, x in _chunks(logits, sets, shard):
        peak.scatter_reduce_(0, rows, x, "amax")
    own = peak
    if logits.numel():
        own = _entries(logits, torch.arange(len(tokens), device=tokens.device), tokens - shard.start).values
    # The maximum over ranks may drop a NaN, but no infinity. Either makes all masses 0, and the result NaN.
    peak, own = shard.reduced(torch.stack([torch.where(peak.isnan(), torch.inf, peak), own]), maximum=True)
    whole = torch.int64 if scale.dtype == torch.float32 else scale.dtype
    sums = torch.zeros((3, len(tokens)), dtype=whole, device=tokens.device)
    for rows, ids, mine, x in _chunks(logits, sets, shard):
        w = torch.where(mine, _mass((x - peak[rows]) * scale[rows]), 0)
        for own_sum, values in zip(sums, (w, mine, mine & (ids + shard.start == tokens[rows])), strict=True):
            own_sum.index_add_(0, rows, values.to(whole))
    return _Law(peak, own, *shard.reduced(sums))


def _mass(y: torch.Tensor) -> torch.Tensor:
    """2^40 2^y: the contract's integer, or float64."""
    return mass_at(y) if y.dtype == torch.float32 else torch.exp2(y + UNIT)


# Checks --------------------------------------------------------------------------------------------------------------


def _check_logits(logits: torch.Tensor, shard: _Shard) -> None:
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits: expected a tensor or an array, got {type(logits).__name__}")
    require_dense("logits", logits)
    if logits.dtype not in FLOATS | {torch.float64}:
        raise TypeError(f"logits: expected float32, float16, bfloat16 or float64, got {logits.dtype}")
    if logits.ndim < 2:
        raise ValueError(f"logits: expected shape [N, V] or [B, T, V], got {tuple(logits.shape)}")
    least = 0 if shard.shared else 1
    if not least <= logits.shape[-1] <= MAX_VOCAB - shard.start:
        raise ValueError(f"logits: expected {least} <= V <= 2^20, got V = {shard.start + logits.shape[-1]}")


def _require(name: str, value: Any, logits: torch.Tensor, dtypes: Collection[torch.dtype], *shapes: Any) -> None:
    """An error unless a value is a tensor beside the logits, of one of some dtypes and shapes."""
    require_tensor(name, value, logits.device)
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if shapes and tuple(value.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(value.shape)}")


def _check_tokens(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """int64 [N]."""
    _require("tokens", tokens, logits, (torch.int64, torch.int32), tuple(logits.shape[:-1]))
    return tokens.detach().reshape(-1).long()


def _check_temperature(temperature: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors c = log2(e) / T, as stage 6 rounds them or in float64, and whether a row is greedy; [N]."""
    temperature = as_tensor("temperature", temperature)
    if isinstance(temperature, torch.Tensor):
        if temperature.requires_grad:
            raise ValueError("temperature: gets no gradient here; pass temperature.detach()")
        temperature = temperature.reshape(-1) if temperature.ndim else temperature.item()
    rows = math.prod(logits.shape[:-1])
    records = pack_params(None, {"temperature": temperature}, rows)
    at = [name for name, _ in specs()].index("temperature")
    t = records[:, at].view(torch.float32).expand(rows)
    t = t.to(logits.device, _precision(logits), non_blocking=True)
    greedy = t < GREEDY_BELOW
    t = torch.where(greedy, 1.0, t)
    return scale_of(t) if t.dtype == torch.float32 else math.log2(math.e) / t, greedy


def _check_kept(kept: Any, logits: torch.Tensor, shard: _Shard, strict: bool) -> _Sets:
    batch, last = tuple(logits.shape[:-1]), shard.start + logits.shape[-1]
    kept = as_tensor("kept", kept)
    if isinstance(kept, torch.Tensor):
        words = -(-last // 32)
        _require("kept (a bitmask)", kept, logits, (torch.int32,))
        if kept.shape[:-1] != batch or (kept.shape[-1] < words if shard.shared else kept.shape[-1] != words):
            wanted = f"{', '.join(map(str, batch))}, ceil(V / 32) = {words}{' or more' * shard.shared}"
            raise ValueError(f"kept (a bitmask): expected shape [{wanted}], got {list(kept.shape)}")
        return _Masked(kept.reshape(-1, kept.shape[-1]))
    if not isinstance(kept, (tuple, list)) or len(kept) != 2:
        raise TypeError(f"kept: expected (kept_ids, kept_row_ptr) or a bitmask, got {type(kept).__name__}")
    ids, row_ptr = as_tensor("kept_ids", kept[0]), as_tensor("kept_row_ptr", kept[1])
    integers = (torch.int32, torch.int64)
    _require("kept_ids", ids, logits, integers)
    _require("kept_row_ptr", row_ptr, logits, integers, (math.prod(batch) + 1,))
    if ids.ndim != 1:
        raise ValueError(f"kept_ids: expected shape [n], got {tuple(ids.shape)}")
    row_ptr = row_ptr.long()
    if ids.is_cuda and not strict:
        return _Listed(ids, row_ptr, 0, len(ids))
    _check_row_ptr(row_ptr, len(ids))
    return _Listed(ids, row_ptr, int(row_ptr[0]), int(row_ptr[-1]))


def _check_row_ptr(row_ptr: torch.Tensor, size: int) -> None:
    falls = row_ptr.diff() < 0
    if bool(falls.any()):
        row = int(falls.nonzero()[0])
        raise ValueError(f"kept_row_ptr (row {row}): expected an end from {row_ptr[row]} on, got {row_ptr[row + 1]}")
    if row_ptr[0] < 0 or row_ptr[-1] > size:
        raise ValueError(f"kept_row_ptr: expected 0 to {size}, the kept ids, got {row_ptr[0]} to {row_ptr[-1]}")


def _refuse(tokens: torch.Tensor, sets: _Sets, law: _Law, shard: _Shard, width: int) -> None:
    """ValueError for the first row whose ids are not all in the vocabulary, or whose token is not in its set."""
    listed = sets.row_ptr.diff() if isinstance(sets, _Listed) else law.found
    lost, strange = listed != law.found, (tokens != -1) & (law.hits == 0)
    if not bool((lost | strange).any()):
        return
    row = int((lost | strange).nonzero()[0])
    found, size = int(law.found[row]), int(listed[row])
    if found == size:
        hint = "; a set larger than kept_capacity lists none" if isinstance(sets, _Listed) and not size else ""
        raise ValueError(f"tokens = {tokens[row]} (row {row}): expected -1 or one of its {size} kept ids{hint}")
    if shard.shared:
        raise ValueError(f"kept_ids (row {row}): expected each of {size} ids in one rank's slice, found {found} there")
    assert isinstance(sets, _Listed)
    ids = sets.ids[sets.row_ptr[row] : sets.row_ptr[row + 1]]
    raise ValueError(f"kept_ids: id {ids[(ids < 0) | (ids >= width)][0]} (row {row}): expected 0 <= id < {width}")
