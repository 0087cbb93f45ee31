"""The figures of one machine as plots: `draw_all`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.record import Machine, Record
from bench.summary import bars_of
from bench.timing import duration, factor

OURS, THEIRS, FLOOR = "#c2410c", "#94a3b8", "#1f2937"
COLOURS = {"greedy": "#475569", "k50 p.95": "#c2410c", "min_p": "#0f766e", "p.95": "#7c3aed", "T": "#2563eb"}
STYLE = {
    "figure.dpi": 120,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDTH = 5.6  # inches: on a phone the text is still read
TITLES = {
    "peers": "Everybody's time for a row, and how many times ours it is",
    "vocab": "Time for a row against the size of the vocabulary, with one read of the row",
    "batch": "Time for a step against the batch size, one thread and all",
    "logits": "Time for a row, one dot per distribution",
    "generate": "Tokens per second of generate, and the share of a step spent sampling",
    "gpu": "Time for a step on the GPU against the batch size, inputs cold, with one read of the rows",
}


def plain(value: float, _: Any = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def measured(records: Iterable[Record]) -> list[Record]:
    return [r for r in records if "us" in r]


def modes_of(records: Iterable[Record]) -> list[str]:
    present = {r["mode"] for r in records}
    return [mode for mode in COLOURS if mode in present] + sorted(present - COLOURS.keys())


def logarithmic(axis: Any, which: str = "xy") -> None:
    for name in which:
        getattr(axis, f"set_{name}scale")("log")
        getattr(axis, f"{name}axis").set_major_formatter(FuncFormatter(plain))
        getattr(axis, f"{name}axis").set_minor_locator(NullLocator())
    axis.grid(True, which="major", color="#e2e8f0", linewidth=0.8)
    axis.set_axisbelow(True)


def middle(record: Record, name: str = "us") -> float:
    return float(record[name]["median"])


def one_vocab(records: Iterable[Record]) -> list[Record]:
    """The figures of the vocabulary that has most of them."""
    own = measured(records)
    most = Counter(r["vocab"] for r in own).most_common(1)
    return [r for r in own if r["vocab"] == most[0][0]]


def peer_bars(records: list[Record]) -> Figure | None:
    """One panel per mode: microseconds per row of everybody, ours first; one shape, one thread."""
    records = [r for r in measured(records) if r["threads"] == 1 and r["logits"] == "lm"]
    modes = modes_of(records)
    if not modes:
        return None
    rows, vocab = records[0]["rows"], records[0]["vocab"]
    heights = [len(bars_of([r for r in records if r["mode"] == mode], mode)) for mode in modes]
    figure, axes = plt.subplots(
        len(modes),
        1,
        figsize=(WIDTH, 0.8 + 0.22 * sum(heights) + 0.25 * len(modes)),
        sharex=True,
        height_ratios=heights,
    )
    widest = max(middle(r, "against_us") for r in records) / rows
    narrowest = min(middle(r) for r in records) / rows
    for axis, mode in zip([axes] if len(modes) == 1 else axes, modes, strict=True):
        own = [r for r in records if r["mode"] == mode]
        names, values, ratios = zip(*bars_of(own, mode), strict=True)
        per_row = [value / rows for value in values]
        colours = [OURS if ratio is None else THEIRS for ratio in ratios]
        axis.barh(range(len(names)), per_row, color=colours, height=0.72)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        for i, (value, ratio) in enumerate(zip(per_row, ratios, strict=True)):
            label = duration(value) + ("" if ratio is None else f"  {factor(ratio)}")
            axis.text(value * 1.08, i, label, va="center", fontsize=8.5)
        axis.set_title(mode, loc="left", fontsize=10, fontweight="bold")
        logarithmic(axis, "x")
        axis.set_xlim(narrowest / 3, widest * 9)
    plt.xlabel("us per row (log)")
    figure.suptitle(f"Logits to token, V = {vocab:,}, B = {rows}, LM-like logits, one thread", fontsize=11)
    return figure


def against_vocab(records: list[Record], gigabytes: dict[str, float]) -> Figure | None:
    """Microseconds per row against V, in cache and from memory, with one read of the row."""
    records = measured(records)
    if not records:
        return None
    panels = [
        ("B = 1: the row is in cache", [r for r in records if r["rows"] == 1]),
        ("128 MiB of rows: they come from memory", [r for r in records if r["rows"] > 1]),
    ]
    panels = [panel for panel in panels if panel[1]]
    figure, axes = plt.subplots(len(panels), 1, figsize=(WIDTH, 3.75 * len(panels)), sharex=True, squeeze=False)
    for axis, (title, own) in zip(axes[:, 0], panels, strict=True):
        for mode in modes_of(own):
            line = sorted((r["vocab"], middle(r) / r["rows"]) for r in own if r["mode"] == mode)
            axis.plot(*zip(*line, strict=True), marker="o", markersize=3.5, label=mode, color=COLOURS.get(mode))
        floors: dict[int, list[float]] = {}
        for r in own:
            floors.setdefault(r["vocab"], []).append(middle(r, "against_us") / r["rows"])
        line = sorted((vocab, min(values)) for vocab, values in floors.items())
        axis.plot(*zip(*line, strict=True), color=FLOOR, linestyle="--", label="torch.amax (reads once)")
        if own[0]["rows"] > 1 and gigabytes.get("1"):
            vocabs = [vocab for vocab, _ in line]
            axis.plot(
                vocabs,
                [4 * v / gigabytes["1"] / 1e3 for v in vocabs],
                color=FLOOR,
                linestyle=":",
                label=f"memory floor: 4V bytes at {gigabytes['1']:.3g} GB/s",
            )
        logarithmic(axis)
        axis.set_ylabel("us per row")
        axis.set_title(title, loc="left", fontsize=10)
        axis.legend(fontsize=8, frameon=False)
    axes[-1, 0].set_xlabel("vocabulary V")
    figure.suptitle("Time for a row against V (float32, LM-like logits, one thread)", fontsize=11)
    return figure


def against_batch(records: list[Record]) -> Figure | None:
    """Microseconds per step against B, one thread and all."""
    records = one_vocab(records)
    if not records:
        return None
    figure, axis = plt.subplots(figsize=(WIDTH, 4.5))
    threads = sorted({r["threads"] for r in records})
    for mode in modes_of(records):
        for n, style in zip(threads, ("-", "--", ":", "-."), strict=False):
            line = sorted((r["rows"], middle(r)) for r in records if (r["mode"], r["threads"]) == (mode, n))
            label = f"{mode}" if n == threads[0] else None
            axis.plot(*zip(*line, strict=True), style, marker="o", markersize=3, label=label, color=COLOURS.get(mode))
    for n, style in zip(threads[1:], ("--", ":", "-."), strict=False):
        axis.plot([], [], style, color=FLOOR, label=f"{n} threads")
    logarithmic(axis)
    axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(base=2, numticks=20))
    axis.set_xlabel("batch B")
    axis.set_ylabel("us per step")
    axis.legend(fontsize=8, frameon=False)
    axis.set_title(f"Scaling with B and threads, V = {records[0]['vocab']:,}, LM-like logits", fontsize=11, loc="left")
    return figure


def against_logits(records: list[Record]) -> Figure | None:
    """A line of dots per mode: one dot per distribution."""
    records = one_vocab(records)
    if not records:
        return None
    modes = modes_of(records)
    kinds = list(dict.fromkeys(r["logits"] for r in records))
    colours = plt.get_cmap("tab10")
    figure, axis = plt.subplots(figsize=(WIDTH, 1.6 + 0.36 * len(modes)))
    for y, mode in enumerate(modes):
        own = {r["logits"]: middle(r) for r in records if r["mode"] == mode}
        axis.plot([min(own.values()), max(own.values())], [y, y], color="#cbd5e1", linewidth=3, zorder=1)
        for i, kind in enumerate(kinds):
            if kind in own:
                axis.scatter(own[kind], y, s=26, color=colours(i), zorder=2, label=kind if y == 0 else None)
        ratio = max(own.values()) / min(own.values())
        axis.text(max(own.values()) * 1.08, y, f"worst / best {ratio:.2g}", va="center", fontsize=8)
    axis.set_yticks(range(len(modes)), modes)
    axis.invert_yaxis()
    logarithmic(axis, "x")
    axis.set_xlim(right=axis.get_xlim()[1] * 2)
    axis.set_xlabel("us (B = 1)")
    figure.legend(fontsize=8, frameon=False, ncol=4, loc="outside lower center")
    axis.set_title(f"Latency against distribution, V = {records[0]['vocab']:,}, one thread", fontsize=11, loc="left")
    return figure


def end_to_end(records: list[Record]) -> Figure | None:
    """Tokens per second of generate, and the share of a step that is sampling."""
    records = [r for r in records if "tokens_per_second" in r]
    if not records:
        return None
    places = list(dict.fromkeys((r["model"], r["vocab"], r["rows"]) for r in records))
    figure, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.55 * len(places)))
    for shift, sampler, colour in ((-0.19, "fastsample", OURS), (0.19, "Hugging Face", THEIRS)):
        for y, place in enumerate(places):
            own = [r for r in records if (r["model"], r["vocab"], r["rows"]) == place and r["sampler"] == sampler]
            for r in own:
                value = r["tokens_per_second"]["median"]
                label = sampler if y == 0 else None
                axis.barh(y + shift, value, height=0.36, color=colour, label=label)
                share = r["sampling_share"]["median"]
                axis.text(value * 1.03, y + shift, f"{value:,.0f}/s, {share:.0%} sampling", va="center", fontsize=8)
    axis.set_yticks(range(len(places)), [f"{model}, V = {vocab:,}\nB = {rows}" for model, vocab, rows in places])
    axis.invert_yaxis()
    logarithmic(axis, "x")
    axis.set_xlim(right=axis.get_xlim()[1] * 8)
    axis.set_xlabel("tokens per second (log)")
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, frameon=False, ncol=2, loc="outside lower center")
    axis.set_title("transformers' generate, end to end", fontsize=11, loc="left")
    return figure


def on_gpu(records: list[Record]) -> Figure | None:
    """Microseconds per step against B of everybody, a panel per mode, with one read of the rows; float32, cold."""
    found = [{**r, **r["found"]} for r in records if "cold_us" in r.get("found", {}) and r["dtype"] == "float32"]
    found = [r | {"us": r["cold_us"]} for r in found if "meaningless" not in r]
    own = one_vocab(found) if found else []
    modes = modes_of(own)
    if not modes:
        return None
    figure, axes = plt.subplots(len(modes), 1, figsize=(WIDTH, 2.7 * len(modes)), sharex=True, squeeze=False)
    for axis, mode in zip(axes[:, 0], modes, strict=True):
        here = [r for r in own if r["mode"] == mode]
        for name in dict.fromkeys(r["name"] for r in here):
            line = sorted((r["rows"], r["us"]) for r in here if r["name"] == name)
            width = 2.2 if name.startswith("fastsample") else 1.1
            axis.plot(*zip(*line, strict=True), marker="o", markersize=3.5, linewidth=width, label=name)
        if floor := sorted({(r["rows"], r["floor_us"]) for r in here if r.get("floor_us")}):
            axis.plot(*zip(*floor, strict=True), color=FLOOR, linestyle="--", label="one read, measured")
        logarithmic(axis)
        axis.set_xticks(sorted({r["rows"] for r in here}))
        axis.set_ylabel("us per step")
        axis.set_title(mode, loc="left", fontsize=10, fontweight="bold")
    axes[0, 0].legend(fontsize=8, frameon=False)
    axes[-1, 0].set_xlabel("batch B")
    figure.suptitle(f"Logits to token on the GPU, V = {own[0]['vocab']:,}, float32, cold", fontsize=11)
    return figure


def figures(machine: Machine) -> dict[str, Callable[[], Figure | None]]:
    """Name -> what draws it, in the order of the report."""
    of = machine.of
    bands = [run["gigabytes_per_second"] for run in machine.runs if "gigabytes_per_second" in run]
    shapes = sorted({(r["vocab"], r["rows"]) for r in of("compare", section="peers")})
    found: dict[str, Callable[[], Figure | None]] = {}
    for v, b in shapes:
        found[f"peers-v{v}-b{b}"] = partial(peer_bars, of("compare", section="peers", vocab=v, rows=b))
    return found | {
        "vocab": lambda: against_vocab(of("compare", section="vocab"), bands[-1] if bands else {}),
        "batch": lambda: against_batch(of("compare", section="batch")),
        "logits": lambda: against_logits(of("compare", section="logits")),
        "generate": lambda: end_to_end(of("generate")),
        "gpu": lambda: on_gpu(of("gpu", step="times")),
    }


def draw_all(machine: Machine, stem: Path) -> list[Path]:
    """Write STEM-NAME.png for all that there are figures of."""
    drawn = []
    with plt.rc_context(STYLE):
        for name, make in figures(machine).items():
            figure = make()
            if figure is None:
                continue
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            drawn.append(path)
    return drawn
