"""The filters that measure a row, on every instruction set, where the shared cases do not reach."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import DTYPES, LOG2E
from conformance import assert_agree, bits, named

import fastsample as fs

pytestmark = pytest.mark.usefixtures("remembered")

Tensor = torch.Tensor
KINDS = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check(x: Tensor, variant: str, num_samples: int = 3, **fields: Any) -> Tensor:
    """What an engine keeps, draws and says of it is the reference's; returns which tokens are kept."""
    kept, want = (fs.filter_logits(x, backend=backend, **fields) for backend in (variant, "reference"))
    assert torch.equal(bits(kept), bits(want)), fields
    more: dict[str, Any] = {"seed": torch.arange(len(x)), "num_samples": num_samples, "logprobs": "processed", **fields}
    more["top_logprobs"] = min(5, x.shape[1])
    assert_agree(*(named(fs.sample(x, backend=backend, **more)) for backend in (variant, "reference")))
    got, want = (fs.probabilities(x, backend=backend, **fields) for backend in (variant, "reference"))
    assert torch.equal(bits(got), bits(want)), fields
    return kept > -torch.inf


def powers(vocab: int = 700, rows: int = 4) -> Tensor:
    """Logits whose masses at T = LOG2E are powers of two."""
    g = torch.Generator().manual_seed(vocab)
    return -torch.randint(45, (rows, vocab), generator=g).float()


@KINDS
@pytest.mark.parametrize("order", ["top_k_first", "min_p_first", "joint", "temperature_last"])
def test_floors_at_the_edge_of_a_mass(order: str, dtype: torch.dtype, variant: str) -> None:
    """A floor that equals a mass keeps it; that of the next float above, or below, is on its other side."""
    row = torch.full((1, 600), -60.0)
    row[0, :4] = 0.0
    row[0, 300:308] = -5.0
    total = 4 + 8 / 32
    for value in (1 / 32 / total, 1 / total):
        value = torch.tensor(value)
        near = [torch.nextafter(value, torch.tensor(end)) for end in (0.0, 1.0)]
        for epsilon in (near[0], value, near[1]):
            for name in ("epsilon_cutoff", "eta_cutoff"):
                check(row.to(dtype), variant, temperature=LOG2E, order=order, **{name: float(epsilon)})
    for a in (total / 32, math.nextafter(total / 32, 0), 1.0):
        check(row.to(dtype), variant, temperature=LOG2E, order=order, top_a=a)
    for t in (1 / total, 1 / 32 / total, 1e-30, 1.0):
        check(row.to(dtype), variant, 40, temperature=LOG2E, order=order, xtc_probability=0.5, xtc_threshold=t)
    check(row.to(dtype), variant, temperature=LOG2E, order=order, p_less=True)


def masses(x: Tensor) -> tuple[Tensor, Tensor]:
    """Stage 6's y and masses at T = 1, where the maximum weighs 1, but for rounding."""
    y = ((x.double() - x.double().max()) * LOG2E).clamp(min=-60)
    return y, 2**y


def mean_of(y: Tensor, w: Tensor) -> Tensor:
    """Stage 6b's -E, as a power of two."""
    return (w * (y * 2**14).trunc()).sum() / w.sum() * 2.0**-14


def floor_of(x: Tensor, fields: dict[str, float]) -> Tensor:
    """What one of these filters at T = 1 keeps tokens from, about: a logit."""
    y, w = masses(x)
    if "p_less" in fields:
        floor = w.square().sum() / w.sum()
    elif "epsilon_cutoff" in fields:
        floor = fields["epsilon_cutoff"] * w.sum()
    elif "top_a" in fields:
        floor = fields["top_a"] / w.sum()
    else:
        eta = fields["eta_cutoff"]
        floor = min(eta * w.sum(), eta**0.5 * 2 ** mean_of(y, w))
    return floor.log() + x.double().max()


def long_row(maker: str, seed: int) -> Tensor:
    """One of which a sample is taken."""
    x = torch.randn(9000, generator=torch.Generator().manual_seed(seed))
    if maker == "heads":
        x[:8000] -= 12
    if maker == "masked":
        x[::5] = -torch.inf
    if maker == "sorted":
        x = x.sort().values
    if maker == "outlier":
        x[77] = 12.0
    return x


