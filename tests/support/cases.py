"""The cases as data: logits makers x vocabulary sizes x dtypes x parameters x extra inputs.

Shared by every engine's parity test, the distribution tests and the benchmarks. A case is built from its own name alone
(the generator is seeded with a checksum of it), so it is the same everywhere and in any order.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastsample.params import SamplingParams, specs

Tensor = torch.Tensor
INF = float("inf")
LOG2E = float.fromhex("0x1.715476p+0")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1


# Logits: float32 [rows, vocab]; `finish` casts them -----------------------------------------------------------------


def flat(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    return torch.randn(rows, vocab, generator=g)


def lm(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """A language model: a few hundred tokens above a bulk that is 15 lower."""
    x = torch.randn(rows, vocab, generator=g) * 1.5 - 15
    heads = torch.randint(vocab, (rows, max(1, min(300, vocab // 4))), generator=g)
    return x.scatter(1, heads, torch.randn(heads.shape, generator=g) * 2)


def peaked(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """One token of probability 0.999."""
    x = torch.randn(rows, vocab, generator=g) * 0.1
    top = torch.randint(vocab, (rows, 1), generator=g)
    return x.scatter(1, top, math.log(999 * max(1, vocab - 1)))


def equal(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    return torch.full((rows, vocab), 3.25)


def ties(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """Many equal values, as bfloat16 logits have."""
    return (torch.randn(rows, vocab, generator=g) * 8).round() / 4


def ascending(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    return torch.linspace(-12, 12, vocab).expand(rows, vocab).clone()


def descending(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    return torch.linspace(12, -12, vocab).expand(rows, vocab).clone()


def half_masked(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """Half of the tokens are -inf."""
    x = torch.randn(rows, vocab, generator=g)
    keep = torch.randint(vocab, (rows, 1), generator=g)
    gone = (torch.rand(rows, vocab, generator=g) < 0.5).scatter(1, keep, False)
    return x.masked_fill(gone, -INF)


def lone(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """One finite token per row."""
    only = torch.randint(vocab, (rows, 1), generator=g)
    return torch.full((rows, vocab), -INF).scatter(1, only, torch.randn(rows, 1, generator=g))


def zeros(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """-0.0 and +0.0, which are equal."""
    return torch.where(torch.rand(rows, vocab, generator=g) < 0.5, -0.0, 0.0)


def denormal(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    return torch.randn(rows, vocab, generator=g) * 1e-39


def huge(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """Differences that overflow float32."""
    sign = torch.randint(3, (rows, vocab), generator=g) - 1.0
    return sign * (3e38 + 1e36 * torch.rand(rows, vocab, generator=g))


def tiny_spread(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """A few units in the last place apart."""
    return 1 + 2.0**-23 * torch.randint(9, (rows, vocab), generator=g)


def halves(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """Multiples of 1/2 down to -64: with T = LOG2E, y is exactly that (rounding ties, y = -41 and y = -60)."""
    return -torch.randint(129, (rows, vocab), generator=g) / 2


def cutoffs(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """Around the y where mass gets too small for 32 bits, vanishes, or is cut off."""
    y = torch.tensor([0.0, 16.5, 17.0, 40.0, 41.0, 41.5, 59.9, 60.0, 60.1])
    pick = y[torch.randint(len(y), (rows, vocab), generator=g)]
    return -pick * math.log(2) * (1 + 2.0**-22 * torch.randn(rows, vocab, generator=g))


def steps(rows: int, vocab: int, g: torch.Generator) -> Tensor:
    """Runs of equal values, longer than a vector."""
    return torch.randn(rows, vocab // 77 + 1, generator=g).repeat_interleave(77, 1)[:, :vocab] * 3


MAKERS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    f.__name__: f
    for f in (
        flat,
        lm,
        peaked,
        equal,
        ties,
        ascending,
        descending,
        half_masked,
        lone,
        zeros,
        denormal,
        huge,
        tiny_spread,
        halves,
        cutoffs,
        steps,
    )
}


def finish(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, finite values staying finite."""
    limit = torch.finfo(dtype).max
    return torch.where(x.isinf(), x, x.clamp(-limit, limit)).to(dtype)


