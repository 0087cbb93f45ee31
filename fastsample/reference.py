"""The sampling contract in plain PyTorch: the specification that every other engine must match to the bit.

One short function per stage, in the contract's order; slow on purpose. Nothing here is shared with the kernels.
Float operations are single binary32 operations on tensors (a 0-dim CPU operand may be turned into a multiplication by
its reciprocal on GPUs, so parameters are always [B, 1] columns on the logits' device); probability mass is int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from fastsample.inputs import Bias, Rows
from fastsample.params import GREEDY_BELOW, specs

Tensor = torch.Tensor
Params: TypeAlias = "dict[str, Tensor]"  # each parameter as a column [B or 1, 1]

LOG2E = float.fromhex("0x1.715476p+0")
ROUND_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds a small float32 to an integer
POLYNOMIAL = tuple(
    map(float.fromhex, ("0x1.5bba14p-10", "0x1.3cea88p-7", "0x1.c6b752p-5", "0x1.ebf9bcp-3", "0x1.62e42ap-1", "1"))
)
UNIT = 40  # the mass of the maximum is 2^40
NAN, POSITIVE_INFINITY, NOTHING_LEFT = 1, 2, 3
NEG_INF = float("-inf")


@dataclass
class Distribution:
    """What is left of a batch after stage 7."""

    x: Tensor  # float32 [B, V], processed logits
    status: Tensor  # int32 [B]
    mass: Tensor  # int64 [B, V], 0 where not kept
    kept: Tensor  # bool [B, V]
    greedy: Tensor  # bool [B]


def distribution(logits: Tensor, rows: Rows) -> Distribution:
    """Stages 0 to 7 for logits [B, V]."""
    params = columns(rows)
    x = process(logits, rows, params)
    status = check(x)
    valid = (status == 0)[:, None]
    greedy = params["temperature"] < GREEDY_BELOW
    sound = torch.where(valid, x, torch.zeros_like(x))
    w = mass(sound, torch.where(greedy, torch.ones_like(params["temperature"]), params["temperature"]))
    row = rank(sound, w)
    ranked = is_kept(filters(row, params), row)
    by_id = torch.zeros_like(ranked).scatter(1, row.ids, ranked)
    kept = torch.where(greedy, one_hot(row.ids[:, :1], x), by_id) & valid
    return Distribution(x, status, torch.where(kept, w, 0), kept, greedy[:, 0])


def sample(dist: Distribution, rows: Rows, num_samples: int) -> Tensor:
    """Stages 5 and 8: token ids, int64 [B, num_samples]; -1 in invalid rows."""
    drawn = draw(dist.mass, rows, num_samples)
    return torch.where((dist.status == 0)[:, None], drawn, -1)


def filter_logits(dist: Distribution, rows: Rows) -> Tensor:
    """x / T where kept, -inf elsewhere, float32 [B, V]. A greedy row keeps its maximum as it is (T counts as 1)."""
    temperature = columns(rows)["temperature"]
    divisor = torch.where(dist.greedy[:, None], torch.ones_like(temperature), temperature)
    return torch.where(dist.kept, dist.x / divisor, NEG_INF)


def probabilities(dist: Distribution) -> Tensor:
    """The kept, renormalised distribution, float32 [B, V]; zeros in invalid rows."""
    total = dist.mass.sum(-1, keepdim=True).clamp(min=1)
    return (dist.mass.double() / total.double()).float()


# Parameters ----------------------------------------------------------------------------------------------------------


def columns(rows: Rows) -> Params:
    """Each parameter as a column [B or 1, 1]."""
    columns = {}
    for i, (name, spec) in enumerate(specs()):
        column = rows.records[:, i : i + 1]
        columns[name] = column.view(torch.float32) if spec.kind == "float" else column
    return columns


def choice(params: Params, name: str, value: str) -> Tensor:
    """Whether each row's choice is `value`, bool [B or 1, 1]."""
    return params[name] == dict(specs())[name].choices.index(value)


