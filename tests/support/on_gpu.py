"""Cases whose tensors are on the GPU."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case


def to_gpu(value: Any) -> Any:
    """On the GPU with the same strides and storage offset."""
    if isinstance(value, tuple):
        return tuple(map(to_gpu, value))
    if not isinstance(value, torch.Tensor):
        return value
    base = value if value._base is None else value._base
    return base.cuda().as_strided(value.size(), value.stride(), value.storage_offset())


class OnGpu:
    """A case that is built on the CPU and then moved."""

    def __init__(self, case: Case) -> None:
        self.case, self.vocab = case, case.vocab

    def build(self) -> Any:
        inputs = self.case.build()
        moved = {name: to_gpu(value) for name, value in inputs.row_inputs.items()}
        return type(inputs)(to_gpu(inputs.logits), inputs.params, moved, inputs.draw)
