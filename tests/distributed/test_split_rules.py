"""The rules "chain" and "block" where rows are split over ranks, against whole rows: equal to the bit on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drafts import KEPT, OFFSET
from ranks import on_ranks
from rejections import BLOCKS, Block
from split import CUTS, LISTS, assert_equal, listing

import fastsample as fs
import fastsample.distributed as fd
from fastsample.backends import engine
from fastsample.call import SampleCall
from fastsample.distributed.rules import LawPart
from fastsample.inputs import Rows, pack_offsets, pack_params, pack_seeds
from fastsample.outputs import Options
from fastsample.rejection import weigh

pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect without")  # of requests without ids

Tensor = torch.Tensor

REPORTS: tuple[dict[str, Any], ...] = (
    {},
    {"logprobs": "raw", "top_logprobs": 1, "kept": "ids"},
    {"logprobs": "processed", "top_logprobs": 1, **KEPT},
)


WIDE = ("logits", "draft_logits", "draft_probs")


def asked(block: Block) -> dict[str, Any]:
    """The arguments of `fastsample.verify`."""
    logits, draft, ids = block.proposed()
    how: dict[str, Any] = {"draft_ids": ids, "rule": block.rule, "seed": block.seeds, "offset": OFFSET}
    if block.packed:
        counts = block.counts()
        logits = torch.cat([logits[b, : n + 1] for b, n in enumerate(counts)])
        draft, how["num_drafts"] = torch.cat([draft[b, :n] for b, n in enumerate(counts)]), counts
    return how | block.build()[1] | {"logits": logits, "draft_probs" if block.probs else "draft_logits": draft}


def split(call: Any, cuts: tuple[int, ...], how: dict[str, Any]) -> list[Any]:
    """What call(**how) returns on each rank, with its part of what is as wide as a row."""

    def on_rank(wire: Any, begin: int, end: int) -> Any:
        own = {name: how[name][..., begin:end] for name in WIDE if isinstance(how.get(name), Tensor)}
        return call(**(how | own), vocab_start=begin, vocab_size=how["logits"].shape[-1], group=wire)

    return on_ranks(cuts, on_rank)


def check(block: Block, number: int, backend: str = "cpu") -> None:
    """Of a block, with a way to split it, lists and reports that depend on the number."""
    cut, lists = list(CUTS.values())[number % len(CUTS)], LISTS[number // len(CUTS) % len(LISTS)]
    how = asked(block) | REPORTS[number % len(REPORTS)] | {"on_invalid": "flag"}
    whole = fs.verify(**how, backend="cpu")
    with listing(*lists):
        assert_equal(split(fd.verify, cut(block.vocab), how | {"backend": backend}), whole)


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_whole_rows(name: str) -> None:
    number = list(BLOCKS).index(name)
    for turn in (0, 17, 34):
        check(BLOCKS[name], number + turn, "reference" if number % 7 == 0 else "cpu")


# Other drafts, and what may be said of them --------------------------------------------------------------------------

B, K, V = 3, 4, 301
G = torch.Generator().manual_seed(4)
LOGITS = torch.randn(B, K + 1, V, generator=G) * 2
DRAFT = LOGITS[:, :K] + torch.randn(B, K, V, generator=G)
IDS = torch.multinomial(DRAFT.softmax(-1).flatten(0, 1), 1, generator=G).view(B, K)
GIVEN: dict[str, Any] = {"logits": LOGITS, "draft_ids": IDS, "seed": 3, "offset": 7}
CUT = (0, 45, 45, 200, V)

KINDS: dict[str, dict[str, Any]] = {
    "listed": {"draft_logits": DRAFT, "top_k": 9},
    "spread": {"draft_logits": DRAFT},
    "spread, of what is listed": {
        "draft_logits": DRAFT,
        "draft_params": fs.SamplingParams(temperature=3.0),
        "top_k": 9,
    },
    "listed, of what is spread": {"draft_probs": DRAFT.softmax(-1), "draft_params": fs.SamplingParams(top_p=0.3)},
    "parameters of each": {
        "draft_logits": DRAFT,
        "temperature": [1.0, 0.0, 0.5],
        "top_p": [0.9, 1.0, 1.0],
        "draft_params": fs.SamplingParams(top_k=[3, 0, 50], xtc_probability=0.5, xtc_threshold=0.02),
    },
    "16 bits of one and of the other": {"logits": LOGITS.half(), "draft_probs": DRAFT.softmax(-1).bfloat16()},
    "the drafter's own law": {"draft_logits": LOGITS[:, :K], "draft_params": fs.SamplingParams(), "top_p": 0.9},
    "probabilities of any sum": {"draft_probs": DRAFT.exp() * 1e-3},
    "penalties and a mask": {
        "draft_logits": DRAFT,
        "repetition_penalty": 1.5,
        "dry_multiplier": 1.0,
        "no_repeat_ngram_size": 2,
        "output_ids": [[1, 250, 1], [300], []],
        "bitmask": torch.randint(-(2**31), 2**31, (B, 10), generator=G).to(torch.int32),
    },
    "no requests": {"logits": LOGITS[:0], "draft_ids": IDS[:0], "draft_logits": DRAFT[:0]},
}


@pytest.mark.parametrize("rule", ["chain", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_of_all_kinds(kind: str, rule: str) -> None:
    how = GIVEN | KINDS[kind] | {"rule": rule, "logprobs": "raw", "top_logprobs": 3, **KEPT}
    whole = fs.verify(**how)
    for lists in ((256, 1024), (3, 16)):
        with listing(*lists):
            assert_equal(split(fd.verify, CUT, how), whole)
    assert_equal(split(fd.verify, (0, V), how), whole)


@pytest.mark.parametrize("rule", ["chain", "block"])
@pytest.mark.parametrize("xtc", [0.0, 0.9])
@pytest.mark.parametrize("probs", [False, True])
def test_laws_of_a_single_token(probs: bool, xtc: float, rule: str) -> None:
    """Where none that is kept has a mass beside a maximum that is not, the first one is all there is."""
    logits = torch.randn(B, K + 1, V, generator=torch.Generator().manual_seed(1)) * 0.01
    logits[..., 7] = 3.0
    typical = {"typical_p": 0.2, "temperature": 0.01, "order": "temperature_last"}
    typical |= {"xtc_probability": xtc, "xtc_threshold": 1e-4}
    drawn = fs.sample(logits, seed=1, **typical).tokens
    assert bool((drawn != 7).all())
    how: dict[str, Any] = {"logits": logits, "draft_ids": drawn[:, :K], "seed": 3, "rule": rule, **typical, **KEPT}
    how |= {"draft_params": fs.SamplingParams(**({"top_p": 0.5} if probs else typical))}
    how |= {"draft_probs": logits[:, :K].softmax(-1)} if probs else {"draft_logits": logits[:, :K]}
    whole = fs.verify(**how)
    assert probs or whole.num_accepted.tolist() == [K] * B
    for lists in ((256, 1024), (3, 16)):
        with listing(*lists):
            assert_equal(split(fd.verify, CUT, how), whole)


@pytest.mark.parametrize("rule", ["chain", "block"])
def test_columns_past_the_vocabulary(rule: str) -> None:
    padded = {name: torch.nn.functional.pad(GIVEN.get(name, DRAFT), (0, 99), value=torch.nan) for name in WIDE[:2]}

    def cut_off(**how: Any) -> fs.VerifyOutput:
        return fd.verify(**how | {"vocab_size": V})

    whole = fs.verify(**GIVEN, draft_logits=DRAFT, rule=rule)
    assert_equal(split(cut_off, (0, 100, 200, 300, 400), GIVEN | padded | {"rule": rule}), whole)


@pytest.mark.parametrize("rule", ["chain", "block"])
def test_a_sampler(rule: str) -> None:
    how = {"batch_size": B, "seed": 7, "top_p": [0.7, 1.0, 0.9], "presence_penalty": 0.5, "logprobs": "processed"}

    def twice(sampler: fs.Sampler, logits: Tensor, draft: Tensor) -> list[Any]:
        found: list[Any] = []
        for drafts in ({"draft_logits": draft}, {"draft_probs": draft.exp()}):
            found += [sampler.verify(logits, IDS, rule=rule, output_ids=[[1, 250]] * B, **drafts), sampler.offsets]
        return found

    def on_rank(logits: Tensor, draft_logits: Tensor, **part: Any) -> list[Any]:
        return twice(fd.ShardedSampler(**how, **part), logits, draft_logits)

    expected = twice(fs.Sampler(**how), LOGITS, DRAFT)
    for found in split(on_rank, CUT, {"logits": LOGITS, "draft_logits": DRAFT}):
        for ours, whole in zip(found[::2], expected[::2], strict=True):
            assert_equal([ours], whole)
        assert all(torch.equal(*pair) for pair in zip(found[1::2], expected[1::2], strict=True))


@pytest.mark.parametrize("rule", ["chain", "block"])
@pytest.mark.parametrize("fields", [{"top_k": 9}, {"temperature": 2.0}, {"xtc_probability": 0.5}])
def test_without_a_seed_ranks_take_that_of_the_first(fields: dict[str, Any], rule: str) -> None:
    """Threads draw from one generator, so each has another seed to begin with."""
    how = GIVEN | {"seed": None, "draft_logits": DRAFT, "rule": rule, "logprobs": "processed", **fields}
    found = split(fd.verify, CUT, how)
    assert_equal(found, found[0])


# What they are made of -----------------------------------------------------------------------------------------------

LAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "filters": {"top_k": 40, "top_p": 0.9},
    "XTC": {"xtc_probability": 0.5, "xtc_threshold": 0.02},
    "XTC that leaves one without a mass": {"xtc_probability": 0.5, "xtc_threshold": 1e-30},
    "greedy": {"temperature": 0.0},
    "one that has no mass": {"typical_p": 0.2, "temperature": 0.01, "order": "temperature_last"},
}


def rows_of(count: int, fields: dict[str, Any]) -> Rows:
    return Rows(pack_params(None, fields, count), pack_seeds(range(count), count), pack_offsets(5, count))


@pytest.mark.parametrize("lists", [(256, 1024), (3, 16)])
@pytest.mark.parametrize(("name", "kind"), [*((n, "logits") for n in LAWS), *((n, "probs") for n in list(LAWS)[:-1])])
def test_a_law_weighs_what_it_does_of_whole_rows(name: str, kind: Any, lists: tuple[int, int]) -> None:
    """In all, and each of its tokens. (Typical, of the last, needs logits.)"""
    x = LOGITS.flatten(0, 1).clone()
    x[:, 7] = x.amax(-1) + 3
    x[3, 9], x[4] = torch.nan, -torch.inf
    fields, x = LAWS[name], x if kind == "logits" else (x * 5).exp()
    rows, ids = rows_of(len(x), fields), torch.arange(len(x)) * 23 - 1
    masses = torch.empty(x.shape, dtype=torch.int64)
    whole = weigh(engine("cpu"), x, rows, ids, kind, masses)
    wanted = torch.where((ids >= 0) & (ids < V), masses.gather(1, ids.clamp(0, V - 1)[:, None])[:, 0], 0)

    def on_rank(wire: Any, begin: int, end: int) -> None:
        part = fd.Split(begin, V, group=wire)
        found, own = part.engine.decide(rows, x[:, begin:end], kind)
        law = LawPart(found, own, False)
        told = law.heard(wire.gather(law.told(ids)), ids)
        valid = told.status == 0
        assert torch.equal(told.status, whole.status)
        assert torch.equal(told.weights, torch.stack([wanted, masses.sum(-1)], 1))
        assert torch.equal(law.masses(valid.nonzero()[:, 0]), masses[valid][:, begin:end])
        assert torch.equal(law.shares[wire.rank], masses[:, begin:end].sum(-1))

    with listing(*lists):
        on_ranks(CUT, on_rank)


@pytest.mark.parametrize("fields", [{"top_k": 9}, {"top_p": 0.9}, {"temperature": 2.0}], ids=str)
@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_what_is_said_of_tokens_that_are_given(mode: Any, fields: dict[str, Any]) -> None:
    """Where none is, it is drawn, also where lists have room."""
    x = LOGITS.flatten(0, 1)
    rows = rows_of(len(x), fields)
    given = fs.sample(x, seed=99, **fields).tokens
    given[::3] = -1

    def ask(table: Tensor, backend: Any) -> fs.SampleOutput:
        call = SampleCall(Options(logprobs=mode, top_logprobs=3, on_invalid="flag", backend=backend))
        return call.of_tokens(call.table(table), rows, given)

    def on_rank(wire: Any, begin: int, end: int) -> fs.SampleOutput:
        part = fd.Split(begin, V, group=wire)
        return ask(part.whole(x[:, begin:end]), part.engine)

    for lists in ((256, 1024), (3, 16)):
        with listing(*lists):
            assert_equal(on_ranks(CUT, on_rank), ask(x, "cpu"))


# Errors --------------------------------------------------------------------------------------------------------------


def said(call: Any, how: dict[str, Any]) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**how)
    return str(caught.value)


@pytest.mark.parametrize("fields", [{}, {"top_k": 9}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("where", ["logits", "draft_logits", "draft_probs"])
def test_an_invalid_row_is_every_ranks(where: str, fields: dict[str, Any]) -> None:
    drafts = {"draft_probs": DRAFT.softmax(-1)} if where == "draft_probs" else {"draft_logits": DRAFT}
    how = GIVEN | drafts | {"rule": "chain"} | fields
    how[where] = how[where].clone()
    how[where][1, 0, 299] = torch.nan
    for rule in ("chain", "block"):
        flagged = how | {"rule": rule, "on_invalid": "flag", "logprobs": "raw", **KEPT}
        whole = fs.verify(**flagged)
        assert bool(whole.status[1] == 1) == (where == "logits")
        for lists in ((256, 1024), (3, 16)):
            with listing(*lists):
                assert_equal(split(fd.verify, CUT, flagged), whole)
    whole = said(fs.verify, how)
    assert "request 1" in whole
    assert split(lambda **own: said(fd.verify, own), CUT, how) == [whole] * 4


WRONG: dict[str, dict[str, Any]] = {
    "none": {},
    "both": {"draft_logits": DRAFT, "draft_probs": DRAFT},
    "a list": {"draft_logits": [[[0.0]]]},
    "integers": {"draft_logits": DRAFT.long()},
    "few rows": {"draft_logits": DRAFT[:, 1:]},
    "parameters of logits": {"draft_probs": DRAFT.exp(), "draft_params": fs.SamplingParams(typical_p=0.5)},
    "no parameters": {"draft_logits": DRAFT, "draft_params": {"top_k": 3}},
    "another rule": {"draft_logits": DRAFT, "rule": "tree"},
    "a rule that compares tokens": {"draft_logits": DRAFT, "rule": "exact"},
}


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_refusals_are_those_of_whole_rows(given: dict[str, Any]) -> None:
    how = GIVEN | {"rule": "chain"} | given
    assert split(lambda **own: said(fd.verify, own), (0, V), how) == [said(fs.verify, how)]


def test_drafts_of_other_columns_than_the_logits() -> None:
    with pytest.raises(ValueError, match=r"draft_probs: expected 301 columns, as .* got shape \[3, 4, 300\]"):
        fd.verify(**GIVEN, vocab_start=0, vocab_size=V, rule="chain", draft_probs=DRAFT[..., 1:].exp())


LATER: dict[str, dict[str, Any]] = {
    "rule": {"rule": "block"},
    "rule of tokens": {"rule": "exact", "draft_logits": None},
    "draft_logits or draft_probs": {"draft_logits": None, "draft_probs": DRAFT},
    "draft_logits or draft_probs: 16 bits": {"draft_logits": DRAFT.half()},
    "draft_params": {"draft_params": fs.SamplingParams(top_k=3)},
    "draft_ids": {"draft_ids": IDS + 1},
    "logprobs": {"logprobs": "raw"},
    "kept": {"kept": "bitmask"},
}


@pytest.mark.parametrize("name", LATER)
def test_ranks_that_differ_in_a_first_call(name: str) -> None:
    def differs(**how: Any) -> str:
        last = LATER[name] if how["vocab_start"] == 200 else {}
        own = {key: v if v is None or key not in WIDE else v[..., 200:] for key, v in last.items()}
        return said(fd.verify, how | own)

    found = split(differs, CUT, GIVEN | {"rule": "chain", "draft_logits": DRAFT})
    argument = name.partition(":")[0].removesuffix(" of tokens")
    assert found == [f"{argument}: expected the same on every rank, rank 3 differs from rank 0"] * 4
