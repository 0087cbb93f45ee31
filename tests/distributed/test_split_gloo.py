"""Rows that are split over the processes of a Gloo group: what they sample, and what happens where one fails."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case
from conformance import disagreements
from ranks import in_processes
from split import named_of

import fastsample as fs
import fastsample.distributed as fd

VOCAB, ROWS, STEPS = 1021, 5, 4
LM = Case("lm", "plain", VOCAB, "f32", "everything", ROWS)
FLAT = Case("flat", "plain", 5003, "bf16", None, ROWS)
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-k": {"top_k": 40, "top_p": 0.9, "kept": "ids"},
    "top-p": {"top_p": 0.95, "logprobs": "raw", "top_logprobs": 4},
    "min-p": {"min_p": 0.02, "temperature": 1.3, "kept": "bitmask", "kept_mass": True, "entropy": True},
    "no filter": {"num_samples": 5, "logprobs": "processed", "top_logprobs": 3},
    "typical": {"typical_p": 0.7, "top_n_sigma": 2.0, "kept": "count"},
    "penalties": {"repetition_penalty": 1.3, "dry_multiplier": 0.8, "dry_allowed_length": 1, "top_a": 0.05},
}


def slice_of(vocab: int) -> tuple[dict[str, Any], slice]:
    """This rank's part of a vocabulary: rank 1 has none where there are three or more."""
    rank, size = dist.get_rank(), dist.get_world_size()
    cuts = [vocab * i // size + (i % 3) * (0 < i < size) for i in range(size + 1)]
    if size > 2:
        cuts[1] = cuts[2]
    return {"vocab_start": cuts[rank], "vocab_size": vocab}, slice(cuts[rank], cuts[rank + 1])


def compare(ours: Any, whole: Any) -> list[str]:
    return disagreements(named_of(ours), named_of(whole))


def parity(backend: str) -> list[str]:
    """Where this rank does not get what one process gets of the whole rows."""
    wrong: list[str] = []
    for case in (LM, FLAT):
        given = case.build()
        own, here = slice_of(case.vocab)
        for name, mode in MODES.items():
            common = {**given.row_inputs, **given.draw, **mode}
            out = fd.sample(given.logits[:, here], **own, backend=backend, **common)
            wrong += [f"{name}: {line}" for line in compare(out, fs.sample(given.logits, **common))]
    logits, ids = steps()
    own, here = slice_of(VOCAB)
    how: dict[str, Any] = {"batch_size": ROWS, "seed": 5, "top_p": 0.9, "repetition_penalty": 1.2}
    many, one = fd.ShardedSampler(**own, backend=backend, **how), fs.Sampler(**how)
    for step in range(STEPS):
        out = many(logits[step][:, here], output_ids=ids[:, : step + 1])
        wrong += [f"step {step}: {line}" for line in compare(out, one(logits[step], output_ids=ids[:, : step + 1]))]
    rows = logits[: STEPS - 1].transpose(0, 1).contiguous()
    drafts = fs.sample(rows, seed=3).tokens[:, :-1]
    out = fd.verify(rows[..., here], drafts, seed=3, **own, backend=backend, top_p=0.97, logprobs="raw")
    wrong += [f"verify: {line}" for line in compare(out, fs.verify(rows, drafts, seed=3, top_p=0.97, logprobs="raw"))]
    return wrong + parity_of_laws(rows, backend)


def parity_of_laws(rows: torch.Tensor, backend: str) -> list[str]:
    """The same of the rules that compare laws, with what is listed and what is not, and of probabilities."""
    own, here = slice_of(VOCAB)
    wrong: list[str] = []
    draft = rows[:, :-1] + torch.randn(rows[:, :-1].shape, generator=torch.Generator().manual_seed(1))
    ids = torch.multinomial(draft.softmax(-1).flatten(0, 1), 1, generator=torch.Generator().manual_seed(2))
    common = {"draft_ids": ids.view(ROWS, -1), "seed": 3, "logprobs": "processed", "kept": "bitmask"}
    for rule in ("chain", "block"):
        for name, given in (("draft_logits", draft), ("draft_probs", draft.softmax(-1))):
            for fields in ({"top_k": 20}, {"temperature": 3.0} if name == "draft_logits" else {"top_p": 0.999}):
                how = {**common, **fields, "rule": rule}
                out = fd.verify(rows[..., here], **own, backend=backend, **how, **{name: given[..., here]})
                found = compare(out, fs.verify(rows, **how, **{name: given}))
                wrong += [f"{rule}, {name}, {fields}: {line}" for line in found]
    p = rows[:, 0].softmax(-1)
    for fields in ({"top_k": 20}, {"top_p": 0.9}, {}):
        how = {"input": "probs", "seed": 4, "logprobs": "raw", "top_logprobs": 3, "kept": "ids", **fields}
        out = fd.sample(p[:, here], **own, backend=backend, **how)
        wrong += [f"probabilities, {fields}: {line}" for line in compare(out, fs.sample(p, **how))]
    return wrong


def steps() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [steps, B, V] and a history of ids [B, steps]."""
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(STEPS, ROWS, VOCAB, generator=generator) * 3
    return logits, torch.randint(VOCAB, (ROWS, STEPS), generator=generator)


@pytest.mark.parametrize(
    ("ranks", "backend"),
    [
        (2, "cpu"),
        pytest.param(3, "reference", marks=pytest.mark.slow),
        pytest.param(4, "cpu", marks=pytest.mark.slow),
        pytest.param(8, "auto", marks=pytest.mark.slow),
    ],
)
def test_processes_sample_as_one_does(ranks: int, backend: str, tmp_path: Path) -> None:
    assert in_processes(parity, ranks, tmp_path, backend) == [[]] * ranks


# Seeds ---------------------------------------------------------------------------------------------------------------


def fresh_seeds() -> list[Any]:
    """Tokens of calls without a seed, where torch's generators differ, and a sampler's seeds."""
    torch.manual_seed(dist.get_rank())
    logits, _ = steps()
    own, here = slice_of(VOCAB)
    drawn = [fd.sample(logits[0][:, here], **own, top_k=k).tokens for k in (0, 20)]
    sampler = fd.ShardedSampler(batch_size=ROWS, **own)
    drafts = torch.zeros(ROWS, STEPS - 1, dtype=torch.int64)
    verified = fd.verify(logits.transpose(0, 1)[..., here].contiguous(), drafts, **own)
    return [t.tolist() for t in (*drawn, sampler(logits[0][:, here]).tokens, sampler.seeds, verified.tokens)]


def refusals() -> list[str | None]:
    """What each call of ranks that differ says; None where nothing is wrong."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own, here = slice_of(VOCAB)
    x = steps()[0][0]
    last = rank == size - 1
    others: list[Callable[[], Any]] = [
        lambda: fd.sample(x[:, here], **own, top_k=5 + last, seed=1),
        lambda: fd.sample(x[: 4 - last, here], **own, seed=1),
        lambda: fd.sample(x[:, here].to(torch.float16 if last else torch.bfloat16), **own, seed=1),
        lambda: fd.sample(x[:, here], **{**own, "vocab_size": VOCAB + 100 * last}, seed=1),
        lambda: fd.sample(x[:, here], **{**own, "vocab_start": own["vocab_start"] - last}, seed=1),
        lambda: fd.sample(x[:, here], **{**own, "vocab_start": own["vocab_start"] + 2 * last}, seed=1),
        lambda: fd.sample(x[:, :-1][:, here], **own, seed=1),
        lambda: fd.sample(x[:, here], **own, seed=1 + last),
        lambda: fd.sample(x[:, here], **own, seed=1 if last else None),
        lambda: fd.sample(x[:, here], **own, seed=1, offset=7 * last),
        lambda: fd.sample(x[:, here], **own, seed=1, num_samples=1 + last),
        lambda: fd.sample(x[:, here], **own, seed=1, logprobs="raw" if last else "processed"),
        lambda: fd.sample(x[:, here], **own, seed=1, kept="bitmask" if last else None),
        lambda: fd.sample(x[:, here], **own, seed=1, bias={3: 1.0 + last}),
        lambda: fd.sample(x[:, here], **own, seed=1, output_ids=[[1 + last]] * ROWS, presence_penalty=1.0),
        lambda: fd.sample(x[:, here].exp(), **own, seed=1, input="probs" if last else "logits"),
    ]
    return [_said(call) for call in others]


def _said(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


SAYS = (
    "the sampling parameters: expected the same on every rank, rank 2 differs from rank 0",
    "rows of logits: expected the same on every rank, rank 2 differs from rank 0 (3, and 4 on rank 0)",
    "logits.dtype: expected the same on every rank, rank 2 differs from rank 0",
    "vocab_size: expected the same on every rank, rank 2 differs from rank 0 (1121, and 1021 on rank 0)",
    "vocab_start = 681 (rank 2): expected 682, where the tokens before it end",
    "vocab_start = 684 (rank 2): expected 682, where the tokens before it end",
    "vocab_size = 1021: expected 1020, where the tokens of the last rank end",
    "seed: expected the same on every rank, rank 2 differs from rank 0",
    "seed: expected the same on every rank, rank 2 differs from rank 0",
    "offset: expected the same on every rank, rank 2 differs from rank 0",
    "num_samples: expected the same on every rank, rank 2 differs from rank 0 (2, and 1 on rank 0)",
    "logprobs: expected the same on every rank, rank 2 differs from rank 0",
    "kept: expected the same on every rank, rank 2 differs from rank 0",
    "bias: expected the same on every rank, rank 2 differs from rank 0",
    "output_ids: expected the same on every rank, rank 2 differs from rank 0",
    "input: expected the same on every rank, rank 2 differs from rank 0",
)


def counted() -> list[tuple[int, int]]:
    """Messages and bytes of two greedy steps, of which the first compares."""
    logits, _ = steps()
    own, here = slice_of(VOCAB)
    sampler = fd.ShardedSampler(batch_size=ROWS, seed=1, temperature=0.0, **own)
    counts = []
    for _ in range(2):
        sampler(logits[0][:, here])
        counts.append((sampler.split.rounds, sampler.split.sent))
    return counts


def ended() -> tuple[bool, str]:
    """Whether nothing keeps a group that is destroyed, and what a sampler that outlives it says."""
    own, here = slice_of(VOCAB)
    sampler = fd.ShardedSampler(batch_size=ROWS, seed=1, **own)
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()
    with pytest.raises(RuntimeError) as caught:
        sampler(steps()[0][0][:, here])
    return group() is None, str(caught.value)


def life_of_a_group() -> list[Any]:
    return [refusals(), fresh_seeds(), counted(), ended()]


def test_the_life_of_a_group(tmp_path: Path) -> None:
    found = in_processes(life_of_a_group, 3, tmp_path)
    assert found == [found[0]] * 3
    said, drawn, (first, second), end = found[0]
    for text, expected in zip(said, SAYS, strict=True):
        assert text.startswith(expected), text
    torch.manual_seed(0)
    logits, _ = steps()
    assert drawn[:2] == [fs.sample(logits[0], top_k=k).tokens.tolist() for k in (0, 20)], "the first rank's seeds"
    assert first[0] == 2
    assert second == (first[0] + 1, first[1] + 8 * ROWS)
    assert end == (True, "group: expected a process group that has not been destroyed")


# A rank that is gone -------------------------------------------------------------------------------------------------

SECONDS = 5


def left_alone(leaves: int, folder: str) -> tuple[str, float]:
    """What the others are told, and after how many seconds, when a rank ends after its first call."""
    logits, _ = steps()
    own, here = slice_of(VOCAB)
    sampler = fd.ShardedSampler(batch_size=ROWS, seed=1, top_p=0.9, **own)
    sampler(logits[0][:, here])
    if dist.get_rank() == leaves:
        os._exit(0)
    before, begun = sampler.offsets, time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        sampler(logits[1][:, here])
    seconds = time.monotonic() - begun
    assert torch.equal(sampler.offsets, before)
    Path(folder, f"told {dist.get_rank()}").touch()
    while len(list(Path(folder).glob("told *"))) < dist.get_world_size() - 1:
        time.sleep(0.05)  # or the others would be told that this one is gone too
    return str(caught.value), seconds


@pytest.mark.parametrize(("ranks", "leaves"), [(3, 1), *(pytest.param(4, n, marks=pytest.mark.slow) for n in (0, 3))])
def test_a_rank_that_dies_is_named(ranks: int, leaves: int, tmp_path: Path) -> None:
    found = in_processes(left_alone, ranks, tmp_path, leaves, str(tmp_path), seconds=SECONDS)
    assert found[leaves] is None
    for rank, told in enumerate(found):
        if rank != leaves:
            text, seconds = told
            assert text.startswith(f"rank {rank} of {ranks}: lost the connection to rank {leaves} in round "), text
            assert seconds < SECONDS + 2
