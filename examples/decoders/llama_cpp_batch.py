"""llama.cpp: a completion, then several sequences in one call a step. Needs llama-cpp-python and gguf; runs offline."""

from pathlib import Path
from tempfile import TemporaryDirectory

from llama_cpp import Llama
from tiny_models import write_shipped_gguf

from fastsample import SamplingParams
from fastsample.integrations.llama_cpp import generate, sampling

with TemporaryDirectory() as folder:
    write_shipped_gguf(Path(folder, "tiny.gguf"))
    llm = Llama(str(Path(folder, "tiny.gguf")), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)

print("A completion, with a filter that llama-cpp-python does not offer:")
with sampling(llm, seed=7, top_n_sigma=1.2):
    print(llm("The future of AI is", max_tokens=30, temperature=0.8)["choices"][0]["text"])

print("\nThree sequences in one call a step, each with a seed of its own:")
prompts = ["The future of AI is", "Use this function to", "The future of AI is"]
params = SamplingParams.preset("llama.cpp")
for prompt, ids in zip(prompts, generate(llm, prompts, params, seed=[7, 8, 9], max_tokens=30), strict=True):
    print(f"- {prompt}{llm.detokenize(ids).decode(errors='replace')}")
