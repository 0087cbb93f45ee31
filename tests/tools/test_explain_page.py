"""The page of an explanation, in a real browser: its numbers are the engines', and it can be used without a mouse.

It takes Playwright for Python and Chromium (on Debian, apt-get install chromium); `nox -s page` runs it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import MAKERS, PARAMS, PENALTY_SETS

import fastsample as fs
from fastsample.params import specs

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright for Python: nox -s page")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
if CHROMIUM is None:
    pytest.skip("needs Chromium: on Debian, apt-get install chromium", allow_module_level=True)

RECORDED = 512
SETS = [name for name in PARAMS if name not in PENALTY_SETS]
ROWS = 4


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose console and network stay silent."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, offline=True)
    found, said = context.new_page(), []
    found.on("console", lambda message: said.append(message.text))
    found.on("pageerror", lambda error: said.append(str(error)))
    found.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None
    )
    yield found
    assert said == []
    context.close()


def opened(page: Any, explanation: fs.Explanation, folder: Path) -> Any:
    explanation.to_html(folder / "page.html")
    page.goto((folder / "page.html").as_uri())
    return page


def parameters(fields: dict[str, Any], row: int, rows: int) -> dict[str, Any]:
    """A row's parameters, as the engines read them."""
    params = fs.SamplingParams(**fields)
    found = {}
    for name, spec in specs():
        value = getattr(params, name)
        value = value[row] if isinstance(value, (tuple, torch.Tensor)) else value
        value = value.item() if isinstance(value, torch.Tensor) else value
        found[name] = bool(value) if spec.kind == "bool" else value
    return found


LAW = """asked => asked.map(([at, parameters]) => {
  const step = steps[at];
  try {
    const found = Law.keep(step.known, parameters);
    let token = null;
    try {
      token = step.known.ids[Law.draw(step.known, found, BigInt(step.seed), BigInt(step.offset)).position];
    } catch (error) { if (!(error instanceof Beyond)) throw error; }
    const { filtered, probabilities, count, keptMass, entropy } = found;
    return [Array.from(step.known.ids), filtered, probabilities, count, keptMass, entropy, token];
  } catch (error) { if (!(error instanceof Beyond)) throw error; return null; }
})"""


@pytest.mark.parametrize("vocab", [300, 3000])
@pytest.mark.parametrize("maker", MAKERS)
def test_the_page_computes_what_the_engines_do(maker: str, vocab: int, page: Any, tmp_path: Path) -> None:
    """A third of all sets of parameters on rows of every kind: kept tokens, probabilities and draws, to the bit."""
    logits = MAKERS[maker](ROWS, vocab, torch.Generator().manual_seed(len(maker)))
    draw = {"seed": [2**64 - 1, 5, 2**63, 7], "offset": [0, 2**40, 3, 2**64 - 2]}
    opened(page, fs.explain(logits, **draw), tmp_path)
    sets = SETS[len(maker) % 3 :: 3]
    fields = {name: PARAMS[name](vocab, ROWS) for name in sets}
    asked = [[row, parameters(fields[name], row, ROWS)] for name in sets for row in range(ROWS)]
    answers = iter(page.evaluate(LAW, asked))
    told = 0
    for name in sets:
        filtered, wanted = fs.filter_logits(logits, **fields[name]), fs.probabilities(logits, **fields[name])
        out = fs.sample(logits, **fields[name], **draw, kept="count", kept_mass=True, entropy=True)
        for row in range(ROWS):
            answer = next(answers)
            if answer is None:
                assert vocab > RECORDED, f"{name}, row {row}: all of it is recorded"
                continue
            told += 1
            ids, own, probabilities, count, mass, entropy, token = answer
            where = f"{name}, row {row}"
            assert torch.equal(torch.tensor(own, dtype=torch.float32), filtered[row, ids]), where
            assert torch.equal(torch.tensor(probabilities, dtype=torch.float32), wanted[row, ids]), where
            assert count == int(out.kept_count[row]), where
            assert entropy == pytest.approx(float(out.entropy[row]), rel=1e-6, abs=1e-9), where
            assert mass is None or mass == pytest.approx(float(out.log_kept_mass[row].exp()), rel=1e-6), where
            assert token is None or token == int(out.tokens[row]), where
            assert token is not None or vocab > RECORDED, where
    assert told > len(asked) * (0.99 if vocab <= RECORDED else 0.3)


