"""Compiles every Triton kernel for GPUs that need not be here, and checks what the contract demands of the binaries.

python triton_gates.py [--targets sm_90,gfx942] [--kernels 'sample f32|keep']    # the table; 1 if a gate fails
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsample.backends.triton_call import WORDS
from fastsample.backends.triton_launch import PROGRAMS_PER_SM, THREADS, compile_options
from fastsample.kernels import keep, law, logprobs, outputs, part, part_draws, part_list, process, sample

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
REGISTERS = {"gfx942": 131072}  # per multiprocessor, 65536 elsewhere
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "sm_120": 100, "gfx942": 64}  # KiB per multiprocessor
POINTERS = {
    "x": "fp32", "counts": "i32", "records": "i32", "seeds": "i64", "offsets": "i64", "status": "i32",
    "tokens": "i64", "workspace": "i64", "cuts": "i64", "sems": "i32", "logits": "fp32", "mask": "i32",
    "row_ptr": "i64", "bias_ids": "i64", "bias_values": "fp32", "prompt": "i64", "output": "i64", "out": "fp32",
    "logprobs": "fp32", "ranks": "i64", "listed": "i32", "found": "i64", "top_ids": "i64", "top_logprobs": "fp32",
    "breakers": "i64", "history": "i32", "drafted": "i64", "requests": "i64",
    "given": "i64", "weights": "i64", "masses": "i64",
    "count": "i32", "bitmask": "i32", "log_kept_mass": "fp32", "entropy": "fp32", "ids": "i32",
    "drafts": "i64", "accepted": "i32", "ends": "i32", "arrivals": "i32",
    "queries": "i64", "details": "i64", "answers": "i64", "sums": "i64",
}  # fmt: skip
# Bytes of spilled registers that are let pass: until Triton 3.6, a few loads of local memory a phase, none of them for
# each logit. There each reduction in a loop holds a register for all of the loop, and that over phases has many.
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)
SPILLS = 64 if OLD else 0
ALIGNED = ("x_stride", "stride", "vocab")  # as they are when a vocabulary is a multiple of 16


@dataclass(frozen=True)
class Kernel:
    """One specialisation of a kernel."""

    name: str
    fn: Any
    constants: dict[str, Any]
    row_loads: int  # places in the source that load a block of logits, or of their counts
    types: dict[str, str] = field(default_factory=dict)
    float64: bool = False  # whether the contract asks for float64 there


def _sample(name: str, row_loads: int, dtype: str = "fp32", **more: Any) -> Kernel:
    vec = 4 if dtype == "fp32" else 8
    constants = {
        "VERIFIES": False,
        "HAS_COUNTS": False,
        "PROBS": False,
        "ROUNDS": 8,
        "SPLIT": True,
        "CHUNKS": 128,
        "VEC": vec,
        "BLOCK": vec * THREADS,
    }
    return Kernel(name, sample.sample, constants | more, row_loads, {"x": dtype}, float64=True)


def _kernels() -> Iterator[Kernel]:
    block = {"BLOCK": 4 * THREADS}
    yield _sample("sample f32", 13)
    yield _sample("sample f32 penalties", 14, HAS_COUNTS=True, SPLIT=False)
    yield _sample("sample bf16", 13, "bf16", ROUNDS=4)
    yield _sample("sample f16", 13, "fp16", ROUNDS=5)
    yield _sample("sample f32 probs", 13, PROBS=True)
    yield _sample("sample bf16 probs", 13, "bf16", ROUNDS=4, PROBS=True)
    yield _sample("sample f32 drafts", 13, VERIFIES=True)
    yield Kernel("prepare", process.prepare, {"HAS_MASK": True, "HAS_COUNTS": True, "PROBS": False} | block, 1)
    everything = dict.fromkeys(("HAS_BIAS", "HAS_PROMPT", "HAS_OUTPUT", "HAS_DRAFTS", "HAS_REQUESTS"), True)
    yield Kernel("edit", process.edit, everything | {"BLOCK": 256}, 0)
    for what in ("FILTERED", "PROBABILITIES", "KEPT"):
        constants = {"WHAT": getattr(outputs, what).value, "PROBS": False} | block
        yield Kernel(f"write {what.lower()}", outputs.write, constants, 1, float64=what == "PROBABILITIES")
    yield Kernel("weigh tokens", law.weigh_tokens, {"HAS_GIVEN": True, "PROBS": False}, 0)
    yield Kernel("write masses", law.write_masses, {"PROBS": False} | block, 1)
    wanted = dict.fromkeys(("COUNT", "BITMASK", "MASS", "ENTROPY"), True)
    for name, more in {"": {}, " count": {"MASS": False, "ENTROPY": False}, " probs": {"PROBS": True}}.items():
        constants = {**wanted, "PROBS": False, "CHUNKS": 128, **block, **more}
        yield Kernel(f"keep{name}", keep.keep, constants, 1, float64=constants["ENTROPY"])
    yield Kernel("list ids", keep.list_ids, {"WORDS": WORDS}, 0)
    yield Kernel("sampled raw", logprobs.sampled, {"RAW": True, "PROBS": False}, 0, float64=True)
    yield Kernel("sampled processed", logprobs.sampled, {"RAW": False, "PROBS": False}, 0, float64=True)
    yield Kernel("rank", logprobs.rank, block, 1)
    yield Kernel("collect", logprobs.collect, block, 1)
    yield Kernel("arrange raw", logprobs.arrange, {"RAW": True, "PROBS": False, "BLOCK": 32}, 0, float64=True)
    yield Kernel("arrange processed", logprobs.arrange, {"RAW": False, "PROBS": False, "BLOCK": 32}, 0, float64=True)
    yield from _part_kernels()


def _part_kernels() -> Iterator[Kernel]:
    """Those for rows that are split over ranks."""
    block = {"BLOCK": 4 * THREADS}
    chunks = {"CHUNKS": 128} | block
    wide, half = {"VEC": 8, "BLOCK": 8 * THREADS}, {"x": "bf16"}
    every = {"WHOLE": True, "TOTAL": True, "PRODUCTS": True, "SPREAD": True, "BINS_AT": 9}
    yield Kernel("part sums", part.sums, every | {"VEC": 4} | block, 3)
    yield Kernel("part sums bf16", part.sums, every | wide, 3, half)
    bins = {**every, "WHOLE": False, "TOTAL": False, "PRODUCTS": False, "SPREAD": False, "BINS_AT": 0}
    yield Kernel("part bins", part.sums, bins | {"VEC": 4} | block, 1)
    yield Kernel("part totals", part.totals, {"FIRST": True, "COUNT": True, "BITMASK": True} | chunks, 1)
    yield Kernel("part ends", part.ends, chunks, 1)
    yield Kernel("part bits", part.bits, block, 1)
    yield Kernel("part given", part_list.given, {"BLOCK": 256}, 0)
    yield Kernel("part above", part.above, block, 1)
    yield Kernel("part count first", part_list.count_first, {"MASS": True, "FLAT": True} | block, 1)
    yield Kernel("part count within", part_list.count_within, block, 1)
    told = {"FIRST": True, "MASS": True, "FLAT": True} | chunks
    yield Kernel("part tell first", part_list.tell, told, 1, float64=True)
    told = {"FIRST": False, "MASS": False, "FLAT": False} | chunks
    yield Kernel("part tell within", part_list.tell, told, 1)
    yield Kernel("part weigh", part_draws.weigh, {"TELLS": False} | block, 1)
    yield Kernel("part weigh entropy", part_draws.weigh, {"TELLS": True} | block, 1, float64=True)
    yield Kernel("part draw", part_draws.draw, {"TELLS": True} | chunks, 1, float64=True)
    yield Kernel("part weigh own", part_draws.weigh_own, {"RANKS": 32} | block, 1)
    yield Kernel("part guess", part_draws.guess, {"RANKS": 32} | chunks, 1, float64=True)
    yield Kernel("part guess bf16", part_draws.guess, {"RANKS": 32} | chunks | {"BLOCK": wide["BLOCK"]}, 1, half, True)


KERNELS = {kernel.name: kernel for kernel in _kernels()}


def compile_kernel(kernel: Kernel, target: str, **options: Any) -> Any:
    """Triton's compiled kernel, as the engine would launch it on aligned rows."""
    names = kernel.fn.arg_names
    pointers = {name: "*" + kernel.types.get(name, POINTERS[name]) for name in names if name in POINTERS}
    signature = {n: "constexpr" if n in kernel.constants else pointers.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers or n in ALIGNED}
    source = ASTSource(kernel.fn, signature, kernel.constants, aligned)
    gpu = TARGETS[target]
    chosen = compile_options(gpu.warp_size, gpu.backend == "cuda") | options
    # A hit in the user's cache may name the source files of another checkout.
    # What is linked for AMD is not looked at, and Triton 3.3 and 3.4 come without a linker.
    with patch.dict(os.environ, TRITON_ALWAYS_COMPILE="1", TRITON_HIP_LLD_PATH=str(shutil.which("true"))):
        return triton.compile(source, target=gpu, options=chosen)


