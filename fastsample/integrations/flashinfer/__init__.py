"""FlashInfer's sampling functions on fastsample: the same names, parameters, defaults, dtypes and shapes.

`import fastsample.integrations.flashinfer as sampling` replaces `flashinfer.sampling` (0.7), also for CPU tensors.
FlashInfer itself is not needed. What the functions have in common:

Arguments
    logits, probs: float32, float16 or bfloat16 [B, V] (float64 is rounded to float32), 1 <= V <= 2^20. Probabilities
        need not sum to 1: they are relative to their sum.
    indices: int32 or int64 [N]; output i is drawn from row indices[i]. It sets N and the outputs' dtype; without it
        N = B and outputs are int32. Rows shared by many outputs (more than 4 per row of the table) are filtered once.
    top_k >= 1, 0 <= top_p <= 1, 0 <= min_p <= 1: a number, or a tensor [B] with one value per row of logits or probs
        (with indices too, as in FlashInfer's kernels). top_p = 0 keeps the most probable token.
    seed, offset: two ints, or two int64 or uint64 tensors of shape [1] or [N] on the device of the logits (as a CUDA
        graph needs). A missing offset is 0. Without a seed, `generator` provides one (a GPU generator: its seed and
        position, which advances by 4); without a generator, torch's default CPU generator does, on every device.
    check_nan: raise ValueError if there is a NaN. On a GPU this waits for the device.
    return_valid: also return bool [N]; a row that cannot be sampled gives token 0 and False instead of an error.
    deterministic, is_deterministic, enable_pdl: accepted. Every result is deterministic.
    top_k_max: None or an int >= 1, a bound of the numbers in a tensor top_k. Accepted: no result depends on it.

Rows that cannot be sampled
    Logits with a NaN, +inf or nothing above -inf; probabilities that are NaN, infinite or negative, or with nothing
    above 0. Without return_valid they raise a ValueError that names the row. On a GPU no call waits to find that out
    unless check_nan is set: such a row, or one whose top_k, top_p or min_p (in a tensor) is out of range, gives -1.

Where the answer differs from FlashInfer's, on purpose
    Ties: exactly k tokens stay, lower ids first, and top-p keeps only as many of equal tokens as it needs to reach p.
        FlashInfer keeps every tie at the boundary.
    Seeds: one seed per output (a tensor [N]) is used as it is, so an output does not depend on its slot. An int, or a
        tensor of one element for N > 1 outputs, gives output i the seed splitmix64(splitmix64(seed) + i), like
        `fastsample.sample`. FlashInfer always mixes the row into the stream. Every offset gives other random numbers;
        advance it by 1.
    A seed without an offset is used; FlashInfer ignores it then.
    Every row has its own top_k. FlashInfer cuts those above top_k_max, if that is at most 256 and V at least 65,536.
    The cost does not depend on the distribution: there is no rejection, and no limit on rounds.

What is exact
    The sampling contract of fastsample is what these functions compute, from logits and from probabilities: kept sets,
    tokens and renormalised rows are the same on every engine and device.
    Of probabilities no logarithm is taken. Their ranking is that of the values themselves. The mass of a token is its
    probability as an integer, trunc(p * 2^s), with s such that the row's largest has 40 bits: exact for 24 bits down to
    2^-15 of the largest, and 0, so that the token is never drawn, below 2^-40 of it. Rows of subnormal numbers are as
    good as others. Top-p keeps the shortest prefix whose mass reaches p times the sum of all masses, with p as a
    float32 (cut to a multiple of 2^-30) and the probabilities as they are: of [0.5, 0.3, 0.15, 0.05], which as float32
    sum to 1.00000002, p = 0.8 keeps three.

torch.compile: each call is a graph break and runs eagerly. With fullgraph=True, which allows no graph break, it is an
    error that names the function: sample from logits with `fastsample.sample` there.
"""

from __future__ import annotations

from typing import cast

import torch

from fastsample import reference as spec
from fastsample.integrations.flashinfer.arguments import check_bound, limits, pack, raise_where, table, temperatures
from fastsample.integrations.flashinfer.chain import chain_speculative_sampling
from fastsample.integrations.flashinfer.eager import eager
from fastsample.integrations.flashinfer.pipeline import fill_bad, full, renormalise, sample

Tensor = torch.Tensor

__all__ = [
    "chain_speculative_sampling",
    "min_p_sampling_from_probs",
    "sampling_from_logits",
    "sampling_from_probs",
    "softmax",
    "top_k_mask_logits",
    "top_k_renorm_prob",
    "top_k_renorm_probs",
    "top_k_sampling_from_probs",
    "top_k_top_p_sampling_from_logits",
    "top_k_top_p_sampling_from_probs",
    "top_p_renorm_prob",
    "top_p_renorm_probs",
    "top_p_sampling_from_probs",
]


# Sampling from logits ------------------------------------------------------------------------------------------------


