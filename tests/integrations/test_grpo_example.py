"""The example that trains with TRL, at a small size: what replaying kept sets does to the ratio."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("trl", "datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package)

EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo.py"


@pytest.mark.slow
def test_grpo(tmp_path: Path) -> None:
    plot = tmp_path / "grpo.svg"
    command = [sys.executable, str(EXAMPLE), "--steps", "2", "--plot", str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    *_, first, second = (line.replace("%", "").split() for line in done.stdout.splitlines())
    for _, _, step, *figures in (first, second):
        whole_ratio, whole_outside, _, kept_ratio, kept_outside, _ = map(float, figures)
        assert 0.75 < whole_ratio < 0.9, f"step {step}: the mass of a nucleus of 0.8, and a little more"
        assert whole_outside > 50
        assert kept_ratio == pytest.approx(1, abs=1e-3)
        assert kept_outside == 0
    rewards = [(line[5], line[8]) for line in (first, second)]
    assert rewards[0][0] == rewards[0][1], "both start from the same weights and seed"
    assert plot.read_text().count("<svg") == 1
