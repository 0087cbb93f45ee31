"""What speculative decoding of SGLang takes on a CPU from its own compiled kernels, which are not on PyPI.

Written for tests, after the CUDA kernels in SGLang's `kernels/jit/csrc/speculative/tree.cuh`.
"""

from __future__ import annotations

import ctypes
from typing import Any


def verify_tree_greedy_cpu(
    predicts: Any,
    accept_index: Any,
    accept_token_num: Any,
    candidates: Any,
    retrive_index: Any,
    retrive_next_token: Any,
    retrive_next_sibling: Any,
    target_predict: Any,
) -> None:
    for request in range(len(candidates)):
        node, count = 0, 0
        accept_index[request, 0] = retrive_index[request, 0]
        for step in range(1, accept_index.shape[1]):
            child = retrive_next_token[request, node]
            while child != -1 and candidates[request, child] != target_predict[request, node]:
                child = retrive_next_sibling[request, child]
            if child == -1:
                break
            predicts[retrive_index[request, node]] = target_predict[request, node]
            accept_index[request, step] = retrive_index[request, child]
            node, count = child, count + 1
        predicts[retrive_index[request, node]] = target_predict[request, node]
        accept_token_num[request] = count


def assign_extend_cache_locs_cpu(
    req_pool_indices: Any, req_to_token: Any, start: Any, end: Any, out: Any, pool_len: int
) -> None:
    at = 0
    for request, first, past in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        out[at : at + past - first] = req_to_token[request, first:past]
        at += past - first


def assign_req_to_token_pool_cpu(
    req_pool_indices: Any, req_to_token: Any, start: Any, end: Any, out_cache_loc: Any, pool_len: int
) -> None:
    at = 0
    for request, first, past in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        req_to_token[request, first:past] = out_cache_loc[at : at + past - first]
        at += past - first


def fill_accept_out_cache_loc_cpu(accept_index: Any, out_cache_loc: Any, accept_out_cache_loc: Any) -> None:
    found = out_cache_loc[accept_index.flatten()[accept_index.flatten() >= 0].long()]
    accept_out_cache_loc[: len(found)] = found


def copy_all_layer_kv_cache_cpu(data_ptrs: Any, strides: Any, targets: Any, sources: Any) -> None:
    for start, size in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        found = [ctypes.string_at(start + size * place, size) for place in sources.tolist()]
        for place, content in zip(targets.tolist(), found, strict=True):
            ctypes.memmove(start + size * place, content, size)


def __getattr__(name: str) -> Any:
    """Whatever else SGLang imports; it may not be called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{name}")

    return missing
