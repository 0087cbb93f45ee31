"""The benchmarks: do they keep what was measured, and say what the files say? No time is tested.

Whether they refuse wrong work is asked in test_bench_gate.py.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind site-packages, where the fastsample under test is

from bench import compare, gate, generate, peers, record, summary, timing  # noqa: E402
from bench.__main__ import app  # noqa: E402
from bench.modes import BY_NAME, MODES, make_logits, prepare  # noqa: E402

SMALL = ["--vocab", "300", "--batch", "1", "--threads", "1", "--seconds", "0.001"]
# A shell's background job ignores SIGINT, and so would its children; a terminal's command does not.
TERMINAL = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
COMMAND = [sys.executable, "-c", TERMINAL + "runpy.run_module('bench', run_name='__main__', alter_sys=True)"]


def bench(*args: Any, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def measured(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["results"]


# Peers ----------------------------------------------------------------------------------------------------------------


def test_a_peer_that_breaks_is_listed(monkeypatch, tmp_path):
    (tmp_path / "broken_peer.py").write_text("raise OSError('no such library')")
    monkeypatch.syspath_prepend(tmp_path)
    peer = peers.Peer("x", peers.BY_NAME["torch"].make, "pip install x", "", ("broken_peer",))
    assert peer.why_not() == "OSError: no such library (pip install x)"
    assert "torch" in bench("peers")


# Time -----------------------------------------------------------------------------------------------------------------


def test_contenders_take_turns():
    calls: list[str] = []

    class Step:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self) -> None:
            raise AssertionError("a step with seconds() says itself what counts")

        def seconds(self) -> float:
            calls.append(self.name)
            return 1.0 if self.name == "A" else 3.0

    pairs = timing.in_turns(Step("A"), Step("B"), 0.0)
    assert pairs == [(1.0, 3.0)] * timing.LEAST
    assert "".join(calls[6:]) == "AB" * timing.LEAST


def test_spread():
    assert timing.spread(range(101)) == {"median": 50, "p10": 10, "p90": 90}


# Commands -------------------------------------------------------------------------------------------------------------


def test_compare(tmp_path):
    out = tmp_path / "c.json"
    text = bench("compare", *SMALL, "--peer", "torch", "--peer", "vLLM", "--mode", "k50 p.95", "--out", out)
    data = json.loads(out.read_text())
    assert {r["section"] for r in data["results"]} >= {"peers", "vocab", "batch", "logits", "dtype", "isa"}
    assert data["machine"]["isa"]
    assert data["runs"][0]["gigabytes_per_second"]["1"] > 0
    for r in data["results"]:
        assert "us" in r or (r["against"] == "vLLM" and "pip install vllm" in r["missing"])
    figure = next(r for r in data["results"] if r["against"] == "torch")
    assert figure["turns"] >= timing.LEAST
    assert figure["us"]["p10"] <= figure["us"]["median"] <= figure["us"]["p90"]
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"c-peers-v300-b1.png", "c-vocab.png", "c-batch.png", "c-logits.png"}
    assert "vLLM: not installed" in text


def test_figures_and_plots_have_a_place_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    text = bench("compare", *SMALL, "--section", "batch", "--mode", "T")
    stem = f"compare-{record.slug(record.machine())}"
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.json", f"{stem}-batch.png"}
    assert f"{stem}.json" in text.replace(" ", "")


def test_a_refused_contender_has_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "draws_differ", lambda *_: "another distribution")
    gate.peer_differs.cache_clear()
    out = tmp_path / "c.json"
    text = bench("compare", *SMALL, "--section", "peers", "--peer", "torch", "--mode", "T", "--out", out, status=1)
    gate.peer_differs.cache_clear()
    assert "REFUSED, no figure: torch, T" in text
    assert all("us" not in r and "another distribution" in r["refused"] for r in measured(out))


def test_a_wrong_engine_has_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "SEED", 2)
    compare.ours_differs.cache_clear()
    args = ("--section", "batch", "--mode", "T", "--no-plots")
    bench("compare", *SMALL, *args, "--out", tmp_path / "c.json", status=1)
    names = [word for mode in MODES for word in ("--mode", mode.name)]
    bench("cpu", *SMALL, *names, "--out", tmp_path / "cpu.json", status=1)
    compare.ours_differs.cache_clear()
    assert all("us" not in r and r["refused"].startswith("ours: ") for r in measured(tmp_path / "c.json"))
    assert all(("us" in r) == (r["mode"] == "greedy") for r in measured(tmp_path / "cpu.json"))


def test_a_disturbed_figure_is_taken_again_and_the_calmest_kept(tmp_path, monkeypatch):
    out, loads = tmp_path / "c.json", [0.9, 0.7, 0.8, 0.5, 0.1, 0.0]
    monkeypatch.setattr(timing.Others, "cores", lambda _: loads.pop(0))
    some = ("compare", *SMALL, "--section", "batch", "--mode", "T", "--no-plots", "--resume", "--out", out)
    assert "Not alone: during 1 of 1 figures" in bench(*some)
    assert [r["others"] for r in measured(out)] == [0.7]
    assert "Not alone" not in bench(*some)
    assert [r["others"] for r in measured(out)] == [0.1]
    bench(*some)
    assert loads == [0.0]


def test_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(timing.Others, "cores", lambda _: 0.0)  # alone, or it would measure again
    out = tmp_path / "c.json"
    some = ("compare", *SMALL, "--section", "dtype", "--no-plots", "--out", out)
    bench(*some, "--mode", "greedy")
    before = measured(out)
    bench(*some, "--mode", "greedy", "--mode", "T", "--resume")
    assert measured(out)[: len(before)] == before
    assert [r["mode"] for r in measured(out)] == ["greedy", "greedy", "T", "T"]
    monkeypatch.setattr(compare, "machine", lambda *_: {"cpu": "another", "isa": "x"})
    assert "cannot resume" in str(CliRunner().invoke(app, [str(a) for a in (*some, "--resume")]).exception)


def test_an_interrupted_run_keeps_what_it_measured(tmp_path):
    out = tmp_path / "c.json"
    args = ["compare", "--section", "logits", "--seconds", "0.3", "--no-plots", "--out", str(out)]
    process = subprocess.Popen([*COMMAND, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (out.exists() and len(measured(out)) >= 2) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130, text
    assert "what was measured is kept" in text
    assert "us" in measured(out)[-1]
    assert len(measured(out)) < len(compare.points(compare.Choice(sections=("logits",))))


def test_cpu_measures_a_mode_beside_another(tmp_path):
    out = tmp_path / "cpu.json"
    text = bench("cpu", *SMALL, "--mode", "from_probs", "--mode", "T", "--out", out)
    beside, alone = measured(out)
    assert (beside["mode"], beside["against"], beside["limit"]) == ("from_probs", "from_logits", 1.5)
    assert (alone["mode"], "against" in alone) == ("T", False)
    assert "from_logits" in text
    assert "torch.amax" in text
    (machine,) = record.load([out])
    assert [line[0] for line in summary.amax_grid(machine).lines] == ["T"]
    assert [line[0] for line in summary.filter_grid(machine).lines] == ["from_probs"]


def test_generate(tmp_path):
    out = tmp_path / "g.json"
    args = ("generate", "--model", "shipped", "--batch", "2", "--tokens", "3", "--seconds", "0", "--out", out)
    bench(*args)
    own, other = measured(out)
    assert (own["sampler"], other["sampler"]) == ("fastsample", "Hugging Face")
    assert own["turns"] == generate.LEAST
    assert 0 < own["sampling_share"]["median"] < 1


def test_generate_refuses_another_distribution():
    model = generate.MODELS["shipped"]().eval()
    ids = torch.full((4, 3), 7)
    assert generate.differs(model, ids, 8, {}) is None
    assert generate.differs(model, ids, 8, {"temperature": 9.0}) is not None


@pytest.mark.parametrize(
    ("command", "option"),
    [*(("compare", option) for option in ("--section", "--peer", "--mode", "--logits")), ("cpu", "--mode")],
)
def test_unknown_names(command, option):
    text = bench(command, option, "nonsense", status=2)
    assert f"{option}: 'nonsense': expected one of " in text.replace("for '", "").replace(f"{option}'", option)


def test_a_comparison_of_nothing(tmp_path):
    args = ("compare", "--section", "isa", "--batch", "7", "--out", tmp_path / "c.json")
    assert "nothing to measure" in str(CliRunner().invoke(app, [str(a) for a in args]).exception)


# Pages ----------------------------------------------------------------------------------------------------------------


def figures(path: Path, kind: str, results: list[dict[str, Any]], **where: Any) -> Path:
    own = {"cpu": "<Some> CPU", "cores": 3, "isa": "avx512", "packages": {"torch": "9.9"}} | where
    run = {"date": "2031-02-03", "command": f"python -m bench {kind}"}
    path.write_text(json.dumps({"kind": kind, "machine": own, "runs": [run], "results": results}))
    return path


def point(**own: Any) -> dict[str, Any]:
    place = {"section": "peers", "against": "torch", "mode": "T", "logits": "lm", "rows": 1, "vocab": 999, "threads": 1}
    place |= {"dtype": "float32", "isa": ""}
    spread = {name: {"median": n, "p10": n, "p90": n} for name, n in (("us", 20.0), ("against_us", 3000.0))}
    return place | spread | {"ratio": {"median": 150.0, "p10": 150.0, "p90": 150.0}, "turns": 5} | own


def test_report(tmp_path):
    missing = point(against="mlx-lm", missing="not installed: pip install mlx")
    for name in ("us", "against_us", "ratio"):
        del missing[name]
    one = figures(tmp_path / "a.json", "compare", [point(), missing])
    on_gpu = {"step": "times", "mode": "T", "rows": 1, "vocab": 5, "dtype": "float32", "name": "fastsample cuda"}
    found = {"found": {"cold_us": 7.25, "hot_us": 6.0, "graph": True}}
    two = figures(tmp_path / "b.json", "gpu", [on_gpu | found], gpu="Some GPU")
    bench("report", one, two, "--out", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "3 ms (150x)" in page
    assert "7.2 / 6.0" in page
    assert "&lt;Some&gt; CPU" in page
    assert "mlx-lm: not installed: pip install mlx" in page
    assert "2031-02-03  python -m bench compare" in page
    assert "torch 9.9" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://", page)


def test_a_later_figure_replaces_an_earlier_one_and_an_absence(tmp_path):
    absent = {k: v for k, v in point().items() if not isinstance(v, dict)} | {"missing": "not installed"}
    files = [figures(tmp_path / f"{i}.json", "compare", [r]) for i, r in enumerate((absent, point(), absent))]
    (machine,) = record.load(files)
    assert machine.of("compare") == [point()]


def test_files_of_other_commands(tmp_path):
    own = figures(tmp_path / "a.json", "compare", [point()])
    other = tmp_path / "b.json"
    other.write_text("{}")
    assert record.results_in(tmp_path) == [own]
    with pytest.raises(SystemExit, match="expected a file of python -m bench compare"):
        record.load([own, other])


def test_readme_section_is_up_to_date():
    assert bench("readme", "--check") == "README.md is up to date docs/performance.md is up to date"


def test_readme_section_follows_the_figures(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/performance.md"):
        (tmp_path / name).write_text(f"before\n{summary.BEGIN}\n{summary.END}\nafter\n")
    peer, isa = point(), point(section="isa", against="avx512", isa="avx2", others=1.25)
    file = figures(tmp_path / "a.json", "compare", [peer, isa])
    assert summary.update(tmp_path, [file], check=True) == 1
    assert summary.update(tmp_path, [file], check=False) == 0
    text, tables = ((tmp_path / name).read_text() for name in ("README.md", "docs/performance.md"))
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "<Some> CPU, 3 cores, avx512, 2031-02-03" in text
    assert "<Some> CPU, 3 cores, avx512, 2031-02-03" in tables
    assert "| torch | 3 ms (150x) |" in tables
    assert (
        "| T | lm | 1 | 999 | float32, avx2, 1 thread | avx512 | 20.0 | 3000.0 | 150.00 (150.00 - 150.00) |" in tables
    )
    assert "other processes kept up to 1.2 cores busy" in tables
    assert summary.update(tmp_path, [file], check=True) == 0
    figures(tmp_path / "a.json", "compare", [point(us={"median": 7.0, "p10": 7.0, "p90": 7.0}), isa])
    assert summary.update(tmp_path, [file], check=True) == 1
    assert "README.md is out of date" in capsys.readouterr().out


def test_bars_are_logarithmic():
    chart = summary.log_bars([("fastsample", 10.0, None), ("torch", 200.0, 20.0), ("other", 1280.0, 128.0)], width=8)
    assert [line.count("\u2588") for line in chart.splitlines()] == [1, 5, 8]
    assert chart.splitlines()[1].split() == ["torch", "200", "us", "\u2588" * 5, "20x"]


def test_ratios_of_the_page_follow_from_the_figures_beside_them():
    """Of the shown figures, not of others; a peer with another order of filters stands below our time in that order."""
    units = {"us": 1.0, "ms": 1e3, "s": 1e6}
    ours, seen = [], 0
    for line in (ROOT / "docs" / "performance.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        times = [re.match(r"\**([\d.]+) (us|ms|s)\b(?: \(([\d.,]+)x\))?", cell) for cell in cells[1:]]
        if "fastsample" in cells[0] and any(times):
            ours = times
        elif any(times):
            for its, own in zip(times, ours, strict=True):
                if its is not None and its[3]:
                    ratio = float(its[1]) * units[its[2]] / (float(own[1]) * units[own[2]])
                    assert its[3] + "x" == timing.factor(ratio), line
                    seen += 1
    assert seen > 50


def test_prepared_steps_are_the_modes(monkeypatch):
    x = make_logits("lm", 2, 400, torch.float32)
    assert prepare(BY_NAME["T n=16"], x)().tokens.shape == (2, 16)
    assert prepare(BY_NAME["everything"], x)().logprobs is not None
