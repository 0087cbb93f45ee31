"""The public calls: sample, filter_logits and probabilities."""

from __future__ import annotations

from typing import Any

import torch

from fastsample import call
from fastsample.arrays import ArrayLike
from fastsample.inputs import Allowed, BiasLike, BreakerIds, Seed, TokenIds, gather
from fastsample.outputs import InputKind, KeptForm, LogprobsMode, OnInvalid, Options, SampleOutput
from fastsample.params import SamplingParams
from fastsample.traced import is_traced


def sample(
    logits: ArrayLike,
    params: SamplingParams | None = None,
    *,
    seed: Seed | None = None,
    offset: Seed = 0,
    num_samples: int = 1,
    bitmask: ArrayLike | None = None,
    allowed_ids: Allowed | None = None,
    bias: BiasLike | None = None,
    prompt_ids: TokenIds | None = None,
    output_ids: TokenIds | None = None,
    dry_breakers: BreakerIds | None = None,
    logprobs: LogprobsMode | None = None,
    top_logprobs: int = 0,
    on_invalid: OnInvalid = "raise",
    backend: str = "auto",
    input: InputKind = "logits",
    kept: KeptForm | None = None,
    kept_capacity: int = 0,
    kept_mass: bool = False,
    entropy: bool = False,
    out: SampleOutput | None = None,
    **fields: Any,
) -> SampleOutput:
    """Draw one or more tokens per row of logits.

    A token depends on its row alone: the logits, the parameters, seed, offset and draw index. The batch, the slot,
    the number of threads, the instruction set, the device and the engine change nothing.

    Args:
        logits: float32, float16 or bfloat16 [B, V], or [V] for a single row (outputs then lose their first dimension).
            Any row stride, last dimension contiguous, 1 <= V <= 2^20. Never written to. Like all tensors here it may be
            an array of NumPy, MLX, JAX, ONNX Runtime or whatever else has `__dlpack__` or the array interface: its
            memory is read where it lies. Logits may have more leading
            dimensions, for example [B, T, V]; outputs then have them too. Rows are numbered as in
            `logits.flatten(0, -2)` (a view, or a copy where strides allow none), both for an int seed and in errors.
            Arguments with one entry per row then take one per row of that table, or a tensor or array [B, T, ...], in
            which a dimension of 1 is broadcast: `offset=start[:, None] + torch.arange(T)`.
        params: how to sample; `fields` are SamplingParams fields and override it.
        seed: an int s, which gives row i the seed splitmix64(splitmix64(s) + i); or one 64-bit seed per row, used as it
            is. None takes a fresh seed from torch's default CPU generator (repeatable by `torch.manual_seed`).
        offset: position in the sequence, 0 <= offset < 2^64; an int or one per row. Advance it by 1 per step. In a
            tensor, int64 holds the bits of the 64-bit word, as in `Sampler.offsets`; elsewhere negative numbers are
            refused.
        num_samples: independent draws per row, n >= 1.
        bitmask: int32 [B, words] or [words]; token j is allowed when bit j % 32 of word j // 32 is 1. Tokens past the
            last word are not allowed (xgrammar's and llguidance's format).
        allowed_ids: tokens that may be drawn (a token must pass the bitmask too): bool [V] or [B, V], True where
            allowed; or ids: [n] or a list for all rows, [B, n] padded with -1, or a list with the ids of each row, None
            for a row that allows everything. 0 <= id < V. A row without ids is invalid. The host packs the ids, which
            waits for a GPU that holds them; `fastsample.pack_bitmask` packs them once for many steps.
        bias: {id: value} for all rows, a list with a dict or None per row, or tensors (row_ptr [B + 1], ids [N],
            values [N]); added to the logits. Finite or -inf. Tensors on a GPU are checked there, which waits for it; a
            step with the result of `fastsample.inputs.pack_bias(bias, logits)`, which is checked once, does not wait.
        prompt_ids, output_ids: the ids that penalties count: integers [B, L] padded with -1 (a tensor or an array), or
            a list with an entry per row: a list, tensor or array [L], or None. A penalty without ids has no effect, and
            a UserWarning says so; pass empty lists while there are no ids.
        dry_breakers: the ids that end a repetition, for DRY: [n] or a list for all rows, or [B, n] padded with -1 or a
            list per row. Ids outside [0, V) are ignored.
        logprobs: "raw" reports the log-softmax of the logits as given, "processed" that of the distribution drawn from.
        top_logprobs: also report the N most probable tokens, 0 <= N <= V. Needs `logprobs`.
        on_invalid: a row with a NaN, with +inf or with nothing above -inf raises ValueError ("raise"; on a GPU this
            waits for the device) or gets token -1 and a status ("flag").
        backend: "auto", "reference", "cpu", "triton" or "cuda". A named engine serves or raises; it is never replaced.
        input: "logits", or "probs": the rows are probabilities in (0, inf), relative to their sum, which are drawn from
            as they are. Then temperature (but 0), penalties, bias and the filters that are measured on logits
            (`top_n_sigma`, `typical_p`, `eta_cutoff`) are refused. A NaN gives status 1, a negative or infinite
            probability 2, a row of zeros 3.
        kept: also report which tokens of each row are kept, that is, what filters, masks and -inf leave, for training:
            "count" their number, "ids" the ids, "bitmask" a bit for each token; see `SampleOutput`. Sets have any size.
        kept_capacity: with kept="ids", list at most this many ids per row and report bitmasks too, which tell the rest:
            a call then waits for no GPU. 0 lists all, in tensors of the size that the sets have.
        kept_mass: also report the logarithm of the probability that the kept tokens have together before any filter.
        entropy: also report the entropy of each row's distribution.
        out: a SampleOutput of an earlier call of the same shape, to be filled and returned.
        **fields: SamplingParams fields, e.g. temperature=0.8, top_k=50.

    Returns:
        SampleOutput with fresh tensors on the logits' device, or `out`.

    Raises:
        TypeError, ValueError: bad argument; the message names it, the row and the value. Nothing is written.
        RuntimeError: the named backend cannot serve these logits.
    """
    inputs = gather(bitmask, allowed_ids, bias, prompt_ids, output_ids, dry_breakers)
    reported = (kept, kept_capacity, kept_mass, entropy)
    options = Options(num_samples, logprobs, top_logprobs, on_invalid, backend, input, *reported)
    if is_traced():
        from fastsample import ops, untraced

        traced = untraced.served(ops.sample, inputs, out, options.without_size)
        return traced(logits, params, fields, seed, offset, inputs, options, out)
    result: SampleOutput = call.make("tokens", logits, params, fields, seed, offset, inputs, options, out)
    return result


