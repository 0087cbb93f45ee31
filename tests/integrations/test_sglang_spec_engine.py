"""SGLang's NGRAM speculation on the CPU with `--sampling-backend fastsample`: the texts are those without drafts.

The CPU kernels of SGLang are not on PyPI: Python of the tests is in their place (tests/support/sglang_cpu). A row of
logits is made the same to the bit alone and among others there, since a CPU's matrix products are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sglang_engine import Batch, ask, make_model
from sglang_spec import NGRAM, serve_cpu
from stacks import Script, missing

WHY = missing("SGLang", "sglang")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY is not None, reason=str(WHY)),
    pytest.mark.filterwarnings("default"),
]

LENGTH = 32
GREEDY = {"temperature": 0.0}
ASKED: dict[str, dict[str, Any]] = {
    "temperature": {"sampling_seed": 1, "temperature": 0.3},
    "top_k": {"sampling_seed": 2, "temperature": 0.5, "top_k": 5},
    "top_p, min_p": {"sampling_seed": 2**40, "top_p": 0.7, "min_p": 0.02},
    "repetition": {"sampling_seed": -4, "temperature": 0.6, "repetition_penalty": 1.3},
    "frequency, presence": {"sampling_seed": 5, "temperature": 0.4, "frequency_penalty": 0.37, "presence_penalty": 0.3},
    "negative": {"sampling_seed": 6, "temperature": 0.2, "frequency_penalty": -1.1, "repetition_penalty": 0.8},
    "bias": {"sampling_seed": 7, "temperature": 0.5, "logit_bias": {"3": 4.0, "9": 5.0}, "top_k": 20},
    "greedy": GREEDY,
    "greedy, penalties": {**GREEDY, "frequency_penalty": 0.8, "repetition_penalty": 1.1},
    "xtc": {"sampling_seed": 8, "custom_params": {"xtc_probability": 0.5, "xtc_threshold": 0.02}},
    "dry": {
        "sampling_seed": 9,
        "temperature": 0.4,
        "custom_params": {"dry_multiplier": 2.0, "dry_allowed_length": 1, "no_repeat_ngram_size": 3},
    },
}
NAMES = list(ASKED)
PROMPTS = [
    [1, 5, 9] * 3,
    [3] * 6,
    [7, 8],
    [4, 2] * 4,
    [9] * 3,
    [6, 6],
    [40, 41, 40],
    [1, 7] * 2,
    [5],
    [2, 2],
    [8, 9] * 3,
]
# What has been generated is what NGRAM drafts from: the second time all is known but what follows.
BATCHES: dict[str, Batch] = {
    "new": ask(PROMPTS, list(ASKED.values()), LENGTH),
    "known": ask(PROMPTS, list(ASKED.values()), LENGTH + 6),
    **{f"alone {name}": ask([prompt], [ASKED[name]], LENGTH) for name, prompt in zip(NAMES, PROMPTS, strict=True)},
    # The same prompts with other seeds: drafts of the texts above, many of them wrong. Requests come and go.
    "others": ask(
        PROMPTS * 2,
        [{**row, "sampling_seed": 100 + i, "max_new_tokens": 6 + 3 * i} for i, row in enumerate([*ASKED.values()] * 2)],
        LENGTH,
    ),
    "with logprobs": ask(PROMPTS, list(ASKED.values()), LENGTH, 3),
}
OURS = {"sampling_backend": "fastsample"}
FREE: Batch = ask([[7, 8]] * 4, [{"temperature": 0.9}] * 4, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engines(model: Path) -> dict[str, Script]:
    """Engines in processes of their own, started together. The one without drafts has a schedule that runs ahead."""
    batches, first = list(BATCHES.values()), [BATCHES["new"]]
    return {
        "drafts": serve_cpu(model, [*batches, FREE, FREE], {**OURS, **NGRAM}),
        "plain": serve_cpu(model, batches, OURS),
        "off": serve_cpu(model, first, {**OURS, **NGRAM}, FASTSAMPLE_SGLANG="0"),
    }


def by_batch(script: Script) -> dict[str, list[dict[str, Any]]]:
    found = iter(script.result)
    return {name: [next(found) for _ in batch[0]] for name, batch in BATCHES.items()}


@pytest.fixture(scope="module")
def drafts(engines: dict[str, Script]) -> dict[str, list[dict[str, Any]]]:
    return by_batch(engines["drafts"])


@pytest.fixture(scope="module")
def plain(engines: dict[str, Script]) -> dict[str, list[dict[str, Any]]]:
    return by_batch(engines["plain"])


def tokens(outputs: list[dict[str, Any]]) -> list[list[int]]:
    return [output["tokens"] for output in outputs]


@pytest.mark.parametrize("name", BATCHES)
def test_texts_are_those_without_drafts(drafts: Any, plain: Any, name: str) -> None:
    wrong = [
        row
        for row, pair in enumerate(zip(*map(tokens, (drafts[name], plain[name])), strict=True))
        if len({*map(tuple, pair)}) > 1
    ]
    assert wrong == []


def test_texts_are_the_same_alone_and_in_any_batch(drafts: Any) -> None:
    assert tokens(drafts["new"]) == [tokens(drafts[f"alone {name}"])[0] for name in NAMES]
    assert [text[:LENGTH] for text in tokens(drafts["known"])] == tokens(drafts["new"])
    assert len({*map(tuple, tokens(drafts["new"]))}) == len(NAMES)


def test_some_drafts_are_accepted_and_some_are_not(drafts: Any) -> None:
    """A step gives a token of its own and the accepted ones of five drafts; the first token takes no step."""
    for name, least, most in (("new", 0, 0.5), ("known", 1.5, 5), ("others", 0.02, 3)):
        steps = sum(output["steps"] for output in drafts[name])
        accepted = sum(len(output["tokens"]) - 1 for output in drafts[name]) - steps
        assert least <= accepted / steps <= most, (name, accepted, steps)


def test_logprobs_are_those_without_drafts(drafts: Any, plain: Any) -> None:
    for mine, other in zip(drafts["with logprobs"], plain["with logprobs"], strict=True):
        assert mine["tokens"] == other["tokens"]
        assert mine["own"] == other["own"]


def test_requests_without_a_seed_differ(engines: dict[str, Script]) -> None:
    texts = [tuple(output["tokens"]) for output in engines["drafts"].result[-8:]]
    assert len(set(texts)) == len(texts)


def test_it_says_once_who_verifies(engines: dict[str, Script], drafts: Any) -> None:
    assert engines["drafts"].log.count("fastsample: drafts are verified by drawing") == 1


def test_with_0_drafts_are_verified_by_sglang(engines: dict[str, Script], drafts: Any) -> None:
    """Which takes the best token on a CPU, whatever was asked for."""
    found = dict(zip(NAMES, tokens(engines["off"].result), strict=True))
    assert "fastsample:" not in engines["off"].log
    assert found["greedy"] == tokens(drafts["new"])[NAMES.index("greedy")]
    assert found["temperature"] != tokens(drafts["new"])[NAMES.index("temperature")]
