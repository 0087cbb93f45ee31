"""Which options leave a sequence without a token, by the names that the caller knows."""

from __future__ import annotations

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

# They depend on the ids alone, so they can run a second time. min_new_tokens adds a min_length of its own, which
# therefore comes last: of two options that forbid the same tokens, the later one is not named.
_NAMES: dict[type[LogitsProcessor], str] = {
    MinNewTokensLengthLogitsProcessor: "min_new_tokens",
    SuppressTokensLogitsProcessor: "suppress_tokens",
    SuppressTokensAtBeginLogitsProcessor: "begin_suppress_tokens",
    NoBadWordsLogitsProcessor: "bad_words_ids",
    NoRepeatNGramLogitsProcessor: "no_repeat_ngram_size",
    SequenceBiasLogitsProcessor: "sequence_bias",
    MinLengthLogitsProcessor: "min_length",
}


def culprits(
    row: int,
    ids: torch.Tensor,
    scores: torch.Tensor,
    own: list[LogitsProcessor],
    masks: dict[str, torch.Tensor],
) -> list[str]:
    """A minimal set of options that together forbid a sequence every token; empty if it has one left.

    Args:
        row: which sequence.
        ids: [1, L], its ids.
        scores: float32 [V], its logits after the processors.
        own: those processors.
        masks: further masks of allowed tokens, by name, bool [V].
    """
    allowed = masks | _allowed(row, ids, scores, own)
    known = torch.ones_like(scores, dtype=torch.bool)
    for rule in allowed.values():
        known &= rule
    rest = (scores > -torch.inf) | ~known
    others = [type(processor).__name__ for processor in own if type(processor) not in _NAMES]
    allowed[", ".join(others) or "the model's logits"] = rest
    if bool((known & rest).any()):
        return []
    for name in reversed(list(allowed)):
        without = [rule for other, rule in allowed.items() if other != name]
        if without and not bool(torch.stack(without).all(0).any()):
            del allowed[name]
    return list(allowed)


def _allowed(row: int, ids: torch.Tensor, scores: torch.Tensor, own: list[LogitsProcessor]) -> dict[str, torch.Tensor]:
    """What each processor alone allows, bool [V]."""
    found = {}
    for processor in own:
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            rule = torch.zeros_like(scores, dtype=torch.bool)
            rule[torch.as_tensor(processor._prefix_allowed_tokens_fn(row, ids[0]), dtype=torch.int64)] = True
            found["prefix_allowed_tokens_fn"] = rule
        elif type(processor) in _NAMES:
            left = processor(ids, torch.zeros_like(scores)[None])[0]
            found[_NAMES[type(processor)]] = left > -torch.inf
    return {name: found[name] for name in ("prefix_allowed_tokens_fn", *_NAMES.values()) if name in found}


def told(row: int, names: list[str]) -> str:
    """The message that these options leave a sequence without a token."""
    if not names:
        return f"row {row} has no logit above -inf (everything is masked)"
    if len(names) == 1:
        return f"{names[0]}: allows no token (row {row})"
    every = f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{every} together allow no token: row {row} has no logit above -inf (everything is masked)"
