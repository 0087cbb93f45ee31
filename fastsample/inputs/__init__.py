"""What a call samples with, per row: parameters, seeds, offsets, masks, biases and token ids, checked and packed."""

from fastsample.inputs.bias import Bias, BiasLike, pack_bias
from fastsample.inputs.ids import BreakerIds, TokenIds
from fastsample.inputs.masks import Allowed, pack_bitmask
from fastsample.inputs.records import pack_params
from fastsample.inputs.rows import Rows
from fastsample.inputs.seeds import Seed, pack_offsets, pack_seeds, row_seeds, splitmix64
from fastsample.inputs.step import NO_INPUTS, Inputs, gather

__all__ = [
    "NO_INPUTS",
    "Allowed",
    "Bias",
    "BiasLike",
    "BreakerIds",
    "Inputs",
    "Rows",
    "Seed",
    "TokenIds",
    "gather",
    "pack_bias",
    "pack_bitmask",
    "pack_offsets",
    "pack_params",
    "pack_seeds",
    "row_seeds",
    "splitmix64",
]
