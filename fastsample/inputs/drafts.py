"""Drafts: which row of logits belongs to which drafted token of which request, and what that row is given."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from fastsample.arrays import as_array, from_numpy
from fastsample.checks import INTEGERS, is_list, require_dense, require_tensor
from fastsample.inputs.bias import Bias, select_bias, tensors_of
from fastsample.inputs.ids import pack_breakers, pack_token_ids, row_of_ids
from fastsample.inputs.rows import Rows


@dataclass(frozen=True)
class Drafts:
    """K drafts of each of B requests, each followed by a row, and a row before them: N rows in all."""

    ids: torch.Tensor  # int64 [B, K], -1 past a request's last draft
    request: torch.Tensor  # int64 [N], each row's request, and
    position: torch.Tensor  # int64 [N], how many drafts come before it; both in the order of the logits
    dense: bool  # the rows are [B, K + 1], where those past a request's last draft count for nothing
    known: np.ndarray[Any, Any] | None  # int64 [B], each request's number of drafts where not all have K

    @property
    def shape(self) -> tuple[int, int]:
        """[B, K + 1]: as many tokens may come out."""
        return self.ids.shape[0], self.ids.shape[1] + 1

    @property
    def in_order(self) -> bool:
        """Whether the rows of each request follow one another, K + 1 of each."""
        return self.dense

    @property
    def counts(self) -> np.ndarray[Any, Any]:
        """Each request's number of drafts, int64 [B]."""
        return np.full(*self.ids.shape) if self.known is None else self.known

    def before_rows(self) -> torch.Tensor:
        """The drafts that come before each row, int64 [N, K], padded with -1."""
        later = torch.arange(self.ids.shape[1], device=self.ids.device) >= self.position[:, None]
        return self.ids[self.request].masked_fill(later, -1)

    def rows(self) -> torch.Tensor:
        """The row of each position, int64 [B, K + 1]; any row past a request's last."""
        requests, width = self.shape
        if self.dense:
            return dense_places(requests, width, self.ids.device)[2]
        return packed_places(self.counts + 1, width, self.ids.device)[2]

    def count(self) -> torch.Tensor:
        """`counts` on the device; where they are all K, nothing is copied to it."""
        requests, most = self.ids.shape
        if (self.counts == most).all():
            return torch.full((requests,), most, dtype=torch.int64, device=self.ids.device)
        return torch.from_numpy(self.counts).to(self.ids.device)

    def by_request(self, values: torch.Tensor, empty: float) -> torch.Tensor:
        """What the rows have [N, ...] as [B, K + 1, ...], `empty` where there is no row."""
        if self.dense:
            return values.view(*self.shape, *values.shape[1:])
        found = values.new_full((*self.shape, *values.shape[1:]), empty)
        found[self.request, self.position] = values
        return found


def pack_drafts(logits: torch.Tensor, draft_ids: Any, num_drafts: Any) -> Drafts:
    """Drafts of logits [B, K + 1, V], or packed [N, V] with `num_drafts`, checked."""
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits: expected a tensor or an array, got {type(logits).__name__}")
    if logits.ndim not in (2, 3):
        raise ValueError(f"logits: expected [B, K + 1, V], or [N, V] with num_drafts, got shape {tuple(logits.shape)}")
    if logits.ndim == 3 and logits.shape[1] < 1:
        raise ValueError(f"logits: expected [B, K + 1, V], with K + 1 of 1 or more, got {tuple(logits.shape)}")
    if logits.ndim == 2 and num_drafts is None:
        raise ValueError("num_drafts: expected the number of drafts of each request, since the logits are [N, V]")
    ids = _table("draft_ids", draft_ids, num_drafts, logits.device)
    requests, most = ids.shape
    if logits.ndim == 3 and (requests, most + 1) != tuple(logits.shape[:2]):
        wanted = f"[{logits.shape[0]}, {logits.shape[1] - 1}] (a row of logits for each draft and one more)"
        raise ValueError(f"draft_ids: expected shape {wanted}, got {list(ids.shape)}")
    if num_drafts is None and not isinstance(draft_ids, torch.Tensor) and _is_ragged(draft_ids):
        num_drafts = [len(own) for own in draft_ids]
    if num_drafts is None:
        return Drafts(ids, *_dense(requests, most + 1, logits.device), True, None)
    counts = _counts(num_drafts, requests, most)
    past = np.arange(most) >= counts[:, None]
    ids = ids.masked_fill(torch.from_numpy(past).to(ids.device), -1)
    if logits.ndim == 3:
        return Drafts(ids, *_dense(requests, most + 1, logits.device), True, counts)
    if len(logits) != (rows := int(counts.sum()) + requests):
        raise ValueError(f"logits: expected {rows} rows, num_drafts + 1 of each request, got {len(logits)}")
    request, position, _ = packed_places(counts + 1, most + 1, ids.device)
    return Drafts(ids, request, position, False, counts)


