"""The reference against what we did not write: float64, Hugging Face, Random123, and a brute-force oracle."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import LOG2E, PARAMS, SMALL_CASES, Case
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import fastsample as fs
from fastsample import reference
from fastsample.inputs import row_seeds, splitmix64
from fastsample.params import specs

pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect without")  # among the cases on purpose

REFERENCE = {"backend": "reference"}


def randn(rows: int, vocab: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


# Random numbers -------------------------------------------------------------------------------------------------------

PHILOX = [  # counter, key, output: philox4x32 10 in Random123's kat_vectors
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), PHILOX)
def test_philox_known_answers(counter: str, key: str, output: str) -> None:
    c = [torch.tensor([w]) for w in words(counter)]
    k = [torch.tensor([w]) for w in words(key)]
    assert [int(w) for w in reference.philox4x32(c, (k[0], k[1]))] == words(output)
    assert philox(words(counter), words(key)) == words(output)


def test_uniform60_lays_out_key_and_counter() -> None:
    """The second known answer with counter (offset_lo, offset_hi, draw, 0) is out of reach; these are not."""
    u = reference.uniform60(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    assert int(u) == 0x6627E8D5E169C58D >> 4
    seed, offset, j = 0x299F31D0A4093822, 0x85A308D3243F6A88 - 2**64, 5
    o = philox([0x243F6A88, 0x85A308D3, j, 0], [0xA4093822, 0x299F31D0])
    u = reference.uniform60(torch.tensor([seed]), torch.tensor([offset]), torch.tensor([j]))
    assert int(u) == ((o[0] << 32) + o[1]) >> 4


def test_splitmix64_known_answers() -> None:
    """The published sequence of seed 1234567; its i-th output mixes the state seed + i * 0x9E3779B97F4A7C15."""
    published = (
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    )
    for i, want in enumerate(published):
        state = (1234567 + i * 0x9E3779B97F4A7C15) % 2**64
        assert splitmix64(state) == want


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 2, 2**64 - 3])
def test_seeds_of_rows_wrap(seed: int) -> None:
    for count in (1, 6):
        rows = [int(r) % 2**64 for r in row_seeds(seed, count)]
        assert rows == [splitmix64((splitmix64(seed) + i) % 2**64) for i in range(count)]


def test_no_two_rows_of_neighbouring_seeds_share_a_seed() -> None:
    seeds = torch.cat([row_seeds(seed, 64) for seed in range(1000)])
    assert seeds.unique().numel() == len(seeds)


# Mass -----------------------------------------------------------------------------------------------------------------


def column(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float32)


def test_mass_is_two_to_the_y() -> None:
    """T = LOG2E makes c exactly 1, so y is x - max with no rounding: only the polynomial can err."""
    y = torch.linspace(-60, 0, 2_000_001)
    w = reference.mass(y[None], column(LOG2E))[0].numpy().astype(np.float64)
    exact = np.exp2(y.numpy().astype(np.float64) + 40)
    error = np.abs(w - exact)
    assert (error <= 2e-7 * exact + 1).all()
    assert w[-1] == 2.0**40
    assert (np.diff(w) >= -2e-7 * exact[1:] - 1).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.1, 1e-5, 3.0, 2.0**20])
def test_mass_is_exp(temperature: float) -> None:
    t = float(np.float32(temperature))
    x = randn(1, 50_000, 10 * t)
    w = reference.mass(x, column(temperature))[0].numpy().astype(np.float64)
    z = (x[0].double() - x.max().double()).numpy() / t
    exact = np.where(z / np.log(2) >= -60, np.exp(z) * 2.0**40, 0)
    # Beyond the polynomial: x - max, c and their product are each rounded once.
    bound = exact * (2e-7 + 3 * 2.0**-24 * np.abs(z)) + 1
    assert (np.abs(w - exact) <= bound).all()


def test_mass_against_exact_arithmetic() -> None:
    """Every operation of stage 6 in exact rationals, each rounded to float32 by hand."""
    x = np.concatenate([randn(1, 300, 9.0)[0].numpy(), np.float32([0.0, -0.0, 1e-40, 30.0, -20.0])])
    for temperature in np.float32([1.0, 0.37, 5.0]):
        want = [exact_mass(v, x.max(), temperature) for v in x]
        got = reference.mass(torch.from_numpy(x)[None], column(float(temperature)))[0].tolist()
        assert got == want


def rounded(value: Fraction) -> Fraction:
    """To the nearest float32, ties to even; normal range or zero only."""
    if value == 0:
        return value
    scale = Fraction(2) ** 23
    magnitude = abs(value)
    while magnitude * scale >= 2**24:
        scale /= 2
    while magnitude * scale < 2**23:
        scale *= 2
    return Fraction(round(value * scale)) / scale  # Python rounds halves to even


COEFFICIENTS = [
    Fraction(float.fromhex(c))
    for c in ("0x1.5bba14p-10", "0x1.3cea88p-7", "0x1.c6b752p-5", "0x1.ebf9bcp-3", "0x1.62e42ap-1", "0x1p+0")
]


def exact_mass(x: np.float32, top: np.float32, temperature: np.float32) -> int:
    c = rounded(Fraction(LOG2E) / Fraction(float(temperature)))
    y = rounded(rounded(Fraction(float(x)) - Fraction(float(top))) * c)
    if y < -60:
        return 0
    n = rounded(rounded(y + 12582912) - 12582912)
    f = y - n
    p = COEFFICIENTS[0]
    for coefficient in COEFFICIENTS[1:]:
        p = rounded(rounded(p * f) + coefficient)
    return int(p * Fraction(2) ** (int(n) + 40))


# The oracle: the contract row by row in Python integers and single numpy float32 operations --------------------------


def philox(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * c[0], 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [hi1 ^ c[1] ^ k[0], lo1, hi0 ^ c[3] ^ k[1], lo0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def masses(x: list[np.float32], temperature: np.float32) -> list[int]:
    """Stage 6 in scalar numpy."""
    return [mass_at(y) for y in depths(x, temperature)]


def depths(x: list[np.float32], temperature: np.float32) -> list[np.float32]:
    """y of stage 6."""
    c, top = np.float32(LOG2E) / temperature, max(x)
    return [(value - top) * c for value in x]


def mass_at(y: np.float32) -> int:
    one = np.float32
    if not y >= one(-60):
        return 0
    n = (y + one(12582912)) - one(12582912)
    p = one(float(COEFFICIENTS[0]))
    for coefficient in COEFFICIENTS[1:]:
        p = p * (y - n) + one(float(coefficient))
    return int(Fraction(float(p)) * Fraction(2) ** int(n) * 2**40)


def ordered(x: list[np.float32]) -> list[int]:
    return sorted(range(len(x)), key=lambda i: (-float(x[i]), i))


def top_p_prefix(base: set[int], ranked: list[int], w: list[int], top_p: np.float32) -> set[int]:
    target = max(1, int(Fraction(float(top_p)) * 2**30) * sum(w[i] for i in base) // 2**30)
    prefix, total = set(), 0
    for i in ranked:
        if i in base and total < target:
            prefix.add(i)
            total += w[i]
    return prefix


def top_k_set(x: list[np.float32], ranked: list[int], p: SimpleNamespace) -> set[int]:
    if not 0 < p.top_k < len(ranked):
        return set(ranked)
    at_least = {i for i in ranked if x[i] >= x[ranked[p.top_k - 1]]}
    return at_least if p.ties == "all" else set(ranked[: p.top_k])


def n_sigma_set(x: list[np.float32], alive: set[int], s: np.float32) -> set[int]:
    """Sums are exact integers, and what is made of them single float64 operations: Python's floats are such."""
    if s == 0:
        return alive
    top = max(x)
    d = [min(int(min(float((top - x[i]) * np.float32(2**11)), 2.0**20)), 2**20 - 1) for i in alive]
    a = float(sum(d)) / float(len(d))
    v = float(sum(k * k for k in d)) / float(len(d)) - a * a
    sigma = math.sqrt(max(v, 0.0)) * 2.0**-11
    return {i for i in alive if x[i] >= top - np.float32(float(s) * sigma)}


