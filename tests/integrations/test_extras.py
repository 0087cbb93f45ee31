"""Extra parameters of requests to serving stacks, without a stack: what is read, refused and said; histories; rows."""

from __future__ import annotations

import logging
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from cases import MAKERS
from stacks import MODEL

import fastsample as fs
from fastsample.integrations.asked import Asked, History, Row, padded
from fastsample.integrations.extras import FIELDS, MAX_STRINGS, NAMES, RefusedError, near_misses, read
from fastsample.integrations.serving import Step
from fastsample.params import specs

VOCAB = 300
STEP = Step(logging.getLogger("fastsample.tests"), "the filters", "the rest stays", order="joint")


def test_the_names_are_all_that_the_stacks_lack() -> None:
    stacks = {"temperature", "top_k", "top_p", "min_p"} | {name for name, _ in specs() if name.endswith("_penalty")}
    assert {*NAMES} == {name for name, _ in specs()} - stacks | {"dry_breakers"}
    assert {"ties", "order", "top_n_sigma", "no_repeat_ngram_size"} < {*NAMES}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_read_and_its_range_is_the_table_s(name: str) -> None:
    spec = FIELDS[name]
    for value in spec.examples:
        found = read({name: value, "theirs": object()})
        assert found is not None
        assert found.fields == {name: value}
    if spec.kind == "int":
        assert read({name: 10**400}).fields == {name: 2**31 - 1}  # type: ignore[union-attr]
    outside = {"choice": "other", "bool": 2, "int": spec.low - 1, "float": spec.low - 1}[spec.kind]
    bad: list[Any] = [outside, "text", [spec.examples[0]], [], {}, b"x", np.ones(2), float("nan"), (True,)]
    for value in bad if spec.kind == "int" else [*bad, 10**400]:  # integers may be as large as one likes
        with pytest.raises(RefusedError) as error:
            read({name: value})
        assert str(error.value).startswith(f"{name} = ")
        assert str(error.value).endswith(f"expected {spec.wanted}")
        assert (error.value.parameter, len(error.value.value) < 80) == (name, True)


@pytest.mark.parametrize(
    "given", [None, {}, {"theirs": 1, 3: 4}, {"top_a": 0}, {"xtc_probability": None}, [1], "top_a"]
)
def test_nothing_is_asked_for(given: Any) -> None:
    assert read(given) is None


def test_what_edits_and_what_filters() -> None:
    given = {"dry_multiplier": 0.5, "dry_range": 9, "p_less": True, "order": "top_k_first", "dry_breakers": [4, 4, 1]}
    found = read(given)
    assert found is not None
    assert found.filters == {"p_less": True, "order": "top_k_first"}
    assert found.edits == {"dry_multiplier": 0.5, "dry_range": 9}
    assert found.written() == {**found.fields, "dry_breakers": [1, 4]}
    idle = read({"dry_base": 2.0, "dry_range": 5})
    assert idle is not None
    assert idle.edits == {}
    assert read(read(given).written()) == found  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("breakers", "message"),
    [
        (1.5, "dry_breakers = 1.5: expected a token id or a string, or a list of them"),
        ([1, None], "dry_breakers = None: expected a token id or a string"),
        ([True], "dry_breakers = True: expected a token id or a string"),
        ([-1], "dry_breakers = -1: expected a token id, 0 <= id < 300"),
        ([VOCAB], "dry_breakers = 300: expected a token id, 0 <= id < 300"),
        ("\n", "dry_breakers = '\\n': expected token ids, since no tokenizer"),
        (["a"] * (MAX_STRINGS + 1), "expected at most 64 strings"),
        ([[1, 2], [3]], "dry_breakers = [1, 2]: expected a token id or a string"),
    ],
    ids=str,
)
def test_breakers_that_are_refused(breakers: Any, message: str) -> None:
    with pytest.raises(RefusedError) as error:
        read({"dry_multiplier": 1, "dry_breakers": breakers}, vocab=VOCAB)
    assert message in str(error.value)


def test_strings_stand_for_the_tokens_that_contain_them() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    for text in (":", "\n", " the"):
        found = read({"dry_multiplier": 1, "dry_breakers": [text, 3]}, tokenizer, len(tokenizer))
        assert found is not None
        assert found.breakers == sorted({3} | {token for token, other in enumerate(texts) if text in other})
    for text, why in (("", "is in every token"), ("no token contains this", "no token contains")):
        with pytest.raises(RefusedError, match=why):
            read({"dry_multiplier": 1, "dry_breakers": text}, tokenizer)
    with pytest.raises(RefusedError, match="expected a tokenizer"):
        read({"dry_multiplier": 1, "dry_breakers": "\n"}, object())


