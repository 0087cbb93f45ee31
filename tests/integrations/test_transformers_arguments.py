"""The arguments of fs_generate: what they do, for padded batches and encoder-decoders too, and what is refused when."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from table_model import TableModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

import fastsample as fs
from fastsample.cli.model import shipped_model
from fastsample.inputs import row_seeds
from fastsample.integrations.grammar import GrammarBatch, GrammarCompiler, GrammarError
from fastsample.integrations.transformers import FastSampleLogitsProcessor, fs_generate

V, PAD, EOS = 120, 1, 2


@pytest.fixture(scope="module")
def table() -> TableModel:
    torch.manual_seed(1)
    model = TableModel(2 * torch.randn(V, V)).eval()
    model.generation_config = GenerationConfig(pad_token_id=PAD)
    return model


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=2, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=V, decoder_start_token_id=0, eos_token_id=EOS, **sizes)
    ).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(shipped_model()).float().eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(shipped_model())


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


IDS = torch.tensor([[5, 9, 7, 30, 9, 11], [PAD, PAD, 40, 41, 42, 40], [PAD, 8, 3, 17, 100, 3]])
PADDED = {"input_ids": IDS, "attention_mask": (IDS != PAD).long()}
DICT: dict[str, Any] = {"return_dict_in_generate": True, "do_sample": True}


def tokens(model: Any, inputs: dict[str, torch.Tensor], sample: Any, **options: Any) -> torch.Tensor:
    """All ids, as generate returns them."""
    return model.generate(**inputs, do_sample=True, custom_generate=sample, **options)  # type: ignore[no-any-return]


# Seeds and offsets ----------------------------------------------------------------------------------------------------


def test_one_seed_per_prompt_makes_siblings(table: TableModel) -> None:
    seeds = [3, 2**64 - 1, -5]
    got = tokens(table, PADDED, fs_generate(seeds), max_new_tokens=8, num_return_sequences=4)
    own = torch.stack([row_seeds(seed % 2**64, 4) for seed in seeds])
    own[:, 0] = torch.tensor([3, -1, -5])
    assert torch.equal(got, tokens(table, PADDED, fs_generate(own.flatten()), max_new_tokens=8, num_return_sequences=4))
    assert torch.equal(got[::4], tokens(table, PADDED, fs_generate(seeds), max_new_tokens=8))
    assert len({tuple(row.tolist()) for row in got}) == 12


def test_other_values_per_prompt(table: TableModel, compiler: GrammarCompiler) -> None:
    given: dict[str, Any] = {"temperature": [0.0, 1.0, 2.0], "offset": [0, 10, 2**64 - 2], "seed": list(range(12))}
    each = {name: [v for v in values for _ in range(4)] for name, values in given.items() if name != "seed"}
    options = {"max_new_tokens": 8, "num_return_sequences": 4}
    got = tokens(table, PADDED, fs_generate(**given), **options)
    assert torch.equal(got, tokens(table, PADDED, fs_generate(**given | each), **options))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"seed": list(range(16))}, "seed"),
        ({"seed": torch.arange(16)}, "seed"),
        ({"offset": np.arange(16)}, "offset"),
        ({"temperature": [1.0] * 16}, "temperature"),
        ({"grammar": [None] * 16}, "grammar"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_wrong_number_says_what_was_given_and_what_is_wanted(table: TableModel, given: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected one( value)? or 3 \(one per sequence\), got 16$"):
        tokens(table, PADDED, fs_generate(**given), max_new_tokens=2)
    twelve = rf"^{name}: expected one( value)? or 12 \(one per sequence\), or 3 \(one per prompt\), got 16$"
    with pytest.raises(ValueError, match=twelve):
        tokens(table, PADDED, fs_generate(**given), max_new_tokens=2, num_return_sequences=4)


def test_an_offset_is_that_of_the_first_new_token(table: TableModel) -> None:
    got = tokens(table, {"input_ids": torch.tensor([[3]])}, fs_generate([9], offset=40), max_new_tokens=6, top_k=0)
    for step, (last, token) in enumerate(zip(got[0].tolist(), got[0, 1:].tolist(), strict=False)):
        logits = table.table[last].detach()
        assert token == int(fs.sample(logits, seed=[9], offset=40 + step).tokens)


@pytest.mark.parametrize("inputs", [PADDED, {"input_ids": IDS}, {"input_ids": IDS[:1]}], ids=["mask", "no mask", "one"])
def test_four_and_four_tokens_are_eight(table: TableModel, gpt2: Any, inputs: dict[str, torch.Tensor]) -> None:
    common: dict[str, Any] = {"eos_token_id": None, "suppress_tokens": [PAD]}  # a drawn one would pass for padding
    ones = torch.ones(len(inputs["input_ids"]), 4, dtype=torch.int64)
    longer = {"attention_mask": torch.cat([inputs["attention_mask"], ones], 1)} if "attention_mask" in inputs else {}
    for lm in (table, gpt2):
        for seed in (7, list(range(len(ones)))):
            for begin, go_on in (("prompt", "prompt"), (0, 4)):
                first, second = fs_generate(seed, offset=begin), fs_generate(seed, offset=go_on)  # type: ignore[arg-type]
                eight = tokens(lm, inputs, first, max_new_tokens=8, **common)
                four = {"input_ids": tokens(lm, inputs, first, max_new_tokens=4, **common)}
                assert torch.equal(tokens(lm, four | longer, second, max_new_tokens=4, **common), eight)
                assert not torch.equal(tokens(lm, four | longer, fs_generate(seed), max_new_tokens=4, **common), eight)


def test_a_prompts_length_is_without_padding_and_with_the_cache(gpt2: Any) -> None:
    sample = fs_generate([7], offset="prompt")
    alone = {"input_ids": IDS[1:2, 2:]}
    want = tokens(gpt2, alone, sample, max_new_tokens=6, eos_token_id=None)
    padded = {name: value[1:2] for name, value in PADDED.items()}
    assert torch.equal(tokens(gpt2, padded, sample, max_new_tokens=6, eos_token_id=None)[:, 2:], want)
    first = gpt2.generate(**alone, **DICT, custom_generate=sample, max_new_tokens=3, eos_token_id=None)
    name = "cache" if "cache" in first else "past_key_values"  # as it was called before 5.20
    more = {"input_ids": first.sequences, name: first[name]}
    assert torch.equal(tokens(gpt2, more, sample, max_new_tokens=3, eos_token_id=None), want)


def test_an_encoder_decoder_counts_what_it_has_decoded(t5: T5ForConditionalGeneration) -> None:
    sample = fs_generate([7, 8], offset="prompt")
    inputs = {"input_ids": IDS[1:], "attention_mask": PADDED["attention_mask"][1:]}
    eight = tokens(t5, inputs, sample, max_new_tokens=8, eos_token_id=None)
    four = tokens(t5, inputs, sample, max_new_tokens=4, eos_token_id=None)
    more = tokens(t5, inputs | {"decoder_input_ids": four}, sample, max_new_tokens=4, eos_token_id=None)
    assert torch.equal(more, eight)
    assert not torch.equal(tokens(t5, inputs, fs_generate([7, 8]), max_new_tokens=8, eos_token_id=None), eight)


# Log-probabilities ----------------------------------------------------------------------------------------------------


class Dampen(LogitsProcessor):
    """A processor of the user's, which changes what it gets in place."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 10:60] -= 1.0
        return scores


