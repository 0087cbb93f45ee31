"""The drop-in for Hugging Face transformers, against transformers' own `generate`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from table_model import TableModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    TopKLogitsWarper,
    WatermarkingConfig,
    pipeline,
)
from transformers.generation import logits_process
from transformers.generation.streamers import BaseStreamer

import fastsample as fs
from fastsample.cli.model import shipped_model
from fastsample.integrations.transformers import FastSampleLogitsProcessor, assisted, fs_generate, loop

V = 120
PAD = 1
EOS = 2


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        tie_word_embeddings=False,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
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


def padded_batch() -> dict[str, torch.Tensor]:
    """Three prompts, of which two are padded on the left."""
    ids = torch.tensor([[5, 9, 7, 30, 9, 11], [PAD, PAD, 40, 41, 42, 40], [PAD, 8, 3, 17, 100, 3]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def prepared(model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> LogitsProcessorList:
    """The processors that `generate` itself would sample with."""

    def give_back(model: Any, input_ids: Any, logits_processor: Any, **_: Any) -> LogitsProcessorList:
        return logits_processor

    return model.generate(**inputs, do_sample=True, custom_generate=give_back, **({"max_new_tokens": 2} | options))


def drawn(model: Any, inputs: dict[str, torch.Tensor], seed: Any = 7, **options: Any) -> torch.Tensor:
    """The generated part of what the drop-in samples, int64 [B, steps]."""
    given = options.pop("given", {})
    tokens = model.generate(**inputs, do_sample=True, custom_generate=fs_generate(seed=seed, **given), **options)
    return tokens[:, inputs["input_ids"].shape[1] :]


# The logits processor -------------------------------------------------------------------------------------------------


WARPERS = [
    {"temperature": 0.7},
    {"top_k": 20},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9},
    {"temperature": 0.6, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
]


@pytest.mark.parametrize("fields", WARPERS, ids=lambda f: "-".join(f))
def test_processor_gives_the_values_of_the_warpers(table: TableModel, fields: dict[str, Any]) -> None:
    torch.manual_seed(2)
    scores = 3 * torch.randn(64, 1000)
    inputs = {"input_ids": torch.tensor([[3]])}
    warpers = prepared(table, inputs, {"top_k": 0} | fields)
    assert len(warpers) == len(fields)
    before = scores.clone()
    got = FastSampleLogitsProcessor(**fields)(inputs["input_ids"], scores)
    assert torch.equal(got, warpers(inputs["input_ids"], scores.clone()))
    assert torch.equal(scores, before)


def test_processor_keeps_ties_of_the_kth() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    got = FastSampleLogitsProcessor(top_k=2)(torch.tensor([[0]]), scores)
    assert torch.equal(got, TopKLogitsWarper(2)(torch.tensor([[0]]), scores.clone()))
    assert (got > -torch.inf).sum() == 3


def test_processor_takes_two_arguments() -> None:
    assert len(inspect.signature(FastSampleLogitsProcessor().__call__).parameters) == 2


@pytest.mark.parametrize("fields", WARPERS, ids=lambda f: "-".join(f))
def test_processor_in_generate_samples_as_the_warpers_do(gpt2: GPT2LMHeadModel, fields: dict[str, Any]) -> None:
    common: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8} | padded_batch()
    torch.manual_seed(3)
    expected = gpt2.generate(**common, **({"top_k": 0} | fields))
    torch.manual_seed(3)
    processors = LogitsProcessorList([FastSampleLogitsProcessor(**fields)])
    assert torch.equal(gpt2.generate(**common, top_k=0, logits_processor=processors), expected)


def test_processor_refuses_bad_values_at_once_and_nan_when_called() -> None:
    with pytest.raises(ValueError, match=r"top_p = 1\.5"):
        FastSampleLogitsProcessor(top_p=1.5)
    with pytest.raises(ValueError, match="row 1 has a NaN"):
        FastSampleLogitsProcessor()(torch.zeros(2, 1).long(), torch.tensor([[0.0, 1.0], [0.0, torch.nan]]))


# What the drop-in samples from ----------------------------------------------------------------------------------------


class AddRamp(LogitsProcessor):
    """A user's processor, which does not commute with a penalty; it keeps what it returned."""

    def __init__(self) -> None:
        self.returned: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        result = scores + torch.linspace(0, 2, scores.shape[1])
        self.returned.append((result, result.clone()))
        return result


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "nothing": {"top_k": 0},
    "all fused": {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4},
    "repetition_penalty": {"repetition_penalty": 1.7, "top_k": 0},
    "top_p=0": {"top_p": 0.0},
    "cold": {"temperature": 5e-6, "top_k": 0},
    "typical_p": {"typical_p": 0.8, "temperature": 0.9},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02, "top_p": 0.95},
    "eta_cutoff": {"eta_cutoff": 0.05},
    "top_h": {"top_h": 0.5, "temperature": 0.9, "top_p": 0.9},
    "renormalize_logits": {"renormalize_logits": True, "temperature": 0.7},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash"), "top_p": 0.9},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.4},
    "bad_words_ids": {"bad_words_ids": [[4], [9, 7]], "repetition_penalty": 1.4},
    "min_new_tokens": {"min_new_tokens": 3},
    "suppress_tokens": {"suppress_tokens": list(range(20, 60)), "repetition_penalty": 0.8},
    "sequence_bias": {"sequence_bias": [[[9], 4.0], [[7], -4.0]], "repetition_penalty": 1.3},
    "forced_eos_token_id": {"forced_eos_token_id": EOS},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5)},
    "own processor": {"logits_processor": [AddRamp()], "repetition_penalty": 1.9, "temperature": 0.9},
    "own warper": {"logits_processor": [TopKLogitsWarper(60)], "temperature": 0.9, "top_k": 20},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scores_are_those_of_transformers(gpt2: GPT2LMHeadModel, options: dict[str, Any]) -> None:
    inputs = padded_batch()
    options = options | {"max_new_tokens": 5}
    keep = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    sample = fs_generate(seed=7)
    out = gpt2.generate(**inputs, do_sample=True, custom_generate=sample, **options, **keep)
    processors = prepared(gpt2, inputs, options)
    prompt = inputs["input_ids"].shape[1]
    assert len(out.scores) == len(out.logits) == out.sequences.shape[1] - prompt > 1
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        expected = processors(out.sequences[:, : prompt + step], logits.clone())
        assert torch.equal(scores, expected), f"step {step}"
        token = out.sequences[:, prompt + step, None]
        running = ~(out.sequences[:, prompt : prompt + step] == EOS).any(1)
        assert (scores.gather(1, token)[running] > -torch.inf).all()


