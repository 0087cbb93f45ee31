"""Several texts of one prompt (`n` > 1), each with a seed of its own: SGLang gives all of them that of the request."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

from sglang.srt.runtime_context import get_exec

from fastsample.inputs import pack_seeds, splitmix64
from fastsample.integrations.sglang.common import is_chosen

MANAGER = "sglang.srt.managers.tokenizer_manager"
BATCH, SEND = (f"{MANAGER}.TokenizerManager.{name}" for name in ("_handle_batch_request", "_send_one_request"))
UNSEEDED = 42
"""The seed that SGLang gives to requests without one in deterministic mode."""

_sent: ContextVar[Counter[int] | None] = ContextVar("_sent", default=None)
"""How many texts of each prompt of a request are on their way, by the identity of the parameters that they share."""


async def batch(theirs: Callable[..., AsyncIterator[Any]], *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
    """TokenizerManager._handle_batch_request: it sends what it sends before its first answer."""
    _sent.set(Counter())
    async for answer in theirs(*args, **kwargs):
        yield answer


def send(theirs: Callable[..., Any], self: Any, request: Any) -> Any:
    """TokenizerManager._send_one_request: the next text of a prompt gets the next seed."""
    params, sent = getattr(request, "sampling_params", None), _sent.get()
    if sent is not None and params is not None and getattr(params, "n", 1) > 1 and is_chosen():
        seed = seed_of(params.sampling_seed, sent[id(params)])
        sent[id(params)] += 1
        if seed is not None:
            request.sampling_params = copy.copy(params)
            request.sampling_params.sampling_seed = seed
    return theirs(self, request)


def seed_of(seed: int | None, index: int) -> int | None:
    """The seed of a prompt's text: the request's for the first one, splitmix64(splitmix64(seed) + index) for others.

    None where every text gets a fresh one.
    """
    if seed is None:
        if not get_exec().deterministic.enable_deterministic_inference:
            return None
        seed = UNSEEDED
    return seed if index == 0 else int(pack_seeds([splitmix64(splitmix64(seed % 2**64) + index)], 1))