def filter_logits(
    logits: ArrayLike,
    params: SamplingParams | None = None,
    *,
    bitmask: ArrayLike | None = None,
    allowed_ids: Allowed | None = None,
    bias: BiasLike | None = None,
    prompt_ids: TokenIds | None = None,
    output_ids: TokenIds | None = None,
    dry_breakers: BreakerIds | None = None,
    on_invalid: OnInvalid = "raise",
    backend: str = "auto",
    out: torch.Tensor | None = None,
    **fields: Any,
) -> torch.Tensor:
    """The processed logits divided by the temperature where a token is kept, -inf elsewhere.

    Arguments as for `sample`. A greedy row keeps only its maximum, undivided. Invalid rows (with on_invalid="flag")
    are all -inf. What XTC excludes is -inf only where `xtc_probability` is 1.

    Returns:
        float32 [B, V] ([V] for 1-D logits), or `out`.
    """
    inputs = gather(bitmask, allowed_ids, bias, prompt_ids, output_ids, dry_breakers)
    options = Options(on_invalid=on_invalid, backend=backend)
    if is_traced():
        from fastsample import ops, untraced

        return untraced.served(ops.full, inputs, out)("filtered", logits, params, fields, inputs, options, out)
    result: torch.Tensor = call.make("filtered", logits, params, fields, 0, 0, inputs, options, out)
    return result


def probabilities(
    logits: ArrayLike,
    params: SamplingParams | None = None,
    *,
    bitmask: ArrayLike | None = None,
    allowed_ids: Allowed | None = None,
    bias: BiasLike | None = None,
    prompt_ids: TokenIds | None = None,
    output_ids: TokenIds | None = None,
    dry_breakers: BreakerIds | None = None,
    on_invalid: OnInvalid = "raise",
    backend: str = "auto",
    input: InputKind = "logits",
    out: torch.Tensor | None = None,
    **fields: Any,
) -> torch.Tensor:
    """The distribution that `sample` draws from: kept tokens renormalised, 0 elsewhere.

    Arguments as for `sample`. Where XTC is on, the distribution is the mixture of what its coin may decide. Invalid
    rows (with on_invalid="flag") are all 0.

    Returns:
        float32 [B, V] ([V] for 1-D logits), or `out`.
    """
    inputs = gather(bitmask, allowed_ids, bias, prompt_ids, output_ids, dry_breakers)
    options = Options(on_invalid=on_invalid, backend=backend, input=input)
    if is_traced():
        from fastsample import ops, untraced

        return untraced.served(ops.full, inputs, out)("probabilities", logits, params, fields, inputs, options, out)
    result: torch.Tensor = call.make("probabilities", logits, params, fields, 0, 0, inputs, options, out)
    return result
