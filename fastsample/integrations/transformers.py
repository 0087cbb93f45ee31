"""Hugging Face transformers (>= 5): a fused logits processor, and the whole sampling step for `model.generate`.

    from fastsample.integrations.transformers import fs_generate
    model.generate(**inputs, do_sample=True, temperature=0.8, top_p=0.95, custom_generate=fs_generate(seed=7))

What to fuse is read off the end of the processor list that `generate` has prepared, so that its options, defaults and
order are transformers' own. Whatever stands before the part that can be fused stays as it is.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)
from transformers.generation.stopping_criteria import StoppingCriteriaList

from fastsample.api import filter_logits
from fastsample.params import GREEDY_BELOW, SamplingParams, specs
from fastsample.rows import Seed
from fastsample.sampler import Sampler

__all__ = ["FastSampleLogitsProcessor", "Streamer", "fs_generate"]


class FastSampleLogitsProcessor(LogitsProcessor):
    """Temperature, top-k, top-p and min-p in one pass, with transformers' rules; the draw stays with `generate`.

    For code that takes logits processors only; `fs_generate` is faster and seeds each sequence. `generate` applies its
    own warpers after this one, and cuts to the top 50 unless told otherwise: pass it `top_k=0` and leave temperature,
    top_p and min_p unset, or they act twice.

        model.generate(**inputs, do_sample=True, top_k=0, logits_processor=[FastSampleLogitsProcessor(top_p=0.9)])

    Args:
        temperature, top_k, top_p, min_p: as in SamplingParams, one value or one per sequence.
        backend: as for `fastsample.sample`.

    Raises:
        TypeError, ValueError: bad parameter, or when called a row with a NaN, with +inf or with nothing above -inf.
    """

    supports_continuous_batching = False

    def __init__(
        self, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0, min_p: Any = 0.0, *, backend: str = "auto"
    ) -> None:
        self.params = SamplingParams(temperature, top_k, top_p, min_p, ties="all")
        self.backend = backend

    # transformers looks at the number of parameters: there must be exactly these two.
    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] divided by the temperature where a token is kept, -inf elsewhere; a new float32 tensor."""
        return filter_logits(scores, self.params, backend=self.backend)


