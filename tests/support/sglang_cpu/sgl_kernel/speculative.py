"""See __init__.py."""

from __future__ import annotations

from typing import Any

import torch


def reconstruct_indices_from_tree_mask(
    tree_mask: Any,
    verified_seq_len: Any,
    positions: Any,
    retrieve_index: Any,
    retrieve_next_token: Any,
    retrieve_next_sibling: Any,
    batch_size: int,
    nodes: int,
) -> None:
    above = tree_mask.view(batch_size, nodes, nodes).tril(-1)
    positions.copy_((above.sum(2) + verified_seq_len[:, None]).flatten())
    retrieve_index.copy_(torch.arange(batch_size * nodes).view(batch_size, nodes))
    retrieve_next_token.fill_(-1)
    retrieve_next_sibling.fill_(-1)
    for request in range(batch_size):
        newest: dict[int, int] = {}
        for node in range(nodes):
            parents = above[request, node].nonzero()
            if not len(parents):
                continue
            parent = int(parents[-1])
            links, at = (retrieve_next_sibling, newest[parent]) if parent in newest else (retrieve_next_token, parent)
            links[request, at] = newest[parent] = node
