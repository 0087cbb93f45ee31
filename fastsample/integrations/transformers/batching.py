"""Hugging Face continuous batching with the fused step: parameters and a seed per request.

    with continuous_batching(model, GenerationConfig(do_sample=True, top_p=0.9), seed=7) as manager:
        manager.add_request(ids, max_new_tokens=20, temperature=0.7, seed=3)

transformers' manager builds a list of logits processors from the generation config and applies it in every step, which
then takes the softmax and draws with multinomial. Here that list is one object of ours, set on the manager before it
starts: it draws the token and returns a one-hot row, of which the step takes the maximum. Nothing is patched.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.logits_process import LogitsProcessorList

from fastsample.api import sample
from fastsample.checks import CPU, whole
from fastsample.inputs import pack_seeds, splitmix64
from fastsample.integrations.transformers.plan import HISTORY, make_plan
from fastsample.integrations.transformers.results import REPORTS
from fastsample.integrations.transformers.rows import check_backend
from fastsample.params import SamplingParams, specs

_FIELDS = {name: spec.kind for name, spec in specs() if spec.kind != "choice" and name not in HISTORY}

_NOT_SERVED = "not served in continuous batches, which have no ids of the text to look at"


@contextmanager
def continuous_batching(
    model: Any,
    generation_config: GenerationConfig | None = None,
    *,
    seed: int | None = None,
    backend: str = "auto",
    continuous_batching_config: ContinuousBatchingConfig | None = None,
) -> Iterator[Any]:
    """A started ContinuousBatchingManager of transformers whose tokens fastsample draws; stopped on exit.

    `manager.add_request` and `add_requests` take a seed and fields of SamplingParams for each request: temperature,
    filters and XTC, by default the generation config's; but not order, ties, and what looks at the text so far
    (penalties, DRY, n-grams). A request's tokens depend on its logits, its parameters, its seed and their position, and
    not on what it is batched with. (A model's logits may themselves differ in their last bits between batch shapes.)

    Args:
        model: a causal language model that transformers serves in continuous batches.
        generation_config: with do_sample=True; None takes the model's.
        seed: for requests without a seed of their own (a request's own seed is used as it is). Request "req_i", in the
            numbering of `add_requests`, gets splitmix64(splitmix64(seed) + i). None takes a fresh seed from torch's
            default CPU generator.
        backend: as for `fastsample.sample`.
        continuous_batching_config: transformers' own; asynchronous batching, CUDA graphs and logprobs are not served.

    Raises:
        TypeError, ValueError: bad seed or backend, do_sample=False, an option that is none of these fields (the message
            names it), or a model that has kept a manager.
    """
    check_backend(backend)
    own = int((pack_seeds(None, 1) if seed is None else pack_seeds([whole("seed", seed)], 1))[0]) % 2**64
    config = copy.deepcopy(model.generation_config if generation_config is None else generation_config)
    batching = copy.copy(continuous_batching_config or ContinuousBatchingConfig())
    defaults = _defaults(model, config, batching)
    config.do_sample = False  # the processors leave one token to choose from
    batching.use_async_batching = batching.use_cuda_graph = False
    manager = model.init_continuous_batching(config, batching)
    manager.logit_processor = _FusedStep(defaults, own, backend)
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True)
        manager.destroy()


def generate_batch(
    model: Any,
    inputs: Sequence[Sequence[int]],
    generation_config: GenerationConfig | None = None,
    *,
    requests: Sequence[dict[str, Any]] | None = None,
    seed: int | None = None,
    **options: Any,
) -> list[list[int]]:
    """The new ids of each prompt, as from `model.generate_batch`, drawn by the fused step.

    Args:
        model, generation_config, seed, **options: as for `continuous_batching`.
        inputs: ids of each prompt.
        requests: keyword arguments of `add_request` for each prompt, e.g. {"temperature": 0.2, "seed": 5}.

    Raises:
        TypeError, ValueError: the number of requests is not that of the prompts; what `continuous_batching` refuses.
        RuntimeError: a request failed; the message names it.
    """
    each = [{} for _ in inputs] if requests is None else list(requests)
    if len(each) != len(inputs):
        raise ValueError(f"requests: expected {len(inputs)} (one per prompt), got {len(each)}")
    # Checked here: in the manager's thread an error would only fail the request.
    for keywords in each:
        known = {"seed", *_FIELDS, *HISTORY, *REPORTS}
        _check_request({k: v for k, v in keywords.items() if k in known})
    with continuous_batching(model, generation_config, seed=seed, **options) as manager:
        common = {"max_new_tokens": manager.generation_config.max_new_tokens}
        names = [
            manager.add_request(list(ids), **common | keywords) for ids, keywords in zip(inputs, each, strict=True)
        ]
        done: dict[str, Any] = {}
        while len(done) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.error is not None:
                raise RuntimeError(f"request {result.request_id}: {result.error}")
            if result is not None and result.is_finished():
                done[result.request_id] = result
            elif result is None and not manager.is_running():
                raise RuntimeError("the manager's thread has ended")
    return [list(done[name].generated_tokens) for name in names]


def _defaults(model: Any, config: Any, batching: Any) -> dict[str, Any]:
    """The fields of requests that give none; ValueError for options that are not served."""
    if not config.do_sample:
        raise ValueError("do_sample=False: nothing to sample; temperature=0 makes a request greedy")
    if getattr(model, "_cached_continuous_batching_manager", None) is not None:
        raise ValueError("the model has kept a manager: call model.destroy_cached_continuous_batching_manager() first")
    asked = [name for name in ("use_async_batching", "use_cuda_graph", "return_logprobs") if getattr(batching, name)]
    asked += ["num_return_sequences"] if (config.num_return_sequences or 1) > 1 else []
    plan = make_plan(LogitsProcessorList(model._get_logits_processor(config)), 0, {}, True)
    asked += [type(processor).__name__ for processor in plan.own]
    asked += [name for name, value in (("sequence_bias", plan.bias), ("prefix", plan.allowed)) if value is not None]
    fields = {name: value for name, value in plan.fields.items() if name != "ties"}
    asked += [name for name in fields if name not in _FIELDS]
    if asked:
        raise ValueError(f"{', '.join(asked)}: {_NOT_SERVED}")
    return {name: fields.get(name, getattr(SamplingParams, name)) for name in _FIELDS}


def _check_request(kwargs: dict[str, Any]) -> None:
    """An error unless these are what a request may ask for."""
    fields = {name: value for name, value in kwargs.items() if name != "seed"}
    if looks_back := sorted(HISTORY & set(fields)):
        raise ValueError(f"{looks_back[0]}: {_NOT_SERVED}")
    if reports := [name for name in REPORTS if name in fields]:
        raise ValueError(f"{reports[0]}: not served in continuous batches, whose results are ids alone")
    if unknown := sorted(set(fields) - set(_FIELDS)):
        raise ValueError(f"{unknown[0]}: expected one of {', '.join(_FIELDS)} and seed")
    SamplingParams(**fields)
    pack_seeds([kwargs.get("seed", 0)], 1)


class _FusedStep(ContinuousBatchingLogitsProcessorList):
    """A manager's list of processors as one call; its arguments are columns of int32 words, one per request."""

    def __init__(self, defaults: dict[str, Any], seed: int, backend: str) -> None:
        super().__init__(LogitsProcessorList())
        self.defaults, self.seed, self.backend = defaults, seed, backend
        self.tensors_required = len(_pack([defaults], [0], [0]))
        self.do_processing = True

    def clear(self) -> None:
        """Nothing to forget."""

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        _check_request(kwargs)

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.copy_(_pack([self.defaults], [0], [0]))

    def prepare_tensor_args(self, requests_in_batch: Any, arg_storage: torch.Tensor) -> torch.Tensor:
        states = [request.state for request in requests_in_batch if request.has_new_token]
        if not states:
            return arg_storage
        fields = [self.defaults | {k: v for k, v in s.logit_processor_kwargs.items() if k != "seed"} for s in states]
        # A request that was put back into the queue has its first tokens in its prompt.
        begun = [len(s.initial_tokens) - (s._true_initial_tokens or len(s.initial_tokens)) for s in states]
        offsets = [more + state.generated_len() for more, state in zip(begun, states, strict=True)]
        words = _pack(fields, [self._own_seed(state) for state in states], offsets)
        arg_storage[:, : words.shape[1]] = words.to(arg_storage.device)
        return arg_storage

    def _own_seed(self, state: Any) -> int:
        if (given := state.logit_processor_kwargs.get("seed")) is not None:
            return int(given)
        number = state.request_id.removeprefix("req_")
        if not number.isdecimal():
            number = int.from_bytes(hashlib.blake2b(state.request_id.encode(), digest_size=8).digest(), "little")
        return splitmix64(splitmix64(self.seed) + int(number))

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        words = logits_processor_args[:, : len(scores)].cpu()
        wide = words[len(_FIELDS) :]
        seeds, offsets = (wide[i : i + 2].T.contiguous().view(torch.int64)[:, 0] for i in (0, 2))
        fields: dict[str, Any] = {
            name: column.view(torch.float32) if kind == "float" else column
            for (name, kind), column in zip(_FIELDS.items(), words, strict=False)
        }
        params = SamplingParams(**fields, ties="all")
        tokens = sample(scores, params, seed=seeds, offset=offsets, backend=self.backend).tokens
        return torch.zeros_like(scores).scatter_(1, tokens[:, None], 1.0)


def _pack(fields: list[dict[str, Any]], seeds: list[int], offsets: list[int]) -> torch.Tensor:
    """int32 [fields + 4, requests]: a word for each of the fields, and two each for the seed and the offset."""
    neutral = {name: getattr(SamplingParams, name) for name in _FIELDS}
    params = SamplingParams(**{name: [(neutral | f)[name] for f in fields] for name in _FIELDS})
    columns = [torch.as_tensor(getattr(params, name), device=CPU).view(torch.int32) for name in _FIELDS]
    wide = [pack_seeds(seeds, len(fields)), torch.tensor(offsets, dtype=torch.int64, device=CPU)]
    columns += [word for values in wide for word in values.view(torch.int32).reshape(-1, 2).T]
    return torch.stack(columns)
