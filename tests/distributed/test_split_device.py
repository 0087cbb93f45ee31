"""Ranks whose logits lie on a GPU, for which memory of the host stands in: no call mixes devices, and outputs equal
those of whole rows on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
import torch.distributed as dist
from cases import CASES
from conformance import assert_agree, named
from elsewhere import GPU, Elsewhere, Watching, elsewhere, there
from ranks import on_ranks
from split import CUTS, LISTS, ROWS, UNEVEN, VOCAB, Job, answers_of, listing, named_of, questions_of
from torch.utils._pytree import tree_map

import fastsample as fs
import fastsample.distributed as fd
from fastsample.distributed import wire
from fastsample.distributed.wire import Wire

Tensor = torch.Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect without")  # among the cases on purpose

SMALL = tuple(case for case in CASES if case.vocab <= 513)
JOBS = [Job(case, list(CUTS)[i % len(CUTS)], LISTS[i % len(LISTS)]) for i, case in enumerate(SMALL[::67])]


def on_gpus(cuts: tuple[int, ...], vocab: int, do: Callable[..., Any]) -> list[Any]:
    """What do(begin, end, **its part) returns on each rank, where it may make tensors of a GPU."""

    def on_rank(wire: Any, begin: int, end: int) -> Any:
        with Watching():
            return do(begin, end, vocab_start=begin, vocab_size=vocab, group=wire, backend=engine)

    with elsewhere() as engine:
        return on_ranks(cuts, on_rank)


def home(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that came out, once it is seen to lie where the logits do."""
    assert all(tensor.device == GPU for tensor in found.values())
    return {name: tensor.cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_samples_as_whole_rows(job: Job) -> None:
    logits, questions = questions_of(job.case)

    def sample(begin: int, end: int, **part: Any) -> list[dict[str, Tensor]]:
        x = there(logits[:, begin:end])
        return [home(named(fd.sample(x, **part, **tree_map(there, question)))) for question in questions]

    with listing(*job.lists):
        found = on_gpus(CUTS[job.cut](job.case.vocab), job.case.vocab, sample)
    for rank in found:
        for ours, whole in zip(rank, answers_of(job.case), strict=True):
            assert_agree(ours, whole)


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "probabilities": (fd.sample, fs.sample, {"input": "probs", "top_p": 0.8, "logprobs": "raw", "entropy": True}),
    "a mask of whole rows": (fd.sample, fs.sample, {"bitmask": torch.full((10,), 0x5F5F5F5F, dtype=torch.int32)}),
    "allowed ids": (fd.sample, fs.sample, {"allowed_ids": [[1, 2, 44, 45, 250]] * 6, "top_k": 4, "logprobs": "raw"}),
    "many draws": (fd.sample, fs.sample, {"num_samples": 9, "xtc_probability": 0.5, "xtc_threshold": 0.01}),
    "drafts": (fd.verify, fs.verify, {"draft_ids": torch.tensor([[7, 300], [1, 2]]), "top_p": 0.9}),
    "drafts and laws": (
        *(fd.verify, fs.verify),
        {"draft_ids": torch.tensor([[7, 300], [1, 2]]), "draft_logits": ROWS[:4].view(2, 2, VOCAB), "rule": "chain"},
    ),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("listed", [256, 3])
def test_other_calls(what: str, listed: int) -> None:
    split, whole, how = CALLS[what]
    rows = ROWS.softmax(-1) if what == "probabilities" else ROWS
    rows = rows.view(2, 3, VOCAB) if "drafts" in what else rows

    def call(begin: int, end: int, **part: Any) -> dict[str, Tensor]:
        own = {name: given[..., begin:end] if name == "draft_logits" else given for name, given in how.items()}
        return home(named_of(split(there(rows[..., begin:end]), seed=3, **part, **tree_map(there, own))))

    with listing(listed, 16):
        for found in on_gpus(UNEVEN, VOCAB, call):
            assert_agree(found, named_of(whole(rows, seed=3, **how)))


def test_steps_of_a_sampler() -> None:
    how: dict[str, Any] = {
        "batch_size": 6,
        "seed": 5,
        "top_p": [0.9, 0.5, 1.0, 1.0, 0.99, 0.7],
        "logprobs": "processed",
    }

    def steps(begin: int, end: int, **part: Any) -> list[dict[str, Tensor]]:
        sampler = fd.ShardedSampler(**how, **part)
        found = [home(named_of(sampler(there(ROWS[:, begin:end])))) for _ in range(3)]
        sampler.set_row(2, fs.SamplingParams(min_p=0.1))
        return [*found, home(named_of(sampler(there(ROWS[:, begin:end]))))]

    whole = fs.Sampler(**how)
    expected = [named_of(whole(ROWS)) for _ in range(3)]
    whole.set_row(2, fs.SamplingParams(min_p=0.1))
    expected.append(named_of(whole(ROWS)))
    for found in on_gpus(UNEVEN, VOCAB, steps):
        for ours, theirs in zip(found, expected, strict=True):
            assert_agree(ours, theirs)


@pytest.mark.parametrize("backends", ["cuda:nccl", "cpu:gloo,cuda:nccl"])
def test_what_a_group_carries(backends: str) -> None:
    """Messages on the host go through the device of a group that carries no others."""
    sent: list[type[Tensor]] = []

    def all_gather(found: Tensor, words: Tensor, group: Any) -> None:
        sent.append(type(words))
        found.view(2, -1).copy_(words.expand(2, -1))

    group, known = MagicMock(), {"get_rank": 0, "get_world_size": 2, "get_backend_config": backends}
    known_of = {name: lambda group, value=value: value for name, value in known.items()}
    on_host = patch.object(Wire, "_through_memory", lambda self, group, own, found: found.copy_(own.expand_as(found)))
    with (
        elsewhere(),
        Watching(),
        patch.multiple(dist, **known_of),
        patch.object(wire, "all_gather", all_gather),
        on_host,
    ):
        ours = Wire(group)
        for words in (torch.arange(5), there(torch.arange(5))):
            found = ours.gather(words)
            assert type(found) is type(words)
            assert found.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert sent == [Elsewhere] * (2 if backends == "cuda:nccl" else 1)
