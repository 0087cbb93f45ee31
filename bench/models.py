"""Models that drafts are measured on, and what a drafter can make of one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastsample.cli.model import open_model

MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "smollm2": partial(open_model, "smollm2"),
    "tiny": partial(open_model, None),
}
"""Each to the model, in float32, and its tokenizer."""


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
