"""Drafts: with an assistant, prompt lookup or an early exit, `generate` gives the text that it gives without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from table_model import TableModel
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import ALL_CACHE_NAMES, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

import fastsample as fs
from fastsample.integrations.transformers import assisted, fs_generate

V, PAD, EOS = 40, 1, 2
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"
PROMPT = torch.tensor([[5, 9, 7, 30, 9, 7, 11, 5, 9]])


class Cached(TableModel):
    """A row's logits are a function of its last two ids, the earlier of which may come from the cache.

    So they have the same bits in any number of rows, and a cache that was cut wrongly gives others. With fewer layers,
    which is how an early exit is asked for, the logits are disturbed.
    """

    base_model_prefix = "whole"

    def __init__(self, table: torch.Tensor, disturbed: torch.Tensor | None = None) -> None:
        super().__init__(table)
        self.config.num_hidden_layers = 2
        self.config.is_encoder_decoder = False
        self.disturbed = table if disturbed is None else disturbed
        self.runs = self.longest = 0
        self.before = V // 2  # so the id before the last one counts by being even or odd
        self.generation_config = GenerationConfig(pad_token_id=PAD)
        self.generation_config.num_assistant_tokens = 4
        self.generation_config.assistant_confidence_threshold = 0.0

    @property
    def whole(self) -> Cached:
        return self

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return True

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        early = self.config.num_hidden_layers == 1
        self.runs += not early
        cache, ids = kwargs.get(CACHE), input_ids
        if cache is None and kwargs.get("use_cache"):
            cache = DynamicCache(config=self.config)  # older transformers leave that to the model
        if cache is not None:
            keys = input_ids[:, None, :, None].float()
            for layer in range(self.config.num_hidden_layers):
                known, _ = cache.update(keys, keys, layer)
            ids = known[:, 0, :, 0].long()
        self.longest = max(self.longest, ids.shape[1])
        before = torch.nn.functional.pad(ids, (1, 0))[:, :-1]
        rows = (self.before * before + ids)[:, -input_ids.shape[1] :] % len(self.table)
        table = self.disturbed if early else self.table
        return CausalLMOutputWithPast(logits=table[rows], **{CACHE: cache})


def make(seed: int = 1, noise: float = 0.0) -> Cached:
    generator = torch.Generator().manual_seed(seed)
    table, rows = 2.0 * torch.randn(V, V, generator=generator), torch.arange(V)
    table[rows, rows // 5 * 5 + (rows + 1) % 5] += 5.0  # texts repeat themselves
    disturbed = table + 1.5 * torch.randn(V, V, generator=generator)
    return Cached(table + noise * torch.randn(V, V, generator=generator), disturbed).eval()


@pytest.fixture(scope="module")
def model() -> Cached:
    return make()


@pytest.fixture(scope="module")
def drafters() -> dict[str, dict[str, Any]]:
    return {
        "lookup": {"prompt_lookup_num_tokens": 5},
        "assistant": {"assistant_model": make(noise=0.7)},
        "early exit": {"assistant_early_exit": 1},
    }


broken = pytest.mark.skipif(
    CACHE == "past_key_values",
    reason="older transformers fail by themselves: in an early exit, and in prompt lookup without an eos_token_id",
)
WAYS = ["assistant", pytest.param("lookup", marks=broken), pytest.param("early exit", marks=broken)]


def generate(model: Any, seed: Any = 7, given: dict[str, Any] | None = None, **options: Any) -> Any:
    common: dict[str, Any] = {"do_sample": True, "max_new_tokens": 24, "top_k": 0}
    inputs = {"inputs": options.pop("inputs", PROMPT)}
    return model.generate(**inputs, custom_generate=fs_generate(seed, **given or {}), **common | options)


def check_same(model: Any, draft: dict[str, Any], seed: Any = 7, **options: Any) -> torch.Tensor:
    """The text, which is the same with and without drafts."""
    plain = generate(model, seed, **options)
    assert torch.equal(generate(model, seed, **options, **draft), plain)
    return plain


# The text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seeds", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_text_of_many_seeds(model: Cached, drafters: dict[str, Any], way: str, seeds: int) -> None:
    plain_runs = drafted_runs = 0
    for seed in range(seeds):
        model.runs = 0
        plain = generate(model, seed, temperature=0.8)
        plain_runs += model.runs
        model.runs = 0
        assert torch.equal(generate(model, seed, temperature=0.8, **drafters[way]), plain), f"seed {seed}"
        drafted_runs += model.runs
    assert plain_runs == 24 * seeds
    assert drafted_runs < {"lookup": 0.95, "assistant": 0.6, "early exit": 0.8}[way] * plain_runs  # drafts were taken


class AddRamp(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + torch.linspace(0, 1, scores.shape[-1]) * len(input_ids[0])


DRY = {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_breakers": [11, 12]}
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.7},
    "epsilon": {"epsilon_cutoff": 0.02},
    "eta": {"eta_cutoff": 0.05},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2, "temperature": 0.5},
    "frequency and presence": {"given": {"frequency_penalty": 0.7, "presence_penalty": 0.4}},
    "xtc": {"given": {"xtc_probability": 0.5, "xtc_threshold": 0.1}},
    "dry": {"given": DRY},
    "temperature_last": {"given": {"order": "temperature_last", "min_p": 0.1, "temperature": 1.5}},
    "all": {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "given": {"xtc_probability": 0.3, "frequency_penalty": 0.2, **DRY},
    },
    "bias": {"sequence_bias": [[[9], 4.0], [[9, 7], 3.0]]},
    "bad words": {"bad_words_ids": [[4], [9, 7]], "suppress_tokens": [6], "begin_suppress_tokens": [8]},
    "min_length": {"min_length": 20, "eos_token_id": [EOS, 12, 20, 31]},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": [EOS, 12, 20, 31]},
    "forced eos": {"forced_eos_token_id": EOS, "eos_token_id": EOS},
    "decay": {"exponential_decay_length_penalty": (5, 1.1), "eos_token_id": [EOS, 12, 20, 31]},
    "offset": {"given": {"offset": 2**64 - 5}},
    "offset of the text": {"given": {"offset": "prompt"}},
    "reference": {"given": {"backend": "reference"}},
    "greedy": {"do_sample": False},
    "greedy, penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "greedy, dry": {"do_sample": False, "given": DRY},
}
UNKNOWN_TO_DRAFTERS: dict[str, dict[str, Any]] = {
    "processor": {"logits_processor": [AddRamp()]},
    "allowed": {"prefix_allowed_tokens_fn": lambda row, ids: [i for i in range(3, V) if (i + int(ids[-1])) % 3]},
    "top_h": {"top_h": 0.5, "renormalize_logits": True},
}
GREEDY_SEED = pytest.mark.filterwarnings("ignore:.*without effect unless generate gets do_sample=True")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*OPTIONS, *UNKNOWN_TO_DRAFTERS])
@GREEDY_SEED
def test_options(model: Cached, drafters: dict[str, Any], way: str, name: str) -> None:
    options = (OPTIONS | UNKNOWN_TO_DRAFTERS)[name]
    texts = [check_same(model, drafters[way], seed, **options).tolist() for seed in range(4)]
    neutral = [generate(model, seed, eos_token_id=options.get("eos_token_id")).tolist() for seed in range(4)]
    assert name == "reference" or texts != neutral  # the option has an effect on these texts


@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if "eos_token_id" not in options])
@GREEDY_SEED
def test_a_drafter_that_knows_the_model_is_always_right(model: Cached, name: str) -> None:
    model.runs = 0
    generate(model, 3, **OPTIONS[name], assistant_model=make())
    assert model.runs == 5  # of 4 drafts and one token more


@pytest.mark.parametrize("do_sample", [True, False])
@GREEDY_SEED
def test_a_draft_has_the_probability_of_its_token(model: Cached, do_sample: bool) -> None:
    """Where a drafter's confidence is too low, transformers ends the draft."""
    gaps, known = [], []

    class Spy(assisted.Draft):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            got = super().__call__(input_ids, scores)
            assert torch.equal(got, super().__call__(input_ids, scores))  # no state
            probs = fs.probabilities(scores, temperature=0.7, top_p=0.9) if do_sample else scores.softmax(-1)
            token = int(got.argmax(-1))
            gaps.append(float(abs(got.softmax(-1) - probs)[0, token]))
            known.append(float(probs[0, token]))
            return got

    options: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9} if do_sample else {"given": {"presence_penalty": 1.0}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assisted, "Draft", Spy)
        generate(model, 3, do_sample=do_sample, assistant_model=make(noise=2.0), **options)
    assert len(gaps) > 20
    assert min(known) < 0.3
    assert max(gaps) < 1e-3


