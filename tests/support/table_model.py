"""A model for tests of decoding: its logits are a table."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class TableConfig(PreTrainedConfig):
    model_type = "fastsample-table"
    vocab_size = 0


class TableModel(PreTrainedModel, GenerationMixin):
    """The next token's logits are a row of a table [rows, V], that of the last id modulo rows.

    They have the same bits in any batch, slot and padding.
    """

    config_class = TableConfig
    main_input_name = "input_ids"

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__(TableConfig(vocab_size=table.shape[1]))
        self.table = torch.nn.Parameter(table)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.table[input_ids % len(self.table)])
