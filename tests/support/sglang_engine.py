"""SGLang's engine on the CPU in a process of its own, serving a small random Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from stacks import Script

VOCAB = 512

# SGLang's CPU build imports this module, of which a Llama needs nothing.
STUB = {"vllm/__init__.py": "", "vllm/_custom_ops.py": "rotary_embedding = rms_norm = fused_add_rms_norm = None\n"}

# A batch is [prompts, params, number of top log-probabilities, what only the server's requests have].
SCRIPT = """
import json, sys
import sglang
from sglang.srt.managers.io_struct import GenerateReqInput

def main():
    ask = json.load(open(sys.argv[1]))
    always = dict(
        device="cpu", attention_backend="torch_native", dtype="float32", random_seed=3, skip_tokenizer_init=True,
        max_total_tokens=8192, mem_fraction_static=0.05, disable_radix_cache=True,
    )
    engine = sglang.Engine(**{**always, **ask["engine"]})
    found = []
    for prompts, params, logprobs, more in ask["batches"]:
        asked = dict(return_logprob=True, top_logprobs_num=logprobs) if logprobs else {}
        request = GenerateReqInput(input_ids=prompts, sampling_params=params, **asked, **more)
        answers = engine.tokenizer_manager.generate_request(request, None)
        try:
            outputs = engine.loop.run_until_complete(answers.__anext__())
        except ValueError as error:
            found += [{"refused": str(error)}] * len(prompts)
            continue
        for out in outputs:
            meta = out["meta_info"]
            found.append({"tokens": out["output_ids"], "steps": meta.get("spec_verify_ct")})
            found[-1]["masks"] = meta.get("output_token_sampling_mask")
            found[-1]["mask_logprobs"] = meta.get("output_token_sampling_logprobs")
            found[-1]["finish"] = meta["finish_reason"]
            if logprobs:
                found[-1]["own"] = meta["output_token_logprobs"][0][:2]
                found[-1]["tops"] = [[entry[:2] for entry in top] for top in meta["output_top_logprobs"]]
                found[-1]["top"] = found[-1]["tops"][0]
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


Batch = tuple[list[list[int]], list[dict[str, Any]], int, dict[str, Any]]


def ask(prompts: list[list[int]], params: list[dict[str, Any]], length: int, logprobs: int = 0, **more: Any) -> Batch:
    return prompts, [{"max_new_tokens": length, "ignore_eos": True, **fields} for fields in params], logprobs, more


def serve(model: Path, batches: list[Batch], engine: dict[str, Any], **environment: str) -> Script:
    request = {"engine": {"model_path": str(model), **engine}, "batches": batches}
    return Script(SCRIPT, request, **{"PYTHONPATH": str(model), **environment})
