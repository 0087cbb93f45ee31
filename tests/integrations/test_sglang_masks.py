"""Sampling masks of SGLang's real engine on the CPU, and several texts of one prompt."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_engine import VOCAB, Batch, ask, make_model, serve
from sglang_spec import NGRAM, serve_cpu
from stacks import Script, missing

import fastsample as fs

WHY = missing("SGLang", "sglang")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY is not None, reason=str(WHY)),
    pytest.mark.filterwarnings("default"),
]

LENGTH = 5
ASKED: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.5},
    "min_p": {"temperature": 0.7, "min_p": 0.1},
    "top_k and top_p": {"top_k": 5, "top_p": 0.9},
    "all": {"temperature": 1.5, "top_k": 60, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
    "nothing": {"temperature": 1.1},
    "greedy": {"temperature": 0.0},
    "filters": {"custom_params": {"typical_p": 0.5}},
}
PROMPTS = [[1, 5, 9], [1, 7], [3, 3, 3, 3, 3], [40, 41], [1, 5, 9, 2], [6, 6], [2, 8] * 3]
PARAMS = [{"sampling_seed": 3, **fields} for fields in ASKED.values()]
ON = [True] * len(ASKED)
SOME = [name in ("min_p", "greedy", "nothing") for name in ASKED]
SUPPORT = ["support" if at % 2 else "selected" for at in range(len(ASKED))]
WIDE = {"temperature": 5.0}
SIBLINGS = [{"sampling_seed": 7, "n": 4}]
BATCHES: dict[str, Batch] = {
    "on": ask(PROMPTS, PARAMS, LENGTH, return_sampling_mask=ON),
    "off": ask(PROMPTS, PARAMS, LENGTH),
    "some": ask(PROMPTS, PARAMS, LENGTH, return_sampling_mask=SOME),
    "logprobs": ask(PROMPTS, PARAMS, LENGTH, VOCAB, return_sampling_mask=ON, sampling_logprobs_mode=SUPPORT),
    "all greedy": ask(PROMPTS[:2], [{"temperature": 0.0}] * 2, LENGTH, return_sampling_mask=[True, False]),
    "siblings": ask(PROMPTS[:2], SIBLINGS * 2, LENGTH + 5),
    "siblings again": ask(PROMPTS[:2], SIBLINGS * 2, LENGTH + 5),
    "one of them": ask(PROMPTS[:1], [{"sampling_seed": 7}], LENGTH + 5),
}
CAPPED: dict[str, Batch] = {
    "small": ask(PROMPTS[:3], PARAMS[:3], LENGTH, return_sampling_mask=ON[:3]),
    "wide": ask(PROMPTS[:1], [WIDE], LENGTH, return_sampling_mask=[True]),
    "wide, unasked": ask(PROMPTS[:1], [WIDE], LENGTH),
}
DRAFTED: dict[str, Batch] = {
    name: ask(PROMPTS, PARAMS, 24, return_sampling_mask=ON, sampling_logprobs_mode=SUPPORT) for name in ("new", "known")
} | {"some": ask(PROMPTS, PARAMS, 24, return_sampling_mask=SOME)}
OURS = {"sampling_backend": "fastsample"}
MEMORY = {"mem_fraction_static": 0.5}  # of what is free while several engines start


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engines(model: Path) -> dict[str, Script]:
    """Engines in processes of their own, started together."""

    def run(batches: dict[str, Batch], **engine: Any) -> Script:
        return serve(model, list(batches.values()), OURS | MEMORY | engine)

    return {
        "ours": run(BATCHES),
        "capped": run(CAPPED, sampling_mask_max_tokens=100),
        "theirs": serve(model, [BATCHES["on"]], MEMORY),
        "drafts": serve_cpu(model, list(DRAFTED.values()), {**OURS, **NGRAM}),
        "plain": serve_cpu(model, list(DRAFTED.values()), OURS),
    }


def by_batch(script: Script, batches: dict[str, Batch]) -> dict[str, list[dict[str, Any]]]:
    found = iter(script.result)
    return {
        name: [next(found) for fields, _ in zip(params, prompts, strict=True) for _ in range(fields.get("n", 1))]
        for name, (prompts, params, *_) in batches.items()
    }


@pytest.fixture(scope="module")
def ours(engines: dict[str, Script]) -> dict[str, list[dict[str, Any]]]:
    return by_batch(engines["ours"], BATCHES)


def column(found: list[dict[str, Any]], name: str) -> list[Any]:
    return [request[name] for request in found]


def test_masks_are_what_the_filters_leave(ours: dict[str, list[dict[str, Any]]]) -> None:
    """Of the log-probabilities that SGLang reports at each step, after the temperature and before any filter."""
    for name, request in zip(ASKED, ours["logprobs"], strict=True):
        fields = {key: value for key, value in ASKED[name].items() if key in ("top_k", "top_p", "min_p")}
        for mask, top, token in zip(request["masks"], request["tops"], request["tokens"], strict=True):
            if name == "greedy":
                assert mask == [token]
                continue
            logprobs = torch.full((VOCAB,), -torch.inf)
            for value, ident in top:
                logprobs[ident] = value
            left = fs.filter_logits(logprobs, **fields, **ASKED[name].get("custom_params", {}), order="joint")
            assert sorted(mask) == left.isfinite().nonzero()[:, 0].tolist(), name
            assert token in mask
    sizes = {name: column(ours["logprobs"], "masks")[at] for at, name in enumerate(ASKED)}
    assert {len(mask) for mask in sizes["nothing"]} == {VOCAB}
    assert {len(mask) for mask in sizes["top_k and top_p"]} <= {1, 2, 3, 4, 5}


def test_their_probabilities_are_those_of_the_draw(ours: dict[str, list[dict[str, Any]]]) -> None:
    for mode, request in zip(SUPPORT, ours["logprobs"], strict=True):
        for mask, given, top, token in zip(
            request["masks"], request["mask_logprobs"], request["tops"], request["tokens"], strict=True
        ):
            whole = {ident: value for value, ident in top}
            wanted = torch.tensor([whole[ident] for ident in mask], dtype=torch.float64).log_softmax(0)
            at = mask.index(token)
            found = torch.tensor(given, dtype=torch.float64)
            assert len(mask) == 1 or torch.equal(wanted, wanted.sort(descending=True).values)
            torch.testing.assert_close(found, wanted if mode == "support" else wanted[at], atol=2e-5, rtol=0)


def test_asking_changes_no_token_and_nobody_else_gets_any(ours: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("on", "some", "logprobs"):
        assert column(ours[name], "tokens") == column(ours["off"], "tokens")
    assert column(ours["off"], "masks") == [None] * len(ASKED)
    wanted = [mask if asked else None for mask, asked in zip(column(ours["on"], "masks"), SOME, strict=True)]
    assert column(ours["some"], "masks") == wanted
    assert column(ours["logprobs"], "masks") == column(ours["on"], "masks")


def test_a_greedy_batch_has_masks_of_one_token(ours: dict[str, list[dict[str, Any]]]) -> None:
    first, second = ours["all greedy"]
    assert first["masks"] == [[token] for token in first["tokens"]]
    assert second["masks"] is None


def test_a_cap_that_was_given_is_kept(engines: dict[str, Script]) -> None:
    found = by_batch(engines["capped"], CAPPED)
    assert all(mask for request in found["small"] for mask in request["masks"])
    assert "exceeds --sampling-mask-max-tokens=100" in found["wide"][0]["refused"]
    assert len(found["wide, unasked"][0]["tokens"]) == LENGTH


def test_without_fastsample_sglang_wants_a_top_k(engines: dict[str, Script]) -> None:
    assert "requires top_k=1" in engines["theirs"].result[0]["refused"]


def test_drafts_bring_the_masks_that_come_without_them(engines: dict[str, Script]) -> None:
    drafted, plain = (by_batch(engines[name], DRAFTED) for name in ("drafts", "plain"))
    for name in DRAFTED:
        for field in ("tokens", "masks"):
            assert column(drafted[name], field) == column(plain[name], field), (name, field)
        for found, wanted in zip(drafted[name], plain[name], strict=True):
            for given, other in zip(found["mask_logprobs"] or (), wanted["mask_logprobs"] or (), strict=True):
                assert given == pytest.approx(other, abs=1e-5)
    steps = column(drafted["known"], "steps")
    assert min(steps) < 20  # several tokens came out at a time


# Several texts of a prompt -------------------------------------------------------------------------------------------


def test_texts_of_a_seeded_prompt_differ_and_come_again(ours: dict[str, list[dict[str, Any]]]) -> None:
    first = column(ours["siblings"], "tokens")
    assert len(first) == 8
    assert len(set(map(tuple, first))) == 8
    assert column(ours["siblings again"], "tokens") == first
    assert column(ours["one of them"], "tokens") == first[:1]


def test_their_seeds_are_those_of_fastsamples_own_candidates(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(model)
    from fastsample.inputs import pack_seeds
    from fastsample.integrations.sglang import siblings

    mode = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False))
    monkeypatch.setattr(siblings, "get_exec", lambda: mode)
    own = [siblings.seed_of(-5, at) for at in range(3)]
    assert own == [-5, *pack_seeds(-5, 3)[1:].tolist()]
    assert siblings.seed_of(None, 1) is None
    mode.deterministic.enable_deterministic_inference = True
    assert [siblings.seed_of(None, at) for at in range(3)] == [siblings.seed_of(42, at) for at in range(3)]


def test_every_text_that_is_sent_has_its_seed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(model)
    from sglang.srt.sampling.sampling_params import SamplingParams

    from fastsample.integrations.sglang import siblings

    monkeypatch.setattr(siblings, "is_chosen", lambda: True)
    sent: list[int | None] = []
    shared = [SamplingParams(n=3, sampling_seed=seed) for seed in (7, 8)] + [SamplingParams(sampling_seed=9)]

    async def handle() -> Any:
        for params in [shared[0], shared[1], shared[0], shared[2], shared[0], shared[1]]:
            request = SimpleNamespace(sampling_params=params)
            siblings.send(lambda self, request: sent.append(request.sampling_params.sampling_seed), None, request)
        yield "answer"

    async def ask_twice() -> None:
        for _ in range(2):
            assert [answer async for answer in siblings.batch(handle)] == ["answer"]

    asyncio.run(ask_twice())
    seeds = {seed: [siblings.seed_of(seed, at) for at in range(3)] for seed in (7, 8)}
    assert sent == [7, 8, seeds[7][1], 9, seeds[7][2], seeds[8][1]] * 2
    assert [params.sampling_seed for params in shared] == [7, 8, 9]
