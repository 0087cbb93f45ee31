"""fs.explain tells what the engines do: every number is held against sample, filter_logits, probabilities or a law."""

from __future__ import annotations

import html
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import conformance
import pytest
import torch
from cases import CASES, EXTRAS, MAKERS, PARAMS, PENALTY_SETS, Case

import fastsample as fs
from fastsample.params import specs

SPECS = dict(specs())
EDITS = {name for name, spec in SPECS.items() if spec.counts}
VOCAB = 65


def cases() -> list[Any]:
    """Each set of parameters but the pairs, and each extra, once, on small rows of changing kinds."""
    makers, names = list(MAKERS), [name for name in PARAMS if "+" not in name]
    found = [Case(makers[i % len(makers)], name, VOCAB, extra="repeats") for i, name in enumerate(names)]
    found += [Case("lm", "all-hf", VOCAB, "bf16", extra) for extra in EXTRAS]
    found += [Case("ties", "penalties", VOCAB, "f16", "everything")]
    found += [Case("lm", "rows-penalties", 300, extra="everything")]
    return [pytest.param(case, id=case.name, marks=quick_or_slow(i)) for i, case in enumerate(found)]


def quick_or_slow(number: int) -> Any:
    """Two of three cases are for the slow tier."""
    return () if number % 3 == 0 else pytest.mark.slow


DRAWN = [case for case in CASES if case.vocab in (33, 64, 257) and case.rows == 5 and case.params not in PENALTY_SETS]


@pytest.mark.parametrize("case", cases())
def test_tokens_and_sets_are_those_of_the_engine(case: Case) -> None:
    inputs = case.build()
    explanation = fs.explain(inputs.logits, top=case.vocab, draw=1, **inputs.kwargs, **inputs.draw)
    more = {"on_invalid": "flag", "backend": "cpu"}
    out = fs.sample(
        inputs.logits, **inputs.kwargs, **inputs.draw, **more, num_samples=2, kept="count", kept_mass=True, entropy=True
    )
    filtered = fs.filter_logits(inputs.logits, **inputs.kwargs, **more)
    probabilities = fs.probabilities(inputs.logits, **inputs.kwargs, **more)
    assert len(explanation.steps) == case.rows
    for row, step in enumerate(explanation.steps):
        assert (step.row, step.vocab, step.index) == (row, case.vocab, 1)
        assert (step.token, step.status) == (int(out.tokens[row, 1]), int(out.status[row]))
        assert step.kept_count == int(out.kept_count[row])
        near = {"rel": 1e-6, "abs": 1e-9, "nan_ok": True}
        assert step.entropy == pytest.approx(float(out.entropy[row]), **near)
        assert step.kept_mass == pytest.approx(float(out.log_kept_mass[row].exp()), **near)
        assert len(step.candidates) == (0 if step.status else step.alive)
        for c in step.candidates:
            assert torch.tensor(c.probability) == probabilities[row, c.token]
            assert (c.cut_by is None) == bool(filtered[row, c.token] > -torch.inf)
            assert c.given == float(inputs.logits[row, c.token])
        ranks = [(-c.logit, c.token) for c in step.candidates]
        assert ranks == sorted(ranks)
        assert [c.rank for c in step.candidates] == list(range(1, len(ranks) + 1))


@pytest.mark.parametrize("case", DRAWN[::5], ids=lambda case: case.name)
def test_the_draw_falls_where_the_masses_say(case: Case) -> None:
    """Against the integer masses that an engine draws from, summed in the order of ids."""
    inputs = case.build()
    explanation = fs.explain(inputs.logits, top=1, **inputs.kwargs, **inputs.draw)
    masses = conformance.law(inputs.logits, "cpu", **inputs.kwargs, **inputs.draw)["law.masses"]
    for step, own in zip(explanation.steps, masses.tolist(), strict=True):
        if step.draw is None:
            continue
        draw, token = step.draw, step.token
        assert draw.total == sum(own)
        assert (draw.start, draw.end) == (sum(own[:token]), sum(own[: token + 1]))
        assert draw.threshold == draw.bits * draw.total >> 60
        assert draw.start <= draw.threshold < draw.end
        assert draw.u == pytest.approx(draw.bits / 2**60)
        assert (draw.coin is None) == (step.params["xtc_probability"] == 0)
        assert draw.excludes == (draw.coin is not None and draw.coin < draw.coin_limit)


