"""SGLang's speculative decoding on a CPU, and trees of drafts as SGLang has them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang_engine import Batch, serve
from stacks import Script

CPU_KERNELS = Path(__file__).parent / "sglang_cpu"
NGRAM = {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 6}


def serve_cpu(model: Path, batches: list[Batch], engine: dict[str, Any], **environment: str) -> Script:
    """SGLang's CPU engine with kernels of Python, and logits that do not depend on what else is computed with them."""
    path = os.pathsep.join([str(model), str(CPU_KERNELS)])
    given = {"mem_fraction_static": 0.5, "log_level": "info", **engine}
    return serve(model, batches, given, PYTHONPATH=path, SGLANG_USE_CPU_ENGINE="1", **environment)


def kernels() -> Any:
    """Those of Python, under another name than SGLang's, which other tests must not find."""
    spec = importlib.util.spec_from_file_location("sglang_cpu_kernels", CPU_KERNELS / "sgl_kernel" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def linked(tokens: torch.Tensor, parents: list[list[int]], positions: list[int], depth: int) -> SimpleNamespace:
    """A verify_input of SGLang: trees with these tokens [B, n] and lower parents; -1 for nodes in no tree."""
    child, sibling, offsets = torch.full_like(tokens, -1), torch.full_like(tokens, -1), torch.zeros_like(tokens)
    requests, nodes = tokens.shape
    for request, above in enumerate(parents):
        offsets[request] = positions[request]
        newest: dict[int, int] = {}
        for node, parent in enumerate(above):
            if parent < 0:
                continue
            links, at = (sibling, newest[parent]) if parent in newest else (child, parent)
            links[request, at] = newest[parent] = node
            offsets[request, node] = offsets[request, parent] + 1
    return SimpleNamespace(
        draft_token_num=nodes,
        draft_token=tokens.flatten(),
        positions=offsets.flatten(),
        retrieve_index=torch.arange(requests * nodes).view(requests, nodes),
        retrieve_next_token=child,
        retrieve_next_sibling=sibling,
        max_tree_depth=depth,
        tree_topk=-1,
    )
