"""vLLM's classes with fastsample in them, on the CPU; and its V2 sampler, which is made for GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

VOCAB = 1000


def registered() -> Any:
    """The adapter, registered twice: the second time must change nothing."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()  # of the rejection sampler; a worker does both, too
    if not current_platform.is_cpu():  # a CUDA build where there is no GPU
        torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign, assignment]
        from vllm.v1.worker import gpu_input_batch

        gpu_input_batch.PIN_MEMORY = False
    from fastsample.integrations import vllm as adapter

    adapter.register()
    adapter.register()
    return adapter


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


def prepared(monkeypatch: pytest.MonkeyPatch) -> type[RunnerV2]:
    """RunnerV2, with buffers that need no GPU."""
    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.UvaBuffer", CpuBuffer)
    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.NonUvaBuffer", CpuBuffer)
    return RunnerV2
