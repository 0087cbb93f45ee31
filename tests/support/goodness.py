"""How well counts fit probabilities."""

from __future__ import annotations

import numpy as np
import scipy.stats

LEAST_P = 1e-4


def chi_square(observed: np.ndarray, p: np.ndarray) -> float:
    """p-value of counts against probabilities. Bins that expect fewer than 5 are merged into one, and where even that
    expects fewer than 5, it is tested by itself."""
    n = observed.sum()
    assert observed[p == 0].sum() == 0
    rare = p * n < 5
    counts, wanted = observed[~rare], p[~rare] * n
    tail, wanted_tail = observed[rare].sum(), p[rare].sum() * n
    if wanted_tail >= 5:
        counts, wanted = np.append(counts, tail), np.append(wanted, wanted_tail)
        of_tail = 1.0
    else:
        of_tail = float(scipy.stats.binomtest(int(tail), int(n), p[rare].sum()).pvalue)
    of_rest = scipy.stats.chisquare(counts, wanted * counts.sum() / wanted.sum()).pvalue if len(counts) > 1 else 1.0
    return min(float(of_rest), of_tail)
