"""What `generate` does not pass to its custom_generate, and how fs_generate gets it anyway.

`generate` acts on some options before it looks at custom_generate, and passes others to no callable. But it looks at
the callable twice on its way: it asks whether it is a str, and it reads its signature. Those are the moments to act.
"""

from __future__ import annotations

import inspect
import sys
from types import CodeType, FrameType
from typing import Any

from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
_EXTRACT = GenerationMixin._extract_generation_mode_kwargs.__code__

_OTHER_LOOPS = (
    "constraints",
    "force_words_ids",
    "penalty_alpha",
    "dola_layers",
)
"""Options of `generate` that ask for another decoding loop than one token per step."""


def refuse_paged() -> None:
    """ValueError when the caller's caller is a `generate` about to drop its custom_generate silently."""
    frame = sys._getframe(2)
    if frame.f_code is _GENERATE and frame.f_locals["kwargs"].get("cache_implementation") == "paged":
        raise ValueError(
            "cache_implementation='paged': generate switches to continuous batching and drops custom_generate; use "
            "fastsample.integrations.transformers.batching.generate_batch, or leave cache_implementation out"
        )


def hand_back(own: Any) -> None:
    """Put what a callable may claim back among the arguments of the `generate` that is reading our signature.

    `generate` takes the tokenizers and the assistant out before a callable can claim them. It then misses them itself:
    the tokenizer when it makes the criterion of stop_strings, and all of them when it checks that they go together.
    `own` is fs_generate's tokenizer, used when `generate` was given none.
    """
    frame = _frame_of(_EXTRACT)
    if frame is not None:
        given = {"tokenizer": own} | frame.f_locals.get("generation_mode_kwargs", {})
        for name in ("tokenizer", "assistant_tokenizer", "assistant_model"):
            if given.get(name) is not None:
                frame.f_locals["kwargs"].setdefault(name, given[name])


def refuse_other_loops(model: Any, config: GenerationConfig) -> None:
    """ValueError that names the option which asks for another decoding loop: going on would drop it silently."""
    withheld = _withheld()
    if withheld.get("streamer") is not None:
        raise ValueError(
            "streamer: generate does not hand it to custom_generate; use fs_generate(streamer=...) instead"
        )
    asked = [name for name in _OTHER_LOOPS if getattr(config, name, None) not in (None, False)]
    asked += ["num_beams"] if (config.num_beams or 1) > 1 else []
    asked += ["cache_implementation"] if config.cache_implementation == "paged" else []
    mode = config.get_generation_mode()
    served = (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH, GenerationMode.ASSISTED_GENERATION)
    if asked or mode not in served:
        raise ValueError(
            f"{', '.join(asked) or mode.value}: not served by fs_generate, which draws one token for each position"
        )
    if type(model)._sample is not GenerationMixin._sample:
        raise ValueError(
            f"{type(model).__name__} has a decoding loop of its own (_sample), which fs_generate cannot enter"
        )


def synced_gpus(model: Any) -> bool:
    """The value `generate` computes from its argument but does not pass to custom_generate (ZeRO-3 would hang)."""
    asked = _withheld().get("synced_gpus")
    return bool(model._extract_generation_mode_kwargs(None, {}, asked, None, None)["synced_gpus"])


def _withheld() -> dict[str, Any]:
    """Arguments of the `generate` that called us which it passes to no callable: only its frame has them."""
    frame = _frame_of(_GENERATE)
    names = ("streamer", "synced_gpus")
    return {} if frame is None else {name: frame.f_locals.get(name) for name in names}


def _frame_of(code: CodeType) -> FrameType | None:
    """The innermost running call of a function."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame
