"""Models for the examples beside this file, made on the spot and offline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

SHIPPED = Path(str(files("fastsample") / "models" / "tiny-gpt2"))
Array = np.ndarray[Any, Any]

# llama.cpp ------------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_f": "output_norm",
    "wpe": "position_embd",
    "wte": "token_embd",
}
"""Modules of transformers' GPT-2, and what a GGUF file calls them."""


def write_shipped_gguf(path: Path) -> None:
    """The GPT-2 that ships with fastsample as a GGUF file, in float32."""
    from safetensors.numpy import load_file

    tokenizer = json.loads((SHIPPED / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    merges = [" ".join(pair) for pair in tokenizer["merges"]]
    weights = load_file(SHIPPED / "model.safetensors").items()
    config = json.loads((SHIPPED / "config.json").read_text())
    write_gguf(path, config, tokens, merges, ((name.removeprefix("transformer."), w) for name, w in weights))


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tokens: Sequence[str],
    merges: Sequence[str],
    weights: Iterable[tuple[str, Array]],
) -> None:
    """A GPT-2 of transformers as a GGUF file in float32, whose first two tokens are end of text and padding."""
    import gguf

    out = gguf.GGUFWriter(path, "gpt2")
    out.add_context_length(config["n_positions"])
    out.add_embedding_length(config["n_embd"])
    out.add_feed_forward_length(4 * config["n_embd"])
    out.add_block_count(config["n_layer"])
    out.add_head_count(config["n_head"])
    out.add_layer_norm_eps(1e-5)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    out.add_token_merges(merges)
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
    out.add_add_bos_token(False)
    for name, tensor in weights:
        turned = name.startswith("h.") and tensor.ndim == 2  # transformers' Conv1D has its weights the other way round
        out.add_tensor(_gguf_name(name), np.ascontiguousarray(tensor.T if turned else tensor, dtype=np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if not module.startswith("h."):
        return f"{GGUF_NAMES[module]}.{kind}"
    _, layer, inner = module.split(".", 2)
    return f"blk.{layer}.{GGUF_NAMES[inner]}.{kind}"


# ONNX Runtime GenAI ---------------------------------------------------------------------------------------------------


def bigrams() -> Array:
    """Log-frequencies [128, 128] of each next byte in fastsample's licence; byte 0 ends a text."""
    text = distribution("fastsample").read_text("licenses/LICENSE") or ""
    ids = np.frombuffer(" ".join(text.split()).encode(), dtype=np.uint8)
    counts = np.full((128, 128), 1e-3, dtype=np.float32)
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    return np.log(counts)


def write_onnx(folder: Path, table: Array, head: Array | None = None, length: int = 1024, threads: int = 0) -> None:
    """A model whose next logits are the last id's row of `table` [V, H], times `head` [H, V] if there is one."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    vocab = len(table)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["logits" if head is None else "hidden"])]
    weights = [numpy_helper.from_array(table, "table")]
    if head is not None:
        nodes.append(helper.make_node("MatMul", ["hidden", "head"], ["logits"]))
        weights.append(numpy_helper.from_array(head, "head"))
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", vocab])
    graph = helper.make_graph(nodes, "bigrams", [ids], [logits], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    decoder = {
        "filename": "model.onnx",
        "session_options": {"provider_options": []} | ({"intra_op_num_threads": threads} if threads else {}),
        "num_hidden_layers": 0,  # no past: the last id says all
        "inputs": {"input_ids": "input_ids"},
        "outputs": {"logits": "logits"},
    } | dict.fromkeys(("hidden_size", "head_size", "num_attention_heads", "num_key_value_heads"), 1)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = {"type": "llama", "vocab_size": vocab, "context_length": length, "decoder": decoder, **tokens}
    (folder / "genai_config.json").write_text(json.dumps({"model": config, "search": {"max_length": length}}))


# MLX-LM ---------------------------------------------------------------------------------------------------------------


def shipped_mlx() -> tuple[Any, Any]:
    """The GPT-2 that ships with fastsample in MLX, in float32, and its tokenizer.

    `mlx_lm.load` reads a folder as it is, where the config has MLX-LM's names and the weights have its prefixes.
    """
    import mlx.core as mx
    from mlx_lm.models import gpt2
    from mlx_lm.tokenizer_utils import load

    config = json.loads((SHIPPED / "config.json").read_text())
    model = gpt2.Model(gpt2.ModelArgs.from_dict(config | {"n_ctx": config["n_positions"]}))
    weights = mx.load(str(SHIPPED / "model.safetensors"))
    weights = {name.removeprefix("transformer."): w.astype(mx.float32) for name, w in weights.items()}
    model.load_weights(list(model.sanitize(weights).items()))
    return model.eval(), load(SHIPPED, eos_token_ids=config["eos_token_id"])
