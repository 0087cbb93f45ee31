"""The gate before any timing: do both sides do the same work? A reason why not, or None."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.stats import kstest

import fastsample as fs
from bench.modes import BY_NAME, MAKERS, SEED, Mode, extra_inputs, prepare, rows_of
from bench.peers import Peer, tokens_of
from bench.timing import Step

SMALL = (4, 512)  # rows, vocab: small enough to notice a kept token that is never drawn
DRAWS, SECONDS = 4000, 0.4  # tokens looked at, at most
ALPHA = 1e-6  # probability of refusing a correct peer
EDGE = 2e-4  # a token this close to a filter's limit may be kept or not: float sums over a row round
ROWS = 2  # rows recomputed by the reference, of long histories one: a row's tokens depend on nothing else


def engine_differs(mode: Mode, logits: torch.Tensor, backend: str, **fields: Any) -> str | None:
    """Why the first rows' tokens of two steps are not the reference's, or None."""
    rows = 1 if mode.history else ROWS
    part = rows_of(mode, logits)[:rows].cpu()
    step = prepare(mode, logits, backend, **fields)  # its preparation was the step at offset 0
    if mode.call:
        return draws_differ(step, mode, logits, fields)
    count = mode.request.get("num_samples", 1)
    extras = {name: tensor.cpu() for name, tensor in extra_inputs(mode, logits).items()}
    extras = {name: tensor[:rows] for name, tensor in extras.items()}
    for offset in (1, 2):
        got = step().tokens.reshape(logits.shape[0], count)[: len(part)].cpu()
        options = {"seed": SEED, "offset": offset, "backend": "reference", **mode.request, **extras}
        expected = fs.sample(part, **options, **{**mode.fields, **fields}).tokens.reshape(len(part), count)
        if not torch.equal(got, expected):
            return f"{backend}'s tokens {got.tolist()} differ from the reference's {expected.tolist()} at step {offset}"
    return None


@cache
def peer_differs(peer: Peer, mode_name: str, device: str) -> str | None:
    """Why a peer's draws from small inputs, where the test is sharp, do not fit our distribution, or None."""
    mode = BY_NAME[mode_name]
    for maker in ("flat", "lm"):
        logits = MAKERS[maker](*SMALL, torch.Generator().manual_seed(7)).to(device)
        step = peer.make(mode, logits)
        reason = draws_differ(step, mode, logits, peer.fields)
        if reason:
            return f"V = {SMALL[1]}, {maker} logits: {reason}"
    return None


def draws_differ(step: Step, mode: Mode, logits: torch.Tensor, fields: dict[str, Any]) -> str | None:
    """Why repeated draws of a step do not fit `fastsample.probabilities` of these logits, or None.

    Three questions: is every token in our kept set; does every token that we draw often appear; and is the mass ranked
    before the drawn token uniform? (The last is the randomised probability integral transform: its distribution does
    not depend on the row, so one Kolmogorov-Smirnov test covers all rows and draws.)
    """
    tokens = collect(step, logits.shape[0])
    wide, options = logits.float(), {"temperature": 1.0, **mode.fields, **fields}
    extras = extra_inputs(mode, logits)
    if options["temperature"] == 0:
        best = wide.amax(-1).cpu()
        drawn = wide.cpu().gather(1, tokens)
        return None if bool((drawn == best[:, None]).all()) else "a token is not the row's maximum"
    probs = fs.probabilities(logits, **options, **extras).double().cpu()
    slack = fs.probabilities(logits, **widened(options), **extras).cpu()
    keys = fs.filter_logits(logits, temperature=options["temperature"], **penalties(options), **extras).cpu()
    outside = (slack.gather(1, tokens) == 0).sum(1)
    if bool(outside.any()):
        row = int(outside.argmax())
        return f"row {row}: {int(outside[row])} of {tokens.shape[1]} tokens lie outside of our kept set"
    for row, drawn in enumerate(tokens):
        counts = torch.bincount(drawn, minlength=logits.shape[1])
        never = (probs[row] * len(drawn) >= 20) & (counts == 0)
        if bool(never.any()):
            return f"row {row}: {int(never.sum())} kept tokens are never drawn, id {int(never.nonzero()[0])} among them"
    value = kstest(in_front(probs, keys, tokens), "uniform").pvalue
    return None if value > ALPHA else f"{tokens.numel()} draws do not fit our probabilities: p = {value:.1e}"


def collect(step: Step, rows: int) -> torch.Tensor:
    """Tokens int64 [rows, steps], for as many steps as the limits allow, at least 3."""
    end = time.perf_counter() + SECONDS
    drawn: list[torch.Tensor] = []
    while len(drawn) < 3 or (len(drawn) * rows < DRAWS and time.perf_counter() < end):
        drawn.append(tokens_of(step()))
    return torch.stack(drawn, 1)


def widened(options: dict[str, Any]) -> dict[str, Any]:
    """The same filters, slightly wider, with ties kept."""
    wide = {**options, "ties": "all"}
    for name in ("top_p", "typical_p"):
        if name in options:
            wide[name] = min(1.0, options[name] + EDGE)
    for name in ("min_p", "epsilon_cutoff", "eta_cutoff", "top_a"):
        if name in options:
            wide[name] = options[name] * (1 - EDGE)
    if "top_n_sigma" in options:
        wide["top_n_sigma"] = options["top_n_sigma"] * (1 + EDGE)
    return wide


def penalties(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name.endswith("_penalty") or name.startswith("dry_")}


def in_front(probs: torch.Tensor, keys: torch.Tensor, tokens: torch.Tensor) -> np.ndarray:
    """The mass ranked before each token, plus a uniform fraction of its own."""
    order = keys.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    before = torch.cat([torch.zeros(len(probs), 1, dtype=probs.dtype), probs.gather(1, order).cumsum(1)], 1)
    part = np.random.default_rng(5).random(tokens.shape)
    mass = before.gather(1, ranks.gather(1, tokens)) + probs.gather(1, tokens) * torch.from_numpy(part)
    return mass.numpy().ravel()
