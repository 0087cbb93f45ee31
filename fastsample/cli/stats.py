"""`fastsample generate --stats`: the time of both samplers on the same model and prompt."""

from __future__ import annotations

import statistics
import sys
import time
from itertools import product
from typing import Any

import torch

import fastsample as fs
from fastsample.cli.output import RefusedError, print_table, progress, told
from fastsample.params import specs


class _Clock:
    """A stopping criterion that never stops, but times each step.

    `generate` calls it as soon as a token is chosen. The time from the end of the model's forward pass to that call is
    sampling (with the copy of the logits to float32), and the time between two calls is a step.
    """

    def __init__(self) -> None:
        self.forward_end = 0.0
        self.steps: list[float] = []
        self.sampling: list[float] = []
        self._last: float | None = None

    def after_forward(self, *_: Any) -> None:
        self.forward_end = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        now = time.perf_counter()
        if self._last is not None:  # the first step holds the prompt
            self.steps.append(now - self._last)
            self.sampling.append(now - self.forward_end)
        self._last = now
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def print_stats(lm: Any, ids: torch.Tensor, steps: int, seed: int, given: dict[str, Any]) -> None:
    """Time both samplers in turn on the same model and prompt: one warm-up and five rounds, medians over all steps.

    `given` are the arguments of `fs_generate`.
    """
    from fastsample.integrations.transformers import fs_generate

    if steps < 3:
        raise RefusedError("--stats needs at least 3 new tokens")
    steps = min(steps, 32)
    options, missing = options_of_transformers(given)
    lm.generation_config.eos_token_id = None  # all rounds have the same length
    sample = {"do_sample": True, "custom_generate": fs_generate(seed=[seed], **given)}
    ways: dict[str, dict[str, Any]] = {"fastsample": sample, "transformers": options}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    with progress(6 * len(ways), "text") as bar:
        for turn, (name, way) in product(range(6), ways.items()):
            clock = _time(lm, ids, steps, way)
            bar.update()
            if turn:
                times[name][0].extend(clock.steps)
                times[name][1].extend(clock.sampling)
    rows = [("sampler", "tokens/s", "sampling, ms/token", "share of the step")]
    for name, (all_steps, sampling) in times.items():
        step, part = statistics.median(all_steps), statistics.median(sampling)
        rows.append((name, f"{1 / step:.0f}", f"{1e3 * part:.3f}", f"{part / step:.0%}"))
    print(file=sys.stderr)
    print_table(rows, header=True, stream=sys.stderr)
    if missing:
        print(f"transformers has no {', '.join(missing)}: measured without", file=sys.stderr)


_HAS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_HAS_TOO = ("typical_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size")  # as a rule off, and then left out
_EDITS = ("repetition_penalty", "no_repeat_ngram_size")  # what greedy search obeys


def options_of_transformers(fields: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The equivalent options for `generate`'s own sampler, and the names it has no option for."""
    given, neutral = fs.SamplingParams(**{name: fields[name] for name, _ in specs()}), fs.SamplingParams()
    on = [name for name, _ in specs() if getattr(given, name) != getattr(neutral, name)]
    missing = [name for name in on if name not in _HAS + _HAS_TOO]
    options = {name: fields[name] for name in _HAS + _HAS_TOO if name in _HAS or name in on}
    if not options["min_p"]:
        del options["min_p"]  # would run without effect
    greedy = options["temperature"] == 0
    if greedy:
        options = {name: options[name] for name in _EDITS if name in options}
    return {"do_sample": not greedy} | options, missing


def _time(lm: Any, ids: torch.Tensor, steps: int, options: dict[str, Any]) -> _Clock:
    clock = _Clock()
    hook = lm.register_forward_hook(clock.after_forward)
    mask = torch.ones_like(ids)
    with told((ValueError,)):
        lm.generate(ids, attention_mask=mask, max_new_tokens=steps, stopping_criteria=[clock], **options)
    hook.remove()
    return clock
