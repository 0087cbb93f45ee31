"""vLLM with and without fastsample: `python -m bench serving`, where vLLM is installed (`nox -s vllm -- bench`).

One engine in one process serves both: its sampler's forward is swapped from call to call (A B A B); medians, and the
median of the pairwise ratios. The model is a random Llama of one layer: its step costs little, so tokens per second
show the sampler's limit, not a large model's gain.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fastsample as fs
from bench.modes import make_logits
from bench.record import machine

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
# A request's parameters, and those that reach the sampler's forward (temperature is applied before).
MODES: dict[str, dict[str, Any]] = {
    "T": {"temperature": 0.8},
    "k50": {"temperature": 0.8, "top_k": 50},
    "k50 p.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
}
TOKENS = 8
PAIRS = 3


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def engine(vocab: int) -> Any:
    """A vLLM engine in this process, with logits spread like a language model's (standard deviation about 4)."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")
    from vllm import LLM

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": vocab}))
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32"}
    llm = LLM(str(folder), max_model_len=64, **options)
    runner(llm).model.lm_head.weight.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    return llm


def runner(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@contextmanager
def without(inner: Any) -> Iterator[None]:
    """vLLM's own forward in the TopKTopPSampler."""
    ours, inner.forward = inner.forward, inner.forward.args[1]
    yield
    inner.forward = ours


def against(call: Callable[[], Any], inner: Any, pairs: int) -> tuple[float, float, float]:
    """Median seconds per call with and without fastsample, and the median of the pairwise ratios without / with."""
    taken = []
    for pair in range(pairs + 1):
        mine = seconds(call)
        with without(inner):
            theirs = seconds(call)
        if pair:  # the first call warms up
            taken.append((mine, theirs))
    return (
        statistics.median(a for a, _ in taken),
        statistics.median(b for _, b in taken),
        statistics.median(b / a for a, b in taken),
    )


def sampler_time(inner: Any, mode: dict[str, Any], rows: int, vocab: int) -> tuple[float, float, float]:
    """TopKTopPSampler on LM-like logits [rows, vocab]; each call gets a fresh copy, not timed."""
    logits = make_logits("lm", rows, vocab, torch.float32) / mode["temperature"]
    k = torch.full((rows,), mode["top_k"], dtype=torch.int32) if "top_k" in mode else None
    p = torch.full((rows,), mode["top_p"]) if "top_p" in mode else None
    copies = iter([logits.clone() for _ in range(2 * (5 + 1))])
    return against(lambda: inner(next(copies), {}, None if k is None else k.clone(), p), inner, 5)


def tokens_per_second(llm: Any, inner: Any, mode: dict[str, Any], rows: int) -> tuple[float, float, float]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, detokenize=False, **mode)
    prompts = [{"prompt_token_ids": [row + 1, 2, 3]} for row in range(rows)]
    mine, theirs, ratio = against(lambda: llm.generate(prompts, params, use_tqdm=False), inner, PAIRS)
    return rows * TOKENS / mine, rows * TOKENS / theirs, ratio


def run(vocab: int, batch_sizes: Iterable[int], out: Path | None) -> None:
    """Measure, print the table, and write it to `out` as JSON."""
    import vllm

    llm = engine(vocab)
    inner = runner(llm).sampler.topk_topp_sampler
    where = machine() | {"vllm": vllm.__version__, "date": date.today().isoformat(), "threads": fs.get_num_threads()}
    results = []
    for rows in batch_sizes:
        for name, mode in MODES.items():
            mine, theirs, ratio = sampler_time(inner, mode, rows, vocab)
            speed, their_speed, gain = tokens_per_second(llm, inner, mode, rows)
            results.append(
                {
                    "mode": name,
                    "rows": rows,
                    "sampler_ms": mine * 1e3,
                    "vllm_sampler_ms": theirs * 1e3,
                    "sampler_ratio": ratio,
                    "tokens_per_second": speed,
                    "vllm_tokens_per_second": their_speed,
                    "tokens_ratio": gain,
                }
            )
            if out is not None:  # after each, so that an interrupted run keeps its figures
                out.parent.mkdir(parents=True, exist_ok=True)
                report = {"machine": where, "vocab": vocab, "tokens": TOKENS, "pairs": PAIRS, "results": results}
                out.write_text(json.dumps(report, indent=1) + "\n")
    title = f"vLLM {vllm.__version__}, V = {vocab}, {where['isa']}, {where['threads']} thread(s), {where['cpu']}"
    table = Table("mode", "B", "sampler ms", "vLLM's", "ratio", "tokens/s", "vLLM's", "ratio", title=title)
    for r in results:
        figures = (f"{r[key]:.3g}" for key in list(r)[2:])
        table.add_row(r["mode"], str(r["rows"]), *figures)
    Console().print(table)
