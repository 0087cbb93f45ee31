"""`python -m bench decoders`: tokens per second of decoders on CPUs, with their own samplers and with fastsample.

Turns alternate on the same model. Their own: of llama.cpp a chain for each sequence (`llama_sampler_sample`), of ONNX
Runtime GenAI `generate_next_token`, of MLX-LM `make_sampler`; fastsample's are its adapters. Where sampling cannot be
timed apart, the decoder's own greedy search beside it shows what the rest of a step takes. Of a turn the median of its
steps counts.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

import bench.modes  # noqa: F401, puts tests/support on the path
import fastsample as fs
from bench.record import RESULTS, Record, Results, console, machine, slug
from bench.timing import Others, spread
from fastsample.cli.gguf import smollm2
from fastsample.cli.output import RefusedError
from fastsample.integrations.sequences import Sequences

# isort: split
from decoded import tiny_models
from llama_chain import chain

WIDE = 151936
SHARP = 5  # makes the logits of random weights deviate by 3 to 5, which is what a language model's do
MODES: dict[str, dict[str, Any]] = {
    "k40 p.95 m.05": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "p.95": {"temperature": 0.8, "top_p": 0.95},
}
PROMPT = [11, 12, 13, 14, 15, 16, 17, 18]
END = 0  # of a text, in the models made here; next to never drawn
PACKAGES = ("llama-cpp-python", "onnxruntime-genai", "mlx-lm", "mlx")
LEAST = 5  # turns

Turn = Callable[[], "tuple[list[float], list[float]]"]
"""One text of all sequences: each step's seconds, and those of them that sampling took, where that can be told."""


def steps_of(steps: Iterator[Any]) -> tuple[list[float], list[float]]:
    """A turn of a decoder that yields at each step; the first has the prompt in it."""
    next(steps)
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in steps]
    return np.diff(times).tolist(), []


def weights(*shape: int, seed: int = 11) -> np.ndarray[Any, Any]:
    return np.random.default_rng([seed, *shape]).normal(size=shape, scale=0.3).astype(np.float32)


# llama.cpp ------------------------------------------------------------------------------------------------------------


