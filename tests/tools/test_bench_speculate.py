"""The benchmarks of speculation: are the contenders right, and is what is counted what they say? No time is tested."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from goodness import LEAST_P, chi_square
from typer.testing import CliRunner

import fastsample as fs

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind site-packages, where the fastsample under test is

from bench import acceptance, drafted, models, speculate, timing, verifiers  # noqa: E402
from bench.__main__ import app  # noqa: E402

SMALL = ("--vocab", 300, "--batch", 2, "--drafts", 3, "--seconds", 0)


def bench(*args: Any, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["speculate", *map(str, args)])
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def measured(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["results"]


# Contenders -----------------------------------------------------------------------------------------------------------


def test_what_flashinfers_formula_gives_has_the_targets_law():
    """A text of three tokens, whose rest is drawn plainly where the drafts end early."""
    torch.manual_seed(1)
    count, drafts, vocab = 40_000, 2, 5
    p, q = (torch.randn(n, vocab).mul(1.5).softmax(-1) for n in (drafts + 1, drafts))
    ids = torch.stack([row.multinomial(count, replacement=True) for row in q], 1)
    out = verifiers.chain_speculative_sampling(q.expand(count, -1, -1), ids, p.expand(count, -1, -1))
    assert 0.1 < float((out[:, drafts] >= 0).double().mean()) < 0.9
    assert bool((out[:, :1] >= 0).all())
    rest = torch.stack([row.multinomial(count, replacement=True) for row in p], 1)
    first, second, third = torch.where(out >= 0, out, rest).T
    law = torch.einsum("i,j,k->ijk", *p.double()).flatten()
    found = np.bincount((first * vocab + second) * vocab + third, minlength=vocab**3)
    assert chi_square(found, (law / law.sum()).numpy()) > LEAST_P


@pytest.mark.parametrize("fields", [{}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 30, "top_p": 0.8}], ids=str)
def test_flashinfers_filters_are_ours(fields):
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(2)) * 2
    own = fs.probabilities(logits, temperature=0.7, **fields)
    torch.testing.assert_close(verifiers.renormalised(logits, 0.7, **fields), own, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "drawn"), [("transformers", False), ("FlashInfer's formula", True)])
def test_the_gate_refuses_another_law(name, drawn):
    right = next(v for v in verifiers.VERIFIERS if v.name == name)

    def hotter(work: verifiers.Work) -> timing.Step:
        work.fields = {**work.fields, "temperature": 1.2}
        return right.make(work)

    assert verifiers.differs(right, "T", drawn) is None
    assert "do not fit" in verifiers.differs(dataclasses.replace(right, make=hotter), "T", drawn)


# Commands -------------------------------------------------------------------------------------------------------------


def test_times(tmp_path):
    out = tmp_path / "s.json"
    text = bench(*SMALL, "--out", out)
    found = {(r["verifier"], r["drawn"], r["mode"]): r for r in measured(out)}
    for name in ("fastsample exact", "transformers", "FlashInfer's formula"):
        assert found[name, True, "k50 p.95"]["us"]["median"] > 0
        assert name in text
    assert found["transformers", False, "p.95"]["us"]["median"] > 0
    assert ("FlashInfer's formula", False, "T") not in found  # it compares laws
    assert found["fastsample exact", False, "greedy"]["turns"] == timing.LEAST
    assert "us" in found["fastsample block", True, "T"]
    for r in found.values():
        assert "us" in r or f"{r['verifier']}: {r['missing']}" in text


def test_a_refused_verifier_has_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(speculate, "differs", lambda v, *_: "another law" if v.make is verifiers.transformers else None)
    out = tmp_path / "s.json"
    assert "another law" in bench(*SMALL, "--out", out, status=1)
    assert all(("us" in r) != (r["verifier"] == "transformers") for r in measured(out) if "missing" not in r)


def test_acceptance(tmp_path):
    out = tmp_path / "a.json"
    text = bench("--acceptance", "--model", "tiny", "--count", 10, "--drafts", 2, "--out", out)
    assert "a mean over 10 verifications" in text
    records = measured(out)
    assert {r["rule"] for r in records if r["way"] == "drawn"} == {"exact", "chain", "block"}
    assert {r["setting"] for r in records} == set(acceptance.SETTINGS)
    for r in records:
        assert 0 <= r["accepted"] <= r["drafted"] <= 2
        assert r["tokens"] == pytest.approx(r["accepted"] + 1, abs=2e-3)


def test_text_with_drafts_and_without(tmp_path):
    out = tmp_path / "t.json"
    text = bench("--text", "--model", "tiny", "--tokens", 6, "--seconds", 0, "--out", out)
    assert "same text" in text
    records = measured(out)
    assert {r["drafts"] for r in records} == {"none", "prompt lookup", "first 3 of 4 layers"}
    assert all(r["same"] == 6 and r["turns"] == drafted.LEAST for r in records)
    assert all(r["runs"] == 6 for r in records if r["drafts"] == "none")


@pytest.mark.parametrize("args", [("--acceptance", "--model", "nonsense"), ("--acceptance", "--text")], ids=str)
def test_wrong_options(args):
    assert "expected one of" in bench(*args, status=2)


# What acceptance is counted on ----------------------------------------------------------------------------------------


@torch.inference_mode()
def test_branches_are_the_models_own_rows():
    model, tokenizer = models.MODELS["tiny"]()
    text = tokenizer(acceptance.PROMPT, return_tensors="pt").input_ids[0]
    at = torch.tensor([3, 9, len(text)])
    branches = acceptance.Branches(model, text, at)
    drafts = torch.tensor([[1, 4], [2, 5], [3, 6]])
    for _ in range(2):
        rows = [branches.restart()[0], *(branches.grow(ids)[0] for ids in drafts.T)]
        for branch, (position, ids) in enumerate(zip(at, drafts, strict=True)):
            own = model(torch.cat([text[:position], ids])[None]).logits[0, position - 1 :]
            torch.testing.assert_close(torch.stack([r[branch] for r in rows]), own, atol=1e-3, rtol=1e-4)


@torch.inference_mode()
def test_rows_of_first_layers_are_those_of_a_model_without_the_others():
    model, _ = models.MODELS["tiny"]()
    ids = torch.arange(9)[None]
    states = model(ids, output_hidden_states=True).hidden_states
    short = models.first_layers(model, 2)
    torch.testing.assert_close(models.rows_after(model, states[2]), short(ids).logits, atol=1e-3, rtol=1e-4)


def test_prompt_lookup_takes_the_longest_and_latest_match():
    assert acceptance.looked_up([1, 2, 3, 9, 8, 2, 3, 7, 6, 1, 2, 3], 2) == [9, 8]
    assert acceptance.looked_up([5, 3, 1, 5, 3, 2, 5, 3], 4) == [2, 5, 3]
    assert acceptance.looked_up([1, 2, 3], 4) == []
    ids, counts = acceptance.lookup_drafts(torch.tensor([4, 4, 5, 4]), torch.tensor([1, 2, 4]), 3)
    assert ids.tolist() == [[-1] * 3, [4, -1, -1], [5, 4, -1]]
    assert counts.tolist() == [0, 1, 2]


def test_agreed():
    assert drafted.agreed(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])) == 2