def floats_around(value: Tensor, n: int) -> Tensor:
    key = int(value.float().view(torch.int32)) - n // 2
    return torch.arange(key, key + n, dtype=torch.int32).view(torch.float32)


MEASURED = [
    {"p_less": True},
    {"eta_cutoff": 2e-3},
    {"eta_cutoff": 1e-4},
    {"epsilon_cutoff": 3e-5},
    {"epsilon_cutoff": 2e-4},
    {"top_a": 0.1},
]


@pytest.mark.parametrize("fields", MEASURED, ids=str)
@pytest.mark.parametrize("maker", ["flat", "heads", "masked", "sorted", "outlier"])
def test_measured_floors_amid_tokens(maker: str, fields: dict[str, Any], variant: str) -> None:
    """Tokens at every float around a floor: so near that float sums cannot decide."""
    for seed in range(3):
        x = long_row(maker, seed) * (2 if "top_a" in fields else 1)
        for _ in range(5):  # the tokens move the floor
            x[100:117] = floats_around(floor_of(x, fields), 17)
        kept = check(x[None], variant, **fields)
        if maker != "outlier" or "top_a" not in fields:  # there these tokens are most of the mass, and move it for ever
            assert 0 < int(kept[0, 100:117].sum()) < 17
        check(x[None], variant, min_p=0.01, **fields)
        check(x[None], variant, 40, temperature=0.7, order="temperature_last", **fields)


@KINDS
@pytest.mark.parametrize("t", [0.01, 0.2, 0.5, 0.9, 1 - 2.0**-24])
def test_typical_with_ties_at_its_edges(t: float, dtype: torch.dtype, variant: str) -> None:
    """Many tokens are equally far from the mean, above it and below; or all have one value."""
    g = torch.Generator().manual_seed(4)
    x = torch.randint(-3, 4, (6, 900), generator=g).float()
    x[3], x[4, ::2], x[5, 5] = 2.0, -torch.inf, 9.0
    for order in ("top_k_first", "joint", "temperature_last"):
        for more in ({}, {"top_k": 40}, {"min_p": 0.1}, {"top_p": 0.8}, {"top_n_sigma": 1.0}):
            check(x.to(dtype), variant, typical_p=t, order=order, **more)


def put_floats_at_the_limit(x: Tensor, t: float) -> None:
    """Tokens at every float around the ends of typical's interval: the last bits of the mean decide which is nearer."""
    for _ in range(5):  # the tokens move the mean
        y, w = masses(x)
        mean = x.double().max() + mean_of(y, w) / LOG2E
        far = (x.double() - mean).abs()
        order = far.argsort()
        limit = far[order[int((w[order].cumsum(0) < t * w.sum()).sum())]]
        x[100:117], x[200:217] = floats_around(mean - limit, 17), floats_around(mean + limit, 17)


@pytest.mark.parametrize("maker", ["flat", "heads", "masked", "sorted", "outlier"])
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_typical_amid_tokens(t: float, maker: str, variant: str) -> None:
    for seed in range(3):
        x = long_row(maker, seed)
        put_floats_at_the_limit(x, t)
        check(x[None], variant, typical_p=t)
        check(x[None], variant, 40, typical_p=t, min_p=1e-4, temperature=0.7, order="temperature_last")


@pytest.mark.parametrize("t", [0.2, 0.9])
@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0])
def test_typical_where_many_tokens_are_about_as_far(scale: float, t: float, variant: str) -> None:
    """So many that an estimate among them comes first; in some of the rows the last bits of the mean decide."""
    x = torch.randn(6, 100_000, generator=torch.Generator().manual_seed(5)) * scale
    for row in x[:2]:
        put_floats_at_the_limit(row, t)
    x[5] = x[5].sort().values
    check(x, variant, typical_p=t)
    check(x.to(torch.bfloat16), variant, typical_p=t)


