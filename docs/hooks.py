"""What mkdocs does besides rendering: pages that lie elsewhere in the repository, the parameter table, the picture."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "benchmarks.md": "bench/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")
PARAMETERS = re.compile(r"<!-- parameters: .*? -->")
PICTURE = re.compile(r'<p><img [^>]*src="[^"]*architecture\.svg"[^>]*></p>')


def parameter_table(params: ModuleType) -> str:
    """The table of fastsample/params.py in Markdown."""
    lines = ["| parameter | default | range | meaning |", "|---|---|---|---|"]
    for name, spec in params.specs():
        default = getattr(params.SamplingParams, name)
        lines.append(f"| `{name}` | `{default!r}` | {spec.range} | {spec.meaning} |")
    return "\n".join(lines)


def load_params() -> ModuleType:
    """fastsample.params from the sources, without the package's `__init__`, which would need the built extension."""
    if "fastsample" not in sys.modules:
        package = ModuleType("fastsample")
        package.__path__ = [str(ROOT / "fastsample")]
        sys.modules["fastsample"] = package
    return importlib.import_module("fastsample.params")


def here(text: str, source: str, page: str) -> str:
    """The text of a file of the repository, with its links as links of a page of the site."""
    pages = {(ROOT / path).resolve(): name for name, path in PAGES.items()}

    def link(match: re.Match[str]) -> str:
        path, hash_, anchor = match[1].partition("#")
        target = ((ROOT / source).parent / path).resolve()
        if target in pages:
            target = ROOT / "docs" / pages[target]
        elif target.parent == ROOT / "bench" / "results":
            target = ROOT / "docs" / "results" / target.name
        return f"]({os.path.relpath(target, (ROOT / 'docs' / page).parent)}{hash_}{anchor})"

    return LINK.sub(link, text)


def on_files(files: Any, config: Any, **_: Any) -> Any:
    from mkdocs.structure.files import File

    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    for plot in sorted((ROOT / "bench" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    name = page.file.src_uri
    markdown = here(markdown, PAGES.get(name, f"docs/{name}"), name)
    if name == "parameters.md":
        return PARAMETERS.sub(lambda _: parameter_table(load_params()), markdown)
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """The picture inline, so that it follows the page's colours."""
    return PICTURE.sub(lambda _: (ROOT / "docs" / "architecture.svg").read_text().strip(), html)
