"""The CUDA sources on fibers (tests/simt) against the reference: equal to the bit in every policy and order."""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, EXTRAS, MAKERS, PARAMS, Case
from conformance import ask, ask_kept, assert_agree, bits, disagreements, invalid_rows, named
from simt_engine import A100, CSRC, H100, ORDERS, How, Job, Simt, as_backend, build, compiler

import fastsample as fs

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler"),
    pytest.mark.filterwarnings("ignore:.*has no effect without"),  # among the cases on purpose
    pytest.mark.usefixtures("remembered"),
]

SUPPORT = Path(__file__).parents[1] / "support"
HOWS = (
    How("block"),
    How("cluster", 2),
    How("cluster", 1, 96, 2, "shuffled"),
    How("grid", 3, 64, 2, "descending"),
    How("cluster", 4, 32, 1, "warp by warp"),
    How("grid", 2, 32, 1, "shuffled"),
    How("block", 1, 128, 1, "warp by warp"),
)


def _jobs() -> list[Job]:
    """Every third small case, and the large shapes on blocks as large as a GPU's."""
    small = [case for case in CASES if case.vocab <= 2049]
    jobs = [Job(case, HOWS[i % len(HOWS)]) for i, case in enumerate(small[::3])]
    seen = {case.extra for case in small[::3]}
    jobs += [Job(next(c for c in small if c.extra == extra), HOWS[1]) for extra in EXTRAS if extra not in seen]
    large = [case for case in CASES if case.vocab > 2049]
    jobs += [Job(case, How("auto", device=(H100, A100)[i % 2])) for i, case in enumerate(large[::5])]
    return jobs


JOBS = _jobs()


