"""The adapters behind bench/peers.py: each wraps a peer's sampler as a step from logits to token.

If a peer destroys its input, the copy made before each step is not timed (a step with `seconds`, see bench/timing.py).
"""

from __future__ import annotations

import ctypes
import json
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.modes import Mode, extra_inputs
from bench.timing import Step

Tensor = torch.Tensor


class PrivateCopy:
    """A step that may destroy its logits: each run gets a fresh copy, which is not timed."""

    def __init__(self, logits: Tensor, step: Callable[[Tensor], Any]) -> None:
        self.logits, self.step = logits, step

    def __call__(self) -> Any:
        return self.step(self.logits.clone())

    def seconds(self) -> float:
        copy = self.logits.clone()
        start = time.perf_counter()
        self.step(copy)
        return time.perf_counter() - start


# torch alone ----------------------------------------------------------------------------------------------------------


def draw(probs: Tensor) -> Tensor:
    """One sample per row. On a GPU: multinomial's exponential race without its wait for the device."""
    if probs.is_cuda:
        return (probs / torch.empty_like(probs).exponential_()).argmax(-1)
    return probs.multinomial(1)[:, 0]


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Hugging Face's nucleus: in ascending order, drop tokens up to a cumulative probability of 1 - p."""
    values, order = logits.sort(-1)
    gone = values.softmax(-1).cumsum(-1) <= 1 - p
    gone[:, -1] = False
    return logits.masked_fill(gone.scatter(1, order, gone), -torch.inf)


def penalised(logits: Tensor, fields: dict[str, Any], prompt: Tensor, output: Tensor) -> Tensor:
    ids = torch.cat([prompt, output], 1)
    own = logits.gather(1, ids)
    theta = fields["repetition_penalty"]
    logits = logits.scatter(1, ids, torch.where(own > 0, own / theta, own * theta))
    counts = torch.zeros_like(logits).scatter_add_(1, output, torch.ones_like(output, dtype=logits.dtype))
    return logits - fields["frequency_penalty"] * counts - fields["presence_penalty"] * (counts > 0)


def torch_step(mode: Mode, logits: Tensor) -> Step:
    """The mode as one would write it in torch, with top-k first so that little is left for the other filters."""
    fields = mode.fields
    extras = extra_inputs(mode, logits)

    def step() -> Tensor:
        if fields["temperature"] == 0:
            return logits.argmax(-1)
        x = logits.float()
        if mode.extras:
            x = penalised(x, fields, extras["prompt_ids"], extras["output_ids"])
        x, chosen = x / fields["temperature"], None
        if fields.get("top_k"):
            x, chosen = x.topk(fields["top_k"])
        if fields.get("top_p"):
            x = keep_top_p(x, fields["top_p"])
        probs = x.softmax(-1)
        if fields.get("min_p"):
            probs = probs.where(probs >= fields["min_p"] * probs.amax(-1, keepdim=True), 0)
        token = draw(probs)
        return token if chosen is None else chosen.gather(1, token[:, None])[:, 0]

    return step


# Hugging Face ---------------------------------------------------------------------------------------------------------


def hugging_face(mode: Mode, logits: Tensor) -> Step:
    from transformers.generation import logits_process as lp

    f = mode.fields
    if f["temperature"] == 0:
        return lambda: logits.argmax(-1)
    warpers = lp.LogitsProcessorList([lp.TemperatureLogitsWarper(f["temperature"])])
    for name, warper in (
        ("top_k", lp.TopKLogitsWarper),
        ("top_p", lp.TopPLogitsWarper),
        ("min_p", lp.MinPLogitsWarper),
        ("typical_p", lp.TypicalLogitsWarper),
        ("epsilon_cutoff", lp.EpsilonLogitsWarper),
        ("eta_cutoff", lp.EtaLogitsWarper),
    ):
        if name in f:
            warpers.append(warper(f[name]))
    ids = torch.zeros(logits.shape[0], 1, dtype=torch.int64)
    return lambda: warpers(ids, logits).softmax(-1).multinomial(1)[:, 0]


# onnxruntime-genai ----------------------------------------------------------------------------------------------------


