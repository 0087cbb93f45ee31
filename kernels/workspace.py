"""The phases of `sample` and the slots of a row's workspace, for the kernels and for the host that launches them."""

import triton
import triton.language as tl

BITS = tl.constexpr(4)  # of a key, which one round of a selection resolves
DIGITS = tl.constexpr(16)
MAX_PARTS = tl.constexpr(256)  # programs per row

# The steps of the pipeline: (name, phases per round of a selection, further phases). After its rounds, a selection
# counts the tokens equal to the key and then finds the last of them that is kept.
STEPS = tl.constexpr((("scan", 0, 1), ("top_k", 1, 2), ("top_p", 1, 2), ("weigh", 0, 1), ("draw", 0, 1), ("end", 0, 0)))


@triton.constexpr_function
def first_phase(step, rounds):
    """Number of a step's first phase, where a selection takes that many rounds."""
    phase = 0
    for name, per_round, further in STEPS.value:
        if name == step:
            return phase
        phase += per_round * rounds + further
    raise KeyError(step)


# A row's slots, int64 each.
HIGH_KEY, HIGH_ID, LOW_KEY, LOW_ID, FLOOR = map(tl.constexpr, range(5))  # what the filters keep (kept.py)
PEAK, TOTAL = tl.constexpr(5), tl.constexpr(6)  # the packed maximum; the kept mass
TOP_K, TOP_P = tl.constexpr(64), tl.constexpr(64 + 192)  # their selections, 192 slots each
PEAKS = tl.constexpr(64 + 2 * 192)  # [MAX_PARTS], each program's packed maximum
CHUNK_SUMS = tl.constexpr(64 + 2 * 192 + 256)  # [chunks], then the chunks' highest keys [chunks]

# A selection's slots.
SUMS = tl.constexpr(0)  # [8, DIGITS], by round
LOW, ABOVE = tl.constexpr(128), tl.constexpr(128 + 16)  # [9], before each round and after the last
TARGET, CUT, NTH = tl.constexpr(160), tl.constexpr(161), tl.constexpr(162)


@triton.constexpr_function
def words(chunks):
    """Size of a row's workspace."""
    return CHUNK_SUMS.value + 2 * chunks
