"""Best-of-N and self-consistency: one prefill, defined seeds, ranks and errors."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from table_model import TableModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MaxLengthCriteria,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer

import fastsample as fs
from fastsample.cli.model import shipped_model
from fastsample.inputs import pack_seeds, row_seeds
from fastsample.integrations.best_of_n import BestOfN
from fastsample.integrations.best_of_n.rank import Drawn, judged, ranked
from fastsample.integrations.best_of_n.reward import scores
from fastsample.integrations.grammar import GrammarCompiler
from fastsample.integrations.transformers import fs_generate

V, EOS = 64, 2
PROMPT = torch.tensor([[5, 9, 7]])


@pytest.fixture(scope="module")
def table() -> TableModel:
    torch.manual_seed(1)
    model = TableModel(2 * torch.randn(V, V)).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=EOS)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(shipped_model())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(shipped_model()).float().eval()


def by_hand(table: TableModel, start: int, prompt_seed: int, index: int, steps: int, **fields: Any) -> tuple[Any, Any]:
    """Candidate `index` by the API alone: draw `index` of the first row, then a seed of its own."""
    own = prompt_seed if index == 0 else int(row_seeds(prompt_seed % 2**64, index + 1)[index])
    first = fs.sample(
        table.table[start].detach(), seed=[prompt_seed], num_samples=index + 1, logprobs="raw", ties="all", **fields
    )
    tokens, logprobs = [int(first.tokens.reshape(-1)[-1])], [float(first.logprobs.reshape(-1)[-1])]
    while len(tokens) < steps and tokens[-1] != EOS:
        logits = table.table[tokens[-1]].detach()
        out = fs.sample(logits, seed=[own], offset=len(tokens), logprobs="raw", ties="all", **fields)
        tokens.append(int(out.tokens))
        logprobs.append(float(out.logprobs))
    return tokens, logprobs


def test_candidates_are_those_of_the_seeds(table: TableModel) -> None:
    result = fs.best_of_n(table, PROMPT, 6, seed=1, max_new_tokens=12, temperature=0.9, top_k=40)
    seed = int(pack_seeds(1, 1)[0])
    assert sorted(c.index for c in result.candidates) == list(range(6))
    assert len({len(c.tokens) for c in result.candidates}) > 1  # some end before the others
    for c in result.candidates:
        tokens, logprobs = by_hand(table, 7, seed, c.index, 12, temperature=0.9, top_k=40)
        assert c.tokens == tokens
        assert c.logprobs == pytest.approx(logprobs, abs=1e-6)
        assert c.score == pytest.approx(math.fsum(logprobs) / len(logprobs), abs=1e-6)
        assert (c.text, c.answer, c.truncated) == ("", None, False)
    assert [c.score for c in result.candidates] == sorted((c.score for c in result.candidates), reverse=True)
    assert len({tuple(c.tokens) for c in result.candidates}) == 6


def test_one_candidate_is_what_fs_generate_gives(table: TableModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 9, "top_k": 30}
    (alone,) = fs.best_of_n(table, PROMPT, 1, seed=[3], **options).candidates
    tokens = table.generate(PROMPT, do_sample=True, custom_generate=fs_generate([3]), **options)[0, 3:].tolist()
    assert alone.tokens == tokens
    five = fs.best_of_n(table, PROMPT, 5, seed=[3], **options).candidates
    eight = fs.best_of_n(table, PROMPT, 8, seed=[3], **options).candidates
    assert next(c for c in five if c.index == 0).tokens == tokens
    assert {c.index: c.tokens for c in five}.items() <= {c.index: c.tokens for c in eight}.items()


def test_several_prompts(table: TableModel) -> None:
    several = fs.best_of_n(table, torch.tensor([[5, 9, 7], [1, 1, 8]]), 3, seed=[11, 12], max_new_tokens=6)
    for ids, seed, result in zip(([[5, 9, 7]], [[1, 1, 8]]), (11, 12), several, strict=True):
        assert fs.best_of_n(table, torch.tensor(ids), 3, seed=[seed], max_new_tokens=6) == result


def test_per_prompt_parameters(table: TableModel) -> None:
    ids = torch.tensor([[5, 9, 7], [1, 1, 8]])
    cold, warm = fs.best_of_n(table, ids, 3, seed=[1, 2], max_new_tokens=6, temperature=[0.0, 1.0])
    assert len({tuple(c.tokens) for c in cold.candidates}) == 1
    assert len({tuple(c.tokens) for c in warm.candidates}) == 3
    assert [c.index for c in cold.candidates] == [0, 1, 2]  # equal scores: the lower index first


def test_the_prompt_runs_once(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    drawn: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    real = fs.sampler.SampleCall.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.append(self.options.num_samples)
        return real(self, *args, **kwargs)

    monkeypatch.setattr("fastsample.call.SampleCall.run", run)
    ids = tokenizer("The future of AI is", return_tensors="pt")
    try:
        fs.best_of_n(model, ids, 5, seed=1, max_new_tokens=4, eos_token_id=None)
    finally:
        hook.remove()
    assert seen == [(1, ids["input_ids"].shape[1]), (5, 1), (5, 1), (5, 1)]
    assert drawn == [5, 1, 1, 1]


def test_logprobs_are_the_models(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer("The future of AI is", return_tensors="pt")["input_ids"]
    raw = fs.best_of_n(model, prompt, 4, seed=3, max_new_tokens=10, temperature=0.7, tokenizer=tokenizer)
    processed = fs.best_of_n(model, prompt, 4, seed=3, max_new_tokens=10, temperature=0.7, logprobs="processed")
    for c in raw.candidates:
        ids = torch.tensor([prompt[0].tolist() + c.tokens])
        with torch.no_grad():
            expected = model(ids).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
        got = torch.tensor(c.logprobs)
        torch.testing.assert_close(got, expected.gather(1, torch.tensor(c.tokens)[:, None])[:, 0], rtol=1e-4, atol=1e-4)
        assert c.text == tokenizer.decode(c.tokens, skip_special_tokens=True)
    assert {c.index: c.tokens for c in raw.candidates} == {c.index: c.tokens for c in processed.candidates}
    assert {c.index: c.logprobs for c in raw.candidates} != {c.index: c.logprobs for c in processed.candidates}


def test_text_and_lists_of_text(model: Any, tokenizer: Any) -> None:
    one = fs.best_of_n(model, "Use this", 2, tokenizer=tokenizer, seed=[5], max_new_tokens=5)
    several = fs.best_of_n(model, ["Use this", "The future of AI is"], 2, tokenizer=tokenizer, seed=5, max_new_tokens=5)
    assert isinstance(one, BestOfN)
    assert [len(result.candidates) for result in several] == [2, 2]
    assert isinstance(fs.best_of_n(model, ["a"], 2, tokenizer=tokenizer, max_new_tokens=2), list)


def test_encoder_decoder() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, eos_token_id=EOS
    )
    t5 = T5ForConditionalGeneration(config).eval()
    result = fs.best_of_n(t5, PROMPT, 4, seed=7, max_new_tokens=6)
    tokens = t5.generate(PROMPT, do_sample=True, max_new_tokens=6, custom_generate=fs_generate(7))[0, 1:].tolist()
    assert next(c for c in result.candidates if c.index == 0).tokens == tokens
    assert len({tuple(c.tokens) for c in result.candidates}) > 1


def test_encoder_decoder_with_padding_and_a_beginning() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=V, decoder_start_token_id=0, eos_token_id=EOS, pad_token_id=0, **sizes)
    t5 = T5ForConditionalGeneration(config).eval()
    ids = torch.tensor([[0, 0, 9, 7], [5, 6, 7, 8]])
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.5}
    for more in ({}, {"attention_mask": (ids != 0).long()}, {"decoder_input_ids": torch.tensor([[0, 5], [0, 6]])}):
        want = t5.generate(ids, do_sample=True, custom_generate=fs_generate([3, 4]), **more, **options)
        got = fs.best_of_n(t5, {"input_ids": ids, **more} if more else ids, np.int64(3), seed=[3, 4], **options)
        for result, tokens in zip(got, want[:, -6:].tolist(), strict=True):
            first = by_index(result)[0]
            assert first == tokens[: len(first)]


def test_stopping_criteria_and_one_token(table: TableModel) -> None:
    for options in ({"max_new_tokens": 1}, {"stopping_criteria": [MaxLengthCriteria(4)], "max_new_tokens": 9}):
        result = fs.best_of_n(table, PROMPT, 3, seed=1, **options)
        assert [len(c.tokens) for c in result.candidates] == [1, 1, 1]


def test_penalties_count_each_candidates_own_tokens(table: TableModel) -> None:
    result = fs.best_of_n(table, PROMPT, 4, seed=1, max_new_tokens=25, presence_penalty=100.0, eos_token_id=None)
    assert all(len(set(c.tokens)) == 25 for c in result.candidates)


def test_with_a_grammar(model: Any, tokenizer: Any) -> None:
    grammar = GrammarCompiler(tokenizer).regex("[0-9]{2}")
    result = fs.best_of_n(
        model, "The answer is", 8, tokenizer=tokenizer, seed=7, grammar=grammar, max_new_tokens=8, vote=int
    )
    assert all(re.fullmatch("[0-9]{2}", c.text) and not c.truncated for c in result.candidates)
    nines = GrammarCompiler(tokenizer).regex("a{9}")
    cut = fs.best_of_n(model, "The", 3, tokenizer=tokenizer, seed=7, grammar=nines, max_new_tokens=2)
    assert all(c.truncated for c in cut.candidates)


def test_grammars_of_candidates_hold_from_the_first_token(model: Any, tokenizer: Any) -> None:
    compiler = GrammarCompiler(tokenizer)
    patterns = ["[0-9]{3}", "[a-c]{4}", "[x-z]{2}"]
    grammars = [compiler.regex(pattern) for pattern in patterns]
    options: dict[str, Any] = {"tokenizer": tokenizer, "seed": [7, 8], "max_new_tokens": 8}
    first, second = fs.best_of_n(model, ["The", "Use this"], 3, grammar=grammars + grammars[::-1], **options)
    for result, order in ((first, patterns), (second, patterns[::-1])):
        assert all(re.fullmatch(order[c.index], c.text) for c in result.candidates)
    one = fs.best_of_n(model, "Use this", 3, grammar=grammars[::-1], **options | {"seed": [8]})
    assert {c.index: c.tokens for c in one.candidates} == {c.index: c.tokens for c in second.candidates}
    same = fs.best_of_n(model, "Use this", 3, grammar=grammars[:1] * 3, **options | {"seed": [8]})
    shared = fs.best_of_n(model, "Use this", 3, grammar=grammars[0], **options | {"seed": [8]})
    assert by_index(same) == by_index(shared)
    per_prompt = fs.best_of_n(model, ["The", "Use this"], 3, grammar=[None, grammars[0]], **options)
    assert by_index(per_prompt[1]) == by_index(same)
    assert by_index(per_prompt[0]) == by_index(fs.best_of_n(model, "The", 3, **options | {"seed": [7]}))


# Prompts --------------------------------------------------------------------------------------------------------------


def padded_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    lm = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        lm.lm_head.weight *= 20
    lm.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=EOS, bos_token_id=5)
    return lm


def by_index(result: Any) -> dict[int, list[int]]:
    return {c.index: c.tokens for c in result.candidates}


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list], ids=["tensor", "array", "lists"])
def test_ids_with_padding_are_what_generate_takes_them_for(kind: Any) -> None:
    lm = padded_model()
    ids = [[0, 0, 9, 7, 8], [4, 11, 5, 9, 30]]
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.7}
    given = kind(ids if kind is not list else [row[row.count(0) :] for row in ids])
    results = fs.best_of_n(lm, given, 3, seed=[3, 4], **options)
    alone = [fs.best_of_n(lm, torch.tensor([[9, 7, 8]]), 3, seed=[3], **options)]
    alone.append(fs.best_of_n(lm, torch.tensor(ids[1]), 3, seed=[4], **options))
    together = lm.generate(torch.tensor(ids), do_sample=True, custom_generate=fs_generate([3, 4]), **options)[:, 5:]
    for result, single, tokens in zip(results, alone, together.tolist(), strict=True):
        assert by_index(result) == by_index(single)
        assert by_index(result)[0] == tokens[: len(by_index(result)[0])]


def test_what_a_tokenizer_returns(model: Any, tokenizer: Any) -> None:
    texts = ["The future of AI is", "Use this"]
    options: dict[str, Any] = {"tokenizer": tokenizer, "seed": 5, "max_new_tokens": 5}
    want = fs.best_of_n(model, texts, 2, **options)
    padded = {"padding": True, "padding_side": "left"}
    for encoded in (
        tokenizer(texts),
        dict(tokenizer(texts)),
        {"input_ids": tokenizer(texts)["input_ids"]},
        tokenizer(texts, **padded),
        tokenizer(texts, return_tensors="np", **padded),
        tokenizer(texts, return_tensors="pt", **padded),
        tokenizer(texts)["input_ids"],
    ):
        got = fs.best_of_n(model, encoded, 2, **options)
        assert [by_index(result) for result in got] == [by_index(result) for result in want]
    single = fs.best_of_n(model, tokenizer(texts[0]), 2, **options)
    assert by_index(single) == by_index(fs.best_of_n(model, texts[0], 2, **options))
    assert by_index(single) == by_index(fs.best_of_n(model, tokenizer.encode(texts[0]), 2, **options))


def test_an_empty_prompt_starts_a_text(model: Any, tokenizer: Any) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 5}
    start = torch.tensor([[tokenizer.bos_token_id]])
    want = by_index(fs.best_of_n(model, {"input_ids": start, "attention_mask": start * 0 + 1}, 2, seed=[5], **options))
    for inputs in ("", tokenizer(""), tokenizer("", return_tensors="pt")):
        assert by_index(fs.best_of_n(model, inputs, 2, seed=[5], **options)) == want
    results = fs.best_of_n(model, ["Use this", ""], 2, seed=[4, 5], **options)
    assert by_index(results[1]) == want
    assert by_index(results[0]) == by_index(fs.best_of_n(model, "Use this", 2, seed=[4], **options))


def test_an_empty_prompt_without_a_beginning(table: TableModel) -> None:
    class Speechless:
        def __call__(self, texts: list[str]) -> Any:
            return {"input_ids": [[3], []]}

    lm = TableModel(table.table.detach())
    with pytest.raises(
        ValueError, match=r"inputs \(prompt 1\): is empty, and there is no bos_token_id or eos_token_id"
    ):
        fs.best_of_n(lm, ["a", ""], 2, tokenizer=Speechless(), max_new_tokens=2)


def test_offsets(table: TableModel) -> None:
    ids = torch.tensor([[0, 5, 9, 7], [4, 1, 1, 8]])
    options: dict[str, Any] = {"max_new_tokens": 5, "seed": [3, 4], "eos_token_id": None}
    plain = [by_index(result) for result in fs.best_of_n(table, ids, 3, **options)]
    at = [by_index(result) for result in fs.best_of_n(table, ids, 3, offset=[3, 4], **options)]
    assert at == [by_index(result) for result in fs.best_of_n(table, ids, 3, offset="prompt", **options)]
    assert all(one[j] != other[j] for one, other in zip(plain, at, strict=True) for j in range(3))


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"own": "quantized"}], ids=str)
def test_a_cache_that_cannot_be_copied(options: dict[str, Any]) -> None:
    lm = padded_model()
    common: dict[str, Any] = {"max_new_tokens": 5, "seed": [3, 4], "temperature": 0.7}
    ids = torch.tensor([[0, 0, 9, 7, 8], [4, 11, 5, 9, 30]])
    want = fs.best_of_n(lm, ids, 3, **common)
    if "own" in options:  # a kind of dynamic layer that holds more than its parent copies

        class Layer(DynamicLayer):
            pass

        cache = DynamicCache()
        cache.layer_class_to_replicate = Layer
        name = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
        options = {name: cache}
    seen: list[tuple[int, ...]] = []
    hook = lm.register_forward_pre_hook(lambda _, __, kw: seen.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    got = fs.best_of_n(lm, ids, 3, **common, **options)
    hook.remove()
    assert [by_index(result) for result in got] == [by_index(result) for result in want]
    assert seen[0] == (6, 5)


def test_a_full_cache_that_cannot_be_copied() -> None:
    lm = padded_model()
    ids = torch.tensor([[4, 11, 5, 9, 30]])
    cache = StaticCache(config=lm.config, max_cache_len=20)
    name = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
    lm.generate(ids[:, :3], max_new_tokens=1, **{name: cache})
    with pytest.raises(ValueError, match="cache: one that is in use already cannot be copied"):
        fs.best_of_n(lm, ids, 3, max_new_tokens=3, **{name: cache})


def test_without_logprobs(model: Any, tokenizer: Any) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "seed": 5, "max_new_tokens": 5}
    result = fs.best_of_n(model, "Use this", 3, logprobs=None, score=lambda text, ids, logprobs: len(text), **options)
    assert by_index(result) == by_index(fs.best_of_n(model, "Use this", 3, **options))
    assert all(c.logprobs == [] for c in result.candidates)
    with pytest.raises(ValueError, match="logprobs=None: score='mean_logprob' needs"):
        fs.best_of_n(model, "Use this", 3, logprobs=None, **options)


def test_stop_strings(model: Any, tokenizer: Any) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "seed": 5, "max_new_tokens": 30, "eos_token_id": None}
    free = by_index(fs.best_of_n(model, "Use this", 4, **options))
    for c in fs.best_of_n(model, "Use this", 4, stop_strings=["e", "a"], **options).candidates:
        assert free[c.index][: len(c.tokens)] == c.tokens
        assert set("ea") & set(tokenizer.decode(c.tokens[-1:]))
        assert not set("ea") & set(tokenizer.decode(c.tokens[:-1]))


def test_a_candidate_that_can_have_no_token(model: Any, tokenizer: Any) -> None:
    yes_no = GrammarCompiler(tokenizer).choices(["yes", "no"])
    options: dict[str, Any] = {"tokenizer": tokenizer, "seed": 7, "max_new_tokens": 8, "min_new_tokens": 4}
    options["grammar"] = [None, yes_no, None]
    with pytest.raises(ValueError, match="grammar and min_new_tokens together allow no token: row 1"):
        fs.best_of_n(model, "The answer is", 3, **options)
    with pytest.warns(RuntimeWarning, match="1 of 3 candidates failed and come last; .*grammar and min_new_tokens"):
        result = fs.best_of_n(model, "The answer is", 3, on_invalid="flag", **options)
    assert [c.error is None for c in result.candidates] == [True, True, False]
    last = result.candidates[-1]
    assert (last.index, last.score) == (1, -math.inf)
    assert last.text in ("yes", "no")


# Ranks and votes ------------------------------------------------------------------------------------------------------


def drawn(*texts: str) -> list[Drawn]:
    return [Drawn(text, [1], [-1.0]) for text in texts]


def rank(candidates: list[Drawn], score: Any, vote: Any, on_error: Any = "warn") -> BestOfN:
    values = scores(score, [], candidates)
    return ranked([judged(i, candidates[i], value, vote, on_error) for i, value in enumerate(values)])


def test_a_scorer_ranks_and_equal_scores_keep_the_order() -> None:
    result = rank(drawn("b", "aaa", "cc", "dd"), lambda text, tokens, logprobs: len(text), None)
    assert [(c.index, c.score) for c in result.candidates] == [(1, 3.0), (2, 2.0), (3, 2.0), (0, 1.0)]
    assert (result.best.text, result.votes, result.answer) == ("aaa", {}, None)


def test_the_majority_comes_first() -> None:
    scores = {"a1": 0.1, "b": 9.0, "a2": 0.2, "c": 5.0, "": 99.0}
    result = rank(drawn(*scores), lambda text, *_: scores[text], lambda text: text[:1] or None)
    assert [c.text for c in result.candidates] == ["a2", "a1", "b", "c", ""]
    assert list(result.votes.items()) == [("a", 2), ("b", 1), ("c", 1)]
    assert result.answer == "a"


def test_equal_votes_go_to_the_better_candidate_then_to_the_first() -> None:
    tied = rank(drawn("a", "b", "b", "a"), lambda text, *_: text == "b", lambda text: text)
    assert tied.answer == "b"
    assert rank(drawn("a", "b", "b", "a"), lambda *_: 1.0, lambda text: text).answer == "a"


def test_answers_count_by_value() -> None:
    result = rank(drawn("1", "2", "1"), "mean_logprob", lambda text: torch.tensor(int(text)))
    assert (result.answer, result.votes) == (1, {1: 2, 2: 1})
    nan = rank(drawn("1", "nan", "nan"), "mean_logprob", float)
    assert (nan.answer, nan.votes) == (1.0, {1.0: 1})
    assert str(nan.candidates[-1].error) == "vote: expected an answer or None for candidate 2 ('nan'), got NaN"


def test_all_abstain() -> None:
    result = rank(drawn("a", "b"), lambda *_: 1, lambda text: None)
    assert (result.answer, result.best.index) == (None, 0)


@pytest.mark.parametrize("value", [3, True, 0.5, torch.tensor(2.0), float("-inf")])
def test_what_counts_as_a_number(value: Any) -> None:
    assert rank(drawn("a"), lambda *_: value, None).best.score == float(value)


@pytest.mark.parametrize(
    ("scorer", "kind", "message"),
    [
        (lambda *_: 1 / 0, ValueError, r"score: raised ZeroDivisionError on candidate 0 \('a'\): division by zero"),
        (lambda *_: math.nan, ValueError, r"score: .*candidate 0 \('a'\), got NaN"),
        (lambda *_: torch.tensor(math.nan), ValueError, "candidate 0 .*got NaN"),
        (lambda *_: None, TypeError, r"score: expected a number for candidate 0 \('a'\), got None"),
        (lambda *_: "9", TypeError, "candidate 0 .*got '9'"),
        (lambda *_: torch.zeros(2), TypeError, "candidate 0 .*got tensor"),
    ],
    ids=["raises", "nan", "nan tensor", "none", "text", "tensor"],
)
def test_a_bad_score_names_the_candidate(scorer: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        rank(drawn("a"), scorer, None, "raise")
    (kept,) = rank(drawn("a"), scorer, None).candidates
    assert kept.error is not None
    assert re.search(message, kept.error)
    assert kept.score == -math.inf


@pytest.mark.parametrize(("vote", "name"), [(lambda text: [1], "TypeError"), (int, "ValueError")], ids=["list", "int"])
def test_a_bad_vote_names_the_candidate(vote: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"vote: raised {name} on candidate 0 \('a'\)"):
        rank(drawn("a"), "mean_logprob", vote, "raise")
    result = rank(drawn("a"), "mean_logprob", vote)
    assert (result.best.score, result.best.answer, result.votes) == (-1.0, None, {})
    assert result.best.error is not None
    assert name in result.best.error


def test_one_failure_costs_one_candidate(table: TableModel, tokenizer: Any) -> None:
    """README's vote, where a candidate has no words."""
    texts = drawn("the yes", "", "a yes", "no")
    result = rank(texts, "mean_logprob", lambda text: text.split()[-1])
    assert (result.answer, result.votes) == ("yes", {"yes": 2, "no": 1})
    assert [c.index for c in result.candidates] == [0, 2, 3, 1]
    assert "vote: raised IndexError on candidate 1 ('')" in str(result.candidates[-1].error)
    scored = rank(texts, lambda text, *_: math.nan if text == "no" else len(text), None)
    assert [c.index for c in scored.candidates] == [0, 2, 1, 3]
    voted = rank(texts, lambda text, *_: 1 / len(text), lambda text: "same")
    assert voted.votes == {"same": 3}  # one whose score failed has no vote