@cache
def stub_model(vocab: int) -> Any:
    """A model whose logits are zeros [B, S, V], which set_logits replaces."""
    import onnx
    import onnxruntime_genai as og
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Shape", ["input_ids"], ["ids_shape"]),
        helper.make_node("Concat", ["ids_shape", "vocab"], ["shape"], axis=0),
        helper.make_node("ConstantOfShape", ["shape"], ["logits"]),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", vocab])
    size = helper.make_tensor("vocab", TensorProto.INT64, [1], [vocab])
    graph = helper.make_graph(nodes, "stub", [ids], [logits], [size])
    decoder = {
        "filename": "model.onnx",
        "session_options": {"provider_options": []},
        "num_hidden_layers": 0,
        "inputs": {"input_ids": "input_ids"},
        "outputs": {"logits": "logits"},
    } | dict.fromkeys(("hidden_size", "head_size", "num_attention_heads", "num_key_value_heads"), 1)
    config = {"type": "llama", "vocab_size": vocab, "context_length": 64, "bos_token_id": 0, "eos_token_id": []}
    with tempfile.TemporaryDirectory() as folder:
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, f"{folder}/model.onnx")
        whole = {"model": {**config, "pad_token_id": 0, "decoder": decoder}, "search": {"max_length": 64}}
        Path(folder, "genai_config.json").write_text(json.dumps(whole))
        return og.Model(folder)


class OnnxRuntime:
    """set_logits and generate_next_token; the stub model's own step before them is not timed."""

    def __init__(self, mode: Mode, logits: Tensor) -> None:
        import onnxruntime_genai as og

        f = mode.fields
        self.logits = logits.numpy()
        self.first = np.zeros((logits.shape[0], 1), dtype=np.int32)
        self.model = stub_model(logits.shape[1])
        params = og.GeneratorParams(self.model)
        # With top_k = 0 it draws past top_p's limit (the gate notices), and without filters it takes longer.
        sampling = {
            "temperature": f["temperature"],
            "top_k": f.get("top_k", logits.shape[1]),
            "top_p": f.get("top_p", 1.0),
        }
        greedy = f["temperature"] == 0
        options = {"do_sample": False} if greedy else {"do_sample": True, "random_seed": 11, **sampling}
        params.set_search_options(batch_size=logits.shape[0], max_length=64, **options)
        self.generator = og.Generator(self.model, params)

    def seconds(self) -> float:
        self.generator.rewind_to(0)
        self.generator.append_tokens(self.first)
        start = time.perf_counter()
        self.generator.set_logits(self.logits)
        self.generator.generate_next_token()
        return time.perf_counter() - start

    def __call__(self) -> Any:
        self.seconds()
        return self.generator.get_next_tokens()


# llama.cpp ------------------------------------------------------------------------------------------------------------


class LlamaCpp:
    """llama.cpp's sampler chain over raw logits, row by row; with `fill`, building the candidate array is timed too."""

    def __init__(self, mode: Mode, logits: Tensor, fill: bool) -> None:
        import llama_cpp as lc
        from llama_chain import ENTRY

        self.fill = fill
        self.rows = logits.numpy()
        self.ids = np.arange(logits.shape[1], dtype=np.int32)
        self.buffer = np.zeros(logits.shape[1], dtype=ENTRY)
        self.data = self.buffer.ctypes.data_as(ctypes.POINTER(lc.llama_token_data))
        self.size = logits.shape[1]
        self.array = lc.llama_token_data_array(data=self.data, size=self.size, selected=-1, sorted=False)
        self.apply, self.reference = lc.llama_sampler_apply, ctypes.byref(self.array)
        ids = extra_inputs(mode, logits).get("output_ids")
        histories = [[]] if ids is None else ids.tolist()
        self.chains = [chain_of(mode, history, self.size) for history in histories]

    def run(self) -> tuple[list[int], float]:
        tokens, spent = [], 0.0
        for i, row in enumerate(self.rows):
            chain = self.chains[i % len(self.chains)].chain
            start = time.perf_counter()
            self.buffer["id"], self.buffer["logit"] = self.ids, row
            self.array.data, self.array.size = self.data, self.size  # XTC moves the one, others shrink the other
            self.array.selected, self.array.sorted = -1, False
            filled = time.perf_counter()
            self.apply(chain, self.reference)
            tokens.append(self.array.data[self.array.selected].id)
            spent += time.perf_counter() - (start if self.fill else filled)
        return tokens, spent

    def seconds(self) -> float:
        return self.run()[1]

    def __call__(self) -> list[int]:
        return self.run()[0]


