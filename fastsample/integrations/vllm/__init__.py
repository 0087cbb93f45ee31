"""vLLM (0.32 and 0.33): top-k, top-p, the draw and drafts by fastsample, in both runners; and filters that vLLM lacks.

Installing fastsample beside vLLM is all there is to do: the entry point `vllm.general_plugins` calls `register` in
every process that vLLM starts. `FASTSAMPLE_VLLM=0` in the environment (or a `VLLM_PLUGINS` without `fastsample`) leaves
vLLM as it is.

What is taken over, and what stays vLLM's:

| stage | runner V1 (`TopKTopPSampler`) | runner V2 (`Sampler._sample_random`) |
|---|---|---|
| bitmask, allowed ids, bad words, bias, penalties, processors | vLLM | vLLM |
| DRY, n-grams that must not be repeated | fastsample, after the penalties | fastsample, after all processors |
| greedy | vLLM | fastsample (lowest id among the maxima; vLLM's kernels too) |
| temperature, min-p | vLLM, before we are called; not done twice | vLLM, before we are called; not done twice |
| top-k, top-p | fastsample, ties at the k-th value are kept | fastsample, ties at the k-th value are kept |
| the other filters; temperature and min-p of a request that has one | fastsample | fastsample |
| draw | fastsample | fastsample |
| seed of a seeded request | its seed; offset: its draws so far | its seed; offset: position of the last token |
| seed of any other request | fresh from torch's default CPU generator | the one that vLLM gives it |
| log-probabilities, ranks, all four modes | vLLM, of the kept set | vLLM, of the kept set |
| drafts that are a function of the text | fastsample (`RejectionSampler.forward`) | fastsample (`._verify`) |
| drafts drawn at random; block, synthetic and FLy verification | vLLM; the bonus token is drawn by fastsample | vLLM |
| beam search, watermarks, pooling | vLLM | vLLM |

A seeded request gives the same tokens alone and in any batch, as far as the model's own logits do not depend on the
batch. Its tokens are not those that vLLM's own sampler would draw for that seed.

Drafts are verified by drawing (drafts.py), so a seeded text is the one without them. Beside drafts vLLM refuses min-p
and logit_bias; such requests are let in where the drafts are ours.

What vLLM has no parameter for comes as `extra_args` of a request (see extras.py). It is validated when the request
arrives. A worker keeps one Row for such a request and gives vLLM a copy of its parameters: with temperature 1 and
without min-p, so that the logits arrive as the contract wants them, undivided and whole.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from fastsample.integrations.vllm import arrival, drafts, v1, v1_drafts, v2
from fastsample.integrations.vllm.common import STEP

__all__ = ["register"]

ARRIVAL = "vllm.v1.engine.input_processor.InputProcessor"
TOP_K_TOP_P = "vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler"
SAMPLER_V1 = "vllm.v1.sample.sampler.Sampler"
BATCH_V1 = "vllm.v1.worker.gpu_input_batch.InputBatch"
MIN_TOKENS_V1 = "vllm.v1.sample.logits_processor.builtin.MinTokensLogitsProcessor"
VERIFIER_V1 = "vllm.v1.sample.rejection_sampler.RejectionSampler"
SAMPLER_V2 = "vllm.v1.worker.gpu.sample.sampler.Sampler"
VERIFIER_V2 = "vllm.v1.worker.gpu.spec_decode.rejection_sampler.RejectionSampler"
COUNTS_V1 = ("logits", "num_draft_tokens")
ROWS_V1 = ("metadata", "draft_probs", "logits", "sampling_metadata")
ROWS_V2 = (
    *("logits", "draft_logits", "draft_sampled", "pos", "cu_num_logits", "idx_mapping", "idx_mapping_np"),
    *("expanded_idx_mapping", "expanded_local_pos", "seq_lens_upper_bound_np", "verify_draft_sampled"),
)
PARAMS = "vllm.sampling_params.SamplingParams"


def register() -> None:
    """Swap the samplers of both model runners; a second call changes nothing. Does nothing with FASTSAMPLE_VLLM=0."""
    if os.environ.get("FASTSAMPLE_VLLM") == "0":
        return
    arrives = _swap(
        ARRIVAL, "process_inputs", arrival.process_inputs, "process_inputs", ("request_id", "prompt", "params")
    )
    of_v1 = [
        _swap(TOP_K_TOP_P, "__init__", v1.init, "forward_native", ("logits", "generators", "k", "p")),
        _swap(SAMPLER_V1, "sample", v1.sample, "sample", ("logits", "sampling_metadata")),
        _swap(SAMPLER_V1, "apply_penalties", v1.apply_penalties, "apply_penalties", ("logits", "sampling_metadata")),
        _swap(BATCH_V1, "__init__", v1_drafts.init_batch, "add_request", ("request",)),
        _swap(BATCH_V1, "add_request", v1.add_request, "add_request", ("request",)),
    ]
    known = ("processed_logits", "expanded_idx_mapping", "idx_mapping_np", "pos", "top_k", "top_p")
    of_v2 = [
        _swap(SAMPLER_V2, "_sample_random", v2.sample_random, "_sample_random", known),
        _swap(SAMPLER_V2, "__init__", v2.init, "add_request", ("req_idx", "sampling_params")),
        _swap(SAMPLER_V2, "add_request", v2.add_request, "add_request", ("req_idx", "sampling_params")),
    ]
    # What verifies drafts goes through all of the sampler's parts, so it is left alone where one of them is.
    init = "__init__", drafts.init, "__init__", ("sampler", "spec_config")
    verify_v1 = (
        all(of_v1)
        and _swap(MIN_TOKENS_V1, "__init__", v1_drafts.init_min_tokens, "apply_with_spec_decode", COUNTS_V1)
        and _swap(VERIFIER_V1, *init)
        and _swap(VERIFIER_V1, "forward", v1_drafts.forward, "forward", ROWS_V1)
    )
    verify_v2 = (
        all(of_v2) and _swap(VERIFIER_V2, *init) and _swap(VERIFIER_V2, "_verify", v2.verify, "_verify", ROWS_V2)
    )
    check = "_validate_spec_decode"
    _swap(PARAMS, check, arrival.validate_spec_decode, check, ("speculative_config",))
    arrival.SERVED.update(v1=arrives and all(of_v1), v2=arrives and all(of_v2))
    arrival.VERIFIES.update(v1=verify_v1, v2=verify_v2)


def _swap(where: str, name: str, ours: Callable[..., Any], called: str, known: tuple[str, ...]) -> bool:
    """Replace a method of a class by ours(theirs, self, ...), once; of a static one by ours(theirs, ...).

    Where there is no such class, or its method `called` has other arguments than we know, it stays as it is, with a
    warning, and the answer is False: a plugin that raises would stop vLLM.
    """
    module, _, class_name = where.rpartition(".")
    try:
        owner = getattr(import_module(module), class_name)
        theirs, found = getattr(owner, name), tuple(inspect.signature(getattr(owner, called)).parameters)
        is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    except (ImportError, AttributeError) as error:
        STEP.say(logging.WARNING, f"{where} cannot be swapped in this vLLM: {error}")
        return False
    if hasattr(theirs, "_fastsample"):
        return True
    found = found if is_static else found[1:]
    if found[: len(known)] != known:
        STEP.say(logging.WARNING, f"{where} cannot be swapped in this vLLM: {called} takes {found}, not {known}")
        return False

    @functools.wraps(theirs)
    def swapped(*args: Any, **kwargs: Any) -> Any:
        return ours(theirs, *args, **kwargs)

    swapped._fastsample = True  # type: ignore[attr-defined]
    setattr(owner, name, staticmethod(swapped) if is_static else swapped)
    return True
