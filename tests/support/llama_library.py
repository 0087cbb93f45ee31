"""llama.cpp for nox: its bindings, and its library compiled without the parts that no test needs."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import nox

REQUIREMENTS = Path(__file__).parents[1] / "requirements" / "llama_cpp.txt"


def build(session: nox.Session) -> Path:
    """Installs the bindings alone; compiles the library from the sources that come with them. Returns its folder."""
    built = Path(session.create_tmp()) / "llama.cpp"
    shutil.rmtree(built, ignore_errors=True)
    source_only = ("--no-deps", "--no-binary", "llama-cpp-python")  # what builds it comes as wheels
    session.run("pip", "download", "-q", *source_only, "-d", str(built), "-r", str(REQUIREMENTS))
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(built, filter="data")
    source = next(path for path in built.iterdir() if path.is_dir())
    session.install(str(source), "-C", "cmake.define.LLAMA_BUILD=OFF")
    wanted = {"CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "ON"}
    unwanted = [f"LLAMA_BUILD_{part}" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")]
    options = wanted | dict.fromkeys((*unwanted, "GGML_NATIVE", "GGML_CCACHE"), "OFF")
    define = [f"-D{name}={value}" for name, value in options.items()]
    folder = built / "build"
    sources = ("-S", str(source / "vendor" / "llama.cpp"), "-B", str(folder))
    session.run("cmake", "-G", "Ninja", *sources, *define, silent=True)
    session.run("cmake", "--build", str(folder), "--target", "llama", silent=True)
    return folder / "bin"
