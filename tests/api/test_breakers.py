"""`dry_breakers`: the kinds it takes, for all rows or for each, wherever a call takes it."""

from __future__ import annotations

from array import array
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

import fastsample as fs

B, V = 4, 60
X = torch.randn(B, V, generator=torch.Generator().manual_seed(1))
# Each row repeats 5 6 7 8; what has followed it is 9 and 10.
HISTORY = torch.tensor([[5, 6, 7, 8, 9, 1, 6, 7, 8, 10, 2, 5, 6, 7, 8]] * B)
DRY: dict[str, Any] = {"dry_multiplier": 0.8, "dry_allowed_length": 1, "output_ids": HISTORY}
IDS = [7, 40]
TABLE = [[7, 40], [6], [], [9, 10, 8]]
PADDED = torch.tensor([[7, 40, -1], [6, -1, V], [-1, 2**40, -1], [9, 10, 8]])

FOR_ALL: dict[str, Any] = {
    "list": IDS,
    "tuple": (7, 40),
    "deque": deque(IDS),
    "array.array": array("i", IDS),
    "numpy integers": [np.int64(7), np.uint8(40)],
    "tensor": torch.tensor(IDS),
    "int32 tensor": torch.tensor(IDS, dtype=torch.int32),
    "uint8 tensor": torch.tensor(IDS, dtype=torch.uint8),
    "strided tensor": torch.tensor([7, 0, 40, 0])[::2],
    "negated tensor": torch._neg_view(torch.tensor([-7, -40])),
    "array": np.array(IDS),
    "backwards array": np.array(IDS[::-1])[::-1],
    "other byte order": np.array(IDS, ">i4"),
    "array of objects": np.array(IDS, dtype=object),
    "with padding": [7, -1, 40, V, 2**62],
    "table": torch.tensor([IDS] * B),
    "expanded table": torch.tensor(IDS).expand(B, -1),
    "lists": [IDS] * B,
}
PER_ROW: dict[str, Any] = {
    "lists": TABLE,
    "with None": [TABLE[0], TABLE[1], None, TABLE[3]],
    "tensor": PADDED,
    "int32 tensor": PADDED.where(PADDED < 2**31, -1).int(),
    "array": PADDED.numpy(),
    "tensors": [torch.tensor(line, dtype=torch.int64) for line in TABLE],
    "all kinds": [TABLE[0], torch.tensor([6]), None, np.array(TABLE[3])],
}


def penalty(row: int, breakers: list[int], backend: str) -> torch.Tensor:
    """A row by itself: what DRY subtracts."""
    return X[row] - fs.filter_logits(
        X[row], **{**DRY, "output_ids": HISTORY[:1]}, dry_breakers=breakers, backend=backend
    )


def test_breakers_end_a_repetition() -> None:
    """The reference, by hand: 5 6 7 8 has been followed by 9, and 6 7 8 by 10."""
    for breakers, expected in (
        ([], {9: 0.8 * 1.75**3, 10: 0.8 * 1.75**2}),
        ([5], {9: 0.8 * 1.75**2, 10: 0.8 * 1.75**2}),
        ([7], {9: 0.8, 10: 0.8}),
        ([8], {}),
        ([9], {10: 0.8 * 1.75**2}),
        ([V, -1, 2**40], {9: 0.8 * 1.75**3, 10: 0.8 * 1.75**2}),
    ):
        got = penalty(0, breakers, "reference")
        wanted = torch.zeros(V)
        for token, value in expected.items():
            wanted[token] = value
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", FOR_ALL)
def test_breakers_of_all_rows(kind: str, variant: str) -> None:
    want = X - torch.stack([penalty(row, IDS, "reference") for row in range(B)])
    got = fs.filter_logits(X, **DRY, dry_breakers=FOR_ALL[kind], backend=variant)
    torch.testing.assert_close(got, want)
    check_the_others(FOR_ALL[kind], torch.tensor([IDS] * B), variant)


@pytest.mark.parametrize("kind", PER_ROW)
def test_breakers_of_each_row(kind: str, variant: str) -> None:
    want = X - torch.stack([penalty(row, TABLE[row], "reference") for row in range(B)])
    got = fs.filter_logits(X, **DRY, dry_breakers=PER_ROW[kind], backend=variant)
    torch.testing.assert_close(got, want)
    check_the_others(PER_ROW[kind], PADDED, variant)


