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
| sampling masks (masks.py) | fastsample, on a CPU | fastsample |
| logits of tensor-parallel ranks | gathered, or left where they are (shards.py, an option) | gathered |
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

import os

from fastsample.integrations.vllm import arrival, drafts, masks, shards, v1, v1_drafts, v2
from fastsample.integrations.vllm.common import swap

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
MASKS_V2 = "vllm.v1.worker.gpu.sample.output.SamplingMaskTensors"
CONFIG = "vllm.config.vllm.VllmConfig"


def register() -> None:
    """Swap the samplers of both model runners; a second call changes nothing. Does nothing with FASTSAMPLE_VLLM=0."""
    if os.environ.get("FASTSAMPLE_VLLM") == "0":
        return
    arrives = swap(
        ARRIVAL, "process_inputs", arrival.process_inputs, "process_inputs", ("request_id", "prompt", "params")
    )
    of_v1 = [
        swap(TOP_K_TOP_P, "__init__", v1.init, "forward_native", ("logits", "generators", "k", "p")),
        swap(SAMPLER_V1, "sample", v1.sample, "sample", ("logits", "sampling_metadata")),
        swap(SAMPLER_V1, "apply_penalties", v1.apply_penalties, "apply_penalties", ("logits", "sampling_metadata")),
        swap(BATCH_V1, "__init__", shards.init_batch, "add_request", ("request",)),
        swap(BATCH_V1, "add_request", v1.add_request, "add_request", ("request",)),
    ]
    known = ("processed_logits", "expanded_idx_mapping", "idx_mapping_np", "pos", "top_k", "top_p")
    of_v2 = [
        swap(SAMPLER_V2, "_sample_random", v2.sample_random, "_sample_random", known),
        swap(SAMPLER_V2, "__init__", v2.init, "add_request", ("req_idx", "sampling_params")),
        swap(SAMPLER_V2, "add_request", v2.add_request, "add_request", ("req_idx", "sampling_params")),
    ]
    # What verifies drafts goes through all of the sampler's parts, so it is left alone where one of them is.
    init = "__init__", drafts.init, "__init__", ("sampler", "spec_config")
    verify_v1 = (
        all(of_v1)
        and swap(MIN_TOKENS_V1, "__init__", v1_drafts.init_min_tokens, "apply_with_spec_decode", COUNTS_V1)
        and swap(VERIFIER_V1, *init)
        and swap(VERIFIER_V1, "forward", v1_drafts.forward, "forward", ROWS_V1)
    )
    verify_v2 = all(of_v2) and swap(VERIFIER_V2, *init) and swap(VERIFIER_V2, "_verify", v2.verify, "_verify", ROWS_V2)
    check = "_validate_spec_decode"
    swap(PARAMS, check, arrival.validate_spec_decode, check, ("speculative_config",))
    arrival.SERVED.update(v1=arrives and all(of_v1), v2=arrives and all(of_v2))
    arrival.VERIFIES.update(v1=verify_v1, v2=verify_v2)
    rows = ("logits", "cu_num_logits", "num_sampled_tokens", "max_num_kept", "rows_per_request")
    arrival.MASKED.update(v2=swap(MASKS_V2, "from_logits", masks.from_logits, "from_logits", rows))
    check = "_verify_sampling_replay_config"
    swap(CONFIG, check, shards.verify_config, check, ())
