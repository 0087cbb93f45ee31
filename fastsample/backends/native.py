"""The native ABI: packs calls of both extensions into the records that csrc/core/arguments.h declares.

The records hold addresses and keep no tensor alive.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from typing import Any

import torch

from fastsample.backends import DTYPES, INPUTS, MODES, Outputs
from fastsample.inputs import Rows
from fastsample.outputs import FIELDS, REPORTED, listed
from fastsample.params import specs

ROW_FIELDS = (
    *("params", "params_stride", "seeds", "seeds_stride", "offsets", "offsets_stride", "num_offsets"),
    *("mask", "mask_stride", "mask_words"),
    *("bias_row_ptr", "bias_ids", "bias_values", "bias_entries"),
    *("prompt", "prompt_stride", "prompt_length"),
    *("output", "output_stride", "output_length"),
    *("breakers", "breakers_stride", "breakers_length"),
    *("drafted", "drafted_stride", "drafted_length"),
    *("requests", "first_id", "num_ids"),
)
LOGITS_FIELDS = ("logits", "logits_stride", "rows", "vocab", "dtype", "input")
_BUFFERS = (*(field.name for field in FIELDS), "given")
OUTPUT_FIELDS = (*_BUFFERS, "num_samples", "num_top", "mode")
REPORT_FIELDS = ("bytes", *REPORTED, "kept_row_ptr")
DRAFT_FIELDS = ("ids", "count", "num_accepted", "draft_status", "arrivals")
PART_FIELDS = ("queries", "start", "question", "wants", "count", "details", "answers", "words", "bitmask")
PART_QUERY_FIELDS = ("high", "low", "floor", "top", "coin", "peak", "scale", "judged_scale", "total", "rest")
SEARCH_QUERY_FIELDS = ("ranks", "by", "target", "mean")
DRAW_QUERY_FIELDS = ("seed", "offset", "rank", "ranks")
SPLIT_FIELDS = (
    *("start", "vocab", "rank", "ranks", "told", "told_words", "listed", "raw_listed"),
    *("keeps_all", "judges", "tells_edits", "queries", "raw_queries", "wanted"),
    *("tells_sums", "may_tell_sums", "asks", "sums", "bins"),
    *("raw_logits", "raw_stride", "raw_dtype"),
)
"""The last five are of rows that are split over ranks (fastsample/distributed/answers.py)."""

# Packed in two parts, since most calls have no inputs.
_COLUMNS, _INPUTS = Struct("7q"), Struct("22q")
_NO_INPUTS = _INPUTS.pack(*(0, 0, -1), *(0, 0, 0, 0), *(0, 0, 0), *(0, 0, 0), *(0, 0, 0), *(0, 0, 0), *(0, 0, 0))
# So are outputs: status and tokens come first, and most calls want little else.
_FIRST = ("status", "tokens")
_HEAD = Struct(f"{len(LOGITS_FIELDS + _FIRST)}q")
_MORE, _NUMBERS = _BUFFERS[len(_FIRST) :], OUTPUT_FIELDS[len(_BUFFERS) :]
assert OUTPUT_FIELDS[: len(_FIRST)] == _FIRST


def mismatch(module: Any) -> str | None:
    """Why an extension cannot read these records, or None when it can."""
    for kind, record, ours in (
        ("parameters", "PARAM_FIELDS", tuple(name for name, _ in specs())),
        ("arguments", "ROW_FIELDS", ROW_FIELDS),
        ("arguments", "LOGITS_FIELDS", LOGITS_FIELDS),
        ("arguments", "OUTPUT_FIELDS", OUTPUT_FIELDS),
        ("arguments", "REPORT_FIELDS", REPORT_FIELDS),
        ("arguments", "DRAFT_FIELDS", DRAFT_FIELDS),
        ("arguments", "PART_FIELDS", PART_FIELDS),
        ("arguments", "PART_QUERY_FIELDS", PART_QUERY_FIELDS),
        ("arguments", "SEARCH_QUERY_FIELDS", SEARCH_QUERY_FIELDS),
        ("arguments", "DRAW_QUERY_FIELDS", DRAW_QUERY_FIELDS),
        ("arguments", "SPLIT_FIELDS", SPLIT_FIELDS),
    ):
        if (theirs := getattr(module, record, None)) != ours:
            return f"was built for other {kind}: {theirs}, not {ours}"
    return None


def row_arguments(rows: Rows) -> bytes:
    """RowArguments, kept in `rows.native` for the next step."""
    if rows.native is None:
        # A Sampler's steps with inputs share the columns of its slots.
        columns = _columns(rows) if rows.slots is None else row_arguments(rows.slots)[: _COLUMNS.size]
        rows.native = columns + _inputs(rows)
    packed: bytes = rows.native
    return packed


def _columns(rows: Rows) -> bytes:
    return _COLUMNS.pack(
        rows.records.data_ptr(),
        _row_stride(rows.records),
        rows.seeds.data_ptr(),
        _row_stride(rows.seeds),
        rows.offsets.data_ptr(),
        _row_stride(rows.offsets),
        rows.offsets.shape[0],
    )


def _inputs(rows: Rows) -> bytes:
    mask, bias, prompt, output = rows.bitmask, rows.bias, rows.prompt_ids, rows.output_ids
    breakers, drafted, requests = rows.breakers, rows.drafted_ids, rows.requests
    if mask is None and bias is None and prompt is None and output is None and breakers is None and drafted is None:
        return _NO_INPUTS
    return _INPUTS.pack(
        *((0, 0, -1) if mask is None else (mask.data_ptr(), _row_stride(mask), mask.shape[1])),
        *((0, 0, 0, 0) if bias is None else (*(part.data_ptr() for part in bias.tensors), bias.ids.numel())),
        *((0, 0, 0) if prompt is None else (prompt.data_ptr(), prompt.stride()[0], prompt.shape[1])),
        *((0, 0, 0) if output is None else (output.data_ptr(), output.stride()[0], output.shape[1])),
        *((0, 0, 0) if breakers is None else (breakers.data_ptr(), _row_stride(breakers), breakers.shape[1])),
        *((0, 0, 0) if drafted is None else (drafted.data_ptr(), drafted.stride()[0], drafted.shape[1])),
        0 if requests is None else requests.data_ptr(),
        *rows.part,
    )


def _row_stride(tensor: torch.Tensor) -> int:
    """0 where all rows share the first."""
    return tensor.stride()[0] if tensor.shape[0] > 1 else 0


def call_arguments(logits: torch.Tensor, out: Outputs) -> bytes:
    """CallArguments: logits and outputs. Addresses are read anew, since a tensor's memory may move."""
    shape = logits.shape
    head = _HEAD.pack(
        logits.data_ptr(),
        logits.stride()[0],  # takes less time than stride(0)
        shape[0],
        shape[1],
        DTYPES[logits.dtype],
        INPUTS[out.input],
        out.status.data_ptr(),
        0 if out.tokens is None else out.tokens.data_ptr(),
    )
    before, addresses, pack, after = _tail(out.names, out.num_samples, out.num_top, out.mode)
    return head + after if pack is None else head + before + pack(*addresses(out)) + after


