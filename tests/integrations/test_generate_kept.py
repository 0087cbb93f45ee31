"""What fs_generate reports of every step: kept sets, their mass, the entropy and log-probabilities, in any loop.

All of it is computed here a second time: from the logits of one run of the model over the finished sequences, or from
the scores that transformers' own processors make, with softmax in float64.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import fields
from typing import Any

import pytest
import torch
from conformance import ulps
from table_model import TableModel
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

import fastsample as fs
from fastsample.integrations.transformers import (
    Reported,
    SampledDecoderOnlyOutput,
    SampledEncoderDecoderOutput,
    fs_generate,
)
from fastsample.integrations.transformers.batching import continuous_batching, generate_batch
from fastsample.training import kept_logprobs

V, PAD, EOS = 120, 1, 2
IDS = torch.tensor([[5, 9, 7, 30, 9, 11], [PAD, PAD, 40, 41, 42, 40], [PAD, 8, 3, 17, 100, 3]])
PADDED = {"input_ids": IDS, "attention_mask": (IDS != PAD).long()}
KEEP: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": PAD}
ASKED: dict[str, Any] = {"kept_mass": True, "entropy": True, "logprobs": "processed"}
FILTERS: dict[str, Any] = {"temperature": 0.8, "top_k": 30, "top_p": 0.8}


@pytest.fixture(scope="module")
def table() -> TableModel:
    torch.manual_seed(1)
    model = TableModel(2 * torch.randn(V, V)).eval()
    model.generation_config = GenerationConfig(pad_token_id=PAD)
    return model


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False}
    config = GPT2Config(vocab_size=V, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD, **sizes)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 20  # logits of some spread
    return model


@pytest.fixture(scope="module")
def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=V, decoder_start_token_id=0, eos_token_id=EOS, **sizes)
    return T5ForConditionalGeneration(config).eval()


def generate(model: Any, seed: Any = 7, kept: str = "ids", given: dict[str, Any] | None = None, **options: Any) -> Any:
    """What `generate` returns, with everything asked for."""
    asked = {"kept": kept, **ASKED, **(given or {})}
    common = {**PADDED, "do_sample": True, "max_new_tokens": 10, **FILTERS, **KEEP}
    return model.generate(**common | options, custom_generate=fs_generate(seed, **asked))


def prompt_length(out: Any) -> int:
    return out.sequences.shape[1] - len(out.logits)  # type: ignore[no-any-return]


def past_the_end(out: Any, eos: int | None) -> torch.Tensor:
    """Whether a position lies after the sequence's end, bool [B, T]."""
    new = out.sequences[:, prompt_length(out) :]
    ended = (new == eos).cumsum(1) if eos is not None else torch.zeros_like(new)
    return torch.nn.functional.pad(ended, (1, 0))[:, :-1] > 0


def forward(model: Any, out: Any) -> torch.Tensor:
    """The model's logits for every new token [B, T, V], from one run over the whole sequences."""
    start, ids = prompt_length(out), out.sequences
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(**PADDED, decoder_input_ids=ids).logits[:, start - 1 : -1]  # type: ignore[no-any-return]
        mask = torch.cat([PADDED["attention_mask"], torch.ones_like(ids[:, start:])], 1)
        mask = mask if len(mask) == len(ids) else None
        position = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        more = {} if isinstance(model, TableModel) else {"position_ids": position}
        return model(input_ids=ids, attention_mask=mask, **more).logits[:, start - 1 : -1]  # type: ignore[no-any-return]


def sets(out: Any) -> torch.Tensor:
    """The kept sets that a result reports, bool [B, T, V]."""
    batch, steps = out.kept_count.shape
    if out.kept_bitmask is not None:
        bits = (out.kept_bitmask[..., None] >> torch.arange(32)) & 1
        assert not bits.flatten(2)[:, :, V:].any()
        return bits.flatten(2)[:, :, :V].bool()
    found = torch.zeros(batch * steps, V, dtype=torch.bool)
    for row, (start, end) in enumerate(zip(out.kept_row_ptr, out.kept_row_ptr[1:], strict=False)):
        ids = out.kept_ids[start:end]
        assert (ids.diff() > 0).all()
        found[row, ids.long()] = True
    return found.view(batch, steps, V)


