"""Which of the processors that `generate` has prepared become part of the fused call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

from fastsample.checks import to_float32
from fastsample.params import GREEDY_BELOW, specs


@dataclass
class Plan:
    """Who does what at each step of one call of `generate`."""

    own: list[LogitsProcessor]  # run unchanged, in their order
    fields: dict[str, Any]  # the SamplingParams that replace the rest
    ignored: int | torch.Tensor | None = None  # leading ids, for all or per sequence, that are not part of the text
    bias: dict[int, float] | None = None
    allowed: Callable[[int, torch.Tensor], list[int]] | None = None  # prefix_allowed_tokens_fn


# In the order in which `generate` applies them. The contract's order differs only in the mask of allowed tokens, which
# comes first; that changes nothing, since -inf stays -inf under a finite bias and under a penalty.
_FUSED: tuple[tuple[type[LogitsProcessor], str, str], ...] = (
    (SequenceBiasLogitsProcessor, "bias", "sequence_bias"),
    (RepetitionPenaltyLogitsProcessor, "repetition_penalty", "penalty"),
    (NoRepeatNGramLogitsProcessor, "no_repeat_ngram_size", "ngram_size"),
    (PrefixConstrainedLogitsProcessor, "allowed", "_prefix_allowed_tokens_fn"),
    (TemperatureLogitsWarper, "temperature", "temperature"),
    (TopKLogitsWarper, "top_k", "top_k"),
    (TopPLogitsWarper, "top_p", "top_p"),
    (MinPLogitsWarper, "min_p", "min_p"),
    (TypicalLogitsWarper, "typical_p", "mass"),
    (EpsilonLogitsWarper, "epsilon_cutoff", "epsilon"),
    (EtaLogitsWarper, "eta_cutoff", "epsilon"),
)

# They set some scores to -inf and depend on the ids alone, so, for the same reason, fused processors may pass them.
_MASKS = (
    NoRepeatNGramLogitsProcessor,
    NoBadWordsLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)

ONLY_IDS = (
    *_MASKS,
    *(kind for kind, name, _ in _FUSED if name != "allowed"),
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    TopHLogitsWarper,
)
"""Processors that are a function of the ids and scores of a call, with nothing of the caller's in them."""

_AFTER_WARPERS = (
    TopHLogitsWarper,
    WatermarkLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    LogitNormalization,
)

HISTORY = frozenset(name for name, spec in specs() if spec.counts or spec.of_history)
"""Fields that edit logits by the ids of the text so far. Greedy search obeys them too."""

_LOOK_BACK = {name for name, spec in specs() if spec.counts and spec.of_history}  # of all of the text but the padding

# In transformers top_p = 0 keeps one token. The contract has 0 < p, and a tiny p keeps one token too.
_SMALLEST_TOP_P = 2.0**-40


def make_plan(
    processors: LogitsProcessorList,
    prompt_length: int,
    given: dict[str, Any],
    sampled: bool,
    padding: torch.Tensor | None = None,
) -> Plan:
    """Take from the end of the list what one fused call can do, and let the given fields override it.

    Args:
        padding: the number of padding ids that each sequence starts with, int64 [B]; None where there is no padding.
    """
    plan = Plan([], {"ties": "all"} if sampled else {})
    stage = len(_FUSED) if sampled else _replaced_in_greedy_search(given)
    rest = list(processors)
    while rest:
        found = _stage(rest, stage, prompt_length)
        if found is not None and _reads_other_ids(rest[-1], {*plan.fields, *given}, padding):
            found = None
        if found is not None:
            _fuse(plan, rest.pop(), stage := found)
        elif type(rest[-1]) in _MASKS:
            plan.own.insert(0, rest.pop())
        else:
            break
    plan.own = rest + plan.own
    if plan.fields.get("top_p") == 0:
        plan.fields["top_p"] = _SMALLEST_TOP_P
    _check_given(given, plan.own, sampled)
    plan.fields |= given
    if _LOOK_BACK & plan.fields.keys() or "repetition_penalty" in given:
        plan.ignored = padding
    return plan


