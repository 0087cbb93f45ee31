"""Assisted decoding: several tokens per run of the model, and the text that `fs_generate` gives without it.

A drafter (an assistant, a look into the text, the model's own first layers) proposes tokens; one run of the model gives
the rows of all of them. transformers' loop keeps the leading drafts that equal what is taken from the rows. Here that
is what plain decoding would draw, so drafts decide how many tokens a run yields, and never which.

The loop is transformers' own (`_assisted_decoding`): it knows the caches, masks and positions of each model. Two things
are put in its way. `Verifier` is its logits processor and treats a row as plain decoding treats a step, or not at all.
`_Drafted` stands for the model, so that drafters get logits processors of their own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import ALL_CACHE_NAMES

from fastsample.api import sample
from fastsample.integrations.transformers.plan import ONLY_IDS, Plan
from fastsample.integrations.transformers.rows import Streamer
from fastsample.integrations.transformers.step import Criteria, Draw, Inputs
from fastsample.params import SamplingParams

DRAFTERS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Options of `generate` that ask for drafts."""


def drafter(model: Any, config: GenerationConfig, assistant: Any, rows: int) -> str | None:
    """The option that asks for drafts, or None; ValueError where it cannot be served."""
    asked = [name for name in DRAFTERS if getattr(config, name, None) not in (None, False)]
    asked += ["assistant_model"] if assistant is not None else []
    if not asked:
        return None
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)}: each proposes the next tokens; give generate one of them")
    if getattr(config, "assistant_ensemble_weight", None) is not None:
        raise ValueError(
            f"assistant_ensemble_weight: not served by fs_generate, with which {asked[0]} does not change the text"
        )
    if rows > 1:
        raise ValueError(f"{asked[0]}: transformers drafts for one sequence at a time, got {rows}")
    if type(model)._assisted_decoding is not GenerationMixin._assisted_decoding:
        raise ValueError(
            f"{type(model).__name__} has an assisted loop of its own (_assisted_decoding), "
            "which fs_generate cannot enter"
        )
    return asked[0]


class Verifier(LogitsProcessor):
    """The step of plain decoding for each row that follows the text, in order; other rows are left alone.

    A row follows the text if its prefix is the text so far, so the rows after a wrong draft do not. Nothing is drawn
    there, no processor and no stopping criterion sees them, and what is wrong with them raises no error. Each position
    therefore gets its step exactly once, which is what `Draw` and processors with a state rely on.
    """

    def __init__(
        self, processors: list[LogitsProcessor], criteria: Criteria, config: GenerationConfig, start: int
    ) -> None:
        self._processors = LogitsProcessorList(processors)
        self._criteria, self._config = criteria, config
        self._scores: tuple[torch.Tensor, ...] | None = (
            () if config.return_dict_in_generate and config.output_scores and criteria.filtered is None else None
        )
        self.length = start  # of the text
        self.last: int | None = None  # its last token, once there is a new one
        self.over = False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        # The loop asks for the text and then for the text with more and more drafts. So a prefix as long as the text
        # can differ from it in its last token only, and none is that long after a wrong draft but in the next round.
        if self.over or input_ids.shape[1] != self.length or self.last not in (None, int(input_ids[0, -1])):
            return scores
        scores = self._processors(input_ids, scores)
        token = scores.argmax(dim=-1, keepdim=True)
        if self._scores is not None:
            self._scores += (scores.clone(),)
        self.length, self.last = self.length + 1, int(token)
        text: Any = torch.cat([input_ids, token], dim=-1)
        if bool(self._criteria(text, self._scores).all()):
            self.over = True
            # The loop looks at the criteria once for all new tokens, but it cuts those tokens to the longest text.
            self._config.max_length = self.length
        return scores


class _Over(StoppingCriteriaList):
    """What the loop asks instead of the stopping criteria, which have seen each token already."""

    def __init__(self, verifier: Verifier) -> None:
        super().__init__()
        self._verifier = verifier

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self._verifier.over, device=input_ids.device)  # type: ignore[return-value]


class _OneByOne:
    """Gives a streamer one token at a time, as plain decoding does, and none past the end of the text."""

    def __init__(self, streamer: Streamer, length: int, verifier: Verifier) -> None:
        self._streamer, self._length, self._verifier = streamer, length, verifier

    def put(self, value: torch.Tensor) -> None:
        for token in value.flatten()[: self._verifier.length - self._length]:
            self._streamer.put(token[None])
            self._length += 1

    def end(self) -> None:
        self._streamer.end()


