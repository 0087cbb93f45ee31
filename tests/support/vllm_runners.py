"""vLLM's classes with fastsample in them, on the CPU; and its V2 sampler, which is made for GPUs."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

VOCAB = 1000


@contextmanager
def heard(plug: Any, level: int | None = None) -> Iterator[list[str]]:
    """What the plugin logs within this context, from that level on, as if for the first time."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger, before = plug.common.logger, plug.common.logger.level
    plug.common.STEP._said.clear()
    logger.setLevel(before if level is None else level)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(before)


def registered() -> Any:
    """The adapter, registered twice: the second time must change nothing."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()  # of the rejection sampler; a worker does both, too
    if not current_platform.is_cpu():  # a CUDA build where there is no GPU
        torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign, assignment]
        import_module("vllm.v1.worker.gpu_input_batch")
        for name, module in list(sys.modules.items()):  # those who import it later have it from one of these
            if name.startswith("vllm.") and hasattr(module, "PIN_MEMORY"):
                module.PIN_MEMORY = False
    from fastsample.integrations import vllm as adapter

    adapter.register()
    adapter.register()
    return adapter


# Fields of vLLM's SamplingParams, prompt, output.
Request = tuple[dict[str, Any], list[int], list[int]]


class RunnerV1:
    """vLLM's InputBatch and Sampler with these requests; and its RejectionSampler, where there are drafts."""

    def __init__(
        self, requests: list[Request], seeds: list[int], mode: str = "raw_logprobs", drafts: bool = False
    ) -> None:
        from vllm.config import DeviceConfig, VllmConfig
        from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors
        from vllm.v1.sample.rejection_sampler import RejectionSampler
        from vllm.v1.sample.sampler import Sampler
        from vllm.v1.worker.gpu_input_batch import InputBatch

        device = torch.device("cpu")
        config = VllmConfig(device_config=DeviceConfig(device="cpu"))
        kinds = BUILTIN_LOGITS_PROCESSORS[:1] if drafts else BUILTIN_LOGITS_PROCESSORS  # as vLLM's build_logitsprocs
        self.batch = InputBatch(
            max_num_reqs=16,
            max_model_len=64,
            max_num_batched_tokens=64,
            device=device,
            vocab_size=VOCAB,
            block_sizes=[16],
            max_num_blocks_per_req=[4],
            logitsprocs=LogitsProcessors([kind(config, device, False) for kind in kinds]),
        )
        self.sampler = Sampler(mode)
        self.verifier = RejectionSampler(self.sampler)
        self.states = [
            self.add(row, request, seed) for row, (request, seed) in enumerate(zip(requests, seeds, strict=False))
        ]

    def add(self, row: int, request: Request, seed: int) -> Any:
        from vllm import SamplingParams
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        fields, prompt, output = request
        generator = torch.Generator().manual_seed(seed) if fields.get("temperature", 1) else None
        words = fields.get("bad_words")
        params = SamplingParams(seed=seed, **{**fields, "bad_words": None})
        params._bad_words_token_ids = words  # as token ids, which vLLM makes of strings
        state = CachedRequestState(str(row), prompt, [], params, generator, ([0],), 0, list(output))
        self.batch.add_request(state)
        return state

    def remove(self, *rows: int) -> None:
        for row in rows:
            self.batch.remove_request(str(row))
        self.batch.condense()

    def metadata(self, **changed: Any) -> Any:
        self.batch.refresh_metadata()
        return dataclasses.replace(self.batch.sampling_metadata, **changed)

    def __call__(self, logits: torch.Tensor, **changed: Any) -> Any:
        metadata = self.metadata(**changed)
        rows = [int(name) for name in self.batch.req_ids]
        return self.sampler(logits[rows].clone(), metadata), rows

    def tokens(self, logits: torch.Tensor) -> dict[int, int]:
        out, rows = self(logits)
        return dict(zip(rows, out.sampled_token_ids[:, 0].tolist(), strict=True))

    def verify(self, logits: torch.Tensor, drafts: list[list[int]], **changed: Any) -> Any:
        """RejectionSampler's answer to drafts [B][K], whose rows of logits are one more for each request."""
        for own, new in zip(self.batch.spec_token_ids, drafts, strict=False):
            own[:] = new
        return self.verifier(drafted(drafts), None, logits.clone(), self.metadata(**changed))


