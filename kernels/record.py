"""The packed record of a row: its columns and choices are those of the table in fastsample/params.py."""

import triton
import triton.language as tl

from fastsample.params import specs

from .versions import constexpr_function

# (name, kind, choices) of each column. A constexpr is part of the key under which Triton caches a kernel, so a kernel
# that was compiled for another table is never found.
COLUMNS = tl.constexpr(tuple((name, spec.kind, spec.choices) for name, spec in specs()))


@constexpr_function
def column(name):
    """A parameter's position in the record."""
    return [known for known, _, _ in COLUMNS.value].index(name)


@constexpr_function
def is_float(name):
    return COLUMNS.value[column(name)][1] == "float"


@constexpr_function
def choice(name, value):
    """The number that stands for a choice of a parameter."""
    return COLUMNS.value[column(name)][2].index(value)


@triton.jit
def param(record, NAME: tl.constexpr):
    """A parameter of the row: float32, or int32 for integers and choices."""
    bits = tl.load(record + column(NAME))
    if is_float(NAME):
        return bits.to(tl.float32, bitcast=True)
    else:
        return bits
