"""`python -m bench speculate --acceptance`: how many drafts each rule accepts, on a model's own logits.

A model continues a text. Drafts are made and verified at each position of the continuation, K tokens each, every one
conditional on those before it. One run of the model gives the next row of all positions: they are branches of one tree
whose trunk is the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from transformers import DynamicCache
from transformers.generation.utils import ALL_CACHE_NAMES

import fastsample as fs
from bench.models import MODELS, layers_of, rows_after
from bench.record import Record, Results, console, machine
from fastsample.integrations.transformers import fs_generate

Tensor = torch.Tensor
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"  # of older releases
SETTINGS: dict[str, dict[str, Any]] = {
    "T 0.6": {"temperature": 0.6},
    "T 1": {"temperature": 1.0},
    "T 1, k50 p.95": {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
}
NOISES = (0.3, 0.8, 1.5)
PROMPT = "Once upon a time there was a king who had three daughters. The youngest of them"
TEXT_SEED, OWN_SEED, OTHER_SEED = 3, 4, 5  # of the text, of verification, and of drafts with numbers of their own
LONGEST = 3  # ids that prompt lookup looks for

LEGEND = (
    "noise s: the model's logits plus N(0, s^2) for each token. n of m layers: its first n, with its norm and head.",
    "same number: drawn with the random number of verification. found: as many drafts as follow what was found.",
    "a ± b, c: drafts accepted in a verification (a/n: of n, else of K), the standard error, and tokens that come out.",
)

# How a draft is taken from its row, and the rules that such drafts are verified by.
WAYS = {"best token": ("exact",), "drawn": ("exact", "chain", "block"), "drawn, same number": ("exact",)}


class Branches:
    """A text, and drafts that follow some of its positions."""

    def __init__(self, model: Any, text: Tensor, at: Tensor) -> None:
        self.model, self.at, self.length = model, at, len(text)
        self.cache = DynamicCache(config=model.config)
        out = self._run(text)
        self.start = out.logits[0, at - 1], self._hidden(out, at - 1)
        self.grown = 0

    def _run(self, ids: Tensor, **options: Any) -> Any:
        return self.model(ids[None], use_cache=True, output_hidden_states=True, **{CACHE: self.cache}, **options)

    @staticmethod
    def _hidden(out: Any, rows: Tensor | slice) -> list[Tensor]:
        return [states[0, rows] for states in out.hidden_states]

    def restart(self) -> tuple[Tensor, list[Tensor]]:
        """No drafts: the row that follows each position, and every layer's states there."""
        if self.grown:
            self.cache.crop(-self.grown * len(self.at))
        self.grown = 0
        return self.start

    def grow(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One draft more at each position [M]; the rows after it [M, V]."""
        count, depth = len(ids), self.grown
        seen = torch.zeros(count, self.length + (depth + 1) * count, dtype=torch.bool)
        seen[:, : self.length] = torch.arange(self.length) < self.at[:, None]
        every = torch.arange(count)
        for level in range(depth + 1):
            seen[every, self.length + level * count + every] = True
        mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
        out = self._run(ids, attention_mask=mask[None, None], position_ids=(self.at + depth)[None])
        self.grown += 1
        return out.logits[0], self._hidden(out, slice(None))


# Drafters -------------------------------------------------------------------------------------------------------------

Drafter = Callable[[Tensor, list[Tensor]], Tensor]  # the target's row and its layers' states to the draft's row


def drafters(model: Any) -> Iterator[tuple[str, Drafter]]:
    g = torch.Generator().manual_seed(6)
    for noise in NOISES:
        yield f"noise {noise}", lambda rows, _, s=noise: rows + s * torch.randn(rows.shape, generator=g)
    layers = layers_of(model) - max(1, layers_of(model) // 10)
    yield f"{layers} of {layers_of(model)} layers", lambda _, states: rows_after(model, states[layers])


def looked_up(text: list[int], most: int) -> list[int]:
    """What followed the last ids when they last occurred; the longest match of LONGEST ids and fewer."""
    for size in range(min(LONGEST, len(text) - 1), 0, -1):
        wanted = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == wanted:
                return text[start + size : start + size + most]
    return []


def lookup_drafts(text: Tensor, at: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Ids [M, K], padded with -1, and how many there are [M]."""
    found = [looked_up(text[:position].tolist(), most) for position in at]
    ids = torch.tensor([ids + [-1] * (most - len(ids)) for ids in found])
    return ids, torch.tensor([len(ids) for ids in found])


# Acceptance -----------------------------------------------------------------------------------------------------------


def measure(model: Any, prompt: Tensor, setting: str, count: int, drafts: int) -> Iterator[Record]:
    """A record for each drafter, way to draft, and rule."""
    fields = SETTINGS[setting]
    text = continuation(model, prompt, count, **fields)
    at = torch.arange(len(prompt), len(text))
    branches = Branches(model, text, at)
    seeds = torch.arange(len(at)) + 1000 * OWN_SEED
    place = {"setting": setting, "drafts": drafts, "verifications": len(at)}

    ids, counts = lookup_drafts(text, at, drafts)
    rows = [branches.restart()[0], *(branches.grow(ids[:, i].clamp(min=0))[0] for i in range(drafts))]
    out = fs.verify(torch.stack(rows, 1), ids, seed=seeds, **fields)
    yield place | {"drafter": "prompt lookup", "way": "found", "rule": "exact"} | figures(out, counts)

    for name, drafter in drafters(model):
        for way, rules in WAYS.items():
            target, draft, chosen = [], [], []
            row, states = branches.restart()
            for i in range(drafts):
                target.append(row)
                draft.append(drafter(row, states))
                chosen.append(pick(way, draft[-1], seeds, i, fields))
                row, states = branches.grow(chosen[-1])
            logits, ids = torch.stack([*target, row], 1), torch.stack(chosen, 1)
            for rule in rules:
                law = {} if rule == "exact" else {"draft_logits": torch.stack(draft, 1)}
                out = fs.verify(logits, ids, seed=seeds, rule=rule, **law, **fields)
                yield place | {"drafter": name, "way": way, "rule": rule} | figures(out, torch.tensor([drafts]))


def continuation(
    model: Any, prompt: Tensor, count: int, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """The prompt and `count` ids more."""
    text = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
        custom_generate=fs_generate(seed=TEXT_SEED),
    )
    return text[0]


def pick(way: str, rows: Tensor, seeds: Tensor, position: int, fields: dict[str, Any]) -> Tensor:
    """The drafts [M] from their rows [M, V]; with the number of verification, or with another one."""
    if way == "best token":
        return rows.argmax(-1)
    own: Any = seeds if way == "drawn, same number" else OTHER_SEED
    return fs.sample(rows, seed=own, offset=position, **fields).tokens


def figures(out: fs.VerifyOutput, drafts: Tensor) -> Record:
    accepted = out.num_accepted.double()
    tokens = (out.tokens >= 0).sum(1).double()
    return {
        "drafted": round(float(drafts.double().mean()), 3),
        "accepted": round(float(accepted.mean()), 3),
        "error": round(float(accepted.std()) / math.sqrt(len(accepted)), 3),
        "tokens": round(float(tokens.mean()), 3),
    }


def table(records: list[Record], title: str) -> Table:
    made = Table("drafter", "draft", "rule", *SETTINGS, title=title)
    rows: dict[tuple[str, ...], dict[str, Record]] = {}
    for r in records:
        rows.setdefault((r["drafter"], r["way"], r["rule"]), {})[r["setting"]] = r
    for key, found in rows.items():
        cells = []
        for r in (found[setting] for setting in SETTINGS):
            some = f"/{r['drafted']:.1f}" if r["way"] == "found" else ""
            cells.append(f"{r['accepted']:.2f}{some} ± {r['error']:.2f}, {r['tokens']:.2f}")
        made.add_row(*key, *cells)
    return made


@torch.inference_mode()
def run(name: str, count: int, drafts: int, threads: int, out: Path | None) -> int:
    """Measure, print, write JSON."""
    torch.set_num_threads(threads)
    fs.set_num_threads(threads)
    model, tokenizer = MODELS[name]()
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids[0]
    where, screen = machine("transformers"), console()
    results = Results(out, "acceptance", where)
    for setting in SETTINGS:
        steps = measure(model, prompt, setting, count, drafts)
        for record in track(steps, f"{setting}:", console=screen, transient=True):
            results.add({"model": name, **record})
    screen.print(table(results.records, f"{name}, V = {model.config.vocab_size:,}, up to K = {drafts} drafts"))
    for line in LEGEND:
        screen.print(line, markup=False)
    screen.print(f"Each figure is a mean over {count} verifications, one at each position of a text.")
    if out is not None:
        screen.print(f"written: {out}", markup=False)
    return 0