def test_measures_of_a_row_are_exact(page: Any, tmp_path: Path) -> None:
    """On dense logits the least typical set is one token, which another mean would replace by its neighbour."""
    rows = 40
    logits = torch.rand(rows, RECORDED, generator=torch.Generator().manual_seed(3)) * 2
    opened(page, fs.explain(logits, seed=1), tmp_path)
    fields = [{"typical_p": 1e-6, "temperature": t / 20} for t in range(10, 41, 2)]
    fields += [{"p_less": True}, {"eta_cutoff": 0.5}]
    answers = iter(page.evaluate(LAW, [[row, parameters(own, row, rows)] for own in fields for row in range(rows)]))
    for own in fields:
        filtered = fs.filter_logits(logits, **own)
        for row in range(rows):
            ids, found, *_ = next(answers)
            assert torch.equal(torch.tensor(found), filtered[row, ids]), f"{own}, row {row}"


# The page in use -----------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer whose token 7 is markup."""

    def decode(self, ids: list[int]) -> str:
        return "".join("<b>" if i == 7 else f" w{i}" for i in ids)


FIELDS = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}


def logits() -> torch.Tensor:
    return torch.randn(3, 2000, generator=torch.Generator().manual_seed(2)) * 3


@pytest.fixture
def used(page: Any, tmp_path: Path) -> Any:
    """The page of three rows."""
    explanation = fs.explain(logits(), seed=[7, 8, 9], tokenizer=Words(), prompt="Once <i>", **FIELDS)
    return opened(page, explanation, tmp_path)


def shown(page: Any) -> dict[str, float]:
    """The table's tokens with their probabilities, as texts tell them."""
    lines = page.locator("#tokens tbody tr").all()
    return {line.locator("th").text_content(): float(line.locator("td").nth(3).text_content()) for line in lines}


def wanted(row: int, **fields: Any) -> dict[str, float]:
    """The same from the engine."""
    x, told = logits()[row : row + 1], FIELDS | fields
    p = fs.probabilities(x, **told)[0]
    kept = fs.filter_logits(x, **told)[0] > -torch.inf
    assert bool((kept == (p > 0)).all())
    best = x[0].sort(descending=True, stable=True).indices[:24].tolist()
    return {f"“{Words().decode([i])}”": float(p[i]) for i in best}


def assert_shows(page: Any, row: int, **fields: Any) -> None:
    found, expected = shown(page), wanted(row, **fields)
    assert {word: found[word] for word in expected} == pytest.approx(expected, abs=5.1e-5, rel=0.051)
    count = int((fs.filter_logits(logits()[row : row + 1], **FIELDS | fields) > -torch.inf).sum())
    assert page.locator("#news").text_content().startswith(f"{count} token")


def test_a_slider_that_moves_changes_the_numbers_to_the_engines(used: Any) -> None:
    assert_shows(used, 0)
    slider = used.get_by_label("top-p", exact=True)
    assert slider.get_attribute("aria-valuetext") == "0.95"
    slider.focus()
    for _ in range(6):
        used.keyboard.press("ArrowLeft")
    value = float(slider.get_attribute("aria-valuetext"))
    assert value < 0.95
    assert used.locator("#control-top_p").locator("xpath=../span").text_content() == str(value)
    assert_shows(used, 0, top_p=value)
    moves = (("temperature", "ArrowRight", 9), ("min_p", "ArrowRight", 12), ("top_k", "ArrowLeft", 4))
    for name, key, presses in moves:
        used.locator(f"#control-{name}").focus()
        for _ in range(presses):
            used.keyboard.press(key)
    told = {name: used.locator(f"#control-{name}").get_attribute("aria-valuetext") for name, *_ in moves}
    fields = {"top_p": value, **{name: float(text) for name, text in told.items()}, "top_k": int(told["top_k"])}
    assert not set(fields.values()) & {0.0, 0.8, 50, 0.95}
    assert_shows(used, 0, **fields)
    used.get_by_role("button", name="As it was drawn").click()
    assert_shows(used, 0)