def test_near_misses() -> None:
    given = {"dry_multiplyer": 1, "xtc_probabilty": 2, "top_a": 3, "ngram_size": 4, "thinking_budget": 5, 6: 7}
    assert list(near_misses(given)) == [("dry_multiplyer", "dry_multiplier"), ("xtc_probabilty", "xtc_probability")]
    assert list(near_misses(None)) == []


# Histories and rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, lambda ids: array("q", ids)], ids=["list", "array"])
def test_a_history_follows_the_output(kind: Any) -> None:
    history, output = History(kind([1, 2])), kind([])
    assert history.ids(output).tolist() == [1, 2]
    for token in range(200):
        output.append(token)
        if token % 3 == 0:
            assert history.ids(output).tolist() == [1, 2, *range(token + 1)]
    output[-2:] = kind([-1, -1])
    assert history.ids(output[:]).tolist() == [1, 2, *range(198), -1, -1]
    again = History(kind([]))
    output[-2:] = kind([-1, -1])
    assert again.ids(output).tolist()[-3:] == [197, -1, -1]
    output[-2:] = kind([5, 6])
    assert again.ids(output).tolist()[-3:] == [197, 5, 6]
    del output[50:]
    output.append(9)
    assert again.ids(output).tolist() == [*range(50), 9]
    assert History(None).ids(kind([3])).tolist() == [3]


def test_padding() -> None:
    assert padded([[1, 2], [], np.array([3])], more=1).tolist() == [[1, 2, -1], [-1, -1, -1], [3, -1, -1]]
    assert padded([[], []]).shape == (2, 0)


def row(**given: Any) -> Row:
    extras = read(given)
    assert extras is not None
    return STEP.row(extras)


def test_rows_of_their_own_among_others() -> None:
    """The draw, what is kept and the edits of a batch, where rows have records of their own and where they do not."""
    logits = MAKERS["lm"](4, VOCAB, torch.Generator().manual_seed(2))
    asked = Asked({2: row(top_a=0.4, ties="all"), 0: row(dry_multiplier=1.0, dry_allowed_length=1)})
    seeds, offsets = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    records = STEP.records(asked, logits)
    assert records is not None
    before = records.clone()
    k = torch.tensor([9, 8, 7, 300], dtype=torch.int32)
    fields = {"top_k": k, "order": "joint", "top_a": [0, 0, 0.4, 0], "ties": ["first", "first", "all", "first"]}
    found = STEP.draw(logits, seeds, offsets, records, top_k=k)
    assert torch.equal(found, fs.sample(logits, **fields, seed=seeds, offset=offsets).tokens)
    assert torch.equal(STEP.keep(logits, records, top_k=k), fs.filter_logits(logits, **fields))
    assert torch.equal(records, before)
    assert STEP.records(asked, logits) is records
    assert STEP.records(None, logits) is None
    assert STEP.records(Asked({0: asked.rows[0]}), logits) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_touch_their_rows_only(dtype: torch.dtype) -> None:
    logits = MAKERS["lm"](5, VOCAB, torch.Generator().manual_seed(2)).to(dtype)
    logits[3, 7], logits[1, 20] = torch.nan, -torch.inf
    given = {1: {"dry_multiplier": 1.0, "dry_allowed_length": 1, "dry_breakers": [4]}, 3: {"no_repeat_ngram_size": 1}}
    asked = Asked({at: row(**fields) for at, fields in given.items()})
    histories = {1: [5, 20, 6, 4, 5, 6, 8, 5], 3: [9, 9, 10]}
    edited = logits.clone()
    STEP.edit(edited, asked, padded(list(histories.values())))
    for at in (0, 2, 4):
        assert torch.equal(edited[at], logits[at])
    fields = {name: value for name, value in given[1].items() if name != "dry_breakers"}
    history = {"prompt_ids": [histories[1]], "dry_breakers": [4]}
    wanted = fs.filter_logits(logits[1:2], **fields, **history, backend="reference")
    assert torch.equal(edited[1:2], wanted.to(dtype))
    assert not torch.equal(edited[1], logits[1])
    assert (
        STEP.draw(edited, torch.arange(5), torch.zeros(5, dtype=torch.int64))[3] == 0
    )  # as a bad row is without edits


def test_misspelt_names_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    step = Step(logging.getLogger("fastsample.tests"), "the filters", "the rest stays")
    for end in range(100):
        step.say_near_misses({f"dry_multiplier{end}": 1}, "extra_args")
    assert len(caplog.records) == 20
