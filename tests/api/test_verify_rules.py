"""fastsample.verify around its rules: what drafts were drawn from, buffers, and traces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo

import fastsample as fs

# Inductor imports torch's own deprecated parts.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

B, K, V = 3, 4, 90
G = torch.Generator().manual_seed(4)
LOGITS = torch.randn(B, K + 1, V, generator=G) * 2
DRAFT = LOGITS[:, :K] + torch.randn(B, K, V, generator=G)
IDS = torch.multinomial(DRAFT.softmax(-1).flatten(0, 1), 1, generator=G).view(B, K)
RULES = ("chain", "block")
NAMES = fs.VerifyOutput.__slots__


def verify(rule: str = "chain", **more: Any) -> fs.VerifyOutput:
    given = {"logits": LOGITS, "draft_ids": IDS, "seed": [3, 4, 5], "rule": rule}
    if rule != "exact" and "draft_probs" not in more:
        given["draft_logits"] = DRAFT
    return fs.verify(**given | more)


def assert_same(a: fs.VerifyOutput, b: fs.VerifyOutput) -> None:
    for name in NAMES:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        assert x is None or torch.equal(x.nan_to_num(7), y.nan_to_num(7)), name


@pytest.mark.parametrize("rule", RULES)
def test_probabilities_are_logits_that_have_been_through_softmax(rule: str) -> None:
    """Masses of either differ by rounding alone, which no draw here is near."""
    by_logits = verify(rule, temperature=0.7, top_k=30)
    by_probs = verify(rule, temperature=0.7, top_k=30, draft_probs=(DRAFT / 0.7).softmax(-1))
    assert_same(by_logits, by_probs)
    assert 0 < int(by_logits.num_accepted.sum()) < B * K


@pytest.mark.parametrize("rule", RULES)
def test_the_drafts_may_have_parameters_of_their_own(rule: str) -> None:
    """What they were drawn from is then taken as it is, whatever the target's filters are."""
    cold = (DRAFT / 0.3).softmax(-1)
    own = verify(rule, top_p=0.9, draft_params=fs.SamplingParams(temperature=0.3))
    as_it_is = verify(rule, top_p=0.9, draft_probs=cold, draft_params=fs.SamplingParams())
    each = verify(rule, top_p=0.9, draft_params=fs.SamplingParams(temperature=[0.3] * B))
    assert_same(own, as_it_is)
    assert_same(own, each)
    assert not torch.equal(own.tokens, verify(rule, top_p=0.9).tokens)


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_from_the_target_itself_is_always_accepted(rule: str) -> None:
    ids = torch.multinomial(LOGITS[:, :K].softmax(-1).flatten(0, 1), 1, generator=G).view(B, K)
    out = verify(rule, draft_ids=ids, draft_logits=LOGITS[:, :K])
    assert out.num_accepted.tolist() == [K] * B
    plain = fs.sample(LOGITS[:, K], seed=[3, 4, 5], offset=K)
    assert torch.equal(out.tokens[:, K], plain.tokens)


@pytest.mark.parametrize("rule", RULES)
def test_lists_are_as_long_as_they_are(rule: str) -> None:
    """A list that ends is the end of the drafts; a draft of -1 is one that is rejected."""
    lists = [IDS[0].tolist(), IDS[1, :2].tolist(), []]
    counts = verify(rule, draft_ids=IDS, num_drafts=[4, 2, 0])
    assert_same(verify(rule, draft_ids=lists), counts)
    assert int(counts.tokens[2, 0]) == int(fs.sample(LOGITS[2, 0], seed=[5]).tokens)


@pytest.mark.parametrize("rule", RULES)
def test_a_sampler_verifies_by_the_rules(rule: str) -> None:
    sampler = fs.Sampler(batch_size=B, seed=[3, 4, 5], top_k=40)
    assert_same(sampler.verify(LOGITS, IDS, rule=rule, draft_logits=DRAFT), first := verify(rule, top_k=40))
    assert torch.equal(sampler.offsets, first.num_accepted.long() + 1)