@pytest.mark.parametrize(
    ("label", "stop", "fields"),
    [
        ("typical", "0.5", {"typical_p": 0.5}),
        ("top-n-sigma", "0.7", {"top_n_sigma": 0.7}),
        ("epsilon", "0.02", {"epsilon_cutoff": 0.02}),
        ("eta", "0.15", {"eta_cutoff": 0.15}),
        ("top-a", "0.3", {"top_a": 0.3}),
        ("XTC probability", "1", {"xtc_probability": 1.0}),
    ],
)
def test_every_slider_is_the_filter_it_is_called_by(label: str, stop: str, fields: dict[str, float], used: Any) -> None:
    slider = used.get_by_label(label, exact=True)
    slider.evaluate("(slider, i) => { slider.value = i; }", 0)
    for at in range(int(slider.get_attribute("max")) + 1):
        slider.evaluate("(slider, i) => { slider.value = i; slider.dispatchEvent(new Event('input')); }", at)
        if slider.get_attribute("aria-valuetext") == stop:
            break
    assert slider.get_attribute("aria-valuetext") == stop
    assert_shows(used, 0, **fields)


def test_a_box_and_lists_are_the_other_parameters(used: Any) -> None:
    used.get_by_label("p-less").check()
    assert_shows(used, 0, p_less=True)
    used.get_by_label("order").select_option("temperature_last")
    assert_shows(used, 0, p_less=True, order="temperature_last")
    used.get_by_label("p-less").uncheck()
    used.get_by_label("order").select_option("joint")
    assert_shows(used, 0, order="joint")


def test_what_is_not_recorded_is_not_guessed(page: Any, tmp_path: Path) -> None:
    """Off the recorded temperatures the mass of the rest is unknown; with a filter that looks past 512, the set is."""
    opened(page, fs.explain(logits(), seed=[7, 8, 9], top_k=600, temperature=0.33), tmp_path)
    assert "beyond the 512 recorded" in page.locator("#news").text_content()
    assert page.locator("#news.error").count() == 1
    assert set(page.locator("#tokens tbody tr td:nth-child(5)").all_text_contents()) == {"?"}
    page.get_by_label("top-k").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#news").text_content().startswith("512 tokens of 2,000 can be drawn; ")


def test_a_filter_that_the_page_does_not_have_is_not_left_out(page: Any, tmp_path: Path) -> None:
    """A filter is added in few places, and this page is none of them."""
    text = fs.explain(logits(), seed=1, **FIELDS).to_html()
    known = '"parameters": {'
    assert known in text
    of_table = '"max_bits": {"meaning": "", "choices": [], "neutral": 0, "edits": false}, '
    text = text.replace(known, known + of_table).replace('"params": {', '"params": {"max_bits": 3, ')
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri())
    assert "this page has no filter max bits" in page.locator("#news").text_content()


def test_everything_kept_is_exact_though_not_all_is_recorded(page: Any, tmp_path: Path) -> None:
    """Sums of the rest give every probability; where another seed's draw falls cannot be told."""
    x = logits()[:1]
    explanation = fs.explain(x, seed=[7])
    opened(page, explanation, tmp_path)
    drawn = explanation.steps[0].token
    assert page.locator("#news").text_content() == f"2,000 tokens of 2,000 can be drawn; #{drawn} is drawn."
    p = fs.probabilities(x)[0]
    best = x[0].sort(descending=True, stable=True).indices[:24].tolist()
    found = shown(page)
    assert [found[f"#{i}"] for i in best] == pytest.approx([float(p[i]) for i in best], abs=5.1e-5)
    assert "not recorded" in page.locator("#seeds li").nth(1).text_content()