def test_ties_of_the_kth_are_kept(table: TableModel) -> None:
    tied = TableModel(table.table.detach().round())
    inputs = {"input_ids": torch.arange(50)[:, None]}
    options: dict[str, Any] = {"top_k": 3, "max_new_tokens": 1, "pad_token_id": PAD}
    keep = {"return_dict_in_generate": True, "output_scores": True}
    out = tied.generate(**inputs, do_sample=True, custom_generate=fs_generate(seed=1), **options, **keep)
    expected = prepared(tied, inputs, options)(inputs["input_ids"], tied.table[:50].detach())
    assert torch.equal(out.scores[0], expected)
    assert ((expected > -torch.inf).sum(1) > 3).any()


def test_logits_are_not_spoiled(gpt2: GPT2LMHeadModel) -> None:
    inputs = {"input_ids": torch.tensor([[5, 9, 7]])}
    keep = {"return_dict_in_generate": True, "output_logits": True}
    out = gpt2.generate(**inputs, do_sample=True, max_new_tokens=6, custom_generate=fs_generate(seed=7), **keep)
    assert out.scores is None
    with torch.no_grad():
        expected = gpt2(out.sequences).logits[0, 2:-1]
    torch.testing.assert_close(torch.cat(out.logits), expected, rtol=1e-4, atol=1e-4)


def test_tensors_of_other_processors_are_not_written_to(gpt2: GPT2LMHeadModel) -> None:
    own = AddRamp()
    drawn(gpt2, padded_batch(), max_new_tokens=4, logits_processor=[own])
    assert len(own.returned) == 4
    assert all(torch.equal(result, copy) for result, copy in own.returned)