@pytest.mark.parametrize(
    ("spread", "step", "temperature", "seed"), [(0.01, 22, 30, 5), (0.01, 22, 100, 3), (0.1, 20, 100, 1)]
)
def test_typical_where_the_mean_orders_both_sides(
    spread: float, step: int, temperature: float, seed: int, variant: str
) -> None:
    """Values of one side are as far from the mean as some of the other, by less than the mean is off at first."""
    g = torch.Generator().manual_seed(seed)
    steps = ((0.1 + torch.rand(8, 4096, generator=g) * spread) * 2**step).round()
    other = steps - torch.randint(-3, 4, (8, 4096), generator=g)
    x = torch.cat([5 + steps / 2**step, 5 - other / 2**step], 1)
    t = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9])
    check(x, variant, temperature=temperature, typical_p=t)


@KINDS
def test_typical_leaves_the_maximum_out(dtype: torch.dtype, variant: str) -> None:
    """So that later filters are measured on a set whose heaviest token is another one."""
    x = torch.randn(3, 3000, generator=torch.Generator().manual_seed(9)) * 0.5
    x[:, 1500] = 7.0
    kept = check(x.to(dtype), variant, typical_p=0.3)
    assert not kept[:, 1500].any()
    assert kept.any(-1).all()
    later = [{"epsilon_cutoff": 0.9}, {"eta_cutoff": 0.9}, {"top_a": 1.0}, {"p_less": True}, {"top_p": 0.5}]
    later += [{"xtc_probability": p, "xtc_threshold": 1e-4} for p in (0.5, 1.0)]
    for order in ("top_k_first", "min_p_first", "joint", "temperature_last"):
        for more in later:
            check(x.to(dtype), variant, 40, typical_p=0.3, order=order, temperature=0.9, **more)


@KINDS
@pytest.mark.parametrize("threshold", [1.0, 0.3, 1e-3, 1e-12, 1e-40])
@pytest.mark.parametrize("probability", [2.0**-60, 0.3, 1 - 2.0**-24, 1.0])
def test_xtc(probability: float, threshold: float, dtype: torch.dtype, variant: str) -> None:
    """From no top choice at all to every token but the last one; where top choices tie, all but the last id of them."""
    g = torch.Generator().manual_seed(3)
    x = torch.stack([torch.randn(1100, generator=g) * 3, powers(1100, 1)[0], torch.zeros(1100), torch.zeros(1100)])
    x[3, 1:] = -90.0
    for more in ({}, {"top_k": 30}, {"temperature": 0.05, "order": "temperature_last"}, {"min_p": 0.01}):
        for draws in (3, 100):
            fields = {"xtc_probability": probability, "xtc_threshold": threshold, **more}
            check(x.to(dtype), variant, draws, **fields)


@KINDS
@pytest.mark.parametrize("s", [1e-6, 0.5, 1.0, 2.0, 4.0, 1e30])
def test_top_n_sigma(s: float, dtype: torch.dtype, variant: str) -> None:
    """Far from zero, with outliers, with much at -inf, around distances that are cut off, and all equal."""
    g = torch.Generator().manual_seed(8)
    x = torch.randn(9, 5000, generator=g)
    x[1] += 300
    x[2, 7], x[3, :9] = 40.0, -510.0
    x[4, ::3] = -torch.inf
    x[5, 100:] = -torch.inf
    x[6] *= 200
    x[7] = 1.5
    x[8, 1::2] = torch.finfo(torch.float32).min
    x = x.clamp(min=-6e4).to(dtype) if dtype == torch.float16 else x.to(dtype)
    words = torch.full((9, 157), -1, dtype=torch.int32)
    words[:, 3::5] = 0x0F0F0F0F
    for more in ({}, {"bitmask": words}, {"bias": {5: 3.0, 4999: -torch.inf}}, {"top_k": 50, "order": "joint"}):
        check(x, variant, top_n_sigma=s, **more)


def cut_at(x: Tensor, token: int) -> float:
    """The s whose cut s sigma below the maximum is this token, but for rounding."""
    alive = x[x > -torch.inf].double()
    d = ((alive.max() - alive) * 2**11).trunc().clamp(max=2**20 - 1)
    return float((alive.max() - x[token].double()) / (d.var(correction=0).sqrt() * 2**-11))