def test_a_draft_that_cannot_be_drawn_is_left_to_the_drafter(model: Cached) -> None:
    broken = make()
    with torch.no_grad():
        broken.table[::2] = torch.nan
    check_same(model, {"assistant_model": broken})


# The end of a text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_the_text_ends_in_the_middle_of_a_draft(model: Cached, drafters: dict[str, Any], way: str) -> None:
    for count in range(1, 13):
        model.longest = 0
        assert check_same(model, drafters[way], max_new_tokens=count).shape[1] == PROMPT.shape[1] + count
        assert model.longest == PROMPT.shape[1] + count - 1  # nothing runs that cannot become text
    free = generate(model)[0, PROMPT.shape[1] :].tolist()
    for eos in set(free):
        got = check_same(model, drafters[way], eos_token_id=eos)
        assert got[0, PROMPT.shape[1] :].tolist() == free[: free.index(eos) + 1]


class Ends(StoppingCriteria):
    """Ends a text after some number of tokens; notes what it has been shown."""

    def __init__(self, after: int) -> None:
        self.after, self.seen = PROMPT.shape[1] + after, []  # type: ignore[var-annotated]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.seen.append((input_ids.tolist(), None if scores is None else len(scores)))
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.after)


class Notes(LogitsProcessor):
    """Has a state: what it does depends on its calls so far."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append((input_ids.tolist(), scores.tolist()))
        return scores + torch.arange(V) * (len(self.seen) % 3)

    def __deepcopy__(self, memo: Any) -> Notes:
        raise AssertionError("nothing but transformers' own processors is copied for a drafter")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("keep", [{}, {"return_dict_in_generate": True, "output_scores": True}], ids=["ids", "scores"])
@pytest.mark.parametrize("do_sample", [True, False])
@GREEDY_SEED
def test_processors_and_criteria_see_what_they_see_without_drafts(
    model: Cached, drafters: dict[str, Any], way: str, keep: dict[str, Any], do_sample: bool
) -> None:
    for after in (1, 4, 5, 6, 23):
        results = []
        for draft in ({}, drafters[way]):
            notes, ends = Notes(), Ends(after)
            own = {"logits_processor": LogitsProcessorList([notes]), "stopping_criteria": StoppingCriteriaList([ends])}
            out = generate(model, 11, temperature=0.6, do_sample=do_sample, **own, **keep, **draft)
            sequences = out.sequences if keep else out
            assert sequences.shape[1] == ends.after
            results.append((sequences.tolist(), notes.seen, ends.seen))
        assert results[0] == results[1]


def test_what_is_wrong_with_a_wrong_draft_is_no_error() -> None:
    """The assistant's favourite is never drawn, and the row that follows it is NaN; a row that is reached counts."""
    bad, assistant = make(), make(noise=0.5)
    bad.before = assistant.before = 0
    with torch.no_grad():
        bad.table[:, 39] = -torch.inf
        bad.table[39] = torch.nan
        assistant.table[:, 39] += 5
    assert 39 in generate(assistant, 3)
    check_same(bad, {"assistant_model": assistant}, 3)

    def allow(row: int, ids: torch.Tensor) -> list[int]:
        assert 39 not in ids
        return list(range(3, V))

    check_same(bad, {"assistant_model": assistant}, 3, prefix_allowed_tokens_fn=allow)
    for draft in ({}, {"assistant_model": assistant}):
        with pytest.raises(ValueError, match="row 0 has a NaN logit"):
            generate(bad, 3, inputs=torch.tensor([[6, 39]]), **draft)


