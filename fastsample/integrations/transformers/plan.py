"""Which of the processors that `generate` has prepared become part of the fused call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
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

from fastsample.params import GREEDY_BELOW, specs


@dataclass
class Plan:
    """Who does what at each step of one call of `generate`."""

    own: list[LogitsProcessor]  # run unchanged, in their order
    fields: dict[str, Any]  # the SamplingParams that replace the rest
    ignored: int | torch.Tensor | None = None  # leading ids, for all or per sequence, that do not count as seen
    bias: dict[int, float] | None = None
    allowed: Callable[[int, torch.Tensor], list[int]] | None = None  # prefix_allowed_tokens_fn


# In the order in which `generate` applies them. The contract's order differs only in the mask of allowed tokens, which
# comes first; that changes nothing, since -inf stays -inf under a finite bias and under a penalty.
_FUSED: tuple[tuple[type[LogitsProcessor], str, str], ...] = (
    (SequenceBiasLogitsProcessor, "bias", "sequence_bias"),
    (RepetitionPenaltyLogitsProcessor, "repetition_penalty", "penalty"),
    (PrefixConstrainedLogitsProcessor, "allowed", "_prefix_allowed_tokens_fn"),
    (TemperatureLogitsWarper, "temperature", "temperature"),
    (TopKLogitsWarper, "top_k", "top_k"),
    (TopPLogitsWarper, "top_p", "top_p"),
    (MinPLogitsWarper, "min_p", "min_p"),
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

# In transformers top_p = 0 keeps one token. The contract has 0 < p, and a tiny p keeps one token too.
_SMALLEST_TOP_P = 2.0**-40


def make_plan(processors: LogitsProcessorList, prompt_length: int, given: dict[str, Any], sampled: bool) -> Plan:
    """Take from the end of the list what one fused call can do, and let the given fields override it."""
    plan = Plan([], {"ties": "all"} if sampled else {})
    # Greedy search stays transformers' own, except for a penalty that a given field replaces.
    stage = len(_FUSED) if sampled else 2 * ("repetition_penalty" in given)
    rest = list(processors)
    while rest:
        found = _stage(rest, stage, prompt_length)
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
    return plan


def _fuse(plan: Plan, processor: LogitsProcessor, stage: int) -> None:
    _, name, attribute = _FUSED[stage]
    value = getattr(processor, attribute)
    if name == "bias":
        plan.bias = {int(ids[0]): float(bias) for ids, bias in value.items()}
    elif name == "allowed":
        plan.allowed = value
    else:
        plan.fields[name] = value
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
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        return True
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
    idle = [name for name in given if name not in _PENALTIES]
    if idle and not sampled:
        raise ValueError(f"fs_generate({idle[0]}=...): without effect unless generate gets do_sample=True")