class Streamer(Protocol):
    """What a streamer does; every BaseStreamer of transformers is one."""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's ids [B, L], then a step's token [B] at a time."""

    def end(self) -> None:
        """Generation is over."""


def fs_generate(
    seed: Seed | None = None,
    *,
    streamer: Streamer | None = None,
    backend: str = "auto",
    **fields: Any,
) -> Callable[..., Any]:
    """The argument `custom_generate` that gives the sampling step of `model.generate` to fastsample.

    Temperature, top-k, top-p, min-p, a repetition penalty that no other processor follows, and the draw become one
    call per step. Options that are not fused (typical_p, top_h, eta_cutoff, epsilon_cutoff, watermarking_config,
    renormalize_logits, guidance_scale, your own logits processors, ...) keep running as transformers' own processors;
    warpers before such an option in transformers' order then do too. With do_sample=False, `generate` is plain greedy.

    A sequence's tokens depend on its logits, its seed and the number of tokens generated so far: not on the batch, its
    slot, padding or earlier calls. But a model's own logits may differ in their last bits between batch shapes.

    Args:
        seed: an int s gives sequence i of the batch (after num_return_sequences) the seed splitmix64(s + i); a sequence
            holds one seed per sequence, used as it is. None takes a fresh seed from torch's default CPU generator at
            each call of `generate`; `torch.manual_seed` repeats it.
        streamer: gets the prompt and then each token. Passed to `generate` it would be lost, and is refused.
        backend: as for `fastsample.sample`.
        **fields: SamplingParams fields, one value or one per sequence, that replace `generate`'s: e.g.
            frequency_penalty=0.2, or temperature=[0.2, 1.0]. `ties` is "all" unless given.

    Returns:
        A callable for `custom_generate`; it may be used for any number of `generate` calls.

    Raises:
        TypeError, ValueError: bad field; or, from `generate`, seeds or fields of another length than the batch, an
            option that fastsample does not serve (beams, assisted, contrastive, ... named in the message), or a row of
            logits with a NaN, with +inf or with nothing above -inf.

    Two things never reach this callable: `cache_implementation="paged"` in a call of `generate` switches to continuous
    batching before it looks at `custom_generate`, and `stop_strings` fails for want of the tokenizer (pass a
    StopStringCriteria in `stopping_criteria` instead).
    """
    SamplingParams(**fields)  # a bad field should fail here, not after a model's forward pass

    def decode(
        model: Any,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        config = copy.copy(generation_config)
        _refuse_other_loops(model, config)
        sampled = bool(config.do_sample)
        plan = _plan(logits_processor, input_ids.shape[1], fields, sampled)
        if "repetition_penalty" in fields:
            plan.ignored = _left_padding(model, model_kwargs)
        step = _step(plan, input_ids, seed, backend, sampled)
        if isinstance(step, _Draw) and config.return_dict_in_generate and config.output_scores:
            step.kept = []
            stopping_criteria = _CriteriaOnScores(stopping_criteria, step.kept)
        config.do_sample = False  # the step leaves one token to choose, which greedy search then takes
        if streamer is not None:
            streamer.put(input_ids.cpu())  # as `generate` does with its own
        result = type(model)._sample(
            model,
            input_ids,
            logits_processor=LogitsProcessorList([*plan.own, *([] if step is None else [step])]),
            stopping_criteria=stopping_criteria,
            generation_config=config,
            streamer=streamer,
            **{"synced_gpus": _synced_gpus(model)} | model_kwargs,
        )
        if isinstance(step, _Draw) and step.kept is not None:
            result.scores = tuple(step.kept[: len(result.scores)])
        return result

    return decode


# What is fused -------------------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """What is done by whom at each step of one call of `generate`."""

    own: list[LogitsProcessor]  # stay as they are, in their order
    fields: dict[str, Any]  # the SamplingParams of what follows them
    ignored: int | torch.Tensor | None = None  # leading ids, of all or of each sequence, that were never "seen"


# In the order in which both `generate` and the contract apply them.
_FUSED: tuple[tuple[type[LogitsProcessor], str, str], ...] = (
    (RepetitionPenaltyLogitsProcessor, "repetition_penalty", "penalty"),
    (TemperatureLogitsWarper, "temperature", "temperature"),
    (TopKLogitsWarper, "top_k", "top_k"),
    (TopPLogitsWarper, "top_p", "top_p"),
    (MinPLogitsWarper, "min_p", "min_p"),
)

_AFTER_WARPERS = (
    TopHLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    WatermarkLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    LogitNormalization,
)

_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")

# HF's top_p = 0 keeps one token; so does a mass target of 0, for which the contract has no name but a tiny p.
_SMALLEST_TOP_P = 2.0**-40


def _plan(processors: LogitsProcessorList, prompt_length: int, given: dict[str, Any], sampled: bool) -> _Plan:
    """Take from the end of the list what one fused call does just as well, and put the given fields over it."""
    plan = _Plan(list(processors), {"ties": "all"} if sampled else {})
    # Greedy search stays transformers' own, but for a penalty that a given one replaces.
    stage = len(_FUSED) if sampled else int("repetition_penalty" in given)
    while plan.own and (found := _stage(plan.own[-1], stage, prompt_length)) is not None:
        _, name, attribute = _FUSED[stage := found]
        processor = plan.own.pop()
        plan.fields[name] = getattr(processor, attribute)
        plan.ignored = getattr(processor, "prompt_ignore_length", None)
    if plan.fields.get("top_p") == 0:
        plan.fields["top_p"] = _SMALLEST_TOP_P
    _check_given(given, plan.own, sampled)
    plan.fields |= given
    return plan


def _stage(processor: LogitsProcessor, before: int, prompt_length: int) -> int | None:
    """The processor's index in _FUSED, or None where it does not go before what is fused already."""
    kinds = [kind for kind, *_ in _FUSED[:before]]
    if type(processor) not in kinds or not _is_plain(processor, prompt_length):
        return None
    return kinds.index(type(processor))