@eager
def sampling_from_logits(
    logits: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> Tensor:
    """Draw from softmax(logits). Returns int32 [N] (or the dtype of indices); arguments and errors as in the module."""
    return cast(Tensor, sample("logits", logits, {}, "top_k_first", indices, generator, check_nan, seed, offset))


@eager
def top_k_top_p_sampling_from_logits(
    logits: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    top_k_max: int | None = None,
) -> Tensor:
    """Draw from softmax(logits) after top-k and top-p, in one fused pass.

    filter_apply_order: "top_k_first" measures top-p over what top-k kept, "joint" over the whole row.
    Returns int32 [N] (or the dtype of indices); other arguments and errors as in the module.
    """
    check_bound(top_k_max)
    given = {"top_k": top_k, "top_p": top_p}
    drawn = sample("logits", logits, given, filter_apply_order, indices, generator, check_nan, seed, offset)
    return cast(Tensor, drawn)


@eager
def top_k_mask_logits(logits: Tensor, top_k: Tensor | int) -> Tensor:
    """The k highest logits of each row as they are, -inf elsewhere; equal ones by lower id.

    Returns the dtype and shape of logits. A row without a logit above -inf stays as it is; one with a NaN or +inf
    raises (on a GPU it becomes -inf).
    """
    x = table("logits", logits)
    given = limits({"top_k": top_k}, len(x))
    kept, status = full("filtered", "logits", x, pack(given, "top_k_first", x))
    if x.device.type == "cpu":
        raise_where((status == spec.NAN) | (status == spec.POSITIVE_INFINITY), "logits", x)
    kept = fill_bad(kept, given, spec.NEG_INF)
    if logits.dtype == torch.float64:  # more precise than what the engines take
        return torch.where(kept > spec.NEG_INF, logits.detach(), spec.NEG_INF)
    return kept.to(logits.dtype)


@eager
def softmax(logits: Tensor, temperature: Tensor | float | None = None, enable_pdl: bool | None = None) -> Tensor:
    """softmax(logits / temperature), float32 [B, V], as integer masses over their sum: 0 below 2^-40 of the largest.

    temperature: None (1), a number or a floating-point tensor [B]; 0 <= value <= 2^20. Below 1e-5 a row becomes one-hot
    at the lowest id among its maxima, as in greedy sampling (FlashInfer: uniform at 0). Rows that cannot be sampled
    raise (on a GPU: NaN).
    """
    x = table("logits", logits)
    given = (temperatures(1.0 if temperature is None else temperature, x),)
    result, status = full("probabilities", "logits", x, pack(given, "top_k_first", x))
    if x.device.type == "cpu":
        raise_where(status != 0, "logits", x)
        return result
    return fill_bad(result.masked_fill_((status != 0)[:, None], torch.nan), given, torch.nan)


# Sampling from probabilities -----------------------------------------------------------------------------------------


@eager
def sampling_from_probs(
    probs: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw from probs. Returns int32 [N] (or the dtype of indices), with return_valid also bool [N]; see the module."""
    return sample("probs", probs, {}, "top_k_first", indices, generator, check_nan, seed, offset, return_valid)


@eager
def top_p_sampling_from_probs(
    probs: Tensor,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw from the shortest ranked prefix of probs that reaches top_p (nucleus sampling, Holtzman et al. 2020).

    Returns int32 [N] (or the dtype of indices), with return_valid also bool [N]; arguments and errors as in the module.
    """
    given = {"top_p": top_p}
    return sample("probs", probs, given, "top_k_first", indices, generator, check_nan, seed, offset, return_valid)


@eager
def top_k_sampling_from_probs(
    probs: Tensor,
    top_k: Tensor | int,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw from the top_k most probable tokens (Fan et al. 2018): exactly k, equal ones by lower id.

    Returns int32 [N] (or the dtype of indices), with return_valid also bool [N]; arguments and errors as in the module.
    """
    given = {"top_k": top_k}
    return sample("probs", probs, given, "top_k_first", indices, generator, check_nan, seed, offset, return_valid)


@eager
def min_p_sampling_from_probs(
    probs: Tensor,
    min_p: Tensor | float,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw from the tokens with at least min_p times the largest probability (Nguyen et al. 2024).

    Returns int32 [N] (or the dtype of indices), with return_valid also bool [N]; arguments and errors as in the module.
    """
    given = {"min_p": min_p}
    return sample("probs", probs, given, "top_k_first", indices, generator, check_nan, seed, offset, return_valid)


@eager
def top_k_top_p_sampling_from_probs(
    probs: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
    top_k_max: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw from probs after top-k and top-p.

    filter_apply_order: "top_k_first" measures top-p over what top-k kept, "joint" over the whole row.
    Returns int32 [N] (or the dtype of indices), with return_valid also bool [N]; other arguments as in the module.
    """
    check_bound(top_k_max)
    given = {"top_k": top_k, "top_p": top_p}
    return sample("probs", probs, given, filter_apply_order, indices, generator, check_nan, seed, offset, return_valid)


@eager
def top_p_renorm_probs(probs: Tensor, top_p: Tensor | float, is_deterministic: bool = False) -> Tensor:
    """What top_p_sampling_from_probs draws from, float32 [B, V]: kept probabilities over their sum, 0 elsewhere.

    Invalid rows raise (on a GPU they are all 0).
    """
    return renormalise(probs, {"top_p": top_p})


@eager
def top_k_renorm_probs(probs: Tensor, top_k: Tensor | int, is_deterministic: bool = False) -> Tensor:
    """What top_k_sampling_from_probs draws from, [B, V] in the dtype of probs: kept ones over their sum, 0 elsewhere.

    Invalid rows raise (on a GPU they are all 0).
    """
    return renormalise(probs, {"top_k": top_k}).to(probs.dtype)


top_p_renorm_prob = top_p_renorm_probs
top_k_renorm_prob = top_k_renorm_probs