ERRORS = {
    "rule": ({"rule": "typical"}, ValueError, "rule = 'typical': expected 'exact', 'chain' or 'block'"),
    "exact": ({"rule": "exact", "draft_logits": DRAFT}, ValueError, "draft_logits: expected None with rule='exact'"),
    "neither": ({"draft_logits": None}, ValueError, "draft_logits, draft_probs: expected one of them"),
    "both": ({"draft_probs": DRAFT.softmax(-1), "draft_logits": DRAFT}, ValueError, "expected one of them"),
    "shape": ({"draft_logits": DRAFT[:, :2]}, ValueError, r"draft_logits: expected shape \[3, 4, 90\] on cpu, got"),
    "vocab": ({"draft_logits": DRAFT[..., :50]}, ValueError, r"expected shape \[3, 4, 90\] on cpu, got \[3, 4, 50\]"),
    "list": ({"draft_logits": DRAFT.tolist()}, TypeError, "draft_logits: expected a tensor or an array, got list"),
    "dtype": ({"draft_logits": DRAFT.double()}, TypeError, "draft_logits: expected float32, float16 or bfloat16"),
    "params": ({"draft_params": {"top_k": 3}}, TypeError, "draft_params: expected SamplingParams, got dict"),
    "measured": (
        {"draft_probs": DRAFT.softmax(-1), "typical_p": 0.5},
        ValueError,
        "draft_probs: typical_p is measured on logits; pass draft_logits instead",
    ),
    "buffers": ({"out": 3}, TypeError, "out: expected a VerifyOutput, got int"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    more, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        verify(**more)


@pytest.mark.parametrize("rule", RULES)
def test_an_invalid_row_of_a_draft(rule: str) -> None:
    draft = DRAFT.clone()
    draft[1, 0, 5] = torch.nan
    with pytest.raises(ValueError, match="draft_logits: request 1, draft 0 has a NaN logit; on_invalid='flag' rejects"):
        verify(rule, draft_logits=draft)
    out = verify(rule, draft_logits=draft, on_invalid="flag")
    assert out.status.tolist() == [0, 0, 0]
    assert int(out.num_accepted[1]) == 0
    p = draft.softmax(-1)
    p[1, 0] = -1
    with pytest.raises(ValueError, match="draft_probs: request 1, draft 0 has a negative or infinite probability"):
        verify(rule, draft_probs=p)


def test_a_warning_points_at_the_call() -> None:
    parents = torch.zeros(B, K, dtype=torch.int64)
    for call in (lambda: verify("exact", presence_penalty=0.5), lambda: verify("chain", presence_penalty=0.5)):
        with pytest.warns(UserWarning, match="has no effect without") as found:
            call()
        assert [warning.filename for warning in found] == [__file__]
    with pytest.warns(UserWarning, match="has no effect without") as found:
        fs.verify_tree(LOGITS[:, :K], IDS, parents, seed=1, presence_penalty=0.5)
    assert [warning.filename for warning in found] == [__file__]


# Buffers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["exact", *RULES])
def test_buffers_are_filled(rule: str) -> None:
    asked = {"logprobs": "processed", "top_logprobs": 2}
    first, other = verify(rule, **asked), verify(rule, **asked, seed=[8, 9, 10])
    before = {name: getattr(other, name) for name in NAMES}
    assert verify(rule, **asked, out=other) is other
    assert_same(other, first)
    assert all(getattr(other, name) is value for name, value in before.items())


def test_buffers_are_what_fresh_ones_would_be() -> None:
    out = verify("exact")
    for name, wrong, message in (
        ("tokens", out.tokens.int(), r"out.tokens: expected torch.int64 \[3, 5\]"),
        ("num_accepted", out.num_accepted[:2], r"out.num_accepted: expected torch.int32 \[3\]"),
        ("status", out.num_accepted, "shares memory with"),
        ("status", IDS.view(torch.int32).view(-1)[:3], "out.status: shares memory with draft_ids"),
    ):
        bad = fs.VerifyOutput(out.tokens, out.num_accepted, out.status)
        setattr(bad, name, wrong)
        with pytest.raises(ValueError, match=message):
            verify("exact", out=bad)
    with pytest.raises(TypeError, match=r"out.logprobs: expected a torch.Tensor, got NoneType"):
        verify("exact", logprobs="raw", out=out)


# Traces --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("rule", ["exact", *RULES])
def test_torch_compile_makes_one_graph(rule: str) -> None:
    more = {} if rule == "exact" else {"draft_logits": DRAFT}

    def step(logits: torch.Tensor, ids: torch.Tensor, seed: torch.Tensor, offset: torch.Tensor) -> fs.VerifyOutput:
        return fs.verify(
            logits * 2, ids, seed=seed, offset=offset, rule=rule, top_k=20, logprobs="raw", top_logprobs=2, **more
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for turn in range(3):
        given = (LOGITS, IDS, torch.tensor([turn, 2, 3]), torch.tensor([turn, 0, 5]))
        assert_same(compiled(*given), step(*given))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("fresh")
def test_torch_compile_of_packed_rows_and_of_trees() -> None:
    counts, parents = torch.tensor([2, 0, 4]), torch.tensor([[-1, 0, 0, 1, 3]] * B)
    rows = torch.cat([LOGITS[b, : n + 1] for b, n in enumerate(counts.tolist())])
    tree = fs.sample(LOGITS[:, :1].expand(-1, K + 1, -1), seed=1).tokens

    def packed(rows: torch.Tensor) -> fs.VerifyOutput:
        return fs.verify(rows, IDS, num_drafts=counts, seed=3)

    def walk(logits: torch.Tensor) -> fs.VerifyOutput:
        return fs.verify_tree(logits, tree, parents, seed=3, logprobs="processed")

    for function, given in ((packed, rows), (walk, LOGITS)):
        assert_same(torch.compile(function, fullgraph=True, backend="aot_eager")(given), function(given))


@pytest.mark.usefixtures("fresh")
def test_what_cannot_be_in_a_graph_breaks_it() -> None:
    def step(ids: Any, **more: Any) -> fs.VerifyOutput:
        return fs.verify(LOGITS, ids, seed=3, **more)

    lists = IDS.tolist()
    assert_same(torch.compile(step, backend="aot_eager")(lists), step(lists))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="draft_ids: expected a tensor in whatever makes a graph"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(lists)
    own = {"rule": "chain", "draft_logits": DRAFT, "draft_params": fs.SamplingParams(top_k=3)}
    assert_same(torch.compile(step, backend="aot_eager")(IDS, **own), step(IDS, **own))