def _replaced_in_greedy_search(given: dict[str, Any]) -> int:
    """How many of _FUSED may be fused: greedy search stays transformers' own, but for what a given field replaces."""
    return max((at for at, (_, name, _) in enumerate(_FUSED, 1) if name in given and name in HISTORY), default=0)


def _reads_other_ids(processor: LogitsProcessor, fields: set[str], padding: torch.Tensor | None) -> bool:
    """Whether a repetition penalty leaves out other ids than the padding while a field reads the same text."""
    if not isinstance(processor, RepetitionPenaltyLogitsProcessor) or not _LOOK_BACK & fields:
        return False
    ignored = getattr(processor, "prompt_ignore_length", None)
    first, other = (torch.as_tensor(0 if ids is None else ids).cpu() for ids in (ignored, padding))
    return bool((first != other).any())


def _fuse(plan: Plan, processor: LogitsProcessor, stage: int) -> None:
    _, name, attribute = _FUSED[stage]
    value = getattr(processor, attribute)
    if name == "bias":
        plan.bias = {int(ids[0]): float(bias) for ids, bias in value.items()}
    elif name == "allowed":
        plan.allowed = value
    else:
        plan.fields[name] = value.item() if isinstance(value, torch.Tensor) else value
        plan.ignored = getattr(processor, "prompt_ignore_length", plan.ignored)


def _stage(processors: list[LogitsProcessor], before: int, prompt_length: int) -> int | None:
    """The last processor's index in _FUSED, or None if it may not come before what is fused already."""
    processor = processors[-1]
    kinds = [kind for kind, *_ in _FUSED[:before]]
    if type(processor) not in kinds or not _is_plain(processor, prompt_length):
        return None
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        # If nothing it allows is left, transformers allows it again; so what may leave nothing must not precede it.
        fused_too = (SequenceBiasLogitsProcessor, RepetitionPenaltyLogitsProcessor)
        if not all(type(p) in fused_too and _is_plain(p, prompt_length) for p in processors[:-1]):
            return None
    return kinds.index(type(processor))


def _is_plain(processor: LogitsProcessor, prompt_length: int) -> bool:
    """Whether the contract can express this processor's settings."""
    if isinstance(processor, TemperatureLogitsWarper):
        # A smaller temperature is greedy in the contract, but not in transformers.
        return bool(GREEDY_BELOW <= processor.temperature <= dict(specs())["temperature"].high)
    if isinstance(processor, RepetitionPenaltyLogitsProcessor):
        ignored = getattr(processor, "prompt_ignore_length", None)
        return ignored is None or int(torch.as_tensor(ignored).max()) <= prompt_length
    if isinstance(processor, SequenceBiasLogitsProcessor):
        biases = processor.sequence_bias.items()
        return all(len(ids) == 1 and math.isfinite(bias) for ids, bias in biases)
    if isinstance(processor, (PrefixConstrainedLogitsProcessor, NoRepeatNGramLogitsProcessor)):
        return True
    if isinstance(processor, (TypicalLogitsWarper, EpsilonLogitsWarper, EtaLogitsWarper)):
        value = processor.mass if isinstance(processor, TypicalLogitsWarper) else processor.epsilon
        if not 0 < to_float32(float(value)) < 1:  # float32 may round it out of the range
            return False
    return getattr(processor, "filter_value", None) == -math.inf and getattr(processor, "min_tokens_to_keep", 1) == 1


def _check_given(given: dict[str, Any], own: list[LogitsProcessor], sampled: bool) -> None:
    """Refuse fields that would have no effect, or would take effect in the wrong place."""
    replaced = tuple(kind for kind, name, _ in _FUSED if name in given)
    for processor in own:
        if given and isinstance(processor, (*_AFTER_WARPERS, *replaced)):
            names = ", ".join(given)
            raise ValueError(
                f"fs_generate({names}=...): {type(processor).__name__} is not fused here, and would act before it; "
                f"leave one of them out, or set {names} on generate where it has that option"
            )
    idle = [name for name in given if name not in HISTORY]
    if idle and not sampled:
        raise ValueError(f"fs_generate({idle[0]}=...): without effect unless generate gets do_sample=True")
