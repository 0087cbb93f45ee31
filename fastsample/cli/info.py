"""What `fastsample info` prints: what can run on this machine."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastsample.backends import engines, select
from fastsample.backends.cpu import native
from fastsample.cli import gguf
from fastsample.cli.model import shipped_model
from fastsample.cli.output import RefusedError, print_json, print_table
from fastsample.threads import get_num_threads


def print_info(as_json: bool) -> None:
    """Engines, instruction set, threads, versions and the model that ships."""
    ready = {name: why_not or "ready" for name, why_not in engines().items()}
    other = {
        "backend auto": _auto(),
        "instruction set": _isa(),
        "threads": get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy", "transformers", "triton")},
        "model": _describe(shipped_model()),
        gguf.SMOLLM2: _smollm2(),
    }
    if as_json:
        print_json({"fastsample": version("fastsample"), "engines": ready, **other})
        return
    named = {f"engine {name}": state for name, state in ready.items()}
    print_table([(name, str(value)) for name, value in {"fastsample": version("fastsample"), **named, **other}.items()])


def _auto() -> str:
    """The engine that `auto` takes for CPU tensors, and what decides that."""
    asked = os.environ.get("FASTSAMPLE_BACKEND")
    try:
        name = select("auto", torch.zeros(1, 2)).name
    except (ValueError, RuntimeError) as error:
        return f"refused: FASTSAMPLE_BACKEND: {error}"
    return f"{name} (FASTSAMPLE_BACKEND = {asked!r})" if asked else f"{name} (FASTSAMPLE_BACKEND is not set)"


def _isa() -> str:
    """What the C++ engine runs, and what else this CPU could."""
    try:
        module = native()
        chosen = str(module.isa())
    except (RuntimeError, ValueError) as error:  # ValueError: FASTSAMPLE_ISA asks for one that this CPU cannot run
        return str(error)
    others = [name for name in module.isas() if name != chosen]
    return f"{chosen} (also here: {', '.join(others)})" if others else chosen


def _version(package: str) -> str:
    """Installed version, read without importing the package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _smollm2() -> str:
    try:
        return Path(gguf.smollm2()).name
    except RefusedError as error:
        return str(error).partition(": ")[2]


def _describe(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = sum(file.stat().st_size for file in folder.iterdir())
    except OSError:
        return "not installed"
    shape = f"vocabulary {config['vocab_size']}, context {config['n_positions']}"
    return f"{folder.name}: {config['n_layer']} layers of {config['n_embd']}, {shape}, {size / 2**20:.1f} MiB"