class _Drafted:
    """A model whose drafter gets a configuration and logits processors of its own."""

    def __init__(self, model: Any, config: GenerationConfig, processors: LogitsProcessorList | None) -> None:
        self._model, self._config, self._processors = model, config, processors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def _get_candidate_generator(self, **kwargs: Any) -> Any:
        own = {"generation_config": self._config, "logits_processor": self._processors}
        generator = self._model._get_candidate_generator(**kwargs | own)
        propose, most = generator.get_candidates, self._config.max_length - 1

        def get_candidates(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            # Not every drafter stops before the end of the text, where the model may have no positions.
            ids, logits = propose(*args, **kwargs)
            return ids[:, :most], logits

        generator.get_candidates = get_candidates
        return generator


class Draft(LogitsProcessor):
    """Draws a drafted token as the text's token at that position will be drawn, but from the drafter's logits.

    With the same random number two rows that are alike mostly give the same token, at any temperature; the drafter's
    most probable token is right only as often as the model gives it.
    A draft is a function of its prefix; it has no state.
    """

    def __init__(self, own: list[LogitsProcessor], draw: Draw | None, inputs: Inputs, prompt: torch.Tensor) -> None:
        # One object for all: a drafter's own `generate` would replace processors of its own kinds by those in the list.
        self._own, self._inputs = LogitsProcessorList(own), inputs
        self._start, self._device = prompt.shape[1], prompt.device
        self._draw = draw

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        scores = self._own(input_ids, scores)
        if self._draw is None:
            return scores
        draw, table = self._draw, scores.to(self._device)
        ids: Any = input_ids.to(self._device)
        out = sample(
            table,
            draw.params if draw.sampled else draw.params.replace(temperature=0.0),
            seed=draw.seeds,
            offset=draw.offsets + (ids.shape[1] - self._start),
            logprobs="processed" if draw.sampled else "raw",  # greedy search is always sure
            on_invalid="flag",
            backend=draw.options.backend,
            **self._inputs(ids, table),
        )
        assert out.logprobs is not None
        if bool(out.status.any()):
            return scores  # the drafter's own choice is as good as any
        # The best score is at the token, and its softmax there is the token's probability: drafters end a draft early
        # when that is below assistant_confidence_threshold.
        best = (out.logprobs.exp().logit() + math.log(max(scores.shape[1] - 1, 1))).clamp(0.01, 60)
        return torch.zeros_like(scores).scatter(1, out.tokens[:, None].to(scores.device), best[:, None].to(scores))


_UNSET: dict[str, Any] = {
    "guidance_scale": None,
    "sequence_bias": None,
    "encoder_repetition_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "watermarking_config": None,
    "renormalize_logits": False,
    "stop_strings": None,
    "max_time": None,
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")),
}
"""Options that a drafter's own `generate` would turn into processors and criteria, a second time or with an error."""


def drafts(
    drafter: str,
    plan: Plan,
    draw: Draw | None,
    prompt: torch.Tensor,
    breakers: torch.Tensor | None,
    assistant_tokenizer: Any,
) -> LogitsProcessorList | None:
    """The logits processors of a drafter; None if its ids are not the model's, or if it has no logits.

    Nothing of the caller's is among them (functions, processors, grammars), which must not be called for a draft.
    """
    if drafter == "prompt_lookup_num_tokens" or assistant_tokenizer is not None:
        return None
    own = [copy.deepcopy(processor) for processor in plan.own if type(processor) in ONLY_IDS]
    params = SamplingParams() if draw is None else draw.params
    return LogitsProcessorList(
        [Draft(own, draw, Inputs(replace(plan, allowed=None), params, None, prompt, 1, breakers), prompt)]
    )


def run(
    model: Any,
    input_ids: torch.LongTensor,
    processors: list[LogitsProcessor],
    criteria: Criteria,
    config: GenerationConfig,
    streamer: Streamer | None,
    drafts: LogitsProcessorList | None,
    more: dict[str, Any],
) -> Any:
    """What `_sample` of the model gives for these processors and criteria, by its assisted loop.

    Args:
        config: with do_sample=False, which makes the loop take the best token of each row; its max_length may change.
        drafts: what the drafter's logits go through.
        more: the loop's other arguments.
    """
    start = input_ids.shape[1]
    verifier = Verifier(processors, criteria, config, start)
    drafting = copy.copy(config)
    for name, value in _UNSET.items():
        setattr(drafting, name, value)
    with _layers_put_back(model):
        result = type(model)._assisted_decoding(
            _Drafted(model, drafting, drafts),
            input_ids,
            logits_processor=LogitsProcessorList([verifier]),
            stopping_criteria=_Over(verifier),
            generation_config=config,
            streamer=None if streamer is None else _OneByOne(streamer, start, verifier),
            **more,
        )
    return _cut(result, start, verifier.length)


@contextmanager
def _layers_put_back(model: Any) -> Iterator[None]:
    """An early exit takes layers away from the model's configuration, and forgets that when it fails."""
    config = getattr(model, model.base_model_prefix, model).config
    layers = getattr(config, "num_hidden_layers", None)
    try:
        yield
    finally:
        if layers is not None and config.num_hidden_layers != layers:
            config.num_hidden_layers = layers


def _cut(result: Any, start: int, length: int) -> Any:
    """The result without what follows the text: the loop of older transformers does not look at max_length."""
    if isinstance(result, torch.Tensor):
        return result[:, :length]
    more = result.sequences.shape[1] - length
    if more > 0:
        result.sequences = result.sequences[:, :length]
        for name, steps in list(result.items()):
            if isinstance(steps, tuple):
                result[name] = steps[: length - start]
        for name in ALL_CACHE_NAMES:
            if result.get(name) is not None:
                result[name].crop(-more)
    return result
