"""vLLM (0.32 and 0.33): top-k, top-p and the draw by fastsample, in both model runners.

Installing fastsample beside vLLM is all there is to do: the entry point `vllm.general_plugins` calls `register` in
every process that vLLM starts. `FASTSAMPLE_VLLM=0` in the environment (or a `VLLM_PLUGINS` without `fastsample`) leaves
vLLM as it is.

What is taken over, and what stays vLLM's:

| stage | runner V1 (`TopKTopPSampler`) | runner V2 (`Sampler._sample_random`) |
|---|---|---|
| bitmask, allowed ids, bad words, bias, penalties, processors | vLLM | vLLM |
| greedy | vLLM | fastsample (lowest id among the maxima; vLLM's kernels too) |
| temperature, min-p | vLLM, before we are called; not done twice | vLLM, before we are called; not done twice |
| top-k, top-p | fastsample, ties at the k-th value are kept | fastsample, ties at the k-th value are kept |
| draw | fastsample | fastsample |
| seed of a seeded request | its seed; offset: its draws so far | its seed; offset: position of the last token |
| seed of any other request | fresh from torch's default CPU generator | the one that vLLM gives it |
| log-probabilities, ranks, all four modes | vLLM, of the kept set | vLLM, of the kept set |
| speculative decoding | vLLM; V1's bonus token is drawn by fastsample | vLLM |
| beam search, watermarks, pooling | vLLM | vLLM |

A seeded request gives the same tokens alone and in any batch, as far as the model's own logits do not depend on the
batch. Its tokens are not those that vLLM's own sampler would draw for that seed.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from vllm.logger import init_logger

from fastsample.checks import CPU
from fastsample.inputs import pack_seeds
from fastsample.integrations.serving import Step

__all__ = ["register"]

logger = init_logger("vllm.plugins.fastsample")

# vLLM's PyTorch sampler keeps what equals the k-th value. It has applied temperature and min-p when it calls us.
_STEP = Step(
    logger,
    "top-k, top-p and the draw",
    "all other stages stay vLLM's, speculative decoding's rejection sampler among them",
    ties="all",
)
_PROCESSED = ("processed_logits", "processed_logprobs")


def register() -> None:
    """Swap the samplers of both model runners; a second call changes nothing. Does nothing with FASTSAMPLE_VLLM=0."""
    if os.environ.get("FASTSAMPLE_VLLM") == "0":
        return
    v1, v2 = "vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler", "vllm.v1.worker.gpu.sample.sampler.Sampler"
    _swap(v1, "__init__", _init_v1, "forward_native", ("logits", "generators", "k", "p"))
    known = ("processed_logits", "expanded_idx_mapping", "idx_mapping_np", "pos", "top_k", "top_p")
    _swap(v2, "_sample_random", _sample_random_v2, "_sample_random", known)


def _swap(where: str, name: str, ours: Callable[..., Any], called: str, known: tuple[str, ...]) -> None:
    """Replace a method of a class by ours(theirs, self, ...), once.

    Where there is no such class, or its method `called` has other arguments than we know, it stays as it is, with a
    warning: a plugin that raises would stop vLLM.
    """
    module, _, class_name = where.rpartition(".")
    try:
        owner = getattr(import_module(module), class_name)
        theirs, found = getattr(owner, name), tuple(inspect.signature(getattr(owner, called)).parameters)
    except (ImportError, AttributeError) as error:
        _STEP.say(logging.WARNING, f"{where} cannot be swapped in this vLLM: {error}")
        return
    if hasattr(theirs, "_fastsample"):
        return
    if found[1 : len(known) + 1] != known:
        _STEP.say(logging.WARNING, f"{where} cannot be swapped in this vLLM: {called} takes {found[1:]}, not {known}")
        return

    @functools.wraps(theirs)
    def swapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(theirs, self, *args, **kwargs)

    swapped._fastsample = True  # type: ignore[attr-defined]
    setattr(owner, name, swapped)


def _left(logits: torch.Tensor) -> bool:
    """Whether vLLM must sample these logits itself, which is said once."""
    reason = _STEP.why_not(logits)
    if reason is not None:
        _STEP.say(logging.WARNING, f"vLLM samples by itself: {reason}")
    return reason is not None


# Runner V1 -----------------------------------------------------------------------------------------------------------


def _init_v1(theirs: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """TopKTopPSampler.__init__: it picks the forward for this platform, and ours then goes before that one."""
    theirs(self, *args, **kwargs)
    self.forward = functools.partial(_forward_v1, self, self.forward)


def _forward_v1(
    self: Any,
    theirs: Callable[..., Any],
    logits: torch.Tensor,
    generators: dict[int, torch.Generator],
    k: torch.Tensor | None,
    p: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """TopKTopPSampler.forward: int64 tokens [B] and, in the processed modes, what the log-probabilities are of.

    Args:
        logits: float32 [B, V], divided by the temperature and cut by min-p.
        generators: of the seeded rows only.
        k: int32 [B], V is off; None: off for all.
        p: float32 [B], 1 is off; None: off for all.
    """
    if _left(logits):
        answer: tuple[torch.Tensor, torch.Tensor | None] = theirs(logits, generators, k, p)
        return answer
    tokens = _STEP.draw(logits, *_seeds_v1(len(logits), generators), top_k=k, top_p=p)
    if self.logprobs_mode not in _PROCESSED:
        return tokens, None
    kept = logits if k is None and p is None else _STEP.keep(logits, top_k=k, top_p=p)
    return tokens, kept if self.logprobs_mode == "processed_logits" else kept.log_softmax(dim=-1)


def _seeds_v1(rows: int, generators: dict[int, torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """Seed and offset of each row, int64 [B]; fresh seeds where a row has no generator."""
    offsets = torch.zeros(rows, dtype=torch.int64, device=CPU)
    if not generators:
        return pack_seeds(None, rows), offsets
    seeds = torch.empty(rows, dtype=torch.int64, device=CPU) if len(generators) == rows else pack_seeds(None, rows)
    own = [(row, *_next_draw(generator)) for row, generator in generators.items()]
    where = torch.tensor([row for row, _, _ in own], device=CPU)
    seeds[where] = pack_seeds([seed for _, seed, _ in own], len(own))
    offsets[where] = torch.tensor([offset for _, _, offset in own], device=CPU)
    return seeds, offsets


_draws: WeakKeyDictionary[torch.Generator, int] = WeakKeyDictionary()


def _next_draw(generator: torch.Generator) -> tuple[int, int]:
    """A request's seed and the number of its draws so far, which goes up by 1.

    A request keeps its generator for as long as it lives, whatever its row. A generator on a GPU counts by itself, in
    steps of 4, and vLLM sets it back by as much when it discards a draw. One on the CPU does not count.
    """
    if generator.device.type == "cpu":
        count = _draws.get(generator, 0)
        _draws[generator] = count + 1
        return generator.initial_seed(), count
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return generator.initial_seed(), offset // 4


# Runner V2 -----------------------------------------------------------------------------------------------------------


def _sample_random_v2(
    theirs: Callable[..., Any],
    self: Any,
    processed_logits: torch.Tensor,
    expanded_idx_mapping: torch.Tensor,
    idx_mapping_np: Any,
    pos: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampler._sample_random: int64 tokens [B], and the logits that processed log-probabilities are of.

    Args:
        processed_logits: [B, V], divided by the temperature and cut by min-p; else of any dtype.
        expanded_idx_mapping: the state of each row's request, [B].
        pos: int64 [B], position of the token that the logits follow.
        top_k: int32 [B], V is off; None: off for all.
        top_p: float32 [B], 1 is off; None: off for all.
    """
    if _left(processed_logits):
        answer: tuple[torch.Tensor, torch.Tensor] = theirs(
            self, processed_logits, expanded_idx_mapping, idx_mapping_np, pos, top_k, top_p, *args, **kwargs
        )
        return answer
    states = self.sampling_states
    # A temperature of 0 asks for the maximum and has divided nothing. Any other one is already applied.
    temperature = (states.temperature.gpu[expanded_idx_mapping] != 0).float()
    seeds = states.seeds.gpu[expanded_idx_mapping]
    tokens = _STEP.draw(processed_logits, seeds, pos.long(), temperature=temperature, top_k=top_k, top_p=top_p)
    wants_kept = self.logprobs_mode in _PROCESSED or getattr(self, "return_sampling_mask", False)
    if wants_kept and (top_k is not None or top_p is not None):
        processed_logits = _STEP.keep(processed_logits, top_k=top_k, top_p=top_p)
    return tokens, processed_logits
