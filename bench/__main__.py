"""`python -m bench`: benchmarks that print tables and write JSON and plots. `pytest bench` runs the suite."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
sys.path.append(str(ROOT))  # behind site-packages: an installed fastsample, not the sources beside us, is measured

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None)
Names = list[str] | None
Numbers = list[int] | None


def known(values: Iterable[str] | None, names: Iterable[str], option: str) -> None:
    """A name that does not exist is an error, not an empty table."""
    for value in values or ():
        if value not in names:
            raise typer.BadParameter(f"{value!r}: expected one of {', '.join(names)}", param_hint=option)


@app.callback()
def root() -> None:
    """Benchmarks of fastsample."""


@app.command()
def compare(
    section: Annotated[
        Names, typer.Option(help="peers, vocab, batch, logits, dtype, isa, threads. [default: all]")
    ] = None,
    peer: Annotated[Names, typer.Option(help="Only these peers, as `python -m bench peers` lists them.")] = None,
    mode: Annotated[Names, typer.Option(help="Only these modes of bench/modes.py.")] = None,
    logits: Annotated[Names, typer.Option(help="Only these makers of tests/support/cases.py.")] = None,
    batch: Annotated[Numbers, typer.Option(help="Only these batch sizes.")] = None,
    vocab: Annotated[Numbers, typer.Option(help="These vocabularies instead of a section's own.")] = None,
    threads: Annotated[Numbers, typer.Option(help="These numbers of threads. [default: 1 and torch's]")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each point; slow contenders take five turns.")] = 0.5,
    minutes: Annotated[float, typer.Option(help="Stop then, with what was measured kept.")] = 1e6,
    out: Annotated[Path | None, typer.Option(help="JSON; plots lie beside it. [default: bench/results/...]")] = None,
    resume: Annotated[bool, typer.Option(help="Measure what the file lacks, or holds from a busy machine.")] = False,
    calm: Annotated[float, typer.Option(help="Beside more busy cores than this a point is measured again.")] = 0.2,
    plots: Annotated[bool, typer.Option(help="Draw the plots.")] = True,
) -> None:
    """Us against everybody else, and against one read of the row: table, JSON and plots. Ctrl-C keeps what is there."""
    from bench import peers as others
    from bench.compare import SECTIONS, Choice, run
    from bench.modes import BY_NAME, MAKERS

    known(section, SECTIONS, "--section")
    known(peer, others.BY_NAME, "--peer")
    known(mode, BY_NAME, "--mode")
    known(logits, MAKERS, "--logits")
    lists = (section, peer, mode, logits, batch, vocab, threads)
    choice = Choice(*(tuple(values or ()) for values in lists))
    raise typer.Exit(run(choice, seconds, minutes, calm, out, resume, plots))


@app.command()
def peers() -> None:
    """Who we can be compared with here, what their times cover, and how to install who is missing."""
    from bench.peers import listing

    listing()


@app.command()
def cpu(
    mode: Annotated[Names, typer.Option(help="Only these modes of bench/modes.py.")] = None,
    logits: Annotated[str, typer.Option(help="Maker of logits in tests/support/cases.py.")] = "flat",
    vocab: Annotated[int, typer.Option(min=1, max=2**20)] = 128256,
    batch: Annotated[Numbers, typer.Option(help="Batch sizes. [default: 1 and 64]")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="Time for each mode.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """The CPU engine's modes against torch.amax or a plainer mode, beside what is aimed at."""
    from bench.cpu import run
    from bench.modes import BY_NAME, MAKERS

    known(mode, BY_NAME, "--mode")
    known([logits], MAKERS, "--logits")
    known([dtype], ("float32", "float16", "bfloat16"), "--dtype")
    raise typer.Exit(run(logits, vocab, batch or [1, 64], dtype, threads, seconds, out, mode or ()))


