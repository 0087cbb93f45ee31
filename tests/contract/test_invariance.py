"""A row's token depends on nothing but the row: not on its batch, slot, memory, threads, process or float state."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asked import BY_ROW, KEPT
from cases import EXTRAS, PARAMS

import fastsample as fs
from fastsample.backends.cpu import native

# Penalties without ids are among the cases on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect without")

BACKENDS = ("reference", "cpu")
ROWS, VOCAB = 24, 9001  # enough for more than two threads


class Batch:
    """Rows that can be taken apart and put together again in any order."""

    def __init__(self, rows: int = ROWS, vocab: int = VOCAB, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(rows, vocab, generator=g) * 4
        self.logits[::5] = (self.logits[::5] * 2).round() / 2
        self.params = {**PARAMS["rows"](vocab, rows), "repetition_penalty": [1.0 + i % 3 for i in range(rows)]}
        self.seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g)
        self.offsets = torch.randint(0, 2**62, (rows,), generator=g)
        self.extras = {k: v for n in ("mask", "ids_lists", "bias") for k, v in EXTRAS[n](self.logits, g)[1].items()}

    def sample(
        self, order: list[int] | None = None, logits: torch.Tensor | None = None, **more: Any
    ) -> fs.SampleOutput:
        """The rows named in `order`, in that order."""
        order = list(range(len(self.seeds))) if order is None else order

        def take(value: Any) -> Any:
            return [value[i] for i in order] if isinstance(value, list) else value[order]

        kwargs = {name: take(value) for name, value in {**self.params, **self.extras}.items()}
        x = take(self.logits) if logits is None else logits
        kwargs |= {"num_samples": 2, "logprobs": "processed", "top_logprobs": min(4, x.shape[1]), **KEPT}
        kwargs |= {"backend": "cpu", "on_invalid": "flag", **more}
        return fs.sample(x, **kwargs, seed=self.seeds[order], offset=self.offsets[order])


def check(got: fs.SampleOutput, want: fs.SampleOutput, rows: Any = slice(None)) -> None:
    """Equal in everything, the logprobs to the bit: it is the same engine."""
    for name in BY_ROW:
        a, b = getattr(got, name), getattr(want, name)[rows]
        kind = torch.int32 if a.dtype == torch.float32 else a.dtype
        assert torch.equal(a.view(kind), b.view(kind)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_alone_and_in_any_company(backend: str) -> None:
    batch = Batch() if backend == "cpu" else Batch(vocab=700)
    whole = batch.sample(backend=backend)
    assert int(whole.status.sum()) == 0
    for i in range(ROWS):
        check(batch.sample([i], backend=backend), whole, [i])
    for order in ([5, 3], list(range(ROWS))[::-1], [7] * 9, [*range(11, 20), 0, 0, 23], list(range(ROWS)) * 3):
        check(batch.sample(order, backend=backend), whole, order)


def test_full_rows_alone_and_in_company() -> None:
    batch = Batch()
    for call in (fs.filter_logits, fs.probabilities):
        whole = call(batch.logits, **batch.params, **batch.extras)
        for i in (0, 1, 4, 13, ROWS - 1):
            own = {n: [v[i]] if isinstance(v, list) else v[[i]] for n, v in {**batch.params, **batch.extras}.items()}
            assert torch.equal(call(batch.logits[i : i + 1], **own)[0], whole[i])


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 16])
def test_any_number_of_threads(threads: int) -> None:
    batch = Batch(rows=60, vocab=20_000)
    fs.set_num_threads(1)
    want = batch.sample()
    fs.set_num_threads(threads)
    for _ in range(5):
        check(batch.sample(), want)


def test_any_instruction_set(variant: str) -> None:
    """`variant` forces one; the best is the default."""
    got = Batch().sample(backend=variant)
    current = native().isa()
    native().force_isa(native().isas()[0])
    want = Batch().sample()
    native().force_isa(current)
    for name in ("tokens", "ranks", "top_ids"):
        assert torch.equal(getattr(got, name), getattr(want, name))


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values elsewhere in memory."""
    rows, vocab = x.shape
    found = {}
    for pad, start in ((1, 0), (1, 1), (7, 3), (64, 5), (vocab, 0)):
        wide = torch.full((rows, vocab + pad), torch.nan, dtype=x.dtype)
        wide[:, start : start + vocab] = x
        found[f"pad {pad}, start {start}"] = wide[:, start : start + vocab]
    for shift in (1, 2, 3, 5, 9, 31):
        line = torch.full((rows * vocab + shift,), torch.nan, dtype=x.dtype)
        line[shift:] = x.flatten()
        found[f"shift {shift}"] = line[shift:].view(rows, vocab)
    found["three-dimensional view"] = x.repeat_interleave(3, 0).view(rows, 3, vocab)[:, 1]
    around = torch.full_like(x, torch.nan)
    found["larger storage"] = torch.cat([around, x, around])[rows : 2 * rows]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 3, 65, 300, VOCAB])
def test_any_memory_layout(vocab: int, dtype: torch.dtype) -> None:
    batch = Batch(rows=6, vocab=vocab)
    x = batch.logits.to(dtype)
    want = batch.sample(logits=x)
    for name, view in layouts(x).items():
        assert torch.equal(view, x), name
        check(batch.sample(logits=view), want)


