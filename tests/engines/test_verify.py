"""Verification by drawing, in every engine: what comes out is the text of plain decoding, token for token."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import drafts
import pytest
import torch
from conformance import ulps_apart
from drafts import BLOCKS, OFFSET, Block
from simt_engine import How, Simt, as_backend, build, compiler

import fastsample as fs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no effect without"),  # among the sets on purpose
    pytest.mark.usefixtures("remembered"),
]

SUPPORT = Path(drafts.__file__).parent
NAMES = list(BLOCKS)
FEW = NAMES[::9] + NAMES[-9:]


@cache
def drafted(name: str) -> torch.Tensor:
    return BLOCKS[name].drafted()


@cache
def texts(name: str) -> list[dict[str, Any]]:
    ids = drafted(name).tolist()
    return [BLOCKS[name].text(request, line, 3 if BLOCKS[name].vocab > 2 else 1) for request, line in enumerate(ids)]


def assert_text(name: str, found: dict[str, torch.Tensor]) -> None:
    """Every output against plain decoding, and padding after it."""
    padding = {"tokens": -1, "logprobs": torch.nan, "ranks": 0, "top_ids": -1, "top_logprobs": torch.nan}
    padding |= {"kept_count": 0, "kept_bitmask": 0, "log_kept_mass": torch.nan, "entropy": torch.nan}
    for request, text in enumerate(texts(name)):
        for key in ("num_accepted", "status"):
            assert int(found[key][request]) == text[key][0], key
        for key, empty in padding.items():
            if key not in found:
                continue
            own, there = found[key][request], len(text["tokens"])
            expected = torch.stack(text[key])
            if key.endswith(("logprobs", "log_kept_mass", "entropy")):
                assert bool((ulps_apart(own[:there], expected) <= 2).all()), key
            else:
                assert torch.equal(own[:there], expected), key
            rest = own[there:]
            assert torch.equal(rest, torch.full_like(rest, empty)) or bool(rest.isnan().all()), key


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW or i % 3 == 0 else pytest.mark.slow) for i, n in enumerate(NAMES)]
)
def test_is_plain_decoding(name: str, variant: str) -> None:
    assert_text(name, BLOCKS[name].ask(variant, drafted(name), 3 if BLOCKS[name].vocab > 2 else 1))


@pytest.mark.parametrize("name", FEW)
def test_reference_is_plain_decoding(name: str) -> None:
    assert_text(name, BLOCKS[name].ask("reference", drafted(name), 3 if BLOCKS[name].vocab > 2 else 1))


def test_some_drafts_are_accepted_and_some_are_not() -> None:
    """Else the tests above would show little."""
    counts = [(text["num_accepted"][0], BLOCKS[name].drafts) for name in FEW for text in texts(name)]
    assert sum(0 < accepted < most for accepted, most in counts) > 20
    assert sum(accepted == most > 0 for accepted, most in counts) > 20
    assert sum(accepted == 0 < most for accepted, most in counts) > 10


@pytest.mark.parametrize(
    "how", [How("block"), How("cluster", 2), How("grid", 3, 64, 2, "descending")], ids=lambda how: how.policy
)
@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_cuda_on_fibers(how: How, once: Callable[[str, Callable[[Path], object]], Path]) -> None:
    simt = Simt(once("simt", build) / "simt.so")
    simt.how = how
    with as_backend(simt):
        for name in FEW:
            assert_text(name, BLOCKS[name].ask("cuda", drafted(name), 3 if BLOCKS[name].vocab > 2 else 1))


@pytest.mark.parametrize("capacity", [0, 9])
@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_cuda_lists_the_sets_of_a_verification(
    capacity: int, once: Callable[[str, Callable[[Path], object]], Path]
) -> None:
    """Padded rows list none."""
    block = Block("p.9", 130, 5, 3)
    logits, given = block.build()
    more = {"seed": block.seeds, "offset": OFFSET, "kept": "ids", "kept_capacity": capacity}
    simt = Simt(once("simt", build) / "simt.so")
    with as_backend(simt):
        found, expected = (
            fs.verify(logits, block.drafted(), backend=backend, **more, **given) for backend in ("cuda", "reference")
        )
    assert found.kept_row_ptr is not None
    assert found.kept_ids is not None
    assert torch.equal(found.kept_row_ptr, expected.kept_row_ptr)
    assert torch.equal(found.kept_ids, expected.kept_ids)
    assert int((found.kept_row_ptr.diff() == 0).sum()) >= 5


def test_triton_interpreted(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    given, found = tmp_path / "drafts.pt", tmp_path / "found.pt"
    torch.save({name: drafted(name) for name in FEW[::2]}, given)
    command = [sys.executable, SUPPORT / "drafts.py", given, found]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, outputs in torch.load(found).items():
        assert_text(name, outputs)


# Trees ---------------------------------------------------------------------------------------------------------------


def grown(block: Block, pick: random.Random, nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Trees whose nodes are often what their parent's row draws, sometimes twice, and sometimes in no tree."""
    _, given = block.build()
    logits = tree_logits(block, nodes)
    tokens, parents = [], []
    for request in range(block.requests):
        own, above = [block.vocab], [-1]
        for node in range(1, nodes):
            parent = pick.choice([-1, *range(node), *range(max(0, node - 2), node)])
            right = drawn_at(block, given, logits, request, own, above, parent) if parent >= 0 else 0
            own.append(pick.choice([right, right, right, pick.randrange(block.vocab), -1]))
            above.append(parent)
        tokens.append(own)
        parents.append(above)
    return torch.tensor(tokens), torch.tensor(parents)


def tree_logits(block: Block, nodes: int) -> torch.Tensor:
    return torch.randn(block.requests, nodes, block.vocab, generator=torch.Generator().manual_seed(nodes)) * 3


def drawn_at(block: Block, given: Any, logits: Any, request: int, own: list[int], above: list[int], node: int) -> int:
    """The plain draw of a node's row, after the tokens on the way to it."""
    way, at = [], node
    while at > 0:
        way.append(own[at])
        at = above[at]
    fields = block.of_row(given, request, 0, way[::-1])
    offset = (OFFSET + len(way)) % 2**64
    return int(fs.sample(logits[request, node][None], offset=offset, backend="reference", **fields).tokens)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("params", ["plain", "all-hf", "greedy", "penalties", "ngrams"])
def test_tree_is_plain_decoding(params: str, backend: str) -> None:
    block = Block(params, 7, 12, 0, extra="ids" if params == "penalties" else "repeats" if params == "ngrams" else None)
    nodes = 9
    tokens, parents = grown(block, random.Random(params), nodes)
    logits, (_, given) = tree_logits(block, nodes), block.build()
    more = {"seed": block.seeds, "offset": OFFSET, "backend": backend, "on_invalid": "flag"}
    out = fs.verify_tree(logits, tokens, parents, **more, **given)
    for request in range(block.requests):
        own, above = tokens[request].tolist(), parents[request].tolist()
        path, text = [0], []
        while True:
            token = drawn_at(block, given, logits, request, own, above, path[-1])
            text += [token] if token >= 0 else []
            child = [n for n in range(1, nodes) if above[n] == path[-1] and own[n] == token >= 0]
            if not child:
                break
            path.append(child[0])
        assert out.tokens[request].tolist() == text + [-1] * (nodes - len(text))
        assert out.path is not None
        assert out.path[request].tolist() == path + [-1] * (nodes - len(path))
        assert int(out.num_accepted[request]) == len(path) - 1
    assert int(out.num_accepted.max()) >= 2
