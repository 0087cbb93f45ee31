"""The native ABI: Python packs the records that the extensions read, or the engine cannot serve."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastsample as fs
from fastsample.backends import Outputs, cpu, native
from fastsample.inputs import Bias, Rows
from fastsample.outputs import REPORTED, Options
from fastsample.reports import Layout

RECORDS = (
    *("PARAM_FIELDS", "ROW_FIELDS", "LOGITS_FIELDS", "OUTPUT_FIELDS", "REPORT_FIELDS", "DRAFT_FIELDS"),
    *("PART_FIELDS", "PART_QUERY_FIELDS", "SEARCH_QUERY_FIELDS", "DRAW_QUERY_FIELDS", "SPLIT_FIELDS"),
)


def words(packed: bytes, fields: tuple[str, ...]) -> dict[str, int]:
    assert len(packed) == 8 * len(fields)
    return dict(zip(fields, memoryview(packed).cast("q").tolist(), strict=True))


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("change", [lambda fields: fields[::-1], lambda fields: fields[1:], lambda fields: None])
def test_an_extension_with_other_fields_cannot_serve(record: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(**{name: getattr(cpu.native(), name) for name in RECORDS})
    monkeypatch.setattr(cpu, "import_module", lambda name: module)
    assert cpu._load() == (module, None)
    setattr(module, record, change(getattr(module, record)))
    found, reason = cpu._load()
    assert found is None
    assert reason is not None
    assert reason.startswith(
        "fastsample._cpu was built for other " + ("parameters" if "PARAM" in record else "argument")
    )


@pytest.mark.parametrize("change", [lambda packed: packed[8:], lambda packed: packed + bytes(8), bytearray, list])
def test_only_bytes_of_a_records_size_are_read(change: Any) -> None:
    zeros = torch.zeros(1, dtype=torch.int64)
    kept, logits, out = Rows(fs.SamplingParams().pack(), zeros, zeros), torch.zeros(1, 9), Outputs(zeros.int(), zeros)
    rows, call, run = native.row_arguments(kept), native.call_arguments(logits, out), cpu.native().run
    assert run(rows, call, 1, False) == 0
    with pytest.raises(TypeError):
        run(change(rows), call, 1, False)
    with pytest.raises(TypeError):
        run(rows, change(call), 1, False)


def test_every_tensor_has_its_words() -> None:
    ids = torch.arange(12).view(3, 4)[:, 1:]
    mask = torch.zeros(1, 2, dtype=torch.int32)
    bias = Bias(torch.tensor([0, 1, 1, 2]), torch.tensor([3, 4]), torch.tensor([1.0, 2.0]), 40)
    rows = Rows(fs.SamplingParams(top_k=[1, 2, 3]).pack(), torch.zeros(3).long(), torch.zeros(1).long())
    rows.bitmask, rows.bias, rows.prompt_ids, rows.output_ids = mask, bias, ids, ids[:, 1:]
    rows.breakers = torch.tensor([[7, 8, 9, -1, -1]])
    rows.drafted_ids, rows.requests, rows.part = ids[:, 2:], torch.tensor([0, 0, 1]), (5, 40)
    found = words(native.row_arguments(rows), native.ROW_FIELDS)
    assert found == {
        "params": rows.records.data_ptr(),
        "params_stride": rows.records.shape[1],
        "seeds": rows.seeds.data_ptr(),
        "seeds_stride": 1,
        "offsets": rows.offsets.data_ptr(),
        "offsets_stride": 0,
        "num_offsets": 1,
        "mask": mask.data_ptr(),
        "mask_stride": 0,
        "mask_words": 2,
        "bias_row_ptr": bias.row_ptr.data_ptr(),
        "bias_ids": bias.ids.data_ptr(),
        "bias_values": bias.values.data_ptr(),
        "bias_entries": 2,
        "prompt": ids.data_ptr(),
        "prompt_stride": 4,
        "prompt_length": 3,
        "output": ids.data_ptr() + 8,
        "output_stride": 4,
        "output_length": 2,
        "breakers": rows.breakers.data_ptr(),
        "breakers_stride": 0,
        "breakers_length": 5,
        "drafted": ids.data_ptr() + 16,
        "drafted_stride": 4,
        "drafted_length": 1,
        "requests": rows.requests.data_ptr(),
        "first_id": 5,
        "num_ids": 40,
    }
    without = words(native.row_arguments(Rows(rows.records, rows.seeds, rows.offsets)), native.ROW_FIELDS)
    differs = {name for name in found if without[name] != found[name]}
    assert differs >= {"mask", "bias_row_ptr", "prompt", "output", "breakers"}
    assert without["mask_words"] == -1


@pytest.mark.parametrize("more", [True, False])
def test_every_output_has_its_words(more: bool) -> None:
    logits = torch.zeros(3, 50, dtype=torch.bfloat16)[:, :40]
    status, tokens, floats = torch.zeros(3).int(), torch.zeros(3, 2).long(), torch.zeros(5, 3, 2)
    out = Outputs(status, tokens, num_samples=2)
    if more:
        out.filtered, out.probabilities, out.mode, out.logprobs = floats[0], floats[1], "processed", floats[2]
        out.ranks, out.top_ids, out.top_logprobs, out.num_top = tokens + 1, tokens + 2, floats[3], 2
        out.kept_count, out.kept_bitmask = status + 1, tokens.int()
        out.log_kept_mass, out.entropy = floats[4, :, 0].clone(), floats[4, :, 1].clone()
    fields = native.LOGITS_FIELDS + native.OUTPUT_FIELDS
    given = {name: getattr(out, name, None) for name in native.OUTPUT_FIELDS}
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == (12 if more else 2)
    assert words(native.call_arguments(logits, out), fields) == {
        **dict.fromkeys(fields, 0),
        "logits": logits.data_ptr(),
        "logits_stride": 50,
        "rows": 3,
        "vocab": 40,
        "dtype": 2,
        "num_samples": 2,
        "num_top": 2 if more else 0,
        "mode": 2 if more else 0,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    }


def test_a_buffer_whose_memory_moves_is_followed() -> None:
    logits = torch.randn(1, 50)
    want = [int(fs.Sampler(batch_size=1, seed=1, offset=i)(logits).tokens) for i in range(4)]
    sampler = fs.Sampler(batch_size=1, seed=1)
    out = sampler(logits)
    moves = (lambda: None, lambda: out.tokens.resize_(100000), lambda: out.tokens.set_(torch.zeros(1).long()))
    for move, token in zip(moves, want[1:], strict=True):
        move()  # the tensor stays the same object
        sampler(logits, out=out)
        assert int(out.tokens[0]) == token


def test_every_report_has_its_place() -> None:
    """None overlaps another, and each begins where its numbers are aligned."""
    given = Options(kept="bitmask", kept_mass=True, entropy=True), (3,), 70
    layout = Layout(REPORTED, True, *given)
    found = words(native.report_arguments(layout.size, layout.starts), native.REPORT_FIELDS)
    sizes = {"kept_count": 12, "kept_bitmask": 36, "log_kept_mass": 12, "entropy": 12, "kept_row_ptr": 32}
    assert list(found) == ["bytes", *sizes]
    end = 0
    for start, name in sorted((found[name], name) for name in sizes):
        assert start % 8 == 0
        assert start >= end
        end = start + sizes[name]
    assert end <= found["bytes"]
    nothing = Layout((), False, *given)
    assert set(words(native.report_arguments(nothing.size, nothing.starts), native.REPORT_FIELDS).values()) == {0, -1}