@pytest.mark.parametrize("name", ["table", "gpt2", "t5"])
@pytest.mark.parametrize("do_sample", [True, False])
def test_logprobs_are_those_of_the_tokens(name: str, do_sample: bool, request: pytest.FixtureRequest) -> None:
    lm = request.getfixturevalue(name)
    for own in ({}, {"min_new_tokens": 3, "repetition_penalty": 1.3}, {"logits_processor": [Dampen()]}):
        options = {"max_new_tokens": 8, "eos_token_id": [EOS, 60, 61, 62, 63, 64], "output_logits": True} | own
        options |= DICT | {"do_sample": do_sample, "output_scores": True}
        seed = 7 if do_sample else None
        raw = lm.generate(**PADDED, **options, custom_generate=fs_generate(seed, logprobs="raw"))
        ids = raw.sequences[:, -len(raw.scores) :]
        assert raw.logprobs.shape == ids.shape
        assert raw.logprobs.dtype == torch.float32
        ended = torch.isin(ids, torch.tensor(options["eos_token_id"])).cumsum(1)
        past = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], 1) > 0
        assert torch.equal(raw.logprobs.isnan(), past)
        clean = raw.logits if "logits_processor" not in own else None
        if clean is not None:
            want = torch.stack(clean, 1).log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]
            torch.testing.assert_close(raw.logprobs[~past], want[~past], rtol=1e-5, atol=1e-5)
        processed = lm.generate(**PADDED, **options, custom_generate=fs_generate(seed, logprobs="processed"))
        assert torch.equal(processed.sequences, raw.sequences)
        scores = (
            torch.stack(processed.scores, 1).log_softmax(-1)
            if do_sample
            else torch.zeros(*ids.shape, lm.config.vocab_size)
        )
        want = scores.gather(2, ids[:, :, None])[:, :, 0]
        torch.testing.assert_close(processed.logprobs[~past], want[~past], rtol=1e-4, atol=1e-5)


