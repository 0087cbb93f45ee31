"""The phases of `sample` and the slots of a row's workspace, for the kernels and for the host that launches them."""

import triton.language as tl

from .versions import constexpr_function

BITS = tl.constexpr(4)  # of a key, which one round of a selection resolves
DIGITS = tl.constexpr(16)
MAX_PARTS = tl.constexpr(256)  # programs per row

CANDIDATES = tl.constexpr(512)  # that are listed
MOST = tl.constexpr(192)  # the largest top_k that is found by them: 3/4 of the fewest groups
GROUPS = tl.constexpr(1024)  # the most groups of tokens that a row is seen as
BOUND_BITS = tl.constexpr(20)  # of a key: the others would rule out next to nothing
FEW_DRAWS = tl.constexpr(8)  # which one program makes before many have come together

TYPICAL_ROUNDS = tl.constexpr(8)  # distances from a mean use all bits, whatever the dtype of the logits

# The steps of the pipeline: (name, phases per round of a selection, further phases). After its rounds, the selection of
# top-k or top-p counts the tokens equal to the key and then finds the last of them that is kept. What is measured takes
# a phase for the sums and one for what follows from them.
STEPS = tl.constexpr(
    (
        ("scan", 0, 1),
        ("mass_floors", 0, 1),  # of probabilities; those of logits are known before the scan
        ("top_n_sigma", 0, 2),
        ("candidates", 0, 2),  # in place of the two that follow, or of top_k alone, where few tokens can be kept
        ("top_k", 1, 2),
        ("top_p", 1, 2),
        ("typical", 0, 2 + TYPICAL_ROUNDS.value),
        ("late_floors", 0, 2),  # mass_floors where typical comes before them
        ("epsilon", 0, 2),
        ("eta", 0, 2),
        ("top_a", 0, 2),
        ("p_less", 0, 2),
        ("xtc", 0, 3),
        ("weigh", 0, 1),
        ("draw", 0, 1),
        ("end", 0, 0),
    )
)


@constexpr_function
def first_phase(step, rounds):
    """Number of a step's first phase, where a selection takes that many rounds."""
    phase = 0
    for name, per_round, further in STEPS.value:
        if name == step:
            return phase
        phase += per_round * rounds + further
    raise KeyError(step)


@constexpr_function
def after(step):
    """The step that follows."""
    names = [name for name, _, _ in STEPS.value]
    return names[names.index(step) + 1]


@constexpr_function
def phase_bits(step, rounds):
    """A step's phases, as bits."""
    first, end = first_phase(step, rounds), first_phase(after(step), rounds)
    return (1 << end) - (1 << first)


@constexpr_function
def measuring_bits(rounds):
    """The phases that measure what a filter needs to know of the tokens kept so far."""
    steps = ("typical", "late_floors", "epsilon", "eta", "top_a", "p_less", "xtc")
    return sum(1 << first_phase(step, rounds) for step in steps)


@constexpr_function
def measured_bits(rounds):
    """The phases of the filters that measure what is kept so far."""
    return (1 << first_phase("weigh", rounds)) - (1 << first_phase("typical", rounds))


@constexpr_function
def cutting_bits(rounds):
    """The phases after the rounds of top-k and top-p."""
    return sum(3 << (first_phase(after(step), rounds) - 2) for step in ("top_k", "top_p"))


# A row's slots, int64 each.
HIGH_KEY, HIGH_ID, LOW_KEY, LOW_ID, FLOOR = map(tl.constexpr, range(5))  # what the filters keep (kept.py)
PEAK, TOTAL = tl.constexpr(5), tl.constexpr(6)  # the packed maximum; the kept mass
REST, REST_KEY, REST_ID = map(tl.constexpr, range(7, 10))  # what XTC leaves: its mass, and the place before it
FIRST = tl.constexpr(10)  # the packed first token of what is kept, where that may have no mass
LISTED = tl.constexpr(11)  # how many candidates were found, of which at most CANDIDATES are listed
WHOLE = tl.constexpr(12)  # the mass of all tokens, where top-p is judged by that
MEASURES = tl.constexpr(64)  # [16, 8], see below
TOP_K, TOP_P, NEAREST = map(tl.constexpr, range(192, 192 + 3 * 192, 192))  # selections; NEAREST is typical's
PEAKS = tl.constexpr(192 + 3 * 192)  # [MAX_PARTS], each program's packed maximum
MAXIMA = tl.constexpr(192 + 3 * 192 + 256)  # [GROUPS], the highest keys of groups of tokens
LIST = tl.constexpr(MAXIMA.value + GROUPS.value)  # [CANDIDATES], packed, in any order
BY_RANK = tl.constexpr(LIST.value + CANDIDATES.value)  # the list in the rank order
BY_ID = tl.constexpr(BY_RANK.value + CANDIDATES.value)  # the list in the order of ids
CHUNK_SUMS = tl.constexpr(BY_ID.value + CANDIDATES.value)  # [2, chunks], then the chunks' highest keys [chunks]

# What is measured, by its row in MEASURES.
TOP_N_SIGMA, TYPICAL, LATE_FLOORS, EPSILON, ETA, TOP_A, P_LESS, XTC, XTC_TOPS = map(tl.constexpr, range(9))
# Sums of a set (stats.py), the first four in this order; of top-n-sigma and XTC's top choices, others.
MASS, HIGH_SUM, LOW_SUM, LOW_SQUARES, HEAVIEST = map(tl.constexpr, range(5))
COUNT, DISTANCES, SQUARES, LAST = map(tl.constexpr, range(4))

# A selection's slots.
SUMS = tl.constexpr(0)  # [8, DIGITS], by round
LOW, ABOVE = tl.constexpr(128), tl.constexpr(128 + 16)  # [9], before each round and after the last
TARGET, CUT, NTH = tl.constexpr(160), tl.constexpr(161), tl.constexpr(162)


@constexpr_function
def groups_of_threads(threads, fold):
    """The groups of tokens that a program of so many threads tells apart, made fewer by 4 so many times."""
    return max(min(threads, GROUPS.value // 4) >> 2 * fold, 1)


@constexpr_function
def bound_rounds(rounds):
    """How many rounds, of two bits each, find the bound that candidates reach, where a selection takes that many."""
    return min(rounds * BITS.value, BOUND_BITS.value) // 2


@constexpr_function
def words(chunks):
    """Size of a row's workspace."""
    return CHUNK_SUMS.value + 3 * chunks