def changed(kernel: Kernel) -> list[str]:
    """Constants that Triton would find changed at a launch, as a NaN always is, and refuse to launch."""
    assert kernel.fn.cache_key  # finds the constants
    found = kernel.fn.used_global_vals.items()
    return [name for (name, _), (value, scope) in found if scope.get(name, value) != value]


@dataclass
class Measures:
    """What the gates look at."""

    registers: int
    shared: int  # bytes
    spills: int  # bytes of local memory
    wide_loads: int  # of 16 bytes
    fused: int  # multiply-adds that are no part of a division or a root rounded to nearest, of a logarithm or a power
    float64: int
    inexact: int  # approximate or flushing float instructions

    def broken(self, kernel: Kernel, target: str) -> list[str]:
        """Names of the gates that this binary fails."""
        gates = {
            "spills": self.spills <= SPILLS,
            "fused multiply-adds": self.fused == 0,
            "float64": self.float64 == 0 or kernel.float64,
            "approximations": self.inexact == 0,
            "16-byte row loads": self.wide_loads >= kernel.row_loads,
            "registers": self.registers * THREADS * PROGRAMS_PER_SM <= REGISTERS.get(target, 65536),
            "shared memory": self.shared * PROGRAMS_PER_SM <= SHARED[target] * 1024,
        }
        return [name for name, passed in gates.items() if not passed]