def test_raw_logprobs_are_the_models_own_whatever_a_processor_does(table: TableModel) -> None:
    options = DICT | {"max_new_tokens": 6, "logits_processor": [Dampen()]}
    out = table.generate(**PADDED, **options, custom_generate=fs_generate(7, logprobs="raw"))
    before, after = out.sequences[:, 5:-1], out.sequences[:, 6:]
    want = table.table.detach()[before].log_softmax(-1).gather(2, after[:, :, None])[:, :, 0]
    torch.testing.assert_close(out.logprobs, want, rtol=1e-5, atol=1e-5)


def test_logprobs_need_room_in_the_result(table: TableModel) -> None:
    with pytest.raises(ValueError, match=r"fs_generate\(logprobs='raw'\).*return_dict_in_generate=True"):
        tokens(table, PADDED, fs_generate(7, logprobs="raw"), max_new_tokens=2)


def test_without_being_asked_for_nothing_is_added(table: TableModel) -> None:
    out = table.generate(**PADDED, **DICT, max_new_tokens=2, custom_generate=fs_generate(7))
    assert not any(hasattr(out, name) for name in ("logprobs", "status", "errors", "truncated"))


# Stop strings ---------------------------------------------------------------------------------------------------------


def test_stop_strings(model: Any, tokenizer: Any) -> None:
    batch = tokenizer(["The future of AI is", "Use this"], return_tensors="pt", padding=True, padding_side="left")
    free = tokens(model, batch, fs_generate(5), max_new_tokens=30, eos_token_id=None)
    stop = tokenizer.decode(free[0, -20:-18])
    options: dict[str, Any] = {"max_new_tokens": 30, "stop_strings": [stop], "pad_token_id": PAD}
    got = tokens(model, batch, fs_generate(5), tokenizer=tokenizer, **options)
    assert torch.equal(got, tokens(model, batch, fs_generate(5, tokenizer=tokenizer), **options))
    assert tokenizer.decode(got[0], skip_special_tokens=True).rstrip().count(stop.strip()) == 1
    start = batch["input_ids"].shape[1]
    end = start + int((got[0, start:] != PAD).sum())
    assert torch.equal(got[0, :end], free[0, :end])
    assert end < free.shape[1]
    with pytest.raises(ValueError, match="tokenizer"):
        tokens(model, batch, fs_generate(5), **options)


