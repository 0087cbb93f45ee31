"""Drafts that were drawn at random, and what the contract makes of them, in Python's integers and floats.

python rejections.py RESULTS.pt    # Triton's interpreter on some of them, in a process of its own
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cases import PARAMS, PENALTY_SETS
from conformance import law
from drafts import OFFSET
from drafts import Block as Drafted

import fastsample as fs
from fastsample.reference import uniform60

Tensor = torch.Tensor
Masses = list[int]
COIN, RESIDUAL = 3, 4  # the contract's purposes


@dataclass(frozen=True)
class Block(Drafted):
    """Requests of up to K drafts, what these were drawn from, and a rule."""

    rule: str = "chain"
    probs: bool = False  # what the drafts were drawn from is given as probabilities
    packed: bool = False  # rows of requests of different lengths, one behind the other
    broken: bool = False  # some rows are no laws

    def counts(self) -> list[int]:
        return [max(0, self.drafts - request % 3) if self.packed else self.drafts for request in range(self.requests)]

    def proposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The target's logits, what the drafts were drawn from, and the drafts; some are no tokens, or anything."""
        logits = self.build()[0].clone()
        g = torch.Generator().manual_seed(self.vocab + self.drafts)
        own = logits[:, : self.drafts].float()
        draft = (own + torch.randn(own.shape, generator=g)) / 1.5
        p = draft.softmax(-1)
        ids = torch.zeros(self.requests, self.drafts, dtype=torch.int64)
        if self.drafts:
            ids = torch.multinomial(p.flatten(0, 1), 1, generator=g).view(ids.shape)
        pick = random.Random(self.params + self.rule)
        for request in range(self.requests):
            for at in range(self.drafts):
                if pick.random() < 0.15:
                    ids[request, at] = pick.choice([-1, self.vocab, pick.randrange(self.vocab)])
        if self.broken:
            logits[1, 1, 3], draft[0, 0, 5], p[0, 0, 5] = torch.nan, torch.inf, -1.0
            logits[2] = -torch.inf
        return logits, (p if self.probs else draft).to(logits.dtype), ids

    def ask(self, backend: str) -> dict[str, Tensor]:  # type: ignore[override]
        logits, draft, ids = self.proposed()
        given, more = self.build()[1], {}
        if self.packed:
            counts = self.counts()
            logits = torch.cat([logits[b, : n + 1] for b, n in enumerate(counts)])
            draft, more = torch.cat([draft[b, :n] for b, n in enumerate(counts)]), {"num_drafts": counts}
        more["draft_probs" if self.probs else "draft_logits"] = draft
        common = {"seed": self.seeds, "offset": OFFSET, "logprobs": "processed", "on_invalid": "flag"}
        out = fs.verify(logits, ids, rule=self.rule, backend=backend, **common, **given, **more)
        return {name: getattr(out, name) for name in ("tokens", "num_accepted", "status", "logprobs")}


# The contract --------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """The law at one position: the target's, and the one that its draft was drawn from (None where there is none)."""

    p: Masses
    status: int
    q: Masses | None
    seed: int
    offset: int

    def scaled(self, j: int) -> int:
        """D of a token."""
        if self.q is None:
            return 0
        return math.trunc(float(self.q[j]) * (float(sum(self.p)) / float(sum(self.q))))

    def left(self, r: float) -> Masses:
        return [max(0, math.trunc(r * float(w)) - self.scaled(j)) for j, w in enumerate(self.p)]

    def u60(self, purpose: int, index: int) -> int:
        words = (torch.tensor([w - 2**64 if w >= 2**63 else w]) for w in (self.seed, self.offset))
        return int(uniform60(*words, torch.tensor([index]), purpose))

    def draw(self, masses: Masses, purpose: int, index: int) -> int:
        masses = masses if any(masses) else self.p
        threshold, running = self.u60(purpose, index) * sum(masses) >> 60, 0
        for j, w in enumerate(masses):
            running += w
            if running > threshold:
                return j
        raise AssertionError


def chain(rows: list[Row], ids: list[int]) -> tuple[int, float]:
    """How many drafts are accepted."""
    for i, (row, token) in enumerate(zip(rows, ids, strict=False)):
        if row.status or row.q is None:
            return i, 1.0
        if row.u60(COIN, i) * row.scaled(token) >> 60 >= row.p[token]:
            return i, 1.0
    return len(ids), 1.0


def block(rows: list[Row], ids: list[int]) -> tuple[int, float]:
    """How many drafts are accepted, and r there."""
    end = next((i for i, row in enumerate(rows) if row.status), len(ids))
    r = [1.0]
    for row, token in zip(rows, ids[:end], strict=False):
        p = 0 if row.q is None else row.p[token]
        if p == 0 or r[-1] == 0:
            r.append(0.0)
            continue
        q = float(row.q[token]) * (float(sum(row.p)) / float(sum(row.q)))
        r.append(min(1.0, r[-1] * (float(p) / q if q else math.inf)))
    accepted = 0
    for i in range(1, end + 1):
        h = r[i]
        if i < end:
            s = float(sum(rows[i].left(r[i])))
            h = s / (s + (1 - r[i]) * float(sum(rows[i].p))) if s else 0.0
        if float(rows[i - 1].u60(COIN, i - 1)) * 2.0**-60 < h:
            accepted = i
    return accepted, r[accepted]


