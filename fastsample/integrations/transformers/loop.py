"""The decoding loop of `fs_generate`: transformers' own, except for the step that picks the tokens."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import ALL_CACHE_NAMES

from fastsample.inputs import Seed
from fastsample.integrations.grammar import Grammar, GrammarBatch, TruncatedWarning
from fastsample.integrations.grammar.batch import check_grammar
from fastsample.integrations.transformers import assisted
from fastsample.integrations.transformers.breakers import Breakers, check_breakers, sequence_breakers
from fastsample.integrations.transformers.generate import (
    hand_back,
    refuse_other_loops,
    refuse_paged,
    synced_gpus,
)
from fastsample.integrations.transformers.plan import Plan, make_plan
from fastsample.integrations.transformers.results import asked_for, reported, with_fields
from fastsample.integrations.transformers.rows import (
    Batch,
    Streamer,
    check_backend,
    check_offset,
    check_seed,
    check_streamer,
    sequence_grammars,
    sequence_offsets,
    sequence_params,
    sequence_seeds,
)
from fastsample.integrations.transformers.step import Clean, Criteria, Draw, Followed, Inputs, Progress
from fastsample.outputs import KeptForm, LogprobsMode, OnInvalid, Options
from fastsample.params import SamplingParams


@dataclass
class Record:
    """What is known of a call's sequences besides their ids.

    Attributes:
        start: length of the prompt.
        logprobs: float32 [B, steps], NaN after a sequence's end; None unless asked for.
        lengths: ids of each sequence, prompt included, up to its end.
        truncated: per sequence, whether its text is not a whole text of its grammar.
        errors: per sequence, why it was ended (it could have no token), or None.
    """

    start: int = 0
    logprobs: torch.Tensor | None = None
    lengths: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)


@dataclass(eq=False)
class Loop:
    """What `generate` calls as its custom_generate; `fs_generate` documents its arguments."""

    seed: Seed | None = None
    streamer: Streamer | None = None
    backend: str = "auto"
    grammar: Grammar | Sequence[Grammar | None] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    offset: Seed | Literal["prompt"] = 0
    tokenizer: Any = None
    logprobs: LogprobsMode | None = None
    on_invalid: OnInvalid = "raise"
    copies: int = 1  # sequences that each prompt branches into at its first step
    first_copy: int = 0  # their numbers begin here
    record: Record | None = None
    dry_breakers: Breakers | None = None
    kept: KeptForm | None = None
    kept_mass: bool = False
    entropy: bool = False

    def __post_init__(self) -> None:
        """Errors in the arguments alone are raised here, before the model runs."""
        SamplingParams(**self.fields)
        self.options.checked()
        check_backend(self.backend)
        if self.seed is not None:
            check_seed(self.seed)
        check_offset(self.offset)
        if self.dry_breakers is not None:
            check_breakers(self.dry_breakers, self.tokenizer)
            if "dry_multiplier" not in self.fields:
                raise ValueError("dry_breakers: without effect unless dry_multiplier is given too")
        if self.grammar is not None:
            check_grammar(self.grammar)
        if self.streamer is not None:
            check_streamer(self.streamer)

    @property
    def options(self) -> Options:
        """What is asked of each step."""
        return Options(
            logprobs=self.logprobs,
            on_invalid=self.on_invalid,
            backend=self.backend,
            kept=self.kept,
            kept_mass=self.kept_mass,
            entropy=self.entropy,
        )

    @property  # type: ignore[misc]  # an object may set its own
    def __class__(self) -> type[Loop]:
        """Read by `generate` (isinstance(custom_generate, str)) before it might drop us: the place to refuse."""
        refuse_paged()
        return Loop

    @property
    def __signature__(self) -> inspect.Signature:
        """`generate` reads this to tell our arguments from the model's."""
        hand_back(self.tokenizer)
        return inspect.signature(type(self).__call__.__get__(self))

    def __call__(
        self,
        model: Any,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        tokenizer: Any = None,
        assistant_model: Any = None,
        assistant_tokenizer: Any = None,
        inputs_tensor: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        config = copy.copy(generation_config)
        refuse_other_loops(model, config)
        drafter = assisted.drafter(model, config, assistant_model, len(input_ids) * self.copies)
        self._look_for_idle(config)
        sampled = bool(config.do_sample)
        padding = _left_padding(model, model_kwargs)
        plan = make_plan(logits_processor, input_ids.shape[1], self.fields, sampled, padding)
        progress = Progress(torch.zeros(len(input_ids) * self.copies, dtype=torch.int32, device=input_ids.device))
        batch = self._batch(len(input_ids), config)
        grammars = self._grammars(batch, config)
        pads = self._prepare_padding(grammars, len(progress.status), config)
        grammar = None if grammars is None else Followed(grammars, progress, self.on_invalid == "flag")
        lengths = _lengths(model, input_ids, config, model_kwargs)
        breakers = self._breakers(batch, input_ids, self.tokenizer if tokenizer is None else tokenizer)
        draw = self._draw(plan, grammar, input_ids, config, batch, lengths, progress, breakers)
        criteria = Criteria(stopping_criteria, grammar, progress, pads)
        processors = plan.own
        if draw is not None:
            processors = [*([] if draw.clean is None else [draw.clean]), *plan.own, draw]
            draw.filtered = criteria.filtered = [] if config.return_dict_in_generate and config.output_scores else None
        config.do_sample = False  # the step leaves one token to choose, which greedy search then takes
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())  # as `generate` does with its own
        synced = {"synced_gpus": synced_gpus(model)}
        loop, start = type(model)._sample, input_ids.shape[1]
        if drafter is not None:
            drafts = assisted.drafts(drafter, plan, draw, input_ids, breakers, assistant_tokenizer)
            more = {"assistant_model": assistant_model, "assistant_tokenizer": assistant_tokenizer}
            more |= {"tokenizer": tokenizer, "inputs_tensor": inputs_tensor} | synced | model_kwargs
            result = assisted.run(model, input_ids, processors, criteria, config, self.streamer, drafts, more)
            return self._report(result, draw, criteria, start)
        if self.copies > 1:
            model, input_ids, model_kwargs = _branch(model, input_ids, config, model_kwargs, self.copies)
        result = loop(
            model,
            input_ids,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=criteria,
            generation_config=config,
            streamer=self.streamer,
            **synced | model_kwargs,
        )
        return self._report(result, draw, criteria, start)

    def _look_for_idle(self, config: Any) -> None:
        """Warn of arguments, or refuse those, that have no effect here."""
        idle = [] if self.seed is None else ["seed"]
        idle += [] if isinstance(self.offset, Integral) and self.offset == 0 else ["offset"]
        if idle and not config.do_sample:
            warnings.warn(
                f"fs_generate({idle[0]}=...): without effect unless generate gets do_sample=True; "
                "greedy search draws no random numbers",
                UserWarning,
                stacklevel=2,
            )
        asked = asked_for(self.options)
        if asked and self.record is None and not config.return_dict_in_generate:
            raise ValueError(
                f"fs_generate({asked[0]}={getattr(self, asked[0])!r}): the ids alone have no room for it; "
                "call generate with return_dict_in_generate=True"
            )

    def _batch(self, rows: int, config: Any) -> Batch:
        """The sequences of this call."""
        if self.record is not None:
            return Batch(rows, unit="prompt")
        each = int(config.num_return_sequences or 1)
        return Batch(rows // each, each)

    def _grammars(self, batch: Batch, config: Any) -> GrammarBatch | None:
        if self.grammar is None:
            return None
        if self.copies > 1:
            batch = Batch(batch.prompts, self.copies, "candidate")
        given = sequence_grammars(self.grammar, batch)
        if all(item is None for item in given):
            return None
        stops = [] if config._eos_token_tensor is None else config._eos_token_tensor.tolist()
        return GrammarBatch(given, stops)

    def _breakers(self, batch: Batch, input_ids: torch.Tensor, tokenizer: Any) -> torch.Tensor | None:
        """DRY's breakers, int64 [L] for all sequences or [B, L] for each."""
        if self.dry_breakers is None:
            return None
        ids = sequence_breakers(self.dry_breakers, batch, tokenizer).to(input_ids.device)
        return ids if ids.ndim == 1 else ids.repeat_interleave(self.copies, 0)

    def _prepare_padding(self, grammar: GrammarBatch | None, rows: int, config: Any) -> bool:
        """Whether a sequence may end where `generate` would not end it, and so must be padded while others go on."""
        if grammar is None and self.on_invalid == "raise":
            return False
        if config._pad_token_tensor is None and (grammar is None or config._eos_token_tensor is None):
            padding = None if grammar is None else grammar.padding
            if padding is None and rows > 1:
                name = "on_invalid='flag'" if grammar is None else "grammar"
                raise ValueError(f"{name}: sequences of a batch end at different steps: give generate a pad_token_id")
            config._pad_token_tensor = torch.tensor(padding or 0)
        return True

    def _draw(
        self,
        plan: Plan,
        grammar: Followed | None,
        input_ids: torch.Tensor,
        config: Any,
        batch: Batch,
        lengths: torch.Tensor,
        progress: Progress,
        breakers: torch.Tensor | None,
    ) -> Draw | None:
        """The last processor, which draws; None when plain greedy search needs none."""
        sampled = bool(config.do_sample)
        params = sequence_params(SamplingParams(**plan.fields), batch)
        inputs = Inputs(plan, params, grammar, input_ids, self.copies, breakers)
        if not (sampled or inputs.needed or asked_for(self.options) or self.on_invalid == "flag"):
            return None
        return Draw(
            params,
            inputs,
            sequence_seeds(self.seed if sampled else 0, batch),
            sequence_offsets(self.offset if sampled else 0, lengths, batch),
            progress,
            self.options,
            sampled,
            self.copies,
            self.first_copy,
            int(config._pad_token_tensor) if self.on_invalid == "flag" else None,
            self.copies > 1 and isinstance(self.grammar, Sequence),
            Clean() if self.logprobs == "raw" and plan.own else None,
        )

    def _report(self, result: Any, draw: Draw | None, criteria: Criteria, start: int) -> Any:
        """The result, and what the ids do not show: beside them, in the record, or as a warning."""
        progress, plain = criteria.progress, isinstance(result, torch.Tensor)
        steps = (result if plain else result.sequences).shape[1] - start
        if draw is not None and draw.filtered is not None:
            result.scores = tuple(draw.filtered[:steps])
        truncated = [False] * len(progress.status) if criteria.grammar is None else criteria.grammar.truncated
        found = {} if draw is None else reported(draw.steps[:steps], progress, start)
        if self.record is not None:
            self.record.start, self.record.logprobs = start, found.get("logprobs")
            self.record.lengths = [] if progress.lengths is None else progress.lengths.tolist()
            self.record.truncated, self.record.errors = truncated, progress.errors
            return result
        more: dict[str, Any] = {} if self.grammar is None else {"truncated": torch.tensor(truncated)}
        more |= {} if self.on_invalid == "raise" else {"status": progress.status, "errors": progress.errors}
        if not plain:
            return with_fields(result, found | more)
        for row, reason in progress.reasons.items():
            warnings.warn(f"sequence {row} was ended: {reason}", UserWarning, stacklevel=2)
        if any(truncated):
            rows = ", ".join(str(row) for row, cut in enumerate(truncated) if cut)
            warnings.warn(
                f"generation ended before the grammar did: the text of sequence {rows} is truncated",
                TruncatedWarning,
                stacklevel=2,
            )
        return result


# One prefill for several sequences -----------------------------------------------------------------------------------


def _branch(
    model: Any, input_ids: torch.LongTensor, config: Any, model_kwargs: dict[str, Any], copies: int
) -> tuple[Any, torch.LongTensor, dict[str, Any]]:
    """What the loop needs to continue with several copies of each prompt.

    The prompts run once, here, and the cache is copied. With a kind of cache that cannot be copied, they run once per
    copy.
    """
    outputs = None
    if all(_can_be_copied(model_kwargs.get(name)) for name in ALL_CACHE_NAMES):
        outputs = model._prefill(input_ids, config, model_kwargs)
        caches = [outputs.get(name) for name in ALL_CACHE_NAMES]
        if not all(map(_can_be_copied, caches)):  # the model made a kind of its own
            outputs = None
        else:
            outputs.logits = outputs.logits[:, -1:].repeat_interleave(copies, dim=0)
            for cache in caches:
                if cache is not None:
                    cache.batch_repeat_interleave(copies)
    elif any(_is_in_use(model_kwargs.get(name)) for name in ALL_CACHE_NAMES):
        raise ValueError("cache: one that is in use already cannot be copied for each sequence, unless it is dynamic")
    input_ids, model_kwargs = model._expand_inputs_for_generation(
        copies, model.config.is_encoder_decoder, input_ids, **model_kwargs
    )
    return model if outputs is None else _Prefilled(model, outputs), input_ids, model_kwargs


_COPIED = ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "DummyLayer")
"""Layers of transformers.cache_utils that copy whole. Subclasses are left out: they hold more but copy no more."""


