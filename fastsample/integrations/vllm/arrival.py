"""Requests with extra parameters: refused or accepted when they arrive, and read again where they are sampled.

Likewise those with min-p or a bias beside drafts, which vLLM refuses.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from fastsample.checks import MAX_VOCAB
from fastsample.integrations.asked import Row
from fastsample.integrations.extras import RefusedError, read
from fastsample.integrations.serving import Seen
from fastsample.integrations.vllm.common import STEP
from fastsample.integrations.vllm.drafts import why_not as why_not_drafts
from fastsample.params import GREEDY_BELOW

SERVED: dict[str, bool] = {}
"""Whether a model runner, "v1" or "v2", serves extra parameters: register() knows."""
VERIFIES: dict[str, bool] = {}
"""Whether the drafts of a model runner are verified by us."""
MASKED: dict[str, bool] = {}
"""Whether the sampling masks of a model runner are ours (masks.py)."""
_server: ContextVar[Any] = ContextVar("_server", default=None)  # the InputProcessor that a request is arriving at


def process_inputs(
    theirs: Callable[..., Any], self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    """InputProcessor.process_inputs: a request has arrived. It is refused here, before it reaches any batch.

    Raises:
        VLLMValidationError: an extra parameter that cannot be served; a server answers with status 400.
    """
    before = _server.set(self)
    try:
        return _process(theirs, self, request_id, prompt, params, *args, **kwargs)
    finally:
        _server.reset(before)


def validate_spec_decode(theirs: Callable[..., None], self: Any, speculative_config: Any) -> None:
    """SamplingParams._validate_spec_decode, a part of process_inputs: vLLM verifies drafts without min-p and bias."""
    server = _server.get()
    if server is None or speculative_config is None or not (self.min_p or self.logit_bias):
        return theirs(self, speculative_config)
    reason = why_not(server.vllm_config, server.model_config.get_vocab_size())
    if reason is not None:
        STEP.say(logging.WARNING, f"min_p and logit_bias beside drafts stay refused: {reason}")
        theirs(self, speculative_config)


def _process(
    theirs: Callable[..., Any], self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    if wants_masks(self.model_config):
        _let_in(self)
    given = params.extra_args if isinstance(params, SamplingParams) else None
    if not given:
        return theirs(self, request_id, prompt, params, *args, **kwargs)
    STEP.say_near_misses(given, "extra_args")
    try:
        extras = read(given, self.tokenizer, self.model_config.get_vocab_size())
        reason = None if extras is None else why_not(self.vllm_config, self.model_config.get_vocab_size())
    except RefusedError as error:
        raise VLLMValidationError(str(error), parameter=error.parameter, value=error.value) from error
    if extras is None:
        return theirs(self, request_id, prompt, params, *args, **kwargs)
    if reason is not None:
        raise VLLMValidationError(f"{', '.join(extras.names())}: {reason}", parameter=extras.names()[0])
    request = theirs(self, request_id, prompt, params, *args, **kwargs)
    # The request has a copy of the parameters, which may share its dictionary with the caller's.
    request.sampling_params.extra_args = {**given, **extras.written()}
    return request


def why_not(config: Any, vocab: int) -> str | None:
    """Why this server cannot serve extra parameters, or min-p and a bias beside drafts, or masks; or None."""
    runner = "v2" if getattr(config, "use_v2_model_runner", False) else "v1"
    if not SERVED.get(runner):
        return f"this vLLM's model runner ({runner}) is not one that fastsample knows"
    drafts = getattr(config, "speculative_config", None)
    if drafts is not None:
        reason = why_not_drafts(drafts) if VERIFIES.get(runner) else "fastsample does not know this rejection sampler"
        if reason is not None:
            return f"not with this speculative decoding, which is vLLM's own: {reason}"
    if getattr(config, "watermark_config", None) is not None:
        return "not with watermarks, which are vLLM's own"
    return None if vocab <= MAX_VOCAB else f"the vocabulary has {vocab} tokens, more than 2^20"


def _let_in(server: Any) -> None:
    """Let an InputProcessor accept requests whose masks only we bound: greedy ones, and those without top_k."""
    config = server.vllm_config
    runner = "v2" if config.use_v2_model_runner else "v1"
    if not MASKED.get(runner):
        return
    reason = why_not(config, server.model_config.get_vocab_size())
    if reason is None:
        server.model_config = Seen(server.model_config, return_sampling_mask=False)
    else:
        STEP.say(logging.WARNING, f"sampling masks are vLLM's own: {reason}")


def wants_masks(config: Any) -> bool:
    """Whether a ModelConfig asks for masks; older ones know none."""
    return bool(getattr(config, "return_sampling_mask", False))


ROW = "fastsample"  # where the parameters that a runner gets carry the request's Row


def row_of(params: Any, with_min_p: bool = False) -> Row | None:
    """What a request asks for, as a worker sees it. A batch must go on, so what is still wrong here is left out.

    Args:
        params: vLLM's SamplingParams.
        with_min_p: take min-p, for which vLLM sums up whole rows, as one of our filters.
    """
    given = getattr(params, "extra_args", None)
    if with_min_p and params.min_p:
        given = {"order": "min_p_first", **(given or {})}
    if not given:
        return None
    try:
        extras = read(given)
    except RefusedError as error:
        STEP.say(logging.ERROR, f"a request reached a worker unchecked, and its extra_args are left out: {error}")
        return None
    if extras is None:
        return None
    row = STEP.row(extras, temperature=params.temperature, min_p=params.min_p, order="min_p_first")
    if params.temperature < GREEDY_BELOW:
        row.filters = None
    return row if row.filters is not None or row.edits is not None else None


def for_runner(params: Any, row: Row) -> Any:
    """A request's parameters for its runner, which leaves the stages to us that our filters go with."""
    copied = copy.copy(params)
    copied.extra_args = {**(params.extra_args or {}), ROW: row}
    if row.filters is not None:
        copied.temperature, copied.min_p = 1.0, 0.0
    return copied