def test_warpers_do_not_run_where_the_step_is_fused(gpt2: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any, input_ids: Any, scores: Any) -> None:
        raise AssertionError(f"{type(self).__name__} ran")

    for name in (
        "RepetitionPenaltyLogitsProcessor",
        *(f"{w}LogitsWarper" for w in ("Temperature", "TopK", "TopP", "MinP")),
    ):
        monkeypatch.setattr(getattr(logits_process, name), "__call__", run)
    assert drawn(gpt2, padded_batch(), max_new_tokens=3, **OPTIONS["all fused"]).shape == (3, 3)
    with pytest.raises(AssertionError, match="RepetitionPenaltyLogitsProcessor ran"):
        drawn(gpt2, padded_batch(), max_new_tokens=3, **OPTIONS["own processor"])


def test_guidance_scale_keeps_working(gpt2: GPT2LMHeadModel) -> None:
    inputs = {"input_ids": torch.tensor([[5, 9, 7]])}
    keep = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 1, "top_k": 0}
    plain, guided = (
        gpt2.generate(**inputs, do_sample=True, custom_generate=fs_generate(seed=7), guidance_scale=g, **keep).scores[0]
        for g in (1.0, 3.0)
    )
    hf = gpt2.generate(**inputs, do_sample=True, guidance_scale=3.0, **keep).scores[0]
    assert torch.equal(guided, hf)
    assert not torch.allclose(plain, guided)


# The draw -------------------------------------------------------------------------------------------------------------


def expected_tokens(table: TableModel, start: int, seed: int, steps: int, **fields: Any) -> list[int]:
    """One sequence by hand: the API's token at offset 0, 1, 2, ..."""
    tokens = [start]
    for step in range(steps):
        logits = table.table[tokens[-1]].detach()
        tokens.append(int(fs.sample(logits, seed=[seed], offset=step, ties="all", **fields).tokens))
    return tokens[1:]


def splitmix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_int_seed_gives_sequence_i_its_own_stream(table: TableModel) -> None:
    fields = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
    got = drawn(table, padded_batch(), seed=7, max_new_tokens=12, **fields)
    for row, start in enumerate((11, 40, 3)):
        assert got[row].tolist() == expected_tokens(table, start, splitmix64(splitmix64(7) + row), 12, **fields)


def test_defaults_are_those_of_generate(table: TableModel) -> None:
    got = drawn(table, {"input_ids": torch.tensor([[3]])}, seed=[5], max_new_tokens=30)
    assert got[0].tolist() == expected_tokens(table, 3, 5, 30, top_k=50)
    assert got[0].tolist() != expected_tokens(table, 3, 5, 30)


def test_a_sequence_keeps_its_tokens_in_any_batch(table: TableModel) -> None:
    batch, seeds = padded_batch(), [11, 2**64 - 1, -5]
    together = drawn(table, batch, seed=seeds, max_new_tokens=10)
    turned = drawn(table, {k: v.flip(0) for k, v in batch.items()}, seed=seeds[::-1], max_new_tokens=10)
    assert torch.equal(turned.flip(0), together)
    for row, mask in enumerate(batch["attention_mask"]):
        alone = {"input_ids": batch["input_ids"][row, mask.bool()][None]}
        assert torch.equal(drawn(table, alone, seed=[seeds[row]], max_new_tokens=10)[0], together[row])


def test_padding_is_not_seen_by_a_given_penalty(table: TableModel) -> None:
    with torch.no_grad():
        loud = TableModel(table.table.clone())
        loud.table[:, PAD] = 12.0  # the padding token would nearly always be drawn
    given = {"repetition_penalty": 30.0}
    batch = {"input_ids": torch.tensor([[PAD, PAD, 5]]), "attention_mask": torch.tensor([[0, 0, 1]])}
    options = {"max_new_tokens": 1, "given": given, "pad_token_id": PAD}
    assert drawn(loud, batch, **options).item() == PAD
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    assert drawn(loud, batch, **options).item() != PAD


def test_num_return_sequences_counts_for_seeds(table: TableModel) -> None:
    batch = padded_batch()
    got = drawn(table, batch, seed=7, max_new_tokens=5, num_return_sequences=2)
    assert got.shape == (6, 5)
    assert got[3].tolist() == expected_tokens(table, 40, splitmix64(splitmix64(7) + 3), 5, top_k=50)
    six = r"seed: expected one value or 6 \(one per sequence\), or 3 \(one per prompt\), got 2"
    with pytest.raises(ValueError, match=six):
        drawn(table, batch, seed=[1, 2], max_new_tokens=5, num_return_sequences=2)