@broken
def test_invalid_rows_are_flagged_as_without_drafts(drafters: dict[str, Any]) -> None:
    bad = make()
    with torch.no_grad():
        bad.table[7] = torch.nan
    found = []
    for seed in range(8):
        for draft in ({}, drafters["assistant"], drafters["lookup"]):
            options = {"return_dict_in_generate": True, "given": {"on_invalid": "flag"}, **draft}
            out = generate(bad, seed, **options)
            found.append((out.sequences.tolist(), out.status.tolist(), out.errors))
        assert found[-3] == found[-2] == found[-1]
    assert {status for _, (status,), _ in found} == {0, 1}


# What else comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", [None, "raw", "processed"])
@pytest.mark.parametrize("do_sample", [True, False])
@GREEDY_SEED
def test_return_dict(model: Cached, drafters: dict[str, Any], way: str, mode: Any, do_sample: bool) -> None:
    keep = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "do_sample": do_sample}
    keep |= {"logits_processor": [AddRamp()], "given": {"logprobs": mode, "frequency_penalty": 0.3}}
    for eos in (None, 12, 27):
        plain = generate(model, 5, eos_token_id=eos, **keep)
        got = generate(model, 5, eos_token_id=eos, **keep, **drafters[way])
        assert got.keys() == plain.keys()
        assert torch.equal(got.sequences, plain.sequences)
        for name in ("scores", "logits"):
            pairs = list(zip(got[name], plain[name], strict=True))
            assert len(pairs) == plain.sequences.shape[1] - PROMPT.shape[1]
            assert all(torch.equal(a, b) for a, b in pairs), name
        if mode is not None:
            assert torch.equal(got.logprobs, plain.logprobs)
        assert got[CACHE].get_seq_length() == plain[CACHE].get_seq_length()


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.parametrize("way", WAYS)
def test_streamer(model: Cached, drafters: dict[str, Any], way: str) -> None:
    for after in (3, 8, 24):
        calls = []
        for draft in ({}, drafters[way]):
            streamer = Collect()
            generate(model, 5, {"streamer": streamer}, stopping_criteria=StoppingCriteriaList([Ends(after)]), **draft)
            calls.append(streamer.calls)
        assert calls[0] == calls[1]
        assert len(calls[0]) == 1 + after + 1