def wide_gguf(path: Path, width: int = 64, layers: int = 2) -> None:
    """A GPT-2 with a wide vocabulary and random weights."""
    config = {"n_positions": 512, "n_embd": width, "n_layer": layers, "n_head": 2}
    shapes = {"wte.weight": (WIDE, width), "wpe.weight": (512, width)}
    for name in ("ln_f", *(f"h.{i}.ln_{j}" for i in range(layers) for j in (1, 2))):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    sizes = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
    for i in range(layers):
        for name, (rows, columns) in sizes.items():
            shapes[f"h.{i}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"h.{i}.{name}.bias"] = (columns * width,)
    named = ((name, weights(*shape) * (SHARP if name == "ln_f.weight" else 1)) for name, shape in shapes.items())
    tiny_models().write_gguf(path, config, [f"t{i}" for i in range(WIDE)], ["t 0"], named)


def llama_cpp(folder: Path, rows: int, tokens: int) -> Iterator[tuple[str, int, str, dict[str, Turn]]]:
    import llama_cpp as lc

    paths = {"wide": str(folder / "wide.gguf")}
    if not Path(paths["wide"]).exists():
        wide_gguf(Path(paths["wide"]))
    try:
        paths["SmolLM2-135M"] = smollm2()
    except RefusedError as error:
        console().print(f"left out: {error}", markup=False)
    for name, path in paths.items():
        llm = lc.Llama(path, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
        for mode, fields in MODES.items():
            ways = {who: llama_turn(llm, rows, tokens, who, fields) for who in ("fastsample", "llama.cpp")}
            yield name, llm.n_vocab(), mode, ways
        llm.close()


def llama_turn(llm: Any, rows: int, tokens: int, who: str, fields: dict[str, Any]) -> Turn:
    import llama_cpp as lc

    from fastsample.integrations.llama_cpp import logits_of
    from fastsample.integrations.llama_cpp.batch import Context

    slots = list(range(rows))

    def turn() -> tuple[list[float], list[float]]:
        context = Context(llm, rows, len(PROMPT) + tokens + 1)
        sequences = Sequences(fs.Sampler(batch_size=rows, seed=3, order="temperature_last", **fields))
        chains = [chain(fields, row + 1, draw=True) for row in slots]
        for row in slots:
            sequences.start(row, np.array(PROMPT))
            context.prefill(row, PROMPT)
        context.advance(dict.fromkeys(slots, 19))
        steps, sampling = [], []
        for _ in range(tokens):
            start = time.perf_counter()
            if who == "fastsample":
                drawn = sequences.draw(logits_of(context._context, slots), slots).tokens.tolist()
            else:
                drawn = [lc.llama_sampler_sample(one.chain, context._context, row) for row, one in enumerate(chains)]
            sampling.append(time.perf_counter() - start)
            context.advance(dict(enumerate(drawn)))
            steps.append(time.perf_counter() - start)
        context.close()
        return steps, sampling

    return turn


# ONNX Runtime GenAI ---------------------------------------------------------------------------------------------------


def onnx_genai(folder: Path, rows: int, tokens: int) -> Iterator[tuple[str, int, str, dict[str, Turn]]]:
    import onnxruntime_genai as og

    place = folder / "onnx"
    if not place.exists():
        place.mkdir()
        tiny_models().write_onnx(place, weights(WIDE, 64), weights(64, WIDE) * SHARP, threads=1)
    model = og.Model(str(place))
    for mode, fields in MODES.items():
        # It has no min-p. Without top-k its top_k is the vocabulary: 0 draws past top-p (bench/README.md).
        own = {"temperature": fields["temperature"], "top_k": fields.get("top_k", WIDE), "top_p": fields["top_p"]}
        search = {"do_sample": True, "random_seed": 11, **own}
        ways = {
            "fastsample": onnx_ours(model, rows, tokens, fields),
            "onnxruntime-genai": onnx_own(model, rows, tokens, search),
            "its greedy": onnx_own(model, rows, tokens, {"do_sample": False}),
        }
        yield "wide", WIDE, mode, ways


def onnx_ours(model: Any, rows: int, tokens: int, fields: dict[str, Any]) -> Turn:
    from fastsample.integrations.onnx_genai import stream

    def turn() -> tuple[list[float], list[float]]:
        options: dict[str, Any] = {"max_new_tokens": tokens + 1, "seed": 3, "eos_token_ids": END}
        return steps_of(stream(model, [PROMPT] * rows, **options, **fields))

    return turn


def onnx_own(model: Any, rows: int, tokens: int, search: dict[str, Any]) -> Turn:
    import onnxruntime_genai as og

    def steps() -> Iterator[None]:
        params = og.GeneratorParams(model)
        params.set_search_options(batch_size=rows, max_length=len(PROMPT) + tokens + 2, **search)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array([PROMPT] * rows, dtype=np.int32))
        for _ in range(tokens + 1):
            yield generator.generate_next_token()

    return lambda: steps_of(steps())


# MLX-LM ---------------------------------------------------------------------------------------------------------------


def mlx_lm(folder: Path, rows: int, tokens: int) -> Iterator[tuple[str, int, str, dict[str, Turn]]]:
    import mlx.core as mx
    from mlx_lm.models import llama
    from mlx_lm.sample_utils import make_sampler

    from fastsample.integrations.mlx_lm import MlxSampler

    mx.random.seed(11)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 2}
    config = llama.ModelArgs(model_type="llama", rms_norm_eps=1e-5, vocab_size=WIDE, num_key_value_heads=2, **sizes)
    model = llama.Model(config)
    model.model.norm.weight *= SHARP
    mx.eval(model.parameters())
    for mode, fields in MODES.items():
        ours = partial(MlxSampler, order="temperature_last", **fields)
        own = partial(make_sampler, fields["temperature"], **{n: v for n, v in fields.items() if n != "temperature"})
        ways = {
            "fastsample": mlx_turn(model, rows, tokens, ours, each=True),
            "mlx-lm": mlx_turn(model, rows, tokens, own),
            "its greedy": mlx_turn(model, rows, tokens, make_sampler),
        }
        yield "wide", WIDE, mode, ways


