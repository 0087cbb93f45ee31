"""Best-of-N by a reward model, against a loop by hand over one text at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

import fastsample as fs
from fastsample.cli.model import shipped_model
from fastsample.integrations.best_of_n import RewardModel

PROMPTS = ["The future of AI is", "Use this"]
OPTIONS: dict[str, Any] = {"seed": 7, "max_new_tokens": 9}
CHAT = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(shipped_model())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(shipped_model(), dtype="float32")


def classifier(labels: int = 1, **more: Any) -> Any:
    torch.manual_seed(labels)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    options = {"vocab_size": 4096, "num_attention_heads": 2, "num_labels": labels, "pad_token_id": 1, "eos_token_id": 0}
    config = LlamaConfig(**sizes | options | {"initializer_range": 1.0} | more)
    return LlamaForSequenceClassification(config).eval()


def by_hand(judge: Any, tokenizer: Any, text: str, label: int | None = None) -> float:
    with torch.no_grad():
        logits = judge(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
    return float(logits[0] if label is None else logits.log_softmax(0)[label])


def test_a_folder_scores_prompt_and_text(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    judge = classifier()
    judge.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for score in (tmp_path, str(tmp_path), RewardModel(judge, tokenizer, batch_size=3)):
        results = fs.best_of_n(model, PROMPTS, 5, tokenizer=tokenizer, score=score, **OPTIONS)
        for prompt, result in zip(PROMPTS, results, strict=True):
            want = [by_hand(judge, tokenizer, prompt + c.text) for c in result.candidates]
            assert [c.score for c in result.candidates] == pytest.approx(want, abs=1e-4)
            assert want == sorted(want, reverse=True)
            assert len(set(want)) > 1


def test_chunks_and_batches_change_no_score(model: Any, tokenizer: Any) -> None:
    judge = classifier()
    options = OPTIONS | {"tokenizer": tokenizer, "seed": 3}
    want = fs.best_of_n(model, PROMPTS, 5, score=RewardModel(judge, tokenizer, batch_size=1), **options)
    for size in (2, 8):
        score = RewardModel(judge, tokenizer, batch_size=size)
        for chunk in (None, 2):
            got = fs.best_of_n(model, PROMPTS, 5, score=score, batch_size=chunk, **options)
            for one, other in zip(got, want, strict=True):
                assert [c.index for c in one.candidates] == [c.index for c in other.candidates]
                scores = [c.score for c in other.candidates]
                assert [c.score for c in one.candidates] == pytest.approx(scores, abs=1e-4)


def test_the_batches_are_no_larger(tokenizer: Any) -> None:
    judge, seen = classifier(), list[int]()
    texts = [" word" * n for n in range(1, 12)]
    hook = judge.register_forward_pre_hook(lambda _, __, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    got = RewardModel(judge, tokenizer, batch_size=4)([""] * 11, texts)
    hook.remove()
    assert seen == [4, 4, 3]
    assert got == pytest.approx([by_hand(judge, tokenizer, text) for text in texts], abs=1e-4)


def test_a_model_without_padding_runs_one_text_at_a_time(tokenizer: Any) -> None:
    judge = classifier(pad_token_id=None)
    texts = [" word" * n for n in range(1, 5)]
    got = RewardModel(judge, tokenizer)([""] * 4, texts)
    assert got == pytest.approx([by_hand(judge, tokenizer, text) for text in texts], abs=1e-4)


def test_one_of_several_labels(model: Any, tokenizer: Any) -> None:
    judge = classifier(3, id2label={0: "bad", 1: "fair", 2: "good"}, label2id={"bad": 0, "fair": 1, "good": 2})
    for label, column in (("good", 2), ("fair", 1), (0, 0)):
        score = RewardModel(judge, tokenizer, label=label)
        result = fs.best_of_n(model, PROMPTS[0], 4, tokenizer=tokenizer, score=score, **OPTIONS)
        want = [by_hand(judge, tokenizer, PROMPTS[0] + c.text, column) for c in result.candidates]
        assert [c.score for c in result.candidates] == pytest.approx(want, abs=1e-4)
    judge.config.problem_type = "multi_label_classification"
    with torch.no_grad():
        logits = judge(torch.tensor([tokenizer("a word")["input_ids"]])).logits[0]
    got = RewardModel(judge, tokenizer, label="good")(["a"], [" word"])
    assert got == pytest.approx([float(torch.sigmoid(logits[2]).log())], abs=1e-4)


def test_a_chat_template_takes_two_messages(model: Any, tokenizer: Any) -> None:
    judge, chats = classifier(), copy.deepcopy(tokenizer)
    chats.chat_template = CHAT
    result = fs.best_of_n(model, PROMPTS[1], 4, tokenizer=tokenizer, score=RewardModel(judge, chats), **OPTIONS)
    text = "<|endoftext|>user: Use this\n<|endoftext|>assistant: {}\n"
    want = [by_hand(judge, tokenizer, text.format(c.text)) for c in result.candidates]
    assert [c.score for c in result.candidates] == pytest.approx(want, abs=1e-4)
    plain = RewardModel(judge, chats, chat=False)(["Use this"], [" word"])
    assert plain == pytest.approx([by_hand(judge, tokenizer, "Use this word")], abs=1e-4)


def test_prompts_as_ids_are_read_as_text(model: Any, tokenizer: Any) -> None:
    options = OPTIONS | {"tokenizer": tokenizer, "score": RewardModel(classifier(), tokenizer)}
    want = fs.best_of_n(model, PROMPTS, 3, **options)
    padded = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    for inputs in (padded, tokenizer(PROMPTS)["input_ids"], padded["input_ids"]):
        assert fs.best_of_n(model, inputs, 3, **options) == want


def test_a_text_that_is_too_long_costs_one_candidate(model: Any, tokenizer: Any) -> None:
    options = OPTIONS | {"tokenizer": tokenizer, "max_new_tokens": 30, "stop_strings": ["e"], "score": "mean_logprob"}
    plain = fs.best_of_n(model, "I", 8, **options)
    lengths = {c.index: len(tokenizer("I" + c.text)["input_ids"]) for c in plain.candidates}
    most = sorted(lengths.values())[4]
    long = [index for index, length in lengths.items() if length > most]
    assert 0 < len(long) < 8
    judge = classifier(max_position_embeddings=most)
    with pytest.warns(RuntimeWarning, match=f"{len(long)} of 8 candidates failed"):
        result = fs.best_of_n(model, "I", 8, **options | {"score": RewardModel(judge, tokenizer)})
    failed = [c for c in result.candidates if c.error is not None]
    assert sorted(c.index for c in failed) == sorted(long)
    assert f"the reward model reads 1 to {most} tokens, and this text with its prompt has" in str(failed[0].error)


def test_a_vote_and_a_reward_model(model: Any, tokenizer: Any) -> None:
    judge = classifier()
    options = OPTIONS | {"tokenizer": tokenizer, "score": RewardModel(judge, tokenizer)}
    result = fs.best_of_n(model, PROMPTS[0], 8, vote=lambda text: len(text.split()) % 2, round_size=2, **options)
    same = [c for c in result.candidates if c.answer == result.answer]
    assert result.best.score == max(c.score for c in same)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (1, {"label": "good"}, "label = 'good': expected one of the reward model's 1: LABEL_0"),
        (2, {}, "label = None: expected one of the reward model's 2: LABEL_0, LABEL_1"),
        (2, {"label": 2}, "label = 2: "),
        (1, {"batch_size": 0}, "batch_size = 0: expected at least 1"),
        (1, {"chat": True}, "chat=True: .* no chat template"),
        (1, {"tokenizer": None}, "tokenizer: expected the reward model's"),
    ],
)
def test_bad_arguments(tokenizer: Any, labels: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardModel(classifier(labels), **{"tokenizer": tokenizer} | options)


def test_a_reward_model_reads_text(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="tokenizer: expected one, since a reward model reads text"):
        fs.best_of_n(model, torch.tensor([[1, 2]]), 2, score=RewardModel(classifier(), tokenizer))