# Parameters: SamplingParams fields for a vocabulary and a number of rows --------------------------------------------

Fields = dict[str, Any]


def cycle(rows: int, *values: Any) -> list[Any]:
    return [values[i % len(values)] for i in range(rows)]


PARAMS: dict[str, Callable[[int, int], Fields]] = {
    "plain": lambda v, b: {},
    "greedy": lambda v, b: {"temperature": 0.0},
    "T.37": lambda v, b: {"temperature": 0.37},
    "T=1e-5": lambda v, b: {"temperature": 1e-5},
    "T<1e-5": lambda v, b: {"temperature": 9.9999e-6},
    "Ttiny": lambda v, b: {"temperature": 1.0001e-5},
    "Thuge": lambda v, b: {"temperature": 2.0**20},
    "T=LOG2E": lambda v, b: {"temperature": LOG2E},
    "k1": lambda v, b: {"top_k": 1},
    "k2": lambda v, b: {"top_k": 2},
    "k50": lambda v, b: {"top_k": 50},
    "kV/2": lambda v, b: {"top_k": v // 2},
    "kV-1": lambda v, b: {"top_k": v - 1},
    "kV": lambda v, b: {"top_k": v},
    "k>V": lambda v, b: {"top_k": v + 1},
    "kmax": lambda v, b: {"top_k": 2**40},
    "k1-all": lambda v, b: {"top_k": 1, "ties": "all"},
    "k7-all": lambda v, b: {"top_k": 7, "ties": "all"},
    "kV-1-all": lambda v, b: {"top_k": v - 1, "ties": "all"},
    "p.9": lambda v, b: {"top_p": 0.9},
    "p.5": lambda v, b: {"top_p": 0.5},
    "p.999": lambda v, b: {"top_p": 0.999},
    "p~1": lambda v, b: {"top_p": BELOW_ONE},
    "p1e-9": lambda v, b: {"top_p": 1e-9},
    "p1e-40": lambda v, b: {"top_p": 1e-40},
    "m.05": lambda v, b: {"min_p": 0.05},
    "m1": lambda v, b: {"min_p": 1.0},
    "m~1": lambda v, b: {"min_p": BELOW_ONE},
    "m1e-12": lambda v, b: {"min_p": 1e-12},
    "m1e-40": lambda v, b: {"min_p": 1e-40},
    "k50-p.9": lambda v, b: {"temperature": 0.95, "top_k": 50, "top_p": 0.9},
    "all-hf": lambda v, b: {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    "all-vllm": lambda v, b: {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.1, "order": "min_p_first"},
    "all-joint": lambda v, b: {"temperature": 5.0, "top_k": 20, "top_p": 0.7, "min_p": 0.02, "order": "joint"},
    "all-hf-ties": lambda v, b: {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "ties": "all"},
    "all-vllm-ties": lambda v, b: {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "ties": "all", "order": "min_p_first"},
    "all-joint-ties": lambda v, b: {"top_k": 9, "top_p": 0.6, "min_p": 0.05, "ties": "all", "order": "joint"},
    "p-m-vllm": lambda v, b: {"top_p": 0.9, "min_p": 0.2, "order": "min_p_first"},
    "p-m-joint": lambda v, b: {"top_p": 0.9, "min_p": 0.2, "order": "joint"},
    "k3-p.7-vllm": lambda v, b: {"temperature": 2.0, "top_k": 3, "top_p": 0.7, "min_p": 1e-3, "order": "min_p_first"},
    "p~1-k-joint": lambda v, b: {"top_p": BELOW_ONE, "top_k": 3, "order": "joint"},
    "rows": lambda v, b: {
        "temperature": cycle(b, 0.0, 0.37, 1.0, 1e-6, 2.0),
        "top_k": cycle(b, 0, 3, 50, 5, v),
        "top_p": cycle(b, 0.9, 0.5, 1.0, 0.3, 0.95),
        "min_p": cycle(b, 0.0, 0.01, 0.0, 0.9, 0.1),
        "ties": cycle(b, "first", "all", "first"),
        "order": cycle(b, "joint", "top_k_first", "min_p_first"),
    },
    "rows-penalties": lambda v, b: {
        "temperature": cycle(b, 1.0, 0.0, 0.5),
        "repetition_penalty": cycle(b, 1.3, 1.0, 0.6),
        "frequency_penalty": torch.tensor(cycle(b, 0.0, 0.5, -0.3, 0.1)),
        "presence_penalty": cycle(b, 0.4, 0.0, -0.7, 1.5, 0.2),
        "top_p": 0.95,
    },
    "repetition": lambda v, b: {"repetition_penalty": 1.7},
    "repetition<1": lambda v, b: {"repetition_penalty": 0.4},
    "frequency": lambda v, b: {"frequency_penalty": 0.37},
    "frequency<0": lambda v, b: {"frequency_penalty": -0.37},
    "presence": lambda v, b: {"presence_penalty": 0.9},
    "penalties": lambda v, b: {
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "temperature": 0.8,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.01,
    },
    "penalties-greedy": lambda v, b: {
        "repetition_penalty": 3.0,
        "frequency_penalty": 0.3,
        "presence_penalty": 2.0,
        "temperature": 0.0,
    },
}


def _of_the_table() -> dict[str, Callable[[int, int], Fields]]:
    """Sets for the parameters of the table that no set above has: the table's examples, alone and among the others."""
    covered = {name for make in PARAMS.values() for name in make(8, 5)}
    found: dict[str, Callable[[int, int], Fields]] = {}
    for name, spec in specs():
        if name in covered:
            continue
        beside, examples = dict(spec.beside), spec.examples
        for value in examples:
            found[f"{name}={value}"] = lambda v, b, own={**beside, name: value}: own
        for base in ("all-hf", "all-vllm", "all-joint"):
            found[f"{name}-{base}"] = lambda v, b, base=base, own={name: examples[0]}: {**PARAMS[base](v, b), **own}
        values = (getattr(SamplingParams, name), *examples)
        found[f"{name}-rows"] = lambda v, b, name=name, values=values: {
            **PARAMS["rows"](v, b),
            name: cycle(b, *values),
        }
    return found


OLD_SETS = tuple(PARAMS)
"""The sets above, which meet every maker of logits; those below meet a few each."""

FILTERS = tuple(
    name
    for name, spec in specs()
    if spec.kind != "choice"
    and not spec.counts
    and not spec.of_history
    and name not in ("temperature", "xtc_threshold")
)


def _pairs() -> dict[str, Callable[[int, int], Fields]]:
    """Every two filters together, in every order from row to row, at a temperature that is not 1."""
    found: dict[str, Callable[[int, int], Fields]] = {}
    for a, b in itertools.combinations(FILTERS, 2):
        both = {name: dict(specs())[name].examples[-1] for name in (a, b)}
        found[f"{a}+{b}"] = lambda v, rows, own=both: {
            "temperature": 1.4,
            "order": cycle(rows, *dict(specs())["order"].choices),
            **own,
        }
    return found


PARAMS |= _of_the_table()
PARAMS |= _pairs()
PARAMS |= {
    "min_p-xtc-dry": lambda v, b: {
        "min_p": 0.02,
        "xtc_probability": cycle(b, 0.5, 0.0, 1.0, 0.9),
        "xtc_threshold": 0.1,
        "dry_multiplier": 0.8,
        "dry_allowed_length": 1,
    },
    "llama.cpp": lambda v, b: {
        "temperature": cycle(b, 0.8, 1.0, 0.0, 2.5),
        "top_n_sigma": cycle(b, 0.0, 2.0, 1.0),
        "top_k": 40,
        "typical_p": cycle(b, 1.0, 0.9, 0.5),
        "top_p": 0.95,
        "min_p": 0.05,
        "xtc_probability": cycle(b, 0.0, 0.5),
        "order": "temperature_last",
    },
    "typical~1": lambda v, b: {"typical_p": BELOW_ONE},
    "typical1e-9": lambda v, b: {"typical_p": 1e-9},
    "sigma-tiny": lambda v, b: {"top_n_sigma": 1e-6},
    "sigma-huge": lambda v, b: {"top_n_sigma": 1e30},
    "xtc-any": lambda v, b: {"xtc_probability": 0.7, "xtc_threshold": 1e-12},
    "floors": lambda v, b: {
        "temperature": cycle(b, 1.0, 0.6, 2.0),
        "epsilon_cutoff": 0.001,
        "eta_cutoff": 0.002,
        "top_a": 0.01,
        "p_less": cycle(b, False, True),
        "order": cycle(b, *dict(specs())["order"].choices),
    },
    "penalties-dry": lambda v, b: {
        "repetition_penalty": 1.3,
        "frequency_penalty": cycle(b, 0.3, -0.2),
        "presence_penalty": 0.2,
        "dry_multiplier": 0.8,
        "dry_allowed_length": 1,
        "no_repeat_ngram_size": cycle(b, 0, 4),
    },
    "ngrams": lambda v, b: {"no_repeat_ngram_size": cycle(b, 2, 3, 0, 1, 4), "temperature": cycle(b, 1.0, 0.0)},
}

PENALTY_SETS = tuple(
    name for name, make in PARAMS.items() if any(spec.counts for field, spec in specs() if field in make(8, 5))
)


# Extras: what goes with the logits; each returns (logits, more arguments) -------------------------------------------

Extra = tuple[Tensor, dict[str, Any]]


def pack_bits(allowed: Tensor) -> Tensor:
    """Bool [rows, vocab] as int32 words [rows, ceil(vocab / 32)]."""
    rows, vocab = allowed.shape
    padded = torch.zeros(rows, -(-vocab // 32) * 32, dtype=torch.int64)
    padded[:, :vocab] = allowed
    words = (padded.view(rows, -1, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def mask(x: Tensor, g: torch.Generator) -> Extra:
    """Half of the tokens are allowed, often not the best one; the worst above -inf always is."""
    worst = torch.where(x.isinf(), INF, x.float()).argmin(1, keepdim=True)
    allowed = (torch.rand(x.shape, generator=g) < 0.5).scatter(1, worst, True)
    return x, {"bitmask": pack_bits(allowed)}


def mask_short(x: Tensor, g: torch.Generator) -> Extra:
    """Half of the words: the tokens past them are not allowed."""
    words = pack_bits(torch.rand(x.shape, generator=g) < 0.8)
    return x, {"bitmask": words[:, : -(-words.shape[1] // 2)]}


def mask_long(x: Tensor, g: torch.Generator) -> Extra:
    """Bits and words past the vocabulary are ignored."""
    words = pack_bits(torch.rand(x.shape, generator=g) < 0.5)
    if x.shape[1] % 32:
        words[:, -1] |= -1 << (x.shape[1] % 32)
    return x, {"bitmask": torch.cat([words, torch.full((x.shape[0], 3), -1, dtype=torch.int32)], 1)}


def mask_empty(x: Tensor, g: torch.Generator) -> Extra:
    """No words at all: nothing is allowed."""
    return x, {"bitmask": torch.empty(x.shape[0], 0, dtype=torch.int32)}


def mask_shared(x: Tensor, g: torch.Generator) -> Extra:
    return x, {"bitmask": pack_bits(torch.rand(1, x.shape[1], generator=g) < 0.5)[0]}


def mask_strided(x: Tensor, g: torch.Generator) -> Extra:
    words = pack_bits(torch.rand(x.shape, generator=g) < 0.5)
    return x, {"bitmask": torch.cat([words, ~words, words], 1)[:, words.shape[1] : 2 * words.shape[1]]}


def _some_ids(x: Tensor, n: int, g: torch.Generator) -> Tensor:
    """Distinct ids of one row, the best few among them."""
    vocab = x.shape[-1]
    best = x.float().topk(min(vocab, 3)).indices
    return torch.cat([best, torch.randperm(vocab, generator=g)[:n]]).unique()


def bias(x: Tensor, g: torch.Generator) -> Extra:
    """A dict or None per row; every third value is -inf."""
    rows = []
    for i, row in enumerate(x):
        ids = _some_ids(row, 9, g)
        values = torch.randn(len(ids), generator=g) * 3
        values[2::3] = -INF
        rows.append(None if i == 1 else dict(zip(ids.tolist(), values.tolist(), strict=True)))
    return x, {"bias": rows}


def bias_shared(x: Tensor, g: torch.Generator) -> Extra:
    return x, {"bias": {int(t): 5.0 - k for k, t in enumerate(_some_ids(x[0], 5, g))}}


def bias_tensors(x: Tensor, g: torch.Generator) -> Extra:
    """Unordered ids in tensors; one row has an entry for nearly every token."""
    per_row = [torch.randperm(x.shape[1], generator=g)[: x.shape[1] if i == 2 else 4] for i in range(x.shape[0])]
    row_ptr = torch.tensor([0] + [len(ids) for ids in per_row]).cumsum(0).to(torch.int32)
    values = torch.randn(int(row_ptr[-1]), generator=g)
    return x, {"bias": (row_ptr, torch.cat(per_row).to(torch.int32), values)}


def _ids(x: Tensor, length: int, g: torch.Generator) -> Tensor:
    """[rows, length] with repeats, the best tokens, padding and ids outside the vocabulary."""
    rows, vocab = x.shape
    ids = torch.randint(vocab, (rows, length), generator=g)
    best = x.float().topk(min(vocab, 8)).indices
    ids[:, : best.shape[1]] = best
    ids[:, best.shape[1] : best.shape[1] + 3] = best[:, :1]
    ids[:, -6:] = torch.tensor([-1, vocab, vocab + 31, -vocab, 2**40, -(2**62)])
    return ids


def ids(x: Tensor, g: torch.Generator) -> Extra:
    return x, {"prompt_ids": _ids(x, 40, g), "output_ids": _ids(x.flip(1), 30, g)}


def ids_output(x: Tensor, g: torch.Generator) -> Extra:
    """Output only, 32-bit, from a wider buffer."""
    wide = torch.randint(x.shape[1], (x.shape[0], 60), generator=g, dtype=torch.int32)
    return x, {"output_ids": wide[:, 10:50]}


def ids_lists(x: Tensor, g: torch.Generator) -> Extra:
    """Lists of different lengths, one of them empty."""
    table = _ids(x, 30, g).tolist()
    return x, {"prompt_ids": table[::-1], "output_ids": [line[: 7 * i] for i, line in enumerate(table)]}


def repeats(x: Tensor, g: torch.Generator) -> Extra:
    """A history of phrases that return, with padding in it and breakers of each row."""
    rows, vocab = x.shape
    words = x.float().topk(min(vocab, 5)).indices
    table = words[:, torch.tensor([0, 1, 2, 0, 1, 3, 4, 0, 1, 2, 0, 1, 3, 1, 1, 1, 0, 1, 2, 0, 1]) % words.shape[1]]
    table[:, [4, 9]] = torch.tensor([-1, vocab])
    breakers = torch.cat([words[:, 2 % words.shape[1], None], torch.full((rows, 1), -1)], 1)
    breakers[1::2, 0] = vocab + 7
    return x, {"prompt_ids": table[:, :8], "output_ids": table[:, 8:], "dry_breakers": breakers}


def repeats_output(x: Tensor, g: torch.Generator) -> Extra:
    """One token again and again, and then two in turns; breakers that all rows share."""
    best = x.float().topk(min(x.shape[1], 2)).indices
    table = best[:, torch.tensor([0] * 9 + [1, 0] * 6) % best.shape[1]]
    return x, {"output_ids": table, "dry_breakers": [x.shape[1] - 1, -5]}


def everything(x: Tensor, g: torch.Generator) -> Extra:
    """Mask, bias and ids at once, over the same tokens."""
    more: dict[str, Any] = {}
    for extra in (mask, bias, ids, repeats):
        more |= extra(x, g)[1]
    return x, more


def strided(x: Tensor, g: torch.Generator) -> Extra:
    """Rows of a wider buffer full of NaN, at an odd offset."""
    buffer = torch.full((x.shape[0], x.shape[1] + 7), torch.nan, dtype=x.dtype)
    view = buffer[:, 3 : 3 + x.shape[1]]
    view.copy_(x)
    return view, {}


def unaligned(x: Tensor, g: torch.Generator) -> Extra:
    """A storage offset of one element."""
    flat_ = torch.empty(x.numel() + 1, dtype=x.dtype)
    view = flat_[1:].view(x.shape)
    view.copy_(x)
    return view, {}


def expanded(x: Tensor, g: torch.Generator) -> Extra:
    """Every row is the same memory."""
    return x[:1].expand_as(x), {}


def reversed_rows(x: Tensor, g: torch.Generator) -> Extra:
    """Every second row of a buffer."""
    return x.repeat_interleave(2, 0)[::2], {}


EXTRAS: dict[str, Callable[[Tensor, torch.Generator], Extra]] = {
    f.__name__: f
    for f in (
        mask,
        mask_short,
        mask_long,
        mask_empty,
        mask_shared,
        mask_strided,
        bias,
        bias_shared,
        bias_tensors,
        ids,
        ids_output,
        ids_lists,
        repeats,
        repeats_output,
        everything,
        strided,
        unaligned,
        expanded,
        reversed_rows,
    )
}


# Cases --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """A built case: sample(logits, **params, **row_inputs, **draw)."""

    logits: Tensor
    params: Fields
    row_inputs: dict[str, Any]
    draw: dict[str, Any]  # seed and offset, one per row, using all 64 bits

    @property
    def kwargs(self) -> dict[str, Any]:
        """Arguments of filter_logits and probabilities."""
        return {**self.params, **self.row_inputs}


@dataclass(frozen=True)
class Case:
    maker: str
    params: str
    vocab: int
    dtype: str = "f32"
    extra: str | None = None
    rows: int = 5

    @property
    def name(self) -> str:
        parts = [self.maker, self.params, f"V{self.vocab}", self.dtype, self.extra, f"B{self.rows}" * (self.rows != 5)]
        return "-".join(p for p in parts if p)

    def build(self) -> Inputs:
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        x = finish(MAKERS[self.maker](self.rows, self.vocab, g), DTYPES[self.dtype])
        x, row_inputs = EXTRAS[self.extra](x, g) if self.extra else (x, {})
        words = torch.randint(-(2**63), 2**63 - 1, (2, self.rows), generator=g)
        return Inputs(x, PARAMS[self.params](self.vocab, self.rows), row_inputs, {"seed": words[0], "offset": words[1]})


SMALL = (1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 513, 1000, 1023, 1025)
MEDIUM = (2047, 2049, 4096, 4099, 8191)
LARGE = (32001, 50257, 128256)


def _grid() -> list[Case]:
    cases: list[Case] = []
    kinds = list(DTYPES)

    # Every maker with every older parameter set; sizes and dtypes take turns. Penalties come with ids.
    for m, maker in enumerate(MAKERS):
        for p, params in enumerate(OLD_SETS):
            n = m * len(OLD_SETS) + p
            extra = ("ids", "ids_lists", "ids_output")[n % 3] if params in PENALTY_SETS else None
            cases.append(Case(maker, params, SMALL[(7 * n + m) % len(SMALL)], kinds[n % 3], extra))
    # Every other set on a model's logits, of a small and of a larger vocabulary, and on two of the other makers.
    others = [maker for maker in MAKERS if maker != "lm"]
    for p, params in enumerate(set_ for set_ in PARAMS if set_ not in OLD_SETS):
        extra = ("repeats", "repeats_output")[p % 2] if params in PENALTY_SETS else None
        cases.append(Case("lm", params, SMALL[(3 * p + 9) % 14 + 4], kinds[p % 3], extra))
        cases.append(Case("lm", params, (*SMALL[19:], *MEDIUM[:2])[p % 8], kinds[(p // 3) % 3], extra))
        for m, vocab in ((p, SMALL[p % 14]), (p + 7, SMALL[10 + p % 15])):
            cases.append(Case(others[m % len(others)], params, vocab, kinds[(p + m) % 3], extra))
    # Every size in every dtype, for the sets that reach different code.
    sets = ("plain", "greedy", "k50", "k7-all", "p.9", "m.05", "all-hf", "rows", "llama.cpp", "floors", "xtc-any")
    for i, vocab in enumerate((*SMALL, *MEDIUM)):
        for j, params in enumerate(sets):
            maker = ("lm", "ties", "flat", "half_masked", "steps")[(i + j) % 5]
            cases.append(Case(maker, params, vocab, kinds[(i + 2 * j) % 3]))
    # Every extra in every dtype.
    sets = (
        "plain",
        "greedy",
        "all-hf",
        "all-joint-ties",
        "rows",
        "penalties",
        "rows-penalties",
        "min_p-xtc-dry",
        "ngrams",
    )
    for e, extra in enumerate(EXTRAS):
        for j, params in enumerate(sets):
            vocab = (33, 64, 257, 1000, 1025, 2049)[(e + j) % 6]
            cases.append(Case(("lm", "ties", "flat")[j % 3], params, vocab, kinds[(e + j) % 3], extra))
    for extra in ("everything", "mask_long", "bias_tensors"):
        cases += [Case("flat", "penalties", vocab, "f32", extra) for vocab in (1, 2, 31)]
    # What is not touched keeps even the sign of its zero.
    cases += [Case("zeros", "penalties" if "ids" in extra else "plain", 100, "f32", extra) for extra in EXTRAS]
    # No rows, one row, many rows.
    for params in ("plain", "all-hf", "rows"):
        cases += [Case("flat", params, 100, "f32", None, rows) for rows in (0, 1, 67)]
    # Large vocabularies, fewer of them.
    sets = (
        "plain",
        "greedy",
        "k50",
        "kV/2",
        "p.9",
        "p~1",
        "m.05",
        "all-hf",
        "all-joint",
        "rows",
        "llama.cpp",
        "floors",
    )
    sets += ("typical_p=0.7", "top_n_sigma=1.0", "xtc_probability=0.5", "p_less=True")
    for i, vocab in enumerate(LARGE):
        for j, params in enumerate(sets):
            maker = ("lm", "ties", "flat", "peaked", "half_masked", "equal")[(i + j) % 6]
            cases.append(Case(maker, params, vocab, kinds[(i + j) % 3], None, 3))
    cases += [Case("lm", "penalties", 50257, kind, "everything", 3) for kind in kinds]
    cases += [Case("equal", "plain", 2**20, "bf16", None, 2), Case("lm", "rows", 2**20, "f16", "mask", 2)]
    cases += [Case("flat", "p.9", 2**20 - 1, "f32", None, 1), Case("ties", "k7-all", 2**18 + 1, "bf16", None, 2)]
    cases += [Case("lm", "all-vllm", 151936, "bf16", "everything", 3)]
    return list(dict.fromkeys(cases))


CASES: tuple[Case, ...] = tuple(_grid())
"""Every case; each stands for the same inputs whoever builds it."""

SMALL_CASES = tuple(case for case in CASES if case.vocab <= 65)
MEDIUM_CASES = tuple(case for case in CASES if 65 < case.vocab <= 2049)
