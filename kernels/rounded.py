"""Products and quotients rounded as IEEE 754 has it, whatever the compiler and its options.

A product whose sum is next may be fused with it, and is then never rounded. Triton's `enable_fp_fusion=False` forbids
that, but not everywhere: 3.6 still fuses pairs of products for sm_120. Nothing else need be done for sums.
"""

import triton
import triton.language as tl

from .versions import backend


@triton.jit
def mul(a, b):
    """a * b, of float32 or float64; `b` may be a number."""
    b = tl.cast(b, a.dtype)
    if backend() == "cuda":
        # In PTX, an instruction that says how it rounds is never fused, and one without .ftz never flushes.
        if a.dtype == tl.float64:
            return tl.inline_asm_elementwise("mul.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], tl.float64, True, 1)
        else:
            return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)
    elif backend() == "hip":
        # A comment: no instruction, but the compiler cannot look through it, and so fuses nothing.
        return tl.inline_asm_elementwise("; rounded", "=v,0", [a * b], a.dtype, True, 1)
    else:
        return a * b


@triton.jit
def div(a, b):
    """a / b of float32."""
    if backend() == "cuda":
        # Until Triton 3.5, tl.div_rn takes subnormal numbers for 0.
        return tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)
    else:
        return tl.div_rn(a, b)