# Stages 0 to 3: logits -> x ------------------------------------------------------------------------------------------


def process(logits: Tensor, rows: Rows, params: Params) -> Tensor:
    x = logits.detach().to(torch.float32, copy=True)
    if rows.bitmask is not None:
        x = apply_bitmask(x, rows.bitmask)
    if rows.bias is not None:
        x = apply_bias(x, rows.bias)
    return apply_penalties(x, rows, params)


def apply_bitmask(x: Tensor, bitmask: Tensor) -> Tensor:
    """Stage 1: -inf where the token's bit is 0 or lies past the last word."""
    ids = torch.arange(x.shape[1], device=x.device)
    word = ids >> 5
    inside = word < bitmask.shape[1]
    words = bitmask[:, word[inside]].to(torch.int64)
    allowed = torch.zeros(bitmask.shape[0], x.shape[1], dtype=torch.bool, device=x.device)
    allowed[:, inside] = ((words >> (ids[inside] & 31)) & 1).bool()
    return torch.where(allowed, x, NEG_INF)


def apply_bias(x: Tensor, bias: Bias) -> Tensor:
    """Stage 2: x[id] + b."""
    row_of = torch.repeat_interleave(bias.row_ptr.diff())
    x[row_of, bias.ids] = x[row_of, bias.ids] + bias.values
    return x


def apply_penalties(x: Tensor, rows: Rows, params: Params) -> Tensor:
    """Stage 3: repetition, then frequency, then presence."""
    count = occurrences(rows.output_ids, x)
    seen = (count > 0) | (occurrences(rows.prompt_ids, x) > 0)
    theta, alpha, beta = (params[f"{name}_penalty"] for name in ("repetition", "frequency", "presence"))
    x = torch.where((theta != 1) & seen, torch.where(x > 0, x / theta, x * theta), x)
    x = torch.where((alpha != 0) & (count > 0), x - alpha * count.float(), x)
    return torch.where((beta != 0) & (count > 0), x - beta, x)


def occurrences(ids: Tensor | None, x: Tensor) -> Tensor:
    """How often each token occurs in the row's ids, int64 [B, V]; ids outside the vocabulary count nowhere."""
    count = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    if ids is None:
        return count
    inside = (ids >= 0) & (ids < x.shape[1])
    return count.scatter_add_(1, ids.clamp(0, x.shape[1] - 1), inside.to(torch.int64))


# Stage 4 -------------------------------------------------------------------------------------------------------------


def check(x: Tensor) -> Tensor:
    """Status per row, int32 [B]: 0, or the smallest of NAN, POSITIVE_INFINITY, NOTHING_LEFT that holds."""
    status = torch.where((x == NEG_INF).all(-1), NOTHING_LEFT, 0)
    status = torch.where((x == float("inf")).any(-1), POSITIVE_INFINITY, status)
    return torch.where(x.isnan().any(-1), NAN, status).to(torch.int32)


# Stage 6 -------------------------------------------------------------------------------------------------------------


