"""SGLang's real engine on the CPU with `--sampling-backend fastsample`, serving a small random Llama."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from goodness import LEAST_P, chi_square
from sglang_engine import VOCAB, Batch, ask, make_model, serve
from stacks import Script, missing

import fastsample as fs

WHY = missing("SGLang", "sglang")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY is not None, reason=str(WHY)),
    pytest.mark.filterwarnings("default"),
]

PROMPTS = [[1, 5, 9], [1, 7], [3, 3, 3, 3, 3], [40, 41], [1, 5, 9, 2]]
GREEDY = {"temperature": 0.0}
SEEDED: list[dict[str, Any]] = [
    {"sampling_seed": 1},
    {"sampling_seed": 2, "temperature": 0.7, "top_k": 50},
    {"sampling_seed": 2, "temperature": 1.3, "top_p": 0.9, "min_p": 0.02},
    {"sampling_seed": 2**40, "top_k": 9, "repetition_penalty": 1.2},
    {"sampling_seed": -5, "frequency_penalty": 0.5, "presence_penalty": 0.3, "top_p": 0.5},
]
DRAWS = 800
CHECKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_p": {"top_p": 0.7},
    "all": {"temperature": 1.5, "top_k": 60, "top_p": 0.8, "min_p": 0.05},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


OTHERS = [{"min_p": 0.1}, GREEDY, {"top_k": 2}]
FIRST = [[7, 8, 9]]
BATCHES: dict[str, Batch] = {
    "alone 0": ask(PROMPTS[:1], SEEDED[:1], 12),
    "alone 1": ask(PROMPTS[1:2], SEEDED[1:2], 12),
    "alone 2": ask(PROMPTS[2:3], SEEDED[2:3], 12),
    "alone 3": ask(PROMPTS[3:4], SEEDED[3:4], 12),
    "alone 4": ask(PROMPTS[4:5], SEEDED[4:5], 12),
    "together": ask(PROMPTS, SEEDED, 12),
    "mixed": ask(PROMPTS[:3] + PROMPTS[::-1], OTHERS + SEEDED[::-1], 12),
    "with logprobs": ask(PROMPTS, SEEDED, 12, 5),
    "greedy": ask(PROMPTS, [GREEDY] * 5, 12, VOCAB),
    "free": ask(FIRST * 4, [{}] * 4, 12),
    "free again": ask(FIRST * 4, [{}] * 4, 12),
    **{f"p {name}": ask(FIRST, [fields], 1, VOCAB) for name, fields in CHECKED.items()},
    **{f"draws {name}": ask(FIRST * DRAWS, [fields] * DRAWS, 1) for name, fields in CHECKED.items()},
}
PLAIN = ["greedy", *(name for name in BATCHES if name.startswith("p "))]


def run(model: Path, names: list[str], **engine: Any) -> Script:
    return serve(model, [BATCHES[name] for name in names], engine)


def by_batch(script: Script, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    found = iter(script.result)
    return {name: [next(found) for _ in BATCHES[name][0]] for name in names}


@pytest.fixture(scope="module")
def engines(model: Path) -> dict[str, Script]:
    """Engines in processes of their own, started together."""
    return {
        "ours": run(model, list(BATCHES), sampling_backend="fastsample", log_level="info"),
        "theirs": run(model, PLAIN),
    }


@pytest.fixture(scope="module")
def ours(engines: dict[str, Script]) -> dict[str, list[dict[str, Any]]]:
    return by_batch(engines["ours"], list(BATCHES))


@pytest.fixture(scope="module")
def theirs(engines: dict[str, Script]) -> dict[str, list[dict[str, Any]]]:
    return by_batch(engines["theirs"], PLAIN)


def tokens(outputs: list[dict[str, Any]]) -> list[list[int]]:
    return [output["tokens"] for output in outputs]


def test_it_is_chosen_by_its_name_and_says_once_who_does_what(engines: dict[str, Script], ours: Any) -> None:
    """With device="cpu" SGLang makes "pytorch" of any backend; the name holds all the same."""
    assert engines["ours"].log.count("fastsample: temperature, filters and the draw are done by engine 'cpu'") == 1


def test_without_the_name_sglang_is_as_it_was(engines: dict[str, Script], theirs: Any) -> None:
    assert "fastsample: temperature" not in engines["theirs"].log


def test_seeded_requests_are_the_same_alone_and_in_any_batch(ours: Any) -> None:
    alone = [tokens(ours[f"alone {row}"])[0] for row in range(5)]
    assert len({tuple(line) for line in alone}) == 5
    assert tokens(ours["together"]) == alone
    assert tokens(ours["mixed"])[3:][::-1] == alone


def test_asking_for_logprobs_changes_no_token(ours: Any) -> None:
    assert tokens(ours["with logprobs"]) == tokens(ours["together"])


def test_greedy_is_sglangs(ours: Any, theirs: Any) -> None:
    assert tokens(ours["greedy"]) == tokens(theirs["greedy"])
    assert tokens(ours["mixed"])[1] == tokens(ours["greedy"])[1]


def test_requests_without_a_seed_differ(ours: Any) -> None:
    free = [tuple(line) for name in ("free", "free again") for line in tokens(ours[name])]
    assert len(set(free)) == len(free)


@pytest.mark.parametrize("name", CHECKED)
def test_logprobs_are_sglangs(ours: Any, theirs: Any, name: str) -> None:
    """SGLang reports them after the temperature and before the filters."""
    [mine], [other] = ours[f"p {name}"], theirs[f"p {name}"]
    assert len(mine["top"]) == VOCAB
    assert mine["top"] == other["top"]
    value, token = mine["own"]
    assert {t: v for v, t in mine["top"]}[token] == value
    assert token == mine["tokens"][0]


@pytest.mark.parametrize("name", CHECKED)
def test_the_draws_fit_sglangs_probabilities(ours: Any, theirs: Any, name: str) -> None:
    """First tokens against the distribution that SGLang reports, cut as its PyTorch sampler cuts it, by chi-square."""
    [output] = theirs[f"p {name}"]
    p = np.zeros(VOCAB)
    for value, token in output["top"]:
        p[token] = np.exp(value)
    fields = CHECKED[name]
    ranked = np.argsort(-p, kind="stable")
    kept = np.zeros(VOCAB, bool)
    kept[ranked[: fields.get("top_k", VOCAB)]] = True
    before = np.cumsum(p[ranked]) - p[ranked]
    kept[ranked[before > fields.get("top_p", 1.0)]] = False
    kept &= p >= fields.get("min_p", 0.0) * p.max()
    p = np.where(kept, p, 0)
    drawn = [line[0] for line in tokens(ours[f"draws {name}"])]
    assert chi_square(np.bincount(drawn, minlength=VOCAB), p / p.sum()) > LEAST_P


# SGLang's classes, without an engine ----------------------------------------------------------------------------------


@pytest.fixture
def adapter(model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(model)
    from fastsample.integrations import sglang

    return sglang


@pytest.fixture
def sampler(adapter: Any) -> Any:
    """A FastSampler without what SGLang's own part of it takes from a running server."""
    sampler = adapter.FastSampler.__new__(adapter.FastSampler)
    torch.nn.Module.__init__(sampler)
    sampler._batch = sampler._at = sampler._positions = sampler._drawn = None
    return sampler


