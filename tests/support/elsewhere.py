"""Tensors that stand for those of a GPU: their memory is the host's, but they say that they are elsewhere, and refuse
to be mixed with tensors of the host. What mixes the two on purpose is copied, and counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fastsample.backends import Engine, Outputs, Question
from fastsample.backends.cpu import ENGINE as CPU_ENGINE
from fastsample.inputs import Rows

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
Tensor: Any = torch.Tensor
_INDEXING = ("__getitem__", "__setitem__", "index_put_")  # a GPU's tensors may be indexed by tensors of the host


class Elsewhere(Tensor):
    """A tensor of the GPU that there is not."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: outside of `elsewhere`")


def _is_there(value: Any) -> bool:
    return isinstance(value, Elsewhere)


def _here(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if _is_there(value) else HOST if value == GPU else value


def there(value: Any) -> Any:
    """The same tensor, as one of the GPU."""
    return value.as_subclass(Elsewhere) if type(value) is torch.Tensor else value


class Watching(TorchFunctionMode):
    """Runs each function of torch on memory of the host, and sees to it that no call mixes devices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", str(func))
        leaves = tree_leaves((args, kwargs))
        is_there = any(map(_is_there, leaves))
        if name == "__get__" and is_there:
            owner = getattr(func, "__self__", None)
            if owner is torch.Tensor.device:
                return GPU
            if owner in (torch.Tensor.is_cuda, torch.Tensor.is_cpu):
                return owner is torch.Tensor.is_cuda
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*tree_map(_here, args), **tree_map(_here, kwargs))
        wants = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        if name in ("cpu", "to", "type_as", "copy_"):
            goes = GPU in wants or (is_there and not wants and name != "cpu")
            goes = _is_there(args[0]) if name == "copy_" else goes
            return there(found) if goes else found
        if is_there and name not in _INDEXING:
            mixed = [leaf for leaf in leaves if type(leaf) is torch.Tensor and leaf.ndim]
            assert not mixed, f"{name}: tensors of two devices"
        if isinstance(found, torch.Size) or not (GPU in wants or (is_there and HOST not in wants)):
            return found
        return tree_map(there, found)


class Pretending(Engine):
    """The CPU engine as that of a GPU: all that it is given must be there."""

    name = "triton"

    def why_not(self, logits: Any) -> str | None:
        return None

    def run(self, logits: Any, rows: Rows, out: Outputs) -> int | None:
        assert _is_there(logits)
        assert _is_there(out.status)
        assert all(map(_is_there, (rows.records, rows.seeds, rows.offsets)))
        rows.native = None
        CPU_ENGINE.run(logits, rows, out)
        return None

    def answers(self) -> bool:
        return True

    def answer(self, x: Any, question: Question) -> Any:
        assert all(_is_there(given) for given in (x, *question) if isinstance(given, torch.Tensor))
        return there(CPU_ENGINE.answer(_here(x), Question(*map(_here, question))))


@contextmanager
def elsewhere() -> Iterator[Pretending]:
    """Within this context, threads that are `Watching` may make tensors of a GPU, which this engine serves."""
    known = {"is_available": lambda: True, "current_device": lambda: 0, "is_current_stream_capturing": lambda: False}
    with patch.multiple("torch.cuda", **known):
        yield Pretending()
