"""Best-of-N in chunks and in rounds: the same candidates, and the same answer from fewer of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from table_model import TableModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fastsample as fs
from fastsample.cli.model import shipped_model
from fastsample.integrations.best_of_n.rank import Candidate, decided, ranked
from fastsample.integrations.grammar import GrammarCompiler

V, EOS = 64, 2
IDS = torch.tensor([[5, 9, 7], [1, 1, 8], [4, 4, 60]])
SIZES = (1, 3, 4, 9, 100)


@pytest.fixture(scope="module")
def table() -> TableModel:
    torch.manual_seed(1)
    model = TableModel(2 * torch.randn(V, V)).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=EOS)
    return model


@contextmanager
def rows_seen(model: Any) -> Iterator[list[int]]:
    """How many rows the model runs at once, at each step."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: seen.append(len(given.get("decoder_input_ids", given.get("input_ids")))), with_kwargs=True
    )
    yield seen
    hook.remove()


# Chunks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 5},
        {"seed": [5, 6, 2**63], "temperature": [0.5, 0.0, 1.5], "offset": [0, 3, 9]},
        {"seed": 5, "presence_penalty": torch.tensor([0.0, 3.0, -1.0]), "offset": "prompt"},
        {"seed": 5, "dry_multiplier": 2.0, "dry_breakers": [[3, 4], None, [5]], "logprobs": "processed"},
    ],
    ids=["seed", "per prompt", "penalties", "breakers"],
)
def test_chunks_change_nothing(table: TableModel, options: dict[str, Any]) -> None:
    options |= {"max_new_tokens": 7, "top_k": 40}
    want = fs.best_of_n(table, IDS, 4, **options)
    for size in SIZES:
        with rows_seen(table) as rows:
            assert fs.best_of_n(table, IDS, 4, batch_size=size, **options) == want
        assert max(rows) <= size


def test_without_a_seed_torch_repeats_it(table: TableModel) -> None:
    found = []
    for size in (None, 2):
        torch.manual_seed(3)
        found.append(fs.best_of_n(table, IDS, 3, max_new_tokens=5, batch_size=size))
    assert found[0] == found[1]


def test_chunks_of_padded_prompts() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=V, num_attention_heads=2, pad_token_id=0, **sizes)).eval()
    with torch.no_grad():
        lm.lm_head.weight *= 20
    lm.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=EOS)
    ids = {"input_ids": [[9, 7, 8], [4, 11, 5, 9, 30], [3]]}
    options: dict[str, Any] = {"seed": 1, "max_new_tokens": 6, "temperature": 0.7}
    want = [tokens(result) for result in fs.best_of_n(lm, ids, 3, **options)]
    for size in (1, 2, 4, 6):
        assert [tokens(result) for result in fs.best_of_n(lm, ids, 3, batch_size=size, **options)] == want


def test_chunks_of_an_encoder_decoder() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=V, decoder_start_token_id=0, eos_token_id=EOS, **sizes)).eval()
    more = {"input_ids": IDS, "decoder_input_ids": torch.tensor([[0, 5], [0, 6], [0, 7]])}
    options: dict[str, Any] = {"seed": 1, "max_new_tokens": 6}
    want = [tokens(result) for result in fs.best_of_n(t5, more, 3, **options)]
    for size in (1, 3, 6):
        with rows_seen(t5) as rows:
            assert [tokens(result) for result in fs.best_of_n(t5, more, 3, batch_size=size, **options)] == want
        assert max(rows) <= size


def test_chunks_of_grammars() -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    model = AutoModelForCausalLM.from_pretrained(shipped_model(), dtype="float32")
    digits, letters, last = map(GrammarCompiler(tokenizer).regex, ("[0-9]{3}", "[a-c]{4}", "[x-z]{2}"))
    options: dict[str, Any] = {"tokenizer": tokenizer, "seed": 7, "max_new_tokens": 8}
    for grammar in (digits, [digits, None], [digits, letters, last, last, letters, digits]):
        want = [tokens(r) for r in fs.best_of_n(model, ["The", "Use this"], 3, grammar=grammar, **options)]
        for size in (2, 3):
            got = fs.best_of_n(model, ["The", "Use this"], 3, grammar=grammar, batch_size=size, **options)
            assert [tokens(result) for result in got] == want


def tokens(result: Any) -> dict[int, list[int]]:
    return {c.index: c.tokens for c in result.candidates}


# Rounds ---------------------------------------------------------------------------------------------------------------


