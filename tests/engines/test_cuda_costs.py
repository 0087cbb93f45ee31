"""What a row costs the CUDA engine, counted on fibers: barriers, passes, bytes, atomics and bank conflicts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from conformance import ask, ask_kept, assert_agree, named
from simt_engine import A100, H100, Counters, How, Simt, as_backend, build, compiler

import fastsample as fs
from fastsample.backends import engine

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # behind site-packages, where the fastsample under test is

from bench import recorded  # noqa: E402
from bench.campaign.model import COUNTED, table  # noqa: E402
from bench.modes import make_logits as make_bench_logits  # noqa: E402

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler"),
    pytest.mark.usefixtures("remembered"),
]

VOCAB, ROWS = 128256, 2
MODES: dict[str, dict[str, Any]] = {
    "k50 p.9": {"top_k": 50, "top_p": 0.9},
    "k50 p.95 min-p": {"top_k": 50, "top_p": 0.95, "min_p": 0.02},
    "p.95": {"top_p": 0.95},
    "min-p": {"min_p": 0.05},
    "T": {},
    "greedy": {"temperature": 0.0},
}


@pytest.fixture(scope="session")
def counting(once: Callable[[str, Callable[[Path], object]], Path]) -> Simt:
    return Simt(once("simt-counted", lambda folder: build(folder, count=True)) / "simt-counted.so")


@cache
def rows_of(dtype: torch.dtype) -> torch.Tensor:
    return make_bench_logits("lm", ROWS, VOCAB, torch.float32).to(dtype)


def count(simt: Simt, mode: str, dtype: torch.dtype, device: tuple[int, ...]) -> Counters:
    simt.how = How("auto", device=device)
    logits = rows_of(dtype)
    with as_backend(simt):
        got = fs.sample(logits, seed=1, backend="cuda", **MODES[mode])
    assert torch.equal(got.tokens, fs.sample(logits, seed=1, backend="cpu", **MODES[mode]).tokens)
    return simt.counters()


# Barriers of a cluster or a grid a row, passes after the first, and reads of a row by those who do not hold it.
BUDGETS = {
    "k50 p.9": (3, 2, 1),
    "k50 p.95 min-p": (3, 2, 1),
    "p.95": (9, 8, 4.1),
    "min-p": (3, 2, 1.1),
    "T": (3, 2, 1.1),
    "greedy": (2, 1, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_cluster_keeps_to_its_budget(mode: str, dtype: torch.dtype, counting: Simt) -> None:
    found = count(counting, mode, dtype, H100)
    barriers, _, passes = BUDGETS[mode]
    nbytes = rows_of(dtype).nbytes
    assert found.launches == 1
    assert found.team_barriers <= barriers * ROWS
    assert found.held_bytes <= (passes + 0.01) * nbytes
    assert nbytes <= found.logit_bytes <= 1.01 * nbytes
    assert found.wide_shared_atomics == 0
    assert found.wavefronts <= 1.05 * found.phases  # every bank at work in nearly every access
    assert found.remote <= 2000 * ROWS or mode == "p.95"


@pytest.mark.parametrize("mode", MODES)
def test_a_grid_keeps_to_its_budget(mode: str, counting: Simt) -> None:
    found = count(counting, mode, torch.float32, A100)
    _, barriers, passes = BUDGETS[mode]
    assert found.launches == 1
    assert found.team_barriers <= barriers * ROWS
    assert found.logit_bytes <= (1 + passes + 0.05) * rows_of(torch.float32).nbytes


def test_the_model_rests_on_what_is_counted(counting: Simt) -> None:
    for (mode, name), expected in COUNTED.items():
        found = count(counting, mode, getattr(torch, name), H100)
        assert counting.chosen is not None
        blocks = ROWS * counting.chosen.parts
        assert found.team_barriers / ROWS == expected.barriers
        assert found.held_bytes / rows_of(getattr(torch, name)).nbytes == pytest.approx(expected.passes, abs=0.02)
        assert found.wavefronts / blocks == pytest.approx(expected.wavefronts, rel=0.03)


def test_the_documents_show_what_the_model_predicts() -> None:
    assert table() in (ROOT / "bench" / "README.md").read_text()


def test_conflicts_are_seen(tmp_path: Path) -> None:
    """A kernel whose lanes are 64 bytes apart: half of 32 lanes meet in each of two banks."""
    source = (ROOT / "tests" / "simt" / "engine.cc").read_text()
    probe = source.replace("void simt_counters", PROBE + "\nvoid simt_counters", 1)
    assert probe != source
    (tmp_path / "engine.cc").write_text(probe)
    library = build(tmp_path, count=True, engine=tmp_path / "engine.cc")
    simt = Simt(library)
    found = {}
    for stride in (1, 2, 16, 32):
        simt._library.simt_probe(stride)
        counters = simt.counters()
        found[stride] = (counters.phases, counters.wavefronts)
    assert found == {1: (1, 1), 2: (1, 2), 16: (1, 16), 32: (1, 32)}


PROBE = """
static void probe(const void* stride) {
  volatile uint32_t* words = (volatile uint32_t*)shared_memory();
  words[threadIdx.x * *(const int*)stride] = 1;
}
void simt_probe(int stride) {
  simt::settings.semaphores = simt::settings.semaphores_end = nullptr;
  simt::counters = {};
  simt::run(1, 32, 4096, 1, 1, probe, &stride);
}
"""


# Candidates -----------------------------------------------------------------------------------------------------------


def both(simt: Simt, logits: torch.Tensor, **fields: Any) -> Counters:
    """All outputs by both engines, which must agree; what sampling alone took."""
    found = []
    for backend in ("reference", "cuda"):
        with as_backend(simt):
            out = named(fs.sample(logits, backend=backend, logprobs="processed", top_logprobs=5, **fields))
            out |= ask_kept(logits, backend=backend, **fields)
            plain = fs.sample(logits, backend=backend, **fields)
            out |= named(plain, "plain.")
        found.append(out)
    assert_agree(found[1], found[0])
    return simt.counters()


TEAMS = (How("cluster", 2, 96), How("grid", 3, 64), How("block", 1, 128), How("cluster", 8, 32), How("cluster", 1, 256))
LISTED: tuple[dict[str, Any], ...] = (
    {"top_k": 20, "top_p": 0.8},
    {"top_k": [1, 2, 19, 38], "ties": "all", "min_p": 0.1},
    {"top_k": 12, "top_p": 0.6, "min_p": 0.05, "order": "min_p_first", "num_samples": 9},
    {"top_k": 30, "top_p": 0.3, "order": "joint"},
    {"top_k": 30, "top_p": [0.9, 0.5, 1.0, 0.01], "temperature": [0.3, 1.0, 2.0, 0.0], "order": "temperature_last"},
    {"top_k": 25, "top_n_sigma": 1.5, "epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "top_a": 0.05},
    {"top_k": 25, "p_less": True, "xtc_probability": [0.5, 1.0, 0.9, 0.0], "xtc_threshold": 0.05, "num_samples": 7},
    {"top_k": 9, "xtc_probability": 0.5, "xtc_threshold": 1e-9, "temperature": 0.05, "num_samples": 5},
)


@pytest.fixture
def simt(once: Callable[[str, Callable[[Path], object]], Path]) -> Simt:
    return Simt(once("simt", build) / "simt.so")


@pytest.mark.filterwarnings("ignore:.*has no effect without")
@pytest.mark.parametrize("how", TEAMS, ids=lambda how: f"{how.policy}{how.parts}x{how.threads}")
@pytest.mark.parametrize("fields", LISTED, ids=str)
def test_candidates_are_filtered_and_drawn_as_the_row_would_be(fields: dict[str, Any], how: How, simt: Simt) -> None:
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 3000, generator=g).mul(3)
    logits[1] = logits[1].round()  # ties, at the k-th too
    logits[2, 40:] = -torch.inf
    logits[3] = logits[3].sort(descending=True).values  # all candidates in one block, perhaps more than its share
    simt.how = how
    both(simt, logits, seed=9, **fields)
    both(simt, logits.to(torch.bfloat16), seed=9, **fields)
    mask = torch.randint(-(2**31), 2**31, (4, 94), dtype=torch.int64, generator=g).to(torch.int32)
    output_ids = logits[0].topk(50).indices.expand(4, -1)
    both(simt, logits.half(), seed=9, bitmask=mask, output_ids=output_ids, frequency_penalty=0.7, **fields)


def test_top_p_ends_where_its_mass_is_reached_exactly(simt: Simt) -> None:
    """Of 8 equal tokens 4 are half of the mass, and a fifth is too many."""
    logits = torch.full((2, 900), -5.0)
    logits[:, 100:800:40] = 2.0
    simt.how = How("cluster", 2, 64)
    with as_backend(simt):
        out = fs.sample(logits, top_k=8, top_p=[0.5, 0.75], seed=1, kept="count", backend="cuda")
    assert out.kept_count is not None
    assert out.kept_count.tolist() == [4, 6]


@pytest.mark.parametrize(
    ("how", "most"), [(How("cluster", 2, 64), 3), (How("grid", 2, 64), 2)], ids=lambda how: getattr(how, "policy", None)
)
def test_too_many_candidates_are_selected_by_rounds(how: How, most: int, simt: Simt) -> None:
    """Equal logits all reach the bound: 700 of them are more than one block sorts."""
    few = torch.randn(1, 4000, generator=torch.Generator().manual_seed(6))
    many = few.clone()
    many[0, 100:800] = few.amax() + 1
    simt.how = how
    assert both(simt, few, seed=1, top_k=40, top_p=0.9).team_barriers <= most
    assert both(simt, many, seed=1, top_k=40, top_p=0.9).team_barriers > most
    pair = torch.cat([many, few, many, few])
    simt.how = How(how.policy, how.parts, how.threads, teams=1)
    both(simt, pair, seed=1, top_k=40, top_p=0.9)


@pytest.mark.parametrize(("device", "barriers"), [(H100, 3), (A100, 2)], ids=["H100", "A100"])
def test_a_language_models_rows_need_no_rounds(device: tuple[int, ...], barriers: int, simt: Simt) -> None:
    """Their high logits lie side by side, so that one group has many of them, and one block most."""
    logits = recorded.rows()[::26]
    simt.how = How("auto", device=device)
    with as_backend(simt):
        found = fs.sample(logits, seed=2, top_k=50, top_p=0.95, backend="cuda")
    assert torch.equal(found.tokens, fs.sample(logits, seed=2, top_k=50, top_p=0.95, backend="cpu").tokens)
    assert simt.counters().team_barriers == barriers * len(logits)


def test_few_tokens_are_candidates_whatever_k(simt: Simt) -> None:
    """As behind a grammar: fewer than k tokens are left, and all of them are listed."""
    logits = torch.full((1, 4000), -torch.inf)
    logits[0, ::300] = torch.arange(14.0)
    simt.how = How("cluster", 2, 64)
    assert both(simt, logits, seed=1, top_k=40, top_p=0.9).team_barriers <= 3
    mask = torch.zeros(1, 125, dtype=torch.int32)
    mask[0, 5] = 7
    assert both(simt, torch.randn(1, 4000), seed=1, top_k=40, bitmask=mask).team_barriers <= 3


def test_rows_after_one_another_in_every_order(simt: Simt) -> None:
    """A block may be a row ahead of another: what the next row publishes must not meet what is still read."""
    logits = make_bench_logits("lm", 9, 700, torch.float32)
    fields: dict[str, Any] = {
        "temperature": [1.0, 0.0, 0.7] * 3,
        "top_k": [20, 0, 400, 5, 0, 0, 30, 9, 20],
        "top_p": 0.9,
    }
    for order in ("ascending", "descending", "shuffled", "warp by warp"):
        for how in (How("cluster", 2, 64, 1, order), How("grid", 2, 64, 1, order), How("cluster", 4, 32, 2, order)):
            simt.how = how
            both(simt, logits, seed=4, **fields)


# Steps of a Sampler ---------------------------------------------------------------------------------------------------


def test_a_step_is_one_kernel_and_advances_the_offsets(simt: Simt, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5, 900, generator=torch.Generator().manual_seed(7))
    fields: dict[str, Any] = {"top_k": [20, 0, 0, 300, 1], "top_p": 0.9, "seed": 3, "offset": 2**63 + 5}
    makes = [fs.Sampler(batch_size=5, backend=backend, **fields) for backend in ("cuda", "cpu")]
    simt.how = How("cluster", 2, 64)
    with as_backend(simt):
        monkeypatch.setattr(engine("cuda"), "advance", lambda rows: pytest.fail("a launch for the offsets"))
        for _ in range(3):
            assert torch.equal(makes[0](logits).tokens, makes[1](logits).tokens)
            assert simt.counters().launches == 1
            assert torch.equal(makes[0].offsets, makes[1].offsets)


def test_no_offset_moves_where_a_step_fails(simt: Simt) -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(7))
    bad = logits.clone()
    bad[1, 7] = torch.nan
    simt.how = How("cluster", 2, 64)
    with as_backend(simt):
        sampler = fs.Sampler(batch_size=3, top_k=20, seed=3, backend="cuda")
        before = sampler.offsets
        with pytest.raises(ValueError, match="row 1"):
            sampler(bad)
        assert torch.equal(sampler.offsets, before)
        sampler(logits)
        assert torch.equal(sampler.offsets, before + 1)


def test_cases_of_every_kind_by_one_team(simt: Simt) -> None:
    """Rows that take candidates, rounds and neither, one after the other on the same boards."""
    for case in (Case("lm", "rows", 1025, "f32"), Case("ties", "all-hf", 513, "bf16", None, 6)):
        with as_backend(simt):
            simt.how = How("cluster", 2, 64, 1)
            assert_agree(ask(case, "cuda", brief=True), ask(case, "reference", brief=True))
