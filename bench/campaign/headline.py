"""Step `times`: a step of each engine beside torch's own operations and FlashInfer, against one plain read.

Nothing is timed before bench/gate.py has found that it does the same work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from bench import gate, peers
from bench.campaign.clock import cold_and_hot, make_inputs
from bench.campaign.micro import bytes_of, read_floor
from bench.campaign.site import Site
from bench.campaign.steps import Outcome, Point
from bench.modes import BY_NAME, Mode, prepare

ROWS = 8  # that a contender's draws are compared on; its larger batches repeat them
inputs_of = lru_cache(maxsize=1)(make_inputs)

Make = Callable[[Mode, torch.Tensor], Callable[[], Any]]


@dataclass(frozen=True)
class Contender:
    """Somebody's step from logits to token."""

    name: str
    engine: str  # ours, or ""
    make: Make
    differs: Callable[[Mode, torch.Tensor], str | None]
    modes: tuple[str, ...]


def contenders(site: Site) -> Iterator[Contender]:
    for name in site.engines:
        differs = partial(gate.engine_differs, backend=name)
        yield Contender(f"fastsample {name}", name, partial(prepare, backend=name), differs, tuple(BY_NAME))
    for peer in peers.PEERS:
        if "cuda" in peer.devices and peer.why_not() is None:
            yield of_peer(peer)


def of_peer(peer: peers.Peer) -> Contender:
    return Contender(peer.name, "", peer.make, partial(peer_differs, peer), peer.modes)


def peer_differs(peer: peers.Peer, mode: Mode, logits: torch.Tensor) -> str | None:
    reason = gate.peer_differs(peer, mode.name, logits.device.type)
    part = logits[:ROWS]
    return reason or gate.draws_differ(peer.make(mode, part), mode, part, peer.fields)


def points(site: Site) -> Iterator[Point]:
    """The first vocabulary and dtype in all batches and modes, then the others."""
    everybody = list(contenders(site))
    for vocab, dtype, batch in itertools.product(site.vocabs, site.dtypes, site.batches):
        for mode, contender in itertools.product(modes_of(site), everybody):
            if mode.name in contender.modes:
                key = {"mode": mode.name, "rows": batch, "vocab": vocab, "dtype": dtype, "name": contender.name}
                key |= {"engine": contender.engine} if contender.engine else {}
                yield key, partial(measure, site, contender, mode, (batch, vocab, dtype))


def modes_of(site: Site) -> list[Mode]:
    """A rehearsal has two of them."""
    return [BY_NAME[name] for name in site.modes][: 2 if site.dry else None]


def measure(site: Site, contender: Contender, mode: Mode, shape: tuple[int, int, str]) -> Outcome:
    inputs = inputs_of(*shape, site.device)
    reason = contender.differs(mode, inputs[0])
    if reason:
        return {"refused": reason}
    try:
        figures = cold_and_hot([contender.make(mode, logits) for logits in inputs], site.device)
    finally:
        if not site.dry:
            torch.cuda.empty_cache()  # what the graph held is of no use to the next one
    return figures | {"floor_us": read_floor(site.records, bytes_of(*shape))}
