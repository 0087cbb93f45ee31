"""MLX-LM decoding with fastsample, against fs.sample by hand on the log-probabilities that it hands out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from decoded import drawn, output_of, tiny_models

import fastsample as fs

mx = pytest.importorskip("mlx.core", reason="`nox -s mlx_lm` installs it and runs these tests")
mlx_lm = pytest.importorskip("mlx_lm")
adapter = pytest.importorskip("fastsample.integrations.mlx_lm")
MlxSampler = adapter.MlxSampler

PROMPT, STEPS = "The future of AI is", 20
PROMPTS = [PROMPT, "Use this function to", "class"]
SEEDS = [7, 2**64 - 1, 9]
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "order": "temperature_last"},
    {"temperature": 1.2, "top_n_sigma": 1.0, "xtc_probability": 0.5},
]
PENALTIES: list[dict[str, Any]] = [
    {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.1},
    {"dry_multiplier": 5.0, "dry_allowed_length": 1, "temperature": 0.3},
    {"no_repeat_ngram_size": 2, "temperature": 0.5},
]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return tiny_models().shipped_mlx()


def ids_of(tiny: Any, sampler: Any, prompt: str = PROMPT, **options: Any) -> list[int]:
    model, tokenizer = tiny
    found = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=STEPS, sampler=sampler, **options)
    return [response.token for response in found]


class Recorder:
    """A sampler that notes what it is called with."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.rows = sampler, []

    def __call__(self, logprobs: Any) -> Any:
        self.rows.append(np.array(logprobs.astype(mx.float32))[0])
        return self.sampler(logprobs)


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_a_text_is_sample_by_hand(tiny: Any, fields: dict[str, Any]) -> None:
    recorder = Recorder(MlxSampler(seed=7, **fields))
    found = ids_of(tiny, recorder)
    assert found == drawn(recorder.rows, len(found), 7, **fields)
    assert len(found) > 5


@pytest.mark.parametrize("fields", PENALTIES, ids=str)
def test_penalties_are_those_of_sample(tiny: Any, fields: dict[str, Any]) -> None:
    """On the model's logits, as they are before MLX-LM normalises them."""
    rows: list[Any] = []

    def record(tokens: Any, logits: Any) -> Any:
        rows.append(np.array(logits)[0])
        return logits

    sampler = MlxSampler(seed=7, **fields)
    found = ids_of(tiny, sampler, logits_processors=[record, *sampler.logits_processors])
    prompt = tiny[1].encode(PROMPT)
    assert found == drawn(rows, len(found), 7, prompt, **fields)
    plain = {name: value for name, value in fields.items() if name in ("temperature", "top_p")}
    assert found != drawn(rows, len(found), 7, prompt, **plain)


def test_breakers_offset_and_params(tiny: Any) -> None:
    params = fs.SamplingParams(dry_multiplier=5.0, dry_allowed_length=1, temperature=0.2)
    texts = []
    for options in ({}, {"dry_breakers": list(range(4096))}, {"offset": 3}, {"temperature": 2.0}):
        sampler = MlxSampler(params, seed=7, **options)
        texts.append(ids_of(tiny, sampler, logits_processors=sampler.logits_processors))
    assert len(set(map(tuple, texts))) == 4


def test_greedy_is_mlx_lms_own(tiny: Any) -> None:
    for prompt in PROMPTS:
        assert ids_of(tiny, MlxSampler(temperature=0), prompt) == ids_of(tiny, None, prompt)


def test_streaming_is_generating(tiny: Any) -> None:
    model, tokenizer = tiny
    options = {"max_tokens": STEPS}
    whole = mlx_lm.generate(model, tokenizer, PROMPT, sampler=MlxSampler(seed=7), **options)
    parts = mlx_lm.stream_generate(model, tokenizer, PROMPT, sampler=MlxSampler(seed=7), **options)
    assert "".join(part.text for part in parts) == whole


@pytest.mark.parametrize("fields", [FILTERS[1], {**PENALTIES[0], "top_k": 20}], ids=str)
def test_a_sequence_is_the_same_in_a_batch(tiny: Any, fields: dict[str, Any]) -> None:
    from mlx_lm.generate import BatchGenerator

    model, tokenizer = tiny
    samplers = [MlxSampler(seed=seed, **fields) for seed in SEEDS]
    batch = BatchGenerator(model, stop_tokens=[[token] for token in tokenizer.eos_token_ids])
    prompts, processors = [tokenizer.encode(text) for text in PROMPTS], [s.logits_processors for s in samplers]
    uids = batch.insert(prompts, [STEPS, 7, STEPS], samplers=samplers, logits_processors=processors)
    found: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := batch.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    batch.close()
    for uid, prompt, seed, length in zip(uids, PROMPTS, SEEDS, (STEPS, 7, STEPS), strict=True):
        alone = MlxSampler(seed=seed, **fields)
        assert found[uid] == ids_of(tiny, alone, prompt, logits_processors=alone.logits_processors)[:length]


@pytest.mark.parametrize("fields", [FILTERS[1], {"frequency_penalty": 0.5, "temperature": 0.7, "top_k": 20}], ids=str)
def test_a_draft_model_changes_nothing(tiny: Any, fields: dict[str, Any]) -> None:
    alone, beside = MlxSampler(seed=7, **fields), MlxSampler(seed=7, **fields)
    wanted = ids_of(tiny, alone, logits_processors=alone.logits_processors)
    assert ids_of(tiny, beside, logits_processors=beside.logits_processors, draft_model=tiny[0]) == wanted


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_copy(dtype: str) -> None:
    array = mx.random.normal((1, 100), key=mx.random.key(3)).astype(getattr(mx, dtype))
    mx.eval(array)
    found = adapter._tensor("logprobs", array)
    assert found.dtype == getattr(torch, dtype)
    assert found.float().tolist() == array.astype(mx.float32).tolist()
    assert found.data_ptr() == torch.from_dlpack(array).data_ptr()
    token = MlxSampler(seed=3)(array)
    assert token.dtype == mx.uint32
    assert token.tolist() == drawn([found[0]], 1, 3)


def test_refusals(tiny: Any) -> None:
    sampler = MlxSampler(seed=7)
    for shape in ((2, 5), (5,), (1, 1, 5)):
        with pytest.raises(ValueError, match=r"logprobs: expected shape \[1, V\], got \("):
            sampler(mx.zeros(shape))
    with pytest.raises(TypeError, match="logprobs: expected float32, float16 or bfloat16, got"):
        sampler(mx.zeros((1, 5), dtype=mx.int32))
    with pytest.raises(ValueError, match="row 0"):
        sampler(mx.full((1, 5), float("nan")))
    with pytest.raises(ValueError, match=r"repetition_penalty: expected logits_processors=sampler\.logits_processors"):
        MlxSampler(repetition_penalty=1.1)(mx.zeros((1, 5)))
    with pytest.raises(ValueError, match="backend"):
        MlxSampler(backend="x")(mx.zeros((1, 5)))
    with pytest.raises(ValueError, match="needs logits_processors"):
        ids_of(tiny, MlxSampler(seed=7), draft_model=tiny[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": -1}, "temperature = -1"),
        ({"temperature": [1.0, 2.0]}, "temperature"),
        ({"repetition_penalty": [1.0, 2.0]}, "repetition_penalty"),
        ({"top_q": 1}, "top_q"),
        ({"seed": "x"}, "seed"),
        ({"offset": -1}, "offset"),
    ],
)
def test_bad_arguments(options: Any, told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        MlxSampler(**options)


def test_the_example() -> None:
    assert len(output_of("mlx_lm_sampler").split("\n---\n")) == 3