def test_stop_strings_of_the_config_and_of_a_pipeline(model: Any, tokenizer: Any) -> None:
    config = GenerationConfig(do_sample=True, max_new_tokens=30, stop_strings=["e"], pad_token_id=PAD, temperature=0.7)
    ids = tokenizer("The future", return_tensors="pt")
    got = model.generate(**ids, generation_config=config, custom_generate=fs_generate(1), tokenizer=tokenizer)
    new = got[0, ids["input_ids"].shape[1] :]
    assert "e" in tokenizer.decode(new)
    assert "e" not in tokenizer.decode(new[:-1])
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options: dict[str, Any] = {
        "do_sample": True,
        "max_new_tokens": 30,
        "stop_strings": ["e"],
        "return_full_text": False,
    }
    (out,) = pipe("The future", custom_generate=fs_generate(1, tokenizer=tokenizer), **options)
    assert out["generated_text"] == tokenizer.decode(new)


# Sequences that can have no token -------------------------------------------------------------------------------------


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "min_new_tokens": ({"min_new_tokens": 6}, "grammar and min_new_tokens together allow no token: row 1 "),
    "min_length": ({"min_length": 10}, "grammar and min_length together allow no token: row 1 "),
    "suppress_tokens": ({"suppress_tokens": "all y, n"}, "grammar and suppress_tokens together allow no token: row 1 "),
    "begin": ({"begin_suppress_tokens": "all y, n"}, "grammar and begin_suppress_tokens together .*: row 1 "),
    "bad_words_ids": ({"bad_words_ids": "all y, n"}, "grammar and bad_words_ids together allow no token: row 1 "),
    "prefix": (
        {"prefix_allowed_tokens_fn": lambda row, ids: [5 + row]},
        "grammar and prefix_allowed_tokens_fn together allow no token: row 1 ",
    ),
    "prefix, not fused": (
        {"prefix_allowed_tokens_fn": lambda row, ids: [5 + row], "no_repeat_ngram_size": 9},
        "grammar and prefix_allowed_tokens_fn together allow no token: row 1 ",
    ),
}


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize(("options", "message"), CONFLICTS.values(), ids=CONFLICTS)
def test_options_that_contradict_each_other(
    model: Any, tokenizer: Any, compiler: GrammarCompiler, options: dict[str, Any], message: str, do_sample: bool
) -> None:
    begin = [i for i in range(len(tokenizer)) if tokenizer.decode([i])[:1] in ("y", "n")]
    options = {k: begin if v == "all y, n" else v for k, v in options.items()}
    if "bad_words_ids" in options:
        options["bad_words_ids"] = [[i] for i in begin]
    batch = tokenizer(["The", "The answer is", "Use this"], return_tensors="pt", padding=True, padding_side="left")
    options |= {"max_new_tokens": 8, "do_sample": do_sample}
    seed, yes_no = 7 if do_sample else None, [None, compiler.choices(["yes", "no"]), None]
    with pytest.raises(ValueError, match=message):
        model.generate(**batch, **options, custom_generate=fs_generate(seed, grammar=yes_no))
    flag = fs_generate(seed, grammar=yes_no, on_invalid="flag", logprobs="processed")
    out = model.generate(**batch, **options, return_dict_in_generate=True, custom_generate=flag)
    assert out.status.tolist() == [0, 3, 0]
    assert out.status.dtype == torch.int32
    assert [error is None for error in out.errors] == [True, False, True]
    assert re.search(message, out.errors[1])
    free = model.generate(**batch, **options, custom_generate=fs_generate(seed))
    assert torch.equal(out.sequences[::2], free[::2, : out.sequences.shape[1]])
    new = out.sequences[1, batch["input_ids"].shape[1] :]
    length = int((new != PAD).sum())
    assert tokenizer.decode(new[:length]) in ("", "yes", "no")
    assert torch.equal(out.logprobs[1].isnan(), torch.arange(len(new)) >= length)
    assert out.truncated.tolist() == [False, length == 0, False]
    plain = fs_generate(seed, grammar=yes_no, on_invalid="flag")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert torch.equal(model.generate(**batch, **options, custom_generate=plain), out.sequences)
    said = [str(warning.message) for warning in seen]
    assert any(re.search(f"sequence 1 was ended: {message}", text) for text in said)
    assert any("truncated" in text for text in said) == (length == 0)


