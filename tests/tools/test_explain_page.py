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
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
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
    found.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
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
    const found = Law.keep(step.row, parameters);
    let token = null;
    try {
      token = step.row.ids[Law.draw(step.row, found, BigInt(step.seed), BigInt(step.offset)).position];
    } catch (error) { if (!(error instanceof Beyond)) throw error; }
    return [Array.from(step.row.ids), found.filtered, found.probabilities, found.count, found.keptMass, found.entropy, token];
  } catch (error) { if (!(error instanceof Beyond)) throw error; return null; }
})"""


@pytest.mark.parametrize("vocab", [300, 3000])
@pytest.mark.parametrize("maker", MAKERS)
def test_the_page_computes_what_the_engines_do(maker: str, vocab: int, page: Any, tmp_path: Path) -> None:
    """Every set of parameters on rows of every kind: kept tokens, probabilities and draws, to the bit."""
    logits = MAKERS[maker](ROWS, vocab, torch.Generator().manual_seed(len(maker)))
    draw = {"seed": [2**64 - 1, 5, 2**63, 7], "offset": [0, 2**40, 3, 2**64 - 2]}
    opened(page, fs.explain(logits, **draw), tmp_path)
    sets = SETS if vocab <= RECORDED else SETS[:: 2]
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
