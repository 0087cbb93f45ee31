"""What the contract and the tuning demand of the CUDA extension's binaries, measured in their machine code.

python cuda_gates.py    # the table of all kernels and targets
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from triton_gates import BIN, instructions

CSRC = Path(__file__).parents[2] / "csrc"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
DTYPES = {"f": "float32", "NS_4HalfE": "float16", "NS_6BFloatE": "bfloat16"}
POLICIES = ("cluster", "block", "grid")
SAMPLE = tuple(f"sample {policy}{plain}" for policy in POLICIES for plain in ("", " plain"))
KERNELS = (*SAMPLE, "keep", "law", "outputs")
LIST = "list"  # the same for every dtype
NARROW = ("keep", LIST)  # a lane reads a token or a word at a time, the bits of a word being a warp's lanes
THREADS, BLOCKS_PER_SM, REGISTERS = (
    int(re.search(rf"{name} =\s+(\d+);", (CSRC / "cuda/tuning.h").read_text())[1])  # type: ignore[index]
    for name in ("kThreads", "kBlocksPerSM", "kRegisters")
)
AHEAD = 8  # 16-byte loads under way before the first is stored, in the first pass of a row that is held
FENCES = 4  # of a cluster's kernel: its first barrier, that which is called, and two of verification
CODE = 96 * 1024  # bytes of the kernel that serves most calls: a cluster, nothing over the logits
ROW_FLOAT64 = 128  # instructions for the thresholds of a row (stage 6b); one for each logit unrolled would be more
NAME = re.compile(
    r"_ZN10fastsample\d+(sample|keep|law|outputs|list)_kernel(?:I(f|NS_4HalfE|NS_6BFloatE)(?:L\w*?E(\d)ELb(\d)E)?E)?"
)


def extension() -> Path | None:
    """The built fastsample._cuda, found without importing it."""
    spec = find_spec("fastsample._cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


@dataclass(frozen=True)
class Kernel:
    """One kernel in one binary."""

    name: str
    dtype: str
    target: str

    @property
    def is_empty(self) -> bool:
        """sm_80 has no clusters: its cluster kernel can be named, but is never launched."""
        return self.name.startswith("sample cluster") and self.target == "sm_80"

    @property
    def is_usual(self) -> bool:
        """What serves most calls on a GPU with clusters."""
        return self.name == "sample cluster plain" and not self.is_empty


@dataclass(frozen=True)
class Measures:
    """What the gates measure."""

    registers: int
    local: int  # bytes of stack and local memory
    wide_loads: int  # of 16 bytes
    fused: int  # multiply-adds, except those that make up a correctly rounded division
    float64: int
    inexact: int  # float instructions that approximate or flush to zero, except a division's
    ahead: int  # 16-byte loads from device memory with no store to shared memory between them
    fences: int  # MEMBARs
    generic: int  # loads whose address may be of shared or device memory
    code: int  # bytes

    def broken(self, kernel: Kernel) -> list[str]:
        """The gates that this kernel does not pass."""
        gates = {
            "registers": self.registers <= REGISTERS,
            "spills": self.local == 0,
            "16-byte loads": self.wide_loads >= 1 or kernel.is_empty or kernel.name in NARROW,
            "fused multiply-adds": self.fused == 0,
            "float64": self.float64 <= ROW_FLOAT64 or kernel.name in ("keep", "outputs"),
            "approximations": self.inexact == 0,
            "loads ahead": self.ahead >= AHEAD or not kernel.name.startswith("sample cluster") or kernel.is_empty,
            "fences": self.fences <= FENCES or not kernel.is_usual,
            "generic loads": self.generic == 0 or not kernel.is_usual,
            "code": self.code <= CODE or not kernel.is_usual,
        }
        return [name for name, passed in gates.items() if not passed]


def run(tool: str, *arguments: object, cwd: Path | None = None) -> str:
    command = [str(BIN / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


def longest_run(operations: list[str]) -> int:
    """Of 16-byte loads, as far as no store to shared memory comes between."""
    most = run = 0
    for operation in operations:
        if re.match(r"LDG\.E\.(\w+\.)*128", operation):
            run += 1
        elif operation.startswith(("STS", "ST.")):
            run = 0
        most = max(most, run)
    return most


def measure(sass: str, registers: int, local: int) -> Measures:
    """From the machine code of one kernel."""
    found = list(instructions(sass))
    counts = Counter(found)

    def count(pattern: str, dividing: bool | None = None) -> int:
        return sum(n for (op, d), n in counts.items() if re.match(pattern, op) and dividing in (None, d))

    return Measures(
        registers,
        local + count(r"(LDL|STL)\b"),
        count(r"LDG\.E\.(\w+\.)*128"),
        count("FFMA", dividing=False),
        count(r"D(ADD|MUL|FMA|SETP|MNMX)\b|MUFU\.\w+64H|F2F\.F64|I2F\.F64"),
        count(r"MUFU\.(EX2|LG2|SIN|COS|TANH)|F(ADD|MUL|FMA)\.FTZ", dividing=False),
        longest_run([operation for operation, _ in found]),
        count(r"MEMBAR"),
        count(r"LD(\.|$)"),
        16 * len(found),
    )


def kernels_of(cubin: Path, target: str) -> Iterator[tuple[Kernel, Measures]]:
    usage = run("cuobjdump", "-res-usage", cubin)
    used = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    sections = re.split(r"^\.text\.(\S+):$", run("nvdisasm", "-c", cubin), flags=re.MULTILINE)
    code = dict(zip(sections[1::2], sections[2::2], strict=True))
    for symbol, registers, stack, local in used:
        found = NAME.match(symbol)
        assert found is not None, symbol
        name = SAMPLE[2 * int(found[3]) + int(found[4])] if found[1] == "sample" else found[1]
        kernel = Kernel(name, DTYPES.get(found[2], "any"), target)
        yield kernel, measure(code[symbol], int(registers), int(stack) + int(local))


def measure_extension(library: Path) -> dict[Kernel, Measures]:
    """Every kernel of every binary in the extension."""
    found: dict[Kernel, Measures] = {}
    with TemporaryDirectory() as folder:
        run("cuobjdump", "-xelf", "all", library, cwd=Path(folder))
        for cubin in sorted(Path(folder).glob("*.cubin")):
            target = re.search(r"sm_\d+", cubin.name)
            assert target is not None
            found |= dict(kernels_of(cubin, target[0]))
    return found


def ptx_targets(library: Path) -> set[str]:
    return set(re.findall(r"\.(sm_\d+)\.ptx", run("cuobjdump", "--list-ptx", library)))


def table(found: dict[Kernel, Measures]) -> str:
    """One line per kernel and target."""
    heads = ("regs", "local", "16B", "ahead", "fences", "generic", "KB", "fused", "f64")
    lines = [f"{'kernel':21}{'dtype':10}{'target':8}" + "".join(f"{head:>8}" for head in heads) + "  gates"]
    for k, m in sorted(found.items(), key=lambda item: (item[0].name, item[0].dtype, TARGETS.index(item[0].target))):
        shown = (m.registers, m.local, m.wide_loads, m.ahead, m.fences, m.generic, m.code // 1024, m.fused, m.float64)
        numbers = "".join(f"{number:8}" for number in shown)
        lines.append(f"{k.name:21}{k.dtype:10}{k.target:8}{numbers}  {', '.join(m.broken(k)) or 'pass'}")
    return "\n".join(lines)


if __name__ == "__main__":
    built = extension()
    print("fastsample._cuda is not built" if built is None else table(measure_extension(built)))