@pytest.mark.parametrize("seeds", [[1], [1, 2], [1, 2, 3, 4], []])
def test_wrong_number_of_seeds(table: TableModel, seeds: list[int]) -> None:
    with pytest.raises(ValueError, match=r"seed.*3"):
        drawn(table, padded_batch(), seed=seeds, max_new_tokens=2)


def test_no_state_is_left_between_calls(table: TableModel) -> None:
    sample = fs_generate(seed=7)
    options = padded_batch() | {"do_sample": True, "max_new_tokens": 6, "custom_generate": sample}
    first = table.generate(**options)
    assert torch.equal(table.generate(**options), first)
    table.generate(**(options | {"input_ids": torch.tensor([[4]]), "attention_mask": torch.tensor([[1]])}))
    assert torch.equal(table.generate(**options), first)


def test_without_a_seed_torch_seeds_each_call(table: TableModel) -> None:
    sample = fs_generate()
    options = padded_batch() | {"do_sample": True, "max_new_tokens": 8, "custom_generate": sample}
    torch.manual_seed(5)
    first, second = table.generate(**options), table.generate(**options)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(table.generate(**options), first)
    assert torch.equal(table.generate(**options), second)


def test_tokens_are_distributed_as_transformers_draws_them(table: TableModel) -> None:
    inputs = {"input_ids": torch.full((6000, 1), 3)}
    options: dict[str, Any] = {"temperature": 0.9, "top_k": 12, "top_p": 0.95, "max_new_tokens": 1}
    ours = drawn(table, inputs, seed=1, **options)[:, 0]
    torch.manual_seed(0)
    theirs = table.generate(**inputs, do_sample=True, **options)[:, 1]
    scores = prepared(table, inputs, options)(inputs["input_ids"][:1], table.table[3:4].detach())
    kept = scores[0] > -torch.inf
    counts = torch.stack([torch.bincount(t, minlength=V) for t in (ours, theirs)])
    assert counts[:, ~kept].sum() == 0
    assert 3 < kept.sum() < 12
    assert chisquare(counts[0, kept], scores[0].double().softmax(-1)[kept] * len(ours)).pvalue > 0.01
    assert chi2_contingency(counts[:, kept]).pvalue > 0.01


# Fields that replace generate's ---------------------------------------------------------------------------------------


def test_fields_per_sequence(table: TableModel) -> None:
    given = {"temperature": [0.0, 0.5, 2.0], "top_k": [0, 3, 0], "top_p": torch.tensor([1.0, 1.0, 0.7])}
    got = drawn(table, padded_batch(), seed=[1, 2, 3], max_new_tokens=10, temperature=0.3, given=given)
    for row, start in enumerate((11, 40, 3)):
        fields = {name: values[row] for name, values in given.items()}
        assert got[row].tolist() == expected_tokens(table, start, row + 1, 10, **fields)
    with pytest.raises(ValueError, match=r"temperature.*3"):
        drawn(table, padded_batch(), max_new_tokens=2, given={"temperature": [1.0, 2.0]})


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_penalties_that_generate_lacks(table: TableModel, name: str) -> None:
    inputs = {"input_ids": torch.tensor([[3, 8]])}
    got = drawn(table, inputs, seed=[9], max_new_tokens=15, top_k=0, given={name: 6.0})[0].tolist()
    tokens: list[int] = []
    for step in range(15):
        logits = table.table[[8, *tokens][-1]].detach()
        out = fs.sample(logits, seed=[9], offset=step, prompt_ids=[3, 8], output_ids=tokens, **{name: 6.0})
        tokens.append(int(out.tokens))
    assert got == tokens
    assert got != drawn(table, inputs, seed=[9], max_new_tokens=15, top_k=0)[0].tolist()


def test_a_given_repetition_penalty_replaces_that_of_generate(gpt2: GPT2LMHeadModel) -> None:
    for do_sample, seed in ((True, 7), (False, None)):
        options = padded_batch() | {"do_sample": do_sample, "max_new_tokens": 8}
        expected = gpt2.generate(**options, repetition_penalty=1.8, custom_generate=fs_generate(seed=seed))
        given = fs_generate(seed=seed, repetition_penalty=1.8)
        assert torch.equal(gpt2.generate(**options, custom_generate=given), expected)
        assert torch.equal(gpt2.generate(**options, repetition_penalty=1.1, custom_generate=given), expected)
        assert not torch.equal(gpt2.generate(**options, custom_generate=fs_generate(seed=seed)), expected)


