"""The pictures of docs/samplers.md are what docs/samplers/draw.py draws, and the page shows each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fastsample.params import specs

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "samplers.md").read_text()


def test_the_pictures_are_up_to_date(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(DOCS / "samplers" / "draw.py"), str(tmp_path)], cwd=tmp_path, check=True)
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: path.read_text() for path in (DOCS / "samplers").glob("*.svg")}


def test_the_page_shows_every_picture() -> None:
    for path in (DOCS / "samplers").glob("*.svg"):
        assert f"(samplers/{path.name})" in PAGE


def test_the_page_tells_of_every_sampler() -> None:
    named = ("temperature", "penalty", "ties", "dry_base", "dry_allowed_length")
    short = {"top_k": "Top-k", "top_p": "Top-p", "min_p": "Min-p", "top_n_sigma": "Top-n-sigma", "typical_p": "Typical"}
    short |= {"epsilon_cutoff": "Epsilon", "eta_cutoff": "Eta", "top_a": "Top-a", "p_less": "p-less"}
    short |= {"no_repeat_ngram_size": "No-repeat n-gram"}
    for name, _ in specs():
        assert name.endswith(named) or short.get(name, f"`{name}`") in PAGE, name