@app.command()
def generate(
    model: Annotated[Names, typer.Option(help="shipped, gpt2-small, wide-vocab. [default: all]")] = None,
    batch: Annotated[Numbers, typer.Option(help="Batch sizes. [default: 1, 8 and 32]")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens in each call.")] = 16,
    seconds: Annotated[float, typer.Option(help="Time for each model and batch; at least three turns.")] = 6.0,
    threads: Annotated[int | None, typer.Option(min=1, help="[default: torch's]")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON. [default: bench/results/...]")] = None,
) -> None:
    """Tokens per second of Hugging Face generate: its own sampler against ours, and each step's share of sampling."""
    from bench.generate import MODELS, run

    known(model, MODELS, "--model")
    raise typer.Exit(run(model or list(MODELS), batch or [1, 8, 32], tokens, seconds, threads, out))


@app.command()
def gpu(
    step: Annotated[Names, typer.Option(help="Only these steps of bench/campaign/steps.py. [default: all]")] = None,
    minutes: Annotated[float, typer.Option(help="For this call; what does not fit is left for the next.")] = 9.5,
    mode: Annotated[Names, typer.Option(help="Time these modes of bench/modes.py. [default: five of them]")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON. [default: bench/results/gpu-CARD.json]")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with what the file holds.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Forget what these steps found before.")] = False,
    dry: Annotated[bool, typer.Option("--dry", help="Rehearse all of it on a CPU. [--out: gpu-dry.json]")] = False,
) -> None:
    """A campaign on a GPU, step by step, each bounded; call it again until all are done."""
    from bench.campaign.run import HEADLINE, Plan, run
    from bench.campaign.steps import BY_NAME

    known(step, BY_NAME, "--step")
    if mode:
        from bench.modes import BY_NAME as MODES

        known(mode, MODES, "--mode")
    plan = Plan(tuple(step or ()), minutes, out, resume, again, dry, tuple(mode or HEADLINE))
    raise typer.Exit(run(plan))


@app.command(hidden=True)
def gpu_step(
    name: str,
    out: Annotated[Path, typer.Option()],
    seconds: Annotated[float, typer.Option()],
    mode: Annotated[list[str], typer.Option()],
    dry: Annotated[bool, typer.Option("--dry")] = False,
) -> None:
    """One step of `gpu`, which starts it."""
    from bench.campaign.one import TIME_TO_STOP, run
    from bench.campaign.site import Site, machine, scratch_of
    from bench.campaign.steps import BY_NAME
    from bench.record import Results

    results = Results(out, "gpu", machine(dry), resume=True, joins=False)
    site = Site(dry, scratch_of(out), time.perf_counter() + seconds - TIME_TO_STOP, tuple(mode))
    raise typer.Exit(run(BY_NAME[name], site, results))


@app.command()
def tuned(file: Annotated[Path, typer.Argument(help="A JSON file of `gpu`.")]) -> None:
    """The layouts that `gpu` found fastest, as lines of csrc/cuda/tuned.h and fastsample/backends/triton_tuned.py."""
    import json

    from bench.campaign.tuning import as_code

    data = json.loads(file.read_text())
    print(as_code(data["machine"], data["results"]))


@app.command()
def report(
    files: Annotated[list[Path] | None, typer.Argument(help="JSON files. [default: bench/results/*.json]")] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
) -> None:
    """One self-contained HTML page of everything that was measured: plots, tables, machines, commands."""
    from bench.record import RESULTS, results_in
    from bench.report import write

    write(files or results_in(RESULTS), out)


@app.command()
def readme(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 where it is out of date.")] = False,
) -> None:
    """README's performance section, docs/performance.md's tables and the plots, from bench/results/*.json."""
    from bench.plots import draw_all
    from bench.record import RESULTS, load, results_in
    from bench.summary import update

    files = results_in(RESULTS)
    for machine in () if check else load(files):
        draw_all(machine, RESULTS / f"compare-{machine.slug}")
    raise typer.Exit(update(ROOT, files, check))


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
def draws(
    vocab: Annotated[Numbers, typer.Option(help="[default: 300, 4096 and 151936]")] = None,
    num: Annotated[Numbers, typer.Option(help="Draws of each row. [default: 10^4, 10^5 and 10^6]")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="Time for each of them; five turns at least.")] = 2.0,
) -> None:
    """Many draws of a row, against torch.multinomial."""
    from bench.draws import run

    run(vocab or [300, 4096, 151_936], num or [10**4, 10**5, 10**6], batch, threads, seconds)