def mean_depth(base: set[int], w: list[int], y: list[np.float32]) -> float:
    """E: in halves of the masses, as the contract adds them up."""
    e = {i: int(Fraction(float(y[i])) * -(2**14)) if w[i] else 0 for i in base}
    high, low = (sum(divmod(w[i], 2**20)[half] * e[i] for i in base) for half in (0, 1))
    return (float(high) * 2.0**20 + float(low)) / float(sum(w[i] for i in base))


def typical_set(base: set[int], x: list[np.float32], w: list[int], p: SimpleNamespace, t: np.float32) -> set[int]:
    if p.typical_p == 1:
        return base
    c = np.float32(LOG2E) / t
    mu = np.float32(float(max(x)) - (mean_depth(base, w, depths(x, t)) * 2.0**-14) / float(c))
    delta = {i: abs(x[i] - mu) for i in base}
    target = max(1, int(Fraction(float(p.typical_p)) * 2**30) * sum(w[i] for i in base) // 2**30)
    edge = min(d for d in delta.values() if sum(w[i] for i in base if delta[i] <= d) >= target)
    return {i for i in base if delta[i] <= edge}


def by_floor(base: set[int], w: list[int], value: float) -> set[int]:
    return {i for i in base if w[i] >= int(min(value, float(max(w[i] for i in base))))}


def kept(x: list[np.float32], w: list[int], p: SimpleNamespace, t: np.float32) -> set[int]:
    """Stage 7; masses are those at the temperature t."""
    y = depths(x, t)
    alive = {i for i in range(len(x)) if x[i] > -np.inf}
    ranked = [i for i in ordered(x) if i in alive]

    def by_mass(base: set[int]) -> set[int]:
        heaviest = max(w[i] for i in base)
        floors = [int(Fraction(float(p.min_p)) * heaviest)]
        return {i for i in base if w[i] >= max(floors)}

    def by_p(base: set[int]) -> set[int]:
        return base if p.top_p == 1 else top_p_prefix(base, ranked, w, p.top_p)

    head = n_sigma_set(x, alive, p.top_n_sigma) & top_k_set(x, ranked, p)
    if p.order == "joint":
        keep = head & by_mass(alive) & by_p(alive)
    elif p.order == "min_p_first":
        keep = by_p(by_mass(head))
    elif p.order == "top_k_first":
        keep = by_mass(by_p(head))
    else:
        keep = by_mass(by_p(typical_set(head, x, w, p, t)))
    if p.order != "temperature_last":
        keep = typical_set(keep, x, w, p, t)
    keep = by_floor(keep, w, float(p.epsilon_cutoff) * float(sum(w[i] for i in keep)))
    eta, total = float(p.eta_cutoff), float(sum(w[i] for i in keep))
    typical_mass = mass_at(-np.float32(mean_depth(keep, w, y) * 2.0**-14))
    keep = by_floor(keep, w, min(eta * total, math.sqrt(eta) * float(typical_mass)))
    unit, total = float(max(w)), float(sum(w[i] for i in keep))
    keep = by_floor(keep, w, (float(p.top_a) * unit) * (unit / total))
    if p.p_less:
        h, low = {i: w[i] >> 20 for i in keep}, {i: w[i] % 2**20 for i in keep}
        square = float(sum(h[i] ** 2 for i in keep)) * 2.0**20 + float(2 * sum(h[i] * low[i] for i in keep))
        square = square * 2.0**20 + float(sum(low[i] ** 2 for i in keep))
        keep = by_floor(keep, w, square / float(sum(w[i] for i in keep)))
    return keep


def excluded(keep: set[int], x: list[np.float32], w: list[int], p: SimpleNamespace) -> set[int]:
    """What XTC leaves out where its coin says so."""
    floor = int(float(p.xtc_threshold) * float(sum(w[i] for i in keep)))
    ranked = [i for i in ordered(x) if i in keep]
    top = [i for i in ranked if w[i] >= floor]
    return set(ranked[: ranked.index(top[-1])]) if p.xtc_probability > 0 and len(top) >= 2 else set()


def uniform(seed: int, offset: int, j: int, purpose: int) -> int:
    o = philox([offset % 2**32, offset >> 32, j, purpose], [seed % 2**32, seed >> 32])
    return (o[0] * 2**32 + o[1]) >> 4


def drawn_masses(w: list[int], keep: set[int], x: list[np.float32]) -> dict[int, int]:
    """What a draw from a set goes by: of tokens that all weigh nothing, the first."""
    if any(w[i] for i in keep):
        return {i: w[i] for i in sorted(keep)}
    return {min(keep, key=ordered(x).index): 1}


def drawn(whole: dict[int, int], rest: dict[int, int], coin: np.float32, seed: int, offset: int, j: int) -> int:
    """Stage 8."""
    masses = rest if uniform(seed, offset, j, 1) < int(Fraction(float(coin)) * 2**60) else whole
    r = uniform(seed, offset, j, 0) * sum(masses.values()) // 2**60
    running = 0
    for i, mass in masses.items():
        running += mass
        if running > r:
            return i
    raise AssertionError("the draw fell off the end")


def processed(row: int, logits: torch.Tensor, p: SimpleNamespace, more: dict[str, Any]) -> list[np.float32]:
    """Stages 0 to 3 for one row."""
    one = np.float32
    x = [one(v) for v in logits[row].float().numpy()]
    if (mask := more.get("bitmask")) is not None:
        own = (mask if mask.ndim == 1 else mask[row]).tolist()
        x = [v if i // 32 < len(own) and own[i // 32] >> i % 32 & 1 else one(-np.inf) for i, v in enumerate(x)]
    for token, value in bias_of(row, more.get("bias")).items():
        x[token] = x[token] + one(value)
    listed = {name: Counter(int(t) for t in more[name][row]) for name in ("prompt_ids", "output_ids") if name in more}
    prompt, output = listed.get("prompt_ids", {}), listed.get("output_ids", {})
    for i in range(len(x)):
        if p.repetition_penalty != 1 and (i in prompt or i in output):
            x[i] = x[i] / p.repetition_penalty if x[i] > 0 else x[i] * p.repetition_penalty
        x[i] = x[i] - p.frequency_penalty * one(output.get(i, 0))
        x[i] = x[i] - (p.presence_penalty if i in output else one(0))
    lists = [more[name][row] for name in ("prompt_ids", "output_ids") if name in more]
    history = [int(t) for ids in lists for t in ids if 0 <= int(t) < len(x)]
    return edited_by_history(x, history, breakers_of(row, more.get("dry_breakers")), p)


def breakers_of(row: int, breakers: Any) -> set[int]:
    if breakers is None:
        return set()
    per_row = breakers.ndim == 2 if isinstance(breakers, torch.Tensor) else isinstance(breakers[0], list)
    return {int(t) for t in (breakers[row] if per_row else breakers)}


def edited_by_history(
    x: list[np.float32], history: list[int], breakers: set[int], p: SimpleNamespace
) -> list[np.float32]:
    """Stage 3's history edits, from the definitions: every suffix of every length is compared."""
    h = history[len(history) - p.dry_range :] if 0 < p.dry_range < len(history) else history
    best: dict[int, int] = {}
    for i in range(len(h) - 1) if p.dry_multiplier > 0 else ():
        lengths = [n for n in range(1, i + 2) if h[i + 1 - n : i + 1] == h[-n:] and not breakers & set(h[-n:])]
        best[h[i + 1]] = max(best.get(h[i + 1], 0), *lengths, 0)
    for token, length in best.items():
        if length >= p.dry_allowed_length and token not in breakers:
            q = np.float32(1)
            for _ in range(length - p.dry_allowed_length):
                q = q if np.isinf(q * p.dry_base) else q * p.dry_base
            x[token] = x[token] - p.dry_multiplier * q
    n = p.no_repeat_ngram_size
    tail = history[len(history) - n + 1 :] if n > 1 else []
    for i in range(len(history) - n + 1) if 0 < n <= len(history) else ():
        if history[i : i + n - 1] == tail:
            x[history[i + n - 1]] = np.float32(-np.inf)
    return x


def bias_of(row: int, bias: Any) -> dict[int, float]:
    if bias is None or isinstance(bias, dict):
        return bias or {}
    if isinstance(bias, list):
        return bias[row] or {}
    row_ptr, ids, values = (part.tolist() for part in bias)
    where = slice(row_ptr[row], row_ptr[row + 1])
    return dict(zip(ids[where], values[where], strict=True))


DEFAULTS = {name: getattr(fs.SamplingParams, name) for name, _ in specs()}


def params_of(row: int, fields: dict[str, Any]) -> SimpleNamespace:
    """One row's parameters as the contract's types."""
    values = {n: v if isinstance(v, (int, float, str)) else v[row] for n, v in {**DEFAULTS, **fields}.items()}
    floats = {name for name, spec in specs() if spec.kind == "float"}
    return SimpleNamespace(**{n: np.float32(v) if n in floats else v for n, v in values.items()})


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_brute_force(case: Case) -> None:
    inputs = case.build()
    common = {"on_invalid": "flag", **REFERENCE}
    out = fs.sample(inputs.logits, **inputs.kwargs, **inputs.draw, **common, num_samples=4)
    filtered = fs.filter_logits(inputs.logits, **inputs.kwargs, **common).numpy()
    probabilities = fs.probabilities(inputs.logits, **inputs.kwargs, **common).numpy()
    for row in range(case.rows):
        p = params_of(row, inputs.params)
        with np.errstate(all="ignore"):
            x = processed(row, inputs.logits, p, inputs.row_inputs)
            status = 1 if any(np.isnan(x)) else 2 if np.inf in x else 3 if max(x) == -np.inf else 0
            assert int(out.status[row]) == status
            if status:
                assert out.tokens[row].tolist() == [-1] * 4
                assert (filtered[row] == -np.inf).all()
                assert (probabilities[row] == 0).all()
                continue
            out_of: set[int] = set()
            if p.temperature < np.float32(1e-5):
                keep, p.temperature = {ordered(x)[0]}, np.float32(1)
            else:
                judged_at = np.float32(1) if p.order == "temperature_last" else p.temperature
                w = masses(x, judged_at)
                keep = kept(x, w, p, judged_at)
                out_of = excluded(keep, x, w, p)
            w = masses(x, p.temperature)
            if p.xtc_probability == 1:
                keep, out_of = keep - out_of, set()
            if not any(w[i] for i in keep):
                keep, out_of = {min(keep, key=ordered(x).index)}, set()
            want = [x[i] / p.temperature if i in keep else np.float32(-np.inf) for i in range(case.vocab)]
        whole, rest = drawn_masses(w, keep, x), drawn_masses(w, keep - out_of, x)
        coin = float(p.xtc_probability) if whole != rest else 0.0
        seed, offset = (int(inputs.draw[name][row]) % 2**64 for name in ("seed", "offset"))
        assert filtered[row].tolist() == want
        assert probabilities[row].tolist() == [
            np.float32(share(whole, i, 1 - coin) + share(rest, i, coin)) for i in range(case.vocab)
        ]
        draws = [drawn(whole, rest, p.xtc_probability, seed, offset, j) for j in range(4)]
        assert out.tokens[row].tolist() == draws


def share(masses: dict[int, int], token: int, times: float) -> float:
    return times * float(masses.get(token, 0)) / float(sum(masses.values()))


def test_brute_force_sees_every_parameter_set() -> None:
    assert {case.params for case in SMALL_CASES} == set(PARAMS)


# Float64 softmax ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 2, 300, 50257])
def test_probabilities_and_raw_logprobs(vocab: int, dtype: torch.dtype) -> None:
    logits = randn(3, vocab).to(dtype)
    exact = logits.double().log_softmax(-1)
    out = fs.sample(logits, seed=1, num_samples=50, logprobs="raw", top_logprobs=min(vocab, 20), **REFERENCE)
    torch.testing.assert_close(out.logprobs.double(), exact.gather(1, out.tokens), rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(out.top_logprobs.double(), exact.topk(min(vocab, 20)).values, rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(fs.probabilities(logits, **REFERENCE).double(), exact.exp(), rtol=2e-6, atol=2.0**-40)


def test_raw_logprobs_ignore_processing_and_processed_ones_do_not() -> None:
    logits = randn(1, 100)
    fields = {"temperature": 0.5, "top_k": 10, "bias": {3: 2.0}, "seed": 4, "num_samples": 40}
    raw = fs.sample(logits, logprobs="raw", **fields, **REFERENCE)
    own = fs.sample(logits, logprobs="processed", top_logprobs=12, **fields, **REFERENCE)
    x = logits.double().clone()
    x[0, 3] += 2
    best = (x / 0.5).topk(10)
    kept_only = torch.full_like(x, -torch.inf).scatter(1, best.indices, best.values).log_softmax(-1)
    assert torch.equal(raw.tokens, own.tokens)
    torch.testing.assert_close(raw.logprobs.double(), logits.double().log_softmax(-1).gather(1, raw.tokens))
    torch.testing.assert_close(own.logprobs.double(), kept_only.gather(1, own.tokens), rtol=1e-6, atol=1e-6)
    assert own.top_ids[0].tolist() == [*best.indices[0].tolist(), -1, -1]
    assert own.top_logprobs[0, 10:].tolist() == [-torch.inf] * 2


def test_ranks_count_the_tokens_strictly_above() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 3.0, 0.0]])
    out = fs.sample(logits, seed=0, num_samples=200, temperature=4.0, logprobs="raw", top_logprobs=5, **REFERENCE)
    rank = {3: 1, 1: 2, 2: 2, 0: 4, 4: 5}
    assert out.ranks[0].tolist() == [rank[t] for t in out.tokens[0].tolist()]
    assert set(out.tokens[0].tolist()) == set(rank)
    assert out.top_ids[0].tolist() == [3, 1, 2, 0, 4]


# Hugging Face ---------------------------------------------------------------------------------------------------------

WARPERS = {
    "temperature": lambda v: TemperatureLogitsWarper(v),
    "top_k": lambda v: TopKLogitsWarper(v),
    "top_p": lambda v: TopPLogitsWarper(v),
    "min_p": lambda v: MinPLogitsWarper(v),
}
"""In Hugging Face's order, which is the default order here."""


@pytest.mark.parametrize("vocab", [7, 1000, 32000])
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 50},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.95},
        {"min_p": 0.02},
        {"min_p": 0.5},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.4, "top_k": 6, "top_p": 0.8},
        {"temperature": 1.4, "top_p": 0.8, "min_p": 0.01},
    ],
    ids=str,
)
def test_hugging_face_warpers(fields: dict[str, float], vocab: int) -> None:
    logits = randn(8, vocab)
    warpers = LogitsProcessorList(WARPERS[name](value) for name, value in fields.items())
    want = warpers(torch.zeros(8, 1, dtype=torch.long), logits.clone())
    got = fs.filter_logits(logits, **fields, ties="all", **REFERENCE)
    assert torch.equal(got.isinf(), want.isinf())
    torch.testing.assert_close(got, want)


