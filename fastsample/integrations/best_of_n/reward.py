"""What a text is worth: its own log-probability, a callable's opinion, or that of a reward model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from fastsample.checks import whole
from fastsample.integrations.best_of_n.rank import Drawn

Score: TypeAlias = "Literal['mean_logprob'] | Callable[[str, list[int], list[float]], float] | RewardModel | str | Path"


class RewardModel:
    """A sequence-classification model as the scorer of `best_of_n`.

        best_of_n(model, prompts, 8, tokenizer=tokenizer, score=RewardModel("my-reward-model"))

    A model with one label scores a text by its logit (Stiennon et al. 2020), one with several by the log-probability of
    one of them. It reads prompt and continuation: as a chat's two messages if its tokenizer has a chat template,
    else one after the other. Calling it with equally many prompts and texts returns a float for each.

    Args:
        model: a folder or name that AutoModelForSequenceClassification loads, or a loaded model.
        tokenizer: of the reward model, which often is not the generating model's; None loads the folder's.
        label: which of several labels, by its name or number; with one label there is nothing to choose.
        batch_size: texts that run at once, at most; one at a time where the model has no padding token.
        chat: whether to use the chat template; None where there is one.

    Raises:
        TypeError, ValueError: bad argument, by its name.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        label: str | int | None = None,
        batch_size: int = 8,
        chat: bool | None = None,
    ) -> None:
        if isinstance(model, (str, os.PathLike)):
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
            model = AutoModelForSequenceClassification.from_pretrained(model, use_safetensors=True)
        if tokenizer is None:
            raise ValueError("tokenizer: expected the reward model's, since it comes without a folder")
        if whole("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size = {batch_size}: expected at least 1")
        template = getattr(tokenizer, "chat_template", None)
        if chat and template is None:
            raise ValueError("chat=True: the reward model's tokenizer has no chat template")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.chat = template is not None if chat is None else chat
        self.column = _column(model.config, label)
        self.batch_size = batch_size if getattr(model.config, "pad_token_id", None) is not None else 1

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
        """The score of each text after its prompt; ValueError where one has more tokens than the model can read."""
        return self.rated([self.encoded(prompt, text) for prompt, text in zip(prompts, texts, strict=True)])

    def rated(self, rows: Sequence[list[int]]) -> list[float]:
        """The score of each text, of which these are the ids."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding
        found: dict[int, float] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            found |= zip(batch, self._scores([rows[i] for i in batch]), strict=True)
        return [found[i] for i in range(len(rows))]

    def encoded(self, prompt: str, text: str) -> list[int]:
        """What the model reads of a prompt and its continuation."""
        if self.chat:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            whole_text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        else:
            whole_text = prompt + text
        ids = self.tokenizer(whole_text, add_special_tokens=not self.chat, verbose=False)["input_ids"]
        most = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", math.inf))
        if not 0 < len(ids) <= most:
            raise ValueError(f"the reward model reads 1 to {most} tokens, and this text with its prompt has {len(ids)}")
        return list(ids)

    @torch.inference_mode()
    def _scores(self, rows: list[list[int]]) -> list[float]:
        longest, pad = max(map(len, rows)), getattr(self.model.config, "pad_token_id", None)
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.model.device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
        if logits.shape[1] > 1:
            several = self.model.config.problem_type == "multi_label_classification"
            logits = torch.nn.functional.logsigmoid(logits) if several else logits.log_softmax(-1)
        return [float(value) for value in logits[:, self.column]]


def scores(score: Score, prompts: Sequence[str], drawn: Sequence[Drawn]) -> list[Any]:
    """What a scorer says of each candidate, unchecked, or the exception that it raised; None where one has an error."""
    values: list[Any] = [None] * len(drawn)
    sound = [i for i, each in enumerate(drawn) if each.error is None]
    if isinstance(score, RewardModel):
        rows = {}
        for i in sound:
            try:
                rows[i] = score.encoded(prompts[i], drawn[i].text)
            except ValueError as error:
                values[i] = error
        for i, value in zip(rows, score.rated(list(rows.values())), strict=True):
            values[i] = value
        return values
    for i in sound:
        _, tokens, logprobs, *_ = drawn[i]
        if not callable(score):
            values[i] = math.fsum(logprobs) / len(logprobs)
            continue
        try:
            values[i] = score(drawn[i].text, list(tokens), list(logprobs))
        except Exception as error:
            values[i] = error
    return values


def _column(config: Any, label: str | int | None) -> int:
    """Which of the model's logits is the score."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if label is None and len(names) == 1:
        return 0
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    raise ValueError(f"label = {label!r}: expected one of the reward model's {len(names)}: {', '.join(names)}")