@lru_cache(maxsize=256)
def _tail(names: tuple[str, ...] | None, *numbers: Any) -> tuple[bytes, Any, Any, bytes]:
    """How the rest of the record is made of an Outputs: what stands before the addresses, a function that gives them in
    a tuple, one that packs them, and what comes after. `names` are of the buffers that it has, None: any."""
    *counts, mode = numbers
    end = Struct(f"{len(_NUMBERS)}q").pack(*counts, MODES[mode])
    places = range(len(_MORE)) if names is None else [i for i, name in enumerate(_MORE) if name in names]
    if not places:
        return b"", None, None, bytes(8 * len(_MORE)) + end
    first, last = min(places), max(places) + 1
    address = "0 if a.{0} is None else a.{0}.data_ptr()" if names is None else "a.{0}.data_ptr()"
    given = [address.format(name) if i in places else "0" for i, name in enumerate(_MORE)]
    pack = Struct(f"{last - first}q").pack
    return bytes(8 * first), listed(given[first:last]), pack, bytes(8 * (len(_MORE) - last)) + end


_DRAFTS = Struct("5q")


def draft_arguments(ids: torch.Tensor, accepted: torch.Tensor, ends: torch.Tensor, arrivals: int = 0) -> bytes:
    """DraftArguments."""
    return _DRAFTS.pack(ids.data_ptr(), ids.shape[1], accepted.data_ptr(), ends.data_ptr(), arrivals)


_REPORT = Struct(f"{len(REPORT_FIELDS)}q")


def report_arguments(size: int, places: dict[str, int]) -> bytes:
    """ReportArguments: so many bytes, and where in them each output begins."""
    return _REPORT.pack(size, *(places.get(name, -1) for name in REPORT_FIELDS[1:]))
