"""A plugin for SGLang in tests: a row of logits is the same to the bit, whatever else is computed with it.

Matrix products on a CPU sum in another order for several rows than for one. So does attention for several queries; and
SGLang's `torch_native` knows no trees. Here each row, and each node of a tree, is computed by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    backend = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend"
    HookRegistry.register(backend, attention, HookType.AROUND)
    for name in ("torch.matmul", "torch.nn.functional.linear"):
        HookRegistry.register(name, product, HookType.AROUND)


def product(theirs: Callable[..., Any], rows: Any, *args: Any, **kwargs: Any) -> Any:
    if rows.ndim != 2 or len(rows) == 1:
        return theirs(rows, *args, **kwargs)
    return torch.cat([theirs(row[None], *args, **kwargs) for row in rows])


def attention(
    theirs: Callable[..., Any], self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True
) -> Any:
    if not batch.forward_mode.is_target_verify():
        return theirs(self, q, k, v, layer, batch, save_kv_cache)
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, self.swa_out_cache_loc), k, v)
    keys, values = (
        get(layer.layer_id) for get in (self.token_to_kv_pool.get_key_buffer, self.token_to_kv_pool.get_value_buffer)
    )
    heads, size = layer.tp_q_head_num, layer.qk_head_dim
    nodes = batch.spec_info.draft_token_num
    mask = batch.spec_info.custom_mask.view(-1, nodes, nodes)
    queries, found = q.view(-1, nodes, heads, size), torch.empty_like(q).view(-1, nodes, heads, size)
    places = batch.out_cache_loc.view(-1, nodes)
    for request, (row, length) in enumerate(zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True)):
        before = self.req_to_token_pool.req_to_token[row, :length].long()
        for node in range(nodes):
            at = torch.cat([before, places[request, : node + 1][mask[request, node, : node + 1]]])
            one = queries[request, node][None, :, None]
            seen = (cache[at].movedim(0, 1)[None] for cache in (keys, values))
            found[request, node] = scaled_dot_product_attention(
                one, *seen, enable_gqa=heads != layer.tp_k_head_num, scale=layer.scaling
            )[0, :, 0]
    return found.view_as(q)
