"""Requests for sampling masks that SGLang refuses, since it could not bound or find the masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.runtime_context import get_exec
from sglang.srt.sampling.sampling_params import TOP_K_ALL

from fastsample.integrations.serving import Seen
from fastsample.integrations.sglang import speculation
from fastsample.integrations.sglang.common import is_chosen

ADMIT = "sglang.srt.managers.scheduler.Scheduler._handle_generate_request"
VALIDATE = "sglang.srt.speculative.spec_sampling_mask.validate_spec_sampling_mask_request"


def admit(theirs: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Scheduler._handle_generate_request: any top_k will do.

    Of its server_args it reads nothing but the cap on masks, which no top_k may exceed.
    """
    on_policy = get_exec().deterministic.rl_on_policy_target is not None  # there SGLang samples
    if not request.return_sampling_mask or on_policy or not is_chosen():
        return theirs(self, request, *args, **kwargs)
    given = self.server_args
    self.server_args = Seen(given, sampling_mask_max_tokens=TOP_K_ALL)
    try:
        return theirs(self, request, *args, **kwargs)
    finally:
        self.server_args = given


def validate(theirs: Callable[..., str | None], request: Any, algorithm: Any) -> str | None:
    """validate_spec_sampling_mask_request: why a request cannot have masks beside these drafts, or None."""
    if is_chosen() and speculation.left(algorithm) is None:
        return None
    return theirs(request, algorithm)