def rows_of(case: Block, request: int) -> list[Row]:
    logits, draft, ids = case.proposed()
    given, count = case.build()[1], case.counts()[request]
    before, rows = ids[request].tolist(), []
    for i in range(count + 1):
        offset = (OFFSET + i) % 2**64
        own = case.of_row(given, request, i, before[:i]) | {"offset": offset}
        own.pop("on_invalid")
        p = law(logits[request, i][None], "reference", **own)
        q = None
        if i < count and 0 <= before[i] < case.vocab:
            found = law(draft[request, i][None], "reference", **(for_probs(own) if case.probs else own))
            q = None if int(found["law.status"]) else found["law.masses"][0].tolist()
        rows.append(Row(p["law.masses"][0].tolist(), int(p["law.status"]), q, case.seeds[request], offset))
    return rows


def for_probs(own: dict[str, Any]) -> dict[str, Any]:
    """The filters alone: the rest is in the probabilities."""
    gone = ("repetition_penalty", "frequency_penalty", "presence_penalty", "bias", "prompt_ids", "output_ids")
    kept = {name: value for name, value in own.items() if name not in gone}
    temperature = torch.as_tensor(kept.get("temperature", 1.0)).flatten()
    return kept | {"temperature": [0.0 if t < 1e-5 else 1.0 for t in temperature], "input": "probs"}


def expected(case: Block) -> tuple[list[list[int]], list[int], list[int], Tensor]:
    """Tokens, num_accepted, status and log-probabilities."""
    tokens, counts, statuses = [], [], []
    logprobs = torch.full((case.requests, case.drafts + 1), torch.nan)
    ids = case.proposed()[2].tolist()
    for request, count in enumerate(case.counts()):
        rows, drafts = rows_of(case, request), ids[request][:count]
        accepted, r = (chain if case.rule == "chain" else block)(rows, drafts)
        row, text = rows[accepted], drafts[:accepted]
        if not row.status:
            plain = accepted == count
            text = [*text, row.draw(row.p, 0, 0) if plain else row.draw(row.left(r), RESIDUAL, accepted)]
        for i, token in enumerate(text):
            logprobs[request, i] = math.log(rows[i].p[token] / sum(rows[i].p)) if rows[i].p[token] else -math.inf
        tokens.append(text + [-1] * (case.drafts + 1 - len(text)))
        counts.append(accepted)
        statuses.append(row.status)
    return tokens, counts, statuses, logprobs


def _blocks() -> Iterator[Block]:
    kinds, sizes = ("f32", "bf16", "f16"), (130, 65, 33)
    of_probs = ("plain", "greedy", "k50", "p.9", "m.05", "k50-p.9", "all-hf", "top_p+min_p", "top_a=0.6", "p_less=True")
    for p, params in enumerate(name for name in PARAMS if "rows" not in name):
        extra = ("ids", "repeats", "ids_output", "repeats_output")[p % 4] if params in PENALTY_SETS else None
        shape = (params, sizes[p % 3], 4, (3, 1, 4)[p % 3], kinds[p % 3], extra, ("lm", "flat", "ties")[p % 3])
        if p % 3 == 0 or params in of_probs:
            yield Block(*shape, rule=("chain", "block")[p // 3 % 2], packed=p % 2 == 0)
    for p, params in enumerate(of_probs):
        for rule in ("chain", "block"):
            yield Block(
                params, sizes[p % 3], 4, 3, kinds[p % 3], None, "flat", rule=rule, probs=True, packed=p % 2 == 1
            )
    for p, extra in enumerate(("mask", "mask_short", "bias", "bias_shared", "bias_tensors", "ids_lists", "everything")):
        yield Block("penalties", 97, 3, 2, kinds[p % 3], extra, rule=("chain", "block")[p % 2])
    for rule in ("chain", "block"):
        yield Block("k50-p.9", 90, 5, 4, "f32", None, "flat", rule=rule, broken=True)
        yield Block("plain", 90, 5, 4, "f32", None, "flat", rule=rule, broken=True, probs=True)
        yield Block("all-hf", 1, 2, 2, rule=rule)
        yield Block("all-hf", 300, 5, 0, rule=rule)
        yield Block("plain", 40, 20, 5, maker="flat", rule=rule)


BLOCKS = {
    f"{b.rule}-{b.params}-{b.maker}-{b.extra}-{b.vocab}-{b.drafts}{'-probs' * b.probs}{'-broken' * b.broken}": b
    for b in _blocks()
}


def main() -> None:
    from triton_interpreter import patch_once

    torch.set_num_threads(1)
    patch_once()
    torch.save({name: BLOCKS[name].ask("triton") for name in sys.argv[2:]}, sys.argv[1])


if __name__ == "__main__":
    main()