def test_the_keyboard_goes_through_the_text(used: Any) -> None:
    buttons = used.locator("#text button")
    assert [b.get_attribute("tabindex") for b in buttons.all()] == ["0", "-1", "-1"]
    used.keyboard.press("Tab")
    assert used.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Step 1: ")
    keys = {"ArrowRight": 2, "End": 3, "ArrowDown": 3, "ArrowLeft": 2, "Home": 1, "ArrowUp": 1}
    for key, step in keys.items():
        used.keyboard.press(key)
        assert used.evaluate("document.activeElement.getAttribute('aria-label')").startswith(f"Step {step}: ")
        assert used.locator("#title").text_content().startswith(f"Step {step} of 3: ")
        pressed = [button.get_attribute("aria-pressed") for button in buttons.all()]
        assert pressed == [str(i == step).lower() for i in (1, 2, 3)]
    assert_shows(used, 0)


def test_seeds_draw_what_the_engine_draws(used: Any) -> None:
    x = logits()[:1]

    def drawn(seed: int) -> str:
        return f"“{Words().decode([int(fs.sample(x, seed=[seed], **FIELDS).tokens)])}”"

    lines = [line.locator("span").all_text_contents() for line in used.locator("#seeds li").all()]
    assert lines == [[str(seed), drawn(seed)] for seed in range(7, 15)]
    used.get_by_role("button", name="Next eight").click()
    assert used.locator("#seeds li").first.locator("span").all_text_contents() == ["15", drawn(15)]
    used.get_by_label("Seed of the row").fill(str(2**64 - 1))
    used.keyboard.press("Enter")
    lines = [line.locator("span").all_text_contents() for line in used.locator("#seeds li").all()]
    assert lines[:2] == [[str(2**64 - 1), drawn(2**64 - 1)], ["0", drawn(0)]]
    assert f"{drawn(2**64 - 1)} is drawn." in used.locator("#news").text_content()
    used.get_by_label("Seed of the row").fill("x")
    used.keyboard.press("Enter")
    assert "expected a 64-bit integer" in used.get_by_role("alert").text_content()


def test_texts_are_shown_and_never_markup(used: Any) -> None:
    assert used.locator("#text span").text_content() == "Once <i>"
    assert used.locator("#text i, #tokens b, #seeds b").count() == 0


def test_every_control_has_a_name_and_news_are_announced(used: Any) -> None:
    unnamed = used.locator("input, select, button").evaluate_all(
        "all => all.filter(e => !(e.labels && e.labels.length) && !e.textContent.trim() && !e.ariaLabel).length"
    )
    assert unnamed == 0
    assert used.get_by_role("status").get_attribute("aria-live") == "polite"
    assert used.get_by_role("toolbar", name="Tokens").count() == 1
    assert used.get_by_role("table").count() == 1


def test_an_invalid_row_says_why(page: Any, tmp_path: Path) -> None:
    x = torch.zeros(2, 5)
    x[0, 1] = torch.nan
    opened(page, fs.explain(x, seed=1), tmp_path)
    assert page.locator("#news").text_content() == "No token: the row has a NaN logit."
    page.locator("#text button").nth(1).click()
    assert page.locator("#news").text_content().startswith("5 tokens of 5 can be drawn")


def test_no_rows_and_a_lone_token(page: Any, tmp_path: Path) -> None:
    opened(page, fs.explain(torch.zeros(0, 5), seed=1), tmp_path)
    assert page.locator("#news").text_content() == "There are no rows."
    opened(page, fs.explain(torch.zeros(1, 1), seed=1, temperature=0.0), tmp_path)
    assert page.locator("#fell").text_content() == "Nothing is random: the most probable token is taken."


@pytest.mark.parametrize("width", [320, 390, 768, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_screen(width: int, scheme: str, used: Any) -> None:
    used.set_viewport_size({"width": width, "height": 800})
    used.emulate_media(color_scheme=scheme)
    assert used.evaluate("document.documentElement.scrollWidth") <= width
    ground = used.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
