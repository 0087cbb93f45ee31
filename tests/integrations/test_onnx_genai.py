"""ONNX Runtime GenAI decoding with fastsample, against fs.sample by hand on the model's logits, which are a table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from decoded import drawn, output_of, tiny_models

import fastsample as fs

og = pytest.importorskip("onnxruntime_genai", reason="`nox -s onnx_genai` installs it and runs these tests")
pytest.importorskip("onnx")
adapter = pytest.importorskip("fastsample.integrations.onnx_genai")
generate, stream = adapter.generate, adapter.stream

VOCAB, STEPS = 80, 24
TABLE = np.random.default_rng(3).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 2
TABLE[:, 0] -= 2  # the end of a text
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
SEEDS = [7, 2**64 - 1, 9]
ENDS: dict[str, Any] = {"eos_token_ids": 0, "pad_token_id": 0}
FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"dry_multiplier": 1.0, "dry_allowed_length": 1, "xtc_probability": 0.5},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    tiny_models().write_onnx(folder, TABLE)
    return og.Model(str(folder))


def by_hand(row: int, **fields: Any) -> list[int]:
    prompt = PROMPTS[row]
    ids = drawn(lambda new: TABLE[[*prompt, *new][-1]], STEPS, SEEDS[row], prompt, **fields)
    return ids[: ids.index(0) + 1] if 0 in ids else ids


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_sequence_is_sample_by_hand_in_any_batch(model: Any, fields: dict[str, Any]) -> None:
    wanted = [by_hand(row, **fields) for row in range(3)]
    options = {"max_new_tokens": STEPS, **ENDS, **fields}
    assert generate(model, PROMPTS, seed=SEEDS, **options) == wanted
    assert generate(model, PROMPTS[::-1], seed=SEEDS[::-1], **options) == wanted[::-1]
    for row in range(3):
        assert generate(model, PROMPTS[row : row + 1], seed=SEEDS[row : row + 1], **options) == [wanted[row]]
    steps = list(stream(model, PROMPTS, seed=SEEDS, **options))
    assert [[step[row] for step in steps if row in step] for row in range(3)] == wanted


def test_sequences_end_one_by_one(model: Any) -> None:
    options = {"max_new_tokens": STEPS, "temperature": 3.0, **ENDS}
    wanted = [by_hand(row, temperature=3.0) for row in range(3)]
    assert len({len(ids) for ids in wanted}) > 1
    for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):  # so that each place of the batch has the first to end
        prompts, seeds = ([table[row] for row in order] for table in (PROMPTS, SEEDS))
        assert generate(model, prompts, seed=seeds, **options) == [wanted[row] for row in order]


def test_prompts_are_padded_on_the_left() -> None:
    """As the masks of the models that the generator is made for want it; this one looks at the last id alone."""
    assert adapter._padded([np.array([1, 2, 3]), np.array([4])], 9).tolist() == [[1, 2, 3], [9, 9, 4]]


def test_greedy_is_the_generators_own(model: Any) -> None:
    for prompt in PROMPTS:
        params = og.GeneratorParams(model)
        params.set_search_options(batch_size=1, max_length=len(prompt) + STEPS, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        own = generator.get_sequence(0).tolist()[len(prompt) :]
        found = generate(model, [prompt], temperature=0, max_new_tokens=STEPS, **ENDS)[0]
        assert [token for token in found if token] == [token for token in own if token]
        assert generate(model, [prompt, [9]], temperature=0, max_new_tokens=STEPS, **ENDS)[0] == found


def test_parameters_and_breakers_of_each_row(model: Any) -> None:
    options = {"max_new_tokens": STEPS, **ENDS, "dry_allowed_length": 1, "dry_breakers": list(range(40))}
    params = fs.SamplingParams(temperature=[0.5, 1.0, 1.5], dry_multiplier=[0.0, 2.0, 3.0])
    found = generate(model, PROMPTS, params, seed=SEEDS, offset=5, **options)
    assert len(found) == 3
    hands = []
    for row, (t, d) in enumerate([(0.5, 0.0), (1.0, 2.0), (1.5, 3.0)]):
        ids: list[int] = []
        while len(ids) < STEPS and 0 not in ids:
            fields = {"temperature": t, "dry_multiplier": d, "dry_allowed_length": 1, "dry_breakers": list(range(40))}
            logits = torch.from_numpy(TABLE[[[*PROMPTS[row], *ids][-1]]])
            history: Any = {"prompt_ids": [PROMPTS[row]], "output_ids": [ids]}
            ids.append(int(fs.sample(logits, seed=[SEEDS[row]], offset=5 + len(ids), **history, **fields).tokens[0]))
        hands.append(ids)
    assert found == hands


@pytest.mark.parametrize(
    ("prompts", "options", "told"),
    [
        ([[1]], {"eos_token_ids": None}, "eos_token_ids: not given, which needs a tokenizer in the model's folder"),
        ([[1], [2, 3]], {"pad_token_id": None}, "pad_token_id: not given, which prompts of different lengths need"),
        (["text"], {}, "prompts: the texts need a tokenizer"),
        ("text", {}, "prompts: expected a list"),
        ([], {}, "prompts: expected at least one"),
        ([[]], {}, r"prompts\[0\]: expected at least 1"),
        ([[1], [-1]], {}, r"prompts\[1\]\[0\] = -1: expected a token id"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens = 0"),
        ([[1]], {"eos_token_ids": "x"}, "eos_token_ids: expected"),
        ([[1], [2, 3]], {"pad_token_id": -1}, "pad_token_id = -1"),
        ([[1]], {"temperature": -1}, "temperature = -1"),
        ([[1]], {"seed": [1, 2]}, "seed"),
        ([[1]], {"top_q": 2}, "top_q"),
    ],
)
def test_bad_arguments(model: Any, prompts: Any, options: Any, told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        stream(model, prompts, **(ENDS | options))


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"model: expected an onnxruntime_genai\.Model, got 'folder'"):
        stream("folder", [[1]])


def test_ends_that_are_not_the_models_own(model: Any) -> None:
    """The generator ends a sequence of a batch by itself: what it would not take is noticed."""
    with pytest.raises(ValueError, match=r"eos_token_ids: genai_config\.json has ended sequence"):
        generate(model, PROMPTS, seed=SEEDS, temperature=3.0, max_new_tokens=STEPS, eos_token_ids=[], pad_token_id=0)


def test_the_example() -> None:
    first, second = output_of("onnx_genai").splitlines()
    assert first.startswith("You may ")
    assert second.startswith("Sampling ")
    assert len(first) > 40
