"""Prompts in any form, as the keyword arguments of `generate`."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch

_RAGGED = ("input_ids", "attention_mask", "token_type_ids")
"""What a tokenizer returns per text: lists of equal length."""


def encode(inputs: Any, tokenizer: Any, model: Any) -> tuple[dict[str, Any], bool]:
    """The keyword arguments, and whether there are several prompts; see `best_of_n` for what the inputs may be."""
    if isinstance(inputs, np.ndarray):
        inputs = torch.from_numpy(inputs)
    if isinstance(inputs, torch.Tensor):
        # No mask: generate then finds the padding by its own rule.
        ids = inputs if inputs.ndim != 1 else inputs[None]
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
            raise ValueError(f"inputs: expected ids [B, L] or [L], got {ids.dtype} of shape {tuple(inputs.shape)}")
        return {"inputs": ids}, len(ids) > 1
    if isinstance(inputs, Mapping):
        return _from_mapping(inputs, tokenizer, model)
    if isinstance(inputs, str):
        return _from_texts([inputs], tokenizer, model), False
    if _is_list(inputs) and inputs and all(isinstance(text, str) for text in inputs):
        return _from_texts(inputs, tokenizer, model), True
    if _is_list(inputs) and inputs and all(isinstance(item, numbers.Integral) or _is_list(item) for item in inputs):
        return _from_mapping({"input_ids": inputs}, tokenizer, model)
    raise TypeError(f"inputs: expected text, a list of texts, ids or what a tokenizer returns, got {_short(inputs)}")


def _from_texts(texts: Sequence[str], tokenizer: Any, model: Any) -> dict[str, Any]:
    if tokenizer is None:
        raise ValueError("tokenizer: expected one, since the inputs are text")
    return _from_mapping(tokenizer(list(texts)), tokenizer, model)[0]


def _from_mapping(inputs: Mapping[str, Any], tokenizer: Any, model: Any) -> tuple[dict[str, Any], bool]:
    """Tensors unchanged, lists as tensors on the model's device, padded on the left."""
    given = {name: values for name, values in inputs.items() if values is not None}
    empty = isinstance(ids := given.get("input_ids"), torch.Tensor) and not ids.numel()
    tables = {name: _rows(name, v) for name, v in given.items() if not isinstance(v, torch.Tensor) or empty}
    if "input_ids" in tables:
        tables.setdefault("attention_mask", [[1] * len(line) for line in tables["input_ids"]])
        _fill_empty(tables, tokenizer, model)
    pads = {"input_ids": _padding(tokenizer, model)}
    made = {name: _table(name, rows, pads.get(name, 0)).to(model.device) for name, rows in tables.items()}
    result = {name: v for name, v in given.items() if name not in tables} | made
    first = next(
        (result[name] for name in ("input_ids", "inputs") if name in result), next(iter(result.values()), None)
    )
    if not isinstance(first, torch.Tensor) or not first.ndim:
        raise ValueError(f"inputs: expected input_ids, as a tokenizer returns them, got {sorted(inputs) or 'nothing'}")
    return result, len(first) > 1


def _fill_empty(tables: dict[str, list[list[Any]]], tokenizer: Any, model: Any) -> None:
    """Give empty prompts the token that a text begins with."""
    for row, line in enumerate(tables["input_ids"]):
        if not line:
            start = _first_of(tokenizer, model, "bos_token_id", "eos_token_id")
            if start is None:
                raise ValueError(
                    f"inputs (prompt {row}): is empty, and there is no bos_token_id or eos_token_id to start it from"
                )
            for name in tables.keys() & set(_RAGGED):
                tables[name][row] = [{"input_ids": start, "attention_mask": 1}.get(name, 0)]


def _padding(tokenizer: Any, model: Any) -> int:
    """An id for masked positions."""
    return _first_of(tokenizer, model, "pad_token_id", "eos_token_id") or 0


def _first_of(tokenizer: Any, model: Any, *names: str) -> int | None:
    """The first of these special tokens that the tokenizer has, or else the model."""
    for name in names:
        for owner in (tokenizer, getattr(model, "generation_config", None)):
            token = getattr(owner, name, None)
            if token is not None:
                return int(token[0] if _is_list(token) else token)
    return None


def _rows(name: str, values: Any) -> list[list[Any]]:
    """The rows of a batch, or of one prompt."""
    values = values.tolist() if isinstance(values, (torch.Tensor, np.ndarray)) else values
    if not _is_list(values):
        raise TypeError(f"inputs[{name!r}]: expected a tensor or lists, got {_short(values)}")
    rows = values if values and all(map(_is_list, values)) else [values]
    for row, line in enumerate(rows):
        if name == "input_ids" and not all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in line):
            raise TypeError(f"inputs[{name!r}] (prompt {row}): expected token ids, got {_short(line)}")
    return [list(line) for line in rows]


def _table(name: str, rows: list[list[Any]], pad: int) -> torch.Tensor:
    """[B, longest], padded on the left where the rows are a tokenizer's."""
    longest = max(map(len, rows))
    if name not in _RAGGED and any(len(line) < longest for line in rows):
        raise ValueError(f"inputs[{name!r}]: expected rows of one length, got {[len(line) for line in rows]}")
    return torch.tensor([[pad] * (longest - len(line)) + line for line in rows])


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{type(value).__name__} {shown[:50]}..."