def test_expanded_rows() -> None:
    x = Batch().logits[:1]
    kwargs = {"seed": 3, "top_p": 0.9, "backend": "cpu"}
    want = fs.sample(x.repeat(9, 1), **kwargs).tokens
    assert torch.equal(fs.sample(x.expand(9, -1), **kwargs).tokens, want)
    assert want.unique().numel() > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_16_bit_row_is_its_float32_values(backend: str, dtype: torch.dtype) -> None:
    batch = Batch(vocab=VOCAB if backend == "cpu" else 700)
    x = batch.logits.to(dtype)
    check(batch.sample(logits=x, backend=backend), batch.sample(logits=x.float(), backend=backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_right(dtype: torch.dtype, variant: str) -> None:
    """All bit patterns above -inf, subnormals too, come back from filter_logits as torch converts them."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = bits[bits.float().isfinite()]
    got = fs.filter_logits(x, backend=variant)
    assert torch.equal(got.view(torch.int32), x.float().view(torch.int32))


def test_calls_of_any_size_follow_each_other() -> None:
    """Scratch is reused: nothing of a larger, wider or richer call shows in the next."""
    batches = [Batch(rows=rows, vocab=vocab) for rows, vocab in ((2, 40_000), (3, 1), (9, 257), (1, 256), (5, 4097))]
    fresh = [batch.sample() for batch in batches]
    for order in ((0, 1, 2, 3, 4), (4, 0, 3, 0, 1, 2), (2, 2, 0, 0, 4, 1)):
        for i in order:
            check(batches[i].sample(), fresh[i])
            plain = fs.sample(batches[i].logits, seed=1, backend="cpu").tokens
            assert torch.equal(plain, fs.sample(batches[i].logits, seed=1, backend="reference").tokens)


def test_many_threads_call_at_once() -> None:
    batches = [Batch(rows=12, vocab=3000 * (1 + i % 4), seed=i) for i in range(8)]
    fs.set_num_threads(3)
    want = [batch.sample() for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        calls = [(i, pool.submit(batches[i].sample)) for _ in range(15) for i in range(8)]
        for i, call in calls:
            check(call.result(timeout=120), want[i])


FORK = """
import multiprocessing, os, sys, threading
import torch, fastsample as fs

torch.set_num_threads(1)  # torch's own threads do not survive a fork; fastsample's must
x = torch.randn(64, 8000, generator=torch.Generator().manual_seed(1))
draw = lambda: fs.sample(x, seed=5, top_p=0.9, backend="cpu").tokens.tolist()

def child(pipe):
    fs.set_num_threads(int(sys.argv[1]))
    pipe.send([draw(), draw()])
    os.waitpid(os.fork() or end(), 0)  # and a grandchild

def end():
    os._exit(0 if draw() == want else 3)

fs.set_num_threads(4)
want = draw()  # the pool is running now
context = multiprocessing.get_context("fork")
for _ in range(3):
    receive, send = context.Pipe(False)
    process = context.Process(target=child, args=(send,))
    process.start()
    assert receive.poll(60), "the forked child hangs"
    assert receive.recv() == [want, want]
    process.join(60)
    assert process.exitcode == 0
    assert draw() == want
print("same")
"""


@pytest.mark.parametrize("threads", [1, 4])
def test_after_a_fork(threads: int, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, str(threads)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("same\n", "")


# Float state ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def flush_denormal() -> Iterator[None]:
    assert torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


SUBNORMAL = torch.randn(8, 3000, generator=torch.Generator().manual_seed(4)) * 1e-39
SUBNORMAL_FIELDS = {"top_k": 900, "top_p": 0.9, "temperature": 1.0001e-5, "repetition_penalty": 3.0}
SUBNORMAL_FIELDS |= {"output_ids": [list(range(500))] * 8, "backend": "cpu"}
SUBNORMAL_WANT = [
    fs.sample(SUBNORMAL, **{**SUBNORMAL_FIELDS, "backend": "reference"}, seed=1, num_samples=3).tokens,
    fs.filter_logits(SUBNORMAL, **{**SUBNORMAL_FIELDS, "backend": "reference"}).view(torch.int32),
    fs.sample(SUBNORMAL, temperature=0.0, backend="reference").tokens,
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("flush_denormal")
def test_flush_denormal_changes_nothing(threads: int) -> None:
    fs.set_num_threads(threads)
    got = [
        fs.sample(SUBNORMAL, **SUBNORMAL_FIELDS, seed=1, num_samples=3).tokens,
        fs.filter_logits(SUBNORMAL, **SUBNORMAL_FIELDS).view(torch.int32),
        fs.sample(SUBNORMAL, temperature=0.0, backend="cpu").tokens,
    ]
    assert all(map(torch.equal, got, SUBNORMAL_WANT))
    # The caller's choice is still in force: a subnormal product is 0.
    assert float(np.multiply(np.float32(1e-30), np.float32(1e-10))) == 0.0


def test_the_subnormals_matter() -> None:
    """Flushing them to 0 would tie every token."""
    assert SUBNORMAL_WANT[2].unique().numel() == 8
    assert float(np.multiply(np.float32(1e-30), np.float32(1e-10))) > 0.0


def test_torch_threads_and_grad_mode_do_not_matter() -> None:
    batch = Batch()
    want = batch.sample()
    with torch.inference_mode():
        check(batch.sample(), want)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    got = batch.sample()
    torch.set_num_threads(before)
    check(got, want)
    torch.use_deterministic_algorithms(True)
    got = batch.sample()
    torch.use_deterministic_algorithms(False)
    check(got, want)


def test_default_dtype_does_not_matter() -> None:
    batch = Batch(vocab=500)
    want, full = batch.sample(backend="reference"), fs.filter_logits(batch.logits, **batch.params)
    torch.set_default_dtype(torch.float64)
    got = [batch.sample(backend=backend) for backend in BACKENDS]
    again = [fs.filter_logits(batch.logits, **batch.params, backend=backend) for backend in BACKENDS]
    torch.set_default_dtype(torch.float32)
    for out, table in zip(got, again, strict=True):
        assert torch.equal(out.tokens, want.tokens)
        assert torch.equal(table, full)
