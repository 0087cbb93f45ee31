"""Holds wheels to what their names claim: `python wheel_gates.py [--cuda] WHEEL...`; 1 if a gate fails.

A manylinux tag (PEP 600) names a glibc. An extension module of such a wheel may take from the system the libraries of
glibc alone, in no later version than that, and GCC's unwinder; it exports its PyInit_ alone and carries no symbols for
debuggers. A wheel has the modules that it should have, and is not too large.
"""

from __future__ import annotations

import io
import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection
from elftools.elf.sections import SymbolTableSection

SYSTEM = re.compile(r"(libc|libm|libpthread|libdl|librt|libgcc_s|ld-linux[-_a-z0-9]*)\.so\.\d")
GCC = (4, 8, 0)  # libgcc_s of manylinux2014 (PEP 599)
MEGABYTES = {False: 9, True: 15}  # a wheel's limit without and with the CUDA engine; the model in it takes 5

Version = tuple[int, ...]


@dataclass(frozen=True)
class Symbol:
    """A dynamic symbol; `source` is the library that the version is of, and empty where there is no version."""

    name: str
    defined: bool
    weak: bool
    version: str
    source: str


@dataclass(frozen=True)
class Module:
    """What the loader sees of an extension module."""

    name: str
    needed: tuple[str, ...]
    symbols: tuple[Symbol, ...]
    sections: tuple[str, ...]


def read(name: str, binary: bytes) -> Module:
    elf = ELFFile(io.BytesIO(binary))
    sections = list(elf.iter_sections())
    dynamic = [tag for s in sections if isinstance(s, DynamicSection) for tag in s.iter_tags("DT_NEEDED")]
    versions = {
        aux.entry.vna_other: (aux.name, library.name)
        for section in sections
        if isinstance(section, GNUVerNeedSection)
        for library, auxes in section.iter_versions()
        for aux in auxes
    }
    of = next((s for s in sections if isinstance(s, GNUVerSymSection)), None)
    table = next(s for s in sections if isinstance(s, SymbolTableSection) and s.name == ".dynsym")
    symbols = []
    for i, symbol in enumerate(table.iter_symbols()):
        if symbol.name:
            version = versions.get(of.get_symbol(i).entry.ndx, ("", "")) if of else ("", "")
            weak = symbol.entry.st_info.bind == "STB_WEAK"
            symbols.append(Symbol(symbol.name, symbol.entry.st_shndx != "SHN_UNDEF", weak, *version))
    return Module(name, tuple(tag.needed for tag in dynamic), tuple(symbols), tuple(s.name for s in sections))


def modules(wheel: Path) -> list[Module]:
    with ZipFile(wheel) as archive:
        return [read(name, archive.read(name)) for name in archive.namelist() if name.endswith(".so")]


def claimed(wheel: Path) -> Version | None:
    """The glibc that the name claims: 2.17 for manylinux_2_17 (whose older name is manylinux2014)."""
    tags = re.findall(r"manylinux_(\d+)_(\d+)_", wheel.name)
    return min((tuple(map(int, tag)) for tag in tags), default=None)


def number(version: str) -> Version:
    """(2, 2, 5) for GLIBC_2.2.5; GLIBC_PRIVATE, which holds for one build of glibc, is later than all."""
    numbers = version.partition("_")[2].split(".")
    return tuple(map(int, numbers)) if numbers[0].isdigit() else (sys.maxsize,)


def module_failures(module: Module, glibc: Version) -> Iterator[str]:
    for library in module.needed:
        if not SYSTEM.fullmatch(library):
            yield f"needs {library}, which manylinux does not promise"
    for s in module.symbols:
        if s.defined:
            if s.name != f"PyInit_{Path(module.name).name.split('.')[0]}":
                yield f"exports {s.name}"
        elif SYSTEM.fullmatch(s.source) and number(s.version) > (GCC if s.source == "libgcc_s.so.1" else glibc):
            yield f"needs {s.name} of {s.version}; the wheel's name claims glibc {'.'.join(map(str, glibc))}"
        elif not s.version and not s.weak and not s.name.startswith(("Py", "_Py")):
            yield f"needs {s.name}, which neither Python nor glibc has"
    for section in module.sections:
        if section == ".symtab" or section.startswith(".debug"):
            yield f"has {section}: it is not stripped"


def failures(wheel: Path, cuda: bool) -> list[str]:
    """What is wrong with a wheel, which must have the CUDA engine, or must not."""
    glibc, found, size = claimed(wheel), modules(wheel), wheel.stat().st_size / 1e6
    if glibc is None:
        return [f"{wheel.name} claims no glibc: it has no manylinux tag"]
    wanted = {"_cpu", "_cuda"} if cuda else {"_cpu"}
    wrong = [f"{module.name} {failure}" for module in found for failure in module_failures(module, glibc)]
    if (names := {Path(module.name).name.split(".")[0] for module in found}) != wanted:
        wrong.append(f"{wheel.name} has the modules {sorted(names)}, not {sorted(wanted)}")
    if size > MEGABYTES[cuda]:
        wrong.append(f"{wheel.name} has {size:.1f} MB, more than {MEGABYTES[cuda]}")
    return wrong


def main() -> int:
    parser = ArgumentParser(description="Holds wheels to what their names claim.")
    parser.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    parser.add_argument("--cuda", action="store_true", help="they have the CUDA engine")
    asked = parser.parse_args()
    wrong = [failure for wheel in asked.wheels for failure in failures(wheel, asked.cuda)]
    for wheel in asked.wheels:
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        for module in modules(wheel):
            newest = max((s.version for s in module.symbols if s.version.startswith("GLIBC_")), key=number)
            print(f"  {module.name}: {', '.join(module.needed)}; newest symbol version {newest}")
    for failure in wrong:
        print(failure, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
