"""Structured output: what the grammar engines allow, and that what is generated under them holds."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import random
import re
import secrets
import sys
from typing import Any

import jsonschema
import llguidance.hf
import numpy as np
import pytest
import tokenizers
import torch
import xgrammar
from table_model import TableModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)

import fastsample as fs
from fastsample.cli.model import shipped_model
from fastsample.integrations.grammar import (
    Grammar,
    GrammarBatch,
    GrammarCompiler,
    GrammarError,
    TruncatedWarning,
)
from fastsample.integrations.grammar.compiler import _engine
from fastsample.integrations.grammar.engines import ENGINES, _LLMatcher
from fastsample.integrations.grammar.vocabulary import Vocabulary
from fastsample.integrations.transformers import GrammarLogitsProcessor, fs_generate

BACKENDS = list(ENGINES)
EOS, PAD, V = 0, 1, 4096

SCHEMAS: dict[str, Any] = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b", None, 2.5]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "enum": {"enum": ["red", 1, None, True, {"b": [2]}, 'a "quote", a \\ and é\n']},
    "nested": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 2},
        "minItems": 1,
        "maxItems": 2,
    },
    "number": {"type": "number"},
    "range": {"type": "integer", "minimum": -7, "exclusiveMaximum": 1234},
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}, "c": {"enum": [1]}},
        "additionalProperties": False,
    },
    "string": {"type": "string", "minLength": 3, "maxLength": 8},
    "escapes": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
    "pattern": {"type": "string", "pattern": "^[a-z]{2,4}-[0-9]+$"},
    "format": {"type": "string", "format": "date"},
    "any of": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}, {"type": "null"}]},
    "recursive": {
        "type": "object",
        "properties": {
            "v": {"type": "integer", "minimum": 0, "maximum": 9},
            "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        },
        "required": ["v", "next"],
        "additionalProperties": False,
    },
    "undeclared": {"type": "object", "required": ["z"], "additionalProperties": {"type": "boolean"}},
    "keys": {
        "type": "object",
        "properties": {'a"\\': {"type": "boolean"}, "é ü": {"type": "boolean"}},
        "required": ['a"\\', "é ü"],
        "additionalProperties": False,
    },
    "typed enum": {"type": "integer", "enum": [1, 2, "x"]},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "boolean"}],
        "items": False,
        "minItems": 2,
    },
    "untyped": {"minItems": 2, "maxItems": 3, "items": {"type": "boolean"}},
    "anything": {},
}


def valid(text: str, schema: Any) -> bool:
    checker = jsonschema.FormatChecker()
    return bool(jsonschema.Draft202012Validator(schema, format_checker=checker).is_valid(json.loads(text)))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(shipped_model(), padding_side="left")


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(shipped_model()).float().eval()


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


@pytest.fixture(scope="module")
def spiece() -> Any:
    """A tokenizer that names its tokens as SentencePiece does, with bytes for what it has no token for."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "\u2581yes", "\u2581no", "yes", "no", "a", "e", "s", "y", "{", '"', "0", "1", "12", "é"]
    vocab = [(piece, 0.0) for piece in pieces]
    fast = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=0, byte_fallback=True))
    fast.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def allowed(batch: GrammarBatch, vocab: int = V) -> list[int]:
    """The ids that the first sequence may go on with."""
    words = batch.bitmask(torch.zeros(len(batch), vocab))[0].numpy()
    return [int(i) for i in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))]


def walk(grammar: Grammar, rng: random.Random, limit: int = 150) -> tuple[list[int], bool]:
    """Tokens drawn uniformly from what is allowed, and whether they came to an end."""
    batch, tokens = GrammarBatch([grammar], [EOS]), []
    for _ in range(limit):
        ids = allowed(batch)
        token = EOS if EOS in ids and (len(ids) == 1 or rng.random() < 0.3) else rng.choice(ids)
        batch.accept([token])
        if batch.ended[0]:
            return tokens, True
        tokens.append(token)
    return tokens, False


# The vocabulary -------------------------------------------------------------------------------------------------------


def test_bytes_of_a_byte_level_tokenizer_are_those_that_others_read(tokenizer: Any) -> None:
    ours = Vocabulary(tokenizer)
    theirs = llguidance.hf.from_tokenizer(tokenizer)
    text = [i for i, token in enumerate(ours.tokens) if token]
    assert sorted(set(range(V)) - set(text)) == sorted(tokenizer.all_special_ids) == [EOS, PAD]
    # llguidance keeps the byte 0xff, which no text holds, for itself.
    assert [ours.tokens[i].strip(b"\xff") for i in text] == [theirs.decode_bytes([i]) for i in text]
    decoded = xgrammar.TokenizerInfo.from_huggingface(tokenizer).decoded_vocab
    assert [ours.tokens[i] for i in text] == [decoded[i] for i in text]
    assert (ours.end, ours.padding) == (V, PAD)