@pytest.mark.parametrize("do_sample", [True, False])
def test_a_broken_row_ends_alone(table: TableModel, do_sample: bool) -> None:
    # Each id leads to the next, so that the sequences keep apart.
    chain = TableModel(table.table.detach() + 15 * torch.eye(V).roll(1, 1))
    start = chain.generate(**PADDED, max_new_tokens=8, pad_token_id=PAD)
    assert torch.equal(start, tokens(chain, PADDED, fs_generate(7), max_new_tokens=8, pad_token_id=PAD))
    broken = TableModel(chain.table.detach().clone())
    with torch.no_grad():
        broken.table[start[1, 8], 7] = torch.nan  # what its third new token leads to
    seed = 7 if do_sample else None
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": do_sample, "pad_token_id": PAD}
    flag = fs_generate(seed, on_invalid="flag", logprobs="raw")
    out = broken.generate(**PADDED, **options, return_dict_in_generate=True, custom_generate=flag)
    assert out.status.tolist() == [0, 1, 0]
    assert out.errors == [None, "row 1 has a NaN logit", None]
    assert out.sequences[1].tolist() == start[1, :9].tolist() + [PAD] * 5
    assert torch.equal(out.sequences[::2], start[::2])
    assert out.logprobs.isnan().sum(1).tolist() == [0, 5, 0]
    if do_sample:
        with pytest.raises(ValueError, match=r"^row 1 has a NaN logit; on_invalid='flag' ends such a sequence"):
            broken.generate(**PADDED, **options, custom_generate=fs_generate(seed))


def test_what_a_sequence_past_its_end_gets_is_no_error(table: TableModel) -> None:
    broken = TableModel(table.table.detach().clone())
    with torch.no_grad():
        broken.table[PAD] = torch.nan
    eos = int(tokens(table, PADDED, fs_generate(7), max_new_tokens=8)[1, 7])
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": eos, "pad_token_id": PAD}
    got = tokens(broken, PADDED, fs_generate(7), **options)
    assert torch.equal(got, tokens(table, PADDED, fs_generate(7), **options))
    assert (got[1, 8:] == PAD).all()


def test_a_step_that_no_grammar_has_taken_is_an_error(
    model: Any, tokenizer: Any, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, *_: Any) -> None:
        raise GrammarError("the engine gave up", 1, b"")

    monkeypatch.setattr(GrammarBatch, "accept", fails)
    sample = fs_generate(7, grammar=compiler.regex("[a-z]{20}"), on_invalid="flag")
    with pytest.raises(GrammarError):
        tokens(model, tokenizer(["The", "The"], return_tensors="pt"), sample, max_new_tokens=3)


