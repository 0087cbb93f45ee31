"""Compiles every Triton kernel for GPUs that need not be here, and checks gates on the binaries."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

import triton.language as tl
from triton_gates import (
    KERNELS,
    TARGETS,
    Measures,
    changed,
    compile_kernel,
    dump,
    instructions,
    measure,
    releases,
    table,
)

from fastsample.kernels import rounded
from fastsample.kernels.versions import builtin

FOUND: dict[tuple[str, str], Measures] = {}


@pytest.fixture(scope="module", autouse=True)
def report(request: pytest.FixtureRequest) -> Iterator[None]:
    """Prints the table of what was compiled."""
    yield
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        print(f"\n{table(FOUND)}")


@pytest.mark.parametrize("target", [pytest.param(t, marks=() if t == "sm_90" else pytest.mark.slow) for t in TARGETS])
@pytest.mark.parametrize("name", KERNELS)
def test_gates(name: str, target: str) -> None:
    FOUND[name, target] = found = measure(KERNELS[name], target)
    assert found.broken(KERNELS[name], target) == [], found


def test_every_wave_waits_for_its_stores_before_a_release() -> None:
    """A release waits for the stores of one wave, and those of others may be on their way to another die's cache."""
    found = releases(compile_kernel(KERNELS["sample f32"], "gfx942").asm["amdgcn"])
    assert len(found) > 10
    assert all(found)


def test_a_wave_that_does_not_wait_is_found() -> None:
    lines = ["s_waitcnt vmcnt(0)", "global_store_dword v0, v1", "s_waitcnt vmcnt(0)", "s_barrier", "buffer_wbl2 sc1"]
    assert releases("".join(f"\t{line}\n" for line in lines)) == [True]
    del lines[2]
    assert releases("".join(f"\t{line}\n" for line in lines)) == [False]


def test_no_constant_changes_between_launches() -> None:
    assert [name for kernel in KERNELS.values() for name in changed(kernel)] == []


def test_a_constant_that_is_no_number_seems_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KERNELS["arrange raw"]
    monkeypatch.setitem(kernel.fn.__globals__, "NEG_INF", tl.constexpr(float("nan")))
    assert "NEG_INF" in changed(kernel)


FUSED = {
    "sm_90": ["write kept", "keep", "sample f32"],
    "sm_120": ["write kept"],
    "gfx942": ["write kept", "sample f32"],
}


@pytest.mark.parametrize(("target", "name"), [(target, name) for target, names in FUSED.items() for name in names])
def test_a_compiler_that_may_fuse_finds_nothing(target: str, name: str) -> None:
    found = measure(KERNELS[name], target, enable_fp_fusion=True)
    assert found.broken(KERNELS[name], target) == [], found


@pytest.fixture
def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as the interpreter has them."""
    monkeypatch.setattr(rounded, "backend", builtin(lambda **_: tl.constexpr("interpreter")))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.usefixtures("plain_products")
def test_a_plain_product_breaks_a_gate(target: str) -> None:
    kernel = KERNELS["write kept"]
    found = measure(kernel, target, enable_fp_fusion=True)
    assert found.fused >= 4, "the polynomial has five places to fuse"
    assert found.broken(kernel, target) == ["fused multiply-adds"]


def test_too_few_registers_break_a_gate() -> None:
    kernel = KERNELS["sample f32"]
    assert "spills" in measure(kernel, "sm_90", maxnreg=40).broken(kernel, "sm_90")


def test_too_many_registers_break_a_gate() -> None:
    kernel = KERNELS["sample f32"]
    assert Measures(129, 0, 0, 13, 0, 9, 0).broken(kernel, "sm_90") == ["registers"]
    assert Measures(128, 200 * 1024, 0, 13, 0, 9, 0).broken(kernel, "sm_90") == ["shared memory"]
    assert Measures(128, 0, 0, 12, 0, 9, 1).broken(kernel, "sm_90") == ["approximations", "16-byte row loads"]
    assert Measures(128, 0, 0, 1, 0, 1, 0).broken(KERNELS["rank"], "sm_90") == ["float64"]


@pytest.mark.usefixtures("plain_products")
def test_a_fused_multiply_add_of_float64_breaks_a_gate() -> None:
    """The statistics of a row are of float64, each operation rounded by itself."""
    kernel = KERNELS["sample f32"]
    compiled = compile_kernel(kernel, "sm_90", enable_fp_fusion=True)
    counts = Counter(instructions(dump("nvdisasm", compiled.asm["cubin"], "-g", "-c")))
    assert counts["DFMA", False] >= 3, "the square of the mean, and where halves of a sum are put together"


def test_multiply_adds_of_a_division_are_told_from_others() -> None:
    sass = """
        /*0010*/                   MUFU.RCP R4, R3 ;
        /*0020*/                   FFMA R5, -R3, R4, 1 ;
        /*0030*/                   FFMA R9, R8, R7, R6 ;
        /*0040*/                   FFMA R4, R4, R5, R4 ;
        /*0050*/                   FMUL R4, R4, R2 ;
        /*0060*/                   FFMA R4, R4, R2, R1 ;
    """
    assert [division for opcode, division in instructions(sass) if opcode == "FFMA"] == [True, False, True, False]
