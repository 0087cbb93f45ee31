"""nox sessions: tests, lint, wheel, bench. All install with pip, whose configuration decides where torch comes from."""

from __future__ import annotations

from pathlib import Path

import nox

ROOT = Path(__file__).parent.resolve()

nox.needs_version = ">=2024.4"
nox.options.sessions = ["lint", "tests"]
nox.options.error_on_external_run = True


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite on an editable install; arguments after -- go to pytest."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Formatters, linters and types; changes nothing."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    sources = sorted(str(p) for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cc", ".cuh", ".cu"})
    session.run("clang-format", "--dry-run", "-Werror", *sources)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the sdist, the wheel from it, and test that wheel from outside the tree."""
    session.install("build>=1.2")
    dist = Path(session.create_tmp()) / "dist"
    session.run("python", "-m", "build", "--outdir", str(dist), str(ROOT))
    newest = max(dist.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    session.install("--force-reinstall", "--no-deps", str(newest))
    session.install(f"{newest}[test]")
    session.chdir(dist)  # from the root, the source tree would be imported
    session.run(
        "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), str(ROOT / "tests"), *session.posargs
    )


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks: the pytest-benchmark suite, or what stands after --, e.g. -- compare --section peers."""
    session.install(".[peers]" if "compare" in session.posargs else ".[bench]")
    if session.posargs and not session.posargs[0].startswith("-"):
        session.run("python", "-m", "bench", *session.posargs)
    else:
        session.run("pytest", "bench", "--benchmark-only", *session.posargs)