@app.command()
def kept(
    vocab: Annotated[int, typer.Option(min=2, max=2**20)] = 151_936,
    batch: Annotated[Numbers, typer.Option(help="Batch sizes. [default: 1, 8 and 64]")] = None,
    logits: Annotated[str, typer.Option(help="Maker of logits in tests/support/cases.py.")] = "lm",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="Time for each batch size and mode; five turns at least.")] = 2.0,
) -> None:
    """What kept sets, their mass and the entropy cost beside a step's tokens."""
    from bench.kept import run
    from bench.modes import MAKERS

    known([logits], MAKERS, "--logits")
    known([dtype], ("float32", "float16", "bfloat16"), "--dtype")
    run(vocab, batch or [1, 8, 64], logits, dtype, threads, seconds)


@app.command()
def rows(
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    count: Annotated[int | None, typer.Option(min=1, help="Only so many rows. [default: all]")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each mode; five turns at least for each row.")] = 10.0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Make the recorded rows anew, with the model.")] = False,
) -> None:
    """The benchmarks' lm logits against recorded ones of SmolLM2: the shape of the distribution, and the time."""
    from bench import rows as compared

    known([dtype], ("float32", "float16", "bfloat16"), "--dtype")
    raise typer.Exit(compared.record() if record else compared.run(dtype, count, seconds, threads, out))


@app.command()
def ranks(
    vocab: Annotated[int, typer.Option(min=2, max=2**20)] = 151_936,
    batch: Annotated[Numbers, typer.Option(help="Batch sizes. [default: 1, 8 and 64]")] = None,
    count: Annotated[int, typer.Option(min=1, help="Ranks, a process of one thread each.")] = 2,
    logits: Annotated[str, typer.Option(help="Maker of logits in tests/support/cases.py.")] = "lm",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    seconds: Annotated[float, typer.Option(help="Time for each batch size and mode; three turns at least.")] = 2.0,
) -> None:
    """Rows split over the ranks of a process group, against gathering their logits and then sampling."""
    from bench.modes import MAKERS
    from bench.ranks import run

    known([logits], MAKERS, "--logits")
    known([dtype], ("float32", "float16", "bfloat16"), "--dtype")
    run(vocab, batch or [1, 8, 64], count, logits, dtype, seconds)


@app.command()
def speculate(
    vocab: Annotated[int, typer.Option(min=2, max=2**20)] = 151_936,
    batch: Annotated[Numbers, typer.Option(help="Requests. [default: 1, 8 and 32]")] = None,
    drafts: Annotated[int, typer.Option(min=1, help="Drafts of each request.")] = 4,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="Time for each row of contenders; five turns at least.")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    acceptance: Annotated[bool, typer.Option("--acceptance", help="How many drafts each rule accepts.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Tokens per second with drafts and without.")] = False,
    model: Annotated[str, typer.Option(help="smollm2 or tiny, for --acceptance and --text.")] = "smollm2",
    count: Annotated[int, typer.Option(min=2, help="Verifications behind each figure of --acceptance.")] = 192,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens in each call of --text.")] = 96,
) -> None:
    """Verification of drafts: its time, ours and others'; with --acceptance or --text what it is worth to a model."""
    if not acceptance and not text:
        from bench.speculate import run

        raise typer.Exit(run(vocab, batch or [1, 8, 32], drafts, threads, seconds, out))
    from bench import acceptance as accepted
    from bench import drafted
    from bench.models import MODELS

    known([model], MODELS, "--model")
    if acceptance and text:
        raise typer.BadParameter("--acceptance and --text: expected one of them")
    if acceptance:
        raise typer.Exit(accepted.run(model, count, drafts, threads, out))
    raise typer.Exit(drafted.run(model, tokens, drafts, threads, seconds, out))


@app.command()
def decoders(
    decoder: Annotated[Names, typer.Option(help="llama.cpp, onnxruntime-genai, mlx-lm. [default: all]")] = None,
    batch: Annotated[Numbers, typer.Option(help="Sequences. [default: 1 and 8]")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens of each sequence in a turn.")] = 32,
    seconds: Annotated[float, typer.Option(help="Time for each row of samplers; at least five turns.")] = 6.0,
    out: Annotated[Path | None, typer.Option(help="JSON. [default: bench/results/...]")] = None,
) -> None:
    """Tokens per second of llama.cpp, ONNX Runtime GenAI and MLX-LM, with their own samplers and with fastsample."""
    from bench.decoders import DECODERS, run

    known(decoder, DECODERS, "--decoder")
    raise typer.Exit(run(decoder or list(DECODERS), batch or [1, 8], tokens, seconds, out))


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
