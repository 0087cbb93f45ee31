"""Each gate for wheels refuses a module that breaks its rule, and lets one pass that breaks none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import wheel_gates

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="wheels for Linux hold ELF files")

BODY = (
    "#include <unistd.h>\nvoid *PyLong_FromLong(long);\nvoid *PyInit__cpu(void) { return PyLong_FromLong(getpid()); }\n"
)
LINKED = ("-shared", "-fPIC", "-nostartfiles")
STRIPPED = (*LINKED, "-s")


def wheel(folder: Path, tag: str, source: str = BODY, flags: tuple[str, ...] = STRIPPED, padding: int = 0) -> Path:
    """A wheel of one module, and of that many bytes which cannot be compressed."""
    (folder / "module.c").write_text(source)
    subprocess.run(["cc", "module.c", "-o", "module.so", *flags], cwd=folder, check=True)
    path = folder / f"fastsample-1-cp311-cp311-{tag}.whl"
    with ZipFile(path, "w") as archive:
        archive.write(folder / "module.so", "fastsample/_cpu.cpython-311-x86_64-linux-gnu.so")
        archive.writestr("fastsample/model", os.urandom(padding))
    return path


NEWEST = "manylinux_2_99_x86_64"
BROKEN = {
    "a later glibc": (
        {"tag": "manylinux_2_1_x86_64"},
        r"needs getpid of GLIBC_2[.\d]+; the wheel's name claims glibc 2\.1$",
    ),
    "two tags": ({"tag": f"manylinux_2_1_x86_64.{NEWEST}"}, r"needs getpid of .* claims glibc 2\.1$"),
    "no tag": ({"tag": "linux_x86_64"}, r"claims no glibc: it has no manylinux tag$"),
    "an export": ({"source": BODY + "int leaked(void) { return 1; }\n"}, r"_cpu\S* exports leaked$"),
    "another PyInit_": ({"source": BODY.replace("PyInit__cpu", "PyInit__cuda")}, r"exports PyInit__cuda$"),
    "a library": (
        {"flags": (*STRIPPED, "-Wl,--no-as-needed", "-lstdc++")},
        r"needs libstdc\+\+\.so\.6, which manylinux does not promise$",
    ),
    "a symbol of none": (
        {
            "source": BODY.replace("getpid", "nowhere") + "int nowhere(void);\n",
            "flags": (*STRIPPED, "-w", "-std=gnu89"),
        },
        r"needs nowhere, which neither Python nor glibc has$",
    ),
    "not stripped": ({"flags": LINKED}, r"has \.symtab: it is not stripped$"),
    "for debuggers": ({"flags": (*LINKED, "-g")}, r"has \.debug_info: it is not stripped$"),
    "too large": ({"padding": 10**7}, r"has 10\.\d MB, more than 9$"),
}


def test_a_later_unwinder() -> None:
    new, old = (wheel_gates.Symbol("_Unwind_x", False, False, f"GCC_{v}", "libgcc_s.so.1") for v in ("14.0.0", "3.0"))
    module = wheel_gates.Module("_cpu.so", ("libgcc_s.so.1",), (new, old), ())
    assert list(wheel_gates.module_failures(module, (2, 17))) == [
        "needs _Unwind_x of GCC_14.0.0; the wheel's name claims glibc 2.17"
    ]


def test_a_sound_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sound = wheel(tmp_path, NEWEST)
    assert wheel_gates.failures(sound, cuda=False) == []
    missing = f"{sound.name} has the modules ['_cpu'], not ['_cpu', '_cuda']"
    assert wheel_gates.failures(sound, cuda=True) == [missing]
    for options, status, said in (([], 0, ""), (["--cuda"], 1, f"{missing}\n")):
        monkeypatch.setattr(sys, "argv", ["wheel_gates.py", *options, str(sound)])
        assert wheel_gates.main() == status
        found, wrong = capsys.readouterr()
        assert wrong == said
        assert re.search(r"_cpu\S*: libc\.so\.6; newest symbol version GLIBC_2[.\d]+\n", found)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule(rule: str, tmp_path: Path) -> None:
    spoiled, failure = BROKEN[rule]
    found = wheel_gates.failures(wheel(tmp_path, **{"tag": NEWEST, **spoiled}), cuda=False)
    assert any(re.search(failure, each) for each in found), found
    assert len(found) == 1 or rule == "for debuggers"  # which has several sections
