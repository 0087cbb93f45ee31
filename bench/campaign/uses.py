"""Step `uses`: CUDA graphs, streams, torch.compile and transformers' generate: still right, and what are they worth?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.campaign.clock import capture, median_replay
from bench.campaign.site import Site
from bench.campaign.steps import Outcome, Point
from bench.modes import BY_NAME, make_logits

FIELDS = BY_NAME["k50 p.95"].fields
SHAPE = (8, 128256)
SEED, STEPS, STREAMS = 11, 20, 8
NO_CPU = "CUDA graphs and streams by the calls alone"


def points(site: Site) -> Iterator[Point]:
    for engine in site.engines:
        for what, ask in (("graph", graph), ("streams", streams), ("torch.compile", compiled)):
            yield {"engine": engine, "what": what}, partial(ask, site, engine)
    for batch in site.batches[:2]:
        for name in ("gpt2-small", "wide-vocab")[: 1 if site.dry else None]:
            yield {"what": "generate", "model": name, "rows": batch}, partial(generated, site, name, batch)


def logits_of(site: Site) -> torch.Tensor:
    return make_logits("lm", *((2, 300) if site.dry else SHAPE), torch.float32)


def steps_of(logits: torch.Tensor, backend: str, count: int) -> list[list[int]]:
    import fastsample as fs

    sampler = fs.Sampler(batch_size=len(logits), seed=SEED, backend=backend, **FIELDS)
    return [sampler(logits).tokens.tolist() for _ in range(count)]


def verdict(found: list[list[int]], expected: list[list[int]]) -> Outcome:
    wrong = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), None)
    return {"passed": wrong is None} | ({} if wrong is None else {"first_wrong_step": wrong})


def graph(site: Site, engine: str) -> Outcome:
    """A step of a Sampler, replayed: tokens of the next offsets each time; its time beside calls from Python."""
    import fastsample as fs

    logits = logits_of(site)
    expected = steps_of(logits, "reference", STEPS + 1)
    sampler = fs.Sampler(batch_size=len(logits), seed=SEED, backend=engine, on_invalid="flag", **FIELDS)
    static = logits.to(site.device)
    if site.dry:
        found = [sampler(static).tokens.tolist() for _ in range(STEPS + 1)]
        return verdict(found, expected) | {"replaced": NO_CPU}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        out = sampler(static)
        found = [out.tokens.tolist(), sampler(static, out=out).tokens.tolist()]
        replay, captured = capture([lambda: sampler(static, out=out)], stream)
        for _ in range(STEPS - 1):
            replay()
            found.append(out.tokens.tolist())
        figures = {"replay_us": median_replay(replay), "call_us": per_call(lambda: sampler(static, out=out))}
    return verdict(found, expected) | {"captured": captured} | figures


def per_call(call: Callable[[], Any], count: int = 200) -> float:
    """Microseconds per call of many in a row, Python's part included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6 / count


def streams(site: Site, engine: str) -> Outcome:
    """Steps on several streams at once, each with its own seed."""
    import fastsample as fs

    logits = logits_of(site)
    expected = [fs.sample(logits, seed=i, backend="reference", **FIELDS).tokens.tolist() for i in range(STREAMS)]
    static = logits.to(site.device)
    call = partial(fs.sample, static, backend=engine, on_invalid="flag", **FIELDS)
    if site.dry:
        return verdict([call(seed=i).tokens.tolist() for i in range(STREAMS)], expected) | {"replaced": NO_CPU}
    lanes = [torch.cuda.Stream() for _ in range(STREAMS)]
    torch.cuda.synchronize()
    found = []
    for i, lane in enumerate(lanes):
        with torch.cuda.stream(lane):
            found.append(call(seed=i).tokens)
    torch.cuda.synchronize()
    return verdict([tokens.tolist() for tokens in found], expected)


def compiled(site: Site, engine: str) -> Outcome:
    """Inside torch.compile without a break of the graph; in a rehearsal nothing is generated."""
    import fastsample as fs

    logits = logits_of(site)
    static = logits.to(site.device)

    def step(x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        drawn = fs.sample(x * 1.0, seed=SEED, offset=offset, backend=engine, on_invalid="flag", **FIELDS)
        tokens: torch.Tensor = drawn.tokens
        return tokens

    faster = torch.compile(step, fullgraph=True, backend="eager" if site.dry else "inductor")
    offsets = [torch.full((len(logits),), i, device=site.device) for i in range(3)]
    found = [faster(static, offset).tolist() for offset in offsets]
    outcome = verdict(found, steps_of(logits, "reference", 3))
    if site.dry:
        return outcome
    return outcome | {"call_us": per_call(lambda: faster(static, offsets[0]))}


def generated(site: Site, name: str, batch: int) -> Outcome:
    """Tokens per second of transformers' generate on a random model, with its own sampler and with fastsample."""
    from bench import generate

    tiny = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = generate.random_gpt2(**tiny) if site.dry else generate.MODELS[name]()
    tokens, seconds = (3, 0.0) if site.dry else (64, 8.0)
    records = generate.measure(name, model.eval().to(site.device), batch, tokens, seconds)
    if (reason := next((r["refused"] for r in records if "refused" in r), None)) is not None:
        return {"refused": reason}
    speeds = {r["sampler"]: r["tokens_per_second"] for r in records}
    return {"tokens_per_second": speeds["fastsample"], "its_tokens_per_second": speeds["Hugging Face"]}
