"""Step `install`: fastsample from this tree, for this card alone. A rehearsal builds csrc/cuda for the host instead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from bench.campaign.site import ROOT, Site, library, simulate, tree
from bench.campaign.steps import Outcome, Point

SERVES = (
    "import fastsample as fs; why = fs.engines()['cuda']; print(why or fs.__file__); raise SystemExit(why is not None)"
)


def points(site: Site) -> Iterator[Point]:
    """One build of these sources, and another where a later call finds itself on a machine that lacks it."""
    sources, before = tree(), site.of("install")
    if not (any(r["sources"] == sources for r in before) and ready(site)):
        key = {"build": len(before) + 1, "sources": sources}
        yield key, lambda: rehearsed(site) if site.dry else installed(site)


def ready(site: Site) -> bool:
    """Whether what an earlier build made is here."""
    return library(site.scratch).exists() if site.dry else serves(site).returncode == 0


def serves(site: Site) -> subprocess.CompletedProcess[str]:
    """Asks from outside the tree, whose sources would be imported instead."""
    return subprocess.run([sys.executable, "-c", SERVES], cwd=site.scratch, capture_output=True, text=True)


def rehearsed(site: Site) -> Outcome:
    from simt_engine import build, compiler

    if compiler() is None:
        return {"skipped": "there is no C++ compiler for csrc/cuda on fibers"}
    built = build(site.scratch)
    assert built == library(site.scratch)
    simulate(site.scratch)
    return {"replaced": "pip install by a compilation of tests/simt", "served": str(built.name)}


def installed(site: Site) -> Outcome:
    """Without a network or build isolation, for one architecture; and whether the CUDA engine then serves."""
    done = subprocess.run(command(site), cwd=ROOT.parent, capture_output=True, text=True)
    if done.returncode:
        return {"failed": f"pip install: {(done.stdout + done.stderr)[-1500:]}"}
    served = serves(site)
    words = (served.stdout + served.stderr[-1000:]).strip()
    return {"served": words} if served.returncode == 0 else {"failed": f"the CUDA engine does not serve: {words}"}


def command(site: Site) -> list[str]:
    define = "cmake.define.FASTSAMPLE_CUDA"
    return [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--force-reinstall"),
        *("-C", f"{define}=on", "-C", f"{define}_ARCHITECTURES={site.arch}-real"),
        *("-C", f"build-dir={site.scratch / 'build'}", str(ROOT)),
    ]