@pytest.mark.parametrize(
    ("options", "given", "culprit"),
    [
        ({"top_h": 0.8}, {"temperature": 0.5}, "TopHLogitsWarper"),
        ({"renormalize_logits": True}, {"frequency_penalty": 0.5}, "LogitNormalization"),
        ({"repetition_penalty": 1.5, "remove_invalid_values": True}, {"repetition_penalty": 2.0}, "RepetitionPenalty"),
    ],
)
def test_given_fields_never_act_in_the_wrong_place(
    gpt2: GPT2LMHeadModel, options: dict[str, Any], given: dict[str, Any], culprit: str
) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(given))}.*{culprit}"):
        drawn(gpt2, padded_batch(), max_new_tokens=2, given=given, **options)


def test_bad_fields_fail_at_once() -> None:
    with pytest.raises(ValueError, match=r"top_p = 1\.5"):
        fs_generate(top_p=1.5)
    with pytest.raises(TypeError, match="topp"):
        fs_generate(topp=0.5)


# Greedy search --------------------------------------------------------------------------------------------------------


def test_do_sample_false_is_plain_greedy(gpt2: GPT2LMHeadModel) -> None:
    for extra in ({}, {"repetition_penalty": 1.5}):
        options = padded_batch() | {"do_sample": False, "max_new_tokens": 8} | extra
        expected = gpt2.generate(**options)
        assert torch.equal(gpt2.generate(**options, custom_generate=fs_generate()), expected)


@pytest.mark.parametrize("given", [{"seed": 7}, {"offset": 5}, {"offset": "prompt"}], ids=str)
def test_what_greedy_search_ignores_is_said(gpt2: GPT2LMHeadModel, given: dict[str, Any]) -> None:
    options = padded_batch() | {"do_sample": False, "max_new_tokens": 3}
    with pytest.warns(UserWarning, match=rf"fs_generate\({next(iter(given))}=...\): without effect"):
        got = gpt2.generate(**options, custom_generate=fs_generate(**given))
    assert torch.equal(got, gpt2.generate(**options))


def test_greedy_with_a_given_penalty(table: TableModel) -> None:
    inputs = {"input_ids": torch.tensor([[3]])}
    given = fs_generate(presence_penalty=50.0)
    keep = {"return_dict_in_generate": True, "output_scores": True}
    out = table.generate(**inputs, do_sample=False, max_new_tokens=30, custom_generate=given, **keep)
    tokens = out.sequences[0].tolist()
    assert len(set(tokens[1:])) == 30
    expected = table.table[tokens[5]].detach().clone()
    expected[tokens[1:6]] -= 50.0
    assert torch.equal(out.scores[5][0], expected)


def test_filters_need_do_sample(table: TableModel) -> None:
    with pytest.raises(ValueError, match=r"top_p.*do_sample"):
        table.generate(torch.tensor([[3]]), max_new_tokens=2, custom_generate=fs_generate(top_p=0.9))


# What generate does besides -------------------------------------------------------------------------------------------


