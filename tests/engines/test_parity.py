"""Every engine for CPU tensors, on every instruction set, against the reference: equal to the bit."""

from __future__ import annotations

import itertools
import math
import os
import platform
import subprocess
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, LOG2E, Case, finish
from conformance import ask, assert_agree, bits, invalid_rows, named, ulps

import fastsample as fs
from fastsample import reference
from fastsample.backends.cpu import native

# Penalties without ids are among the cases on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no effect without"),
    pytest.mark.usefixtures("remembered"),
]

ISAS = ("baseline", "avx2", "avx512", "neon")


expected = lru_cache(maxsize=2)(lambda case: ask(case, "reference"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_engine_equals_reference(case: Case, variant: str) -> None:
    assert_agree(ask(case, variant), expected(case))


def test_ulps() -> None:
    one = torch.tensor([1.0, -torch.inf, torch.nan])
    assert ulps(one, one) == 0
    assert ulps(torch.tensor([1.0]), torch.tensor([1 + 2**-22])) == 2
    assert ulps(torch.tensor([2.0**-149]), torch.tensor([-(2.0**-149)])) == 2
    assert ulps(torch.tensor([0.0]), torch.tensor([-0.0])) == 0
    assert ulps(torch.tensor([1.0]), torch.tensor([torch.nan])) > 2**20


@pytest.mark.parametrize("mode", ["raw", "processed"])
@pytest.mark.parametrize("vocab", [1, 37, 1100])
def test_all_logprobs_and_many_draws(vocab: int, mode: str, variant: str) -> None:
    logits = (torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 8).round() / 4
    kwargs = {"seed": 5, "num_samples": 2000, "logprobs": mode, "top_logprobs": vocab, "top_p": 0.97}
    want = fs.sample(logits, backend="reference", **kwargs)
    got = fs.sample(logits, backend=variant, **kwargs)
    assert_agree(named(got), named(want))


# The draw on the edge between two tokens ------------------------------------------------------------------------------


def edge(u: int, best: int) -> tuple[torch.Tensor, int]:
    """A row for T = LOG2E whose first tokens have the mass r, to the unit, that u falls on; then `best` maxima follow.

    Every mass is a power of two. A token of mass 1 more or less among the first moves the draw to the other side.
    """
    unit, scale = 2**40, 2**60
    low, high = 0, 2 * best * unit  # floor(u * (r + rest) / 2^60) - r falls from above 0 to below it in steps of 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if u * (middle + best * unit) // scale >= middle else (low, middle)
    powers = [k for k in range(1, 41) if low >> (40 - k) & 1]
    return torch.tensor([0.0] * (low >> 40) + [-float(k) for k in powers] + [0.0] * best), (low >> 40) + len(powers)


def test_edge_is_exact() -> None:
    for u in (2**59, 2**58 + 12345, 3**36):
        x, first = edge(u, 3)
        masses = [2 ** (40 + int(v)) for v in x.tolist()]
        assert u * sum(masses) // 2**60 == sum(masses[:first])
        assert first >= 1


@pytest.mark.parametrize("best", [1, 5, 1000, 2**19 - 100], ids=lambda n: f"{n} maxima")
def test_draws_on_the_edge_of_a_token(best: int, variant: str) -> None:
    """Every bit of u and of its product counts: the mass before the edge is r itself, which does not exceed r. One unit
    more before it (2^-40 of a maximum), and the draw falls on the last token before the edge."""
    draws = {seed: int(reference.uniform60(*torch.tensor([[seed], [7], [0]]))) for seed in range(64)}
    low = {seed: u for seed, u in draws.items() if u < 2**59}  # so that `edge` needs no more than 2 * best tokens
    for seed, u in list(low.items())[: 20 if best < 2**10 else 2]:
        x, first = edge(u, best)
        more = torch.cat([torch.tensor([-40.0]), x])
        for row in (x, more):  # in `more`, every id is one higher
            for backend in ("reference", variant):
                out = fs.sample(row, temperature=LOG2E, seed=[seed], offset=7, backend=backend)
                assert int(out.tokens) == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("mode", [None, "raw", "processed"])
def test_invalid_rows(mode: str | None, fields: dict[str, float], dtype: torch.dtype, variant: str) -> None:
    logits = invalid_rows().to(dtype)
    kwargs = {**fields, "seed": 3, "on_invalid": "flag", "logprobs": mode, "top_logprobs": 4 if mode else 0}
    want, got = (fs.sample(logits, backend=backend, **kwargs) for backend in ("reference", variant))
    assert got.status.tolist() == [1, 0, 1, 0, 1, 0, 2, 0, 2, 0, 2, 0, 3, 1, 1, 0]
    assert_agree(named(got), named(want))


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_raw_logits_that_only_processing_makes_valid(mode: str, variant: str) -> None:
    """A mask may hide a NaN or +inf: the row is valid, while its raw log-softmax does not exist."""
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(2))
    logits[0, 3], logits[1, 66] = torch.nan, torch.inf
    mask = torch.tensor([-1 - (1 << 3), -1, -1 - (1 << 2)], dtype=torch.int32)
    kwargs = {"bitmask": mask, "seed": 1, "logprobs": mode, "top_logprobs": 5}
    want, got = (fs.sample(logits, backend=backend, **kwargs) for backend in ("reference", variant))
    assert got.status.tolist() == [0, 0, 0]
    assert_agree(named(got), named(want))
    assert got.logprobs.isnan().tolist() == ([True, True, False] if mode == "raw" else [False] * 3)


# Instruction sets -----------------------------------------------------------------------------------------------------


def test_the_cpu_engine_is_there() -> None:
    assert fs.engines()["cpu"] is None
    assert native().isa() in native().isas()
    assert set(native().isas()) <= set(ISAS)


AVX2 = {"avx2", "f16c", "bmi1", "bmi2", "popcnt"}
AVX512 = {*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl"}


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="the flags are those of x86")
def test_the_best_isa_is_the_one_that_linux_lists() -> None:
    """A compiler's own library may know less of the processor: the engine would be right, and slow."""
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    best = "avx512" if flags >= AVX512 else "avx2" if flags >= AVX2 else "baseline"
    assert native().isas()[0] == best


@pytest.mark.parametrize("isa", native().isas() if fs.engines()["cpu"] is None else ["?"])
def test_force_isa_takes_effect(isa: str) -> None:
    before = native().isa()
    native().force_isa(isa)
    assert native().isa() == isa
    native().force_isa(before)
    assert native().isa() == before


def test_force_isa_rejects_an_unknown_name() -> None:
    before = native().isa()
    with pytest.raises(ValueError, match=f"'sse9'.*{native().isas()[-1]}"):
        native().force_isa("sse9")
    assert native().isa() == before


def run_with_isa(name: str, code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, "-c", code], {**os.environ, "FASTSAMPLE_ISA": name}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("isa", native().isas() if fs.engines()["cpu"] is None else ["?"])
def test_the_environment_forces_an_isa(isa: str, tmp_path: Path) -> None:
    code = """
import torch, fastsample as fs
from fastsample.backends.cpu import native
print(fs.engines()["cpu"])
token = fs.sample(torch.arange(100.0) / 9, seed=7, backend="cpu").tokens
print(native().isa(), int(token))
"""
    done = run_with_isa(isa, code, tmp_path)
    token = fs.sample(torch.arange(100.0) / 9, seed=7, backend="reference").tokens
    assert (done.stdout.split(), done.stderr) == (["None", isa, str(int(token))], "")


def test_the_environment_names_an_unknown_isa(tmp_path: Path) -> None:
    code = """
import torch, fastsample as fs
print(fs.engines()["cpu"])
for backend in ("cpu", "auto"):
    try:
        fs.sample(torch.zeros(9), backend=backend)
    except Exception as error:
        print(error)
"""
    done = run_with_isa("sse9", code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    why, *errors = done.stdout.strip().splitlines()
    assert why.startswith("FASTSAMPLE_ISA = 'sse9': this CPU can run ")
    assert len(errors) == 2
    for error in errors:
        assert "FASTSAMPLE_ISA" in error
        assert "'sse9'" in error
        assert "baseline" in error or "neon" in error


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 50000, "top_p": 0.9}, {"top_p": 0.9}, {"top_k": 50000, "top_p": 0.5, "order": "joint"}],
    ids=str,
)
def test_mass_that_a_sample_of_the_row_misses(fields: dict[str, Any]) -> None:
    """All mass on one or three of 60000 tokens: what the CPU engine estimates from a sample is then worth nothing."""
    x = torch.randn(2, 60000, generator=torch.Generator().manual_seed(1)) - 200
    x[0, [7, 30000, 59999]] = 5.0
    x[1, 77] = 9.0
    got, expected = (fs.filter_logits(x, backend=name, **fields) for name in ("cpu", "reference"))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "fields",
    [
        *({"top_p": p} for p in (0.1, 0.5, 0.95, 0.999)),
        *({"top_k": k} for k in (300, 1000, 30000, 59999)),
        {"top_p": 0.9, "min_p": 0.01, "order": "min_p_first"},
        {"top_k": 40000, "top_p": 0.9, "ties": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [0.0, 0.25], ids=["distinct", "ties"])
@pytest.mark.parametrize("where", ["blocks", "places"])
def test_a_sample_of_the_row_that_misleads(fields: dict[str, Any], step: float, where: str, variant: str) -> None:
    """What the CPU engine estimates a cutoff from (csrc/cpu/estimate.h) is higher or lower than the rest.

    For top-p it looks into some blocks, for top-k at some places of every block.
    """
    blocks, runs = 235, 2  # of 256 tokens; of 4 in each block
    seen = torch.zeros(blocks, 256, dtype=torch.bool)
    if where == "blocks":
        seen[[(2 * s + 1) * blocks // 128 for s in range(64)]] = True
    else:
        for s, run in itertools.product(range(blocks), range(runs)):
            place = (29 * s + 23 * run) % 64 * 4
            seen[s, place : place + 4] = True
    rows = torch.randn(6, blocks, 256, generator=torch.Generator().manual_seed(4))
    rows[:4] += seen * torch.tensor([2.0, -2.0, 8.0, -8.0]).reshape(4, 1, 1)
    rows[4, seen], rows[5, seen] = 8.0, -8.0
    rows = (rows / step).round() * step if step else rows
    rows = rows.reshape(6, -1)
    got, want = (fs.sample(rows, backend=name, seed=3, num_samples=8, **fields) for name in (variant, "reference"))
    assert torch.equal(got.tokens, want.tokens)
    kept, expected = (fs.filter_logits(rows, backend=name, **fields) for name in (variant, "reference"))
    assert torch.equal(bits(kept), bits(expected))


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 5, "top_p": 0.5},
        {"top_k": 5, "top_p": 0.9, "order": "joint"},
        {"top_k": 7, "top_p": 0.9, "ties": "all"},
        {"top_k": 4, "top_p": 0.7, "min_p": 0.1, "order": "min_p_first"},
    ],
)
def test_the_lowest_float32_is_a_logit_like_any_other(fields: dict[str, Any], variant: str) -> None:
    """Found by the fuzzer: a top-k that ends there lost its limit."""
    rows = torch.full((3, 300), torch.finfo(torch.float32).min)
    rows[1, ::3], rows[2, 7] = -torch.inf, 1.0
    for call in (fs.filter_logits, fs.probabilities, partial(fs.sample, seed=3, num_samples=4)):
        got, want = (call(rows, backend=backend, **fields) for backend in (variant, "reference"))
        if isinstance(got, fs.SampleOutput):
            got, want = got.tokens, want.tokens
        assert torch.equal(bits(got), bits(want))


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])


