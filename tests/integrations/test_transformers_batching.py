"""Continuous batching of transformers with the fused step, against its own and against fs_generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from fastsample.inputs import row_seeds
from fastsample.integrations.transformers import fs_generate
from fastsample.integrations.transformers.batching import _pack, continuous_batching, generate_batch

V = 120
SMALL = {"num_blocks": 8, "max_batch_tokens": 64}
# transformers logs and warns about what a CPU lacks.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 20
    return model


def config(**options: Any) -> GenerationConfig:
    common: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "eos_token_id": 2, "pad_token_id": 2}
    return GenerationConfig(**common | options)


def batching(**options: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**SMALL | options)


PROMPTS = [[1, 5, 3], [4, 5], [6]]


def alone(model: Any, ids: list[int], seed: Any, settings: GenerationConfig, **fields: Any) -> list[int]:
    sample = fs_generate(seed, **fields)
    top_k = settings.top_k or 0
    out = model.generate(torch.tensor([ids]), generation_config=settings, top_k=top_k, custom_generate=sample)
    return out[0, len(ids) :].tolist()


def test_requests_are_what_fs_generate_gives_alone(llama: LlamaForCausalLM) -> None:
    settings = config(top_k=30, temperature=0.9)
    requests: list[dict[str, Any]] = [
        {"seed": 5, "top_p": 0.5},
        {"temperature": 0.0},
        {"seed": 2**64 - 1, "min_p": 0.2},
    ]
    options = {"continuous_batching_config": batching()}
    together = generate_batch(llama, PROMPTS, settings, requests=requests, seed=7, **options)
    seeds: list[Any] = [[5], [0], [2**64 - 1]]
    for ids, seed, request, got in zip(PROMPTS, seeds, requests, together, strict=True):
        fields = {name: value for name, value in request.items() if name != "seed"}
        assert got == alone(llama, ids, seed, settings, **fields)


def test_requests_take_every_filter(llama: LlamaForCausalLM) -> None:
    settings = config(top_k=0, typical_p=0.9, eta_cutoff=0.001)
    requests: list[dict[str, Any]] = [
        {"seed": 5, "top_n_sigma": 1.5, "typical_p": 1.0},
        {"seed": 6, "xtc_probability": 0.5, "xtc_threshold": 0.05, "top_a": 0.1},
        {"seed": 7, "p_less": True, "epsilon_cutoff": 0.001},
    ]
    options: dict[str, Any] = {"continuous_batching_config": batching(), "backend": "reference"}
    together = generate_batch(llama, PROMPTS, settings, requests=requests, **options)
    for ids, request, got in zip(PROMPTS, requests, together, strict=True):
        fields = {name: value for name, value in request.items() if name != "seed"}
        assert got == alone(llama, ids, [request["seed"]], settings, backend="reference", **fields)
        assert got != alone(llama, ids, [request["seed"]], config(top_k=0), backend="reference")


def test_seeds_of_requests_without_one_are_numbered(llama: LlamaForCausalLM) -> None:
    settings = config()
    got = generate_batch(llama, [[6], [6], [1, 5, 3]], settings, seed=7, continuous_batching_config=batching())
    assert got[0] != got[1]
    assert got[0] == alone(llama, [6], 7, settings)
    assert got[2] == alone(llama, [1, 5, 3], [int(row_seeds(7, 3)[2])], settings)


def test_the_manager_takes_requests_and_draws_from_the_distribution(llama: LlamaForCausalLM) -> None:
    settings = config(max_new_tokens=1, top_k=6)
    with continuous_batching(llama, settings, seed=1, continuous_batching_config=batching()) as manager:
        names = manager.add_requests([[6]] * 600, max_new_tokens=1)
        assert len(names) == 600
        tokens = []
        while len(tokens) < 600:
            result = manager.get_result(timeout=5)
            tokens += [] if result is None else result.generated_tokens
    with torch.no_grad():
        top = llama(torch.tensor([[6]])).logits[0, -1].double().topk(6)
    counts = torch.bincount(torch.tensor(tokens), minlength=V)
    assert counts.sum() == counts[top.indices].sum() == 600
    assert chisquare(counts[top.indices], top.values.softmax(-1) * 600).pvalue > 0.01


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"do_sample": False}, {}, "do_sample=False"),
        ({"repetition_penalty": 1.5}, {}, "repetition_penalty: not served in continuous batches"),
        ({"top_h": 0.5}, {}, "TopHLogitsWarper: not served"),
        ({"no_repeat_ngram_size": 2}, {}, "no_repeat_ngram_size: not served in continuous batches, which have no ids"),
        ({"sequence_bias": [[[5], 2.0]]}, {}, "sequence_bias: not served"),
        ({"num_return_sequences": 2}, {}, "num_return_sequences: not served"),
        ({}, {"return_logprobs": True}, "return_logprobs: not served"),
        ({}, {"use_async_batching": True}, "use_async_batching: not served"),
    ],
)
def test_what_is_not_served_is_named(
    llama: LlamaForCausalLM, settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate_batch(llama, PROMPTS, config(**settings), continuous_batching_config=batching(**options))


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([{}], r"requests: expected 3 \(one per prompt\), got 1"),
        ([{}, {"top_p": 1.5}, {}], r"top_p = 1\.5"),
        ([{"seed": 2**64}, {}, {}], "seed = 18446744073709551616"),
        ([{}, {"xtc_threshold": 0}, {}], "xtc_threshold = 0: expected"),
        ([{}, {"dry_multiplier": 0.8}, {}], "dry_multiplier: not served in continuous batches, which have no ids"),
        ([{"dry_range": 5}, {}, {}], "dry_range: not served in continuous batches"),
        ([{}, {}, {"no_repeat_ngram_size": 2}], "no_repeat_ngram_size: not served in continuous batches"),
        ([{"presence_penalty": 1.0}, {}, {}], "presence_penalty: not served in continuous batches"),
    ],
)
def test_bad_requests_fail_at_once(llama: LlamaForCausalLM, requests: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_batch(llama, PROMPTS, config(), requests=requests, continuous_batching_config=batching())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1.5}, r"seed = 1\.5: expected an integer"),
        ({"seed": 2**64}, "seed = 18446744073709551616"),
        ({"backend": "nope"}, "backend = 'nope'"),
    ],
)
def test_bad_arguments_fail_at_once(
    llama: LlamaForCausalLM, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "forward", None)  # never reached
    with pytest.raises((TypeError, ValueError), match=message):
        generate_batch(llama, PROMPTS, config(), continuous_batching_config=batching(), **options)


def test_parameters_are_packed_on_the_cpu() -> None:
    """Whatever torch's default device is; from there they are copied in one piece."""
    fields = [{"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.0}]
    want = _pack(fields, [1], [2])
    with torch.device("meta"):
        assert torch.equal(_pack(fields, [1], [2]), want)
