"""Histories for stage 3's history edits, and what an engine makes of them.

python histories.py RESULTS.pt    # Triton's interpreter on the small ones, in a process of its own
"""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import BELOW_ONE, cycle, pack_bits
from conformance import named

import fastsample as fs

Tensor = torch.Tensor
PADDING = (-1, 2**40, -(2**62))
FLT_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Batch:
    """Rows with a history each. The first `prompt` ids of a history are the prompt's."""

    name: str
    vocab: int
    histories: Sequence[Sequence[int]]
    fields: dict[str, Any]
    breakers: Any = None
    prompt: int = 3
    dtype: torch.dtype = torch.float32
    edit: Any = None  # changes the logits
    more: dict[str, Any] = field(default_factory=dict)  # other inputs

    @property
    def arguments(self) -> dict[str, Any]:
        parts = {"prompt_ids": [h[: self.prompt] for h in self.histories]}
        parts["output_ids"] = [h[self.prompt :] for h in self.histories]
        given: dict[str, Any] = {name: ids for name, ids in parts.items() if any(map(len, ids))}
        if self.breakers is not None:
            given["dry_breakers"] = self.breakers
        return {**given, **self.more, **self.fields, "on_invalid": "flag"}

    def logits(self) -> Tensor:
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        x = torch.randn(len(self.histories), self.vocab, generator=g) * 3
        if self.edit is not None:
            self.edit(x)
        return x.to(self.dtype)

    def ask(self, backend: str) -> dict[str, Tensor]:
        """The edited logits, and what is drawn from them."""
        x, arguments = self.logits(), self.arguments
        found = named(fs.sample(x, seed=1, num_samples=9, backend=backend, **arguments))
        return found | {"filter_logits": fs.filter_logits(x, backend=backend, **arguments)}


def turns(tokens: Sequence[int], length: int) -> list[int]:
    return [tokens[i % len(tokens)] for i in range(length)]


def drawn(seed: int, tokens: int, length: int) -> list[int]:
    pick = random.Random(seed)
    return [pick.randrange(tokens) for _ in range(length)]


DRY = {"dry_multiplier": 0.8, "dry_allowed_length": 1}
PHRASE = [3, 1, 4, 1, 5, 3, 1, 4, 2, 3, 1, 4, 1, 5, 3, 1, 4]


def _small() -> Iterator[Batch]:
    n = len(PHRASE)
    yield Batch("every range", 9, [PHRASE] * (n + 3), {**DRY, "dry_range": list(range(n + 3))})
    yield Batch("every allowed length", 9, [PHRASE] * (n + 3), {**DRY, "dry_allowed_length": list(range(1, n + 4))})
    yield Batch("every n", 9, [PHRASE] * (n + 4), {"no_repeat_ngram_size": list(range(n + 4))})
    yield Batch("every n of one token", 9, [[2] * 9] * 13, {"no_repeat_ngram_size": list(range(13))})
    yield Batch("every breaker", 9, [PHRASE] * 10, DRY, [[i] for i in range(9)] + [[]])
    yield Batch("breakers of all rows", 9, [PHRASE[i:] for i in range(n)], DRY, [2, -1, 2**40, 9, 2])
    yield Batch("breakers, ranges and n", 9, [PHRASE] * 12, {
        **DRY, "dry_range": cycle(12, 0, 4, 8, 20), "no_repeat_ngram_size": cycle(12, 0, 3, 2)
    }, cycle(12, [5], [2, 7], []))  # fmt: skip
    bases = (1.0, 1 + 2.0**-23, 1.0001, 1.5, 1.75, 2.0, 1e19, FLT_MAX)
    lengths = [[6] * (2 + 40 * (i % 4)) for i in range(8 * 4)]
    yield Batch("bases", 9, lengths, {**DRY, "dry_base": [base for base in bases for _ in range(4)]})
    multipliers = (1e-45, 1e-30, 0.8, 1e30, FLT_MAX)
    yield Batch("multipliers", 9, [[6] * 30] * 5, {**DRY, "dry_multiplier": multipliers})
    yield Batch("one token in all", 1, [[0] * 5, [0], [], [0] * 5], {
        "dry_multiplier": cycle(4, 0.8, 0.8, 0.8, FLT_MAX), "no_repeat_ngram_size": cycle(4, 0, 1, 1, 0)
    })  # fmt: skip
    yield Batch("nothing left", 2, [[0, 1, 0], [1, 1, 1], [0, 1, 1]], {"no_repeat_ngram_size": 1})
    yield Batch("short", 9, [[], [4], [4, 4], [4, 5], [4, 5, 4]] * 2, {
        **DRY, "no_repeat_ngram_size": cycle(10, 2, 2, 2, 2, 2, 0)
    })  # fmt: skip
    yield Batch("no prompt", 9, [PHRASE, PHRASE[3:]], {**DRY, "no_repeat_ngram_size": [0, 2]}, prompt=0)
    yield Batch("prompt alone", 9, [PHRASE, PHRASE[3:]], {**DRY, "no_repeat_ngram_size": [0, 2]}, prompt=40)
    yield Batch("off", 9, [PHRASE] * 3, {"dry_base": 3.0, "dry_range": 4, "temperature": [1.0, 0.0, 0.5]})

    def invalid(x: Tensor) -> None:
        x[0:3, 1], x[3:6, 1], x[6:9, 1] = torch.nan, torch.inf, -torch.inf

    both = {"no_repeat_ngram_size": cycle(9, 2, 0, 1), "dry_multiplier": cycle(9, 0.8, FLT_MAX, 0.0)}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"invalid logits {dtype}"
        yield Batch(name, 700, [[3, 3, 1, 3, 3]] * 9, {**both, "dry_allowed_length": 1}, dtype=dtype, edit=invalid)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield _mixed(f"everything {dtype}", dtype)


