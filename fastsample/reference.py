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
from fastsample.outputs import InputKind
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

    x: Tensor  # float32 [B, V], processed logits; of probabilities what ranks as they do
    status: Tensor  # int32 [B]
    mass: Tensor  # int64 [B, V], 0 where not kept
    kept: Tensor  # bool [B, V]
    greedy: Tensor  # bool [B]
    rest: Tensor  # int64 [B, V], the mass without what XTC excludes
    coin: Tensor  # float32 [B or 1, 1], how likely a draw is from the rest


def distribution(logits: Tensor, rows: Rows, kind: InputKind = "logits") -> Distribution:
    """Stages 0 to 7 for logits, or probabilities, [B, V]."""
    params = columns(rows)
    x = process(logits, rows, params) if kind == "logits" else process_probs(logits, rows)
    status = check(x) if kind == "logits" else check_probs(x)
    valid = (status == 0)[:, None]
    temperature = params["temperature"]
    greedy = temperature < GREEDY_BELOW
    drawn_at = torch.where(greedy, torch.ones_like(temperature), temperature)
    judged_at = torch.where(choice(params, "order", "temperature_last"), torch.ones_like(temperature), drawn_at)
    sound = torch.where(valid, x, torch.ones_like(x))
    if kind == "logits":
        w, row = mass(sound, drawn_at), rank(sound, mass(sound, judged_at), depth(sound, judged_at), judged_at)
    else:
        w, x = mass_of_probs(sound), order_of_probs(sound)
        row = rank(x, w, torch.zeros_like(w), judged_at)
    narrowed = filters(row, params)
    excluded = narrowed._replace(low=xtc(narrowed, row, params))
    by_id = [torch.zeros_like(valid & (x == x)).scatter(1, row.ids, is_kept(kept, row)) for kept in (narrowed, excluded)]
    kept = torch.where(greedy, one_hot(row.ids[:, :1], x), by_id[0]) & valid
    out = by_id[1] & ~greedy & valid
    coin = params["xtc_probability"]
    kept = kept & ~(out & (coin == 1))
    w = torch.where(kept, w, 0)
    return Distribution(x, status, w, kept, greedy[:, 0], torch.where(out, 0, w), coin)


def sample(dist: Distribution, rows: Rows, num_samples: int) -> Tensor:
    """Stages 5 and 8: token ids, int64 [B, num_samples]; -1 in invalid rows."""
    drawn = draw(dist, rows, num_samples)
    return torch.where((dist.status == 0)[:, None], drawn, -1)


def filter_logits(dist: Distribution, rows: Rows) -> Tensor:
    """x / T where kept, -inf elsewhere, float32 [B, V]. A greedy row keeps its maximum as it is (T counts as 1)."""
    temperature = columns(rows)["temperature"]
    divisor = torch.where(dist.greedy[:, None], torch.ones_like(temperature), temperature)
    return torch.where(dist.kept, dist.x / divisor, NEG_INF)


def probabilities(dist: Distribution) -> Tensor:
    """The kept, renormalised distribution, float32 [B, V]; zeros in invalid rows."""
    return mixture(dist).float()


def mixture(dist: Distribution) -> Tensor:
    """Stage 8's mixture of draws with and without what XTC excludes, float64 [B, V]."""
    coin = dist.coin.double()
    whole = share(dist.mass)
    mixed = share(dist.mass, 1 - coin) + share(dist.rest, coin)
    return torch.where((dist.mass != dist.rest).any(-1, keepdim=True), mixed, whole)


def share(w: Tensor, times: Tensor | float = 1.0) -> Tensor:
    """times * w / total, in this order."""
    return times * w.double() / w.sum(-1, keepdim=True).clamp(min=1).double()


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
    return apply_history(apply_penalties(x, rows, params), rows, params)


def process_probs(probs: Tensor, rows: Rows) -> Tensor:
    """Probabilities have stages 0 and 1 only; what is not allowed has the probability 0."""
    p = probs.detach().to(torch.float32, copy=True)
    return p if rows.bitmask is None else apply_bitmask(p, rows.bitmask, 0.0)


