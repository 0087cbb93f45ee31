"""Stages 0 to 4: logits or probabilities as given, to the row that is sampled, and whether it is valid."""

from __future__ import annotations

from typing import TypeAlias

import torch

from fastsample.inputs import Bias, Rows
from fastsample.params import specs

Tensor = torch.Tensor
Params: TypeAlias = "dict[str, Tensor]"  # each parameter as a column [B or 1, 1]

NAN, POSITIVE_INFINITY, NOTHING_LEFT = 1, 2, 3
NEG_INF = float("-inf")


def columns(rows: Rows) -> Params:
    """Each parameter as a column [B or 1, 1]."""
    return columns_of(rows.records)


def columns_of(records: Tensor) -> Params:
    columns = {}
    for i, (name, spec) in enumerate(specs()):
        column = records[:, i : i + 1]
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
    count = occurrences(of_rows(rows.output_ids, rows), x) + occurrences(rows.drafted_ids, x)
    seen = (count > 0) | (occurrences(of_rows(rows.prompt_ids, rows), x) > 0)
    theta, alpha, beta = (params[f"{name}_penalty"] for name in ("repetition", "frequency", "presence"))
    x = torch.where((theta != 1) & seen, torch.where(x > 0, x / theta, x * theta), x)
    x = torch.where((alpha != 0) & (count > 0), x - alpha * count.float(), x)
    return torch.where((beta != 0) & (count > 0), x - beta, x)


def of_rows(ids: Tensor | None, rows: Rows) -> Tensor | None:
    """The ids of each row, given those of each request."""
    return ids if ids is None or rows.requests is None else ids[rows.requests.clamp(max=len(ids) - 1)]


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
        own_ids = (of_rows(rows.prompt_ids, rows), of_rows(rows.output_ids, rows), rows.drafted_ids)
        history = [t for ids in own_ids if ids is not None for t in ids[min(r, len(ids) - 1)].tolist()]
        history = [t for t in history if 0 <= t < x.shape[1]]
        if dry[r] > 0:
            listed = of_rows(rows.breakers, rows)
            breakers = set() if listed is None else set(listed[min(r, len(listed) - 1)].tolist())
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