def _is_plain(processor: LogitsProcessor, prompt_length: int) -> bool:
    """Whether the contract has words for this processor's settings."""
    if isinstance(processor, TemperatureLogitsWarper):
        # A smaller one is greedy in the contract, and merely cold in transformers.
        return bool(GREEDY_BELOW <= processor.temperature <= dict(specs())["temperature"].high)
    if isinstance(processor, RepetitionPenaltyLogitsProcessor):
        ignored = getattr(processor, "prompt_ignore_length", None)
        return ignored is None or int(torch.as_tensor(ignored).max()) <= prompt_length
    return getattr(processor, "filter_value", None) == -math.inf and getattr(processor, "min_tokens_to_keep", 1) == 1


def _check_given(given: dict[str, Any], own: list[LogitsProcessor], sampled: bool) -> None:
    """Refuse fields that would be without effect, or have their effect in the wrong place."""
    replaced = tuple(kind for kind, name, _ in _FUSED if name in given)
    for processor in own:
        if given and isinstance(processor, (*_AFTER_WARPERS, *replaced)):
            names = ", ".join(given)
            raise ValueError(
                f"fs_generate({names}=...): {type(processor).__name__} is not fused here, and would act before it; "
                f"leave one of them out, or set {names} on generate where it has that option"
            )
    idle = [name for name in given if name not in _PENALTIES]
    if idle and not sampled:
        raise ValueError(f"fs_generate({idle[0]}=...): without effect unless generate gets do_sample=True")


def _step(
    plan: _Plan, input_ids: torch.LongTensor, seed: Seed | None, backend: str, sampled: bool
) -> LogitsProcessor | None:
    """The processor that goes last; None where plain greedy search needs none."""
    params = SamplingParams(**plan.fields)
    history = _History(input_ids, plan.ignored, params)
    if sampled:
        return _Draw(params, history, seed, backend)
    return _Penalise(params, history, backend) if history.counts else None


