"""Speculative decoding: what is emitted is distributed as the target's, whatever was drafted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from goodness import chi_square

from fastsample import reference as spec
from fastsample.integrations.flashinfer import chain_speculative_sampling

ROWS = 60_000
LEAST_P = 1e-5


def distributions(*shape: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread
    return torch.softmax(x, -1)


def drafted(draft: torch.Tensor, seed: int) -> torch.Tensor:
    """Ids [B, n] drawn from draft [B, n, V] by torch."""
    flat = draft.reshape(-1, draft.shape[-1])
    return torch.multinomial(flat, 1, generator=torch.Generator().manual_seed(seed)).view(draft.shape[:2])


def direct(draft: torch.Tensor, ids: torch.Tensor, target: torch.Tensor, seeds: torch.Tensor, offset: int) -> Any:
    """Chen et al. 2023 row by row, in float64, on the uniforms that the docstring promises."""
    batch, count, vocab = draft.shape
    tokens, accepted, emitted = torch.full((batch, count + 1), -1), [], []
    for b in range(batch):
        bits = [
            int(spec.uniform60(seeds[b : b + 1], torch.tensor([offset]), torch.tensor([j]))) for j in range(count + 1)
        ]
        passes = []
        for i in range(count):
            p, q = float(draft[b, i, ids[b, i]]), float(target[b, i, ids[b, i]])
            passes.append(bits[i + 1] / 2**60 * p < q)
        n = next((i for i, good in enumerate(passes) if not good), count)
        tokens[b, :n] = ids[b, :n]
        rest = target[b, n].double()
        if n < count:
            rest = (rest - draft[b, n].double()).clamp(min=0)
        threshold = bits[0] / 2**60 * float(rest.sum())
        tokens[b, n] = min(int((rest.cumsum(0) <= threshold).sum()), vocab - 1)
        accepted.append(sum(passes))
        emitted.append(n)
    return tokens, torch.tensor(accepted), torch.tensor(emitted)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_equals_the_direct_implementation(count: int) -> None:
    draft, target = distributions(200, count, 40, seed=1), distributions(200, count + 1, 40, seed=2)
    ids, seeds = drafted(draft, 3) if count else torch.empty(200, 0, dtype=torch.int64), torch.arange(200) * 77
    got = chain_speculative_sampling(draft, ids, target, seed=seeds, offset=torch.tensor([5]))
    for mine, wanted in zip(got, direct(draft, ids, target, seeds, 5), strict=True):
        assert mine.dtype == torch.int32
        assert torch.equal(mine.long(), wanted)


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_emitted_tokens_follow_the_target(spread: float) -> None:
    vocab, count = 12, 3
    draft = distributions(1, count, vocab, seed=4).expand(ROWS, -1, -1)
    target = distributions(1, count + 1, vocab, seed=5, spread=spread).expand(ROWS, -1, -1)
    ids = drafted(draft, 6)
    tokens, accepted, emitted = chain_speculative_sampling(draft, ids, target, seed=7)
    for i in range(count + 1):
        here = tokens[emitted >= i, i].numpy()
        counts = np.bincount(here, minlength=vocab)
        assert chi_square(counts, target[0, i].double().numpy() / float(target[0, i].double().sum())) > LEAST_P, i
    # Each draft passes its own test with probability sum(min(p, q)).
    each = torch.minimum(draft[0], target[0, :count]).double().sum(-1)
    spread_of_sum = float((each * (1 - each)).sum()) ** 0.5
    z = (float(accepted.double().mean()) - float(each.sum())) / (spread_of_sum / ROWS**0.5)
    assert scipy.stats.norm.sf(abs(z)) > LEAST_P
    # The first i drafts are emitted with the product of the first i probabilities.
    for i in range(1, count + 1):
        wins = int((emitted >= i).sum())
        assert scipy.stats.binomtest(wins, ROWS, float(each[:i].prod())).pvalue > LEAST_P


def test_structure_and_counters() -> None:
    draft, target = distributions(500, 5, 30, seed=8), distributions(500, 6, 30, seed=9)
    ids = drafted(draft, 10).int()
    accepted, emitted = torch.full((500,), 7, dtype=torch.int32), torch.full((500,), 9)
    tokens, a, e = chain_speculative_sampling(draft, ids, target, accepted, emitted, seed=1)
    assert a is accepted
    assert e is emitted
    assert tokens.shape == (500, 6)
    count = e - 9
    assert torch.equal((tokens != -1).sum(-1), count + 1)
    assert ((a - 7) >= count).all()
    assert ((a - 7) <= 5).all()
    assert len(count.unique()) > 3
    position = torch.arange(6)
    assert torch.equal(tokens[:, :5] == ids, (position[:5] < count[:, None]))  # a replacement is never the draft
    assert torch.equal(tokens == -1, position > count[:, None])


def test_equal_models_accept_everything() -> None:
    draft = distributions(300, 4, 50, seed=11)
    target = torch.cat([draft, distributions(300, 1, 50, seed=12)], 1)
    ids = drafted(draft, 13)
    tokens, accepted, emitted = chain_speculative_sampling(draft, ids, target, seed=2)
    assert torch.equal(tokens[:, :4].long(), ids)
    assert (accepted == 4).all()
    assert (emitted == 4).all()


def test_certain_targets() -> None:
    """One-hot targets: drafts that agree pass, the first that does not is replaced by what the target wants."""
    draft = torch.full((2, 3, 10), 0.1)
    wanted = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    target = torch.nn.functional.one_hot(wanted, 10).float()
    tokens, _, emitted = chain_speculative_sampling(draft, torch.tensor([[1, 2, 3], [5, 0, 7]]), target)
    assert tokens.tolist() == [[1, 2, 3, 4], [5, 6, -1, -1]]
    assert emitted.tolist() == [3, 1]


def test_rounding_leaves_nothing() -> None:
    """A draft may be rejected by rounding alone; the token then comes from the target."""
    draft = torch.tensor([[[0.5, 0.5]]]).expand(2, -1, -1)
    target = torch.tensor([[[0.0, 0.5], [0.5, 0.5]]]).expand(2, -1, -1)
    tokens, _, _ = chain_speculative_sampling(draft, torch.tensor([[0], [1]]), target, seed=1)
    assert tokens[0].tolist() == [1, -1]
    assert tokens[1, 0] == 1


def test_a_row_does_not_depend_on_its_slot() -> None:
    draft, target = distributions(20, 3, 30, seed=14), distributions(20, 4, 30, seed=15)
    ids, seeds, offsets = drafted(draft, 16), torch.arange(20) * 99, torch.arange(20)
    whole = chain_speculative_sampling(draft, ids, target, seed=seeds, offset=offsets)
    for i in range(20):
        one = slice(i, i + 1)
        alone = chain_speculative_sampling(draft[one], ids[one], target[one], seed=seeds[one], offset=offsets[one])
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, whole, strict=True))
    other = chain_speculative_sampling(draft, ids, target, seed=seeds, offset=offsets + 1)
    assert not torch.equal(other[0], whole[0])


def bad(tensor: torch.Tensor, value: float) -> torch.Tensor:
    broken = tensor.clone()
    broken[1, 0, 2] = value
    return broken


DRAFT, TARGET, IDS = distributions(2, 1, 4, seed=17), distributions(2, 2, 4, seed=18), torch.tensor([[0], [1]])


@pytest.mark.parametrize(
    ("draft", "ids", "target", "counter", "error", "words"),
    [
        (bad(DRAFT, torch.nan), IDS, TARGET, None, ValueError, "draft_probs: row 1, position 0 has a NaN"),
        (DRAFT, IDS, bad(TARGET, -1.0), None, ValueError, "target_probs: row 1, position 0 has a negative value, -1"),
        (DRAFT, IDS, bad(TARGET, torch.inf), None, ValueError, r"target_probs: row 1, position 0 has a \+inf"),
        (DRAFT, IDS, torch.zeros(2, 2, 4), None, ValueError, "target_probs: row 0 has nothing above 0"),
        (DRAFT, IDS + 3, TARGET, None, ValueError, r"draft_token_ids\[1, 0\] = 4: expected 0 <= id < 4"),
        (DRAFT, IDS - 1, TARGET, None, ValueError, r"draft_token_ids\[0, 0\] = -1: expected 0 <= id < 4"),
        (DRAFT, IDS.float(), TARGET, None, TypeError, "draft_token_ids: expected an int32 or int64 tensor"),
        (DRAFT, IDS[0], TARGET, None, ValueError, r"draft_token_ids: expected shape \[B, n\], got \(1,\)"),
        (DRAFT, IDS, TARGET[:, :1], None, ValueError, r"target_probs: expected shape \[2, 2, V\], got \(2, 1, 4\)"),
        (DRAFT[:, 0], IDS, TARGET, None, ValueError, r"draft_probs: expected shape \[2, 1, V\], got \(2, 4\)"),
        (DRAFT, IDS, TARGET[..., :3], None, ValueError, "V = 4 on cpu, V = 3 on cpu"),
        (DRAFT, IDS, TARGET, torch.zeros(3, dtype=torch.int32), ValueError, r"token_num: expected shape \[2\] on cpu"),
        (DRAFT, IDS, TARGET, torch.zeros(2), TypeError, "token_num: expected an int32 or int64 tensor"),
    ],
)
def test_errors(draft: Any, ids: Any, target: Any, counter: Any, error: type[Exception], words: str) -> None:
    emitted = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(error, match=words):
        chain_speculative_sampling(draft, ids, target, counter, emitted, seed=1)
    assert emitted.tolist() == [0, 0]