def drafted(drafts: list[list[int]]) -> Any:
    """SpecDecodeMetadata of drafts, as the runner makes it."""
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    found = SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu"))
    found.bonus_logits_indices = found.cu_num_sampled_tokens - 1
    rows = torch.arange(int(found.cu_num_sampled_tokens[-1]))
    found.target_logits_indices = rows[~torch.isin(rows, found.bonus_logits_indices)].int()
    return found


class CpuBuffer:
    """vLLM's UvaBuffer needs pinned memory and its view on a GPU; here one tensor is both."""

    def __init__(self, size: Any, dtype: torch.dtype) -> None:
        self.cpu = torch.zeros(size, dtype=dtype)
        self.np = self.cpu.numpy()

    def uva(self, n: int | None = None) -> torch.Tensor:
        return self.cpu[:n]


SLOTS = 8


class RunnerV2:
    """vLLM's V2 Sampler with these requests (slot -> fields of SamplingParams) in its state."""

    def __init__(self, requests: dict[int, dict[str, Any]], mode: str = "raw_logprobs", **options: Any) -> None:
        from vllm import SamplingParams
        from vllm.config import DeviceConfig, VllmConfig
        from vllm.v1.worker.gpu.sample.sampler import Sampler
        from vllm.v1.worker.gpu.states import RequestState

        device = torch.device("cpu")
        state = RequestState(SLOTS, 64, 64, 0, VOCAB, device)
        config = VllmConfig(device_config=DeviceConfig(device="cpu"))
        self.sampler = Sampler(config, SLOTS, VOCAB, device, state, logprobs_mode=mode, **options)
        for slot, fields in requests.items():
            self.sampler.add_request(slot, SamplingParams(**fields))
        self.sampler.apply_staged_writes()
        self.tokens = state.all_token_ids.gpu  # int32 [SLOTS, length], prompts and outputs

    def __call__(self, logits: torch.Tensor, slots: list[int], positions: list[int]) -> tuple[Any, torch.Tensor]:
        where, pos = torch.tensor(slots), torch.tensor(positions)
        none = torch.zeros(len(slots), dtype=torch.int64)
        tokens, kept = self.sampler.sample(logits, where, where, where.numpy(), pos, none, none, pos.numpy() + 1)
        assert tokens.dtype == torch.int64
        return tokens.tolist(), kept

    def verify(
        self,
        logits: torch.Tensor,
        slots: list[int],
        drafts: list[list[int]],
        positions: list[int],
        invalid: Sequence[int] = (),
        draft_logits: torch.Tensor | None = None,
        **config: Any,
    ) -> tuple[list[list[int]], torch.Tensor]:
        """RejectionSampler's tokens for drafts [R][K] of requests whose last token is at these positions.

        `invalid` are the rows whose draft a grammar forbids.
        """
        from types import SimpleNamespace

        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

        counts = [len(own) + 1 for own in drafts]
        bounds = np.cumsum([0, *counts])
        of = np.repeat(np.arange(len(slots)), counts)
        local = np.concatenate([np.arange(n) for n in counts])
        inputs = [
            token
            for slot, at, own in zip(slots, positions, drafts, strict=True)
            for token in [self.tokens[slot, at], *own]
        ]
        forbidden = torch.tensor(inputs, dtype=torch.int32)
        forbidden[list(invalid)] = -1
        config = {"num_speculative_tokens": 4, "enable_adaptive_verification": False, **config}
        config = {"rejection_sample_method": "standard", "fly_entropy_threshold": 0, "fly_entropy_top_k": 0, **config}
        verifier = RejectionSampler(self.sampler, SimpleNamespace(**config), torch.device("cpu"))
        where = torch.tensor(slots, dtype=torch.int32)
        kept, tokens, count = verifier._verify(
            logits.clone(),
            draft_logits,
            torch.tensor(inputs, dtype=torch.int32),
            torch.from_numpy(np.asarray(positions)[of] + local),
            torch.from_numpy(bounds.astype(np.int32)),
            where,
            where.numpy(),
            where[of],
            torch.from_numpy(local.astype(np.int32)),
            np.asarray(positions) + counts,
            forbidden,
        )
        assert tokens.dtype == torch.int64
        assert count.dtype == torch.int32
        assert tokens.shape == (len(slots), 5)
        return [line[:n] for line, n in zip(tokens.tolist(), count.tolist(), strict=True)], kept


def prepared(monkeypatch: pytest.MonkeyPatch) -> type[RunnerV2]:
    """RunnerV2, with buffers that need no GPU."""
    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.UvaBuffer", CpuBuffer)
    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.NonUvaBuffer", CpuBuffer)
    return RunnerV2