def test_the_bits_are_those_of_philox() -> None:
    """The known answer of Salmon et al. for a key and a counter of zeros: 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    (step,) = fs.explain(torch.zeros(1, 10), seed=[0], offset=0).steps
    assert step.draw is not None
    assert step.draw.bits == 0x6627E8D5E169C58D >> 4
    assert (step.seed, step.offset) == (0, 0)
    (step,) = fs.explain(torch.zeros(1, 10), seed=[2**64 - 1], offset=2**64 - 2).steps
    assert (step.seed, step.offset) == (2**64 - 1, 2**64 - 2)


# The cuts ------------------------------------------------------------------------------------------------------------


def prefix(step: Any, cuts: int) -> dict[str, Any]:
    """Parameters with which only the first filters of a step are on."""
    on = {cut.name for cut in step.cuts[:cuts]} | EDITS | {"order", "ties", "temperature", "xtc_threshold"}
    fields = {name: value for name, value in step.params.items() if name in on or name.startswith("dry_")}
    if step.params["order"] == "temperature_last":
        fields["temperature"] = 1.0  # at which filters judge
    return fields | ({"xtc_probability": 1.0} if "xtc_probability" in on else {})


ORDERS = [name for name in PARAMS if "+" in name] + ["llama.cpp", "floors", "min_p-xtc-dry", "all-joint-ties", "rows"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=quick_or_slow(i)) for i, name in enumerate(ORDERS)])
def test_each_cut_is_what_its_filters_alone_leave(name: str) -> None:
    """What is kept after a cut, and with which probabilities, are those of a call with only the filters up to it."""
    logits = MAKERS["lm"](4, VOCAB, torch.Generator().manual_seed(len(name)))
    ids = {"output_ids": [[1, 2, 1]] * 4}
    explanation = fs.explain(logits, top=VOCAB, seed=1, **PARAMS[name](VOCAB, 4), **ids)
    for row, step in enumerate(explanation.steps):
        if step.params["temperature"] < 1e-5:
            assert [cut.name for cut in step.cuts] == ["temperature"]
            continue
        one, given = logits[row : row + 1], {"output_ids": ids["output_ids"][:1], "backend": "cpu"}
        size, mass, before = step.alive, None, torch.ones(VOCAB, dtype=torch.bool)
        plain = fs.probabilities(one, **prefix(step, 0), **given)[0]
        assert [torch.tensor(c.before, dtype=torch.float32) for c in step.candidates] == [
            plain[c.token] for c in step.candidates
        ]
        for at, cut in enumerate(step.cuts):
            fields = prefix(step, at + 1)
            kept = fs.filter_logits(one, **fields, **given)[0] > -torch.inf
            wanted = fs.probabilities(one, **fields, **given)[0]
            assert cut.kept == int(kept.sum()), cut.name
            assert cut.removed == size - cut.kept
            assert cut.value == step.params[cut.name]
            found = torch.zeros(VOCAB)
            found[[c.token for c in step.candidates]] = torch.tensor([c.after[at] for c in step.candidates])
            assert torch.equal(found, wanted), cut.name
            assert mass is None or cut.mass + cut.removed_mass == mass
            always = cut.name != "xtc_probability" or cut.value == 1
            gone = {c.token for c in step.candidates if before[c.token] and not kept[c.token] and always}
            assert {c.token for c in step.candidates if c.cut_by == cut.name} == gone
            size, mass, before = cut.kept, cut.mass, kept
            if cut.name == "xtc_probability":
                size += cut.removed
        left = step.kept_count + (step.cuts[-1].removed if step.params["xtc_probability"] == 1 else 0)
        assert left == size or name == "floors"


def test_cuts_are_listed_in_the_orders_of_the_contract() -> None:
    on = {"temperature": 1.4, "top_k": 60, "top_p": 0.99, "min_p": 1e-4, "typical_p": 0.99, "top_n_sigma": 3.0}
    on |= {"epsilon_cutoff": 1e-6, "eta_cutoff": 1e-6, "top_a": 1e-6, "p_less": True, "xtc_probability": 0.5}
    later = ["typical_p", "epsilon_cutoff", "eta_cutoff", "top_a", "p_less", "xtc_probability"]
    wanted = {
        "top_k_first": ["top_n_sigma", "top_k", "top_p", "min_p", *later],
        "min_p_first": ["top_n_sigma", "min_p", "top_k", "top_p", *later],
        "temperature_last": ["top_n_sigma", "top_k", "typical_p", "top_p", "min_p", *later[1:]],
    }
    x = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    for order, names in wanted.items():
        (step,) = fs.explain(x, seed=1, order=order, **on).steps
        assert [cut.name for cut in step.cuts] == names
    (step,) = fs.explain(x, seed=1, order="joint", **on).steps
    assert {cut.name for cut in step.cuts} == set(names)
    (step,) = fs.explain(x, seed=1).steps
    assert step.cuts == ()


def test_limits_are_the_numbers_that_decide() -> None:
    x = torch.randn(1, 500, generator=torch.Generator().manual_seed(3)) * 2
    masses = (x[0] - x.max()).double().exp() * 2**40

    def one(**fields: Any) -> Any:
        (step,) = fs.explain(x, seed=1, **fields).steps
        (cut,) = step.cuts
        return cut, cut.limits

    highest = x[0].sort(descending=True).values
    _, limits = one(top_k=7)
    assert limits == {"logit": float(highest[6])}
    cut, limits = one(top_p=0.8)
    assert limits["target"] == pytest.approx(0.8 * float(masses.sum()), rel=1e-6)
    assert limits["reached"] == cut.mass >= limits["target"]
    assert limits["reached"] == pytest.approx(float(masses[x[0] >= highest[cut.kept - 1]].sum()), rel=1e-6)
    _, limits = one(min_p=0.25)
    assert limits == {"floor": 2**38}
    _, limits = one(top_n_sigma=1.5)
    sigma = float(x.double().std(correction=0))
    assert limits["sigma"] == pytest.approx(sigma, rel=1e-3)
    assert limits["logit"] == pytest.approx(float(highest[0]) - 1.5 * sigma, rel=1e-3)
    cut, limits = one(typical_p=0.5)
    p = masses / masses.sum()
    assert limits["mean_logit"] == pytest.approx(float((p * x[0]).sum()), abs=1e-3)
    assert limits["reached"] == cut.mass >= limits["target"]
    _, limits = one(epsilon_cutoff=0.004)
    assert limits["floor"] == pytest.approx(0.004 * float(masses.sum()), rel=1e-6)
    _, limits = one(top_a=0.5)
    assert limits["floor"] == pytest.approx(0.5 * float(p.max()) ** 2 * float(masses.sum()), rel=1e-6)
    _, limits = one(p_less=True)
    assert limits["floor"] == pytest.approx(float((p**2).sum() * masses.sum()), rel=1e-6)
    _, limits = one(xtc_probability=0.5, xtc_threshold=0.05)
    assert limits["floor"] == pytest.approx(0.05 * float(masses.sum()), rel=1e-6)
    cut, limits = one(temperature=0.0)
    assert (cut.kept, cut.removed, limits) == (1, 499, {"logit": float(highest[0])})


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"top_k": 2}, "the lowest of the 2 highest"),
        ({"top_k": 9}, None),  # of 5 tokens: off
        ({"top_p": 0.5}, "together reach the probability 0.5 are kept: they have 0."),
        ({"min_p": 0.5}, "tokens below the probability 0."),
        ({"min_p": 1e-9}, "; nothing to cut"),
        ({"typical_p": 0.5}, "nearest to the mean logit"),
        ({"top_n_sigma": 0.5}, "standard deviation"),
        ({"xtc_probability": 0.5}, "may leave out those of probability 0.1 or more"),
        ({"temperature": 0.0}, "greedy: the highest logit, 4, is taken"),
    ],
)
def test_reasons_in_words(fields: dict[str, Any], part: str | None) -> None:
    (step,) = fs.explain(torch.tensor([[4.0, 3.5, 1.0, 0.5, -2.0]]), seed=1, **fields).steps
    assert part is None or part in step.cuts[0].why
    assert (part is None) == (step.cuts == ())


# Edits ---------------------------------------------------------------------------------------------------------------


def test_edits_are_counted_and_candidates_tell_of_theirs() -> None:
    x = torch.arange(10.0)[None] + 1
    ids = {"prompt_ids": [[9, 8]], "output_ids": [[7, 7, 6, 7]], "dry_breakers": [0]}
    fields = {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.25, "no_repeat_ngram_size": 2}
    fields |= {"dry_multiplier": 0.8, "dry_allowed_length": 1}
    more = {"allowed_ids": [[1, 2, 3, 5, 6, 7, 8]], "bias": {5: -torch.inf, 3: 2.0}}
    (step,) = fs.explain(x, seed=1, top=10, **ids, **fields, **more).steps
    counts = {edit.name: (edit.changed, edit.removed) for edit in step.edits}
    assert counts == {
        "bitmask": (3, 3),
        "bias": (2, 1),
        "repetition_penalty": (3, 0),  # 9 is masked
        "frequency_penalty": (2, 0),
        "presence_penalty": (2, 0),
        "dry_multiplier": (2, 0),
        "no_repeat_ngram_size": (2, 2),
    }
    processed = fs.filter_logits(x, **ids, **fields, **more, backend="cpu")[0]
    assert {c.token: c.logit for c in step.candidates} == {t: float(processed[t]) for t in (1, 2, 3, 8)}
    assert {c.token: c.edits for c in step.candidates if c.edits} == {3: ("bias",), 8: ("repetition_penalty",)}
    assert {c.token: c.cut_by for c in step.banned} == {
        0: "bitmask",
        4: "bitmask",
        9: "bitmask",
        5: "bias",
        6: "no_repeat_ngram_size",
        7: "no_repeat_ngram_size",
    }
    assert [c.token for c in step.banned] == [9, 7, 6, 5, 4, 0]
    assert (step.alive, step.banned[0].rank) == (4, 0)


def test_without_edits_there_is_nothing_to_tell() -> None:
    (step,) = fs.explain(torch.zeros(1, 4), seed=1, output_ids=[[1]]).steps
    assert (step.edits, step.banned) == ((), ())


# Rows ----------------------------------------------------------------------------------------------------------------


def test_invalid_rows_say_what_is_wrong() -> None:
    x = torch.zeros(4, 6)
    x[0, 2], x[1, 3] = torch.nan, torch.inf
    explanation = fs.explain(x, seed=1, allowed_ids=[None, None, [], None])
    assert [step.status for step in explanation.steps] == [1, 2, 3, 0]
    assert explanation.steps[0].problem == "a NaN logit"
    assert explanation.steps[3].problem is None
    for step in explanation.steps[:3]:
        assert (step.token, step.cuts, step.candidates, step.draw, step.chosen) == (-1, (), (), None, None)
        assert step.entropy != step.entropy
    assert [c.cut_by for c in explanation.steps[2].banned] == ["bitmask"] * 6
    assert "the row has a +inf logit" in str(explanation)
    assert [step["entropy"] for step in explanation.to_dict()["steps"][:3]] == ["nan"] * 3
    assert len(explanation.to_html()) > 1000


def test_rows_of_any_shape_and_parameters_of_each() -> None:
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(5))
    explanation = fs.explain(x, seed=9, temperature=torch.tensor([[0.5, 1.0, 2.0]]), offset=torch.arange(3)[None])
    out = fs.sample(x, seed=9, temperature=torch.tensor([[0.5, 1.0, 2.0]]), offset=torch.arange(3)[None])
    assert [step.token for step in explanation.steps] == out.tokens.flatten().tolist()
    assert [step.params["temperature"] for step in explanation.steps] == [0.5, 1.0, 2.0] * 2
    assert [step.offset for step in explanation.steps] == [0, 1, 2] * 2
    assert fs.explain(x[0, 0], seed=9).steps[0].token == int(fs.sample(x[0, 0], seed=9).tokens)
    assert fs.explain(x[0, :0], seed=9).steps == ()


def test_the_drawn_token_is_told_of_however_improbable() -> None:
    x = torch.zeros(1, 1000)
    (step,) = fs.explain(x, seed=4, top=3).steps
    assert len(step.candidates) == 4
    assert step.chosen is step.candidates[-1]
    assert step.chosen.token == int(fs.sample(x, seed=4).tokens)
    assert step.chosen.rank == step.token + 1


def test_a_fresh_seed_comes_from_torch() -> None:
    x = torch.zeros(1, 1000)
    torch.manual_seed(3)
    tokens = [fs.explain(x, top=1).steps[0].token for _ in range(2)]
    torch.manual_seed(3)
    assert tokens == [int(fs.sample(x).tokens) for _ in range(2)]


# Forms ---------------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one letter per token."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


def explained() -> fs.Explanation:
    x = torch.randn(2, 26, generator=torch.Generator().manual_seed(1))
    return fs.explain(x, seed=1, top_k=5, top=4, tokenizer=Letters(), prompt='<b>"x"</b>', bias={3: -torch.inf})


def test_texts() -> None:
    for step in explained().steps:
        assert all(c.text == chr(ord("a") + c.token) for c in (*step.candidates, *step.banned))
        assert step.text == chr(ord("a") + step.token)
    assert fs.explain(torch.zeros(3), seed=1).steps[0].text is None


def test_json_has_every_field() -> None:
    explanation = explained()
    found = json.loads(explanation.to_json(), parse_constant=pytest.fail)
    assert found == explanation.to_dict()
    assert found["prompt"] == '<b>"x"</b>'
    step = explanation.steps[0]
    (first, *_) = found["steps"]
    assert first["token"] == step.token
    assert first["seed"] == step.seed
    assert first["cuts"][0] == {name: getattr(step.cuts[0], name) for name in type(step.cuts[0]).__dataclass_fields__}
    assert first["draw"]["bits"] == step.draw.bits
    assert "record" not in first


def test_text_of_a_terminal() -> None:
    lines = str(explained()).splitlines()
    step = explained().steps[0]
    assert lines[0].startswith(f'step 1  "{step.text}"  p {step.chosen.probability:.4f}; 5 of 26 kept')
    assert any(line.startswith("  top-k       left 5 of 25") for line in lines)
    assert any(line.startswith("  bias        changed 1 token, 1 of them to -inf") for line in lines)
    assert f"u {step.draw.u:.6f} fell in" in str(explained())
    for c in step.candidates:
        cells = next(line.split() for line in lines if line.endswith(f'"{c.text}"'))
        assert cells[:2] == [str(c.rank), f"{c.before:.4f}"]


def test_a_control_character_is_shown_and_not_obeyed() -> None:
    class Bell:
        def decode(self, ids: list[int]) -> str:
            return "\x1b[2J\n"

    shown = str(fs.explain(torch.zeros(1, 3), seed=1, tokenizer=Bell()))
    assert "\x1b" not in shown
    assert r'"\u001b[2J\n"' in shown


def test_the_page_is_one_file_without_a_network(tmp_path: Path) -> None:
    explanation = explained()
    text = explanation.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text
    assert "<b>" not in text
    assert not [part for part in ("http://", "https://", "@import", "src=") if part in text]
    shown = explanation._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert html.escape(text) in shown


def test_copies_are_equal() -> None:
    explanation = explained()
    assert pickle.loads(pickle.dumps(explanation)) == explanation
    assert pickle.loads(pickle.dumps(explanation)).to_html() == explanation.to_html()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"top": 0}, "top = 0: expected 1 <= top"),
        ({"draw": -1}, "draw = -1: expected 0 <= draw"),
        ({"tokenizer": 3}, r"tokenizer: expected an object with decode\(\[id\]\), got int"),
        ({"prompt": 3}, "prompt: expected a str, got int"),
        ({"top_p": 2.0}, "top_p = 2.0"),
        ({"temprature": 1.0}, "did you mean temperature"),
        ({"offset": -1}, "offset = -1"),
        ({"bias": {9: 1.0}}, r"bias id 9 \(row 0\)"),
    ],
)
def test_bad_arguments_are_named(more: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fs.explain(torch.zeros(1, 4), **more)


def test_it_is_imported_when_it_is_asked_for() -> None:
    code = """
import sys, fastsample as fs
assert "fastsample.explanation" not in sys.modules
assert fs.explain is fs.explain and "fastsample.explanation" in sys.modules
assert isinstance(fs.explain(__import__("torch").zeros(3), seed=1), fs.Explanation)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