def mass(x: Tensor, temperature: Tensor) -> Tensor:
    """w = trunc(2^40 exp((x - max) / T)) as the contract computes it, int64 [B, V]. Rows hold no NaN and no +inf."""
    scale = torch.full_like(temperature, LOG2E) / temperature
    y = (x - x.amax(-1, keepdim=True)) * scale
    n = (y + ROUND_MAGIC) - ROUND_MAGIC
    f = y - n
    p = torch.full_like(f, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        p = p * f + coefficient
    # Where y < -60, n and f mean nothing (y may be -inf): those tokens have no mass.
    present = y >= -60
    scaled = p * power_of_two(torch.where(present, n, 0).to(torch.int32) + UNIT)
    return torch.where(present, scaled, 0).to(torch.int64)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent from its bits: torch.ldexp goes through pow, which need not be exact."""
    return ((exponent + 127) << 23).view(torch.float32)


# Stage 7 -------------------------------------------------------------------------------------------------------------


class Ranked(NamedTuple):
    """The tokens of each row in rank order: x descending, then id ascending. All are [B, V]."""

    ids: Tensor  # int64
    x: Tensor  # float32
    mass: Tensor  # int64


class Kept(NamedTuple):
    """What is left of each row: mass >= floor, and high < position in the rank order <= low.

    A filter takes one and returns one that keeps no more. All are int64 [B, 1].
    """

    high: Tensor
    low: Tensor
    floor: Tensor


def rank(x: Tensor, w: Tensor) -> Ranked:
    ids = rank_order(x)
    return Ranked(ids, x.gather(1, ids), w.gather(1, ids))


def rank_order(x: Tensor) -> Tensor:
    """Token ids by x descending, then id ascending, int64 [B, V]. Adding 0 turns -0.0 into +0.0."""
    return (x + 0.0).sort(dim=-1, descending=True, stable=True).indices


def everything(row: Ranked) -> Kept:
    """All tokens above -inf."""
    alive = (row.x > NEG_INF).sum(-1, keepdim=True)
    return Kept(torch.full_like(alive, -1), alive - 1, torch.zeros_like(alive))


def is_kept(kept: Kept, row: Ranked) -> Tensor:
    """Whether a token is kept, bool [B, V] in rank order."""
    position = torch.arange(row.x.shape[1], device=row.x.device)
    return (kept.high < position) & (position <= kept.low) & (row.mass >= kept.floor)


def top_k(kept: Kept, row: Ranked, params: Params) -> Kept:
    """The first k of the rank order, or with ties="all" everything at least as large as the k-th."""
    vocab = row.x.shape[1]
    k = params["top_k"].to(torch.int64)
    k = torch.where((k == 0) | (k > vocab), vocab, k).expand(len(row.x), 1)
    at_least = (row.x >= row.x.gather(1, k - 1)).sum(-1, keepdim=True)
    return narrow_above(kept, torch.where(choice(params, "ties", "all"), at_least, k) - 1)


def top_p(kept: Kept, row: Ranked, params: Params) -> Kept:
    """The shortest prefix whose mass reaches the target; everything where p = 1."""
    w = torch.where(is_kept(kept, row), row.mass, 0)
    target = top_p_target(params["top_p"], w.sum(-1, keepdim=True))
    before = w.cumsum(-1) - w
    last = (before < target).sum(-1, keepdim=True) - 1
    return narrow_above(kept, torch.where(params["top_p"] == 1, kept.low, last))


def mass_floors(kept: Kept, row: Ranked, params: Params) -> Kept:
    """The filters that keep every token of at least some mass, which is known from the parameters alone."""
    kept = min_p(kept, row, params)
    return kept


def min_p(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Tokens at least this fraction as probable as the most probable one, whose mass is 2^40."""
    return narrow_to_mass(kept, (params["min_p"] * 2.0**UNIT).to(torch.int64))


def top_p_target(p: Tensor, total: Tensor) -> Tensor:
    """max(1, floor(P30 * Z / 2^30)), exactly."""
    p30 = (p * 2.0**30).to(torch.int64)
    return (p30 * (total >> 30) + (p30 * (total & (2**30 - 1)) >> 30)).clamp(min=1)


def narrow_above(kept: Kept, low: Tensor) -> Kept:
    return kept._replace(low=torch.minimum(kept.low, low))


def narrow_to_mass(kept: Kept, floor: Tensor) -> Kept:
    return kept._replace(floor=torch.maximum(kept.floor, floor))


SEQUENCES = {
    "top_k_first": (top_k, top_p, mass_floors),
    "min_p_first": (mass_floors, top_k, top_p),
    "joint": (top_p, top_k, mass_floors),  # first, top-p measures the whole row, which the others look at anywhere
}
"""The filters of each order, first to last."""


def filters(row: Ranked, params: Params) -> Kept:
    """Each row's kept set, by its own order."""
    found = everything(row)
    for order, sequence in SEQUENCES.items():
        kept = everything(row)
        for narrow in sequence:
            kept = narrow(kept, row, params)
        chosen = choice(params, "order", order)
        found = Kept(*(torch.where(chosen, ours, before) for ours, before in zip(kept, found, strict=True)))
    return found


# Stage 8 -------------------------------------------------------------------------------------------------------------


def draw(w: Tensor, rows: Rows, num_samples: int) -> Tensor:
    """The first id whose running mass, in id order, exceeds floor(u * Z / 2^60); int64 [B, num_samples]."""
    running = w.cumsum(-1)
    total = running[:, -1:]
    index = torch.arange(num_samples, device=w.device)
    u = uniform60(rows.seeds[:, None], rows.offsets[:, None], index[None, :])
    threshold = multiply_high60(u, total)
    return torch.searchsorted(running, threshold.contiguous(), right=True).clamp(max=w.shape[1] - 1)


def uniform60(seed: Tensor, offset: Tensor, index: Tensor) -> Tensor:
    """60 uniform bits per (seed, offset, draw index)."""
    zero = torch.zeros_like(offset + index)
    counter = (zero + low32(offset), zero + low32(offset >> 32), zero + index, zero)
    words = philox4x32(counter, (low32(seed), low32(seed >> 32)))
    return (words[0] << 28) | (words[1] >> 4)


def philox4x32(counter: Sequence[Tensor], key: tuple[Tensor, Tensor], rounds: int = 10) -> list[Tensor]:
    """Philox4x32 (Salmon et al. 2011) on 32-bit words held in int64 tensors."""
    c, (k0, k1) = list(counter), key
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves right.
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [low32(p1 >> 32) ^ c[1] ^ k0, low32(p1), low32(p0 >> 32) ^ c[3] ^ k1, low32(p0)]
        k0, k1 = low32(k0 + 0x9E3779B9), low32(k1 + 0xBB67AE85)
    return c


def low32(x: Tensor) -> Tensor:
    return x & 0xFFFFFFFF


def multiply_high60(u: Tensor, total: Tensor) -> Tensor:
    """floor(u * total / 2^60) for u < 2^60 and total <= 2^60, in halves of 30 bits."""
    bits = 2**30 - 1
    u1, u0, z1, z0 = u >> 30, u & bits, total >> 30, total & bits
    return u1 * z1 + ((u1 * z0 + u0 * z1 + (u0 * z0 >> 30)) >> 30)


# Log-probabilities ---------------------------------------------------------------------------------------------------


def processed_logprobs(dist: Distribution) -> Tensor:
    """log of the kept, renormalised distribution, float64 [B, V]; -inf where not kept."""
    total = dist.mass.sum(-1, keepdim=True).clamp(min=1)
    return (dist.mass.double() / total.double()).log()


def raw_logprobs(raw: Tensor) -> Tensor:
    """log-softmax of x [B, V] at T = 1, before any processing, float64 [B, V]; the normaliser is a sum of masses."""
    sound = raw_is_sound(raw)[:, None]
    x = torch.where(sound, raw, torch.zeros_like(raw))
    total = mass(x, torch.ones_like(x[:, :1])).sum(-1, keepdim=True)
    logprobs = (x.double() - x.amax(-1, keepdim=True).double()) - (total.double() / 2.0**UNIT).log()
    return torch.where(sound, logprobs, torch.nan)


def raw_is_sound(raw: Tensor) -> Tensor:
    """Whether a row has a log-softmax at all, bool [B]: no NaN, no +inf (a mask may have hidden them later)."""
    return check(raw) == 0


def ranks(x: Tensor, tokens: Tensor) -> Tensor:
    """1 + number of tokens strictly above the sampled one, int64 [B, num_samples]."""
    own = x.gather(1, tokens.clamp(min=0))
    # A NaN is above nothing; searchsorted wants it out of the way.
    ascending = torch.where(x.isnan(), NEG_INF, x).sort(dim=-1).values
    return x.shape[1] - torch.searchsorted(ascending, own, right=True) + 1


def one_hot(ids: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool).scatter(1, ids, True)
