"""torch.compile and torch.export: one graph, no recompilation, the tokens of an eager call to the bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from asked import KEPT

import fastsample as fs
from fastsample import ops
from fastsample.integrations import flashinfer
from fastsample.outputs import Options
from fastsample.params import specs

# Inductor imports torch's own deprecated parts.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

VOCAB = 300
STEPS = 4
GPU = torch.cuda.is_available()
both = pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def counted(name: str = "unique_graphs") -> int:
    assert not torch._dynamo.utils.counters["graph_break"]
    return int(torch._dynamo.utils.counters["stats"][name])


def compiled(function: Callable[..., Any], compiler: str = "aot_eager", **more: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=compiler, **more)


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    pairs = [(getattr(a, name), getattr(b, name)) for name in fs.SampleOutput.__slots__]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


class Model(torch.nn.Module):
    """The least that decodes: the next hidden state depends on the token."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.embedding = torch.nn.Parameter(torch.randn(VOCAB, 16, generator=g), requires_grad=False)
        self.head = torch.nn.Parameter(torch.randn(16, VOCAB, generator=g), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.embedding[tokens]) @ self.head


# One graph for every step ---------------------------------------------------------------------------------------------


@both
def test_a_decoding_step(compiler: str) -> None:
    """Parameters per row, seeds, offset and ids are tensors that change; nothing compiles anew."""
    model = Model()

    def step(tokens: torch.Tensor, output: torch.Tensor, offset: torch.Tensor, temperature: torch.Tensor) -> Any:
        x = model(tokens)
        out = fs.sample(
            x,
            temperature=temperature,
            top_k=40,
            top_p=0.95,
            frequency_penalty=0.2,
            seed=seeds,
            offset=offset,
            output_ids=output,
            logprobs="processed",
            top_logprobs=3,
        )
        return x, out

    seeds = torch.tensor([5, -6, 7])
    once = compiled(step, compiler)
    tokens, output = torch.tensor([1, 2, 3]), torch.full((3, STEPS), -1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(STEPS):
            temperature = torch.tensor([0.0, 0.8 + i / 10, 1.5])
            x, out = once(tokens, output, torch.tensor(i), temperature)
            # Inductor may round the model differently; what is compared is the sampling of the same logits.
            eager = fs.sample(
                x,
                temperature=temperature,
                top_k=40,
                top_p=0.95,
                frequency_penalty=0.2,
                seed=seeds,
                offset=i,
                output_ids=output,
                logprobs="processed",
                top_logprobs=3,
            )
            assert same(out, eager)
            output[:, i] = tokens = out.tokens
    assert counted() == 1


@both
def test_a_sampler_in_a_step(compiler: str) -> None:
    """Its offsets advance inside the graph; a new request in a slot compiles nothing."""
    mine, eager = (fs.Sampler(batch_size=3, top_p=0.9, seed=3, logprobs="raw") for _ in range(2))
    once = compiled(lambda x: mine(x * 2), compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(STEPS):
            assert same(once(logits(3, i)), eager(logits(3, i) * 2))
            assert torch.equal(mine.offsets, eager.offsets)
            for sampler in (mine, eager):
                sampler.set_row(1, temperature=0.5 + i, seed=i, offset=i)
    assert counted() == 1
    assert same(mine(logits(3)), eager(logits(3)))  # and on without the compiler
    with pytest.raises(ValueError, match="expected 3 rows"):
        once(logits(4))


def test_the_offset_as_a_number() -> None:
    """Dynamo takes a number for a constant at first and for a symbol at the second value."""
    once = compiled(lambda x, offset: fs.sample(x, seed=1, offset=offset))
    for offset in range(8):
        assert same(once(logits(3), offset), fs.sample(logits(3), seed=1, offset=offset))
    assert counted() <= 3


@pytest.mark.parametrize("dynamic", [None, True])
def test_any_batch_size(dynamic: bool | None) -> None:
    once = compiled(lambda x: fs.sample(x, seed=1, top_k=5, num_samples=2, logprobs="raw"), dynamic=dynamic)
    for rows in (3, 5, 8, 13, 2):
        x = logits(rows)
        assert same(once(x), fs.sample(x, seed=1, top_k=5, num_samples=2, logprobs="raw"))
    assert counted() <= 2


# Every argument -------------------------------------------------------------------------------------------------------

PARAMS = fs.SamplingParams(temperature=[0.5, 1.0, 2.0], ties=["first", "all", "first"], top_k=[1, 2, 300])
MASK = torch.randint(-(2**31), 2**31 - 1, (3, 9), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
IDS = torch.randint(-1, VOCAB, (3, 7), generator=torch.Generator().manual_seed(3))
BIAS = (torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6]), torch.tensor([9.0, -1.0, -torch.inf]))

CALLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "no seed": lambda x: fs.sample(x),
    "params": lambda x: fs.sample(x, PARAMS, seed=[1, 2, 2**64 - 1], offset=2**64 - 1),
    "params and fields": lambda x: fs.sample(x, PARAMS, seed=torch.tensor(4), top_p=0.5, order="joint"),
    "params inside": lambda x: fs.sample(x, fs.SamplingParams(temperature=0.5), seed=1),
    "lists": lambda x: fs.sample(x, temperature=[0.1, 2, 0], order=["joint", "min_p_first", "joint"], seed=2**63 + 1),
    "tensors": lambda x: fs.sample(
        x, top_k=torch.tensor([3, 4, 5]), min_p=torch.tensor([0.1, 0.0, 0.5]), seed=IDS[:, 0]
    ),
    "arrays": lambda x: fs.sample(x, seed=np.arange(3), offset=np.int64(5), top_k=np.array([1, 50, 7])),
    "offsets": lambda x: fs.sample(x, seed=1, offset=torch.tensor([7, 8, -9]), num_samples=3),
    "inputs": lambda x: fs.sample(
        x,
        seed=1,
        bitmask=MASK,
        bias=BIAS,
        prompt_ids=IDS,
        output_ids=IDS.int(),
        presence_penalty=0.3,
        repetition_penalty=1.2,
        num_samples=2,
        logprobs="raw",
        top_logprobs=4,
    ),
    "leading dimensions": lambda x: fs.sample(
        x.view(3, 2, -1),
        seed=torch.tensor([[5], [6], [7]]),
        offset=torch.tensor([[3, 4]]),
        temperature=torch.tensor([[0.5, 1.0], [2.0, 0.0], [1.0, 3.0]]),
        bitmask=MASK[:, None, :5],
        num_samples=2,
        logprobs="raw",
    ),
    "filter leading dimensions": lambda x: fs.filter_logits(x.view(3, 2, -1), top_k=torch.tensor([[1], [2], [3]])),
    "one row": lambda x: fs.sample(x[0], seed=3, logprobs="raw", top_logprobs=2),
    "half": lambda x: fs.sample(x.half(), seed=3, backend="reference"),
    "bad rows": lambda x: fs.sample(x * torch.tensor([[1], [torch.nan], [torch.inf]]), seed=1, on_invalid="flag"),
    "filter": lambda x: fs.filter_logits(x.bfloat16(), top_k=7, bitmask=MASK),
    "probabilities": lambda x: fs.probabilities(x, PARAMS, top_p=0.9, bias=BIAS) * 2,
    "probabilities of a row": lambda x: fs.probabilities(x[1], temperature=0.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_equals_the_eager_call(name: str) -> None:
    x = logits(3, 9)
    torch.manual_seed(11)
    want = CALLS[name](x)
    torch.manual_seed(11)
    assert same(compiled(CALLS[name])(x), want)
    assert counted() == 1


def test_no_seed_is_a_new_seed_each_time() -> None:
    """Also where a graph for training merges equal calls."""
    weight = torch.zeros(4, VOCAB, requires_grad=True)

    def step(x: torch.Tensor) -> Any:
        y = x @ weight
        a, b = fs.sample(y).tokens, fs.sample(y).tokens
        loss = torch.nn.functional.cross_entropy(y, a) + torch.nn.functional.cross_entropy(y, b)
        return loss, a, b

    once = compiled(step, "aot_eager_decomp_partition")
    x = torch.ones(16, 4)
    seen = []
    for _ in range(2):
        loss, a, b = once(x)
        loss.backward()
        seen += [a, b]
    assert len({tuple(tokens.tolist()) for tokens in seen}) == 4


def test_export() -> None:
    class Step(torch.nn.Module):
        def forward(self, x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
            return fs.sample(x, top_k=5, seed=1, offset=offset).tokens

    program = torch.export.export(Step(), (logits(3), torch.tensor(0)))
    for offset in range(3):
        want = fs.sample(logits(3, 4), top_k=5, seed=1, offset=offset).tokens
        assert torch.equal(program.module()(logits(3, 4), torch.tensor(offset)), want)


@pytest.mark.parametrize("strict", [False, True])
def test_export_without_a_seed(strict: bool) -> None:
    """Each run draws a fresh one from torch's generator."""

    class Step(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fs.sample(x * 0).tokens

    module = torch.export.export(Step(), (logits(3),), strict=strict).module()
    seen = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        seen += [tuple(module(logits(3)).tolist()), tuple(module(logits(3)).tolist())]
    assert len(set(seen)) == 4
    assert seen[:2] == seen[4:]


# Some slots of a Sampler ----------------------------------------------------------------------------------------------

SLOTS = torch.tensor([4, 0, 3])
ROWS: dict[str, Any] = {
    "tensor": SLOTS,
    "int32": SLOTS.int(),
    "mask": torch.tensor([True, False, False, True, True]),
    "list": [4, 0, 3],
    "slice": slice(1, 4),
    "array": np.array([2, 1, 0]),
}


@both
@pytest.mark.parametrize("name", ROWS)
def test_some_slots_in_a_step(name: str, compiler: str) -> None:
    rows = ROWS[name]
    mine, eager = (fs.Sampler(batch_size=5, top_p=[0.1, 0.5, 0.9, 1, 1], seed=3, logprobs="raw") for _ in range(2))
    once = compiled(lambda x: mine(x * 2, rows=rows, bitmask=MASK), compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(STEPS):
            assert same(once(logits(3, i)), eager(logits(3, i) * 2, rows=rows, bitmask=MASK))
            for sampler in (mine, eager):
                sampler.set_row(3, temperature=0.5 + i, seed=i, offset=i)
    assert counted() == 1
    assert torch.equal(mine.offsets, eager.offsets)
    assert same(mine(logits(5)), eager(logits(5)))


def test_the_slots_of_a_graph_are_its_input() -> None:
    """A tensor may name others each time; what it names is checked each time, and no offset moves after an error."""
    mine, eager = (fs.Sampler(batch_size=5, seed=3) for _ in range(2))
    once = compiled(lambda x, rows: mine(x, rows=rows))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(STEPS):
            rows = torch.randperm(5, generator=torch.Generator().manual_seed(i))[:3]
            assert same(once(logits(3, i), rows), eager(logits(3, i), rows=rows))
        for rows, words in (
            (torch.tensor([0, 1, 5]), r"rows\[2\] = 5: expected a slot, 0 <= slot < 5"),
            (torch.tensor([0, 1, 0]), r"rows\[2\] = 0: expected distinct slots"),
        ):
            with pytest.raises(ValueError, match=words):
                once(logits(3), rows)
        with pytest.raises(ValueError, match="logits: row 1 has a NaN logit"):
            once(logits(3) * torch.tensor([[1], [torch.nan], [1]]), SLOTS)
    assert torch.equal(mine.offsets, eager.offsets)
    with pytest.raises(ValueError, match="logits: expected 3 rows, one for each slot of `rows`, got 4"):
        once(logits(4), SLOTS)


# What no operator takes -----------------------------------------------------------------------------------------------

BUFFER = fs.SampleOutput(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int32))
FULL = torch.zeros(3, VOCAB)
GROWING: list[list[int]] = [[], [], []]

EAGER: dict[str, tuple[str, Callable[[fs.Sampler, torch.Tensor, torch.Tensor], Any]]] = {
    "bias": ("bias", lambda s, x, i: fs.sample(x, seed=1, offset=i, bias={3: 9.0}).tokens),
    "biases": ("bias", lambda s, x, i: fs.sample(x, seed=1, offset=i, bias=[{3: 9.0}, None, {4: 1.0}]).tokens),
    "out": ("out", lambda s, x, i: fs.sample(x, seed=1, offset=i, out=BUFFER).tokens.clone()),
    "ids": (
        "output_ids",
        lambda s, x, i: fs.sample(x, seed=1, offset=i, output_ids=GROWING, presence_penalty=2.0).tokens,
    ),
    "prompt": (
        "prompt_ids",
        lambda s, x, i: fs.sample(x, seed=1, offset=i, prompt_ids=GROWING, repetition_penalty=2.0).tokens,
    ),
    "allowed": ("allowed_ids", lambda s, x, i: fs.sample(x, seed=1, offset=i, allowed_ids=[[1, 2], [3], [4]]).tokens),
    "filter": ("bias", lambda s, x, i: fs.filter_logits(x, top_k=5, bias={3: 9.0})),
    "filter out": ("out", lambda s, x, i: fs.filter_logits(x, top_k=5, out=FULL).clone()),
    "probabilities": ("prompt_ids", lambda s, x, i: fs.probabilities(x, prompt_ids=GROWING, repetition_penalty=2.0)),
    "Sampler": ("bias", lambda s, x, i: s(x, bias={3: 9.0}).tokens),
    "Sampler out": ("out", lambda s, x, i: s(x, out=BUFFER).tokens.clone()),
    "Sampler ids": ("output_ids", lambda s, x, i: s(x, output_ids=GROWING).tokens),
    "Sampler rows": ("output_ids", lambda s, x, i: s(x[:2], rows=[0, 2], output_ids=GROWING[:2]).tokens),
    "breakers": ("dry_breakers", lambda s, x, i: fs.sample(x, seed=1, offset=i, dry_breakers=[3, 4]).tokens),
    "Sampler breakers": ("dry_breakers", lambda s, x, i: s(x, dry_breakers=[[3], None, [4, 5]]).tokens),
}


@pytest.mark.parametrize("name", EAGER)
def test_a_graph_breaks_where_no_operator_takes_an_argument(name: str) -> None:
    """The call is eager, as one piece: nothing of ours is compiled, nor a step anew but for a list's length."""
    argument, call = EAGER[name]
    lists = argument.endswith("_ids") and argument != "allowed_ids"
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    mine, eager = (fs.Sampler(batch_size=3, seed=3, temperature=1.5) for _ in range(2))
    once = torch.compile(lambda x, i: call(mine, x * 2, i) + 1, backend=backend)
    for row in GROWING:
        row.clear()
    for step in range(12):  # more than torch compiles a frame anew
        x, i = logits(3, step), torch.tensor(step)
        with torch._dynamo.config.patch(error_on_recompile=step > 2 and not lists):
            assert torch.equal(once(x, i), call(eager, x * 2, i) + 1)
        for row in GROWING:
            row.append(step)
    assert torch.equal(mine.offsets, eager.offsets)
    reasons = torch._dynamo.utils.counters["graph_break"]
    assert reasons
    assert all(f"{argument}: expected" in reason for reason in reasons)
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op.startswith("call")}
    assert targets <= {"<built-in function mul>", "<built-in function add>", "<built-in function getitem>", "clone"}


def test_a_sampler_is_made_and_changed_in_a_compiled_function() -> None:
    """By breaks of the graph, which fullgraph=True refuses."""

    def step(sampler: fs.Sampler, x: torch.Tensor) -> Any:
        y = x * 2
        sampler.set_row(1, temperature=0.3, seed=4)
        tokens = sampler(y).tokens
        sampler.reset_row(0)
        new = fs.Sampler(batch_size=3, seed=2)
        return tokens, new(y).tokens, sampler.offsets, sampler.seeds

    mine, eager = (fs.Sampler(batch_size=3, seed=1) for _ in range(2))
    once = torch.compile(step, backend="aot_eager")
    for i in range(STEPS):
        assert all(map(torch.equal, once(mine, logits(3, i)), step(eager, logits(3, i))))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="outside_of_a_graph"):
        compiled(lambda: mine.set_row(1))()


@pytest.mark.parametrize("name", EAGER)
def test_a_full_graph_names_the_argument(name: str) -> None:
    argument, call = EAGER[name]
    sampler = fs.Sampler(batch_size=3, seed=3)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{argument}: expected .* under torch.compile"):
        compiled(lambda x: call(sampler, x, torch.tensor(0)))(logits(3))
    assert sampler.offsets.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: fs.sample(x, temprature=1.0), TypeError, "temprature .*: expected a field of SamplingParams"),
        (lambda x: fs.sample(x, ties="none"), ValueError, "ties = 'none': expected one of 'first', 'all'"),
        (lambda x: fs.sample(x, seed=1.5), TypeError, "seed = 1.5: expected an integer"),
        (lambda x: fs.sample(x, {"top_k": 1}), TypeError, "params: expected SamplingParams, got dict"),  # type: ignore[arg-type]
        (lambda x: fs.sample(x, bias={VOCAB: 1.0}), ValueError, "bias id 300"),
        (lambda x: fs.sample(x, output_ids=[[1]]), ValueError, "output_ids: expected one list of token ids per row"),
        (lambda x: fs.filter_logits(x, out=torch.empty(1)), ValueError, "out: expected torch.float32"),
        (lambda x: fs.Sampler(batch_size=5, seed=1)(x, rows=[0, 1, 9]), ValueError, r"rows\[2\] = 9"),
    ],
)
def test_errors_where_graphs_may_break(call: Callable[..., Any], error: type[Exception], words: str) -> None:
    """Those of an eager call."""
    with pytest.raises(error, match=words):
        torch.compile(call, backend="aot_eager")(logits(3))


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: fs.sample(x * torch.nan, seed=1), ValueError, "logits: row 0 has a NaN logit"),
        (lambda x: fs.filter_logits(x * torch.nan), ValueError, "logits: row 0 has a NaN logit"),
        (lambda x: fs.sample(x, temperature=-1.0), ValueError, "temperature = -1.0: expected a finite number"),
        (lambda x: fs.sample(x, top_k=2.5), TypeError, "top_k = 2.5: expected an integer"),
        (lambda x: fs.sample(x, top_p=torch.tensor([0.1, 2, 0.1])), ValueError, r"top_p = 2.0 \(row 1\)"),
        (lambda x: fs.sample(x, top_p=torch.rand(2)), ValueError, "top_p: expected one value for all rows or 3 values"),
        (lambda x: fs.sample(x, backend="x"), ValueError, "backend = 'x'"),
        (lambda x: fs.sample(x, num_samples=0), ValueError, "num_samples = 0"),
        (lambda x: fs.sample(x, bitmask=MASK.long()), TypeError, "bitmask: expected int32 words"),
        (lambda x: fs.sample(x, seed=torch.arange(2)), ValueError, "seed: expected one int or 3 seeds"),
    ],
)
def test_errors_of_a_run(call: Callable[..., Any], error: type[Exception], words: str) -> None:
    """What an eager call raises: the operator runs the same checks."""
    with pytest.raises(error, match=words):
        compiled(call)(logits(3))
    with pytest.raises(error, match=words):
        call(logits(3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: fs.sample(x, bias={1: 2.0}), r"bias: expected tensors \(row_ptr, ids, values\) under torch.compile"),
        (lambda x: fs.sample(x, output_ids=[[1], [2], [3]]), "output_ids: expected a tensor under torch.compile"),
        (lambda x: fs.sample(x, temprature=1.0), r"temprature \(did you mean temperature\?\): expected a field of"),
        (lambda x: fs.sample(x, ties="none"), "ties = 'none': expected one of 'first', 'all'"),
        (lambda x: fs.sample(x, temperature=True), "temperature = True: expected a finite number"),
        (lambda x: fs.sample(x, seed=2**64), "seed = 18446744073709551616: expected a 64-bit integer"),
        (lambda x: fs.sample(x, seed=1.5), "seed = 1.5: expected an integer"),
        (lambda x: fs.sample(x, offset=-1), "offset = -1: expected an integer, 0 <= value < 2\\^64"),
        (lambda x: fs.sample(x, allowed_ids=[1]), "allowed_ids: expected None"),
        (lambda x: fs.filter_logits(x, out=torch.empty(3, VOCAB)), "out: expected None under torch.compile"),
    ],
)
def test_errors_of_a_trace(call: Callable[..., Any], words: str) -> None:
    """What cannot be an operator's argument is refused by name while the graph is made."""
    with pytest.raises(torch._dynamo.exc.Unsupported, match=words):
        compiled(call)(logits(3))


