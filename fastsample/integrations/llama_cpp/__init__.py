"""llama.cpp through llama-cpp-python: its completions, or all sequences of a batch in one call on its own logits.

    with sampling(llm, seed=7):
        llm("The future of AI is", top_p=0.9)

    generate(llm, ["The future of AI is", "Once upon a time"], seed=[7, 8], temperature=0.8)

`sampling` replaces what `llama_cpp.Llama` calls for each next token (`Llama._init_sampler`, llama-cpp-python 0.3).
`BatchSampler` reads `llama_get_logits_ith` of whoever calls `llama_decode`; `generate` and `stream` are such a loop.
"""

try:
    import llama_cpp as _llama_cpp  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "fastsample.integrations.llama_cpp needs llama-cpp-python: pip install llama-cpp-python", name=error.name
    ) from error

from fastsample.integrations.llama_cpp.batch import BatchSampler, generate, logits_of, stream
from fastsample.integrations.llama_cpp.completion import sampling

__all__ = ["BatchSampler", "generate", "logits_of", "sampling", "stream"]
