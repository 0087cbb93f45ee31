"""Trees of drafts as SGLang has them."""

from __future__ import annotations

from typing import Any

import torch


class Tree:
    """The drafts of a batch as SGLang has them, and what is before each node."""

    def __init__(self, given: Any, requests: int) -> None:
        self.nodes: int = given.draft_token_num
        self.tokens: torch.Tensor = given.draft_token.view(requests, self.nodes)
        self.offsets: torch.Tensor = given.positions
        self._links = given.retrieve_next_token, given.retrieve_next_sibling
        self._way: torch.Tensor | None = None

    def of_nodes(self, values: torch.Tensor) -> torch.Tensor:
        """A value per node, of one per request."""
        return values.repeat_interleave(self.nodes, 0)

    @property
    def way(self) -> torch.Tensor:
        """float32 [B, n, n]: 1 where the second node is on the way from the root to the first; 0 for the root."""
        if self._way is None:
            self._way = self._ways()
        return self._way

    def _ways(self) -> torch.Tensor:
        child, sibling = self._links
        nodes, rounds = self.nodes, (self.nodes - 1).bit_length()
        index = torch.arange(nodes, device=child.device).expand(child.shape)
        # A node is the first child of its parent, or linked to the sibling before it. -1 is written to a last column.
        first = torch.cat([index, index[:, :1]], 1).scatter_(1, torch.where(sibling < 0, nodes, sibling), index)
        above = first.new_zeros(first.shape).scatter_(1, torch.where(child < 0, nodes, child), index)
        first = first[:, :nodes]
        for _ in range(rounds):
            first = first.gather(1, first)
        above = above[:, :nodes].gather(1, first)
        way = torch.zeros(*child.shape, nodes, device=child.device).scatter_(2, above[:, :, None], 1)
        way.diagonal(dim1=1, dim2=2).fill_(1)
        for _ in range(rounds):
            way = (way @ way).clamp_(max=1)
        way[:, :, 0] = 0
        return way
