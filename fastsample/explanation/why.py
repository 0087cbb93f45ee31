"""Why a filter left out what it did, in words."""

from __future__ import annotations


def why(name: str, value: float, removed: int, limits: dict[str, float | int], total: int) -> str:
    """A sentence about a cut.

    Args:
        removed: number of tokens that it took.
        limits: the numbers that decided, as in Cut.
        total: mass of what the filter judged.
    """
    share = {key: limits[key] / max(1, total) for key in ("target", "reached", "floor") if key in limits}
    reason = _REASONS.get(name, _FLOOR).format(value=value, **limits | share)
    return reason if removed else f"{reason}; nothing to cut"


_REASONS = {
    "temperature": "greedy: the highest logit, {logit:.4g}, is taken",
    "top_k": "logits below {logit:.4g}, the lowest of the {value} highest, are cut",
    "top_n_sigma": "the standard deviation is {sigma:.4g}: logits below {logit:.4g} are cut",
    "top_p": "the first that together reach the probability {target:.4g} are kept: they have {reached:.4g}",
    "typical_p": (
        "the nearest to the mean logit, {mean_logit:.4g}, that together reach {target:.4g} are kept: "
        "they have {reached:.4g}"
    ),
    "xtc_probability": "a draw may leave out those of probability {floor:.4g} or more, but for the least of them",
}
_FLOOR = "tokens below the probability {floor:.4g} are cut"
