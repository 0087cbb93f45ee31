"""SGLang's `custom_params`: filters that it lacks, per request, in its engine on the CPU and in its classes."""

from __future__ import annotations

import dataclasses
from array import array
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_engine import VOCAB, Batch, ask, make_model, serve
from stacks import Script, missing

import fastsample as fs

WHY = missing("SGLang", "sglang")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY is not None, reason=str(WHY)),
    pytest.mark.filterwarnings("default"),
]

LENGTH = 16
PROMPTS = [[1, 5, 9], [1, 7], [3, 3, 3, 3, 3], [40, 41, 40], [1, 5, 9, 2], [8, 9]]
PLAIN: list[dict[str, Any]] = [
    {"sampling_seed": 1, "top_k": 50},
    {"sampling_seed": 2, "temperature": 0.7, "top_p": 0.9, "min_p": 0.02},
]
EXTRA: list[dict[str, Any]] = [
    {"sampling_seed": 11, "custom_params": {"xtc_probability": 0.5, "xtc_threshold": 0.02, "dry_multiplyer": 1}},
    {
        "sampling_seed": 12,
        "temperature": 0.8,
        "custom_params": {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_breakers": [7]},
    },
    {"sampling_seed": 13, "top_k": 20, "custom_params": {"no_repeat_ngram_size": 2, "typical_p": 0.9, "theirs": "x"}},
    {"temperature": 0.0, "custom_params": {"no_repeat_ngram_size": 1}},
    {
        "sampling_seed": 15,
        "temperature": 1.6,
        "top_p": 0.9,
        "custom_params": {"top_n_sigma": 1.5, "order": "temperature_last", "p_less": True},
    },
    {"temperature": 0.0, "custom_params": {"dry_multiplier": 50.0, "dry_allowed_length": 1, "dry_base": 1.0}},
]
BAD: dict[str, dict[str, Any]] = {
    "top_a = 1.5": {"top_a": 1.5},
    "typical_p = 0": {"typical_p": 0},
    "order = 'sideways'": {"order": "sideways"},
    "p_less = [True]": {"p_less": [True]},
    "dry_breakers = 512": {"dry_multiplier": 1, "dry_breakers": [3, VOCAB]},
    "dry_breakers = ':'": {"dry_multiplier": 1, "dry_breakers": [":"]},
}
NEIGHBOUR = [PROMPTS[0], PLAIN[0]]
BATCHES: dict[str, Batch] = {
    **{f"alone {row}": ask([PROMPTS[row]], [EXTRA[row]], LENGTH) for row in range(len(EXTRA))},
    **{f"plain {row}": ask([PROMPTS[row]], [PLAIN[row]], LENGTH) for row in range(len(PLAIN))},
    "mixed": ask(PROMPTS[::-1] + PROMPTS[:2], EXTRA[::-1] + PLAIN, LENGTH),
    # Neighbours that come and go: rows are filtered, and batches are merged.
    "moving": ask([[4, 4]] * 3 + PROMPTS, [{**EXTRA[2], "max_new_tokens": n} for n in (1, 3, 6)] + EXTRA, LENGTH),
    "with logprobs": ask(PROMPTS, EXTRA, LENGTH, 5),
    **{f"bad {name}": ask([PROMPTS[0]], [{"custom_params": given}], 2) for name, given in BAD.items()},
    "after": ask([PROMPTS[0]], [PLAIN[0]], LENGTH),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engines(model: Path) -> dict[str, Script]:
    """Engines in processes of their own, started together."""
    batches, ours = list(BATCHES.values()), {"sampling_backend": "fastsample", "log_level": "info"}
    bad = [ask([PROMPTS[0]], [{**PLAIN[0], "custom_params": {"top_a": 7}}], LENGTH)]
    return {
        "ours": serve(model, batches, ours),
        "theirs": serve(model, bad, {}),
    }


@pytest.fixture(scope="module")
def found(engines: dict[str, Script]) -> dict[str, list[dict[str, Any]]]:
    outputs = iter(engines["ours"].result)
    return {name: [next(outputs) for _ in batch[0]] for name, batch in BATCHES.items()}


def tokens(outputs: list[dict[str, Any]]) -> list[list[int]]:
    return [output["tokens"] for output in outputs]


def test_texts_repeat_by_seed_alone_and_in_any_batch(found: Any) -> None:
    alone = [tokens(found[f"alone {row}"])[0] for row in range(len(EXTRA))]
    plain = [tokens(found[f"plain {row}"])[0] for row in range(len(PLAIN))]
    assert tokens(found["mixed"]) == alone[::-1] + plain
    assert tokens(found["moving"])[3:] == alone
    assert tokens(found["with logprobs"]) == alone


@pytest.fixture(params=["alone", "mixed"])
def texts(request: pytest.FixtureRequest, found: Any) -> list[list[int]]:
    """Prompt and output of each request with extra parameters."""
    if request.param == "mixed":
        outputs = tokens(found["mixed"])[: len(EXTRA)][::-1]
    else:
        outputs = [tokens(found[f"alone {row}"])[0] for row in range(len(EXTRA))]
    return [prompt + output for prompt, output in zip(PROMPTS, outputs, strict=True)]


def test_no_ngram_occurs_twice(texts: list[list[int]]) -> None:
    of_prompt = len(PROMPTS[2]) - 1
    pairs = list(pairwise(texts[2]))
    assert len({*pairs[of_prompt:]} - {*pairs[:of_prompt]}) == LENGTH
    assert len(set(texts[3])) == len(set(PROMPTS[3])) + LENGTH


def test_a_strong_dry_leaves_no_repetition(texts: list[list[int]]) -> None:
    """At temperature 0: what follows a token has never followed it before."""
    pairs = list(pairwise(texts[5]))
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_refused_on_arrival_and_named(found: Any, name: str) -> None:
    [output] = found[f"bad {name}"]
    assert name in output["refused"]
    assert tokens(found["after"]) == tokens(found["plain 0"])


def test_a_near_miss_is_said_once(engines: dict[str, Script], found: Any) -> None:
    log = engines["ours"].log
    assert log.count("custom_params: 'dry_multiplyer' is none of fastsample's names; did you mean") == 1
    assert log.count("is none of fastsample's names") == 1


def test_another_backend_keeps_its_custom_params(engines: dict[str, Script]) -> None:
    [output] = engines["theirs"].result
    assert len(output["tokens"]) == LENGTH


# SGLang's classes, without an engine ----------------------------------------------------------------------------------


@pytest.fixture
def adapter(model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(model)
    from fastsample.integrations import sglang

    monkeypatch.setattr(sglang, "_is_chosen", lambda: True)
    monkeypatch.setattr(sglang, "_why_not", lambda params, extras: None)
    return sglang


@pytest.fixture
def sampler(adapter: Any) -> Any:
    """A FastSampler without what SGLang's own part of it takes from a running server."""
    sampler = adapter.FastSampler.__new__(adapter.FastSampler)
    torch.nn.Module.__init__(sampler)
    sampler._batch = sampler._at = sampler._positions = sampler._drawn = None
    return sampler


def request(given: Any, prompt: list[int], output: list[int]) -> SimpleNamespace:
    params = SimpleNamespace(custom_params=given, sampling_seed=None)
    return SimpleNamespace(sampling_params=params, origin_input_ids=array("q", prompt), output_ids=array("q", output))


REQUESTS: list[tuple[Any, list[int], list[int]]] = [
    ({"typical_p": 0.8, "order": "temperature_last"}, [1, 2], [3]),
    (None, [1, 2], [3]),
    ({"dry_multiplier": 1.5, "dry_allowed_length": 1, "dry_breakers": [9]}, [4, 5, 6, 9, 4], [5, 6, 4]),
    ({"no_repeat_ngram_size": 2, "xtc_probability": 0.5, "xtc_threshold": 0.05}, [4, 5], [4, 7, 4]),
]
STACK = {
    "temperature": [0.7, 1.3, 1.0, 0.9],
    "top_k": [30, 0, 0, 40],
    "top_p": [0.9, 0.8, 1.0, 1.0],
    "min_p": [0.0, 0.0, 0.01, 0.0],
}


def info(adapter: Any, requests: list[SimpleNamespace]) -> SimpleNamespace:
    return SimpleNamespace(
        temperatures=torch.tensor(STACK["temperature"])[:, None],
        top_ks=torch.tensor([k or 1 << 30 for k in STACK["top_k"]], dtype=torch.int32),
        top_ps=torch.tensor(STACK["top_p"]),
        min_ps=torch.tensor(STACK["min_p"]),
        sampling_seed=torch.tensor([5, 6, -7, 8]),
        sampling_mask_batch_indices=None,
        has_custom_logit_processor=False,
        _fastsample=adapter._asked(requests),
    )


def wanted(logits: torch.Tensor, positions: torch.Tensor, **more: Any) -> torch.Tensor:
    """What the public call draws, a row at a time."""
    rows = []
    for row, (given, prompt, output) in enumerate(REQUESTS):
        fields = {"order": "joint", **{name: values[row] for name, values in STACK.items()}, **(given or {})}
        breakers = fields.pop("dry_breakers", None)
        history = {"prompt_ids": [prompt], "output_ids": [output], "dry_breakers": breakers}
        at = {"seed": torch.tensor([[5, 6, -7, 8][row]]), "offset": positions[row, None]}
        rows.append(fs.sample(logits[row, None], **fields, **history, **at, **more).tokens)
    return torch.cat(rows)


@pytest.mark.parametrize("ahead", [False, True], ids=["seen", "ahead"])
def test_a_mixed_batch_is_drawn_as_fastsample_draws(adapter: Any, sampler: Any, ahead: bool) -> None:
    """With `ahead`, the scheduler has not seen the last tokens; the model was fed with them."""
    positions = torch.tensor([len(prompt) + len(output) - 1 for _, prompt, output in REQUESTS])
    requests = [request(given, prompt, output[:-1] if ahead else output) for given, prompt, output in REQUESTS]
    asked = info(adapter, requests)
    sampler._batch = SimpleNamespace(
        input_ids=torch.tensor([output[-1] for *_, output in REQUESTS]),
        forward_mode=SimpleNamespace(is_decode=lambda: True),
    )
    for trial in range(20):
        logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(trial)) * 3
        expected = wanted(logits, positions, backend="reference")
        sampler._at = sampler._positions = positions
        sampler._preprocess_logits(logits, asked)
        drawn, _ = sampler._take()
        assert drawn.tolist() == expected.tolist()


def test_after_a_prefill_the_last_token_is_the_last_of_each_row(adapter: Any, sampler: Any) -> None:
    rows = [({"no_repeat_ngram_size": 1}, prompt, []) for prompt in ([3, 4, 5], [6], [7, 8])]
    asked = adapter._asked([request(*row) for row in rows])
    sampler._at = torch.tensor([2, 0, 1])
    sampler._batch = SimpleNamespace(
        input_ids=torch.tensor([4, 5, 6, 7, 8]),  # of the first prompt a part was known already
        extend_start_loc=torch.tensor([0, 2, 3]),
        extend_seq_lens=torch.tensor([2, 1, 2]),
        forward_mode=SimpleNamespace(is_decode=lambda: False),
    )
    assert sampler._ids(asked, torch.device("cpu")).tolist() == [[3, 4, 5, -1], [6, -1, -1, -1], [7, 8, -1, -1]]


def test_requests_keep_their_extras_when_batches_change(adapter: Any) -> None:
    @dataclasses.dataclass
    class Info:
        size: int

        def __len__(self) -> int:
            return self.size

    def nothing(self: Any, *_: Any) -> None: ...

    given = [{"top_a": 0.1}, None, {"top_a": 0.2}]
    left, right = Info(3), Info(2)
    left._fastsample = adapter._asked([request(one, [1], []) for one in given])  # type: ignore[attr-defined]
    rows = left._fastsample.rows  # type: ignore[attr-defined]
    adapter._filtered(left, nothing, [1, 2])
    assert left._fastsample.rows == {1: rows[2]}  # type: ignore[attr-defined]
    right._fastsample = adapter._asked([request(one, [1], []) for one in given[:2]])  # type: ignore[attr-defined]
    more = right._fastsample.rows  # type: ignore[attr-defined]
    left.size = 4
    adapter._merged(left, nothing, right)
    assert left._fastsample.rows == {1: rows[2], 2: more[0]}  # type: ignore[attr-defined]
    copy = adapter._copied(left, dataclasses.replace)
    assert copy._fastsample is left._fastsample  # type: ignore[attr-defined]
    adapter._filtered(left, nothing, [0, 3])
    assert left._fastsample is None  # type: ignore[attr-defined]


def test_a_request_that_was_not_validated_is_aborted_alone(adapter: Any) -> None:
    good, bad = request({"top_a": 0.1}, [1], []), request({"top_a": 9}, [1], [])
    asked = adapter._asked([bad, good])
    assert list(asked.rows) == [1]
    assert "top_a = 9" in bad.to_finish.message


class Params:
    """As SGLang's SamplingParams, with the methods that are swapped."""

    def __init__(self, custom_params: Any) -> None:
        self.custom_params, self.watermark = custom_params, None


def test_what_arrives_is_validated(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any) -> None: ...

    params = Params({"top_a": 0.5, "theirs": [1]})
    adapter._normalize(params, nothing, None)
    assert params.custom_params == {"top_a": 0.5, "theirs": [1]}
    with pytest.raises(ValueError, match=r"eta_cutoff = 1\.0: expected a finite number, 0 <= value < 1"):
        adapter._normalize(Params({"eta_cutoff": 1.0}), nothing, None)
    with pytest.raises(ValueError, match="dry_breakers = 600: expected a token id, 0 <= id < 512"):
        adapter._verify(Params({"dry_multiplier": 1, "dry_breakers": [600]}), nothing, VOCAB)
    monkeypatch.setattr(adapter, "_why_not", lambda params, extras: "not with this")
    with pytest.raises(ValueError, match="top_a, p_less: not with this"):
        adapter._normalize(Params({"top_a": 0.5, "p_less": True}), nothing, None)
    adapter._normalize(Params({"theirs": 1, "top_a": 0}), nothing, None)
    monkeypatch.setattr(adapter, "_is_chosen", lambda: False)
    adapter._normalize(Params({"eta_cutoff": 1.0}), nothing, None)