def test_hugging_face_top_k_keeps_ties() -> None:
    logits = (randn(4, 500, 1.0) * 4).round() / 4
    want = TopKLogitsWarper(20)(torch.zeros(4, 1, dtype=torch.long), logits.clone())
    assert torch.equal(fs.filter_logits(logits, top_k=20, ties="all", **REFERENCE), want)
    assert fs.filter_logits(logits, top_k=20, **REFERENCE).isfinite().sum(1).tolist() == [20] * 4
    assert bool((want.isfinite().sum(1) > 20).any())


@pytest.mark.parametrize("penalty", [1.3, 0.5])
def test_hugging_face_repetition_penalty(penalty: float) -> None:
    logits, ids = randn(4, 200), torch.randint(200, (4, 60), generator=torch.Generator().manual_seed(1))
    want = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    for split in (0, 25, 60):
        got = fs.filter_logits(
            logits, repetition_penalty=penalty, prompt_ids=ids[:, :split], output_ids=ids[:, split:], **REFERENCE
        )
        assert torch.equal(got, want)


def test_openai_penalties() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, as OpenAI documents it; the prompt does not count."""
    logits, ids = randn(3, 50).double(), torch.randint(50, (3, 40), generator=torch.Generator().manual_seed(2))
    count = torch.nn.functional.one_hot(ids, 50).sum(1).double()
    want = logits - count * 0.25 - (count > 0) * 0.5
    kwargs = {"frequency_penalty": 0.25, "presence_penalty": 0.5, "output_ids": ids, "prompt_ids": ids.flip(0)}
    got = fs.filter_logits(logits.float(), **kwargs, **REFERENCE)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