def apply_bitmask(x: Tensor, bitmask: Tensor, nothing: float = NEG_INF) -> Tensor:
    """Stage 1: -inf where the token's bit is 0 or lies past the last word."""
    ids = torch.arange(x.shape[1], device=x.device)
    word = ids >> 5
    inside = word < bitmask.shape[1]
    words = bitmask[:, word[inside]].to(torch.int64)
    allowed = torch.zeros(bitmask.shape[0], x.shape[1], dtype=torch.bool, device=x.device)
    allowed[:, inside] = ((words >> (ids[inside] & 31)) & 1).bool()
    return torch.where(allowed, x, nothing)


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


def apply_history(x: Tensor, rows: Rows, params: Params) -> Tensor:
    """Stage 3's history edits, row by row: DRY, then the ban of repeated n-grams."""
    dry, ngram = (params[name].expand(len(x), 1)[:, 0] for name in ("dry_multiplier", "no_repeat_ngram_size"))
    for r in ((dry > 0) | (ngram > 0)).nonzero()[:, 0].tolist():
        own = {name: column[min(r, len(column) - 1)] for name, column in params.items()}
        history = [t for ids in (rows.prompt_ids, rows.output_ids) if ids is not None for t in ids[r].tolist()]
        history = [t for t in history if 0 <= t < x.shape[1]]
        if dry[r] > 0:
            breakers = set() if rows.breakers is None else set(rows.breakers[min(r, len(rows.breakers) - 1)].tolist())
            apply_dry(x[r], history, breakers, own)
        if (n := int(ngram[r])) > 0:
            x[r, [history[i + n - 1] for i in starts(history, n)]] = NEG_INF
    return x


def apply_dry(x: Tensor, history: list[int], breakers: set[int], params: Params) -> None:
    """Subtract from each token of x [V] that would extend a repetition of the history's end."""
    window, allowed = history[-int(params["dry_range"]) :], int(params["dry_allowed_length"])
    length: dict[int, int] = {}
    for i in range(len(window) - 1):
        if (token := window[i + 1]) not in breakers:
            length[token] = max(length.get(token, 0), common_suffix(window, i, breakers))
    for token, matched in length.items():
        if matched >= allowed:
            x[token] = x[token] - (params["dry_multiplier"] * power(params["dry_base"], matched - allowed))[0]


def common_suffix(h: list[int], i: int, breakers: set[int]) -> int:
    """Length of the longest common suffix of h[0..i] and h that holds no breaker."""
    length = 0
    while length <= i and h[i - length] == h[-1 - length] and h[i - length] not in breakers:
        length += 1
    return length


def power(base: Tensor, exponent: int) -> Tensor:
    """base multiplied onto 1, one float32 product each, stopping before a product overflows."""
    q = torch.ones_like(base)
    for _ in range(exponent):
        following = q * base
        if bool(following.isinf()) or bool(following == q):
            break
        q = following
    return q


def starts(h: list[int], n: int) -> list[int]:
    """Where the last n - 1 ids of h stand before another id of h."""
    return [i for i in range(len(h) - n + 1) if h[i : i + n - 1] == h[len(h) - n + 1 :]]


# Stage 4 -------------------------------------------------------------------------------------------------------------


def check(x: Tensor) -> Tensor:
    """Status per row, int32 [B]: 0, or the smallest of NAN, POSITIVE_INFINITY, NOTHING_LEFT that holds."""
    status = torch.where((x == NEG_INF).all(-1), NOTHING_LEFT, 0)
    status = torch.where((x == float("inf")).any(-1), POSITIVE_INFINITY, status)
    return torch.where(x.isnan().any(-1), NAN, status).to(torch.int32)


def check_probs(p: Tensor) -> Tensor:
    """The same for probabilities: POSITIVE_INFINITY stands for negative ones too, NOTHING_LEFT for zeros alone."""
    bits = p.view(torch.int32)
    size, infinity = bits & 0x7FFFFFFF, 0x7F800000
    status = torch.where((size == 0).all(-1), NOTHING_LEFT, 0)
    status = torch.where(((size == infinity) | ((bits < 0) & (size > 0))).any(-1), POSITIVE_INFINITY, status)
    return torch.where((size > infinity).any(-1), NAN, status).to(torch.int32)


def order_of_probs(p: Tensor) -> Tensor:
    """Numbers that rank as probabilities do, -inf where these are 0; float64 [B, V].

    They are the bits, so that a mode of torch's that takes subnormal numbers for 0 changes nothing. What is no
    probability, as it may be in a row before its mask, is above none.
    """
    bits = p.view(torch.int32)
    return torch.where((bits > 0) & (bits <= 0x7F800000), bits.double(), NEG_INF)