def test_stopping_criteria_see_the_tokens_and_clean_scores(table: TableModel) -> None:
    seen: list[torch.Tensor] = []

    class Third(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            seen.append(scores[-1])
            return torch.full((len(input_ids),), input_ids.shape[1] == 1 + 3)

    options = {"stopping_criteria": StoppingCriteriaList([Third()]), "return_dict_in_generate": True}
    sample = fs_generate(seed=[4])
    options |= {"output_scores": True, "do_sample": True, "max_new_tokens": 20, "custom_generate": sample}
    out = table.generate(torch.tensor([[3]]), **options)
    assert out.sequences[0, 1:].tolist() == expected_tokens(table, 3, 4, 3, top_k=50)
    assert [s.data_ptr() for s in seen] == [s.data_ptr() for s in out.scores]


def test_finished_sequences_are_padded(table: TableModel) -> None:
    free = drawn(table, padded_batch(), seed=3, max_new_tokens=10)
    eos = int(free[0, 2])
    got = drawn(table, padded_batch(), seed=3, max_new_tokens=10, eos_token_id=eos)
    for mine, theirs in zip(got.tolist(), free.tolist(), strict=True):
        end = theirs.index(eos) + 1 if eos in theirs else 10
        assert mine == theirs[:end] + [PAD] * (len(mine) - end)
    assert got[0, -1] == PAD


def test_streamer_gets_the_prompt_and_each_token(table: TableModel) -> None:
    streamer = Collect()
    inputs = {"input_ids": torch.tensor([[3, 8]])}
    got = drawn(table, inputs, seed=[4], max_new_tokens=6, given={"streamer": streamer})
    assert streamer.tokens == [[3, 8], *([token] for token in got[0].tolist())]
    assert streamer.ended


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_cache(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval().to(dtype)
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.8, "eos_token_id": None, "pad_token_id": PAD}
    static = drawn(model, padded_batch(), cache_implementation="static", **options)
    assert static.shape == (3, 6)
    if dtype == torch.float32:
        assert torch.equal(static, drawn(model, padded_batch(), **options))


def test_encoder_decoder() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, eos_token_id=EOS
    )
    model = T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.tensor([[5, 9, 7, 4]])}
    options: dict[str, Any] = {"max_new_tokens": 6, "repetition_penalty": 1.5, "top_k": 40, "temperature": 0.5}
    keep = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = model.generate(**inputs, do_sample=True, custom_generate=fs_generate(seed=1), **options, **keep)
    processors = prepared(model, inputs, options)
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        assert torch.equal(scores, processors(out.sequences[:, : 1 + step], logits.clone()))
    again = model.generate(**inputs, do_sample=True, custom_generate=fs_generate(seed=1), **options)
    assert torch.equal(again, out.sequences)


def test_synced_gpus_reaches_the_loop(table: TableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    got = {}

    def loop(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        got.update(kwargs)
        return input_ids

    monkeypatch.setattr(GenerationMixin, "_sample", loop)
    for synced in (True, False, None):
        drawn(table, padded_batch(), max_new_tokens=2, synced_gpus=synced)
        assert got["synced_gpus"] is bool(synced)


# What is refused ------------------------------------------------------------------------------------------------------


REFUSED: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 2},
    "penalty_alpha": {"penalty_alpha": 0.6},
    "dola_layers": {"dola_layers": "high"},
    "force_words_ids": {"force_words_ids": [[5]], "num_beams": 2},
    "streamer": {"streamer": Collect()},
}


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize(("name", "options"), REFUSED.items(), ids=REFUSED)
def test_options_that_would_be_lost_are_refused(
    gpt2: GPT2LMHeadModel, name: str, options: dict[str, Any], do_sample: bool
) -> None:
    options = options | {"do_sample": do_sample, "max_new_tokens": 3, "custom_generate": fs_generate(seed=1)}
    with pytest.raises(ValueError, match=name):
        gpt2.generate(torch.tensor([[5, 9, 7]]), **options)


def test_paged_is_refused_before_it_drops_us(gpt2: GPT2LMHeadModel) -> None:
    options = {"do_sample": True, "max_new_tokens": 3, "cache_implementation": "paged"}
    with pytest.raises(ValueError, match=r"cache_implementation='paged'.*drops custom_generate"):
        gpt2.generate(torch.tensor([[5, 9, 7]]), **options, custom_generate=fs_generate(seed=1))


def test_a_loop_of_the_models_own_is_refused(table: TableModel) -> None:
    class Own(TableModel):
        def _sample(self, *args: Any, **kwargs: Any) -> Any:
            return super()._sample(*args, **kwargs)

    model = Own(table.table.detach())
    with pytest.raises(ValueError, match="Own has a decoding loop of its own"):
        drawn(model, padded_batch(), max_new_tokens=3, pad_token_id=PAD)


def test_invalid_logits(table: TableModel) -> None:
    broken = TableModel(table.table.detach().clone())
    with torch.no_grad():
        broken.table[40, 7] = torch.nan
    with pytest.raises(ValueError, match="row 1 has a NaN logit"):
        drawn(broken, padded_batch(), max_new_tokens=3, pad_token_id=PAD)


