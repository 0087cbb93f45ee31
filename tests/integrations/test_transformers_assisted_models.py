"""Drafts with models of transformers: attention and its caches, grammars, stop strings, assistants with other ids.

Their logits in several rows can differ from those in one by some last bits; no draw here is that close to an edge.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.utils import ALL_CACHE_NAMES

import fastsample as fs
from fastsample.cli.model import shipped_model
from fastsample.integrations.best_of_n import best_of_n
from fastsample.integrations.grammar import GrammarCompiler
from fastsample.integrations.transformers import assisted, fs_generate

V, PAD, EOS = 40, 1, 2
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"
PROMPT = torch.tensor([[5, 9, 7, 30, 9, 7, 11, 5, 9]])
DRY = {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_breakers": [11, 12]}
broken = pytest.mark.skipif(
    CACHE == "past_key_values",
    reason="older transformers fail by themselves: in an early exit, and in prompt lookup without an eos_token_id",
)


def generate(model: Any, seed: Any = 7, given: dict[str, Any] | None = None, **options: Any) -> Any:
    common: dict[str, Any] = {"do_sample": True, "max_new_tokens": 24, "top_k": 0}
    inputs = {"inputs": options.pop("inputs", PROMPT)}
    return model.generate(**inputs, custom_generate=fs_generate(seed, **given or {}), **common | options)


def check_same(model: Any, draft: dict[str, Any], seed: Any = 7, **options: Any) -> torch.Tensor:
    """The text, which is the same with and without drafts."""
    plain = generate(model, seed, **options)
    assert torch.equal(generate(model, seed, **options, **draft), plain)
    return plain


class Length(StoppingCriteria):
    """Ends a text after some number of tokens; the loop does not know it."""

    def __init__(self, after: int) -> None:
        self.length = PROMPT.shape[1] + after

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.fixture(scope="module")
def shipped() -> Any:
    return AutoModelForCausalLM.from_pretrained(shipped_model()).float().eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(shipped_model())


TEXT = "Use this file. Use this file. Use this"


def of_shipped(shipped: Any, tokenizer: Any, **options: Any) -> Any:
    given = options.pop("given", {})
    common: dict[str, Any] = {"do_sample": True, "max_new_tokens": 40, "temperature": 0.7, "top_p": 0.95}
    ids = tokenizer(TEXT, return_tensors="pt")
    return shipped.generate(**ids, custom_generate=fs_generate(5, **given), tokenizer=tokenizer, **common | options)


def assistant_like(shipped: Any, vocab: int | None = None) -> GPT2LMHeadModel:
    """The shipped model without its last layer, and with some number of ids."""
    config = GPT2Config.from_dict(shipped.config.to_dict() | {"n_layer": 3, "dtype": "float32"})
    assistant = GPT2LMHeadModel(config).eval()
    assistant.load_state_dict(shipped.state_dict(), strict=False)
    if vocab is not None:
        assistant.resize_token_embeddings(vocab, mean_resizing=False)
    return assistant


def test_stop_strings(shipped: Any, tokenizer: Any) -> None:
    free = of_shipped(shipped, tokenizer)
    stops = {tokenizer.decode(free[0, -k]) for k in range(5, 36, 3)}
    lengths = set()
    for stop in stops:
        plain = of_shipped(shipped, tokenizer, stop_strings=[stop])
        lengths.add(plain.shape[1])
        for draft in ({"prompt_lookup_num_tokens": 6}, {"assistant_model": shipped}):
            assert torch.equal(of_shipped(shipped, tokenizer, stop_strings=[stop], **draft), plain), stop
    assert len(lengths) > 3


@broken
def test_grammars(shipped: Any, tokenizer: Any) -> None:
    """A grammar follows each token, and no draft; without an end-of-sequence id it ends the text itself."""
    grammar = GrammarCompiler(tokenizer).regex(r"( (yes|no|maybe|[a-z]{2,5})[,.]){9}")
    for eos in (None, tokenizer.eos_token_id):
        options = {"given": {"grammar": grammar}, "max_new_tokens": 80, "eos_token_id": eos, "pad_token_id": PAD}
        plain = of_shipped(shipped, tokenizer, **options)
        for draft in ({"prompt_lookup_num_tokens": 6}, {"assistant_model": assistant_like(shipped)}):
            assert torch.equal(of_shipped(shipped, tokenizer, **options, **draft), plain)
        assert 10 < plain.shape[1] < 80


def test_breakers_in_words(shipped: Any, tokenizer: Any) -> None:
    options = {"given": {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_breakers": [" "]}}
    plain = of_shipped(shipped, tokenizer, **options)
    for draft in ({"prompt_lookup_num_tokens": 6}, {"assistant_model": assistant_like(shipped)}):
        assert torch.equal(of_shipped(shipped, tokenizer, **options, **draft), plain)


def test_an_assistant_with_other_ids(shipped: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its drafts are translated by way of the text; nothing that knows the model's ids looks at the assistant's."""
    assistant = assistant_like(shipped, 4200)
    monkeypatch.setattr(assisted, "Draft", None)
    options: dict[str, Any] = {"given": {"dry_multiplier": 1.0, "frequency_penalty": 0.3}, "bad_words_ids": [[4]]}
    plain = of_shipped(shipped, tokenizer, **options)
    both = {"assistant_model": assistant, "assistant_tokenizer": tokenizer}
    runs = []
    hook = shipped.register_forward_hook(lambda *_: runs.append(1))
    assert torch.equal(of_shipped(shipped, tokenizer, **options, **both), plain)
    hook.remove()
    assert len(runs) < 40
    with pytest.raises(ValueError, match="different tokenizers"):
        of_shipped(shipped, tokenizer, assistant_model=assistant)
    with pytest.raises(ValueError, match="`assistant_tokenizer` is not required"):
        of_shipped(shipped, tokenizer, assistant_model=shipped, assistant_tokenizer=tokenizer)


