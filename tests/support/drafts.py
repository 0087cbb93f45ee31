"""Drafts to verify, and the text that plain decoding gives instead.

python drafts.py RESULTS.pt    # Triton's interpreter on all of them, in a process of its own
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cases import PARAMS, PENALTY_SETS, Case

import fastsample as fs

Tensor = torch.Tensor
OFFSET = 2**64 - 2  # goes round within a block
KEPT = {"kept": "bitmask", "kept_mass": True, "entropy": True}
OF_ROWS = ("tokens", "kept_count", "kept_bitmask", "log_kept_mass", "entropy")
OF_LOGPROBS = ("logprobs", "ranks", "top_ids", "top_logprobs")
OUTPUTS = ("num_accepted", "status", *OF_ROWS, *OF_LOGPROBS, "path")


@dataclass(frozen=True)
class Block:
    """Rows of B requests, [B, K + 1, V] each with its parameters; half of the drafts are right for a while."""

    params: str
    vocab: int = 130
    requests: int = 4
    drafts: int = 3
    dtype: str = "f32"
    extra: str | None = None
    maker: str = "lm"
    tree: bool = False

    def build(self) -> tuple[Tensor, dict[str, Any]]:
        """The logits, and arguments by request; without drafts."""
        rows = self.requests * (self.drafts + 1)
        inputs = Case(self.maker, self.params, self.vocab, self.dtype, self.extra, rows).build()
        given = dict(inputs.kwargs)
        for name in ("prompt_ids", "output_ids", "dry_breakers"):
            if name in given and len(given[name]) == rows:
                given[name] = given[name][: self.requests]
        fields = PARAMS[self.params](self.vocab, self.requests)
        given = {name: value for name, value in given.items() if name not in fs.SamplingParams.__dataclass_fields__}
        return inputs.logits.view(self.requests, self.drafts + 1, self.vocab), {**given, **fields}

    def of_row(self, given: dict[str, Any], request: int, row: int, before: list[int]) -> dict[str, Any]:
        """The arguments of `fastsample.sample` for one row, after these drafts."""
        at = request * (self.drafts + 1) + row
        own: dict[str, Any] = {"seed": [self.seeds[request]], "on_invalid": "flag"}
        for name, value in given.items():
            if name in fs.SamplingParams.__dataclass_fields__:
                own[name] = [value[request]] if isinstance(value, list) else value
            elif name == "bitmask":
                own[name] = value[at : at + 1] if value.ndim == 2 and len(value) > 1 else value
            elif name == "bias":
                own[name] = of_bias(value, at)
            elif name == "dry_breakers" and not isinstance(value, Tensor):
                own[name] = value
            else:
                own[name] = [list(map(int, value[request]))]
        own["output_ids"] = [own.get("output_ids", [[]])[0] + before]
        return own

    @property
    def seeds(self) -> list[int]:
        return [2**63 + 5 * request for request in range(self.requests)]

    def text(self, request: int, ids: list[int], top: int = 0) -> dict[str, Any]:
        """What comes out for a request, by drawing one token after the other."""
        logits, given = self.build()
        found: dict[str, list[Any]] = {name: [] for name in OUTPUTS}
        for row in range(self.drafts + 1):
            own = self.of_row(given, request, row, ids[:row])
            more = KEPT | ({"logprobs": "processed", "top_logprobs": top} if top else {})
            offset = (OFFSET + row) % 2**64
            drawn = fs.sample(logits[request, row][None], offset=offset, backend="reference", **own, **more)
            found["status"] = [int(drawn.status)]
            for name in OF_ROWS + (OF_LOGPROBS if top else ()):
                found[name].append(getattr(drawn, name)[0])
            token = int(drawn.tokens)
            if row == self.drafts or token != ids[row] or token < 0:
                return found | {"num_accepted": [row]}
        raise AssertionError

    def drafted(self) -> Tensor:
        """Drafts that are right for a number of rows that differs from request to request."""
        pick = random.Random(self.params)
        table = []
        for request in range(self.requests):
            ids: list[int] = []
            right = (request - 1) % (self.drafts + 1) if request else self.drafts
            for row in range(self.drafts):
                wrong = pick.choice([-1, self.vocab, pick.randrange(self.vocab)])
                tokens = self.text(request, [*ids, *[-1] * self.drafts])["tokens"] if row < right else []
                ids.append(int(tokens[row]) if len(tokens) > row else wrong)
            table.append(ids)
        return torch.tensor(table, dtype=torch.int64).view(self.requests, self.drafts)

    def ask(self, backend: str, ids: Tensor, top: int = 3) -> dict[str, Tensor]:
        logits, given = self.build()
        more = KEPT | ({"logprobs": "processed", "top_logprobs": min(top, self.vocab)} if top else {})
        out = fs.verify(
            logits, ids, seed=self.seeds, offset=OFFSET, backend=backend, on_invalid="flag", **given, **more
        )
        return {name: value for name in OUTPUTS if (value := getattr(out, name)) is not None}


def of_bias(bias: Any, row: int) -> Any:
    if isinstance(bias, list):
        return [bias[row]]
    if isinstance(bias, tuple):
        row_ptr, ids, values = bias
        begin, end = int(row_ptr[row]), int(row_ptr[row + 1])
        return torch.tensor([0, end - begin]), ids[begin:end], values[begin:end]
    return bias


def _blocks() -> Iterator[Block]:
    kinds = ("f32", "bf16", "f16")
    for p, params in enumerate(name for name in PARAMS if "rows" not in name):
        extra = ("ids", "repeats", "ids_output", "repeats_output")[p % 4] if params in PENALTY_SETS else None
        yield Block(
            params, (130, 65, 33)[p % 3], 4, (3, 1, 4)[p % 3], kinds[p % 3], extra, ("lm", "flat", "ties")[p % 3]
        )
    for p, extra in enumerate(("mask", "mask_short", "bias", "bias_shared", "bias_tensors", "ids_lists", "everything")):
        yield Block("penalties", 97, 3, 2, kinds[p % 3], extra)
    yield Block("all-hf", 1, 2, 2)
    yield Block("all-hf", 300, 5, 0)


BLOCKS = {f"{b.params}-{b.maker}-{b.extra}-{b.vocab}-{b.drafts}": b for b in _blocks()}


def main() -> None:
    from triton_interpreter import patch_once

    torch.set_num_threads(1)
    patch_once()
    torch.save({name: BLOCKS[name].ask("triton", ids, 0) for name, ids in torch.load(sys.argv[1]).items()}, sys.argv[2])


if __name__ == "__main__":
    main()