def chain_of(mode: Mode, history: list[int], vocab: int) -> Any:
    """A chain with this history. Top-k is first: what is kept is the same, and the others see only k candidates."""
    import llama_cpp as lc
    from llama_chain import Chain, dry, parts, vocabulary

    f = mode.fields
    if f["temperature"] == 0:
        return Chain([lc.llama_sampler_init_greedy()])
    last = f.get("order") == "temperature_last"
    filters = ("typical_p", "top_p", "min_p") if last else ("temperature", "top_p", "min_p", "typical_p")
    names = ("top_n_sigma", "top_k", *filters, "xtc_probability", *(["temperature"] if last else []))
    made = parts(f, 11)
    dry_first = [dry(f, len(history), vocabulary(vocab), False)] if "dry_multiplier" in f else []
    drawn = lc.llama_sampler_init_dist(12)  # another seed than XTC's
    chain = Chain([*dry_first, *(made[name]() for name in names if name in f), drawn])
    chain.accept(history)
    return chain


# mlx, vLLM, SGLang ----------------------------------------------------------------------------------------------------


def mlx(mode: Mode, logits: Tensor) -> Step:
    import mlx.core as mx
    from mlx_lm import sample_utils as su

    f = mode.fields
    x = mx.array(logits.numpy())
    mx.eval(x)

    def step() -> Any:
        y = x
        if f["temperature"] > 0:
            y = y * (1 / f["temperature"])
            y = y - mx.logsumexp(y, axis=-1, keepdims=True)
            y = su.apply_top_k(y, f["top_k"]) if "top_k" in f else y
            y = su.apply_top_p(y, f["top_p"]) if "top_p" in f else y
            y = su.apply_min_p(y, f["min_p"]) if "min_p" in f else y
        token = su.greedy_sampler(y) if f["temperature"] == 0 else su.categorical_sampling(y, 1.0)
        mx.eval(token)
        return token

    return step


def vllm(mode: Mode, logits: Tensor) -> Step:
    from vllm.platforms import current_platform
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    current_platform.import_kernels()
    f = mode.fields
    if f["temperature"] == 0:
        return lambda: logits.argmax(-1)
    rows = logits.shape[0]
    k = torch.full((rows,), f["top_k"], dtype=torch.int32, device=logits.device) if "top_k" in f else None
    p = torch.full((rows,), f["top_p"], device=logits.device) if "top_p" in f else None
    temperature = torch.full((rows, 1), f["temperature"], device=logits.device)
    sampler = TopKTopPSampler()
    forward = sampler.forward_native if logits.is_cuda else sampler.forward
    return PrivateCopy(logits.float(), lambda x: forward(x.div_(temperature), {}, k, p)[0])


def sglang(mode: Mode, logits: Tensor) -> Step:
    from sglang.srt.layers import sampler as ss

    f = mode.fields
    if f["temperature"] == 0:
        return lambda: logits.argmax(-1)
    rows, vocab = logits.shape
    ks = torch.full((rows,), f.get("top_k", vocab), dtype=torch.int32)
    ps, ms = torch.full((rows,), f.get("top_p", 1.0)), torch.full((rows,), f.get("min_p", 0.0))
    positions = torch.zeros(rows, dtype=torch.int64)

    def step(x: Tensor) -> Tensor:
        probs = x.div_(f["temperature"]).softmax(-1)
        if not {"top_k", "top_p", "min_p"} & f.keys():
            return ss.sampling_from_probs_torch(probs)
        return ss.top_k_top_p_min_p_sampling_from_probs_torch(
            probs, ks, ps, ms, "min_p" in f, None, positions, max_top_k=f.get("top_k", vocab)
        )

    return PrivateCopy(logits.float(), step)


# FlashInfer -----------------------------------------------------------------------------------------------------------


def flashinfer(mode: Mode, logits: Tensor) -> Step:
    import flashinfer.sampling as fi

    f = mode.fields
    if f.get("min_p"):
        return lambda: fi.min_p_sampling_from_probs(fi.softmax(logits.float(), f["temperature"]), f["min_p"])
    if f.get("top_k"):
        return lambda: fi.top_k_top_p_sampling_from_logits(
            logits.float() / f["temperature"], f["top_k"], f["top_p"], filter_apply_order="top_k_first"
        )
    if f.get("top_p"):
        return lambda: fi.top_p_sampling_from_probs(fi.softmax(logits.float(), f["temperature"]), f["top_p"])
    return lambda: fi.sampling_from_logits(logits.float() / f["temperature"])


def flashinfer_cake(mode: Mode, logits: Tensor) -> Step:
    import flashinfer.sampling as fi

    f = mode.fields
    return lambda: fi.cake_top_k_top_p_sampling_from_probs(
        fi.softmax(logits.float(), f["temperature"]), f["top_k"], f["top_p"]
    )
