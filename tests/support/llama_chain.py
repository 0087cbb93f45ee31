"""llama.cpp's samplers through llama-cpp-python's C API, a row at a time."""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

ENTRY = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
KEEP = 1  # its min_keep


def gguf(tokens: Sequence[bytes]) -> bytes:
    """A model file that holds a vocabulary alone: GGUF version 3, without tensors."""

    def string(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text

    def array(kind: int, items: Iterable[bytes]) -> bytes:
        return struct.pack("<IQ", kind, len(tokens)) + b"".join(items)

    uint32, int32, float32, text, many = 4, 5, 6, 8, 9
    values = {
        b"general.architecture": (text, string(b"llama")),
        b"tokenizer.ggml.model": (text, string(b"llama")),
        b"tokenizer.ggml.tokens": (many, array(text, map(string, tokens))),
        b"tokenizer.ggml.scores": (many, array(float32, [struct.pack("<f", 0)] * len(tokens))),
        b"tokenizer.ggml.token_type": (many, array(int32, [struct.pack("<i", 1)] * len(tokens))),  # all are normal
        **{b"tokenizer.ggml.%s_token_id" % end: (uint32, struct.pack("<I", 0)) for end in (b"bos", b"eos")},
    }
    entries = b"".join(string(key) + struct.pack("<I", kind) + value for key, (kind, value) in values.items())
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(values)) + entries


SILENT: list[Any] = []


@cache
def vocabulary(size: int, breakers: tuple[int, ...] = ()) -> Any:
    """llama.cpp's vocabulary of `size` tokens; "#" is part of the breakers and of no other. It lives until the end."""
    import llama_cpp as lc

    if not SILENT:
        SILENT.append(lc.llama_log_callback(lambda *_: None))
        lc.llama_log_set(SILENT[0], ctypes.c_void_p(0))
    params = lc.llama_model_default_params()
    params.vocab_only = True
    with TemporaryDirectory() as folder:
        path = Path(folder, "vocabulary.gguf")
        path.write_bytes(gguf([(b"#%d" if i in breakers else b"t%d") % i for i in range(size)]))
        model = lc.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError("llama.cpp does not load the vocabulary")
    return lc.llama_model_get_vocab(model)


def dry(f: dict[str, Any], window: int, vocab: Any, broken: bool) -> Any:
    """DRY's part of a chain; `window` is how many ids it may look at where `dry_range` is 0."""
    import llama_cpp as lc

    strings = (ctypes.c_char_p * 1)(b"#") if broken else None
    shape = (f.get("dry_base", 1.75), f.get("dry_allowed_length", 2), f.get("dry_range") or window)
    return lc.llama_sampler_init_dry(vocab, f["dry_multiplier"], *shape, strings, int(broken))


def parts(f: dict[str, Any], seed: int = 1) -> dict[str, Callable[[], Any]]:
    """What makes each part of a chain for fields of SamplingParams, but for DRY, which needs a vocabulary."""
    import llama_cpp as lc

    return {
        "top_n_sigma": lambda: lc.llama_sampler_init_top_n_sigma(f["top_n_sigma"]),
        "top_k": lambda: lc.llama_sampler_init_top_k(f["top_k"]),
        "typical_p": lambda: lc.llama_sampler_init_typical(f["typical_p"], KEEP),
        "top_p": lambda: lc.llama_sampler_init_top_p(f["top_p"], KEEP),
        "min_p": lambda: lc.llama_sampler_init_min_p(f["min_p"], KEEP),
        "xtc_probability": lambda: lc.llama_sampler_init_xtc(
            f["xtc_probability"], f.get("xtc_threshold", 0.1), KEEP, seed
        ),
        "temperature": lambda: lc.llama_sampler_init_temp(f["temperature"]),
        "dist": lambda: lc.llama_sampler_init_dist(seed),
    }


class Chain:
    """Samplers one after the other."""

    def __init__(self, made: Iterable[Any]) -> None:
        import llama_cpp as lc

        self.lc = lc
        self.chain = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
        for part in made:
            lc.llama_sampler_chain_add(self.chain, part)
        weakref.finalize(self, lc.llama_sampler_free, self.chain)

    def accept(self, history: Iterable[int]) -> None:
        for token in history:
            self.lc.llama_sampler_accept(self.chain, token)

    def __call__(self, row: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], int]:
        """The candidates that are left of a row of logits, and the position of the chosen one among them."""
        entries = np.zeros(len(row), ENTRY)
        entries["id"], entries["logit"] = np.arange(len(row)), row
        data = entries.ctypes.data_as(ctypes.POINTER(self.lc.llama_token_data))
        array = self.lc.llama_token_data_array(data=data, size=len(row), selected=-1, sorted=False)
        self.lc.llama_sampler_apply(self.chain, ctypes.byref(array))
        start = (ctypes.addressof(array.data.contents) - entries.ctypes.data) // ENTRY.itemsize  # XTC moves it
        return entries[start : start + array.size].copy(), array.selected


def chain(fields: dict[str, Any], seed: int = 1, draw: bool = False) -> Chain:
    """llama.cpp's default chain for these fields of SamplingParams, DRY left out."""
    made = parts(fields, seed)
    names = [name for name in made if name in fields or (draw and name == "dist")]
    return Chain(made[name]() for name in names)