def mlx_turn(model: Any, rows: int, tokens: int, make: Callable[[], Any], each: bool = False) -> Turn:
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator, generate_step

    def alone() -> Iterator[Any]:
        yield from generate_step(mx.array(PROMPT), model, max_tokens=tokens + 1, sampler=make())

    def together() -> Iterator[Any]:
        batch = BatchGenerator(model)
        samplers = [make() for _ in range(rows)] if each else [make()] * rows  # of one, a call for all sequences
        batch.insert([PROMPT] * rows, [tokens + 1] * rows, samplers=samplers)
        while responses := batch.next_generated():
            yield responses
        batch.close()

    return lambda: steps_of(alone() if rows == 1 else together())


DECODERS = {"llama.cpp": llama_cpp, "onnxruntime-genai": onnx_genai, "mlx-lm": mlx_lm}
IMPORTS = {"llama.cpp": "llama_cpp", "onnxruntime-genai": "onnxruntime_genai", "mlx-lm": "mlx_lm"}


def measure(ways: dict[str, Turn], rows: int, tokens: int, budget: float) -> Iterator[Record]:
    """One record per sampler; turns alternate, after one that does not count."""
    for turn in ways.values():
        turn()
    steps: dict[str, list[float]] = {who: [] for who in ways}
    sampling: dict[str, list[float]] = {who: [] for who in ways}
    others, end = Others(), time.perf_counter() + budget
    while min(map(len, steps.values())) < LEAST or time.perf_counter() < end:
        for who, turn in ways.items():
            for medians, seconds in zip((steps[who], sampling[who]), turn(), strict=True):
                medians += [float(np.median(seconds))] if seconds else []
    busy = others.cores()
    for who, own in steps.items():
        record: Record = {
            "sampler": who,
            "tokens_per_second": spread([rows / seconds for seconds in own], 1),
            "step_us": spread([1e6 * seconds for seconds in own]),
        }
        if sampling[who]:
            record["sampling_us"] = spread([1e6 * seconds for seconds in sampling[who]])
            record["sampling_share"] = spread([part / whole for part, whole in zip(sampling[who], own, strict=True)], 4)
        yield record | {"turns": len(own), "others": busy}


def table(records: list[Record]) -> Table:
    columns = ("decoder", "model", "V", "B", "mode", "sampler", "tokens/s", "us a step", "us sampling", "share")
    found = Table(*columns, title="Decoders on the CPU; ours, llama.cpp and ONNX Runtime on one thread")
    for r in records:
        timed = "sampling_us" in r
        found.add_row(
            *(str(r[name]) for name in ("decoder", "model", "vocab", "rows", "mode", "sampler")),
            f"{r['tokens_per_second']['median']:,.0f}",
            f"{r['step_us']['median']:,.0f}",
            f"{r['sampling_us']['median']:,.0f}" if timed else "",
            f"{r['sampling_share']['median']:.1%}" if timed else "",
        )
    return found


def run(decoders: list[str], batches: list[int], tokens: int, budget: float, out: Path | None) -> int:
    """Measure what is installed, print, write JSON. The exit status: 0, or 1 if none of them is."""
    torch.set_num_threads(1)
    fs.set_num_threads(1)
    where = machine(*PACKAGES)
    results = Results(out or RESULTS / f"decoders-{slug(where)}.json", "decoders", where)
    screen = console()
    with tempfile.TemporaryDirectory() as folder:
        for name in decoders:
            if importlib.util.find_spec(IMPORTS[name]) is None:
                screen.print(f"{name} is not installed and left out")
                continue
            for rows in batches:
                for model, vocab, mode, ways in DECODERS[name](Path(folder), rows, tokens):
                    place = {"decoder": name, "model": model, "vocab": vocab, "rows": rows, "tokens": tokens}
                    for record in measure(ways, rows, tokens, budget):
                        results.add(place | {"mode": mode} | record)
    screen.print(table(results.records))
    screen.print(f"written: {results.path}", markup=False)
    return int(not results.records)