def info(rows: list[dict[str, Any]], **more: Any) -> SimpleNamespace:
    columns = {
        "temperatures": torch.tensor([[row.get("temperature", 1.0)] for row in rows]),
        "top_ks": torch.tensor([row.get("top_k", 1 << 30) for row in rows], dtype=torch.int32),
        "top_ps": torch.tensor([row.get("top_p", 1.0) for row in rows]),
        "min_ps": torch.tensor([row.get("min_p", 0.0) for row in rows]),
    }
    return SimpleNamespace(**{"sampling_seed": None, "sampling_mask_batch_indices": None} | columns | more)


ROWS: list[dict[str, Any]] = [{"temperature": 0.7, "top_k": 30}, {"top_k": 1}, {"top_p": 0.8, "min_p": 0.01}, {}]


def test_a_batch_is_drawn_as_fastsample_draws(sampler: Any) -> None:
    logits, seeds, positions = torch.randn(4, VOCAB) * 3, torch.tensor([5, 6, -7, 8]), torch.tensor([1, 9, 2, 1])
    tokens, weights = sampler._draw(logits, info(ROWS, sampling_seed=seeds), positions)
    names = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    fields = {name: [row.get(name, off) for row in ROWS] for name, off in names.items()}
    assert weights is None
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == fs.sample(logits, **fields, order="joint", seed=seeds, offset=positions).tokens.tolist()


