"""Presets: names, overrides, and that each says what its program does."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

import fastsample as fs
from fastsample.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_and_samples(name: str) -> None:
    params = fs.SamplingParams.preset(name)
    assert params == fs.SamplingParams(**PRESETS[name])
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    tokens = fs.sample(logits, params, seed=1, output_ids=[[1, 2, 1]] * 3, backend="reference").tokens
    assert bool(((tokens >= 0) & (tokens < 200)).all())


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("LLAMA.CPP", "llama.cpp"),
        ("llama cpp", "llama.cpp"),
        ("vLLM", "vllm"),
        ("Hugging Face", "huggingface"),
        ("min-p + XTC + DRY", "min-p + xtc + dry"),
        ("minp xtc dry", "min-p + xtc + dry"),
    ],
)
def test_spelling_does_not_matter(written: str, meant: str) -> None:
    assert fs.SamplingParams.preset(written) == fs.SamplingParams.preset(meant)


def test_fields_override_a_preset() -> None:
    params = fs.SamplingParams.preset("llama.cpp", temperature=[0.5, 1.5], top_k=0)
    assert params.per_row() == {"temperature": 2}
    assert (params.top_k, params.order) == (0, "temperature_last")
    with pytest.raises(TypeError, match="temprature"):
        fs.SamplingParams.preset("vllm", temprature=1.0)


@pytest.mark.parametrize(("name", "error"), [("lama", ValueError), ("", ValueError), (3, TypeError), (None, TypeError)])
def test_an_unknown_preset_lists_those_there_are(name: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"preset = .*expected one of 'neutral', 'llama.cpp', 'vllm'"):
        fs.SamplingParams.preset(name)  # type: ignore[arg-type]


def test_neutral_keeps_everything() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(2))
    assert torch.equal(fs.filter_logits(logits, fs.SamplingParams.preset("neutral")), logits)


def test_huggingface_is_the_default_of_generate() -> None:
    config, params = GenerationConfig(), fs.SamplingParams.preset("huggingface")
    defaults = {name: getattr(config, name, None) for name in ("temperature", "top_k", "top_p", "min_p", "typical_p")}
    for name, value in defaults.items():  # None: transformers' own default, which `generate` fills in
        assert value is None or value == getattr(params, name)
    assert config._get_default_generation_params()["top_k"] == params.top_k