def check_the_others(given: Any, table: torch.Tensor, backend: str) -> None:
    """sample, probabilities and a Sampler's steps, of all slots and of some."""
    fields = {name: value for name, value in DRY.items() if name != "output_ids"}
    got, want = (fs.sample(X, **DRY, dry_breakers=ids, seed=3, backend=backend) for ids in (given, table))
    assert got == want
    got, want = (fs.probabilities(X, **DRY, dry_breakers=ids, backend=backend) for ids in (given, table))
    assert torch.equal(got, want)
    mine, plain = (fs.Sampler(batch_size=B, seed=3, **fields, backend=backend) for _ in range(2))
    for _ in range(2):
        got, want = (s(X, output_ids=HISTORY, dry_breakers=ids) for s, ids in ((mine, given), (plain, table)))
        assert got == want
    slots = [2, 0, 3, 1]
    steps = ((mine, given), (plain, table))
    got, want = (s(X, rows=slots, output_ids=HISTORY, dry_breakers=ids) for s, ids in steps)
    assert got == want


def test_one_row(variant: str) -> None:
    for given in ([7, 40], [[7, 40]], torch.tensor([7, 40]), torch.tensor([[7, 40]]), np.array([7, 40])):
        for x in (X[0], X[:1]):
            got = fs.filter_logits(x, **{**DRY, "output_ids": HISTORY[:1]}, dry_breakers=given, backend=variant)
            torch.testing.assert_close(got.view(V), X[0] - penalty(0, IDS, "reference"))


def test_leading_dimensions(variant: str) -> None:
    cube, ids = X.view(2, 2, V), {**DRY, "output_ids": HISTORY.view(2, 2, -1)}
    for given, table in (
        (IDS, torch.tensor(IDS)),
        (torch.tensor(IDS), torch.tensor(IDS)),
        (TABLE, PADDED),
        (PADDED.view(2, 2, 3), PADDED),
        (PADDED[:2, None], PADDED[:2].repeat_interleave(2, 0)),
        (PADDED[None, :2].numpy(), PADDED[:2].repeat(2, 1)),
    ):
        got = fs.filter_logits(cube, **ids, dry_breakers=given, backend=variant)
        assert torch.equal(got.view(B, V), fs.filter_logits(X, **DRY, dry_breakers=table, backend=variant))
    with pytest.raises(ValueError, match=r"dry_breakers: expected shape \[2, 2, ...\]"):
        fs.filter_logits(cube, **ids, dry_breakers=PADDED.view(4, 1, 3))
    with pytest.raises(ValueError, match=r"dry_breakers: expected ids \[L\] for all rows or \[4, L\]"):
        fs.filter_logits(cube, **ids, dry_breakers=PADDED[:2])


@pytest.mark.parametrize("ids", [torch.tensor([7, 40]), PADDED.clone()], ids=["all", "each"])
def test_a_sampler_uses_them_in_place(ids: torch.Tensor, variant: str) -> None:
    """Packed once, and what is written to the tensor is seen by the next step."""
    sampler = fs.Sampler(batch_size=B, seed=3, dry_multiplier=5.0, dry_allowed_length=1, backend=variant)
    packed = []
    for step in range(4):
        if step == 2:
            ids.fill_(8)
        got = sampler(X, output_ids=HISTORY, dry_breakers=ids)
        want = fs.sample(X, **{**DRY, "dry_multiplier": 5.0}, dry_breakers=ids, seed=3, offset=step, backend=variant)
        assert got == want
        assert sampler._last is not None
        packed.append(sampler._last[0])
    assert all(rows is packed[0] for rows in packed)


def test_in_a_graph() -> None:
    torch._dynamo.reset()
    sampler, eager = (
        fs.Sampler(batch_size=B, seed=3, dry_multiplier=0.8, dry_allowed_length=1, backend="reference")
        for _ in range(2)
    )
    calls = (
        lambda x, ids: fs.sample(x * 1, **DRY, dry_breakers=ids, seed=2, backend="reference").tokens,
        lambda x, ids: fs.filter_logits(x * 1, **DRY, dry_breakers=ids, backend="reference"),
    )
    for call in calls:
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for ids in (torch.tensor(IDS), PADDED, PADDED.int()):
            assert torch.equal(compiled(X, ids), call(X, ids))
    step = torch.compile(
        lambda x, ids: sampler(x * 1, output_ids=HISTORY, dry_breakers=ids).tokens, fullgraph=True, backend="aot_eager"
    )
    for ids in (PADDED, PADDED.flip(0)):
        assert torch.equal(step(X, ids), eager(X, output_ids=HISTORY, dry_breakers=ids).tokens)
    torch._dynamo.reset()