def _mixed(name: str, dtype: torch.dtype) -> Batch:
    """Rows that differ in everything, with padding anywhere, masks, bias and penalties over the same tokens."""
    rows, vocab = 24, 600
    pick = random.Random(name)
    histories = []
    for row in range(rows):
        ids = [7 * t for t in drawn(row, 2 + row % 5, 10 + 3 * row)]
        for at in range(row % 7):
            ids.insert((at * 13) % (len(ids) + 1), pick.choice((*PADDING, vocab)))
        histories.append(ids)
    allowed = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(5)) < 0.8
    fields = {
        "temperature": cycle(rows, 1.0, 0.0, 0.6, 2.0),
        "dry_multiplier": cycle(rows, 0.8, 0.0, 2.5),
        "dry_base": cycle(rows, 1.75, 1.0, 1.1, 4.0),
        "dry_allowed_length": cycle(rows, 1, 2, 3, 2, 1),
        "dry_range": cycle(rows, 0, 0, 15, 40),
        "no_repeat_ngram_size": cycle(rows, 0, 3, 0, 0, 2, 0, 0),
        "repetition_penalty": cycle(rows, 1.0, 1.3),
        "frequency_penalty": cycle(rows, 0.0, 0.0, 0.3),
        "presence_penalty": cycle(rows, 0.0, 0.0, 0.0, -0.2),
        "top_p": cycle(rows, 1.0, BELOW_ONE, 0.9),
    }
    more = {"bitmask": pack_bits(allowed), "bias": {0: 2.0, 7: -1.0, 14: 0.5, 300: 3.0}}
    return Batch(name, vocab, histories, fields, cycle(rows, [], [7], [14, 21]), 8, dtype, more=more)


def _large() -> Iterator[Batch]:
    n, dry = 4096, {"dry_multiplier": 0.8, "dry_base": [1.75, 1.001]}
    yield Batch("one token 4096 times", 50, [[7] * n, [7] * 1300], dry, prompt=1000)
    yield Batch("two in turns", 50, [turns([7, 8], n), turns([7, 8], 1999)], {**dry, "no_repeat_ngram_size": [0, 40]})
    periods = [3, 10, 31, 32, 33, 64, 65, 100]
    histories = [turns(range(period), 700) for period in periods]
    fields = {"dry_multiplier": 0.8, "dry_base": cycle(8, 1.75, 1.001), "no_repeat_ngram_size": cycle(8, 0, 0, 0, 50)}
    yield Batch("periods", 200, histories, fields, prompt=333)
    wide = [drawn(1, 500, n), drawn(2, 3, n), drawn(3, 2000, n), [x for t in range(n // 2) for x in (0, t)] + [0]]
    most = list(range(0, 2000, 2))
    yield Batch("random", 70000, wide, {**DRY, "no_repeat_ngram_size": [0, 0, 1, 3]}, prompt=2000)
    yield Batch("a thousand breakers", 5000, wide, DRY, most, prompt=2000)
    far = [[t + 199000 * (t % 2) for t in drawn(1, 900, 300)] * 2]
    yield Batch("breakers far apart", 200000, far, DRY, [far[0][250], far[0][200] + 1, far[0][100]], prompt=500)


SMALL = {batch.name: batch for batch in _small()}
LARGE = {batch.name: batch for batch in _large()}


def main() -> None:
    from triton_interpreter import patch_once

    torch.set_num_threads(1)
    patch_once()
    torch.save({name: batch.ask("triton") for name, batch in SMALL.items()}, sys.argv[1])


if __name__ == "__main__":
    main()