def check(out: Any, scores: torch.Tensor, filtered: torch.Tensor, past: torch.Tensor) -> None:
    """A result against the scores [B, T, V] before and after the filters.

    Tolerances: the masses that the numbers are made of differ from float64's softmax by 1e-7, each, and the result is
    rounded to float32; 1e-5 is far above both and far below what another token in a set would make.
    """
    new = out.sequences[:, prompt_length(out) :]
    kept = filtered > -torch.inf
    want = kept & ~past[:, :, None]
    assert torch.equal(sets(out), want)
    assert out.kept_count.dtype == torch.int32
    assert torch.equal(out.kept_count.long(), want.sum(-1))
    law = filtered.double().log_softmax(-1)
    mass = torch.where(kept, scores.double().softmax(-1), 0.0).sum(-1).log()
    surprise = torch.where(kept, -law.exp() * law, 0.0).sum(-1)
    of_tokens = law.gather(2, new[:, :, None])[:, :, 0]
    for name, expected in (("log_kept_mass", mass), ("entropy", surprise), ("logprobs", of_tokens)):
        found = getattr(out, name)
        assert found.dtype == torch.float32
        assert torch.equal(found.isnan(), past)
        torch.testing.assert_close(found[~past].double(), expected[~past], rtol=1e-5, atol=1e-6, msg=name)


# Against one run over the whole sequence ------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["ids", "bitmask"])
@pytest.mark.parametrize("name", ["table", "gpt2", "t5"])
def test_sampling(name: str, kept: str, request: pytest.FixtureRequest) -> None:
    model, eos = request.getfixturevalue(name), EOS
    if name == "table":
        eos = int(generate(model).sequences[1, 9])
    out = generate(model, kept=kept, eos_token_id=eos, max_new_tokens=20)
    past = past_the_end(out, eos)
    logits = torch.stack(out.logits, 1)
    # Near, and for the table equal; a set's edge is sharper than what two runs of a model agree on.
    torch.testing.assert_close(forward(model, out)[~past], logits[~past], rtol=1e-4, atol=1e-4)
    filtered = fs.filter_logits(logits, **FILTERS, ties="all", backend="reference")
    check(out, logits / FILTERS["temperature"], filtered, past)
    assert past.any() or name != "table"
    assert out.kept_count.unique().numel() > 1


def test_greedy_search_keeps_one_token(gpt2: GPT2LMHeadModel) -> None:
    for kept in ("ids", "bitmask"):
        out = generate(gpt2, None, kept, do_sample=False, top_k=None, temperature=None, top_p=None)
        assert torch.equal(out.sequences, gpt2.generate(**PADDED, max_new_tokens=10, pad_token_id=PAD))
        past = past_the_end(out, EOS)
        assert torch.equal(sets(out), torch.nn.functional.one_hot(out.sequences[:, 6:], V).bool() & ~past[:, :, None])
        assert torch.equal(out.kept_count == 1, ~past)
        for name in ("log_kept_mass", "entropy", "logprobs"):
            found = getattr(out, name)
            assert not found[~past].any()
            assert found[past].isnan().all()


def test_count_alone(table: TableModel) -> None:
    whole = generate(table)
    out = table.generate(
        **PADDED, **FILTERS, **KEEP, do_sample=True, max_new_tokens=10, custom_generate=fs_generate(7, kept="count")
    )
    assert torch.equal(out.kept_count, whole.kept_count)
    assert {name for name in out if name in {f.name for f in fields(Reported)}} == {"kept_count"}


def test_without_a_filter_a_set_is_the_vocabulary(table: TableModel) -> None:
    out = generate(table, top_k=0, top_p=1.0)
    assert (out.kept_count == V).all()
    assert torch.equal(out.kept_ids.view(-1, V), torch.arange(V, dtype=torch.int32).expand(30, V))
    assert not out.log_kept_mass.any()


def test_what_transformers_lacks(table: TableModel) -> None:
    """Fields per sequence, of filters, penalties and XTC, each step with the text so far."""
    given = {"top_n_sigma": [0.8, 0.0, 1.5], "presence_penalty": 1.5, "xtc_probability": [0.0, 0.5, 1.0]}
    out = generate(table, given=given, top_p=1.0, top_k=0)
    logits = torch.stack(out.logits, 1)
    found = [
        fs.filter_logits(
            logits[:, step],
            **given,
            temperature=0.8,
            ties="all",
            prompt_ids=PADDED["input_ids"],
            output_ids=out.sequences[:, 6 : 6 + step],
            backend="reference",
        )
        for step in range(10)
    ]
    want = torch.stack(found, 1) > -torch.inf
    assert torch.equal(sets(out), want)
    assert (want.sum(-1).amin(1) < V).tolist() == [True, False, True]


# Against transformers' processors -------------------------------------------------------------------------------------


