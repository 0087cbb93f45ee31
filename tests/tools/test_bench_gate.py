"""The benchmarks' gate: does it pass the same work, and refuse any other?"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsample as fs

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind site-packages, where the fastsample under test is

from bench import gate, modes, peers, timing  # noqa: E402
from bench.modes import BY_NAME, MODES, SAMPLERS, extra_inputs, make_logits  # noqa: E402


def drawing(logits: torch.Tensor, **fields: Any) -> timing.Step:
    """A peer's step: draws by torch from the distribution of some parameters."""
    probs = fs.probabilities(logits, **fields)
    g = torch.Generator().manual_seed(5)
    return lambda: probs.multinomial(1, generator=g)


@pytest.mark.parametrize("maker", ["flat", "lm", "peaked", "equal"])
@pytest.mark.parametrize("mode", [m for m in MODES if not m.extras and not m.request], ids=lambda mode: mode.name)
def test_gate_passes_the_same_distribution(mode, maker):
    x = make_logits(maker, 3, 700, torch.float32)
    assert gate.draws_differ(drawing(x, **mode.fields), mode, x, {}) is None


WRONG = {
    "temperature": ("T", {"temperature": 1.0}, "do not fit"),
    "no top-p": ("p.95", {"temperature": 0.8}, "outside"),
    "no min-p": ("min_p", {"temperature": 0.8}, "outside"),
    "no top-k": ("k50 p.95", {"temperature": 0.8, "top_p": 0.95}, "outside"),
    "fewer kept": ("k50 p.95", {"temperature": 0.8, "top_k": 40, "top_p": 0.95}, "do not fit"),
    "greedy": ("k50 p.95", {"temperature": 0.0}, "never drawn"),
    "not greedy": ("greedy", {"temperature": 0.8}, "not the row's maximum"),
}


@pytest.mark.parametrize("name", WRONG)
def test_gate_refuses_another_distribution(name):
    mode, fields, reason = WRONG[name]
    x = make_logits("flat", 4, 512, torch.float32)
    assert reason in gate.draws_differ(drawing(x, **fields), BY_NAME[mode], x, {})


def test_gate_refuses_shifted_ids():
    x = make_logits("lm", 4, 512, torch.float32)
    right = drawing(x, **BY_NAME["k50 p.95"].fields)
    assert "outside" in gate.draws_differ(lambda: (right() + 1) % 512, BY_NAME["k50 p.95"], x, {})


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_engine_gate(mode, monkeypatch):
    x = make_logits("flat", 3, 700, torch.bfloat16)
    assert gate.engine_differs(mode, x, "cpu") is None
    if mode.name != "greedy":
        monkeypatch.setattr(gate, "SEED", 2)  # the reference draws with another seed: as if the engine drew wrongly
        assert "differ from the reference's" in gate.engine_differs(mode, x, "cpu")


ENGINE = "cpu"  # of the modes in SAMPLERS


@pytest.fixture
def by_engine(monkeypatch):
    """What the gate compares with is this engine's; histories are short, since the reference is slow on long ones."""
    monkeypatch.setattr(modes, "HISTORY", 200)
    monkeypatch.setattr(fs, "probabilities", functools.partial(fs.probabilities, backend=ENGINE))
    monkeypatch.setattr(fs, "filter_logits", functools.partial(fs.filter_logits, backend=ENGINE))


@pytest.mark.parametrize("mode", SAMPLERS, ids=lambda mode: mode.name)
def test_engine_gate_of_samplers(mode, by_engine):
    x = make_logits("lm", 3, 700, torch.float32)
    assert gate.engine_differs(mode, x, ENGINE) is None


FILTERED = [m for m in SAMPLERS if m.beside and not m.call and not m.of_probs and not m.name.startswith("k50 ")]


@pytest.mark.parametrize("mode", FILTERED, ids=lambda mode: mode.name)
def test_gate_of_samplers_refuses_the_mode_beside(mode, by_engine):
    x = make_logits("lm", 4, 512, torch.float32)
    extras = extra_inputs(mode, x)
    assert gate.draws_differ(drawing(x, **mode.fields, **extras), mode, x, {}) is None
    assert gate.draws_differ(drawing(x, **BY_NAME[mode.beside].fields), mode, x, {}) is not None


def test_modes_stand_beside_modes_that_differ_in_little():
    assert len(BY_NAME) == len({mode.name for mode in [*MODES, *modes.FILTERS, *SAMPLERS]})
    for mode in SAMPLERS:
        assert not mode.beside or BY_NAME[mode.beside].beside == ""


@pytest.mark.parametrize("peer", [p for p in peers.PEERS if "cpu" in p.devices], ids=lambda peer: peer.name)
def test_peers_draw_as_we_do_or_say_how_to_install_them(peer, by_engine):
    missing = peer.why_not()
    if missing:
        assert peer.install in missing
        return
    for mode in peer.modes:
        assert gate.peer_differs(peer, mode, "cpu") is None