def measure(kernel: Kernel, target: str, **options: Any) -> Measures:
    compiled = compile_kernel(kernel, target, **options)
    return _measure_amd(compiled) if "amdgcn" in compiled.asm else _measure_nvidia(compiled)


def dump(tool: str, cubin: bytes, *options: str) -> str:
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BIN / tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def _source(path: str) -> list[str]:
    return [*Path(path).read_text().splitlines(), ""]  # the end of a loop that ends a file lies behind it


DIVIDES = re.compile(r"div\.rn|div_rn\(|return a / b|float64\) / |tl\.log\(|tl\.sqrt\(|tl\.exp2\(")
LINE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*)")
TWO_TO_32 = "0x4f800000"
COPIES = ("MOV", "UMOV", "IMAD.MOV.U32", "R2UR")
DIVISION_LENGTH = 128  # instructions that a division may span when it is scheduled among others


def instructions(sass: str) -> Iterator[tuple[str, bool]]:
    """Each opcode, and whether it is part of a division or a logarithm.

    Those are made of multiply-adds; any other multiply-add was contracted. They are recognised by the source line, by
    being in a subroutine, or, where the scheduler has mixed up the lines, by refining a reciprocal that was estimated
    a few instructions before, or a copy of one.
    """
    lines: list[str] = []
    fresh, subroutine = True, False
    refining: dict[str, int] = {}  # register -> where its reciprocal was estimated
    at = 0
    for line in sass.splitlines():
        if line.startswith(("$__internal", ".text.")):
            subroutine = line.startswith("$__internal")
        elif found := LINE.match(line):
            lines = [] if fresh else lines
            fresh = False
            lines.append(_source(found[1])[int(found[2]) - 1])
        elif found := INSTRUCTION.match(line):
            fresh, at = True, at + 1
            opcode, registers = found[1], re.findall(r"\bU?R\d+\b", found[2])
            target, sources = (registers[0], registers[1:]) if registers else ("", [])
            born = at if opcode == "MUFU.RCP" else max((refining.get(r, -1) for r in sources), default=-1)
            recent = born >= 0 and at - born <= DIVISION_LENGTH
            refines = opcode in ("FFMA", "UFFMA") and recent
            refining.pop(target, None)
            if refines or opcode == "MUFU.RCP" or (opcode in COPIES and recent):
                refining[target] = born
            adds_zero = found[2].split(",")[1:2] == [" RZ"]  # float64 division looks at exponents with 0 * a + b
            yield opcode, subroutine or refines or adds_zero or any(map(DIVIDES.search, lines))


