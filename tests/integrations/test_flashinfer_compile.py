"""FlashInfer's functions under torch.compile: with graph breaks what they are without, with fullgraph an error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsample.integrations import flashinfer as fi

P = torch.softmax(torch.randn(5, 60, generator=torch.Generator().manual_seed(1)) * 2, -1)
IDS = torch.arange(15).view(5, 3)
DRAFT, TARGET = P[:, None].expand(-1, 3, -1), P.flip(0)[:, None].expand(-1, 4, -1)

CALLS: dict[str, Callable[..., Any]] = {
    "sampling_from_logits": lambda p, **seed: fi.sampling_from_logits(p.log(), **seed),
    "top_k_top_p_sampling_from_logits": lambda p, **seed: fi.top_k_top_p_sampling_from_logits(p.log(), 9, 0.9, **seed),
    "sampling_from_probs": lambda p, **seed: fi.sampling_from_probs(p, return_valid=True, **seed),
    "top_p_sampling_from_probs": lambda p, **seed: fi.top_p_sampling_from_probs(p, 0.9, **seed),
    "top_k_sampling_from_probs": lambda p, **seed: fi.top_k_sampling_from_probs(p, 9, **seed),
    "min_p_sampling_from_probs": lambda p, **seed: fi.min_p_sampling_from_probs(p, 0.01, **seed),
    "top_k_top_p_sampling_from_probs": lambda p, **seed: fi.top_k_top_p_sampling_from_probs(p, 9, 0.9, **seed),
    "chain_speculative_sampling": lambda p, **seed: fi.chain_speculative_sampling(DRAFT * 1, IDS, TARGET * 1, **seed),
    "top_p_renorm_probs": lambda p, **seed: fi.top_p_renorm_probs(p, 0.9),
    "top_k_renorm_probs": lambda p, **seed: fi.top_k_renorm_probs(p, 9),
    "top_k_mask_logits": lambda p, **seed: fi.top_k_mask_logits(p.log(), 9),
    "softmax": lambda p, **seed: fi.softmax(p.log(), 0.7),
}

SEEDS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "int": lambda: {"seed": 7, "offset": 3},
    "one": lambda: {"seed": torch.tensor([7]), "offset": torch.tensor([3])},
    "each": lambda: {"seed": torch.arange(5), "offset": torch.arange(5)},
    "generator": lambda: {"generator": torch.Generator().manual_seed(5)},
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def flat(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def test_every_function_is_here() -> None:
    assert set(CALLS) == {name for name in fi.__all__ if not name.endswith("renorm_prob")}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CALLS)
def test_graph_breaks(name: str, seed: str) -> None:
    def step(p: torch.Tensor, given: dict[str, Any]) -> Any:
        return flat(CALLS[name](p * 1, **given))

    compiled = torch.compile(step, backend="eager")
    for p in (P, P, P.flip(1)):
        torch.manual_seed(11)
        got = compiled(p, SEEDS[seed]())
        torch.manual_seed(11)
        for a, b in zip(got, step(p, SEEDS[seed]()), strict=True):
            assert torch.equal(a, b)


def test_the_seed_may_change_each_step() -> None:
    compiled = torch.compile(lambda p, i: fi.sampling_from_probs(p * 1, seed=i, offset=i + 1), backend="eager")
    for i in range(6):
        assert torch.equal(compiled(P, i), fi.sampling_from_probs(P, seed=i, offset=i + 1))


def test_errors_come_through() -> None:
    compiled = torch.compile(lambda p: fi.top_k_sampling_from_probs(p * 1, 0), backend="eager")
    with pytest.raises(ValueError, match="top_k = 0"):
        compiled(P)


def test_counters_are_added_to_in_place() -> None:
    def step(count: torch.Tensor) -> Any:
        return fi.chain_speculative_sampling(DRAFT * 1, IDS, TARGET * 1, count, seed=1)

    count, again = torch.zeros(5, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    torch.compile(step, backend="eager")(count)
    step(again)
    assert torch.equal(count, again)


@pytest.mark.parametrize("seed", ["none", "int", "each"])
@pytest.mark.parametrize("name", CALLS)
def test_a_full_graph_is_refused_by_name(name: str, seed: str) -> None:
    given = SEEDS[seed]()
    compiled = torch.compile(lambda p: CALLS[name](p * 1, **given), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=rf"\b{name}\b"):
        compiled(P)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", CALLS)
def test_a_jit_trace_is_refused_by_name(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^{name}: torch\.jit\.trace cannot record it"):
        torch.jit.trace(lambda p: CALLS[name](p, seed=1), (P,), check_trace=False)


def test_eager_calls_load_no_compiler() -> None:
    code = """
import sys, torch
from fastsample.integrations import flashinfer as fi
fi.sampling_from_probs(torch.ones(1, 3), seed=1)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, timeout=120)