def test_sampling_masks_are_what_is_kept(sampler: Any) -> None:
    logits, positions, rows = torch.randn(4, VOCAB) * 3, torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2])
    asked = info(ROWS, sampling_mask_batch_indices=rows, sampling_mask_top_ks=[30, 1, 1 << 30, 1])
    sampler._drawn = sampler._draw(logits, asked, positions)
    _, capture = sampler._sample_from_probs(logits.softmax(-1), asked, positions, False)
    kept = {"temperature": [0.7, 1.0], "top_k": [30, 0], "top_p": [1.0, 0.8], "min_p": [0.0, 0.01]}
    wanted = fs.probabilities(logits[rows], **kept, order="joint")
    assert torch.equal(capture.weights, capture.weights.sort(1, descending=True).values)
    assert capture.weights.shape[1] == int((wanted > 0).sum(1).max())
    found = torch.zeros_like(wanted).scatter_add_(1, capture.token_ids.long(), capture.weights)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found > 0, fs.filter_logits(logits[rows], **kept, order="joint").isfinite())
    assert capture.batch_rows is rows
    assert sampler._drawn is None


def test_what_was_not_drawn_is_left_to_sglang(adapter: Any, sampler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter.theirs.Sampler, "_sample_from_probs", lambda self, *_: "theirs")
    assert sampler._sample_from_probs(torch.ones(1, 2), info([{}]), torch.zeros(1), True) == "theirs"


def request(seed: int | None) -> SimpleNamespace:
    return SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=seed, custom_params=None))


def test_requests_keep_their_seeds_out_of_deterministic_mode(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_is_chosen", lambda: True)
    requests = [request(seed) for seed in (7, None, -1, 2**63)]

    def seeds(chosen: Any = None, drafts: bool = False) -> torch.Tensor | None:
        batch = SimpleNamespace(reqs=requests, spec_algorithm=SimpleNamespace(is_none=lambda: not drafts))
        found = SimpleNamespace(sampling_seed=chosen, device="cpu")
        adapter._adjusted(found, lambda self, batch, vocab_size: None, batch, VOCAB)
        return found.sampling_seed

    torch.manual_seed(1)
    first, second = seeds(), seeds()
    assert first is not None
    assert second is not None
    assert first[[0, 2, 3]].tolist() == second[[0, 2, 3]].tolist() == [7, -1, -(2**63)]
    assert first[1] != second[1]
    torch.manual_seed(1)
    assert torch.equal(seeds(), first)
    theirs = torch.tensor([1, 42, 3, 4])
    assert seeds(theirs) is theirs
    monkeypatch.setattr(adapter.speculation, "left", lambda algorithm: "SGLang verifies these drafts")
    assert seeds(drafts=True) is None
    monkeypatch.setattr(adapter.speculation, "left", lambda algorithm: None)
    drafted = seeds(drafts=True)
    assert drafted is not None
    assert drafted[[0, 2, 3]].tolist() == [7, -1, -(2**63)]
    monkeypatch.setattr(adapter, "_is_chosen", lambda: False)
    assert seeds() is None


def test_registering_twice_registers_once_and_0_not_at_all(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: dict[str, Any] = defaultdict(list)
    monkeypatch.setattr(adapter.HookRegistry, "_hooks", hooks)
    monkeypatch.setattr(adapter.theirs, "_CUSTOM_SAMPLER_FACTORIES", {})
    monkeypatch.setenv("FASTSAMPLE_SGLANG", "0")
    adapter.register()
    assert adapter.theirs._CUSTOM_SAMPLER_FACTORIES == hooks == {}
    monkeypatch.delenv("FASTSAMPLE_SGLANG")
    monkeypatch.setattr(adapter.SamplingBatchInfo, "adjusted_from_schedule_batch", lambda *_: None)
    adapter.register()
    swapped = vars(adapter.SamplingBatchInfo)["adjusted_from_schedule_batch"]
    adapter.register()
    assert set(adapter.theirs._CUSTOM_SAMPLER_FACTORIES) == {"fastsample", "pytorch"}
    assert vars(adapter.SamplingBatchInfo)["adjusted_from_schedule_batch"] is swapped
    assert swapped.func is adapter._adjusted
    assert [hook for _, hook, _ in hooks["sglang.srt.speculative.eagle_utils.eagle_sample"]] == [
        adapter.speculation.verify
    ]
