"""The pictures of docs/samplers.md: what each filter keeps of one real row. `python docs/samplers/draw.py` writes them.

The row is SmolLM2-135M's after "She opened the door and saw a". Each picture shows its 24 most probable tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import torch

import fastsample as fs

HERE = Path(__file__).parent
HISTORY = [" young", " group", " of", " people", " young"]  # for the pictures of DRY and n-grams, by word
PICTURES: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 8},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.1},
    "top_n_sigma": {"top_n_sigma": 1.0},
    "typical_p": {"typical_p": 0.3},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01},
    "eta_cutoff": {"eta_cutoff": 0.3},
    "top_a": {"top_a": 0.4},
    "p_less": {"p_less": True},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.05},
    "dry": {"dry_multiplier": 0.8, "dry_allowed_length": 1},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
}
"""Each picture's parameters."""

WIDTH, ROW, BAR, LEFT = 560, 15, 330, 110
KEPT, LEFT_OUT = "#0d9488", "#94a3b8"


def main(folder: Path = HERE) -> None:
    row = np.load(HERE / "row.npz")
    logits, words = torch.from_numpy(row["logits"].astype(np.float32)), [str(word) for word in row["words"]]
    shown = logits.topk(len(words)).indices
    ids = {word: int(token) for word, token in zip(words, shown, strict=True)}
    # Words that are not among those shown stand for any other token.
    history = [ids.get(word, len(logits) - 1 - at) for at, word in enumerate(HISTORY)]
    before = fs.probabilities(logits[None], backend="reference")[0][shown]
    for name, fields in PICTURES.items():
        inputs = {"output_ids": [history]} if name in ("dry", "no_repeat_ngram_size") else {}
        after = fs.probabilities(logits[None], **fields, **inputs, backend="reference")[0]
        (folder / f"{name}.svg").write_text(picture(words, before, after[shown], int((after > 0).sum())))


def picture(words: list[str], before: torch.Tensor, after: torch.Tensor, kept: int) -> str:
    """A bar for each token: its probability before, filled where it is kept."""
    height = ROW * len(words) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f'<g font-family="ui-monospace, monospace" font-size="11" fill="{LEFT_OUT}">',
    ]
    longest = float(max(before.max(), after.max()))
    for at, (word, old, new) in enumerate(zip(words, before.tolist(), after.tolist(), strict=True)):
        y, colour = at * ROW + 3, KEPT if new > 0 else LEFT_OUT
        parts.append(f'<text x="{LEFT - 6}" y="{y + 10}" text-anchor="end" fill="{colour}">{escape(word)}</text>')
        opacity = 0.9 if new > 0 else 0.4
        parts.append(bar(y, old / longest, colour, opacity))
        number = f"{old:.4f}" if new == 0 else f"{old:.4f} → {new:.4f}"
        parts.append(f'<text x="{LEFT + BAR * old / longest + 6:.1f}" y="{y + 10}">{number}</text>')
    parts.append(f'<text x="{LEFT}" y="{height - 6}">{kept} of 49152 tokens can be drawn</text>')
    return "\n".join([*parts, "</g>", "</svg>", ""])


def bar(y: int, share: float, colour: str, opacity: float) -> str:
    size = f'width="{BAR * share:.1f}" height="{ROW - 4}"'
    return f'<rect x="{LEFT}" y="{y + 1}" {size} rx="2" fill="{colour}" fill-opacity="{opacity}"/>'


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