Places: TypeAlias = "tuple[torch.Tensor, ...]"


def packed_places(counts: np.ndarray[Any, Any], most: int, device: torch.device) -> Places:
    """Of rows one request behind the other: each row's request and position, and each position's row [B, most].

    A position past a request's last row has any row.
    """
    starts = np.cumsum(counts) - counts
    request = np.repeat(np.arange(len(counts)), counts)
    position = np.arange(len(request)) - starts[request]
    row = (starts[:, None] + np.arange(most)).clip(0, max(len(request) - 1, 0))
    return tuple(torch.from_numpy(part).to(device) for part in (request, position, row))


def dense_places(requests: int, rows: int, device: torch.device) -> Places:
    """The same of rows [B, rows]. Not to be written to."""
    request, position = _dense(requests, rows, device)
    return request, position, torch.arange(requests * rows, device=device).view(requests, rows)


def _is_ragged(draft_ids: Any) -> bool:
    """Whether drafts are given as a list per request."""
    return is_list(draft_ids) and all(is_list(own) or getattr(own, "ndim", 0) == 1 for own in draft_ids)


@dataclass(frozen=True)
class Tree(Drafts):
    """Drafts as nodes of a tree, each with a row; `ids` are those of all but node 0, the root."""

    tokens: torch.Tensor  # int64 [B, n]
    parents: torch.Tensor  # int64 [B, n], -1 of the root and of what is not in the tree
    ancestors: torch.Tensor  # int64 [B, n, n]: a node, its parent and so on; 0 from the root on

    @property
    def in_order(self) -> bool:
        return False

    def before_rows(self) -> torch.Tensor:
        """The drafts from the root to each node's own, int64 [B * n, n], with padding before them."""
        requests, nodes = self.tokens.shape
        tokens = self.tokens[:, None].expand(-1, nodes, -1).gather(2, self.ancestors)
        return tokens.masked_fill(self.ancestors == 0, -1).flip(2).view(requests * nodes, nodes)


def pack_tree(logits: torch.Tensor, draft_ids: Any, parents: Any) -> Tree:
    """A tree of drafts of logits [B, n, V], checked; parents on a GPU are not."""
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits: expected a tensor or an array, got {type(logits).__name__}")
    if logits.ndim != 3 or logits.shape[1] < 1:
        raise ValueError(f"logits: expected [B, n, V], a row for each node, got shape {tuple(logits.shape)}")
    (requests, nodes), device = logits.shape[:2], logits.device
    tables = []
    for name, value in (("draft_ids", draft_ids), ("parents", parents)):
        table = _table(name, value, None, device)
        if table.shape != (requests, nodes):
            raise ValueError(f"{name}: expected shape [{requests}, {nodes}], one per node, got {list(table.shape)}")
        tables.append(table)
    tokens, above = tables
    index = torch.arange(nodes, device=device)
    if device.type == "cpu":
        for b, v in ((above >= index) | (above < -1))[:, 1:].nonzero()[:1].tolist():
            raise ValueError(f"parents[{b}, {v + 1}] = {int(above[b, v + 1])}: expected a lower node, or -1 for none")
    above = above.masked_fill((above >= index) | (index == 0), -1).clamp(min=-1)
    at, line = index.expand(requests, nodes), []
    for _ in range(nodes):
        line.append(at)
        at = above.clamp(min=0).gather(1, at)
    ancestors = torch.stack(line, 2)
    depth = (ancestors > 0).sum(2)
    request, _ = _dense(requests, nodes, device)
    return Tree(tokens[:, 1:], request, depth.view(-1), True, None, tokens, above, ancestors)