class _History:
    """What the penalties of one `generate` call count: the prompt's ids, and those generated since."""

    def __init__(self, prompt: torch.Tensor, ignored: int | torch.Tensor | None, params: SamplingParams) -> None:
        values = [(getattr(params, name), getattr(SamplingParams, name)) for name in _PENALTIES]
        self.counts = any(isinstance(value, torch.Tensor) or value != neutral for value, neutral in values)
        self.length = prompt.shape[1]
        self.prompt_ids = prompt
        if ignored is not None:
            position = torch.arange(self.length, device=prompt.device)
            first = torch.as_tensor(ignored, device=prompt.device).reshape(-1, 1)
            self.prompt_ids = prompt.masked_fill(position < first, -1)

    def __call__(self, input_ids: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """prompt_ids and output_ids for the API; None where no penalty looks at them."""
        return (self.prompt_ids, input_ids[:, self.length :]) if self.counts else (None, None)


def _left_padding(model: Any, model_kwargs: dict[str, Any]) -> torch.Tensor | None:
    """How many ids each sequence starts with that are padding, int64 [B], as `generate` counts them."""
    encoder_decoder = model.config.is_encoder_decoder
    mask = model_kwargs.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
    return None if mask is None else (mask != 0).int().argmax(dim=1)


class _Penalise(LogitsProcessor):
    """Penalties alone, before greedy search."""

    def __init__(self, params: SamplingParams, history: _History, backend: str) -> None:
        self.params, self.history, self.backend = params, history, backend

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        prompt, output = self.history(input_ids)
        return filter_logits(scores, self.params, prompt_ids=prompt, output_ids=output, backend=self.backend)


class _Draw(LogitsProcessor):
    """Draws each sequence's token and returns scores that have their only maximum there.

    `generate` looks for that maximum and keeps nothing else of the scores, unless it collects them (output_scores). So
    one buffer of zeros and a single 1 per row serves every step, the clean scores are kept aside, and the scores that
    came in (of which transformers may hold a reference, as output_logits) are only read.
    """

    def __init__(self, params: SamplingParams, history: _History, seed: Seed | None, backend: str) -> None:
        self.params, self.history, self.backend = params, history, backend
        self.sampler = Sampler(params, batch_size=len(history.prompt_ids), seed=seed, backend=backend)
        self.kept: list[torch.Tensor] | None = None
        self.choice: torch.Tensor | None = None  # float32 [B, V]
        self.chosen: torch.Tensor | None = None  # int64 [B, 1], where it holds a 1

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        prompt, output = self.history(input_ids)
        tokens = self.sampler(scores, prompt_ids=prompt, output_ids=output).tokens
        if self.kept is not None:
            clean = filter_logits(scores, self.params, prompt_ids=prompt, output_ids=output, backend=self.backend)
            self.kept.append(clean)
        if self.choice is None or self.chosen is None:
            self.choice = torch.zeros(scores.shape, device=scores.device)
        else:
            self.choice.scatter_(1, self.chosen, 0.0)
        self.chosen = tokens[:, None]
        return self.choice.scatter_(1, self.chosen, 1.0)


class _CriteriaOnScores(StoppingCriteriaList):
    """The same stopping criteria, shown the clean scores."""

    def __init__(self, criteria: StoppingCriteriaList, kept: list[torch.Tensor]) -> None:
        super().__init__(criteria)
        self.kept = kept

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        done: torch.BoolTensor = super().__call__(input_ids, tuple(self.kept), **kwargs)
        return done


# What is not served --------------------------------------------------------------------------------------------------

_OTHER_LOOPS = (
    "constraints",
    "force_words_ids",
    "penalty_alpha",
    "dola_layers",
    "use_mtp",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
)
"""Options of `generate` that ask for another decoding loop than one token per step."""


def _refuse_other_loops(model: Any, config: GenerationConfig) -> None:
    """ValueError that names what asks for another decoding loop; delegating would drop it silently."""
    withheld = _withheld_by_generate()
    if withheld.get("streamer") is not None:
        raise ValueError(
            "streamer: generate does not hand it to custom_generate; use fs_generate(streamer=...) instead"
        )
    asked = [name for name in _OTHER_LOOPS if getattr(config, name, None) not in (None, False)]
    asked += ["assistant_model"] if withheld.get("assistant_model") is not None else []
    asked += ["num_beams"] if (config.num_beams or 1) > 1 else []
    asked += ["cache_implementation"] if config.cache_implementation == "paged" else []
    mode = config.get_generation_mode()
    if asked or mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(
            f"{', '.join(asked) or mode.value}: not served by fs_generate, which draws one token per sequence and step"
        )
    if type(model)._sample is not GenerationMixin._sample:
        raise ValueError(
            f"{type(model).__name__} has a decoding loop of its own (_sample), which fs_generate cannot enter"
        )


def _synced_gpus(model: Any) -> bool:
    """What `generate` makes of its argument, which it does not hand to `custom_generate` (ZeRO-3 would hang)."""
    asked = _withheld_by_generate().get("synced_gpus")
    return bool(model._extract_generation_mode_kwargs(None, {}, asked, None, None)["synced_gpus"])


_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__


def _withheld_by_generate() -> dict[str, Any]:
    """The arguments of the `generate` that called us: it keeps some from a callable, and only its frame has them."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _GENERATE:
        frame = frame.f_back
    names = ("streamer", "assistant_model", "synced_gpus")
    return {} if frame is None else {name: frame.f_locals.get(name) for name in names}
