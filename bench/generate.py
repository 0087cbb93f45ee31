"""End to end: Hugging Face `generate` with its own sampler and with ours, and sampling's share of a step.

Both run transformers' decoding loop over the same model and prompts, in alternation. A step's sampling is the time
between the model's return and the stopping criteria: the float32 copy of the last logits, filters, draw and
concatenation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from rich.table import Table
from scipy.stats import kstest
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, StoppingCriteria, StoppingCriteriaList

import fastsample as fs
from bench.gate import ALPHA, in_front
from bench.record import RESULTS, Record, Results, console, machine, slug
from bench.summary import disturbed
from bench.timing import Others, spread
from fastsample.cli.model import shipped_model
from fastsample.integrations.transformers import fs_generate

SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
PROMPT = 8  # ids, drawn at random
LEAST = 3  # turns


def random_gpt2(**config: Any) -> torch.nn.Module:
    torch.manual_seed(11)
    return GPT2LMHeadModel(GPT2Config(n_positions=256, bos_token_id=0, eos_token_id=0, **config))


MODELS: dict[str, Callable[[], Any]] = {
    "shipped": lambda: AutoModelForCausalLM.from_pretrained(shipped_model(), dtype=torch.float32),
    "gpt2-small": lambda: random_gpt2(vocab_size=50257),
    "wide-vocab": lambda: random_gpt2(vocab_size=151936, n_embd=128, n_layer=4, n_head=4),
}
"""The model in the package; GPT-2 small and a small one with a large vocabulary, both initialised at random."""


class Stopwatch(StoppingCriteria):
    """A stopping criterion that never stops; notes the time since the model returned, and since the last step."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.go_on = torch.zeros(rows, dtype=torch.bool, device=device)
        self.returned = self.ended = 0.0
        self.sampling: list[float] = []
        self.steps: list[float] = []

    def model_returned(self, *_: Any) -> None:
        self.returned = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        now = time.perf_counter()
        if self.ended:  # the first step includes the prompt
            self.sampling.append(now - self.returned)
            self.steps.append(now - self.ended)
        self.ended = now
        return self.go_on


@dataclass
class Sampler:
    """One of the two ways to run `generate`, with its figures."""

    name: str
    options: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)


def generate(model: Any, ids: torch.Tensor, tokens: int, **options: Any) -> Any:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        max_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=0,
        **{**SAMPLING, **options},
    )


def differs(model: Any, ids: torch.Tensor, tokens: int, options: dict[str, Any]) -> str | None:
    """Why the tokens of a run do not fit our probabilities of the model's logits, or None."""
    out = generate(model, ids, tokens, return_dict_in_generate=True, output_logits=True, **options)
    drawn = out.sequences[:, ids.shape[1] :].cpu()
    values = []
    for step, logits in enumerate(logits.cpu() for logits in out.logits):
        own = drawn[:, step : step + 1]
        probs = fs.probabilities(logits, ties="all", **SAMPLING).double()
        if bool((probs.gather(1, own) == 0).any()):
            return f"step {step}: a token lies outside of the kept set"
        values.append(in_front(probs, fs.filter_logits(logits, temperature=SAMPLING["temperature"]), own))
    chance = kstest(np.concatenate(values), "uniform").pvalue
    return None if chance > ALPHA else f"{drawn.numel()} tokens do not fit our probabilities: p = {chance:.1e}"


def one_turn(model: Any, ids: torch.Tensor, tokens: int, sampler: Sampler) -> None:
    watch = Stopwatch(len(ids), ids.device)
    hook = model.register_forward_hook(watch.model_returned)
    try:
        start = time.perf_counter()
        generate(model, ids, tokens, stopping_criteria=StoppingCriteriaList([watch]), **sampler.options)
        sampler.seconds.append(time.perf_counter() - start)
    finally:
        hook.remove()
    sampler.sampling.append(float(np.median(watch.sampling)))
    sampler.shares.append(sum(watch.sampling) / sum(watch.steps))


def measure(name: str, model: Any, rows: int, tokens: int, budget: float) -> list[Record]:
    """One record per sampler; turns alternate. On a GPU the share of sampling is that of the time spent in Python."""
    vocab = model.config.vocab_size
    ids = torch.randint(vocab, (rows, PROMPT), generator=torch.Generator().manual_seed(5)).to(model.device)
    samplers = [Sampler("fastsample", {"custom_generate": fs_generate(seed=3)}), Sampler("Hugging Face", {})]
    place = {"model": name, "vocab": vocab, "rows": rows, "tokens": tokens, "threads": torch.get_num_threads()}
    for sampler in samplers:
        reason = differs(model, ids, tokens, sampler.options)
        if reason:
            return [place | {"sampler": sampler.name, "refused": reason}]
    others = Others()
    end = time.perf_counter() + budget
    while len(samplers[0].seconds) < LEAST or time.perf_counter() < end:
        for sampler in samplers:
            one_turn(model, ids, tokens, sampler)
    busy = others.cores()
    return [
        place
        | {
            "sampler": s.name,
            "tokens_per_second": spread([rows * tokens / t for t in s.seconds], 1),
            "sampling_us": spread([1e6 * t for t in s.sampling], 1),
            "sampling_share": spread(s.shares, 4),
            "turns": len(s.seconds),
            "others": busy,
        }
        for s in samplers
    ]


def table(records: list[Record]) -> Table:
    columns = ("model", "V", "B", "sampler", "tokens/s", "p10 - p90", "us sampling a step", "share of a step")
    found = Table(*columns, title=f"transformers' generate, {SAMPLING}")
    for r in records:
        key = [str(r[name]) for name in ("model", "vocab", "rows", "sampler")]
        if "refused" in r:
            found.add_row(*key, f"REFUSED: {r['refused']}", style="red")
            continue
        speed = r["tokens_per_second"]
        found.add_row(
            *key,
            f"{speed['median']:,.0f}",
            f"{speed['p10']:,.0f} - {speed['p90']:,.0f}",
            f"{r['sampling_us']['median']:,.0f}",
            f"{r['sampling_share']['median']:.1%}",
        )
    return found


def run(
    models: list[str], batches: list[int], tokens: int, budget: float, threads: int | None, out: Path | None
) -> int:
    """Measure, print, write JSON. The exit status: 0, 1 after a refusal, 130 after an interruption."""
    if threads is not None:
        torch.set_num_threads(threads)
        fs.set_num_threads(threads)
    where = machine("transformers")
    out = out or RESULTS / f"generate-{slug(where)}.json"
    results = Results(out, "generate", where)
    screen = console()
    interrupted = False
    try:
        for name in models:
            model = MODELS[name]().eval()
            for rows in track(batches, f"{name}:", console=screen, transient=True):
                for record in measure(name, model, rows, tokens, budget):
                    results.add(record)
    except KeyboardInterrupt:
        interrupted = True
    results.write()
    screen.print(table(results.records))
    for line in disturbed(results.records):
        screen.print(line, markup=False)
    screen.print(f"written: {out}", markup=False)
    if interrupted:
        screen.print("interrupted: what was measured is kept")
        return 130
    return int(any("refused" in r for r in results.records))
