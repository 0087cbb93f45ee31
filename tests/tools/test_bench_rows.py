"""The recorded rows and what they are compared by: figures against float64, and a file that is what it says."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind site-packages, where the fastsample under test is

from bench import recorded, rows  # noqa: E402
from bench.__main__ import app  # noqa: E402

STORY = json.loads((recorded.DATA / recorded.STORY).read_text())


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    return recorded.rows()


def test_the_file_is_what_its_story_says(real: torch.Tensor) -> None:
    packed = (recorded.DATA / recorded.ROWS).read_bytes()
    assert sha256(packed).hexdigest() == STORY["sha256"]
    assert len(packed) < 13e6
    assert (real.dtype, list(real.shape)) == (torch.bfloat16, STORY["shape"])
    assert [text["opening"] for text in STORY["texts"]] == [one for many in recorded.OPENINGS.values() for one in many]
    assert len(real) == sum(len(text["positions"]) for text in STORY["texts"]) >= 200
    assert len(real.unique(dim=0)) == len(real)
    assert bool(real.isfinite().all())
    assert "Apache License 2.0" in (recorded.DATA / "README.md").read_text()


def test_rows_are_written_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 16 bits come back, and in the order of the texts."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).reshape(16, -1)
    finite = torch.where(bits.view(torch.bfloat16).isfinite(), bits, 0).view(torch.bfloat16).float()
    monkeypatch.setattr(recorded, "made", lambda *_: iter([({"n": 0}, finite[:5]), ({"n": 1}, finite[5:])]))
    assert recorded.record(None, None, tmp_path) == 16
    monkeypatch.setattr(recorded, "DATA", tmp_path)
    assert torch.equal(recorded.rows().view(torch.int16), finite.bfloat16().view(torch.int16))


def test_figures_are_those_of_float64(real: torch.Tensor) -> None:
    """Counts may differ by what bfloat16 ties and the last digit of a sum move: one token at an edge."""
    some = real[::16].float()
    p = np.sort(torch.softmax(some.double(), -1).numpy(), axis=1)[:, ::-1]
    want = {
        "entropy, nats": -(p * np.log(p)).sum(1),
        "kept by top-p 0.9": (np.cumsum(p, 1) < 0.9).sum(1) + 1,
        "kept by top-p 0.95": (np.cumsum(p, 1) < 0.95).sum(1) + 1,
        "kept by min-p 0.05": (p >= 0.05 * p[:, :1]).sum(1),
        "mass of the first 50": p[:, :50].sum(1),
        "from the maximum to the median": some.numpy().max(1) - np.sort(some.numpy(), 1)[:, (some.shape[1] - 1) // 2],
        "standard deviation": some.double().numpy().std(1, ddof=1),
    }
    assert want.keys() == rows.SHAPE.keys()
    for name, figure in rows.SHAPE.items():
        close = {"atol": 1.01} if "kept" in name else {"rtol": 1e-5}
        np.testing.assert_allclose(figure(some).double().numpy(), want[name], err_msg=name, **close)


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    result = CliRunner().invoke(app, ["rows", "--count", "2", "--seconds", "0", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["results"]
    shape, speed = ([r for r in found if key in r] for key in ("of", "mode"))
    assert [r["of"] for r in shape] == list(rows.SHAPE)
    assert [r["mode"] for r in speed] == [mode.name for mode in rows.MODES]
    assert all(r["rows"] == 2 and r["vocab"] == real_vocabulary() for r in found)
    for r in speed:
        assert r["us"]["p10"] <= r["us"]["median"] <= r["us"]["p90"] <= r["us"]["max"]
        assert r["ratio"] == pytest.approx(r["us"]["median"] / r["lm_us"]["median"], abs=1e-3)
        assert r["mode"] in result.output


def real_vocabulary() -> int:
    return int(STORY["shape"][1])