class Ids:
    """A tokenizer whose words are the ids."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def parity(text: str) -> str | None:
    """A vote on the last id: odd, even, or no answer."""
    number = int(text.split()[-1])
    return None if number % 5 == 0 else "odd" if number % 2 else "even"


@pytest.mark.parametrize("size", [1, 5, 64])
def test_rounds_draw_the_first_candidates(table: TableModel, size: int) -> None:
    options: dict[str, Any] = {"seed": 5, "max_new_tokens": 3, "tokenizer": Ids(), "vote": parity}
    full = fs.best_of_n(table, IDS, 24, **options)
    short = fs.best_of_n(table, IDS, 24, round_size=size, **options)
    for whole, part in zip(full, short, strict=True):
        assert part.answer == whole.answer
        assert tokens(part) == {index: ids for index, ids in tokens(whole).items() if index < part.drawn}
        assert part.drawn == stop(whole, size)
    assert [fs.best_of_n(table, IDS, 24, round_size=size, batch_size=n, **options) for n in (5, 7)] == [short] * 2
    assert size > 1 or len({part.drawn for part in short}) > 1  # each prompt ends by itself


def stop(result: Any, size: int) -> int:
    """After how many candidates the vote is decided, by trying the worst that can come."""
    answers = [c.answer for c in sorted(result.candidates, key=lambda c: c.index)]
    for drawn in range(size, len(answers), size):
        if not changeable(answers[:drawn], len(answers) - drawn):
            return drawn
    return len(answers)


def changeable(answers: list[Any], left: int) -> bool:
    """Whether `left` votes, all for one answer, could beat or reach the leader."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return True
    leader = votes.most_common(1)[0][0]
    rivals = [rival for rival in [*votes, "one more"] if rival != leader]
    return any(votes[rival] + left >= votes[leader] for rival in rivals)


ANSWERS = st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=12)


@given(ANSWERS, ANSWERS, st.randoms(use_true_random=False))
def test_what_is_decided_stays(before: list[str | None], after: list[str | None], random: Any) -> None:
    candidates = [Candidate(i, "", [], [], random.random(), answer) for i, answer in enumerate(before + after)]
    drawn = candidates[: len(before)]
    assert decided(drawn, len(after)) == (not changeable(before, len(after)))
    if decided(drawn, len(after)):
        assert ranked(candidates).answer == ranked(drawn).answer


def test_a_failed_candidate_has_no_vote(table: TableModel) -> None:
    options: dict[str, Any] = {"seed": 5, "max_new_tokens": 4, "tokenizer": Ids()}

    def vote(text: str) -> str | None:
        return {"odd": "odd"}[parity(text) or ""]  # an error for all others

    with pytest.warns(RuntimeWarning, match="candidates failed"):
        full = fs.best_of_n(table, IDS[0], 40, vote=vote, **options)
    with pytest.warns(RuntimeWarning, match="candidates failed"):
        short = fs.best_of_n(table, IDS[0], 40, vote=vote, round_size=4, **options)
    assert short.drawn == stop(full, 4)
    assert short.votes == {"odd": sum(c.error is None for c in short.candidates)}


# Bars and refusals ----------------------------------------------------------------------------------------------------


def test_a_bar_on_stderr(
    table: TableModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsample.integrations.best_of_n.draw.tqdm.monitor_interval", 0)
    options: dict[str, Any] = {"seed": 5, "max_new_tokens": 4, "batch_size": 5, "eos_token_id": None}
    quiet = fs.best_of_n(table, IDS, 4, **options)
    assert capsys.readouterr() == ("", "")
    seen: list[float] = []
    monkeypatch.setattr("fastsample.integrations.best_of_n.draw.Bar._move_to", lambda self, place: seen.append(place))
    assert fs.best_of_n(table, IDS, 4, progress=True, **options) == quiet
    out, err = capsys.readouterr()
    assert out == ""
    assert "0 of 12 candidates" in err
    assert seen[4::5] == [4, 8, 12]  # after each chunk, four steps and the whole


def test_a_bar_moves_with_the_steps(table: TableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[float] = []
    updates = "fastsample.integrations.best_of_n.draw.tqdm.update"
    monkeypatch.setattr(updates, lambda self, n: (setattr(self, "n", self.n + n), places.append(self.n)))
    table.generation_config.max_new_tokens = None
    fs.best_of_n(table, IDS, 4, progress=True, max_new_tokens=4, batch_size=8, eos_token_id=None, seed=1)
    assert places == pytest.approx([2, 4, 6, 8, 8, 9, 10, 11, 12, 12])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0: expected at least 1, or None"),
        ({"batch_size": 1.5}, "batch_size = 1.5: expected an integer"),
        ({"round_size": 0, "vote": len}, "round_size = 0: expected at least 1, or None"),
        ({"round_size": 2}, "round_size: without effect unless there is a vote"),
        ({"offset": [1, 2]}, r"offset: expected one value or 3 \(one per prompt\), got 2"),
        ({"dry_multiplier": 1.0, "dry_breakers": [[1], [2]]}, r"dry_breakers: expected one value or 3 .*, got 2"),
    ],
)
def test_bad_sizes(table: TableModel, options: dict[str, Any], message: str) -> None:
    with rows_seen(table) as rows, pytest.raises((TypeError, ValueError), match=message):
        fs.best_of_n(table, IDS, 4, max_new_tokens=3, **options)
    assert rows == []


def test_a_cache_serves_one_chunk(table: TableModel) -> None:
    with pytest.raises(ValueError, match="cache: serves one run of the model; leave batch_size"):
        fs.best_of_n(table, IDS, 4, max_new_tokens=3, batch_size=2, cache=DynamicCache())
