"""A rollout that one engine has written to disk: every engine gives its tokens, kept sets and statuses again.

All that a replay needs are the logits, the seeds, the positions and the parameters. It runs in another batch than the
rollout did, whose steps came one by one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import LOGPROB_ULP, ulps
from rollout import SEQUENCES, STEPS, replay, write
from simt_engine import How, Simt, as_backend, build, compiler

import fastsample as fs

SUPPORT = Path(__file__).parents[1] / "support"
KINDS = {"f32": torch.float32, "bf16": torch.bfloat16}
EXACT = ("tokens", "status", "kept_count", "kept_ids", "kept_row_ptr", "ranks")
NEAR = ("logprobs", "log_kept_mass", "entropy")

Once = Callable[[str, Callable[[Path], Any]], Path]


@pytest.fixture(params=KINDS)
def rollout(request: pytest.FixtureRequest, once: Once) -> Path:
    """A file, written by the reference."""
    dtype = KINDS[request.param]
    return once(f"rollout-{request.param}", lambda folder: write(folder / "r.pt", "reference", dtype)) / "r.pt"


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def assert_same(found: dict[str, torch.Tensor], rollout: dict[str, Any]) -> None:
    assert found.keys() == {*EXACT, *NEAR}
    for name in EXACT:
        assert torch.equal(found[name], rollout[name]), name
        assert found[name].dtype == rollout[name].dtype, name
    for name in NEAR:
        assert ulps(found[name], rollout[name]) <= LOGPROB_ULP, name


def test_what_is_on_disk(rollout: Path) -> None:
    """Worth replaying: sets of many sizes, tokens of each, a greedy sequence, and one that ends at a NaN."""
    saved = load(rollout)
    tokens, count = (saved[name].view(SEQUENCES, STEPS) for name in ("tokens", "kept_count"))
    assert saved["status"].view(SEQUENCES, STEPS)[-1].tolist() == [0, 0, 0, 1, 1, 1]
    assert (count[-1, 3:] == 0).all()
    assert (count[3] == 1).all()
    assert len(count.unique()) > 8
    kept = saved["kept_ids"].split(saved["kept_row_ptr"].diff().tolist())
    assert all(token in ids for token, ids in zip(tokens.flatten().tolist(), kept, strict=True) if token >= 0)
    shown = fs.filter_logits(saved["logits"], saved["params"], on_invalid="flag", backend="reference")
    assert torch.equal((shown > -torch.inf).nonzero()[:, 1].int(), saved["kept_ids"])


def test_by_the_engines_of_this_machine(rollout: Path, variant: str) -> None:
    assert_same(replay(load(rollout), variant), load(rollout))


def test_by_the_reference(rollout: Path, variant: str, tmp_path: Path) -> None:
    """The other way round: what this engine writes is what the reference has written."""
    write(tmp_path / "r.pt", variant, load(rollout)["logits"].dtype)
    ours, theirs = load(tmp_path / "r.pt"), load(rollout)
    assert torch.equal(ours["logits"].nan_to_num(9), theirs["logits"].nan_to_num(9))
    assert_same(replay(ours, "reference"), theirs)
    assert_same({name: ours[name] for name in (*EXACT, *NEAR)}, theirs)


def test_by_another_process_and_thread_count(rollout: Path, tmp_path: Path) -> None:
    code = f"""
import sys, torch
sys.path.insert(0, {str(SUPPORT)!r})
import fastsample as fs
from rollout import replay
fs.set_num_threads(1)
torch.save(replay(torch.load(sys.argv[1], weights_only=True), "cpu"), sys.argv[2])
"""
    command = [sys.executable, "-c", code, str(rollout), str(tmp_path / "found.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(load(tmp_path / "found.pt"), load(rollout))


def test_by_triton(rollout: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(SUPPORT)}
    command = [sys.executable, str(SUPPORT / "rollout.py"), str(rollout), str(tmp_path / "found.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(load(tmp_path / "found.pt"), load(rollout))


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("how", [How("block"), How("cluster", 2), How("grid", 3)], ids=lambda how: how.policy)
def test_by_cuda(rollout: Path, how: How, once: Once) -> None:
    """Its sources on fibers, as a GPU's threads run them."""
    simt = Simt(once("simt", build) / "simt.so")
    simt.how = how
    with as_backend(simt):
        assert_same(replay(load(rollout), "cuda"), load(rollout))