OPTIONS: dict[str, dict[str, Any]] = {
    "fused": {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4},
    "typical": {"typical_p": 0.8, "temperature": 0.9},
    "masks": {"bad_words_ids": [[4], [9, 7]], "suppress_tokens": list(range(20, 60)), "no_repeat_ngram_size": 2},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(row, V, 3))},
    "before": {"top_h": 0.5, "temperature": 0.9, "top_p": 0.9},
    "guided": {"guidance_scale": 1.5, "top_p": 0.7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sets_are_what_transformers_would_keep(gpt2: GPT2LMHeadModel, options: dict[str, Any]) -> None:
    def give_back(model: Any, input_ids: Any, logits_processor: Any, **_: Any) -> LogitsProcessorList:
        return logits_processor  # type: ignore[no-any-return]

    common: dict[str, Any] = {**PADDED, "do_sample": True, "max_new_tokens": 6, **KEEP, "output_scores": True}
    out = gpt2.generate(**common, **options, custom_generate=fs_generate(7, kept="ids", logprobs="processed"))
    past = past_the_end(out, EOS)
    if "guidance_scale" in options:  # which runs the model, and keeps a cache of its own
        want = torch.stack(out.scores, 1)
    else:
        processors = gpt2.generate(**common, **options, custom_generate=give_back)
        steps = (processors(out.sequences[:, : 6 + t], logits.clone()) for t, logits in enumerate(out.logits))
        want = torch.stack(list(steps), 1)
    assert torch.equal(sets(out), (want > -torch.inf) & ~past[:, :, None])
    tokens = out.sequences[:, 6:, None]
    expected = want.double().log_softmax(-1).gather(2, tokens)[:, :, 0]
    torch.testing.assert_close(out.logprobs[~past].double(), expected[~past], rtol=1e-5, atol=1e-6)


# Every loop -----------------------------------------------------------------------------------------------------------


REPORTS = ("sequences", "kept_count", "kept_ids", "kept_row_ptr", "log_kept_mass", "entropy", "logprobs")


def assert_same(a: Any, b: Any, near: bool = False) -> None:
    for name in REPORTS:
        x, y = getattr(a, name), getattr(b, name)
        if near and x.is_floating_point():
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            assert torch.equal(x.nan_to_num(9.0) if x.is_floating_point() else x, y.nan_to_num(9.0)), name


DRAFTERS: dict[str, Any] = {
    "lookup": {"prompt_lookup_num_tokens": 4},
    "assistant": {"assistant_model": "itself"},
}


@pytest.mark.parametrize("draft", DRAFTERS.values(), ids=DRAFTERS)
@pytest.mark.parametrize("kept", ["ids", "bitmask"])
def test_drafts(gpt2: GPT2LMHeadModel, kept: str, draft: dict[str, Any]) -> None:
    """One entry for each token of the text, none for a draft that was wrong."""
    draft = {name: gpt2 if value == "itself" else value for name, value in draft.items()}
    one = {"input_ids": IDS[:1].repeat(1, 2), "attention_mask": None, "max_new_tokens": 24, "eos_token_id": None}
    plain, drafted = generate(gpt2, kept=kept, **one), generate(gpt2, kept=kept, **one, **draft)
    assert torch.equal(drafted.sequences, plain.sequences)
    assert torch.equal(sets(drafted), sets(plain))
    assert drafted.kept_count.shape == (1, 24)
    for name in ("log_kept_mass", "entropy", "logprobs"):  # of rows that may differ in their last bits
        torch.testing.assert_close(getattr(drafted, name), getattr(plain, name), rtol=1e-4, atol=1e-4)


def test_a_draft_beyond_the_end(gpt2: GPT2LMHeadModel) -> None:
    one = {"input_ids": IDS[:1], "attention_mask": None, "max_new_tokens": 24}
    free = generate(gpt2, **one, eos_token_id=None)
    eos = int(free.sequences[0, 6 + 7])
    plain = generate(gpt2, **one, eos_token_id=eos)
    drafted = generate(gpt2, **one, eos_token_id=eos, assistant_model=gpt2)
    assert_same(drafted, plain, near=True)
    assert drafted.kept_count.shape[1] == drafted.sequences.shape[1] - 6 <= 8


def test_a_static_cache() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=64, **sizes)).eval()
    with torch.no_grad():
        model.lm_head.weight *= 20
    options: dict[str, Any] = {"eos_token_id": None}
    assert_same(generate(model, **options, cache_implementation="static"), generate(model, **options), near=True)


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        self.tokens.append([])


def test_a_streamer(table: TableModel) -> None:
    streamer = Collect()
    out = generate(table, given={"streamer": streamer})
    assert_same(out, generate(table))
    assert streamer.tokens[1:] == [*out.sequences[:, 6:].T.tolist(), []]


def test_several_sequences_of_a_prompt(table: TableModel) -> None:
    """Each has the sets of its own logits; at a high temperature all differ, and the same call gives the same."""
    options: dict[str, Any] = {"num_return_sequences": 3, "temperature": 5.0, "top_k": 0, "top_p": 0.9}
    two = {name: value[:2] for name, value in PADDED.items()}
    out = generate(table, **options, **two)
    assert out.kept_count.shape == (6, 10)
    assert len({tuple(row) for row in out.sequences[:, 6:].tolist()}) == 6
    assert_same(generate(table, **options, **two), out)
    logits = torch.stack(out.logits, 1)
    filtered = fs.filter_logits(logits, temperature=5.0, top_p=0.9, ties="all", backend="reference")
    check(out, logits / 5.0, filtered, torch.zeros(6, 10, dtype=torch.bool))


