"""fs_generate with typical, epsilon, eta and n-grams against transformers' own, and with what transformers lacks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from table_model import TableModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
    TypicalLogitsWarper,
)
from transformers.generation import logits_process

import fastsample as fs
from fastsample.cli.model import shipped_model
from fastsample.integrations import breakers as lookup
from fastsample.integrations.transformers import FastSampleLogitsProcessor, breakers, fs_generate
from fastsample.params import specs

V, PAD, EOS = 120, 1, 2

BACKEND = "auto"
"""The engine under test; what holds for it holds for "auto" too."""

IDS = torch.tensor([[5, 9, 7, 30, 9, 11], [PAD, PAD, 40, 41, 42, 40], [PAD, 8, 3, 17, 8, 3]])
PADDED = {"input_ids": IDS, "attention_mask": (IDS != PAD).long()}
PLAIN = {"input_ids": torch.tensor([[5, 9, 7, 30, 9], [40, 41, 42, 40, 41], [8, 3, 17, 8, 3]])}


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=False, eos_token_id=None, pad_token_id=PAD
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 20  # logits of some spread
    return model


@pytest.fixture(scope="module")
def table() -> TableModel:
    torch.manual_seed(1)
    model = TableModel(2 * torch.randn(V, V)).eval()
    model.generation_config = GenerationConfig(pad_token_id=PAD)
    return model


@pytest.fixture(scope="module")
def loops() -> TableModel:
    """Each id mostly leads to the next one or two of its five, so that texts repeat themselves."""
    torch.manual_seed(2)
    logits, ids = torch.randn(V, V), torch.arange(V)
    logits[ids, ids // 5 * 5 + (ids + 1) % 5] = 8.5
    logits[ids, ids // 5 * 5 + (ids + 2) % 5] = 7.0
    model = TableModel(logits).eval()
    model.generation_config = GenerationConfig(pad_token_id=PAD)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(shipped_model())


def prepared(model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> LogitsProcessorList:
    """The processors that `generate` itself would use."""

    def give_back(model: Any, input_ids: Any, logits_processor: Any, **_: Any) -> LogitsProcessorList:
        return logits_processor

    return model.generate(**inputs, custom_generate=give_back, **options)


def drawn(model: Any, inputs: dict[str, torch.Tensor], seed: Any = 7, **options: Any) -> torch.Tensor:
    """The generated part of what the drop-in samples, int64 [B, steps]."""
    given = {"backend": BACKEND} | options.pop("given", {})
    common = {"do_sample": True, "max_new_tokens": 8, "top_k": 0}
    tokens = model.generate(**inputs, custom_generate=fs_generate(seed, **given), **common | options)
    return tokens[:, inputs["input_ids"].shape[1] :]


def check_scores(model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any], **given: Any) -> None:
    """Every step's scores are to the bit those of transformers' processors."""
    options = {"do_sample": True, "max_new_tokens": 6, "top_k": 0} | options
    keep = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    sample = fs_generate(7, backend=BACKEND, **given)
    out = model.generate(**inputs, custom_generate=sample, **options, **keep)
    processors = prepared(model, inputs, options)
    assert len(out.scores) == 6
    start = out.sequences.shape[1] - 6
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        expected = processors(out.sequences[:, : start + step], logits.clone())
        assert torch.equal(scores, expected), f"step {step}"
        assert (scores.gather(1, out.sequences[:, start + step, None]) > -torch.inf).all()


# What transformers has too --------------------------------------------------------------------------------------------


FILTERS: list[dict[str, Any]] = [
    {"typical_p": 0.2},
    {"typical_p": 0.95},
    {"epsilon_cutoff": 0.01},
    {"epsilon_cutoff": 0.9},
    {"eta_cutoff": 0.01},
    {"eta_cutoff": 0.6},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 1.4, "typical_p": 0.7},
    {"temperature": 1.4, "top_k": 60, "typical_p": 0.9, "epsilon_cutoff": 0.005, "eta_cutoff": 0.02},
    {"temperature": 0.7, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.8, "eta_cutoff": 0.1},
]


@pytest.mark.parametrize("options", FILTERS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()))
def test_scores_are_those_of_transformers(gpt2: GPT2LMHeadModel, options: dict[str, Any]) -> None:
    check_scores(gpt2, PLAIN, options)


@pytest.mark.parametrize(
    "options", [o for o in FILTERS if "no_repeat_ngram_size" not in o], ids=lambda options: "-".join(map(str, options))
)
def test_kept_sets_of_many_rows_are_those_of_transformers(table: TableModel, options: dict[str, Any]) -> None:
    inputs = {"input_ids": torch.arange(V)[:, None]}
    common = {"max_new_tokens": 1, "do_sample": True, "top_k": 0} | options
    keep = {"return_dict_in_generate": True, "output_scores": True}
    out = table.generate(**inputs, custom_generate=fs_generate(1, backend=BACKEND), **common, **keep)
    expected = prepared(table, inputs, common)(inputs["input_ids"], table.table.detach())
    assert torch.equal(out.scores[0], expected)
    assert (expected == -torch.inf).any()


def test_an_encoder_decoder_looks_at_what_it_has_decoded() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=V, decoder_start_token_id=0, eos_token_id=None, pad_token_id=0, **sizes)
    model = T5ForConditionalGeneration(config).eval()
    for options in ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2, "typical_p": 0.5}):
        check_scores(model, {"input_ids": PLAIN["input_ids"]}, options)


def test_processors_do_not_run_where_the_step_is_fused(gpt2: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any, input_ids: Any, scores: Any) -> None:
        raise AssertionError(f"{type(self).__name__} ran")

    names = ("TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "NoRepeatNGramLogitsProcessor")
    for name in names:
        monkeypatch.setattr(getattr(logits_process, name), "__call__", run)
    options = {"typical_p": 0.9, "epsilon_cutoff": 0.001, "eta_cutoff": 0.001, "no_repeat_ngram_size": 3}
    assert drawn(gpt2, PLAIN, **options, bad_words_ids=[[4]], min_p=0.001).shape == (3, 8)
    with pytest.raises(AssertionError, match="NoRepeatNGramLogitsProcessor ran"):
        drawn(gpt2, PLAIN, **options, prefix_allowed_tokens_fn=lambda row, ids: list(range(100)))


def test_settings_that_the_contract_lacks_run_as_transformers_own(gpt2: GPT2LMHeadModel) -> None:
    check_scores(gpt2, PLAIN, {"logits_processor": [TypicalLogitsWarper(0.1, min_tokens_to_keep=3)]})
    check_scores(gpt2, PLAIN, {"epsilon_cutoff": 1 - 1e-9})  # as float32 that is 1
    other = RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=3)
    check_scores(gpt2, PLAIN, {"logits_processor": [other], "no_repeat_ngram_size": 2})


@pytest.mark.parametrize("off", [{"typical_p": 1.0}, {"epsilon_cutoff": 0.0}, {"eta_cutoff": 0.0}], ids=str)
def test_off_is_off(gpt2: GPT2LMHeadModel, off: dict[str, float]) -> None:
    assert torch.equal(drawn(gpt2, PLAIN, **off), drawn(gpt2, PLAIN))


def test_a_given_field_replaces_that_of_generate(gpt2: GPT2LMHeadModel) -> None:
    for name, own, other in (("typical_p", 0.3, 0.9), ("no_repeat_ngram_size", 2, 1), ("eta_cutoff", 0.5, 0.01)):
        expected = drawn(gpt2, PLAIN, **{name: own})
        assert torch.equal(drawn(gpt2, PLAIN, given={name: own}), expected)
        assert torch.equal(drawn(gpt2, PLAIN, given={name: own}, **{name: other}), expected)


def test_greedy_search_obeys_a_given_ban_of_ngrams(loops: TableModel) -> None:
    options = PLAIN | {"do_sample": False, "max_new_tokens": 25}
    expected = loops.generate(**options, no_repeat_ngram_size=2)
    for own in (0, 1, 2):
        sample = fs_generate(no_repeat_ngram_size=2, backend=BACKEND)
        assert torch.equal(loops.generate(**options, no_repeat_ngram_size=own, custom_generate=sample), expected)
    assert not torch.equal(loops.generate(**options), expected)


@pytest.mark.parametrize("options", [o for o in FILTERS if "no_repeat_ngram_size" not in o], ids=lambda o: "-".join(o))
def test_the_processor_gives_the_values_of_the_warpers(table: TableModel, options: dict[str, Any]) -> None:
    inputs, scores = {"input_ids": torch.tensor([[3]])}, 3 * torch.randn(64, 1000)
    warpers = prepared(table, inputs, {"top_k": 0, "do_sample": True, "max_new_tokens": 1} | options)
    got = FastSampleLogitsProcessor(**options, backend=BACKEND)(inputs["input_ids"], scores)
    assert torch.equal(got, warpers(inputs["input_ids"], scores.clone()))


def test_the_processor_takes_filters_that_generate_lacks() -> None:
    scores, fields = 3 * torch.randn(8, 100), {"top_n_sigma": 1.5, "p_less": True, "order": "temperature_last"}
    got = FastSampleLogitsProcessor(0.7, **fields, backend=BACKEND)(torch.tensor([[3]]), scores)
    assert torch.equal(got, fs.filter_logits(scores, temperature=0.7, ties="all", backend=BACKEND, **fields))
    for name in ("dry_multiplier", "no_repeat_ngram_size", "frequency_penalty", "xtc_probability"):
        with pytest.raises(ValueError, match=f"^{name}: more than a filter; fs_generate has it"):
            FastSampleLogitsProcessor(**{name: 1})


# Padding --------------------------------------------------------------------------------------------------------------


def test_padding_is_no_part_of_the_text(table: TableModel) -> None:
    with torch.no_grad():
        loud = TableModel(table.table.clone())
        loud.table[:, PAD] = 12.0  # the padding token would nearly always be drawn
    batch = {"input_ids": torch.tensor([[PAD, PAD, 5]]), "attention_mask": torch.tensor([[0, 0, 1]])}
    ngrams = {"no_repeat_ngram_size": 1}
    theirs = prepared(loud, batch, ngrams | {"max_new_tokens": 1})
    assert theirs(batch["input_ids"], torch.zeros(1, V)).isinf().nonzero()[:, 1].tolist() == [PAD, 5]
    for options in (ngrams, {"given": ngrams}, {"given": {"dry_multiplier": 99.0, "dry_allowed_length": 1}}):
        assert drawn(loud, batch, max_new_tokens=1, pad_token_id=PAD, **options).item() == PAD
    text = {"input_ids": torch.tensor([[PAD, PAD, 5, PAD]])}
    assert drawn(loud, text, max_new_tokens=1, pad_token_id=PAD, eos_token_id=PAD, **ngrams).item() != PAD


def test_a_penalty_of_generate_and_ngrams_see_the_same_text(gpt2: GPT2LMHeadModel) -> None:
    options: dict[str, Any] = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "num_return_sequences": 2}
    got = drawn(gpt2, PADDED, list(range(6)), **options)
    for row, mask in enumerate(PADDED["attention_mask"]):
        alone = {"input_ids": IDS[row, mask.bool()][None]}
        assert torch.equal(drawn(gpt2, alone, [2 * row, 2 * row + 1], **options), got[2 * row : 2 * row + 2])


GIVEN: dict[str, dict[str, Any]] = {
    "top_n_sigma": {"top_n_sigma": 1.0},
    "top_a": {"top_a": 0.3},
    "p_less": {"p_less": True},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    "dry": {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_base": 1.3},
    "dry_range": {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_range": 7},
    "dry_breakers": {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_breakers": [3, 9, 40]},
    "ngrams": {"no_repeat_ngram_size": 2},
    "temperature_last": {"order": "temperature_last", "temperature": 2.0, "min_p": 0.3, "ties": "first"},
    "all": {
        "temperature": [0.7, 1.0, 1.6],
        "top_n_sigma": [0.0, 2.0, 0.0],
        "p_less": [True, False, False],
        "xtc_probability": [0.0, 0.7, 0.5],
        "dry_multiplier": [1.0, 0.0, 2.0],
        "dry_breakers": [[9], None, [3, 8]],
        "no_repeat_ngram_size": [0, 3, 0],
        "order": ["top_k_first", "min_p_first", "temperature_last"],
    },
}


def by_hand(model: TableModel, start: list[int], seed: int, steps: int, given: dict[str, Any]) -> list[int]:
    """One sequence by the API: its token at offset 0, 1, 2, ..."""
    tokens = list(start)
    for step in range(steps):
        logits = model.table[tokens[-1]].detach()
        ids = {"prompt_ids": start, "output_ids": tokens[len(start) :]}
        out = fs.sample(logits, seed=[seed], offset=step, backend=BACKEND, **{"ties": "all"} | given | ids)
        tokens.append(int(out.tokens))
    return tokens[len(start) :]


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_a_sequence_gets_what_it_gets_alone(loops: TableModel, given: dict[str, Any]) -> None:
    seeds = [11, 2**64 - 1, 5]
    together = drawn(loops, PADDED, seeds, max_new_tokens=16, given=given)
    assert not torch.equal(drawn(loops, PADDED, seeds, max_new_tokens=16), together)
    for row, mask in enumerate(PADDED["attention_mask"]):
        ids = IDS[row, mask.bool()]
        lists = given["temperature"] if isinstance(given.get("temperature"), list) else None
        own = {name: values[row] for name, values in given.items()} if lists else given
        own = {name: value for name, value in own.items() if value is not None}
        alone = drawn(loops, {"input_ids": ids[None]}, [seeds[row]], max_new_tokens=16, given=own)
        assert alone[0].tolist() == together[row].tolist()
        assert together[row].tolist() == by_hand(loops, ids.tolist(), seeds[row], 16, own)


@pytest.mark.parametrize("name", [name for name, _ in specs()])
def test_every_field_of_the_table_is_taken(table: TableModel, name: str) -> None:
    spec = dict(specs())[name]
    ids = torch.tensor([[5, 9, 7, 9, 9], [40, 41, 40, 41, 40], [3, 3, 3, 3, 3]])
    logits, history = table.table[ids[:, -1]].detach(), {"prompt_ids": ids, "output_ids": ids[:, :0]}
    keep = {"return_dict_in_generate": True, "output_scores": True, "do_sample": True, "max_new_tokens": 1, "top_k": 0}
    changed = 0
    for value in spec.examples:
        given = {"ties": "all", **spec.beside, name: value}
        sample = fs_generate(7, backend=BACKEND, **given)
        (scores,) = table.generate(ids, custom_generate=sample, **keep).scores
        assert torch.equal(scores, fs.filter_logits(logits, backend=BACKEND, **given, **history))
        neutral = {**given, name: getattr(fs.SamplingParams, name)}
        changed += not torch.equal(scores, fs.filter_logits(logits, backend=BACKEND, **neutral, **history))
    assert changed or name in ("ties", "frequency_penalty", "presence_penalty")  # no ties; nothing drawn yet


def test_a_seed_alone_repeats_a_text_with_xtc_on(gpt2: GPT2LMHeadModel) -> None:
    given = {"xtc_probability": 0.5, "xtc_threshold": 0.05}
    texts = [drawn(gpt2, PADDED, seed, max_new_tokens=20, given=given) for seed in (7, 7, 8)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    torch.manual_seed(5)
    first = drawn(gpt2, PADDED, None, given=given)
    torch.manual_seed(5)
    assert torch.equal(drawn(gpt2, PADDED, None, given=given), first)


def test_xtc_in_what_generate_reports(table: TableModel) -> None:
    """The scores of probability 1 leave the top choices out; log-probabilities are those of the mixture."""
    keep = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 1, "top_k": 0}
    inputs = {"input_ids": torch.arange(60)[:, None]}
    for probability in (0.25, 1.0):
        fields = {"xtc_probability": probability, "xtc_threshold": 0.05}
        sample = fs_generate(3, logprobs="processed", backend=BACKEND, **fields)
        out = table.generate(**inputs, do_sample=True, custom_generate=sample, **keep)
        logits, tokens = table.table[:60].detach(), out.sequences[:, 1:]
        want = fs.probabilities(logits, backend=BACKEND, **fields).log().gather(1, tokens)
        torch.testing.assert_close(out.logprobs, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(out.scores[0], fs.filter_logits(logits, backend=BACKEND, **fields))


def test_filters_need_do_sample_and_history_does_not(loops: TableModel) -> None:
    for name in ("xtc_probability", "p_less", "top_n_sigma", "order"):
        value: Any = "joint" if name == "order" else 1
        with pytest.raises(ValueError, match=rf"{name}=.*do_sample"):
            loops.generate(**PLAIN, max_new_tokens=2, custom_generate=fs_generate(**{name: value}))
    given = {"dry_multiplier": 9.0, "dry_allowed_length": 1}
    got = drawn(loops, PLAIN, None, given=given, do_sample=False, max_new_tokens=12)
    assert got[1].tolist() == by_hand(loops, PLAIN["input_ids"][1].tolist(), 0, 12, given | {"temperature": 0.0})
    assert not torch.equal(got, drawn(loops, PLAIN, None, do_sample=False, max_new_tokens=12))


def test_what_ngrams_leave_no_token_is_named(table: TableModel) -> None:
    small = TableModel(table.table[:6, :6].detach().clone())
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 3, 3]])
    every = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"no_repeat_ngram_size": 1, "max_new_tokens": 1, "pad_token_id": 0}
    with pytest.raises(ValueError, match=r"no_repeat_ngram_size: allows no token \(row 0\)"):
        drawn(small, every, **options)
    with pytest.raises(ValueError, match=r"no_repeat_ngram_size: allows no token \(row 0\)"):
        drawn(small, every, given={"no_repeat_ngram_size": [1, 0]}, max_new_tokens=1, pad_token_id=0)
    second = {name: value[1:] for name, value in every.items()}
    with pytest.raises(ValueError, match="no_repeat_ngram_size and suppress_tokens together allow no token: row 0 has"):
        drawn(small, second, suppress_tokens=[4, 5], **options)
    flag = fs_generate(7, on_invalid="flag", backend=BACKEND)
    keep = {"do_sample": True, "return_dict_in_generate": True, "custom_generate": flag}
    assert small.generate(**every, **keep, **options).status.tolist() == [3, 0]


# DRY's breakers -------------------------------------------------------------------------------------------------------


DRY: dict[str, Any] = {"dry_multiplier": 3.0, "dry_allowed_length": 1}


@pytest.fixture(scope="module")
def shipped() -> Any:
    return AutoModelForCausalLM.from_pretrained(shipped_model()).float().eval()


def containing(tokenizer: Any, *texts: str) -> list[int]:
    found = [any(text in tokenizer.decode([i]) for text in texts) for i in range(len(tokenizer))]
    return [i for i, is_in in enumerate(found) if is_in]


def test_strings_stand_for_the_tokens_that_contain_them(shipped: Any, tokenizer: Any) -> None:
    batch = tokenizer(
        ['"No, no, no,', 'She said, "No, no, no,'], return_tensors="pt", padding=True, padding_side="left"
    )
    strings = ["\n", ":", '"', "*", ",", 300]
    ids = [*containing(tokenizer, *strings[:-1]), 300]
    expected = drawn(shipped, batch, max_new_tokens=20, given=DRY | {"dry_breakers": ids})
    assert not torch.equal(drawn(shipped, batch, max_new_tokens=20, given=DRY), expected)
    given = DRY | {"dry_breakers": strings}
    for own, options in (({"tokenizer": tokenizer}, {}), ({}, {"tokenizer": tokenizer})):
        assert torch.equal(drawn(shipped, batch, max_new_tokens=20, given=given | own, **options), expected)
    for same in (torch.tensor(ids), torch.tensor(ids).numpy(), set(ids), [ids, ids]):
        some = drawn(shipped, batch, max_new_tokens=3, given=DRY | {"dry_breakers": same})
        assert torch.equal(some, expected[:, :3])


def test_what_a_string_stands_for(tokenizer: Any) -> None:
    def ids(*line: Any) -> list[int]:
        return breakers.breaker_ids(line, tokenizer).tolist()

    assert ids("\n") == containing(tokenizer, "\n")
    assert ids(" the") == containing(tokenizer, " the")
    assert ids(tokenizer.eos_token) == [tokenizer.eos_token_id]  # special tokens are written as they are named
    assert ids("\n", 5, 7) == sorted({5, 7, *containing(tokenizer, "\n")})
    assert ids() == []


def test_a_tokenizer_is_read_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = AutoTokenizer.from_pretrained(shipped_model())
    made = []
    real = lookup.Vocabulary
    monkeypatch.setattr(lookup, "Vocabulary", lambda tokenizer: made.append(tokenizer) or real(tokenizer))
    for _ in range(2):
        fs_generate(tokenizer=own, dry_breakers=["\n", ":"], **DRY)
    fs_generate(tokenizer=own, dry_breakers=["*"], **DRY)
    assert len(made) == 1
    with pytest.raises(ValueError, match="'<stop>'"):
        fs_generate(tokenizer=own, dry_breakers=["<stop>"], **DRY)
    own.add_tokens(["<stop>"])
    assert breakers.breaker_ids(["<stop>"], own).tolist() == [len(own) - 1]
    assert len(made) == 2


def test_breakers_per_sequence_and_per_prompt(loops: TableModel) -> None:
    lists = [[9], None, [3, 8]]
    options = {"num_return_sequences": 2, "max_new_tokens": 16}
    got = drawn(loops, PADDED, [1, 2, 3], given=DRY | {"dry_breakers": lists}, **options)
    each = list(itertools.chain.from_iterable([line, line] for line in lists))
    assert torch.equal(got, drawn(loops, PADDED, [1, 2, 3], given=DRY | {"dry_breakers": each}, **options))
    padded = torch.tensor([[9, -1], [-1, -1], [3, 8]])
    assert torch.equal(got, drawn(loops, PADDED, [1, 2, 3], given=DRY | {"dry_breakers": padded}, **options))
    assert not torch.equal(got, drawn(loops, PADDED, [1, 2, 3], given=DRY | {"dry_breakers": [9]}, **options))
    six = r"^dry_breakers: expected one value or 6 \(one per sequence\), or 3 \(one per prompt\), got 2$"
    with pytest.raises(ValueError, match=six):
        drawn(loops, PADDED, given=DRY | {"dry_breakers": [[1], [2]]}, **options)


def test_best_of_n_takes_them_all(loops: TableModel) -> None:
    given: dict[str, Any] = DRY | {"xtc_probability": 0.5, "dry_breakers": [[9], None, [3, 8]], "top_k": 0}
    found = fs.best_of_n(loops, PADDED, 3, seed=[1, 2, 3], max_new_tokens=12, backend=BACKEND, **given)
    want = drawn(loops, PADDED, [1, 2, 3], given=given, max_new_tokens=12)
    for result, tokens in zip(found, want, strict=True):
        (first,) = [c for c in result.candidates if c.index == 0]
        assert first.tokens == tokens.tolist()


BAD: dict[str, tuple[Any, str]] = {
    "text": ("\n", r"dry_breakers: expected a list of strings and token ids, got '\\n'"),
    "number": (5, "dry_breakers: expected a list of strings and token ids, got 5"),
    "float": ([1.5], "dry_breakers id: expected an integer, got 1.5"),
    "bool": ([True], "dry_breakers id: expected an integer, got True"),
    "float tensor": (torch.tensor([1.5]), "dry_breakers: expected integer token ids"),
    "empty": ([""], "dry_breakers: '' is in every token"),
    "long": (["\n", "of several tokens"], "dry_breakers: no token contains 'of several tokens'; a breaker is"),
    "mixed": ([["\n"], 5], r"dry_breakers \(row 1\): expected a list of strings and token ids, got 5"),
    "per sequence": ([["\n"], [""]], "dry_breakers: '' is in every token"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_breakers_fail_when_given(tokenizer: Any, given: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fs_generate(tokenizer=tokenizer, dry_breakers=given, **DRY)


def test_strings_without_a_tokenizer_say_what_to_pass(loops: TableModel) -> None:
    given = DRY | {"dry_breakers": ["\n"]}
    with pytest.raises(ValueError, match=r"dry_breakers: '\\n' is a string.*tokenizer=\.\.\., or pass token ids"):
        drawn(loops, PLAIN, given=given)
    with pytest.raises(TypeError, match="expected a tokenizer, got the str 'gpt2'"):
        drawn(loops, PLAIN, given=given | {"tokenizer": "gpt2"})


def test_breakers_without_dry_are_refused() -> None:
    with pytest.raises(ValueError, match="dry_breakers: without effect unless dry_multiplier"):
        fs_generate(dry_breakers=[5])