def test_backend_is_passed_on(table: TableModel) -> None:
    with pytest.raises(ValueError, match="backend = 'none'"):
        drawn(table, padded_batch(), max_new_tokens=3, given={"backend": "none"})
    reference = drawn(table, padded_batch(), max_new_tokens=3, given={"backend": "reference"})
    assert torch.equal(reference, drawn(table, padded_batch(), max_new_tokens=3))


# Bias, allowed tokens and masks ---------------------------------------------------------------------------------------


def test_bias_and_allowed_tokens_are_fused(gpt2: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any, input_ids: Any, scores: Any) -> None:
        raise AssertionError(f"{type(self).__name__} ran")

    for name in ("RepetitionPenalty", "PrefixConstrained"):
        monkeypatch.setattr(getattr(logits_process, f"{name}LogitsProcessor"), "__call__", run)
    monkeypatch.setattr(logits_process.SequenceBiasLogitsProcessor, "__call__", run)
    # NoBadWords is a kind of bias, and has no call of its own.
    own = logits_process.NoBadWordsLogitsProcessor
    monkeypatch.setattr(own, "__call__", lambda self, ids, scores: scores.index_fill(1, torch.tensor([4]), -torch.inf))
    options: dict[str, Any] = {
        "sequence_bias": [[[9], 4.0], [[7], -4.0]],
        "repetition_penalty": 1.3,
        "prefix_allowed_tokens_fn": lambda row, ids: list(range(row, 60)),
        "top_k": 20,
    }
    for extra in ({}, {"min_new_tokens": 2, "no_repeat_ngram_size": 2, "bad_words_ids": [[4]]}):
        allowed = options if not extra else {k: v for k, v in options.items() if k != "prefix_allowed_tokens_fn"}
        assert drawn(gpt2, padded_batch(), max_new_tokens=3, **allowed, **extra).shape == (3, 3)


PREFIX: dict[str, dict[str, Any]] = {
    "alone": {"top_k": 0},
    "all": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.4, "sequence_bias": [[[9], 4.0]]},
    "bad words": {"bad_words_ids": [[4], [9, 7]], "no_repeat_ngram_size": 2, "sequence_bias": [[[9], 4.0]]},
    "two-token bias": {"sequence_bias": [[[9], 4.0], [[9, 7], 3.0]], "top_p": 0.9},
    "all bias -inf": {"sequence_bias": [[[i], float("-inf")] for i in range(4, 60)], "top_k": 0},
}


def allows_what_has_no_score() -> bool:
    """Whether this transformers lifts allowed tokens that are all at -inf; older ones leave such a row without any."""
    allowed = PrefixConstrainedLogitsProcessor(lambda row, ids: [1], 1)
    return bool(allowed(torch.zeros(1, 1).long(), torch.full((1, 3), -torch.inf)).isfinite().any())


@pytest.mark.parametrize("options", PREFIX.values(), ids=PREFIX)
def test_scores_under_allowed_tokens_are_those_of_transformers(gpt2: GPT2LMHeadModel, options: dict[str, Any]) -> None:
    def allow(row: int, ids: torch.Tensor) -> list[int]:
        return [i for i in range(4, 60) if (i + row + int(ids[-1])) % 3]

    inputs = padded_batch()
    none_left = options is PREFIX["all bias -inf"]
    options = options | {"max_new_tokens": 5, "prefix_allowed_tokens_fn": allow}
    keep = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    if none_left and not allows_what_has_no_score():
        with pytest.raises(ValueError, match="no logit above -inf"):
            gpt2.generate(**inputs, do_sample=True, custom_generate=fs_generate(seed=7), **options, **keep)
        return
    out = gpt2.generate(**inputs, do_sample=True, custom_generate=fs_generate(seed=7), **options, **keep)
    processors = prepared(gpt2, inputs, options)
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        ids = out.sequences[:, : inputs["input_ids"].shape[1] + step]
        assert torch.equal(scores, processors(ids, logits.clone())), f"step {step}"


def test_no_allowed_token_names_the_row(gpt2: GPT2LMHeadModel) -> None:
    with pytest.raises(ValueError, match=r"prefix_allowed_tokens_fn: allows no token \(row 1\)"):
        drawn(gpt2, padded_batch(), max_new_tokens=2, prefix_allowed_tokens_fn=lambda row, ids: [] if row else [5])


# Pipelines ------------------------------------------------------------------------------------------------------------