@KINDS
@pytest.mark.parametrize("more", [{}, {"top_k": 900}, {"order": "min_p_first", "min_p": 0.01}], ids=str)
def test_top_n_sigma_with_a_token_at_its_cut(more: dict[str, Any], dtype: torch.dtype, variant: str) -> None:
    """So near that float sums cannot decide, on either side of it."""
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(2)).sub(3)
    x[1, ::7] = -torch.inf
    x[2] -= x[2].max() - 4
    x = x.to(dtype)
    for row in x:
        s = torch.tensor(cut_at(row.float(), int((row - row.max() + 1.5).abs().argmin())))
        kept = []
        for off in (-3e-4, -1e-5, -1e-7, 0, 1e-7, 1e-5, 3e-4):
            kept.append(int(check(row[None], variant, top_n_sigma=float(s * (1 + off)), **more).sum()))
        assert kept == sorted(kept)
        assert kept[0] < kept[-1]


@KINDS
def test_top_n_sigma_where_whole_steps_change_sigma(dtype: torch.dtype, variant: str) -> None:
    """Half of the row loses nearly a step of 2^-11 to the cut, so that sigma is a quarter step smaller."""
    step = 2.0**-11
    low = -1.9999 if dtype == torch.float32 else -1.75
    for far, part in ((300.0, 2), (300.0, 3), (4.0, 4)):
        x = torch.zeros(1, 6000)
        x[0, ::part] = (low - far) * step
        x[0, 5::50] = -torch.inf
        for token in (0.3, 0.5, 0.9):
            x[0, 3::800] = -(far + 1) / 2 * step * (1 + token * 1e-3)
            s = cut_at(x.to(dtype)[0].float(), 3)
            for off in (-1e-3, -1e-6, 0, 1e-6, 1e-3):
                check(x.to(dtype), variant, top_n_sigma=s * (1 + off))


@pytest.mark.parametrize(
    "fields",
    [
        {"top_n_sigma": 3.0, "typical_p": 0.9},
        {"epsilon_cutoff": 1e-6, "xtc_probability": 0.5, "xtc_threshold": 1e-4},
        {"eta_cutoff": 1e-3, "p_less": True},
    ],
    ids=str,
)
def test_huge_rows(fields: dict[str, Any], variant: str) -> None:
    """The largest vocabulary, whose sums are the largest: of equal logits, and of others."""
    x = torch.stack([torch.zeros(2**20), torch.randn(2**20, generator=torch.Generator().manual_seed(1))])
    check(x.to(torch.bfloat16), variant, **fields)


@KINDS
@pytest.mark.parametrize("num_samples", [1, 3, 40])
def test_min_p_after_a_row_of_another_kind(num_samples: int, dtype: torch.dtype, variant: str) -> None:
    """A row with candidates in most of its blocks, or in few, decides how the next one is read, whatever that is."""
    x = torch.randn(9, 5000, generator=torch.Generator().manual_seed(2))
    sparse = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0, 1]).bool()
    x[sparse] = x[sparse] / 10 - 30
    x[sparse, ::1700] += 30
    kept = check(x.to(dtype), variant, num_samples, min_p=0.05)
    assert (kept.sum(-1) > 200).equal(~sparse)
    for form in ("count", "ids", "bitmask"):
        how: dict[str, Any] = {"min_p": 0.05, "seed": 3, "num_samples": num_samples, "kept": form}
        assert_agree(*(named(fs.sample(x.to(dtype), **how, backend=backend)) for backend in (variant, "reference")))


JUDGED = [
    {"p_less": True},
    {"top_p": 0.9},
    {"min_p": 1e-12},
    {"eta_cutoff": 1e-9},
    {"typical_p": 0.9},
    {"xtc_probability": 0.5, "xtc_threshold": 0.01},
]


@KINDS
@pytest.mark.parametrize("fields", JUDGED, ids=lambda fields: "-".join(fields))
def test_values_out_of_reach_for_the_filters_alone(fields: dict[str, Any], dtype: torch.dtype, variant: str) -> None:
    """With the temperature last, values may be far below the maximum for filters, and near it for the draw."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(3, 2048, generator=g) * 2
    x[:, ::3] = torch.tensor([-115.0, -160.0, -500.0])[:, None]
    check(x.to(dtype), variant, temperature=5.0, order="temperature_last", **fields)
