"""Stage 3's history edits: DRY and the ban of repeated n-grams (stem of csrc/core/history.h).

A row's history is read backwards: id 0 is the last one. Where the ids from position j on are for a while those from 0
on, the end of the history stood there before, and the id at j - 1 is what came next. `edit` finds all that, and the
scan of sample.py changes each token when it first reads it.
"""

import triton
import triton.language as tl

from .record import param
from .rounded import div, mul
from .versions import constexpr_function

LENGTH, UNBROKEN, IDS = map(tl.constexpr, range(3))  # slots of a history, int32: the numbers of ids and of
# those after the last breaker, then the ids
BREAKER = tl.constexpr(1 << 30)  # bit of an id that is one of DRY's breakers
BANNED = tl.constexpr(2**31 - 1)  # as a token's longest repetition
FLT_MAX = tl.constexpr(3.4028234663852886e38)
PARTS = tl.constexpr(2)  # programs that look at a row's history, each in memory of its own
AT_ONCE = tl.constexpr(1024)  # ids at a time
STEPS = tl.constexpr(8)  # comparisons of each id at a time


@constexpr_function
def words(ids):
    """Size of the memory for a row's history, int32."""
    return PARTS.value * (IDS.value + ids)


@triton.jit
def uses_history(record):
    return (param(record, "dry_multiplier") > 0.0) | (param(record, "no_repeat_ngram_size") > 0)


@triton.jit
def is_breaker(token, breakers, count):
    found = tl.zeros([AT_ONCE], tl.int32)
    for i in range(count):
        found |= (token == tl.load(breakers + i)).to(tl.int32)
    return found != 0


@triton.jit
def clear_history(history):
    tl.store(history + LENGTH, 0)
    tl.store(history + UNBROKEN, BANNED)
    tl.debug_barrier()


@triton.jit
def collect(token_ids, length, breakers, num_breakers, history, record, vocab):
    """Append a list to the history, its last id first; ids outside the vocabulary are padding."""
    n, unbroken = tl.load(history + LENGTH), tl.load(history + UNBROKEN)
    num_breakers = tl.where(param(record, "dry_multiplier") > 0.0, num_breakers, 0)
    for start in range(0, length, AT_ONCE):
        at = length - 1 - start - tl.arange(0, AT_ONCE)
        token = tl.load(token_ids + at, mask=at >= 0, other=-1)
        inside = (token >= 0) & (token < vocab)
        place = n + tl.cumsum(inside.to(tl.int32), 0) - 1
        breaks = inside & is_breaker(token, breakers, num_breakers)
        tl.store(history + IDS + place, token.to(tl.int32) | tl.where(breaks, BREAKER, 0), mask=inside)
        unbroken = tl.minimum(unbroken, tl.min(tl.where(breaks, place, BANNED)))
        n += tl.sum(inside.to(tl.int32))
    tl.debug_barrier()
    tl.store(history + LENGTH, n)
    tl.store(history + UNBROKEN, unbroken)
    tl.debug_barrier()


@triton.jit
def enough(record):
    """A length from which on repetitions weigh the same: csrc/core/history.h says why."""
    above_one = param(record, "dry_base") - 1.0
    steps = 128.0 * (div(tl.zeros_like(above_one) + 2.0, tl.where(above_one > 0.0, above_one, 1.0)) + 1.0)
    length = tl.where(above_one > 0.0, steps, 0.0).to(tl.int64) + param(record, "dry_allowed_length")
    return tl.minimum(length, BANNED).to(tl.int32)


@triton.jit
def count_equal(ids, j, most):
    """How many ids from each j on are those from 0 on; `most` at most."""
    equal = tl.zeros([AT_ONCE], tl.int32)
    going = most > 0
    while tl.max(going.to(tl.int32)) > 0:
        for _ in tl.static_range(STEPS):
            going &= tl.load(ids + j + equal, mask=going, other=0) == tl.load(ids + equal, mask=going, other=0)
            equal += going.to(tl.int32)
            going &= equal < most
    return equal


@triton.jit
def find_repetitions(history, record, longest, part):
    """The longest repetition of each token, where this part finds one."""
    ids, n = history + IDS, tl.load(history + LENGTH)
    limit, n_gram = param(record, "dry_range"), param(record, "no_repeat_ngram_size")
    window = tl.where((limit > 0) & (limit < n), limit, n)
    window = tl.where(param(record, "dry_multiplier") > 0.0, window, 0)
    matters = tl.minimum(tl.minimum(tl.load(history + UNBROKEN), window), enough(record))
    shortest = param(record, "dry_allowed_length")
    for start in range(part * AT_ONCE, n, PARTS * AT_ONCE):
        j = start + 1 + tl.arange(0, AT_ONCE)
        following = tl.load(ids + j - 1, mask=j <= n, other=0)
        most = tl.minimum(window - j, matters)
        most = tl.where((most >= shortest) & (following < BREAKER), most, 0)
        may_ban = (n_gram > 0) & (n_gram - 1 <= n - j)
        equal = count_equal(ids, j, tl.where(may_ban, tl.maximum(most, n_gram - 1), most))
        length = tl.minimum(equal, most)
        found = tl.where(may_ban & (equal >= n_gram - 1), BANNED, tl.where(length >= shortest, length, 0))
        tl.atomic_max(longest + (following & (BREAKER - 1)), found, mask=found > 0, sem="relaxed")


@triton.jit
def after_repetition(x, longest, record):
    """Logits of tokens, given the longest repetition of each, 0 for none."""
    # Blocks, since Triton's interpreter cannot broadcast a comparison of scalars.
    base, multiplier = tl.zeros_like(x) + param(record, "dry_base"), tl.zeros_like(x) + param(record, "dry_multiplier")
    exponent = tl.where(longest == BANNED, 0, longest - param(record, "dry_allowed_length"))
    power = tl.zeros_like(x) + 1.0
    for i in range(tl.max(exponent)):
        following = power * base
        power = tl.where((exponent > i) & (following <= FLT_MAX), following, power)
    x = tl.where(longest > 0, x - mul(multiplier, power), x)
    return tl.where(longest == BANNED, float("-inf"), x)
