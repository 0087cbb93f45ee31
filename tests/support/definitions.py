"""Filters as their papers define them, in float64, and how far each token is from the edge of each.

Others compute in float32, and the contract measures a row in units of 2^-14 log2 or 2^-11. Both move the edge a little,
so the tokens next to it may fall on either side; no other token may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

Row = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

SLACK = 2e-5
"""Of a probability or a mass, relative: what float32 sums of a row may be wrong by."""
MEASURED = 1e-4
"""Nats, and standard deviations: what mean and spread of a row may be wrong by."""


class Judged(NamedTuple):
    keep: Mask  # [V]
    edge: Mask  # [V], so close to the edge of a filter that rounding decides


def log_softmax(z: Row) -> Row:
    with np.errstate(divide="ignore"):
        return z - z.max() - np.log(np.exp(z - z.max()).sum())


def entropy(logp: Row) -> float:
    return float(-(np.exp(logp) * np.where(logp > -np.inf, logp, 0)).sum())


# The margin of each token: at least 0 where it is kept ---------------------------------------------------------------


def top_k(z: Row, k: int) -> Row:
    """Measured from halfway between the k-th and the next, so that neither is near the edge without the other."""
    return np.full_like(z, 1.0) if k >= len(z) else z - np.sort(z)[::-1][k - 1 : k + 1].mean()


def top_p(z: Row, p: float) -> Row:
    """The shortest prefix of the ranking whose probability reaches p (Holtzman et al. 2020)."""
    return until_mass(z, -z, p)


def min_p(z: Row, m: float) -> Row:
    return z - z.max() - np.log(m)


def typical_p(z: Row, t: float) -> Row:
    """Those whose information is closest to the entropy, until their probability reaches t (Meister et al. 2022)."""
    logp = log_softmax(z)
    return until_mass(z, np.abs(-logp - entropy(logp)), t)


def until_mass(z: Row, distance: Row, target: float) -> Row:
    """The nearest tokens until their probability reaches the target.

    A token is near the edge if the mass before it is near the target, or its distance near that of the last one kept.
    """
    order = np.argsort(distance, kind="stable")
    p = np.exp(log_softmax(z))[order]
    before = np.cumsum(p) - p
    inside = before < target
    last = int(inside.sum()) - 1
    gap = np.abs(distance[order] - distance[order[last]])
    gap[last] = np.delete(gap, last).min(initial=np.inf)
    margin = np.empty_like(z)
    nearest = np.minimum(gap, np.abs(target - before) * (MEASURED / SLACK))
    margin[order] = np.where(inside, nearest, -np.maximum(nearest, np.finfo(np.float64).tiny))
    return margin


def epsilon_cutoff(z: Row, e: float) -> Row:
    """p >= e (Hewitt et al. 2022)."""
    return log_softmax(z) - np.log(e)


def eta_cutoff(z: Row, e: float) -> Row:
    """p >= min(e, sqrt(e) exp(-entropy)) (Hewitt et al. 2022)."""
    logp = log_softmax(z)
    return logp - min(np.log(e), np.log(e) / 2 - entropy(logp))


def top_a(z: Row, a: float) -> Row:
    """p >= a max(p)^2 (KoboldAI)."""
    logp = log_softmax(z)
    return logp - (np.log(a) + 2 * logp.max())


def p_less(z: Row, _: bool) -> Row:
    """p >= sum of p^2 (Tan et al. 2025). A uniform row has nothing below it, so what equals it is within."""
    logp = log_softmax(z)
    return logp - np.log(np.exp(2 * logp).sum()) + 1e-12


def top_n_sigma(z: Row, n: float) -> Row:
    """z >= max - n sigma (Tang et al. 2024), in standard deviations of what is above -inf."""
    sigma = z[z > -np.inf].std()
    return (z - z.max()) / sigma + n if sigma > 0 else np.where(z > -np.inf, 1.0, -1.0)


MARGINS: dict[str, Callable[[Row, Any], Row]] = {
    f.__name__: f for f in (top_n_sigma, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, top_a, p_less)
}
MEASURING = ("top_n_sigma", "top_p", "typical_p", "eta_cutoff")


def judge(x: Row, fields: dict[str, Any], sequence: Iterable[str] = tuple(MARGINS)) -> Judged:
    """Filters one after the other, each over what the ones before it kept; `fields` as SamplingParams has them."""
    last = fields.get("order") == "temperature_last"
    z = x.astype(np.float64) / (1.0 if last else np.float32(fields.get("temperature", 1.0)))
    edge = np.zeros(len(z), bool)
    for name in sequence:
        if name in fields:
            value = np.float64(np.float32(fields[name])) if isinstance(fields[name], float) else fields[name]
            with np.errstate(invalid="ignore"):
                margin = np.where(z > -np.inf, MARGINS[name](z, value), -np.inf)
            edge |= np.abs(margin) < (MEASURED if name in MEASURING else SLACK)
            best = np.argmax(z) if name != "typical_p" else np.argmax(margin)
            z = np.where((margin >= 0) | (np.arange(len(z)) == best), z, -np.inf)
    return Judged(z > -np.inf, edge)


def mixture(x: Row, fields: dict[str, Any]) -> tuple[Row, Mask]:
    """XTC's distribution after the other filters (p-e-w 2024), float64 [V], and what its coin excludes."""
    kept = judge(x, fields).keep
    logp = log_softmax(np.where(kept, x.astype(np.float64) / np.float32(fields.get("temperature", 1.0)), -np.inf))
    p = np.exp(logp)
    top = np.flatnonzero(p >= fields["xtc_threshold"])
    out = np.zeros(len(p), bool)
    if len(top) >= 2:
        out[top] = True
        out[top[np.argmin(p[top])]] = False
    rest = np.where(out, 0, p)
    rho = fields["xtc_probability"]
    return (1 - rho) * p + rho * rest / rest.sum(), out