# Stage 6 -------------------------------------------------------------------------------------------------------------


def mass(x: Tensor, temperature: Tensor) -> Tensor:
    """w = trunc(2^40 exp((x - max) / T)) as the contract computes it, int64 [B, V]. Rows hold no NaN and no +inf."""
    return mass_at((x - x.amax(-1, keepdim=True)) * scale_of(temperature))


def scale_of(temperature: Tensor) -> Tensor:
    """c = LOG2E / T."""
    return torch.full_like(temperature, LOG2E) / temperature


def mass_at(y: Tensor) -> Tensor:
    """w of y <= 0, int64."""
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


def mass_of_probs(p: Tensor) -> Tensor:
    """w = trunc(p * 2^s), the largest of a row in [2^39, 2^40); int64 [B, V]. From the bits of p >= 0."""
    bits = (p.view(torch.int32) & 0x7FFFFFFF).to(torch.int64)
    exponent = (bits >> 23).clamp(min=1)  # p = fraction * 2^(exponent - 150)
    fraction = (bits & 0x7FFFFF) + torch.where(bits >> 23 > 0, 2**23, 0)
    at = bits.argmax(-1, keepdim=True)
    top, width = exponent.gather(1, at), fraction.gather(1, at).double().frexp().exponent
    shift = exponent - top + UNIT - width
    return (fraction << shift.clamp(min=0)) >> (-shift).clamp(0, 63)


# Stage 6b ------------------------------------------------------------------------------------------------------------


def depth(x: Tensor, temperature: Tensor) -> Tensor:
    """e = trunc(-y * 2^14), int64 [B, V]; below 2^20 where there is mass, and not meant elsewhere."""
    y = (x - x.amax(-1, keepdim=True)) * scale_of(temperature)
    return (-y.clamp(min=-60) * 2.0**14).to(torch.int64)


def total_of(w: Tensor) -> Tensor:
    """Z, int64 [B, 1], of the masses of a set (0 outside of it)."""
    return w.sum(-1, keepdim=True)


def halves(w: Tensor) -> tuple[Tensor, Tensor]:
    return w >> 20, w & (2**20 - 1)


def mean_depth(w: Tensor, e: Tensor) -> Tensor:
    """E: the mean of e by mass, float64 [B, 1]."""
    high, low = ((half * e).sum(-1, keepdim=True).double() for half in halves(w))
    return (high * 2.0**20 + low) / total_of(w).double()


def sum_of_squares(w: Tensor) -> Tensor:
    """Q, float64 [B, 1]."""
    h, l = halves(w)
    hh, hl, ll = (product.sum(-1, keepdim=True) for product in (h * h, h * l, l * l))
    return (hh.double() * 2.0**20 + (2 * hl).double()) * 2.0**20 + ll.double()


def spread(x: Tensor, peak: Tensor) -> Tensor:
    """sigma: the standard deviation of what lies above -inf, float64 [B, 1]."""
    alive = x > NEG_INF
    d = torch.where(alive, ((peak - x) * 2.0**11).clamp(max=2**20 - 1), 0).to(torch.int64)
    n, d1, d2 = (part.sum(-1, keepdim=True).double() for part in (alive, d, d * d))
    a = d1 / n
    return (d2 / n - a * a).clamp(min=0).sqrt() * 2.0**-11


# Stage 7 -------------------------------------------------------------------------------------------------------------


class Ranked(NamedTuple):
    """The tokens of each row in rank order: x descending, then id ascending. All are [B, V]."""

    ids: Tensor  # int64
    x: Tensor  # float32
    mass: Tensor  # int64
    depth: Tensor  # int64
    scale: Tensor  # float32 [B or 1, 1]
    unit: Tensor  # int64 [B, 1], the largest mass


class Kept(NamedTuple):
    """What is left of each row: mass >= floor, and high < position in the rank order <= low.

    A filter takes one and returns one that keeps no more. All are int64 [B, 1].
    """

    high: Tensor
    low: Tensor
    floor: Tensor