def _measure_nvidia(compiled: Any) -> Measures:
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    usage = dump("cuobjdump", cubin, "-res-usage")
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    counts = Counter(instructions(dump("nvdisasm", cubin, "-g", "-c")))

    def count(pattern: str, dividing: bool | None = None) -> int:
        return sum(n for (op, d), n in counts.items() if re.match(pattern, op) and dividing in (None, d))

    return Measures(
        registers,
        compiled.metadata.shared,
        spills=stack + local,
        wide_loads=count(r"LDG\.E\.(\w+\.)*128"),
        fused=count("U?[FD]FMA", dividing=False) + len(re.findall(r"\bfma\.\S*f32", ptx)),
        float64=count(r"D(ADD|MUL|FMA|SETP|MNMX)\b|MUFU\.\w+64H|.*\.F64"),
        inexact=len(re.findall(r"\w+\.(?:approx|full)\.\S*f32|(?:add|sub|mul|fma|div|cvt)\.\S*ftz", ptx)),
    )


def _measure_amd(compiled: Any) -> Measures:
    text = compiled.asm["amdgcn"]
    registers, spilled, scratch = (
        int(re.search(rf"\.{key}:\s*(\d+)", text)[1])
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    # A division refines a reciprocal with fused multiply-adds, and conversions to and from 64 bits use one.
    fused, length = 0, DIVISION_LENGTH // 2  # nothing but the distance tells them apart here
    reciprocal = -length - 1
    for at, line in enumerate(re.findall(r"^\s+[a-z]+_.*", text, re.MULTILINE)):
        if "v_rcp_f32" in line or "v_div_scale_f32" in line:
            reciprocal = at
        if re.search(r"\bv_(pk_)?(fma|fmac|fmamk|fmaak)_f32", line) and "|" not in line and TWO_TO_32 not in line:
            fused += "v_pk_" in line or at - reciprocal > length
    # Mode 3 keeps subnormal numbers.
    inexact = len(re.findall(r"\.amdhsa_float_denorm_mode_(?:32|16_64) [^3]", text))
    wide = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
    float64 = len(re.findall(r"\bv_\w+_f64", text))
    return Measures(registers, compiled.metadata.shared, spilled + scratch, wide, fused, float64, inexact)


def releases(amdgcn: str) -> list[bool]:
    """Of each release to other programs on gfx942, whether every wave has waited for its own stores before.

    The wave that releases writes the cache back, after a barrier of all waves; each must have waited before that.
    """
    found, waited, met = [], False, False
    for opcode, operands in re.findall(r"^\s+(s_waitcnt|s_barrier|buffer_wbl2|global_\w+)\b(.*)", amdgcn, re.MULTILINE):
        if opcode == "s_waitcnt":
            waited |= "vmcnt(0)" in operands
        elif opcode == "s_barrier":
            met = waited
        elif opcode == "buffer_wbl2":
            found.append(met)
        elif "load" not in opcode:
            waited = met = False
    return found


def table(found: dict[tuple[str, str], Measures]) -> str:
    """One line per kernel and target."""
    head = f"{'kernel':22}{'target':8}{'regs':>5}{'shared':>8}{'spills':>7}{'16B':>5}{'fused':>6}{'f64':>5}  gates"
    lines = [head]
    for (name, target), m in found.items():
        numbers = f"{m.registers:5}{m.shared:8}{m.spills:7}{m.wide_loads:5}{m.fused:6}{m.float64:5}"
        lines.append(f"{name:22}{target:8}{numbers}  {', '.join(m.broken(KERNELS[name], target)) or 'pass'}")
    return "\n".join(lines)


def main() -> int:
    """Prints the table line by line; a kernel that cannot be compiled fails like one that breaks a gate."""
    parser = ArgumentParser()
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--kernels", default="", help="a regular expression; the names that it is found in")
    chosen = parser.parse_args()
    print(f"Triton {triton.__version__}", *table({}).splitlines(), sep="\n", flush=True)
    failures = sum(map(bool, map(changed, KERNELS.values())))
    for target in chosen.targets.split(","):
        for name in filter(re.compile(chosen.kernels).search, KERNELS):
            try:
                found = measure(KERNELS[name], target)
            except Exception as error:  # whatever a compiler of three years ago raises
                failures += 1
                print(f"{name:22}{target:8} cannot be compiled: {str(error).splitlines()[-1]}", flush=True)
                continue
            failures += bool(found.broken(KERNELS[name], target))
            print(table({(name, target): found}).splitlines()[-1], flush=True)
    print(f"{failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
