"""Rows whose parts lie on a device, and are decided on the host: what that takes, and what it gives back."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from fastsample.backends import Outputs
from fastsample.checks import CPU
from fastsample.inputs import Rows

Tensor = torch.Tensor

BUFFERS = tuple(field.name for field in fields(Outputs) if "Tensor" in str(field.type))


def rows_on_host(rows: Rows) -> Rows:
    """The same with parameters, seeds and offsets there. Masks, biases and ids are of use to the parts alone."""
    records, seeds, offsets = (t.to(CPU) for t in (rows.records, rows.seeds, rows.offsets))
    return replace(rows, records=records, seeds=seeds, offsets=offsets, native=None, slots=None)


def outputs_on_host(out: Outputs) -> Outputs:
    """Buffers like these; `given` is what it was."""
    own = replace(out, names=None)
    for name in BUFFERS:
        if (buffer := getattr(out, name)) is not None:
            there = buffer.to(CPU) if name == "given" else torch.empty_like(buffer, device=CPU)
            setattr(own, name, there)
    return own


def give_back(own: Outputs, out: Outputs) -> None:
    """Copy the outputs to where they were wanted."""
    for name in BUFFERS:
        if name != "given" and (buffer := getattr(out, name)) is not None:
            buffer.copy_(getattr(own, name))