def test_the_result_of_a_loop_that_goes_past_the_end_is_cut(model: Cached, drafters: dict[str, Any]) -> None:
    """As older versions of transformers do, which do not look at max_length after a run."""
    real = GenerationMixin._assisted_decoding

    def loop(*args: Any, generation_config: Any, **kwargs: Any) -> Any:
        class Fixed(type(generation_config)):  # type: ignore[misc]
            def __setattr__(self, name: str, value: Any) -> None:
                if name != "max_length":
                    super().__setattr__(name, value)

        generation_config.__class__ = Fixed
        return real(*args, generation_config=generation_config, **kwargs)

    keep = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for after in range(1, 12):
        plain = generate(model, 5, stopping_criteria=StoppingCriteriaList([Ends(after)]), **keep)
        streamer, alone = Collect(), generate(model, 5, stopping_criteria=StoppingCriteriaList([Ends(after)]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GenerationMixin, "_assisted_decoding", loop)
            options = {"stopping_criteria": StoppingCriteriaList([Ends(after)]), **drafters["assistant"]}
            got = generate(model, 5, {"streamer": streamer}, **options, **keep)
            assert torch.equal(generate(model, 5, **options), alone)
        assert torch.equal(got.sequences, plain.sequences)
        assert [len(got.scores), len(got.logits)] == [after, after]
        assert got[CACHE].get_seq_length() == plain[CACHE].get_seq_length()
        assert len(streamer.calls) == 1 + after + 1


# What is refused ------------------------------------------------------------------------------------------------------


def refused(model: Any) -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    lookup, assistant = {"prompt_lookup_num_tokens": 3}, {"assistant_model": make()}
    two = {"inputs": PROMPT.repeat(2, 1)}
    several = r"num_return_sequences has to be 1 when doing assisted generate, but is 2"
    return {
        "batch, lookup": (lookup | two, ValueError, "prompt_lookup_num_tokens: .* one sequence at a time, got 2"),
        "batch, assistant": (assistant | two, ValueError, "assistant_model: .* one sequence at a time, got 2"),
        "two drafters": (lookup | assistant, ValueError, "prompt_lookup_num_tokens and assistant_model: each"),
        "two others": (
            lookup | {"assistant_early_exit": 1},
            ValueError,
            "prompt_lookup_num_tokens and assistant_early_exit: each",
        ),
        "several, lookup": (lookup | {"num_return_sequences": 2}, ValueError, several),
        "several, assistant": (assistant | {"num_return_sequences": 2}, ValueError, several),
        "ensemble": (
            assistant | {"assistant_ensemble_weight": 0.5},
            ValueError,
            "assistant_ensemble_weight: not served",
        ),
        "beams": (lookup | {"num_beams": 2}, ValueError, "num_beams: not served by fs_generate"),
        "no cache": (lookup | {"use_cache": False}, Exception, "cache"),
        "streamer": (lookup | {"streamer": Collect()}, ValueError, "streamer: .* use fs_generate"),
    }


@pytest.mark.parametrize("name", refused(None))
def test_what_is_refused(model: Cached, name: str) -> None:
    options, kind, message = refused(model)[name]
    if name == "ensemble" and not hasattr(GenerationConfig(), "assistant_ensemble_weight"):
        pytest.skip("newer than this transformers")
    with pytest.raises(kind, match=message):
        generate(model, **options)


def test_synced_gpus_reaches_the_loop(model: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    got = {}

    def loop(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        got.update(kwargs)
        return input_ids

    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", loop)
    for synced in (True, False, None):
        generate(model, prompt_lookup_num_tokens=3, synced_gpus=synced)
        assert got["synced_gpus"] is bool(synced)


def test_models_that_cannot_be_entered() -> None:
    class Own(Cached):
        def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
            return super()._assisted_decoding(*args, **kwargs)

    with pytest.raises(ValueError, match="Own has an assisted loop of its own"):
        generate(Own(make().table.detach()), prompt_lookup_num_tokens=3)
    stateful = make()
    stateful._is_stateful = True
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(stateful, prompt_lookup_num_tokens=3)