@pytest.mark.parametrize("method", ["bitmask", "accept"])
def test_what_one_grammar_cannot_do_ends_that_sequence(
    model: Any, tokenizer: Any, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    batch = tokenizer(["The", "The answer is", "Use this"], return_tensors="pt", padding=True, padding_side="left")
    options: dict[str, Any] = {"max_new_tokens": 8, "return_dict_in_generate": True, "do_sample": True}
    grammar = compiler.regex("[a-z]{99}")
    free = model.generate(**batch, **options, custom_generate=fs_generate(7, grammar=grammar)).sequences
    calls: list[Any] = []
    real = getattr(GrammarBatch, method)

    def third_fails(self: Any, *args: Any) -> Any:
        calls.append(args)
        result = real(self, *args)
        if len(calls) == 3:
            self._ended[1] = self._ended[1] or method == "accept"
            raise GrammarError("the engine gave up", 1, b"")
        return result

    monkeypatch.setattr(GrammarBatch, method, third_fails)
    with pytest.raises(GrammarError):
        model.generate(**batch, **options, custom_generate=fs_generate(7, grammar=grammar))
    calls.clear()
    out = model.generate(**batch, **options, custom_generate=fs_generate(7, grammar=grammar, on_invalid="flag"))
    assert out.errors == [None, "the engine gave up", None]
    assert out.truncated.all()
    assert torch.equal(out.sequences[::2], free[::2])
    length = batch["input_ids"].shape[1] + (2 if method == "bitmask" else 3)
    assert out.sequences[1].tolist() == free[1, :length].tolist() + [PAD] * (free.shape[1] - length)
    assert out.status.tolist() == [0, 3 if method == "bitmask" else 0, 0]


def test_a_flagged_batch_needs_padding(table: TableModel) -> None:
    model = TableModel(table.table.detach())
    with pytest.raises(ValueError, match=r"on_invalid='flag'.*give generate a pad_token_id"):
        tokens(model, {"input_ids": torch.tensor([[3], [4]])}, fs_generate(7, on_invalid="flag"), max_new_tokens=2)
    got = tokens(model, {"input_ids": torch.tensor([[3]])}, fs_generate(7, on_invalid="flag"), max_new_tokens=2)
    assert got.shape == (1, 3)


def test_no_grammar_for_any_sequence(table: TableModel) -> None:
    free = table.generate(**PADDED, **DICT, max_new_tokens=5, custom_generate=fs_generate(7))
    out = table.generate(**PADDED, **DICT, max_new_tokens=5, custom_generate=fs_generate(7, grammar=[None] * 3))
    assert torch.equal(out.sequences, free.sequences)
    assert out.truncated.tolist() == [False] * 3


# What is refused at once ----------------------------------------------------------------------------------------------


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "seed float": ({"seed": 1.5}, "seed.* 1.5"),
    "seed text": ({"seed": "x"}, "seed.* 'x'"),
    "seed bytes": ({"seed": b"abc"}, "seed = b'abc'"),
    "seed bool": ({"seed": True}, "seed.* True"),
    "seed in a list": ({"seed": [1, 2.5]}, r"seed \(row 1\).* 2.5"),
    "seed too large": ({"seed": 2**64}, "seed = 18446744073709551616"),
    "offset float": ({"offset": 1.5}, "offset.* 1.5"),
    "offset text": ({"offset": "end"}, "offset = 'end': expected .*'prompt'"),
    "backend": ({"backend": "nope"}, "backend = 'nope': expected 'auto' or"),
    "backend number": ({"backend": 3}, "backend = 3"),
    "grammar text": ({"grammar": "yes|no"}, r"grammar: expected a Grammar or None, got str 'yes\|no': .*regex"),
    "grammar in a list": ({"grammar": [None, "a"]}, r"grammar \(row 1\): expected a Grammar or None, got str 'a'"),
    "streamer": ({"streamer": print}, r"streamer: expected an object with put\(ids\) and end\(\), got builtin"),
    "logprobs": ({"logprobs": True}, "logprobs = True: expected None, 'raw' or 'processed'"),
    "on_invalid": ({"on_invalid": "keep"}, "on_invalid = 'keep': expected 'raise' or 'flag'"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_fail_when_given(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fs_generate(**given)


def test_a_compiler_is_no_grammar(compiler: GrammarCompiler) -> None:
    with pytest.raises(TypeError, match="got GrammarCompiler itself: make one by its json_schema"):
        fs_generate(grammar=compiler)  # type: ignore[arg-type]


def test_the_processor_checks_its_backend_when_made() -> None:
    with pytest.raises(ValueError, match="backend = 'nope'"):
        FastSampleLogitsProcessor(backend="nope")


@pytest.mark.parametrize("options", [{}, {"seed": 3}, {"tokenizer": "one"}], ids=str)
def test_the_function_itself_is_no_custom_generate(gpt2: Any, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"call it: custom_generate=fs_generate\(\)"):
        tokens(gpt2, {"input_ids": IDS[:1]}, fs_generate, max_new_tokens=2, **options)