def test_pipeline() -> None:
    folder = shipped_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 6, "temperature": 0.8, "top_k": 30}
    got = generator("The future of AI is", custom_generate=fs_generate([7]), return_full_text=False, **options)
    ids = tokenizer("The future of AI is", return_tensors="pt")
    expected = model.generate(**ids, custom_generate=fs_generate([7]), **options)
    assert got[0]["generated_text"] == tokenizer.decode(expected[0, ids["input_ids"].shape[1] :])


# What the documentation says of each option ---------------------------------------------------------------------------


TABLE: dict[str, dict[str, Any]] = {
    "`temperature`": {"temperature": 0.7},
    "`top_k`": {"top_k": 5},
    "`top_p`": {"top_p": 0.8},
    "`min_p`": {"min_p": 0.1},
    "`repetition_penalty`": {"repetition_penalty": 1.3},
    "`sequence_bias` of single tokens": {"sequence_bias": [[[9], 4.0]]},
    "`prefix_allowed_tokens_fn`": {"prefix_allowed_tokens_fn": lambda row, ids: [5, 6]},
    "`no_repeat_ngram_size`": {"no_repeat_ngram_size": 2},
    "`bad_words_ids`": {"bad_words_ids": [[4]]},
    "`min_length`": {"min_length": 5},
    "`min_new_tokens`": {"min_new_tokens": 2},
    "`suppress_tokens`": {"suppress_tokens": [4]},
    "`begin_suppress_tokens`": {"begin_suppress_tokens": [4]},
    "`sequence_bias` of longer sequences": {"sequence_bias": [[[9, 7], 4.0]]},
    "`forced_eos_token_id`": {"forced_eos_token_id": EOS},
    "`remove_invalid_values`": {"remove_invalid_values": True},
    "`exponential_decay_length_penalty`": {"exponential_decay_length_penalty": (2, 1.5)},
    "`guidance_scale`": {"guidance_scale": 2.0},
    "`top_h`": {"top_h": 0.5},
    "`typical_p`": {"typical_p": 0.8},
    "`epsilon_cutoff`": {"epsilon_cutoff": 0.02},
    "`eta_cutoff`": {"eta_cutoff": 0.05},
    "`watermarking_config`": {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")},
    "`renormalize_logits`": {"renormalize_logits": True},
    "`logits_processor`": {"logits_processor": [AddRamp()]},
    "`assistant_model`": {"assistant_model": "the model"},
    "`prompt_lookup_num_tokens`": {"prompt_lookup_num_tokens": 3},
    "`assistant_early_exit`": {"assistant_early_exit": 1},
    "`use_mtp`": {"use_mtp": True},
    **{f"`{name}`": options for name, options in REFUSED.items()},
}


def served(model: Any, options: dict[str, Any]) -> str:
    """What becomes of an option, by looking at what the loop leaves to transformers."""
    plans: list[Any] = []
    drafts: list[str] = []
    real = loop.make_plan

    def drafted(model: Any, input_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        drafts.append("yes")
        return input_ids

    def spy(*args: Any) -> Any:
        plans.append(real(*args))
        return plans[-1]

    options = {k: model if v == "the model" else v for k, v in options.items()} | {"max_new_tokens": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_plan", spy)
        patch.setattr(assisted, "run", drafted)
        common = {"do_sample": True, "top_k": 0, "custom_generate": fs_generate(seed=1)}
        try:
            model.generate(torch.tensor([[5, 9, 7]]), **common | options)
        except ValueError as error:
            return "refused" if "fs_generate" in str(error) else str(error)
    if drafts:
        return "drafts"
    return "runs before the fused pass" if plans[0].own else "fused"


def test_the_page_tells_what_becomes_of_each_option(gpt2: GPT2LMHeadModel) -> None:
    page = (Path(__file__).parents[2] / "docs" / "integrations" / "generate.md").read_text()
    rows = dict(re.findall(r"^\| (fused|runs before the fused pass|drafts|refused) \| (.*) \|$", page, re.MULTILINE))
    told = {name: kind for kind, names in rows.items() for name in names.split(", ")}
    assert told.keys() == TABLE.keys()
    if not hasattr(GenerationConfig(), "use_mtp"):  # newer than the oldest transformers that is served
        del told["`use_mtp`"]
    assert {name: served(gpt2, TABLE[name]) for name in told} == told
