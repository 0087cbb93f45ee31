"""vLLM's sampling masks (`--return-sampling-mask`): for each token that comes out, the ids that it was drawn from.

vLLM finds them by one more pass over processed logits, asks for T > 0 and top_k > 0 to bound their size, and has them
in runner V2 only. Here they are what the draw itself has kept, of any size; so greedy requests and requests without
top_k are let in, and runner V1 has them too, where it runs on a CPU.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.outputs import ModelRunnerOutput, SamplingMaskLists

from fastsample.integrations.serving import Seen
from fastsample.integrations.sets import Kept
from fastsample.integrations.vllm import v1_drafts
from fastsample.integrations.vllm.arrival import MASKED, wants_masks, why_not
from fastsample.integrations.vllm.common import STEP, swap
from fastsample.integrations.vllm.v1 import Asking

WIDEST = 2048
"""Ids of a row that runner V2 copies to the host as such; a longer list travels as a bitmask. vLLM has the same."""
RUNNER_V1 = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"


def verify_config(theirs: Callable[..., None], self: Any) -> None:
    """VllmConfig._verify_sampling_replay_config: runner V1 will do, where it is ours and on a CPU."""
    if not wants_masks(self.model_config) or self.use_v2_model_runner or self.device_config.device_type != "cpu":
        return theirs(self)
    reason = why_not(self, self.model_config.get_vocab_size())
    if reason is None and not serve_v1():
        reason = "fastsample does not know this model runner"
    if reason is None:
        return theirs(Seen(self, use_v2_model_runner=True))
    STEP.say(logging.WARNING, f"no sampling masks in model runner V1: {reason}")
    theirs(self)


# Runner V1 -----------------------------------------------------------------------------------------------------------


def serve_v1() -> bool:
    """Make runner V1 return masks; its module is large, so it is imported only where somebody asks for them."""
    MASKED["v1"] = swap(RUNNER_V1, "sample_tokens", sample_tokens, "sample_tokens", ("grammar_output",))
    return MASKED["v1"]


def init_batch(theirs: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """InputBatch.__init__: where a runner makes one, its module is there."""
    v1_drafts.init_batch(theirs, self, *args, **kwargs)
    if RUNNER_V1.rpartition(".")[0] in sys.modules:
        serve_v1()


def sample_tokens(theirs: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """GPUModelRunner.sample_tokens, whose answer goes to the scheduler."""
    processors = self.input_batch.logitsprocs.argmax_invariant
    asking = next((processor for processor in processors if isinstance(processor, Asking)), None)
    if asking is None or not wants_masks(self.model_config):
        return theirs(self, *args, **kwargs)
    asking.keeps, asking.kept, asking.ends = True, None, None
    answer = theirs(self, *args, **kwargs)
    if asking.kept is None:
        return answer
    ids, row_ptr = asking.kept.lists()
    assert isinstance(answer, ModelRunnerOutput)  # what runs ahead of its output is no CPU
    answer.sampling_masks = SamplingMaskLists(ids.numpy(), row_ptr.numpy(), asking.ends)
    return answer


# Runner V2 -----------------------------------------------------------------------------------------------------------


def marked(logits: torch.Tensor, kept: Kept) -> torch.Tensor:
    """Processed logits that know what was kept of each row."""
    logits = logits.view(logits.shape)  # the tensor may be used again, with other rows in it
    logits._fastsample = kept  # type: ignore[attr-defined]
    return logits


def from_logits(
    theirs: Callable[..., Any],
    logits: torch.Tensor,
    cu_num_logits: torch.Tensor,
    num_sampled_tokens: torch.Tensor,
    max_num_kept: int,
    rows_per_request: int = 1,
) -> Any:
    """SamplingMaskTensors.from_logits: the masks of what comes out, in a place for each row that a request can have.

    Args:
        logits: [N, V], processed.
        cu_num_logits: [R + 1], where the rows of each request begin, and N.
        num_sampled_tokens: [R], how many of them come out.
        max_num_kept: the largest top_k, V where it is off.
        rows_per_request: K + 1 with K drafts.
    """
    kept = getattr(logits, "_fastsample", None)
    if kept is None:
        return theirs(logits, cu_num_logits, num_sampled_tokens, max_num_kept, rows_per_request)
    from vllm.v1.worker.gpu.sample.output import SamplingMaskTensors

    place = torch.arange(rows_per_request, device=logits.device)
    source = (cu_num_logits[:-1, None] + place).clamp(max=len(logits) - 1).flatten()
    comes_out = (place < num_sampled_tokens[:, None]).flatten()
    kept = kept.of(source)
    kept.count.masked_fill_(~comes_out, 0)
    vocab = logits.shape[1]
    table = kept.table(min(max_num_kept, vocab, WIDEST))
    return SamplingMaskTensors(table, kept.bitmask.view(torch.uint8), kept.count, vocab, rows_per_request)