def test_failures_are_told(table: TableModel) -> None:
    def score(text: str, tokens: list[int], logprobs: list[float]) -> float:
        return 1 / (tokens[0] % 2)

    options: dict[str, Any] = {"seed": 1, "max_new_tokens": 3}
    firsts = [c.tokens[0] for c in fs.best_of_n(table, PROMPT, 8, **options).candidates]
    even = sum(token % 2 == 0 for token in firsts)
    assert 0 < even < 8
    with pytest.warns(
        RuntimeWarning, match=rf"{even} of 8 candidates failed .*: score: raised ZeroDivisionError on"
    ) as seen:
        result = fs.best_of_n(table, PROMPT, 8, score=score, **options)
    assert seen[0].filename == __file__
    assert [c.error is None for c in result.candidates] == [True] * (8 - even) + [False] * even
    with pytest.raises(ValueError, match="score: raised ZeroDivisionError on candidate"):
        fs.best_of_n(table, PROMPT, 8, score=score, on_error="raise", **options)


def test_all_fail(table: TableModel) -> None:
    with pytest.warns(RuntimeWarning, match="3 of 3 candidates failed"):
        result = fs.best_of_n(table, PROMPT, 3, vote=lambda text: {}[text], seed=1, max_new_tokens=2)
    assert result.best.error is not None
    assert (result.answer, result.votes, len(result.candidates)) == (None, {}, 3)


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (0, {}, "n = 0: expected at least 1"),
        (2.0, {}, r"n = 2\.0: expected an integer"),
        (2, {"score": "best"}, "score = 'best'"),
        (2, {"vote": "most"}, "vote = 'most'"),
        (2, {"num_return_sequences": 2}, "num_return_sequences: best_of_n sets it itself"),
        (2, {"do_sample": False}, "do_sample=False"),
        (2, {"num_beams": 2}, "num_beams: not served"),
        (2, {"top_p": 1.5}, r"top_p = 1\.5"),
        (2, {"seed": [1, 2]}, r"seed: expected one value or 1 \(one per prompt\), got 2"),
        (
            2,
            {"grammar": [None] * 3},
            r"grammar: expected one or 2 \(one per candidate\), or 1 \(one per prompt\), got 3",
        ),
        (2, {"top_p": [0.5, 0.9, 1.0]}, r"top_p: expected one value or 1 \(one per prompt\), got 3"),
        (2, {"seed": 1.5}, "seed.* 1.5"),
        (2, {"backend": "nope"}, "backend = 'nope'"),
        (2, {"grammar": "yes|no"}, r"grammar: expected a Grammar or None, got str 'yes\|no'"),
        (2, {"logprobs": "all"}, "logprobs = 'all'"),
        (2, {"on_error": "skip"}, "on_error = 'skip': expected 'warn' or 'raise'"),
        (2, {"on_invalid": "skip"}, "on_invalid = 'skip'"),
        (2, {"cache_implementation": "paged"}, "cache_implementation='paged'"),
    ],
)
def test_bad_arguments(model: Any, n: Any, options: dict[str, Any], message: str) -> None:
    def reached(*_: Any) -> None:
        raise AssertionError("the model was run")

    hook = model.register_forward_pre_hook(reached)
    try:
        with pytest.raises((TypeError, ValueError), match=message):
            fs.best_of_n(model, PROMPT, n, max_new_tokens=3, **options)
    finally:
        hook.remove()


@pytest.mark.parametrize(("inputs", "message"), [("text", "tokenizer: expected one"), (7, "tokenizer")])
def test_bad_inputs(table: TableModel, inputs: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fs.best_of_n(table, inputs, 2, max_new_tokens=3)