@pytest.fixture(scope="session")
def library(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return once("simt", build) / "simt.so"


@pytest.fixture
def simt(library: Path) -> Simt:
    return Simt(library)


expected = cache(lambda case: ask(case, "reference", brief=True))


def simulate(simt: Simt, job: Job) -> dict[str, torch.Tensor]:
    simt.how = job.how
    with as_backend(simt):
        return ask(job.case, "cuda", brief=True)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_equals_reference(job: Job, simt: Simt) -> None:
    assert_agree(simulate(simt, job), expected(job.case))


def test_the_jobs_reach_every_parameter_set_maker_extra_and_policy() -> None:
    cases = [job.case for job in JOBS]
    assert {case.params for case in cases} == set(PARAMS)
    assert {case.maker for case in cases} == set(MAKERS)
    assert {case.extra for case in cases} == {None, *EXTRAS}
    assert {(job.how.policy, job.case.dtype) for job in JOBS} >= {
        (policy, dtype) for policy in ("cluster", "block", "grid") for dtype in ("f32", "f16", "bf16")
    }
    assert len({job.name for job in JOBS}) == len(JOBS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", HOWS, ids=lambda how: how.policy + str(how.parts))
def test_the_order_of_threads_changes_nothing(how: How, order: str, simt: Simt) -> None:
    for case in (Case("ties", "rows", 1025, "bf16"), Case("ties", "penalties", 513, "f32", "everything")):
        assert_agree(simulate(simt, Job(case, replace(how, order=order))), expected(case))


def test_boards_serve_another_number_of_teams(simt: Simt) -> None:
    """A launch finds the boards as the one before has left them, which had another number of rows in flight."""
    for case in (
        Case("lm", "top_p+min_p", 513, "f32"),
        Case("ties", "k50", 513, "f32"),
        Case("lm", "all-hf", 65, "f32"),
    ):
        for teams in (1, 3, 2, 4, 1, 2):
            assert_agree(simulate(simt, Job(case, How("grid", 2, 64, teams))), expected(case))


@pytest.mark.parametrize("how", HOWS[:4], ids=lambda how: how.policy)
def test_invalid_rows(how: How, simt: Simt) -> None:
    logits = invalid_rows()
    simt.how = how
    for mode in (None, "raw", "processed"):
        kwargs = {"top_p": 0.9, "seed": 3, "on_invalid": "flag", "logprobs": mode, "top_logprobs": 4 if mode else 0}
        kwargs |= {"kept": "bitmask", "kept_mass": True, "entropy": True}
        want = fs.sample(logits, backend="reference", **kwargs)
        with as_backend(simt):
            got = fs.sample(logits, backend="cuda", **kwargs)
        assert_agree(named(got), named(want))


def probabilities(vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of many sizes, among them subnormal ones and zeros, and rows with each status."""
    g = torch.Generator().manual_seed(vocab)
    p = torch.randn(12, vocab, generator=g).mul(2).softmax(-1)
    p[1] *= 1e-38 if dtype != torch.float16 else 1e-3
    p[2, ::3] = 0
    p[3] = 0.25
    p[4] *= 100
    p[5, 1:] = 0
    p[6] = p[6] ** 12
    p[7, vocab // 2] = torch.nan
    p[8, -1], p[8, 0] = torch.inf, -1.0
    p[9] = 0
    p[9, 0] = -0.0
    p[10, -1] = -torch.inf
    p[11, 0], p[11, 1] = -1.0, torch.nan
    return p.to(dtype)


PROBABILITY_SETS: tuple[dict[str, object], ...] = (
    {},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"top_p": [0.9, 0.5, 0.99] * 4, "epsilon_cutoff": 1e-3, "top_a": 0.02, "order": "min_p_first"},
    {"p_less": True, "xtc_probability": 0.5, "xtc_threshold": 0.01, "order": "joint", "top_k": 400},
    {"temperature": [0.0, 1.0] * 6, "xtc_probability": 1.0, "xtc_threshold": 0.001, "order": "temperature_last"},
)


@pytest.mark.parametrize("how", HOWS, ids=lambda how: how.policy + str(how.parts) + how.order[:1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_probabilities_as_input(how: How, dtype: torch.dtype, simt: Simt) -> None:
    vocab = 1000 + HOWS.index(how)
    p = probabilities(vocab, dtype)
    mask = torch.randint(-(2**31), 2**31, (12, 32), dtype=torch.int64, generator=torch.Generator().manual_seed(1))
    simt.how = how
    for i, fields in enumerate(PROBABILITY_SETS):
        more = {"bitmask": mask.to(torch.int32)} if i % 2 else {}
        draw = {
            "seed": 3,
            "num_samples": 3,
            "logprobs": ("raw", "processed")[i % 2 ^ (how.parts > 1)],
            "top_logprobs": 9,
        }
        common = {**fields, **more, "on_invalid": "flag", "input": "probs"}
        found = []
        for backend in ("reference", "cuda"):
            with as_backend(simt):
                outputs = named(fs.sample(p, **common, **draw, backend=backend))
                outputs["probabilities"] = fs.probabilities(p, **common, backend=backend)
                outputs["plain"] = fs.sample(p, **common, seed=4, backend=backend).tokens
                outputs |= ask_kept(p, **common, seed=4, backend=backend)
            found.append(outputs)
        assert_agree(found[1], found[0])


def steep(vocab: int) -> torch.Tensor:
    """Rows whose maximum, of one or several equal tokens, is far above the rest or a little."""
    x = torch.randn(10, vocab, generator=torch.Generator().manual_seed(vocab)).mul(4).round() / 4
    for row, (gap, peaks) in enumerate(itertools.product((0.75, 1.5, 3.0, 6.0, 40.0), (1, 3))):
        x[row, 7 * row + 3 :: vocab // peaks] = x[row].amax() + gap
    return x


LAST = {"order": "temperature_last"}
COLD_SETS: tuple[dict[str, Any], ...] = (
    {**LAST, "typical_p": 0.2, "temperature": 0.05},
    {**LAST, "typical_p": 0.2, "temperature": [0.05, 0.01, 1.0, 0.0, 0.3] * 2, "min_p": [0.3, 0.01] * 5, "top_a": 0.1},
    {**LAST, "typical_p": 0.5, "top_p": 0.9, "min_p": 0.2, "xtc_probability": 0.5, "xtc_threshold": 0.01},
    {**LAST, "min_p": 0.001, "temperature": 0.02, "xtc_probability": [0.5, 1.0] * 5, "xtc_threshold": 0.001},
    {"temperature": 0.1, "xtc_probability": 0.5, "xtc_threshold": 1e-30},
    {"temperature": 0.1, "xtc_probability": 1.0, "xtc_threshold": 1e-30, "top_k": 700},
)


@pytest.mark.parametrize("how", HOWS, ids=lambda how: how.policy + str(how.parts) + how.order[:1])
def test_what_is_kept_may_weigh_nothing(how: How, simt: Simt) -> None:
    """One token counts for everything then; and typical may leave out what min-p would measure by."""
    logits = steep(771 + HOWS.index(how))
    probs = (logits * 4).softmax(-1)
    simt.how = how
    jobs: list[tuple[torch.Tensor, dict[str, Any]]] = [(logits, fields) for fields in COLD_SETS]
    jobs += [(probs, {**fields, "temperature": 1.0, "input": "probs"}) for fields in COLD_SETS[4:]]
    for given, fields in jobs:
        found = []
        for backend in ("reference", "cuda"):
            with as_backend(simt):
                common = {**fields, "backend": backend}
                out = {"probabilities": fs.probabilities(given, **common)}
                if "input" not in fields:
                    out["filter_logits"] = fs.filter_logits(given, **common)
                for mode in ("raw", "processed"):
                    more = {"num_samples": 8, "logprobs": mode, "top_logprobs": 5}
                    out |= named(fs.sample(given, **common, **more, seed=3), f"{mode}.")
                out |= named(fs.sample(given, **common, num_samples=8, seed=4), "plain.")
                out |= ask_kept(given, **common, num_samples=8, seed=4)
            found.append(out)
        assert_agree(found[1], found[0])


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_all_logprobs_and_many_draws(mode: str, simt: Simt) -> None:
    logits = (torch.randn(2, 700, generator=torch.Generator().manual_seed(4)) * 8).round() / 4
    kwargs = {"seed": 5, "num_samples": 200, "logprobs": mode, "top_logprobs": 700, "top_p": 0.97}
    want = fs.sample(logits, backend="reference", **kwargs)
    simt.how = How("cluster", 2)
    with as_backend(simt):
        got = fs.sample(logits, backend="cuda", **kwargs)
    assert_agree(named(got), named(want))


@pytest.mark.parametrize("how", [How("cluster", 2), How("grid", 3), How("block")], ids=lambda how: how.policy)
def test_more_edits_than_shared_memory_holds(how: How, simt: Simt) -> None:
    """The table then lies in device memory, shared by the row's blocks."""
    g = torch.Generator().manual_seed(9)
    logits = torch.randn(3, 3000, generator=g)
    ids = {"prompt_ids": torch.randint(3000, (3, 900), generator=g), "bias": dict.fromkeys(range(0, 3000, 7), -0.5)}
    kwargs = {"output_ids": torch.randint(-1, 3000, (3, 700), generator=g), **ids, "repetition_penalty": 1.3}
    kwargs |= {"frequency_penalty": 0.2, "top_p": 0.95, "seed": 2}
    want = (
        fs.sample(logits, backend="reference", **kwargs),
        fs.filter_logits(logits, backend="reference", **{k: v for k, v in kwargs.items() if k != "seed"}),
    )
    simt.how = how
    with as_backend(simt):
        got = (
            fs.sample(logits, backend="cuda", **kwargs),
            fs.filter_logits(logits, backend="cuda", **{k: v for k, v in kwargs.items() if k != "seed"}),
        )
    assert simt.chosen is not None
    assert simt.chosen.workspace > 3 * 2 * 1600 * 12
    assert torch.equal(got[0].tokens, want[0].tokens)
    assert torch.equal(bits(got[1]), bits(want[1]))


def test_marks_of_edited_tokens_that_shared_memory_does_not_hold(simt: Simt) -> None:
    """A GPU with little shared memory and a large vocabulary: the second kernel keeps them in device memory."""
    logits = torch.randn(1, 2**20 - 5, generator=torch.Generator().manual_seed(1))
    kwargs = {"bias": {5: 9.0, 2**20 - 6: 8.5, 77777: 9.2}, "top_k": 5}
    simt.how = How("auto", device=(120, 170, 99 * 1024, 100 * 1024, 8))
    want = fs.filter_logits(logits, backend="reference", **kwargs)
    with as_backend(simt):
        got = fs.filter_logits(logits, backend="cuda", **kwargs)
    assert simt.chosen is not None
    assert simt.chosen.far_bitmap
    assert torch.equal(bits(got), bits(want))


KEYS = """
#include "cuda/keys.h"
#include <initializer_list>
#include <math.h>
using namespace fastsample;
int main() {
  const float x[] = {-INFINITY, -3e38f, -1.5f, -1e-45f, -0.0f, 0.0f, 1e-45f, 1.5f, 3e38f};
  KeyPlace places[90];
  int n = 0;
  for (float v : x) {
    if (from_key(key_of(v)) != v) return 1;
    for (float w : x) if ((v < w) != (key_of(v) < key_of(w))) return 2;
    for (int32_t id : {0, 7, (1 << 20) - 1}) places[n++] = {key_of(v), id};
  }
  for (int i = 0; i < n; ++i) {
    const KeyPlace a = places[i], back = place_of(ranked(a));
    if (back.x != a.x || back.id != a.id) return 3;
    if (within(everything(), a) != (from_key(a.x) > -INFINITY)) return 4;
    for (int j = 0; j < n; ++j) {
      const KeyPlace b = places[j];
      if (ranks_before(a, b) != (ranked(a) > ranked(b))) return 5;
      const KeptKeys above = narrow_above(everything(), b), below = narrow_below(everything(), b);
      if (within(above, a) != ranks_within(above, a) || within(below, a) != ranks_within(below, a)) return 6;
    }
  }
  return 0;
}
"""


def test_keys_keep_the_order_of_logits_and_both_ends_of_what_is_kept(tmp_path: Path) -> None:
    (tmp_path / "keys.cc").write_text(KEYS)
    chosen = str(compiler())
    subprocess.run([chosen, "-std=c++17", f"-I{CSRC}", "-o", "keys", "keys.cc"], cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "keys"]).returncode == 0


# Plans and bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "rows", "vocab", "dtype", "policy", "parts"),
    [
        (H100, 1, 128256, torch.float32, "cluster", 8),
        (H100, 64, 128256, torch.float32, "cluster", 8),
        (H100, 64, 128256, torch.bfloat16, "cluster", 4),
        (H100, 300, 32000, torch.bfloat16, "cluster", 1),
        (H100, 1, 2**20, torch.bfloat16, "cluster", 16),
        (H100, 1, 2**20, torch.float32, "grid", 32),
        (A100, 1, 128256, torch.float32, "grid", 32),
        (A100, 300, 32000, torch.float32, "block", 1),
    ],
)
def test_plans(
    device: tuple[int, ...], rows: int, vocab: int, dtype: torch.dtype, policy: str, parts: int, simt: Simt
) -> None:
    plan = simt.plan(device, rows, vocab, dtype.itemsize, edits=False)
    assert plan[:2] == (("cluster", "block", "grid").index(policy), parts)
    assert plan[4] <= device[2]


def test_every_plan_fits_its_gpu(simt: Simt) -> None:
    """A block's shared memory, a cluster's blocks and, where blocks wait for each other, all of them at once."""
    l40 = (89, 142, 99 * 1024, 100 * 1024, 1)
    rtx50 = (120, 170, 99 * 1024, 100 * 1024, 8)
    seen = set()
    for device in (A100, H100, l40, rtx50):
        for rows, vocab in itertools.product((1, 2, 7, 64, 1000), (1, 999, 32000, 128256, 262144, 2**20)):
            for itemsize, edits in itertools.product((2, 4), (False, True)):
                policy, parts, threads, teams, shared = simt.plan(device, rows, vocab, itemsize, edits)
                seen.add((device[0], policy))
                assert shared <= device[2], (device, rows, vocab, itemsize, edits)
                assert 1 <= teams <= rows
                assert parts <= (device[4] if policy == 0 else 1 if policy == 1 else 32)
                per_sm = min(2, device[3] // (shared + 1024))
                assert policy != 2 or teams * parts <= device[1] * per_sm, (device, rows, vocab, itemsize, edits)
                assert threads == 256
    assert seen == {(80, 1), (80, 2), (89, 1), (89, 2), (90, 0), (90, 1), (90, 2), (120, 0), (120, 1), (120, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 50, "top_p": 0.9},
        {"top_p": 0.9, "min_p": 0.01},
        {"temperature": 0.0},
        {"top_n_sigma": 3.0, "top_k": 900, "top_p": 0.99, "min_p": 1e-4, "typical_p": 0.95, "epsilon_cutoff": 1e-5}
        | {"eta_cutoff": 2e-5, "top_a": 1e-4, "p_less": True, "xtc_probability": 0.5, "xtc_threshold": 1e-3},
        {"temperature": 1.2, "top_n_sigma": 3.0, "typical_p": 0.9, "top_p": 0.95, "order": "temperature_last"},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_device_memory_is_read_once(fields: dict[str, Any], dtype: torch.dtype, simt: Simt) -> None:
    """In the resident path: every logit once, nothing as large as a row written, no workspace."""
    logits = torch.randn(2, 128256, generator=torch.Generator().manual_seed(3)).to(dtype)
    simt.how = How("auto")
    with as_backend(simt):
        got = fs.sample(logits, seed=1, backend="cuda", **fields)
    assert torch.equal(got.tokens, fs.sample(logits, seed=1, backend="reference", **fields).tokens)
    assert simt.chosen is not None
    assert (simt.chosen.policy, simt.chosen.workspace, simt.chosen.boards) == (0, 0, 0)
    counters = simt.counters()
    assert logits.nbytes <= counters.logit_bytes <= 1.02 * logits.nbytes
    assert counters.other_bytes == 0
    assert counters.written_bytes == 2 * (8 + 4)


def test_mask_and_penalties_read_the_logits_once_too(simt: Simt) -> None:
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 50000, generator=g).to(torch.bfloat16)
    extras = {"bitmask": torch.full((2, 1563), -1, dtype=torch.int32), "output_ids": torch.randint(50000, (2, 100))}
    simt.how = How("auto")
    with as_backend(simt):
        fs.sample(logits, seed=1, backend="cuda", frequency_penalty=0.3, top_p=0.9, **extras)
    assert simt.counters().logit_bytes <= 1.02 * logits.nbytes
    assert simt.counters().written_bytes == 2 * (8 + 4)


def test_the_other_policies_read_no_more_than_their_passes(simt: Simt) -> None:
    """One block per row, top-k and top-p: a scan, at most 3 rounds each, the sums and the draw's segment."""
    logits = torch.randn(1, 32000, generator=torch.Generator().manual_seed(3))
    for policy, parts in (("block", 1), ("grid", 4)):
        simt.how = How(policy, parts, 512)
        with as_backend(simt):
            fs.sample(logits, seed=1, backend="cuda", top_k=50, top_p=0.9)
        assert logits.nbytes <= simt.counters().logit_bytes <= 9 * logits.nbytes


@pytest.mark.parametrize(
    ("rows", "resident", "teams"),
    [(256, 32, 32), (256, 33, 32), (64, 32, 32), (65, 32, 22), (33, 32, 17), (256, 31, 29), (8, 32, 8), (1, 1, 1)],
)
def test_teams_are_resident_and_get_the_same_number_of_rows(rows: int, resident: int, teams: int, simt: Simt) -> None:
    """An H100's groups of multiprocessors hold 32 clusters of 8: a 33rd would start when the others end."""
    plan = simt.plan(H100, rows, 128256, 4, False, resident=resident)
    assert plan[:4] == (0, 8, 256, teams)


def test_clusters_that_do_not_fit_become_a_grid(simt: Simt) -> None:
    policy, parts, _, teams, _ = simt.plan(H100, 4, 128256, 4, False, resident=0)
    assert (policy, parts, teams) == (2, 32, 4)


def test_a_grid_that_does_not_fit_shrinks_until_nothing_is_left_to_try(simt: Simt) -> None:
    found = [simt.plan(A100, 5, 128256, 4, False, shrinks=n)[:4] for n in range(9)]
    assert found[:4] == [(2, 32, 256, 5), (2, 32, 256, 2), (2, 32, 256, 1), (2, 16, 256, 1)]
    assert found[7:] == [(2, 1, 256, 1), (0, 0, 0, 0)]


def test_blocks_per_row_can_be_asked_for(simt: Simt) -> None:
    for parts, expected in ((1, 8), (16, 8), (0, 8)):  # a row needs 8 blocks of a cluster; more than 8 are not portable
        assert simt.plan(H100, 64, 128256, 4, False, parts=parts)[1] == expected
    assert [simt.plan(H100, 64, 32000, 2, False, parts=parts)[1] for parts in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert [simt.plan(A100, 64, 128256, 4, False, parts=parts)[1] for parts in (1, 8, 32)] == [1, 8, 32]


# The harness finds what it is there to find ---------------------------------------------------------------------------


BARRIERS = [
    (path.name, number)
    for path in sorted((CSRC / "cuda").glob("*.cuh"))
    if path.name != "device.cuh"  # what is in there is nvcc's alone
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if "__syncthreads()" in line
]
PROBES = (
    Case("ties", "rows", 1025, "f32", None, 2),
    Case("ties", "penalties", 1025, "bf16", "everything", 2),
    Case("equal", "k50", 513, "f32", None, 1),
    Case("ties", "plain", 1025, "f32", "mask", 2),
    Case("flat", "floors", 1025, "f32", None, 4),
    Case("flat", "llama.cpp", 513, "bf16", None, 4),
    Case("ties", "min_p-xtc-dry", 513, "f32", "repeats", 2),
    Case("ties", "penalties-dry", 513, "f32", "repeats", 2),
)


@cache
def long_list(backend: str) -> fs.SampleOutput:
    """More top tokens than a warp sorts."""
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(4))
    return fs.sample(logits, seed=1, logprobs="raw", top_logprobs=300, backend=backend)


def wrong(simt: Simt, how: How) -> bool:
    """Whether any probe goes wrong, a deadlock included."""
    simt.how = how
    try:
        with as_backend(simt):
            if any(disagreements(ask(case, "cuda", brief=True), expected(case)) for case in PROBES):
                return True
            return not torch.equal(long_list.__wrapped__("cuda").top_ids, long_list("reference").top_ids)
    except RuntimeError:
        return True


def limit_resources() -> None:
    """Wild numbers ask for wild amounts of memory and time: 4 GB on top of what this process has, and 20 s."""
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
    pages = Path("/proc/self/statm")
    if pages.exists():
        most = int(pages.read_text().split()[0]) * resource.getpagesize() + 2**32
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def found_wrong(simt: Simt, how: How) -> bool:
    """The same in a child process, since a missing barrier may lead to a wild address."""
    for case in PROBES:
        expected(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has threads, which the child does not need
        child = os.fork()
    if child == 0:
        faulthandler.disable()
        found = True
        try:
            limit_resources()
            found = wrong(simt, how)
        finally:  # whatever was raised: the child must not go on with the parent's tests
            os._exit(found)
    return os.waitpid(child, 0)[1] != 0


@pytest.mark.parametrize("how", [How("block", 1, 96, 1), How("cluster", 2, 96, 1), How("grid", 2, 96, 1)], ids=str)
def test_nothing_is_found_where_nothing_is_missing(how: How, simt: Simt) -> None:
    assert not any(found_wrong(simt, replace(how, order=order)) for order in ORDERS)


@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda barrier: f"{barrier[0]}:{barrier[1]}")
def test_a_missing_barrier_is_found(barrier: tuple[str, int], simt: Simt) -> None:
    """Without it, some order of threads gives a wrong result or a deadlock."""
    hows = (How("cluster", 2, 96, 1), How("grid", 2, 96, 1), How("block", 1, 96, 1))
    assert any(found_wrong(simt, replace(how, order=order, skip=barrier)) for how in hows for order in reversed(ORDERS))


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """Some of the jobs, with every buffer exactly as large as it has to be."""
    jobs = [job for job in JOBS if job.case.vocab <= 1100][::28]
    (tmp_path / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    library = build(tmp_path, sanitize=True)
    cxx = str(compiler())
    runtimes = [
        subprocess.run([cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": str(SUPPORT),
    }
    command = [sys.executable, str(SUPPORT / "simt_engine.py"), library, tmp_path / "jobs.json", tmp_path / "out.pt"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not re.search("runtime error|ERROR: AddressSanitizer", done.stderr), done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt")
    for job in jobs:
        assert_agree(found[job.name], expected(job.case))