@HALVES
@pytest.mark.parametrize("rest", [0.0, -1.0])
@pytest.mark.parametrize("vocab", [300, 513])
def test_every_pattern_of_16_bits(dtype: torch.dtype, vocab: int, rest: float, variant: str) -> None:
    """One in each row, in whole blocks and in the last: the status is torch's, the greedy token the maximum's."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = torch.arange(len(patterns))
    logits = torch.full((len(patterns), vocab), rest, dtype=dtype)
    logits[rows, rows % vocab] = patterns
    out = fs.sample(logits, temperature=0.0, on_invalid="flag", backend=variant)
    status = torch.where(patterns.isnan(), 1, torch.where(patterns == torch.inf, 2, 0))
    assert torch.equal(out.status, status.to(torch.int32))
    other = (rows % vocab == 0).to(torch.int64)
    token = torch.where(patterns > rest, rows % vocab, torch.where(patterns == rest, 0, other))
    assert torch.equal(out.tokens, torch.where(status > 0, -1, token))


@HALVES
@pytest.mark.parametrize("temperature", [1e-3, 0.8, 30.0, 1e6])
@pytest.mark.parametrize("masked", [False, True])
def test_min_p_alone_of_16_bits(dtype: torch.dtype, temperature: float, masked: bool, variant: str) -> None:
    """Its candidates are picked by their bits: around 0 of either sign, and where -inf stands beside them."""
    g = torch.Generator().manual_seed(6)
    x = torch.randn(12, 5000, generator=g) * torch.tensor([0.01, 1.0, 4.0]).repeat(4)[:, None]
    x += torch.tensor([-30.0, -1.0, 0.0, 25.0]).repeat_interleave(3)[:, None]
    x[:, ::7] = (x[:, ::7] * 4).round() / 4  # ties, and zeros
    x[:, 1::14] *= -0.0
    x[:, torch.randint(5000, (900,), generator=g)] = -torch.inf
    x[4::5] = x[4::5].sort(dim=1).values
    mask = torch.randint(-(2**31), 2**31, (12, 157), generator=g).to(torch.int32) if masked else None
    fields = {"temperature": temperature, "min_p": [0.05, 0.5, 1e-9] * 4, "seed": 2, "bitmask": mask}
    got, want = (
        fs.sample(x.to(dtype), backend=name, num_samples=100, logprobs="processed", **fields)
        for name in (variant, "reference")
    )
    assert_agree(named(got), named(want))


@HALVES
def test_min_p_that_ends_beside_zero_in_16_bits(dtype: torch.dtype, variant: str) -> None:
    """At a few of 1024 neighbouring temperatures the lowest candidate is a zero, and then one of either sign."""
    best, min_p, rows = 0.125, 0.05, 1024
    margin = 1e-3  # of `Reach` (csrc/cpu/mass.h)
    near = torch.tensor([best * LOG2E / (margin - math.log2(min_p))]).view(torch.int32)
    temperature = (near + torch.arange(-rows // 2, rows // 2, dtype=torch.int32)).view(torch.float32)
    x = torch.tensor([best, -0.0, 0.0, -1e-3, 1e-3, best / 2]).repeat(100).repeat(rows, 1)
    fields = {"temperature": temperature, "min_p": min_p, "seed": torch.arange(rows), "num_samples": 200}
    got, want = (fs.sample(x.to(dtype), backend=name, **fields) for name in (variant, "reference"))
    assert torch.equal(got.tokens, want.tokens)


@HALVES
@pytest.mark.parametrize("temperature", [1e-2, 0.8, 30.0])
@pytest.mark.parametrize("offset", [0.0, -60.0, 60.0])
@pytest.mark.parametrize("fields", [{}, {"top_p": 0.95}, {"top_k": 3000, "top_p": 0.9}, {"min_p": 1e-12}], ids=str)
def test_16_bits_far_below_the_maximum(
    dtype: torch.dtype, temperature: float, offset: float, fields: dict[str, Any], variant: str
) -> None:
    """Rows whose values all have a mass of normal floats need no clamp (`near`, csrc/cpu/mass.h): one that does not."""
    g = torch.Generator().manual_seed(7)
    depths = torch.tensor([0.3, 1.0, 5.0, 38.0, 41.0, 60.0, 100.0, 139.0])
    outliers = torch.tensor([139.9, 141.0, 150.0, 170.0, 200.0, 300.0, 1e4, torch.inf])
    vocab = 5000
    places = (0, 300, 2047, 4863, 4864, 4999)  # in the first and the last group, in whole blocks and the tail
    y = depths[torch.randint(len(depths), (1 + len(places) * len(outliers), vocab), generator=g)]
    for i, place in enumerate(places):
        y[1 + i :: len(places), place] = outliers
    x = finish((offset - y * math.log(2)) * temperature, dtype)
    fields = {**fields, "temperature": temperature, "seed": torch.arange(len(x)), "num_samples": 20}
    for mode in ("raw", "processed"):
        got, want = (fs.sample(x, backend=name, logprobs=mode, **fields) for name in (variant, "reference"))
        assert_agree(named(got), named(want))
