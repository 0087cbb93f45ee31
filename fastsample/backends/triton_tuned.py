"""Programs per row that were the fastest when they were measured: `python -m bench tuned` prints these lines.

The key is that of csrc/cuda/tuned.h. The first line that fits counts; where none does, the engine estimates.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

MAX_PARTS = 256  # that of kernels/workspace.py, which imports Triton


@dataclass(frozen=True)
class Tuned:
    arch: int  # 80, 90, ...
    itemsize: int  # bytes per logit that the kernel reads: 4 for an edited copy
    rows: int  # at most
    vocab: int  # at most
    parts: int  # programs per row; 0: as many as the engine estimates

    def __post_init__(self) -> None:
        if not all(type(value) is int for value in astuple(self)):
            raise TypeError(f"{self}: expected whole numbers")
        expected = {
            "arch = 80, or 120 for compute capability 12.0": self.arch >= 10,
            "itemsize = 2 or 4": self.itemsize in (2, 4),
            "rows >= 1": self.rows >= 1,
            "vocab >= 1": self.vocab >= 1,
            f"0 <= parts <= {MAX_PARTS}": 0 <= self.parts <= MAX_PARTS,
        }
        if wrong := [what for what, right in expected.items() if not right]:
            raise ValueError(f"{self}: expected {', '.join(wrong)}")

    def fits(self, arch: int, itemsize: int, rows: int, vocab: int) -> bool:
        return (self.arch, self.itemsize) == (arch, itemsize) and rows <= self.rows and vocab <= self.vocab


def table(*lines: Tuned) -> tuple[Tuned, ...]:
    """These lines; a ValueError where one would never count, since an earlier one fits all that it fits."""
    for at, line in enumerate(lines):
        for earlier in lines[:at]:
            if earlier.fits(line.arch, line.itemsize, line.rows, line.vocab):
                raise ValueError(f"{line} never counts: it stands after {earlier}, which fits all that it fits")
    return lines


TUNED = table(
    # no GPU has been measured
)


def known_parts(arch: int, itemsize: int, rows: int, vocab: int) -> int:
    """Programs per row for such a call; 0 where the engine has to estimate."""
    return next((line.parts for line in TUNED if line.fits(arch, itemsize, rows, vocab)), 0)
