"""`python -m bench speculate`: the time to verify drafts, beside sampling the same rows and beside transformers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.utils import _speculative_sampling

import fastsample as fs
from bench.modes import make_logits
from bench.record import machine
from bench.timing import Step, duration, factor, in_turns, three_digits

MODES: dict[str, dict[str, Any]] = {
    "T": {"temperature": 0.8},
    "k50 p.95": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "p.95": {"temperature": 0.8, "top_p": 0.95},
}


class Drafted:
    """B requests of K drafts, half of which are the target's own tokens."""

    def __init__(self, requests: int, drafts: int, vocab: int, mode: dict[str, Any]) -> None:
        self.logits = make_logits("lm", requests * (drafts + 1), vocab, torch.float32).view(requests, drafts + 1, vocab)
        self.mode, self.drafts = mode, drafts
        self.seed, self.offset = torch.arange(requests), torch.arange(drafts + 1)
        own = {"seed": self.seed[:, None].expand(-1, drafts + 1), "offset": self.offset.expand(requests, -1)}
        self.ids = fs.sample(self.logits, **own, **mode).tokens[:, :drafts].contiguous()
        self.ids[::2, drafts // 2 :] = 0
        self.rows = {name: value.reshape(-1) for name, value in own.items()}

    def verified(self) -> fs.VerifyOutput:
        return fs.verify(self.logits, self.ids, seed=self.seed, **self.mode)

    def sampled(self) -> fs.SampleOutput:
        """The rows alone, as if there were no drafts."""
        return fs.sample(self.logits.flatten(0, 1), **self.rows, **self.mode)

    def transformers(self) -> Step:
        """Its warpers for each row, then its rejection sampling; one request at a time, which is all it takes."""
        warpers = LogitsProcessorList([TemperatureLogitsWarper(self.mode["temperature"])])
        if "top_k" in self.mode:
            warpers.append(TopKLogitsWarper(self.mode["top_k"]))
        if "top_p" in self.mode:
            warpers.append(TopPLogitsWarper(self.mode["top_p"]))
        one_hot = torch.full((1, self.drafts, self.logits.shape[2]), -torch.inf)

        def step() -> None:
            for row, ids in zip(self.logits, self.ids[:, None], strict=True):
                warped = warpers(ids, row.clone())
                drafted = one_hot.scatter(2, ids[..., None], 0.0)
                _speculative_sampling(ids, drafted, self.drafts, warped[None])

        return step


def run(vocab: int, batches: Iterable[int], drafts: int, threads: int, seconds: float) -> None:
    """Alternate ours and each other one in one process; medians and their ratio."""
    torch.set_num_threads(threads)
    fs.set_num_threads(threads)
    where = machine()
    title = f"V = {vocab:,}, K = {drafts}, {where['isa']}, {threads} thread(s), {where['cpu']}"
    names = ("B", "mode", "verify", "sample the rows", "verify / sample", "transformers", "times ours")
    table = Table(*names, title=title)
    for batch in batches:
        for name, mode in MODES.items():
            own = Drafted(batch, drafts, vocab, mode)
            found = own.verified().tokens[:, 0]
            if not torch.equal(found, own.sampled().tokens.view(batch, -1)[:, 0]):
                raise RuntimeError("verification and sampling differ in the first token: no figure")
            verify, sample = medians(own.verified, own.sampled, seconds)
            again, theirs = medians(own.verified, own.transformers(), seconds)
            shown = (duration(verify), duration(sample), factor(verify / sample), duration(theirs))
            table.add_row(str(batch), name, *shown, factor(theirs / again))
    Console(width=120).print(table)


def medians(ours: Step, theirs: Step, budget: float) -> tuple[float, float]:
    """Microseconds of both, in turns."""
    first, second = (
        three_digits(1e6 * statistics.median(t)) for t in zip(*in_turns(ours, theirs, budget), strict=True)
    )
    return first, second