# The operators --------------------------------------------------------------------------------------------------------


NOTHING = (None, [], None, None, None)  # of the inputs


def sample_arguments(**changes: Any) -> tuple[Any, ...]:
    given = {
        "logits": logits(3),
        "columns": [None] * len(specs()),
        "seed": torch.tensor(1),
        "wishes": Options(),
    }
    given |= changes
    inputs = given.get("inputs", NOTHING)
    values = ops._params(None, {"top_p": 0.9} if given["wishes"].input == "logits" else {"top_a": 0.1})[0]
    return given["logits"], values, given["columns"], given["seed"], torch.tensor(3), *inputs, *given["wishes"]


@pytest.mark.parametrize(
    "arguments",
    [
        sample_arguments(),
        sample_arguments(logits=logits(1)[0].half(), wishes=Options(4, "raw", 5, "flag", "reference", **KEPT)),
        sample_arguments(
            columns=[torch.rand(3), *[None] * (len(specs()) - 1)],
            seed=torch.arange(3),
            wishes=Options(1, "processed", 2, "flag", "cpu", **KEPT),
        ),
        sample_arguments(inputs=(MASK, list(BIAS), IDS, IDS, IDS[0])),
        sample_arguments(logits=logits(3).exp(), wishes=Options(2, "raw", 2, "raise", "reference", "probs", "count")),
    ],
)
def test_opcheck_sample(arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(torch.ops.fastsample.sample.default, arguments)


@pytest.mark.parametrize("wishes", [Options(), Options(3, "raw", 2, "flag", input="probs", **KEPT)])
def test_opcheck_step(wishes: Options) -> None:
    records = fs.SamplingParams(top_k=9).pack()
    arguments = (logits(3).exp(), records, torch.arange(3), torch.arange(3), *NOTHING, *wishes)
    torch.library.opcheck(torch.ops.fastsample.sample_step.default, arguments)


def test_opcheck_rows() -> None:
    records = fs.SamplingParams(top_k=9).pack().repeat(5, 1)
    wishes = Options(kept="bitmask")
    arguments = (logits(3), records, torch.arange(5), torch.arange(5), SLOTS, *NOTHING, *wishes)
    torch.library.opcheck(torch.ops.fastsample.sample_rows.default, arguments)


@pytest.mark.parametrize("kind", ["filtered", "probabilities"])
def test_opcheck_full(kind: str) -> None:
    x, values, columns = sample_arguments()[:3]
    arguments = (kind, x, values, columns, *NOTHING, "raise", "auto", "logits")
    torch.library.opcheck(torch.ops.fastsample.full.default, arguments)


def test_opcheck_fresh_seed() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # the others compare two draws
    torch.library.opcheck(torch.ops.fastsample.fresh_seed.default, (ops._DRAWN,), test_utils=checks)


def test_an_eager_call_registers_nothing() -> None:
    script = """
import sys, torch
import fastsample as fs
x = torch.randn(2, 50)
fs.sample(x), fs.filter_logits(x), fs.Sampler(batch_size=2)(x)
assert "fastsample.ops" not in sys.modules
assert not hasattr(torch.ops.fastsample, "sample")
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent)


# On a GPU -------------------------------------------------------------------------------------------------------------

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="there is no GPU that torch can use")]


@pytest.mark.parametrize("mode", [pytest.param(m, marks=on_gpu) for m in ("default", "reduce-overhead")])
def test_a_compiled_sampler_on_a_gpu(mode: str) -> None:
    """With "reduce-overhead" inductor captures the step in a CUDA graph, where the offsets advance too."""
    mine, eager = (fs.Sampler(batch_size=4, top_p=0.9, seed=3, on_invalid="flag") for _ in range(2))
    mine(logits(4).cuda()), eager(logits(4))
    once = torch.compile(lambda x: mine(x * 2).tokens, fullgraph=True, mode=mode)
    for i in range(8):
        assert torch.equal(once(logits(4, i).cuda()).cpu(), eager(logits(4, i) * 2).tokens)


@pytest.mark.parametrize("name", [pytest.param(n, marks=on_gpu) for n in ("logits", "probs")])
def test_flashinfers_functions_in_a_captured_graph(name: str) -> None:
    """Seed and offset are tensors on the device, so are the parameters per row; a replay reads what they then hold."""
    function = getattr(flashinfer, f"top_k_top_p_sampling_from_{name}")
    table = (logits(4) if name == "logits" else torch.softmax(logits(4), -1)).cuda()
    seeds, offsets = torch.arange(4).cuda(), torch.zeros(4, dtype=torch.int64).cuda()
    k, p = torch.tensor([3, 50, 300, 7]).cuda(), torch.tensor([0.9, 0.5, 1.0, 0.3]).cuda()
    function(table, k, p, seed=seeds, offset=offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = function(table, k, p, seed=seeds, offset=offsets)
    for i in range(4):
        graph.replay()
        eager = function(table.cpu(), k.cpu(), p.cpu(), seed=seeds.cpu(), offset=offsets.cpu())
        assert torch.equal(tokens.cpu(), eager), i
        offsets += 1


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="there is no GPU that torch can use")
def test_a_graph_cannot_raise() -> None:
    sampler = fs.Sampler(batch_size=2, seed=1)
    x = logits(2).cuda()
    sampler(x)
    with pytest.raises(RuntimeError, match="use on_invalid='flag'"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        sampler(x)