def test_bytes_of_a_sentencepiece_tokenizer_are_those_that_others_read(spiece: Any) -> None:
    ours = Vocabulary(spiece)
    decoded = xgrammar.TokenizerInfo.from_huggingface(spiece).decoded_vocab
    text = [i for i, token in enumerate(ours.tokens) if token]
    assert sorted(set(range(len(ours.tokens))) - set(text)) == [0, 1, 2]
    assert [ours.tokens[i] for i in text] == [decoded[i] for i in text]
    assert ours.tokens[3 + 0xC3] == b"\xc3"


def test_added_tokens_are_text_unless_they_are_special(tokenizer: Any) -> None:
    more = AutoTokenizer.from_pretrained(shipped_model())
    more.add_tokens(["<a b>"])
    more.add_tokens(["<hush>"], special_tokens=True)
    ours = Vocabulary(more)
    assert ours.tokens[V] == b"<a b>"
    assert not ours.is_text(V + 1)
    assert not ours.is_text(-1)


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    fast = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    fast.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ValueError, match=r"tokenizer: .* neither byte-level nor SentencePiece"):
        GrammarCompiler(PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]"))


# What each engine allows ----------------------------------------------------------------------------------------------


CHOICES = ["yes", "yesterday", "no (not) [at] all.", "né\n", 'a "b" \\d', "{x}|$^*+?#-,"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("choice", CHOICES)
def test_choices_allow_exactly_what_goes_on_to_one(tokenizer: Any, backend: str, choice: str) -> None:
    # outlines-core would end "yesterday" at "yes", and so is not given both.
    choices = [c for c in CHOICES if c == choice or not (backend == "outlines-core" and c.startswith("yes"))]
    grammar = GrammarCompiler(tokenizer, backend=backend).choices(choices)
    wanted = [text.encode() for text in choices]
    tokens = Vocabulary(tokenizer).tokens
    batch, text = GrammarBatch([grammar], [EOS]), b""
    while text != choice.encode():
        right = [i for i, t in enumerate(tokens) if t and any(whole.startswith(text + t) for whole in wanted)]
        right += [EOS] if text in wanted else []
        got = allowed(batch)
        # llguidance leaves no choice of tokens where there is none of text.
        assert set(got) <= set(right) if backend == "llguidance" else sorted(got) == sorted(right)
        token = max((i for i in got if choice.encode().startswith(text + tokens[i]) and tokens[i]), key=lambda i: -i)
        batch.accept([token])
        text += tokens[token]
    assert EOS in allowed(batch)
    batch.accept([EOS])
    assert (batch.ended, batch.truncated) == ([True], [False])


def test_outlines_core_refuses_a_choice_that_begins_another(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="outlines-core: it would end 'yesterday' at 'yes'"):
        GrammarCompiler(tokenizer, backend="outlines-core").choices(CHOICES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "pattern", ["[0-9]{3}-[a-f]+", "(a|bc)*d?", "^x?é{2}$", r"\d+\.[\d_]\w\s\$", "[^a-z]x", "^a|b$"]
)
def test_random_walks_match_the_regex(tokenizer: Any, backend: str, pattern: str) -> None:
    grammar = GrammarCompiler(tokenizer, backend=backend).regex(pattern)
    texts = set()
    for seed in range(12):
        tokens, ended = walk(grammar, random.Random(seed))
        text = tokenizer.decode(tokens)
        assert grammar.is_complete(tokens) or not ended
        assert re.fullmatch(pattern, text) or not ended, text
        texts.add(text)
    assert len(texts) > 1 or pattern.startswith("^")


# What an engine does not enforce, and would let pass.
REFUSED = {
    "llguidance": set(),
    "xgrammar": {
        "object",
        "range",
        "string",
        "pattern",
        "format",
        "any of",
        "recursive",
        "undeclared",
        "keys",
        "untyped",
    },
    "outlines-core": {
        *("object", "range", "pattern", "format", "recursive", "undeclared", "keys", "tuple", "untyped"),
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_random_walks_validate_or_the_schema_is_refused(tokenizer: Any, backend: str, name: str) -> None:
    compiler = GrammarCompiler(tokenizer, backend=backend)
    if name in REFUSED[backend]:
        with pytest.raises(ValueError, match=rf"^json_schema .*: {backend}: "):
            compiler.json_schema(SCHEMAS[name])
        return
    grammar = compiler.json_schema(SCHEMAS[name])
    ended = 0
    for seed in range(12):
        tokens, whole = walk(grammar, random.Random(seed))
        ended += whole
        assert not whole or valid(tokenizer.decode(tokens), SCHEMAS[name]), tokenizer.decode(tokens)
        assert whole == grammar.is_complete(tokens)
    assert ended


@pytest.mark.parametrize("backend", BACKENDS)
def test_whitespace_only_where_it_is_asked_for(tokenizer: Any, backend: str) -> None:
    schema = {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 2}
    one, any_ = (
        GrammarCompiler(tokenizer, backend=backend, any_whitespace=w).json_schema(schema) for w in (False, True)
    )
    form = "[null,null]" if backend == "outlines-core" else "[null, null]"
    for text, in_one in ((form, True), ("[\n null,  null\t]", False)):
        tokens = tokenizer(text)["input_ids"]
        assert (one.is_complete(tokens), any_.is_complete(tokens)) == (in_one, True)
    assert not any_.is_complete(tokenizer("[null, null")["input_ids"])


def test_auto_takes_the_first_engine_that_takes_the_grammar(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiler.regex("a").backend == "llguidance"
    with pytest.raises(ValueError, match=r"llguidance: .*xgrammar: .*outlines-core: "):
        compiler.json_schema({"allOf": [{"type": "string"}, {"type": "integer"}]})

    def refuse(*_: Any) -> None:
        raise ValueError("not today")

    monkeypatch.setattr(ENGINES["llguidance"], "json_schema", refuse)
    assert compiler.json_schema({"type": "array", "items": {"type": "integer"}}).backend == "xgrammar"


# Generation -----------------------------------------------------------------------------------------------------------


def generate(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> Any:
    """A result with `truncated`, and the new texts with special tokens left in."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    given = {name: options.pop(name) for name in ("seed", "grammar", "backend") if name in options}
    options = {"do_sample": True, "top_k": 0, "return_dict_in_generate": True} | options
    out = model.generate(**inputs, **options, custom_generate=fs_generate(**given))
    return out, [text_of(tokenizer, row[inputs["input_ids"].shape[1] :]) for row in out.sequences]


def text_of(tokenizer: Any, ids: torch.Tensor) -> str:
    """The text before the end of sequence; a special token elsewhere would be seen."""
    return str(tokenizer.decode(ids)).split("<|endoftext|>")[0].rstrip("\0").replace("<|pad|>", "")


GENERATIONS = int(os.environ.get("FASTSAMPLE_GENERATIONS", "72"))
BOUNDED = {name: schema for name, schema in SCHEMAS.items() if name not in ("undeclared", "anything")}


def test_every_generation_validates_or_is_reported_truncated(
    model: Any, tokenizer: Any, compiler: GrammarCompiler, record_property: Any
) -> None:
    """The long run, of fresh seeds: FASTSAMPLE_GENERATIONS=1000 pytest -k every_generation -s tests/integrations."""
    grammars = {name: compiler.json_schema(schema) for name, schema in SCHEMAS.items()}
    names = list(SCHEMAS)
    truncated = 0
    for start in range(0, GENERATIONS, 36):
        rows = [names[i % len(names)] for i in range(start, min(start + 36, GENERATIONS))]
        seeds = [secrets.randbits(64) for _ in rows]
        temperature = [(0.6, 1.0, 1.4)[i % 3] for i in range(len(rows))]
        inputs = tokenizer(["The future of AI is"] * len(rows), return_tensors="pt")
        sample = fs_generate(seeds, grammar=[grammars[name] for name in rows], temperature=temperature)
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": 200, "return_dict_in_generate": True}
        out = model.generate(**inputs, **options, custom_generate=sample)
        new = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        for name, seed, ids, cut in zip(rows, seeds, new, out.truncated.tolist(), strict=True):
            ids = ids[: ids.index(EOS)] if EOS in ids else ids
            assert PAD not in ids
            truncated += cut
            assert cut != grammars[name].is_complete(ids), (name, seed)
            assert cut or valid(tokenizer.decode(ids), SCHEMAS[name]), (name, seed, tokenizer.decode(ids))
    record_property("truncated", truncated)
    print(f"\n{GENERATIONS} generations, {len(names)} schemas: {truncated} truncated, all others valid")
    assert truncated < GENERATIONS / 4


def test_truncation_is_reported(model: Any, tokenizer: Any, compiler: GrammarCompiler) -> None:
    grammar = [compiler.json_schema(SCHEMAS["object"]), compiler.choices(["a"]), compiler.regex("[0-9]+"), None]
    options: dict[str, Any] = {"grammar": grammar, "seed": 1, "max_new_tokens": 3, "num_return_sequences": 4}
    out, _ = generate(model, tokenizer, ["Hi"], **options)
    assert out.truncated.tolist() == [True, False, False, False]
    with pytest.warns(TruncatedWarning, match="the text of sequence 0 is truncated"):
        sequences = model.generate(
            tokenizer("Hi", return_tensors="pt")["input_ids"],
            **{"do_sample": True, "top_k": 0, "max_new_tokens": 3, "num_return_sequences": 4},
            custom_generate=fs_generate(seed=1, grammar=grammar),
        )
    assert torch.equal(sequences, out.sequences)


class Stop(StoppingCriteria):
    """Ends sequence 0 after two tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([row == 0 and input_ids.shape[1] >= 4 for row in range(len(input_ids))])


def test_a_sequence_that_something_else_ends_is_truncated(table: TableModel, compiler: GrammarCompiler) -> None:
    grammar = compiler.regex("[0-9]{30}")
    options = {"do_sample": True, "max_new_tokens": 40, "return_dict_in_generate": True, "top_k": 0}
    sample = fs_generate(seed=1, grammar=grammar)
    prompt = torch.full((2, 2), 9)
    out = table.generate(prompt, stopping_criteria=[Stop()], custom_generate=sample, **options)
    assert out.truncated.tolist() == [True, False]
    assert (out.sequences[0, 4:] == PAD).all()


@pytest.fixture(scope="module")
def table() -> TableModel:
    torch.manual_seed(1)
    logits = torch.randn(64, V)
    logits[:, [EOS, PAD]] = 12.0  # it wants nothing more than to end
    model = TableModel(logits).eval()
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    return model


PROMPT = torch.tensor([[9, 300]])


def drawn(model: Any, seed: Any, grammar: Any, rows: int = 1, **options: Any) -> list[list[int]]:
    """The new ids of each sequence up to its end of sequence."""
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 60} | options
    sample = fs_generate(seed, grammar=grammar)
    new = model.generate(PROMPT.repeat(rows, 1), custom_generate=sample, **options)[:, 2:].tolist()
    return [ids[: ids.index(EOS)] if EOS in ids else ids for ids in new]


def test_special_tokens_are_no_text_and_the_end_waits_for_it(
    table: TableModel, tokenizer: Any, compiler: GrammarCompiler
) -> None:
    for seed in range(5):
        (ids,) = drawn(table, seed, compiler.json_schema(SCHEMAS["object"]))
        assert not {EOS, PAD} & set(ids)
        assert valid(tokenizer.decode(ids), SCHEMAS["object"])
        (ids,) = drawn(table, seed, compiler.regex("[0-9]+"))
        assert len(ids) == 1  # complete at once, and then it ends


def test_a_seed_and_a_grammar_give_the_same_in_any_batch(table: TableModel, compiler: GrammarCompiler) -> None:
    grammars = [compiler.json_schema(SCHEMAS[name]) for name in ("object", "number", "string")]
    grammars = [*grammars, None, compiler.choices(["yes", "no"])]
    seeds = [11, 2**64 - 1, -5, 3, 4]
    together = drawn(table, seeds, grammars, 5)
    assert [drawn(table, [seed], [g])[0] for seed, g in zip(seeds, grammars, strict=False) if g] == [
        ids for ids, g in zip(together, grammars, strict=True) if g
    ]
    assert drawn(table, seeds[::-1], grammars[::-1], 5) == together[::-1]
    plain = table.generate(PROMPT, do_sample=True, top_k=0, max_new_tokens=60, custom_generate=fs_generate([seeds[3]]))[
        0, 2:
    ].tolist()
    assert together[3] == plain[: plain.index(EOS)]


def test_the_mask_in_the_pass_is_the_mask_apart(table: TableModel, compiler: GrammarCompiler) -> None:
    grammar = compiler.json_schema(SCHEMAS["object"])
    (ids,) = drawn(table, [5], grammar, temperature=0.7, top_k=20, top_p=0.9)
    batch, text = GrammarBatch([grammar], [EOS]), []
    last = int(PROMPT[0, -1])
    while True:
        logits = table.table[last % 64][None].detach()
        words = batch.bitmask(logits).numpy().view(np.uint8)
        forbidden = torch.from_numpy(np.unpackbits(words, axis=1, bitorder="little")[:, :V] == 0)
        masked = logits.masked_fill(forbidden, -torch.inf)
        options = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "ties": "all", "seed": [5], "offset": len(text)}
        last = int(fs.sample(masked, **options).tokens)
        batch.accept([last])
        if batch.ended[0]:
            break
        text.append(last)
    assert text == ids


@pytest.mark.parametrize("extra", [-100, 0, 1, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_wider_or_narrower_than_the_tokenizer(tokenizer: Any, backend: str, extra: int) -> None:
    torch.manual_seed(2)
    logits = torch.randn(64, V + extra)
    logits[:, V:] += 50.0
    wide = TableModel(logits).eval()
    wide.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    grammar = GrammarCompiler(tokenizer, backend=backend).regex("[a-z]{5,9}")
    one, free = drawn(wide, 3, [grammar, None], 2)
    assert re.fullmatch("[a-z]{5,9}", tokenizer.decode(one))
    assert extra <= 0 or min(free) >= V  # no mask hides the others from a sequence without a grammar


def test_without_an_end_of_sequence_a_text_ends_where_it_is_first_complete(
    table: TableModel, tokenizer: Any, compiler: GrammarCompiler
) -> None:
    grammars = [compiler.json_schema(SCHEMAS["object"]), compiler.regex("[0-9]+"), compiler.choices(["yes", "no"])]
    for pad in (PAD, None):
        model = TableModel(table.table.detach()).eval()
        model.generation_config = GenerationConfig(pad_token_id=pad)
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": 60, "return_dict_in_generate": True}
        sample = fs_generate(4, grammar=grammars)
        out = model.generate(PROMPT.repeat(3, 1), custom_generate=sample, **options)
        assert out.truncated.tolist() == [False] * 3
        ids = [[i for i in row if i != PAD] for row in out.sequences[:, 2:].tolist()]
        assert valid(tokenizer.decode(ids[0]), SCHEMAS["object"])
        assert len(ids[1]) == 1
        assert tokenizer.decode(ids[2]) in ("yes", "no")


def test_several_ends_of_sequence(table: TableModel, tokenizer: Any, compiler: GrammarCompiler) -> None:
    newline = tokenizer("\n")["input_ids"][0]
    grammar = compiler.regex("(\n?[0-9]){4}\n?")
    logits = table.table.detach().clone()
    logits[:, newline] = 12.0
    eager = TableModel(logits).eval()
    eager.generation_config = GenerationConfig(pad_token_id=PAD)
    for seed in range(4):  # the grammar allows a newline anywhere; as an end of sequence it has to wait
        got = eager.generate(
            PROMPT,
            **{"do_sample": True, "top_k": 0, "max_new_tokens": 60, "eos_token_id": [newline, EOS]},
            custom_generate=fs_generate(seed, grammar=grammar),
        )[0, 2:].tolist()
        assert got[-1] in (newline, EOS)
        assert re.fullmatch("[0-9]{4}", tokenizer.decode(got[:-1]))


def test_greedy_search_is_masked_too(table: TableModel, tokenizer: Any, compiler: GrammarCompiler) -> None:
    grammar = compiler.json_schema(SCHEMAS["object"])
    first, second = (drawn(table, None, grammar, do_sample=False, top_k=None)[0] for _ in range(2))
    assert first == second
    assert valid(tokenizer.decode(first), SCHEMAS["object"])


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3}], ids=["sample", "beams"])
def test_the_logits_processor(model: Any, tokenizer: Any, compiler: GrammarCompiler, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    grammar = compiler.regex("[0-9]{2,4}(-[a-z]{1,9}){2}")
    processor = GrammarLogitsProcessor(grammar, EOS)
    inputs = tokenizer(["The future", "Use this function to"], return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=40, logits_processor=[processor], **options)
    for text in tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True):
        assert re.fullmatch("[0-9]{2,4}(-[a-z]{1,9}){2}", text), text
    with pytest.raises(ValueError, match="serves one call of generate"):
        model.generate(**inputs, max_new_tokens=4, logits_processor=[processor], **options)


def test_a_loop_of_ones_own(table: TableModel, tokenizer: Any, compiler: GrammarCompiler) -> None:
    batch = GrammarBatch([compiler.choices(["yes", "no"]), None], stop_ids=[EOS])
    sampler = fs.Sampler(batch_size=2, seed=7)
    ids = PROMPT.repeat(2, 1)
    while not batch.ended[0]:
        logits = table.table[ids[:, -1] % 64].detach()
        tokens = sampler(logits, bitmask=batch.bitmask(logits)).tokens
        batch.accept(tokens.tolist())
        ids = torch.cat([ids, tokens[:, None]], 1)
    assert tokenizer.decode(ids[0, 2:-1]) in ("yes", "no")
    assert batch.truncated == [False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sentencepiece_tokenizer(spiece: Any, backend: str) -> None:
    size = len(spiece.get_vocab())
    torch.manual_seed(3)
    model = TableModel(torch.randn(7, size)).eval()
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=2)
    compiler = GrammarCompiler(spiece, backend=backend)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 40}
    for pattern in ("(yes|no|é€){1,3}", '\\{"a": [0-9]{1,3}\\}'):
        sample = fs_generate(5, grammar=compiler.regex(pattern))
        out = model.generate(torch.full((4, 1), 9), custom_generate=sample, **options)
        for row in out[:, 1:].tolist():
            assert re.fullmatch(pattern, spiece.decode([i for i in row if i != 2]))


# Batches --------------------------------------------------------------------------------------------------------------


def test_a_refused_token_moves_no_row(tokenizer: Any) -> None:
    a, b = tokenizer("a")["input_ids"][0], tokenizer("b")["input_ids"][0]
    for backend in BACKENDS:
        grammar = GrammarCompiler(tokenizer, backend=backend).regex("a{3}")
        batch = GrammarBatch([grammar, None, grammar, grammar], [EOS])
        before = batch.bitmask(torch.zeros(4, V)).clone()
        for tokens in ([a, 5, a, b], [a, 5, EOS, a], [a, 5, a, PAD], [a, 5, a, V + 7], [a, 5, a, -1]):
            with pytest.raises(
                GrammarError, match=r"token -?[0-9]+ \(row [23]\): the grammar does not allow"
            ) as caught:
                batch.accept(tokens)
            assert caught.value.row in (2, 3)
            assert torch.equal(batch.bitmask(torch.zeros(4, V)), before)
        for tokens in ([a, 5, a, 1.5], [a, 5, a, "a"], [a, 5, a, [a, a]]):
            with pytest.raises(TypeError, match=r"tokens \(row 3\): expected an int or None"):
                batch.accept(tokens)
        with pytest.raises(ValueError, match="expected 4"):
            batch.accept([a, 5])
        assert torch.equal(batch.bitmask(torch.zeros(4, V)), before)
        for _ in range(3):
            batch.accept([a, 5, a, a])
        batch.accept([EOS, 5, None, EOS])
        assert (batch.ended, batch.truncated) == ([True, False, True, True], [False] * 4)


def test_tokens_come_as_anything_that_holds_integers(tokenizer: Any, compiler: GrammarCompiler) -> None:
    (a,) = tokenizer("a")["input_ids"]
    given = (
        [a, a],
        (np.int64(a), a),
        np.array([a, a]),
        torch.tensor([a, a]),
        torch.tensor([[a], [a]]),
        [torch.tensor(a), a],
    )
    for tokens in given:
        batch = GrammarBatch([compiler.regex("ab"), None], [EOS])
        batch.accept(tokens)
        assert batch.text(0) == b"a"


def test_rows_without_any_grammar(table: TableModel, tokenizer: Any) -> None:
    batch = GrammarBatch([None, None], [EOS])
    assert (batch.bitmask(torch.zeros(2, V)) == -1).all()
    batch.accept([5, None])
    assert (batch.truncated, batch.padding) == ([False, False], None)
    assert drawn(table, [3], [None]) == drawn(table, [3], None)


def test_a_token_that_strays_ends_its_sequence_and_frees_nothing(tokenizer: Any, compiler: GrammarCompiler) -> None:
    batch = GrammarBatch([compiler.regex("a+"), compiler.regex("a+")], [EOS])
    a, b = tokenizer("a")["input_ids"][0], tokenizer("b")["input_ids"][0]
    batch.accept([a, b], strict=False)
    assert (batch.strayed, batch.truncated) == ([False, True], [False, True])
    batch.bitmask(torch.zeros(2, V))
    assert batch.allowed(1) == [EOS]
    batch.accept([a, a], strict=False)
    batch.accept([EOS, EOS])
    assert (batch.ended, batch.truncated) == ([True, True], [False, True])


@pytest.mark.parametrize("kind", ["json_schema", "regex", "choices"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grammars_and_compilers_are_pickled_and_copied(tokenizer: Any, backend: str, kind: str) -> None:
    source, text = {
        "json_schema": ({"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "[true]"),
        "regex": ("a[0-9]", "a1"),
        "choices": (["yes", "no"], "no"),
    }[kind]
    compiler = pickle.loads(pickle.dumps(GrammarCompiler(tokenizer, backend=backend)))
    grammar = getattr(compiler, kind)(source)
    for copied in (pickle.loads(pickle.dumps(grammar)), copy.deepcopy(grammar), copy.copy(grammar)):
        assert copied.backend == backend
        assert copied.is_complete(tokenizer(text)["input_ids"])
        assert not copied.is_complete(tokenizer("x")["input_ids"])
        assert copied.vocabulary == grammar.vocabulary
        GrammarBatch([copied, grammar])
    assert getattr(copy.deepcopy(compiler), kind)(source).backend == backend
    many = [getattr(compiler, kind)(source) for _ in range(20)]
    assert len(pickle.dumps(many)) < 2 * len(pickle.dumps(grammar)) < 12 * V  # the vocabulary once, and small


def test_a_grammar_in_another_process(compiler: GrammarCompiler, tokenizer: Any) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        grammar = compiler.regex("[a-z]+")
        assert pool.apply(grammar.is_complete, (tokenizer("abc")["input_ids"],))


def test_tokenizers_of_other_kinds(tokenizer: Any) -> None:
    raw = tokenizers.Tokenizer.from_file(f"{shipped_model()}/tokenizer.json")
    assert Vocabulary(raw).tokens == Vocabulary(tokenizer).tokens
    assert GrammarCompiler(raw).regex("abc").is_complete(raw.encode("abc").ids)
    for given, message in (
        (None, "got NoneType"),
        (3, "got int"),
        ("gpt2", r"AutoTokenizer.from_pretrained\('gpt2'\)"),
    ):
        with pytest.raises(TypeError, match=f"tokenizer: expected a tokenizer.*{message}"):
            GrammarCompiler(given)


def test_what_is_no_grammar_says_how_to_make_one(compiler: GrammarCompiler) -> None:
    for given, message in (
        ("yes|no", r"got str 'yes\|no': make one by compiler\.regex\('yes\|no'\)"),
        (compiler, r"got GrammarCompiler itself: make one by its json_schema"),
        ({"type": "null"}, r"got dict .*compiler\.json_schema"),
        ([compiler], r"grammar \(row 0\): expected a Grammar or None, got GrammarCompiler"),
        (["a"], r"grammar \(row 0\): .*compiler\.regex\('a'\)"),
    ):
        for make in (GrammarBatch, lambda grammar: GrammarLogitsProcessor(grammar, EOS)):
            with pytest.raises(TypeError, match=message):
                make(given)
    with pytest.raises(TypeError, match="give \\[grammar\\]"):
        GrammarBatch(compiler.regex("a"))


def test_an_engine_that_gives_up_is_an_error_everywhere(compiler: GrammarCompiler, tokenizer: Any) -> None:
    (a,) = tokenizer("a")["input_ids"]
    grammar = compiler.regex("a+")
    spent = llguidance.LLMatcher(
        _engine("llguidance", compiler._vocabulary)._tokenizer, "start: %nonsense", log_level=0
    )
    assert spent.is_error()
    grammar._start = lambda: _LLMatcher(spent)
    with pytest.raises(RuntimeError, match="llguidance gave up: "):
        grammar.is_complete([a])
    with pytest.raises(GrammarError, match=r"grammar \(row 0\): llguidance gave up: "):
        GrammarBatch([grammar], [EOS])
    batch = GrammarBatch([compiler.regex("a+")], [EOS])
    batch._matchers = [_LLMatcher(spent)]
    for step in (
        lambda: batch.accept([a]),
        lambda: batch.accept([a], strict=False),
        lambda: batch.bitmask(torch.zeros(1, V)),
    ):
        with pytest.raises(GrammarError, match=r"grammar \(row 0\): llguidance gave up: "):
            step()


def test_the_logits_processor_keeps_its_grammar_or_says_why_not(tokenizer: Any, compiler: GrammarCompiler) -> None:
    a, b = tokenizer("a")["input_ids"][0], tokenizer("b")["input_ids"][0]
    processor = GrammarLogitsProcessor(compiler.regex("a{3}"), EOS)
    scores = torch.zeros(2, V)
    processor(torch.tensor([[9], [9]]), scores)
    left = processor(torch.tensor([[9, a], [9, b]]), scores)  # the second is a beam that cannot be
    assert (left[0] > -torch.inf).nonzero().flatten().tolist() != []
    assert (left[1] > -torch.inf).nonzero().flatten().tolist() == [EOS]
    with pytest.raises(GrammarError, match="every sequence has left its grammar"):
        processor(torch.tensor([[9, a, b], [9, b, a]]), scores)
    processor = GrammarLogitsProcessor([None, compiler.choices(["a"])], np.int64(EOS))
    scores[1] = -torch.inf
    scores[1, b] = 0.0
    with pytest.raises(
        GrammarError, match=r"grammar \(row 1\): the processors before it forbid every token.*\("
    ) as caught:
        processor(torch.tensor([[9], [9]]), scores)
    assert caught.value.row == 1


# Errors ---------------------------------------------------------------------------------------------------------------


def test_bad_sources_name_what_is_wrong(compiler: GrammarCompiler, tokenizer: Any) -> None:
    for call, kind, source, message in (
        (
            compiler.regex,
            ValueError,
            "(a|b",
            r"regex \(a\|b: not a pattern: missing \)",
        ),
        (compiler.regex, ValueError, r"\bfoo", "regex .*a word boundary"),
        (compiler.regex, TypeError, 3, "regex: expected a str, got int"),
        (compiler.choices, ValueError, [], "choices: expected at least one"),
        (compiler.choices, ValueError, ["a", ""], "none empty"),
        (compiler.choices, TypeError, "a,b", "choices: expected a sequence of str"),
        (compiler.json_schema, ValueError, "{", "json_schema: not JSON: .*line 1"),
        (compiler.json_schema, TypeError, [1], "json_schema: expected a JSON Schema"),
        (
            compiler.json_schema,
            ValueError,
            {"properties": {"a": {"type": "strng"}}},
            r"at \$\.properties\.a\.type: 'strng'",
        ),
        (
            compiler.json_schema,
            ValueError,
            {"type": "integer", "minimum": 5, "maximum": 3},
            "no number is within its bounds",
        ),
        (compiler.json_schema, ValueError, {"type": "array", "uniqueItems": True}, "uniqueItems"),
        (compiler.json_schema, ValueError, {"$ref": "#/nope"}, "nope"),
        (compiler.json_schema, ValueError, False, "json_schema false: "),
    ):
        with pytest.raises(kind, match=message):
            call(source)
    with pytest.raises(ValueError, match="backend = 'none': expected 'auto', 'llguidance'"):
        GrammarCompiler(tokenizer, backend="none")


def test_a_pydantic_model_and_a_text_are_schemas_too(compiler: GrammarCompiler, tokenizer: Any) -> None:
    import pydantic

    class Point(pydantic.BaseModel):
        x: int

    for source in (Point, json.dumps(Point.model_json_schema()), True):
        assert compiler.json_schema(source).is_complete(tokenizer('{"x": 3}')["input_ids"])


def test_bad_batches_name_what_is_wrong(
    table: TableModel, compiler: GrammarCompiler, tokenizer: Any, spiece: Any
) -> None:
    grammar = compiler.choices(["yes"])
    with pytest.raises(ValueError, match=r"grammar: expected one or 2 \(one per sequence\), got 3"):
        drawn(table, 1, [grammar] * 3, 2)
    with pytest.raises(TypeError, match=r"grammar \(row 1\): expected a Grammar or None, got str"):
        GrammarBatch([grammar, "yes"])
    with pytest.raises(ValueError, match="at least one"):
        GrammarBatch([])
    with pytest.raises(ValueError, match="one tokenizer"):
        GrammarBatch([grammar, GrammarCompiler(spiece).choices(["yes"])])
    batch = GrammarBatch([grammar], [EOS])
    with pytest.raises(ValueError, match=r"token 9 \(row 0\): the grammar does not allow"):
        batch.accept([9])
    with pytest.raises(ValueError, match="expected 1 rows"):
        batch.bitmask(torch.zeros(2, V))
    with pytest.raises(ValueError, match="expected 1 "):
        batch.accept([9, 9])
    with pytest.raises(ValueError, match="eos_token_id"):
        GrammarLogitsProcessor(grammar, [])


def test_a_text_that_no_token_continues(tokenizer: Any, compiler: GrammarCompiler) -> None:
    batch = GrammarBatch([compiler.regex("a\n")], stop_ids=tokenizer("\n")["input_ids"])
    batch.accept(tokenizer("a")["input_ids"])
    with pytest.raises(ValueError, match=r"grammar \(row 0\): no token of the vocabulary continues"):
        batch.bitmask(torch.zeros(1, V))


def test_a_processor_that_forbids_all_that_the_grammar_allows(table: TableModel, compiler: GrammarCompiler) -> None:
    with pytest.raises(ValueError, match="row 0 has no logit above -inf"):
        drawn(table, 1, compiler.choices(["a"]), min_new_tokens=9)


@pytest.mark.parametrize("missing", BACKENDS)
def test_engines_that_are_not_installed(tokenizer: Any, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = missing.replace("-", "_")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{missing} .*pip install '\.\[grammar\]'"):
        GrammarCompiler(tokenizer, backend=missing)
    assert GrammarCompiler(tokenizer).regex("a").backend == next(name for name in BACKENDS if name != missing)


def test_no_engine_is_installed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BACKENDS:
        monkeypatch.setitem(sys.modules, name.replace("-", "_"), None)
    with pytest.raises(ImportError, match=r"llguidance .*or xgrammar .*or outlines-core "):
        GrammarCompiler(tokenizer)


def test_jsonschema_is_not_installed(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ImportError, match="needs jsonschema"):
        compiler.json_schema({})
