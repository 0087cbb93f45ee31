"""`python -m bench speculate --text`: tokens per second of generate with `fs_generate`, with drafts and without."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import fastsample as fs
from bench.models import MODELS, first_layers, layers_of
from bench.record import Record, Results, console, machine
from bench.timing import Others, spread
from fastsample.integrations.transformers import fs_generate

TEMPERATURE, SEED = 0.6, 7
LEAST = 3  # turns
_RHYME = """This is the house that Jack built.
This is the malt that lay in the house that Jack built.
This is the rat that ate the malt that lay in the house that Jack built.
This is the cat that killed the rat that ate the malt that lay in the house that Jack built.
"""
PROMPTS = {
    "repeats itself": _RHYME + _RHYME + "This is the house",
    "does not": "Once upon a time there was a king who had three daughters. The youngest of them",
}


class Runs:
    """How often a model ran since the last look."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.register_forward_hook(self._ran)

    def _ran(self, *_: Any) -> None:
        self.count += 1

    def taken(self) -> int:
        count, self.count = self.count, 0
        return count


def ways(model: Any, drafts: int) -> dict[str, dict[str, Any]]:
    """Options of `generate`, by name."""
    layers = layers_of(model) - max(1, layers_of(model) // 10)
    short = first_layers(model, layers)
    short.generation_config.num_assistant_tokens = drafts
    short.generation_config.num_assistant_tokens_schedule = "constant"
    return {
        "none": {},
        "prompt lookup": {"prompt_lookup_num_tokens": drafts},
        f"first {layers} of {layers_of(model)} layers": {"assistant_model": short},
    }


def measure(model: Any, ids: torch.Tensor, tokens: int, options: dict[str, Any], seconds: float) -> list[Record]:
    """One record for each way; turns alternate."""
    runs = Runs(model)
    texts: dict[str, torch.Tensor] = {}
    times: dict[str, list[float]] = {name: [] for name in options}
    needed: dict[str, int] = {}
    others, end = Others(), time.perf_counter() + seconds
    while len(times["none"]) < LEAST or time.perf_counter() < end:
        for name, more in options.items():
            runs.taken()
            start = time.perf_counter()
            text = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                top_p=1.0,
                max_new_tokens=tokens,
                eos_token_id=None,
                pad_token_id=0,
                custom_generate=fs_generate(seed=SEED),
                **more,
            )[0, ids.shape[1] :]
            times[name].append(time.perf_counter() - start)
            needed[name] = runs.taken()
            texts[name] = text
    return [
        {
            "drafts": name,
            "tokens_per_second": spread([tokens / t for t in times[name]], 1),
            "ratio": round(statistics.median(a / b for a, b in zip(times["none"], times[name], strict=True)), 3),
            "runs": needed[name],
            "same": agreed(texts["none"], texts[name]),
            "tokens": tokens,
            "turns": len(times[name]),
            "others": others.cores(),
        }
        for name in options
    ]


def agreed(plain: torch.Tensor, text: torch.Tensor) -> int:
    """How many of the first tokens are the same."""
    most = min(len(plain), len(text))
    return int((plain[:most] == text[:most]).long().cumprod(0).sum())


def table(records: list[Record], title: str) -> Table:
    made = Table(
        "text", "drafts", "tokens/s", "p10 - p90", "without = 1", "runs of the model", "same text", title=title
    )
    for r in records:
        speed = r["tokens_per_second"]
        same = "yes" if r["same"] == r["tokens"] else f"the first {r['same']} of {r['tokens']} tokens"
        cells = (f"{speed['median']:.1f}", f"{speed['p10']:.1f} - {speed['p90']:.1f}", f"{r['ratio']:.2f}x")
        made.add_row(r["text"], r["drafts"], *cells, str(r["runs"]), same)
    return made


def run(name: str, tokens: int, drafts: int, threads: int, seconds: float, out: Path | None) -> int:
    """Measure, print, write JSON."""
    torch.set_num_threads(threads)
    fs.set_num_threads(threads)
    model, tokenizer = MODELS[name]()
    where, screen = machine("transformers"), console()
    results = Results(out, "drafted", where)
    options = ways(model, drafts)
    for text, prompt in PROMPTS.items():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        if ids.shape[1] + tokens > model.config.max_position_embeddings:
            screen.print(f"{text}: longer than the model, left out")
            continue
        for record in measure(model, ids, tokens, options, seconds):
            results.add({"model": name, "text": text, **record})
    what = f"generate, {name}, {tokens} tokens, T = {TEMPERATURE}, up to {drafts} drafts"
    screen.print(table(results.records, f"{what}, {threads} thread(s), {where['cpu']}"))
    screen.print("without = 1: the median of the ratios turn by turn. Same text: token by token, as without drafts.")
    busy = [r["others"] for r in results.records if r["others"] is not None]
    if busy:
        screen.print(f"Other processes kept up to {max(busy)} cores busy meanwhile.")
    if out is not None:
        screen.print(f"written: {out}", markup=False)
    return 0