def rank(x: Tensor, w: Tensor, e: Tensor, temperature: Tensor) -> Ranked:
    ids = rank_order(x)
    unit = w.amax(-1, keepdim=True)
    return Ranked(ids, x.gather(1, ids), w.gather(1, ids), e.gather(1, ids), scale_of(temperature), unit)


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


def kept_mass(kept: Kept, row: Ranked) -> Tensor:
    """Mass where kept, else 0, int64 [B, V] in rank order."""
    return torch.where(is_kept(kept, row), row.mass, 0)


def top_n_sigma(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Logits at most this many standard deviations below the highest."""
    peak, s = row.x[:, :1], params["top_n_sigma"]
    lowest = peak - (s.double() * spread(row.x, peak)).float()
    within = (row.x >= lowest).sum(-1, keepdim=True)
    return narrow_above(kept, torch.where(s == 0, kept.low, within - 1))


def top_k(kept: Kept, row: Ranked, params: Params) -> Kept:
    """The first k of the rank order, or with ties="all" everything at least as large as the k-th."""
    vocab = row.x.shape[1]
    k = params["top_k"].to(torch.int64)
    k = torch.where((k == 0) | (k > vocab), vocab, k).expand(len(row.x), 1)
    at_least = (row.x >= row.x.gather(1, k - 1)).sum(-1, keepdim=True)
    return narrow_above(kept, torch.where(choice(params, "ties", "all"), at_least, k) - 1)


def top_p(kept: Kept, row: Ranked, params: Params) -> Kept:
    """The shortest prefix whose mass reaches the target; everything where p = 1."""
    w = kept_mass(kept, row)
    target = top_p_target(params["top_p"], total_of(w))
    before = w.cumsum(-1) - w
    last = (before < target).sum(-1, keepdim=True) - 1
    return narrow_above(kept, torch.where(params["top_p"] == 1, kept.low, last))


def mass_floors(kept: Kept, row: Ranked, params: Params) -> Kept:
    """The filters that keep every token of at least some mass, which is known from the parameters alone."""
    kept = min_p(kept, row, params)
    return kept


def min_p(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Tokens at least this fraction as probable as the most probable one, whose mass is 2^40 for logits."""
    return narrow_to_mass(kept, (params["min_p"].double() * row.unit.double()).to(torch.int64))


def typical(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Those nearest to the mean logit, by mass, whose mass reaches the target. An interval of the rank order."""
    w, t = kept_mass(kept, row), params["typical_p"]
    mean = (row.x[:, :1].double() - (mean_depth(w, row.depth) * 2.0**-14) / row.scale.double()).float()
    distance = (row.x - mean).abs()
    nearest = distance.sort(dim=-1, stable=True)
    running = w.gather(1, nearest.indices).cumsum(-1)
    reached = (running < top_p_target(t, total_of(w))).sum(-1, keepdim=True)
    beyond = distance > nearest.values.gather(1, reached.clamp(max=row.x.shape[1] - 1))
    above = (beyond & (row.x > mean)).sum(-1, keepdim=True)
    below = (beyond & ~(row.x > mean)).sum(-1, keepdim=True)
    off = t == 1
    kept = narrow_below(kept, torch.where(off, kept.high, above - 1))
    return narrow_above(kept, torch.where(off, kept.low, row.x.shape[1] - below - 1))


def measured_floors(kept: Kept, row: Ranked, params: Params) -> Kept:
    """The filters that keep every token of at least some mass, which is measured on what is kept so far."""
    kept = epsilon(kept, row, params)
    kept = eta(kept, row, params)
    kept = top_a(kept, row, params)
    return p_less(kept, row, params)


def epsilon(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Tokens of at least this probability."""
    return threshold(kept, row, params["epsilon_cutoff"].double() * total_of(kept_mass(kept, row)).double())


def eta(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Tokens of at least this probability, or of less where the entropy is high."""
    w, e = kept_mass(kept, row), params["eta_cutoff"].double()
    typical_mass = mass_at(-(mean_depth(w, row.depth) * 2.0**-14).float()).double()
    return threshold(kept, row, torch.minimum(e * total_of(w).double(), e.sqrt() * typical_mass))


def top_a(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Tokens of at least this times the square of the highest probability."""
    a, unit = params["top_a"].double(), row.unit.double()
    return threshold(kept, row, (a * unit) * (unit / total_of(kept_mass(kept, row)).double()))


def p_less(kept: Kept, row: Ranked, params: Params) -> Kept:
    """Tokens at least as probable as that two draws agree."""
    w = kept_mass(kept, row)
    floor = sum_of_squares(w) / total_of(w).double()
    return threshold(kept, row, torch.where(params["p_less"] != 0, floor, 0.0))


def threshold(kept: Kept, row: Ranked, floor: Tensor) -> Kept:
    """Tokens of at least this mass; the heaviest one in any case."""
    heaviest = kept_mass(kept, row).amax(-1, keepdim=True).double()
    return narrow_to_mass(kept, torch.minimum(floor, heaviest).to(torch.int64))


def xtc(kept: Kept, row: Ranked, params: Params) -> Tensor:
    """The position above which everything kept is a top choice but the last, int64 [B, 1]; -1 where nothing is."""
    floor = (params["xtc_threshold"].double() * total_of(kept_mass(kept, row)).double()).to(torch.int64)
    top = is_kept(kept, row) & (row.mass >= floor) & (params["xtc_probability"] > 0)
    position = torch.arange(row.x.shape[1], device=row.x.device)
    last = torch.where(top, position, -1).amax(-1, keepdim=True)
    return torch.where(top.sum(-1, keepdim=True) >= 2, last - 1, -1)


def top_p_target(p: Tensor, total: Tensor) -> Tensor:
    """max(1, floor(P30 * Z / 2^30)), exactly."""
    p30 = (p * 2.0**30).to(torch.int64)
    return (p30 * (total >> 30) + (p30 * (total & (2**30 - 1)) >> 30)).clamp(min=1)


def narrow_below(kept: Kept, high: Tensor) -> Kept:
    return kept._replace(high=torch.maximum(kept.high, high))


def narrow_above(kept: Kept, low: Tensor) -> Kept:
    return kept._replace(low=torch.minimum(kept.low, low))


def narrow_to_mass(kept: Kept, floor: Tensor) -> Kept:
    return kept._replace(floor=torch.maximum(kept.floor, floor))


SEQUENCES = {
    "top_k_first": (top_n_sigma, top_k, top_p, mass_floors, typical, measured_floors),
    "min_p_first": (top_n_sigma, mass_floors, top_k, top_p, typical, measured_floors),
    # First, top-p measures the whole row, which the others up to typical look at anywhere.
    "joint": (top_p, top_n_sigma, top_k, mass_floors, typical, measured_floors),
    "temperature_last": (top_n_sigma, top_k, typical, top_p, mass_floors, measured_floors),
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


PLAIN_DRAW, XTC_COIN = 0, 1  # purposes of random bits


def draw(dist: Distribution, rows: Rows, num_samples: int) -> Tensor:
    """Each draw from all that is kept, or where its coin says so from what XTC leaves; int64 [B, num_samples]."""
    index = torch.arange(num_samples, device=dist.mass.device)
    u, coin = (uniform60(rows.seeds[:, None], rows.offsets[:, None], index[None, :], p) for p in (PLAIN_DRAW, XTC_COIN))
    whole, rest = draw_from(dist.mass, u), draw_from(dist.rest, u)
    return torch.where(coin < (dist.coin * 2.0**60).to(torch.int64), rest, whole)


def draw_from(w: Tensor, u: Tensor) -> Tensor:
    """The first id whose running mass, in id order, exceeds floor(u * Z / 2^60)."""
    running = w.cumsum(-1)
    threshold = multiply_high60(u, running[:, -1:])
    return torch.searchsorted(running, threshold.contiguous(), right=True).clamp(max=w.shape[1] - 1)


def uniform60(seed: Tensor, offset: Tensor, index: Tensor, purpose: int = PLAIN_DRAW) -> Tensor:
    """60 uniform bits per (seed, offset, draw index) for a purpose."""
    zero = torch.zeros_like(offset + index)
    counter = (zero + low32(offset), zero + low32(offset >> 32), zero + index, zero + purpose)
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
    return mixture(dist).log()


def raw_logprobs_of_probs(p: Tensor) -> Tensor:
    """log of probabilities over their sum, before any processing, float64 [B, V]."""
    sound = (check_probs(p) == 0)[:, None]
    return torch.where(sound, share(mass_of_probs(torch.where(sound, p, torch.ones_like(p)))).log(), torch.nan)


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