def test_a_sequence_that_can_have_no_token(table: TableModel) -> None:
    broken = TableModel(table.table.detach().clone())
    start = generate(table).sequences
    with torch.no_grad():
        broken.table[start[1, 8]] = torch.nan  # what its third new token leads to
    out = generate(broken, given={"on_invalid": "flag"})
    assert out.status.tolist()[1] == 1
    ended = out.logprobs.isnan()
    assert ended[1].tolist() == [False] * 3 + [True] * 7
    assert torch.equal(out.kept_count == 0, ended)
    assert torch.equal(out.entropy.isnan(), ended)
    assert torch.equal(sets(out).any(-1), ~ended)


# The result -----------------------------------------------------------------------------------------------------------


def test_the_order_is_that_of_a_trainer(table: TableModel) -> None:
    """Rows of the model's logits, masked by the lists, give the log-probabilities of the tokens."""
    out = generate(table, eos_token_id=int(generate(table).sequences[1, 9]))
    whole = table(out.sequences).logits[:, 5:-1]
    logits, past = whole.flatten(0, 1) / FILTERS["temperature"], out.kept_count.flatten() == 0
    tokens = out.sequences[:, 6:].masked_fill(out.kept_count == 0, -1)
    now = kept_logprobs(whole, tokens, (out.kept_ids, out.kept_row_ptr), FILTERS["temperature"])
    assert past.any()
    assert ulps(now.detach().flatten()[~past], out.logprobs.flatten()[~past]) <= 2
    logits, tokens = logits[~past], tokens.flatten()[~past]
    kept = torch.full_like(logits, -torch.inf)
    rows = torch.arange(len(logits)).repeat_interleave(out.kept_count.flatten()[~past])
    kept = kept.index_put((rows, out.kept_ids.long()), logits[rows, out.kept_ids.long()])
    found = kept.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found, out.logprobs.flatten()[~past], rtol=1e-5, atol=1e-6)
    with_all = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found + out.log_kept_mass.flatten()[~past], with_all, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_it_is_an_output_of_transformers(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    out = generate(model)
    base, kind = {
        "gpt2": (GenerateDecoderOnlyOutput, SampledDecoderOnlyOutput),
        "t5": (GenerateEncoderDecoderOutput, SampledEncoderDecoderOutput),
    }[name]
    assert type(out) is kind
    assert isinstance(out, base)
    assert isinstance(out, Reported)
    assert out["kept_ids"] is out.kept_ids
    assert out[0] is out.sequences
    assert "kept_bitmask" not in out
    assert out.kept_bitmask is None
    assert any(value is out.entropy for value in out.to_tuple())
    own = base(**{field.name: getattr(out, field.name) for field in fields(base)})
    assert list(out)[: len(own)] == list(own)
    small = kind(sequences=out.sequences, kept_ids=out.kept_ids, errors=[None])
    assert torch.equal(pickle.loads(pickle.dumps(small)).kept_ids, out.kept_ids)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).errors == [None]


def test_what_is_not_asked_for_is_not_there(gpt2: GPT2LMHeadModel) -> None:
    out = gpt2.generate(**PADDED, **KEEP, do_sample=True, max_new_tokens=2, custom_generate=fs_generate(7))
    assert type(out) is GenerateDecoderOnlyOutput


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("kept", "ids"), ("kept_mass", True), ("entropy", True)])
def test_the_ids_alone_have_no_room(table: TableModel, name: str, value: Any) -> None:
    sample = fs_generate(7, **{name: value})
    with pytest.raises(ValueError, match=rf"fs_generate\({name}={value!r}\).*return_dict_in_generate=True"):
        table.generate(**PADDED, do_sample=True, max_new_tokens=2, custom_generate=sample)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"kept": "list"}, "kept = 'list': expected None, 'count', 'ids' or 'bitmask'"),
    ({"kept": True}, "kept = True: expected"),
    ({"kept_mass": 1}, "kept_mass = 1: expected True or False"),
    ({"entropy": "yes"}, "entropy = 'yes': expected True or False"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=str)
def test_bad_values_are_refused_when_given(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fs_generate(**given)


def test_continuous_batches_have_no_place_for_them() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes)).eval()
    config = GenerationConfig(do_sample=True, max_new_tokens=2)
    with pytest.raises(ValueError, match="kept: not served in continuous batches, whose results are ids alone"):
        generate_batch(model, [[3, 4]], config, requests=[{"kept": "ids"}])
    with pytest.raises(TypeError, match="kept_mass"), continuous_batching(model, config, kept_mass=True):  # type: ignore[call-arg]
        pass