def test_guidance_runs_its_own_model_step_by_step(shipped: Any, tokenizer: Any) -> None:
    plain = of_shipped(shipped, tokenizer, guidance_scale=1.5, max_new_tokens=20)
    for draft in ({"prompt_lookup_num_tokens": 6}, {"assistant_model": shipped}):
        assert torch.equal(of_shipped(shipped, tokenizer, guidance_scale=1.5, max_new_tokens=20, **draft), plain)


def test_whatever_the_logits_a_token_is_the_plain_draw_of_its_row(tokenizer: Any) -> None:
    """In bfloat16 several rows often have other logits than one, so the text may be another."""
    model = AutoModelForCausalLM.from_pretrained(shipped_model(), dtype=torch.bfloat16).eval()
    keep = {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": 4095, "top_k": 0}
    out = of_shipped(model, tokenizer, prompt_lookup_num_tokens=5, **keep)
    assert len(out.logits) == 40
    for offset, (row, token) in enumerate(zip(out.logits, out.sequences[0, -40:].tolist(), strict=True)):
        options: dict[str, Any] = {"seed": 5, "offset": offset, "temperature": 0.7, "top_p": 0.95, "ties": "all"}
        assert int(fs.sample(row, **options).tokens) == token, f"offset {offset}"


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=64, pad_token_id=PAD, **sizes)).eval()
    with torch.no_grad():
        model.lm_head.weight *= 15  # logits of some spread
    return model


@broken
@pytest.mark.parametrize("draft", [{"assistant_early_exit": 2}, {"prompt_lookup_num_tokens": 4}], ids=str)
def test_a_model_with_attention(llama: LlamaForCausalLM, draft: dict[str, Any]) -> None:
    keep = {"return_dict_in_generate": True, "output_hidden_states": True, "eos_token_id": None}
    for seed in range(5):
        plain, got = (generate(llama, seed, temperature=0.7, **keep, **d) for d in ({}, draft))
        assert torch.equal(plain.sequences, got.sequences)
        assert len(plain.hidden_states) == len(got.hidden_states) == 24
    assert llama.config.num_hidden_layers == 3
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])  # padding is no text
    check_same(llama, draft, attention_mask=mask, eos_token_id=None, no_repeat_ngram_size=1)


@broken
def test_a_cache_that_forgets_is_left_as_without_drafts() -> None:
    """A sliding window can be rolled back only once, so the loop itself must know where the text ends."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=V, pad_token_id=PAD, num_hidden_layers=2, sliding_window=6, **sizes)
    model = MistralForCausalLM(config).eval()
    for after in range(1, 9):
        ends = StoppingCriteriaList([Length(after)])
        keep = {"return_dict_in_generate": True, "stopping_criteria": ends, "eos_token_id": None, "temperature": 0.3}
        plain, got = (generate(model, 5, **keep, **draft) for draft in ({}, {"assistant_model": model}))
        assert torch.equal(plain.sequences, got.sequences)
        assert plain[CACHE].get_seq_length() == got[CACHE].get_seq_length()
        for one, other in zip(plain[CACHE].layers, got[CACHE].layers, strict=True):
            assert torch.allclose(one.keys, other.keys[:, :, -one.keys.shape[2] :], atol=1e-5)


def test_layers_that_predict_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    modeling = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(modeling, "MtpModel"):
        pytest.skip("newer than this transformers")
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 16}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "first_k_dense_replace": 1}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = Glm4MoeForCausalLM(Glm4MoeConfig(vocab_size=V, pad_token_id=PAD, **sizes, **experts, **heads)).eval()
    layers = modeling.MtpModel(model, 1).eval()
    monkeypatch.setattr(modeling.MtpModel, "from_pretrained", lambda *_, **__: layers)
    runs = []
    layers.register_forward_hook(lambda *_: runs.append(1))
    for options in ({}, {"repetition_penalty": 1.3, "given": DRY}):
        check_same(model, {"use_mtp": True}, eos_token_id=None, **options)
    assert len(runs) > 10


def test_encoder_decoder() -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=V, decoder_start_token_id=0, eos_token_id=EOS, **sizes)
    torch.manual_seed(0)
    model, assistant = (T5ForConditionalGeneration(config).eval() for _ in range(2))
    for draft in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}, {"assistant_model": model}):
        check_same(model, draft, temperature=0.3, repetition_penalty=1.2)


@broken
def test_an_early_exit_that_fails_leaves_the_model_whole(shipped: Any, tokenizer: Any) -> None:
    """GPT-2 has none in transformers."""
    plain = of_shipped(shipped, tokenizer)
    with pytest.raises(IndexError):
        of_shipped(shipped, tokenizer, assistant_early_exit=2)
    assert shipped.config.num_hidden_layers == 4
    assert torch.equal(of_shipped(shipped, tokenizer), plain)


def test_best_of_n_branches_and_takes_no_drafts(shipped: Any, tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match="prompt_lookup_num_tokens: transformers drafts for one sequence at a time, got 3"
    ):
        best_of_n(shipped, TEXT, n=3, tokenizer=tokenizer, max_new_tokens=4, prompt_lookup_num_tokens=3)
