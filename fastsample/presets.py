"""Presets: the parameters that other programs start from, as data."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "neutral": {},
    # common/common.h of llama.cpp: its sampler chain with the penalties, DRY, typical and XTC at their neutral values.
    "llama.cpp": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "order": "temperature_last"},
    # vllm.SamplingParams; min-p comes before top-k and top-p there.
    "vllm": {"order": "min_p_first"},
    # transformers.GenerationConfig; its top-k keeps all ties.
    "huggingface": {"top_k": 50, "ties": "all"},
    # The three that p-e-w, who wrote XTC and DRY, puts in the place of all older ones, with the values of their texts.
    "min-p + xtc + dry": {
        "min_p": 0.02,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.1,
        "dry_multiplier": 0.8,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "order": "temperature_last",
    },
}
"""Fields of SamplingParams by the name of the preset."""


def preset_name(name: str) -> str:
    """The preset that is meant. TypeError or ValueError, with the names that there are, if it is none."""
    if not isinstance(name, str):
        raise TypeError(f"preset = {name!r}: expected one of {_LISTED}")
    try:
        return _KEYS[_key(name)]
    except KeyError:
        raise ValueError(f"preset = {name!r}: expected one of {_LISTED}") from None


def _key(name: str) -> str:
    """Without case, spaces and punctuation."""
    return "".join(c for c in name.casefold() if c.isalnum())


_KEYS = {_key(name): name for name in PRESETS}
_LISTED = ", ".join(map(repr, PRESETS))