def _can_be_copied(cache: Any) -> bool:
    """Whether everything in a cache can be repeated for each sequence."""
    if cache is None:
        return True
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    if parts != [None, None]:
        return all(map(_can_be_copied, parts))
    if getattr(cache, "offloading", False):
        return False
    kinds = [type(layer) for layer in getattr(cache, "layers", ())]
    kinds = kinds or [getattr(cache, "layer_class_to_replicate", None) or type(cache)]
    return all(kind.__module__ == "transformers.cache_utils" and kind.__name__ in _COPIED for kind in kinds)


def _is_in_use(cache: Any) -> bool:
    """Whether a cache already holds tokens, or has allocated room for some number of sequences."""
    return cache is not None and (cache.get_seq_length() > 0 or bool(getattr(cache, "is_initialized", False)))


class _Prefilled:
    """A model whose prompts have already run."""

    def __init__(self, model: Any, outputs: Any) -> None:
        self._model, self._outputs = model, outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _prefill(self, *_: Any, **__: Any) -> Any:
        return self._outputs


def _left_padding(model: Any, model_kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The number of padding ids that each sequence starts with, int64 [B], as `generate` counts them."""
    mask = _mask(model, model_kwargs)
    return None if mask is None else (mask != 0).int().argmax(dim=1)


def _lengths(model: Any, input_ids: torch.Tensor, config: Any, model_kwargs: dict[str, Any]) -> torch.Tensor:
    """The number of ids of each sequence so far, int64 [B], without padding; those in the cache count too."""
    mask = _mask(model, model_kwargs)
    if mask is not None:
        return (mask != 0).sum(dim=1)
    # generate drops a mask that is all ones, and keeps its length.
    known = 0 if model.config.is_encoder_decoder else getattr(config, "_mask_length", 0)
    return torch.full((len(input_ids),), max(input_ids.shape[1], known))


def _mask(model: Any, model_kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The decoder's attention mask: which ids are not padding."""
    found = model_kwargs.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
    return found if isinstance(found, torch.Tensor) and found.ndim == 2 else None