@lru_cache(maxsize=64)
def _dense(requests: int, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Request and position of each of [B, K + 1] rows. Not to be written to."""
    at = torch.arange(requests * rows, device=device)
    return at // rows, at % rows


def _table(name: str, given: Any, num_drafts: Any, device: torch.device) -> torch.Tensor:
    """Integers as int64 [B, K]. A list of lists, or those of all requests in one [sum(num_drafts)], are padded."""
    if not isinstance(given, torch.Tensor):  # the usual type first: the others take longer to tell
        given = as_array(name, given)
        if isinstance(given, np.ndarray) and given.dtype.kind in "iu":
            given = from_numpy(name, given).to(device)
        elif is_list(given) and not (len(given) and isinstance(given[0], numbers.Number)):
            return pack_token_ids(name, given, torch.empty(len(given), 0, device=device))
        elif is_list(given):
            given = row_of_ids(name, given, None, device).to(device)
        else:
            raise TypeError(f"{name}: expected integers [B, K] or a list per request, got {type(given).__name__}")
    require_tensor(name, given, device)
    if given.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected integers, got {given.dtype}")
    ids: torch.Tensor = given.to(torch.int64).resolve_neg()
    if ids.ndim == 2:
        return ids.contiguous()
    if ids.ndim != 1 or num_drafts is None:
        raise ValueError(f"{name}: expected shape [B, K], got {list(ids.shape)}")
    counts = _counts(num_drafts, None, None)
    if int(counts.sum()) != len(ids):
        raise ValueError(f"{name}: expected {int(counts.sum())} ids, as num_drafts says, got {len(ids)}")
    past = np.arange(counts.max(initial=0)) >= counts[:, None]
    table = ids.new_full(past.shape, -1)
    table[torch.from_numpy(~past).to(device)] = ids
    return table


def _counts(num_drafts: Any, requests: int | None, most: int | None) -> np.ndarray[Any, Any]:
    """The number of drafts of each request, int64 [B]. Those on a GPU are waited for."""
    num_drafts = as_array("num_drafts", num_drafts)
    if isinstance(num_drafts, torch.Tensor):
        require_dense("num_drafts", num_drafts)
        num_drafts = num_drafts.cpu().numpy()
    counts = np.asarray(num_drafts)
    if counts.dtype.kind not in "iu" and counts.size:
        raise TypeError(f"num_drafts: expected integers, one per request, got {counts.dtype}")
    if counts.ndim != 1 or (requests is not None and len(counts) != requests):
        wanted = "B" if requests is None else requests
        raise ValueError(f"num_drafts: expected shape [{wanted}], one per request, got {list(counts.shape)}")
    counts = counts.astype(np.int64)
    for request in np.flatnonzero((counts < 0) | (counts > (2**31 if most is None else most)))[:1]:
        wanted = "0 or more" if most is None else f"0 to {most} (the columns of draft_ids)"
        raise ValueError(f"num_drafts = {counts[request]} (request {request}): expected {wanted}")
    return counts


# What a row is given, where a request was given it -------------------------------------------------------------------


def spread(name: str, value: Any, drafts: Drafts) -> Any:
    """A value per row [N], of one per request [B] or per row, [N] or [B, K + 1]; anything else as it is."""
    requests, rows = drafts.ids.shape[0], len(drafts.request)
    value = as_array(name, value)
    if isinstance(value, np.ndarray) and value.ndim:
        value = list(value) if value.dtype.kind == "O" else from_numpy(name, value)
    if isinstance(value, torch.Tensor) and value.ndim:
        require_dense(name, value)
        if drafts.dense and value.ndim > 1 and tuple(value.shape[:2]) == drafts.shape:
            return value.flatten(0, 1)
        return value[drafts.request.to(value.device)] if len(value) == requests != rows else value
    if is_list(value) and len(value) == requests != rows:
        return [value[r] for r in drafts.request.tolist()]
    return value


def spread_bias(bias: Any, drafts: Drafts) -> Any:
    """A bias per row, of one per request or per row, in any of the forms that there are."""
    requests, rows = drafts.ids.shape[0], len(drafts.request)
    if isinstance(bias, Bias):
        bias = bias.tensors
    bias = tensors_of(bias)
    if not isinstance(bias, tuple) or not all(isinstance(part, torch.Tensor) for part in bias):
        return spread("bias", bias, drafts)
    if len(bias) != 3 or len(bias[0]) != requests + 1 or requests == rows:
        return bias
    return select_bias(bias, drafts.request)


class History(NamedTuple):
    """What the rows of drafts are conditioned on: a list of each request, and the drafts before each row."""

    drafts: Drafts
    prompt_ids: Any
    output_ids: Any
    dry_breakers: Any

    def attach(self, rows: Rows) -> None:
        """Check the lists and add them to the rows, which share those of their request."""
        like = self.drafts.ids  # has a row per request, and the device
        for name in ("prompt_ids", "output_ids"):
            if (given := getattr(self, name)) is not None:
                setattr(rows, name, pack_token_ids(name, given, like))
        if self.dry_breakers is not None:
            rows.breakers = pack_breakers(self.dry_breakers, like)
        rows.drafted_ids = self.drafts.before_rows() if like.shape[1] else None
        rows.requests = self.drafts.request
