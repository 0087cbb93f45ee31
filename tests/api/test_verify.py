"""fastsample.verify around the engines: shapes, ragged batches, what is given per request or per row, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastsample as fs

B, K, V = 3, 4, 200
BACKENDS = ("reference", "cpu")
G = torch.Generator().manual_seed(8)
LOGITS = torch.randn(B, K + 1, V, generator=G) * 3
SEEDS = [5, 2**63, 7]
FIELDS: dict[str, Any] = {"temperature": 0.8, "top_k": 20}


def drawn(**fields: Any) -> torch.Tensor:
    """The draw of each row [B, K + 1], whatever comes before."""
    offset = torch.arange(K + 1).expand(B, -1)
    seed = torch.tensor([5, -(2**63), 7])[:, None].expand(-1, K + 1)
    return fs.sample(LOGITS, seed=seed, offset=offset, **{**FIELDS, **fields}).tokens


RIGHT = drawn()
DRAFTS = RIGHT[:, :K].clone()
DRAFTS[1, 2] = (DRAFTS[1, 2] + 1) % V
DRAFTS[2, 0] = -1


def verify(ids: Any = DRAFTS, logits: torch.Tensor = LOGITS, **more: Any) -> fs.VerifyOutput:
    return fs.verify(logits, ids, **{"seed": SEEDS, **FIELDS, **more})


def expected(accepted: list[int], right: torch.Tensor = RIGHT) -> torch.Tensor:
    return right.masked_fill(torch.arange(K + 1) > torch.tensor(accepted)[:, None], -1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accepts_what_equals_the_draw(backend: str) -> None:
    out = verify(backend=backend)
    assert out.num_accepted.tolist() == [4, 2, 0]
    assert torch.equal(out.tokens, expected([4, 2, 0]))
    assert (out.tokens.dtype, out.num_accepted.dtype, out.status.dtype) == (torch.int64, torch.int32, torch.int32)
    assert out.logprobs is None
    assert out.path is None


@pytest.mark.parametrize("kind", ["lists", "array", "int32", "strided"])
def test_kinds_of_drafts(kind: str) -> None:
    wide = torch.zeros(B, 2 * K, dtype=torch.int64)
    wide[:, ::2] = DRAFTS
    ids = {"lists": DRAFTS.tolist(), "array": DRAFTS.numpy(), "int32": DRAFTS.int(), "strided": wide[:, ::2]}[kind]
    assert torch.equal(verify(ids).tokens, expected([4, 2, 0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["table", "flat", "list"])
@pytest.mark.parametrize("counts", [[4, 4, 4], [2, 0, 3], [0, 0, 0], [1, 4, 0]])
def test_packed_is_dense(counts: list[int], form: str, backend: str) -> None:
    rows = torch.cat([LOGITS[b, : n + 1] for b, n in enumerate(counts)])
    parts = [RIGHT[b, :n] for b, n in enumerate(counts)]
    padded = torch.full((B, max(counts)), -1)
    for b, n in enumerate(counts):
        padded[b, :n] = parts[b]
    ids = {"table": padded, "flat": torch.cat(parts), "list": [part.tolist() for part in parts]}[form]
    out = verify(ids, rows, num_drafts=counts, logprobs="raw", top_logprobs=2, backend=backend)
    dense = verify(RIGHT[:, :K], num_drafts=torch.tensor(counts), logprobs="raw", top_logprobs=2, backend=backend)
    most = max(counts) + 1
    assert out.num_accepted.tolist() == counts == dense.num_accepted.tolist()
    for name in ("tokens", "logprobs", "ranks", "top_ids", "top_logprobs"):
        assert getattr(out, name).shape[:2] == (B, most)
        assert torch.equal(getattr(out, name).nan_to_num(7), getattr(dense, name)[:, :most].nan_to_num(7)), name


def test_neither_requests_nor_drafts() -> None:
    assert verify(torch.empty(0, K, dtype=torch.int64), LOGITS[:0], seed=1).tokens.shape == (0, K + 1)
    out = verify(torch.empty(B, 0, dtype=torch.int64), LOGITS[:, :1])
    assert torch.equal(out.tokens, RIGHT[:, :1])
    assert out.num_accepted.tolist() == [0, 0, 0]


def test_a_scalar_seed_is_that_of_plain_decoding() -> None:
    offset = [10, 2**64 - 3, 0]
    first = fs.sample(LOGITS[:, 0], seed=9, offset=offset, **FIELDS).tokens
    out = verify(torch.stack([first] * K, 1), seed=9, offset=offset)
    assert torch.equal(out.tokens[:, 0], first)
    second = fs.sample(LOGITS[:, 1], seed=9, offset=[(o + 1) % 2**64 for o in offset], **FIELDS).tokens
    assert torch.equal(out.tokens[:, 1], second)


PER_REQUEST = {"top_k": [3, 0, 9], "temperature": torch.tensor([0.5, 1.0, 0.0])}


def test_fields_per_request_or_per_row() -> None:
    table = {name: torch.as_tensor(value)[:, None].expand(-1, K + 1) for name, value in PER_REQUEST.items()}
    flat = {name: value.flatten().tolist() for name, value in table.items()}
    found = [verify(**fields) for fields in (PER_REQUEST, table, flat)]
    found.append(fs.verify(LOGITS, DRAFTS, fs.SamplingParams(**PER_REQUEST), seed=SEEDS))
    found.append(
        fs.verify(LOGITS, DRAFTS, fs.SamplingParams(top_k=[3, 0, 9]), temperature=table["temperature"], seed=SEEDS)
    )
    for out in found:
        assert torch.equal(out.tokens, found[0].tokens)
    assert not torch.equal(found[0].tokens, verify().tokens)
    rows = drawn(**table)
    assert torch.equal(found[0].tokens[:, 0], rows[:, 0])


def test_masks_and_biases_per_request_or_per_row() -> None:
    mask = torch.randint(-(2**31), 2**31, (B, 7), generator=G).to(torch.int32)
    rows = mask.repeat_interleave(K + 1, 0)
    found = [verify(bitmask=m) for m in (mask, rows, rows.view(B, K + 1, 7))]
    dicts = [{1: 9.0}, None, {5: -torch.inf, 7: 20.0}]
    tensors = (torch.tensor([0, 1, 1, 3]), torch.tensor([1, 5, 7]), torch.tensor([9.0, -torch.inf, 20.0]))
    per_row = [d for d in dicts for _ in range(K + 1)]
    biased = [verify(bias=b) for b in (dicts, tensors, per_row)]
    for outs in (found, biased):
        assert all(torch.equal(out.tokens, outs[0].tokens) for out in outs)
        assert not torch.equal(outs[0].tokens, verify().tokens)
    shared = verify(bitmask=mask[0])
    assert torch.equal(shared.tokens[0], found[0].tokens[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_invalid_row_ends_the_result(backend: str) -> None:
    logits = LOGITS.clone()
    logits[0, 2, 7], logits[1, 3], logits[2, 1, 3] = torch.nan, -torch.inf, torch.inf
    out = verify(logits=logits, on_invalid="flag", backend=backend, logprobs="processed")
    assert out.status.tolist() == [1, 0, 0]  # the other two are past the end
    assert out.num_accepted.tolist() == [2, 2, 0]
    assert out.tokens[0].tolist() == [*RIGHT[0, :2].tolist(), -1, -1, -1]
    assert out.logprobs is not None
    assert bool(out.logprobs[0, 2:].isnan().all())
    with pytest.raises(ValueError, match=r"logits: request 0, row 2 has a NaN logit; on_invalid='flag' ends"):
        verify(logits=logits, backend=backend)
    logits[0, 2, 7] = 0
    assert verify(logits=logits, backend=backend).status.tolist() == [0, 0, 0]


def test_greedy_and_a_draft_past_a_mask() -> None:
    best = LOGITS.argmax(-1)
    out = verify(best[:, :K], temperature=0.0)
    assert out.num_accepted.tolist() == [K] * B
    allowed = [t for t in range(V) if t not in best[:, 1].tolist()]
    masked = verify(best[:, :K], temperature=0.0, bitmask=fs.pack_bitmask(allowed, V))
    assert bool((masked.num_accepted <= 1).all())


def test_sampler_verifies_and_advances() -> None:
    sampler = fs.Sampler(batch_size=B, seed=SEEDS, offset=[0, 0, 0], **FIELDS)
    out = sampler.verify(LOGITS, DRAFTS)
    assert torch.equal(out.tokens, expected([4, 2, 0]))
    assert sampler.offsets.tolist() == [5, 3, 1]
    again = fs.verify(LOGITS, DRAFTS, seed=SEEDS, offset=[5, 3, 1], **FIELDS)
    assert torch.equal(sampler.verify(LOGITS, DRAFTS).tokens, again.tokens)
    bad = LOGITS.clone()
    bad[1, 0, 0] = torch.nan
    before = sampler.offsets
    with pytest.raises(ValueError, match="request 1, row 0"):
        sampler.verify(bad, DRAFTS)
    assert torch.equal(sampler.offsets, before)


def test_sampler_counts_drafts_as_history() -> None:
    fields = {"temperature": 0.0, "no_repeat_ngram_size": 1}
    logits = torch.zeros(1, K + 1, V)
    logits[..., :6] = torch.arange(6, 0, -1)
    sampler = fs.Sampler(batch_size=1, seed=[1], **fields)
    out = sampler.verify(logits, [[1, 2, 3, 4]], output_ids=[[0]])
    assert out.tokens.tolist() == [[1, 2, 3, 4, 5]]
    assert fs.verify(logits, [[1, 2, 9, 4]], output_ids=[[0]], seed=[1], **fields).tokens.tolist() == [
        [1, 2, 3, -1, -1]
    ]


@pytest.mark.slow
def test_a_hundred_thousand_requests() -> None:
    count, drafts, vocab = 100_000, 3, 40
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(count, drafts + 1, vocab, generator=g) * 3
    seeds = torch.randint(-(2**63), 2**63 - 1, (count,), generator=g)
    output = torch.randint(-1, vocab, (count, 12), generator=g)
    fields: dict[str, Any] = {
        "temperature": torch.rand(count, generator=g) + 0.3,
        "top_k": torch.randint(0, 20, (count,), generator=g),
        "top_p": 1 - torch.rand(count, generator=g) * 0.5,
        "min_p": torch.rand(count, generator=g) * 0.1,
        "repetition_penalty": 1 + torch.rand(count, generator=g),
        "dry_multiplier": torch.rand(count, generator=g),
        "no_repeat_ngram_size": torch.randint(0, 4, (count,), generator=g),
        "xtc_probability": torch.randint(0, 2, (count,), generator=g) * 0.5,
    }
    ids = torch.empty(count, 0, dtype=torch.int64)
    texts = []
    for row in range(drafts + 1):  # plain decoding, all requests at once
        history = torch.cat([output, ids], 1)
        texts.append(fs.sample(logits[:, row], seed=seeds, offset=row, output_ids=history, **fields).tokens)
        wrong = torch.rand(count, generator=g) < 0.2
        ids = torch.cat([ids, torch.where(wrong, (texts[-1] + 1) % vocab, texts[-1])[:, None]], 1)
    right = torch.stack(texts, 1)
    accepted = (right[:, :drafts] == ids[:, :drafts]).cumprod(1).sum(1)
    out = fs.verify(logits, ids[:, :drafts], seed=seeds, output_ids=output, **fields)
    assert torch.equal(out.num_accepted.long(), accepted)
    assert torch.equal(out.tokens, right.masked_fill(torch.arange(drafts + 1) > accepted[:, None], -1))


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rule": ({"rule": "fastest"}, ValueError, "rule = 'fastest': expected 'exact'"),
    "no logits": ({"logits": 3}, TypeError, "logits: expected a tensor or an array, got int"),
    "one row": ({"logits": LOGITS[0, 0]}, ValueError, r"logits: expected \[B, K \+ 1, V\], or \[N, V\]"),
    "no number": ({"logits": LOGITS[0]}, ValueError, "num_drafts: expected the number of drafts of each request"),
    "too few drafts": ({"ids": DRAFTS[:, :2]}, ValueError, r"draft_ids: expected shape \[3, 4\].*got \[3, 2\]"),
    "too few requests": ({"ids": DRAFTS[:2]}, ValueError, r"draft_ids: expected shape \[3, 4\].*got \[2, 4\]"),
    "floats": ({"ids": DRAFTS.float()}, TypeError, "draft_ids: expected integers, got torch.float32"),
    "flat": ({"ids": DRAFTS.flatten()}, ValueError, r"draft_ids: expected shape \[B, K\], got \[12\]"),
    "text": ({"ids": "abc"}, TypeError, r"draft_ids: expected integers \[B, K\] or a list per request, got str"),
    "no id": ({"ids": [[1, "a", 2, 3]] * 3}, TypeError, r"draft_ids id \(row 0\): expected an integer, got 'a'"),
    "counts": ({"num_drafts": [1, 5, 0]}, ValueError, r"num_drafts = 5 \(request 1\): expected 0 to 4"),
    "negative": ({"num_drafts": [1, -1, 0]}, ValueError, r"num_drafts = -1 \(request 1\): expected 0 to 4"),
    "float counts": ({"num_drafts": [1.0, 2, 0]}, TypeError, "num_drafts: expected integers"),
    "two counts": ({"num_drafts": [1, 2]}, ValueError, r"num_drafts: expected shape \[3\], one per request, got \[2\]"),
    "rows": ({"logits": LOGITS[0], "num_drafts": [1, 1, 1]}, ValueError, "logits: expected 6 rows, .* got 5"),
    "sum": ({"logits": LOGITS[0], "ids": torch.zeros(9, dtype=torch.int64), "num_drafts": [1, 1, 1]}, ValueError,
            "draft_ids: expected 3 ids, as num_drafts says, got 9"),
    "seed": ({"seed": [1, 2]}, ValueError, r"seed: expected one int or 3 seeds \(one per row\), got 2"),
    "field": ({"top_k": [1, 2]}, ValueError, "top_k: expected one value for all rows or 15 values"),
    "misspelt": ({"top_kk": 3}, TypeError, r"top_kk \(did you mean top_k\?\)"),
    "history": ({"output_ids": [[1]], "presence_penalty": 1.0}, ValueError,
                r"output_ids: expected one list of token ids per row \(3\), got 1"),
    "mask": ({"bitmask": torch.zeros(2, 7, dtype=torch.int32)}, ValueError, "bitmask"),
    "logprobs": ({"top_logprobs": 2}, ValueError, "top_logprobs = 2: needs logprobs"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    given, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        verify(**given)


TREE_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a higher parent": ({"parents": [[-1, 0, 3, 1, 0]] * 3}, ValueError, r"parents\[0, 2\] = 3: expected a lower node"),
    "itself": (
        {"parents": [[-1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [-1] * 5]},
        ValueError,
        r"parents\[1, 1\] = 1: expected",
    ),
    "too few": (
        {"parents": [[-1, 0]] * 3},
        ValueError,
        r"parents: expected shape \[3, 5\], one per node, got \[3, 2\]",
    ),
    "drafts": ({"draft_ids": DRAFTS}, ValueError, r"draft_ids: expected shape \[3, 5\], one per node, got \[3, 4\]"),
    "logits": ({"logits": LOGITS[0]}, ValueError, r"logits: expected \[B, n, V\], a row for each node"),
}


@pytest.mark.parametrize("name", TREE_ERRORS)
def test_tree_errors(name: str) -> None:
    given, kind, message = TREE_ERRORS[name]
    chain: dict[str, Any] = {"logits": LOGITS, "draft_ids": RIGHT, "parents": np.tile(np.arange(-1, K), (B, 1))}
    with pytest.raises(kind, match=message):
        fs.verify_tree(**{**chain, **given})


def test_a_chain_is_a_tree() -> None:
    tokens = torch.cat([torch.full((B, 1), -1), DRAFTS], 1)
    parents = torch.arange(-1, K).expand(B, -1)
    out = fs.verify_tree(LOGITS, tokens, parents, seed=SEEDS, logprobs="processed", top_logprobs=3, **FIELDS)
    chain = verify(logprobs="processed", top_logprobs=3)
    for name in ("tokens", "num_accepted", "status", "logprobs", "ranks", "top_ids", "top_logprobs"):
        assert torch.equal(getattr(out, name).nan_to_num(7), getattr(chain, name).nan_to_num(7)), name
    assert out.path is not None
    assert out.path.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, -1, -1], [0, -1, -1, -1, -1]]
