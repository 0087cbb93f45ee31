"""SGLang's engine on the CPU in a process of its own, serving a small random Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from stacks import Script

VOCAB = 512

# SGLang's CPU build imports this module, of which a Llama needs nothing.
STUB = {"vllm/__init__.py": "", "vllm/_custom_ops.py": "rotary_embedding = rms_norm = fused_add_rms_norm = None\n"}

# A batch is [prompts, params, number of top log-probabilities].
SCRIPT = """
import json, sys
import sglang

def main():
    ask = json.load(open(sys.argv[1]))
    always = dict(
        device="cpu", attention_backend="torch_native", dtype="float32", random_seed=3, skip_tokenizer_init=True,
        max_total_tokens=8192, mem_fraction_static=0.05, disable_radix_cache=True,
    )
    engine = sglang.Engine(**{**always, **ask["engine"]})
    found = []
    for prompts, params, logprobs in ask["batches"]:
        asked = dict(return_logprob=True, top_logprobs_num=logprobs) if logprobs else {}
        try:
            outputs = engine.generate(input_ids=prompts, sampling_params=params, **asked)
        except ValueError as error:
            found += [{"refused": str(error)}] * len(prompts)
            continue
        for out in outputs:
            found.append({"tokens": out["output_ids"], "steps": out["meta_info"].get("spec_verify_ct")})
            if logprobs:
                meta = out["meta_info"]
                found[-1]["own"] = meta["output_token_logprobs"][0][:2]
                found[-1]["top"] = [entry[:2] for entry in meta["output_top_logprobs"][0]]
    engine.shutdown()
    json.dump(found, open(sys.argv[2], "w"))

if __name__ == "__main__":
    main()
"""


def make_model(folder: Path) -> Path:
    """A random Llama whose distributions are neither flat nor peaked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name, text in STUB.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


Batch = tuple[list[list[int]], list[dict[str, Any]], int]


def ask(prompts: list[list[int]], params: list[dict[str, Any]], length: int, logprobs: int = 0) -> Batch:
    return prompts, [{"max_new_tokens": length, "ignore_eos": True, **fields} for fields in params], logprobs


def serve(model: Path, batches: list[Batch], engine: dict[str, Any], **environment: str) -> Script:
    request = {"engine": {"model_path": str(model), **engine}, "batches": batches}
    return Script(SCRIPT, request, **{"PYTHONPATH": str(model), **environment})
