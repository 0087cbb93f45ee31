"""`python -m bench`: benchmarks that print a table and write JSON. `pytest bench` runs the pytest-benchmark suite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None)


@app.callback()
def root() -> None:
    """Benchmarks of fastsample."""


@app.command()
def cpu(
    logits: Annotated[str, typer.Option(help="Maker of logits in tests/cases.py.")] = "flat",
    vocab: Annotated[int, typer.Option(min=1, max=2**20)] = 128256,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes. [default: 1 and 64]")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="Time for each mode.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """The CPU engine's modes against torch.amax over the same logits."""
    from bench.cpu import run

    run(logits, vocab, batch or [1, 64], dtype, threads, seconds, out)


@app.command()
def gpu(
    minutes: Annotated[float, typer.Option(help="What does not fit is left out, and said to be.")] = 8.0,
    tests: Annotated[bool, typer.Option(help="Run the gpu tests first.")] = True,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes. [default: 1, 8, 64 and 256]")] = None,
    vocab: Annotated[list[int] | None, typer.Option(help="[default: 32000, 128256 and 262144]")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """On a GPU: the gpu tests, then every mode against torch's own operations and FlashInfer."""
    from bench.gpu import BATCHES, VOCABS, run

    run(minutes, tests, batch or list(BATCHES), vocab or list(VOCABS), out)


@app.command()
def grammar(
    vocab: Annotated[int, typer.Option(min=1, max=2**20)] = 128256,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes. [default: 1, 8 and 32]")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="Time for each batch size and mask.")] = 3.0,
) -> None:
    """A grammar's mask inside the pass that samples, against applying it apart."""
    from bench.grammar import run

    run(vocab, batch or [1, 8, 32], threads, seconds)


@app.command()
def serving(
    vocab: Annotated[int, typer.Option(min=64, max=2**20)] = 128256,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes. [default: 1, 8 and 32]")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """vLLM with and without fastsample: the sampler's time, and tokens per second."""
    from bench.serving import run

    run(vocab, batch or [1, 8, 32], out)


if __name__ == "__main__":
    app(prog_name="python -m bench")
