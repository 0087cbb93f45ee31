"""docs/bad-input.md is the table below, with what each call says; run as a script, this file prints it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastsample as fs
from fastsample.params import specs

B, V = 3, 50
NAN, INF = math.nan, math.inf
X = torch.randn(B, V, generator=torch.Generator().manual_seed(1))
IDS = torch.zeros(B, 4, dtype=torch.int64)
MASK = torch.full((B, 2), -1, dtype=torch.int32)
DOCS = Path(__file__).parents[2] / "docs" / "bad-input.md"


def same_as(want: Callable[[], torch.Tensor]) -> Callable[[torch.Tensor], bool]:
    return lambda got: torch.equal(got, want())


def plain(x: torch.Tensor = X, **fields: Any) -> Callable[[], torch.Tensor]:
    return lambda: fs.filter_logits(x, **fields)


def biased(row_ptr: list[int], ids: list[int], values: list[float]) -> dict[str, Any]:
    return {"bias": (torch.tensor(row_ptr), torch.tensor(ids), torch.tensor(values))}


def freed() -> torch.Tensor:
    x = X.clone()
    x.untyped_storage().resize_(0)
    return x


def with_value(value: float, x: torch.Tensor = X) -> torch.Tensor:
    x = x.clone()
    x[1, 7] = value
    return x


Row = tuple[str, str, dict[str, Any]]  # argument, what is sent, how

REFUSED: list[Row] = [
    ("logits", "a list", {"logits": [[1.0]]}),
    ("logits", "float64 (integers, bool, complex, float8)", {"logits": X.double()}),
    ("logits", "sparse", {"logits": X.to_sparse()}),
    ("logits", "nested", {"logits": torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged)}),
    ("logits", "meta", {"logits": X.to("meta")}),
    ("logits", "storage freed; fake, inside `vmap`, DTensor", {"logits": freed()}),
    ("logits", "0-D", {"logits": X[0, 0]}),
    ("logits", "[B, T, V] to a `Sampler`", {"call": fs.Sampler(batch_size=B), "logits": X[None]}),
    ("logits", "[B, 0]", {"logits": X[:, :0]}),
    ("logits", "V > 2^20", {"logits": torch.zeros(1, 2**20 + 1)}),
    ("logits", "last dimension not contiguous", {"logits": X.t()}),
    ("logits", "NaN in a row", {"logits": with_value(NAN)}),
    ("logits", "+inf in a row", {"logits": with_value(INF)}),
    ("logits", "a row of -inf", {"logits": torch.full((1, V), -INF)}),
    ("float parameters", "NaN", {"temperature": NAN}),
    ("float parameters", "inf, 1e39, 10^400", {"temperature": INF}),
    ("float parameters", "negative, of one row", {"temperature": [1.0, -0.5, 1.0]}),
    ("float parameters", "too large", {"top_p": 1.5}),
    ("float parameters", "string", {"temperature": "1"}),
    ("float parameters", "bool", {"temperature": True}),
    ("float parameters", "wrong length", {"temperature": [1.0, 1.0]}),
    ("float parameters", "tensor of bool, complex", {"temperature": torch.ones(B, dtype=torch.bool)}),
    ("float parameters", "tensor [B, 1]", {"temperature": torch.ones(B, 1)}),
    ("float parameters", "tensor without values", {"temperature": torch.ones(B, device="meta")}),
    ("`top_k`", "negative", {"top_k": -1}),
    ("`top_k`", "negative, of one row", {"top_k": [5, -1, 5]}),
    ("`top_k`", "a float, NaN", {"top_k": 3.0}),
    ("`top_k`", "bool", {"top_k": True}),
    ("`p_less`", "a number but 0 and 1", {"p_less": 2}),
    ("`p_less`", "a float, a string", {"p_less": 0.5}),
    ("`ties`, `order`", "another string", {"ties": "some"}),
    ("`ties`, `order`", "no string", {"order": 1}),
    ("`epsilon_cutoff`, `eta_cutoff`", "1, as float32", {"epsilon_cutoff": 1.0}),
    ("parameters", "unknown name", {"temprature": 1.0}),
    ("`seed`, `offset`", "beyond 64 bits", {"seed": 2**64}),
    ("`seed`, `offset`", "wrong length", {"seed": [1, 2]}),
    ("`offset`", "negative: an int, in a list, in an array", {"offset": [0, -1, 0]}),
    ("`seed`, `offset`", "bytes (as ids and parameters too)", {"seed": b"abc"}),
    ("`seed`, `offset`", "a float", {"offset": 1.0}),
    ("`seed`, `offset`", "bool", {"seed": True}),
    ("`seed`, `offset`", "tensor of floats", {"seed": torch.ones(B)}),
    ("`num_samples`", "0, negative, 2^31", {"num_samples": 0}),
    ("`num_samples`", "a float, bool, None", {"num_samples": 2.0}),
    ("`top_logprobs`", "more than V", {"logprobs": "raw", "top_logprobs": V + 1}),
    ("`logprobs`", "another string", {"logprobs": "all"}),
    ("`kept`", "another string, a bool", {"kept": "list"}),
    ("`kept_capacity`", "negative, more than 2^20", {"kept": "ids", "kept_capacity": -1}),
    ("`kept_capacity`", "without kept='ids'", {"kept": "bitmask", "kept_capacity": 4}),
    ("`kept_mass`, `entropy`", "no bool", {"kept_mass": 1}),
    ("`on_invalid`", "another string", {"on_invalid": "ignore"}),
    ("`input`", "another string", {"input": "probabilities"}),
    ('`input="probs"`', "NaN in a row", {"input": "probs", "logits": with_value(NAN, X.abs())}),
    ('`input="probs"`', "negative, +inf in a row", {"input": "probs", "logits": with_value(-0.5, X.abs())}),
    ('`input="probs"`', "a row of zeros", {"input": "probs", "logits": torch.zeros(1, V)}),
    ('`input="probs"`', "temperature, penalties, filters on logits", {"input": "probs", "temperature": [1, 0, 0.7]}),
    ('`input="probs"`', "a bias", {"input": "probs", "bias": {3: 1.0}}),
    ("`backend`", "another string", {"backend": "cpp"}),
    ("`bitmask`", "a list", {"bitmask": [[1]]}),
    ("`bitmask`", "int64, bool, float", {"bitmask": MASK.long()}),
    ("`bitmask`", "wrong number of rows", {"bitmask": MASK[:2]}),
    ("`bitmask`", "wrong device", {"bitmask": MASK.to("meta")}),
    ("`bitmask`", "all zero in a row", {"bitmask": MASK * torch.tensor([[1], [0], [1]], dtype=torch.int32)}),
    ("`bias`", "id out of range", {"bias": {V: 1.0}}),
    ("`bias`", "id twice in a row", biased([0, 2, 2, 2], [3, 3], [1.0, 2.0])),
    ("`allowed_ids`", "id out of range, in a tensor or list", {"allowed_ids": [[1], [2, V], None]}),
    ("`allowed_ids`", "floats, a number", {"allowed_ids": torch.ones(V)}),
    ("`allowed_ids`", "wrong number of rows or of bools", {"allowed_ids": [[1], [2]]}),
    ("`allowed_ids`", "none in a row", {"allowed_ids": [[1], [], None]}),
    ("`bias`", "NaN, +inf", {"bias": [None, {4: NAN}, None]}),
    ("`bias`", "1e39, -1e39", {"bias": [None, {4: 1e39}, None]}),
    ("`bias`", "string, bool, None as a value", {"bias": {5: "1"}}),
    ("`bias`", "wrong number of rows", {"bias": [{}, {}]}),
    ("`bias`", "`row_ptr` that falls, starts or ends wrongly", biased([0, 1, 0, 1], [3], [1.0])),
    ("`prompt_ids`, `output_ids`", "floats, bool", {"output_ids": IDS.float()}),
    ("`prompt_ids`, `output_ids`", "wrong number of rows", {"output_ids": IDS[:2]}),
    ("`prompt_ids`, `output_ids`", "wrong device", {"output_ids": IDS.to("meta")}),
    ("`prompt_ids`, `output_ids`", "beyond 64 bits", {"output_ids": [[1], [2], [2**63]]}),
    ("`prompt_ids`, `output_ids`", "a string, a bool, a float among them", {"output_ids": [[1], ["2"], [3]]}),
    ("`dry_breakers`", "floats, bool", {"dry_breakers": IDS.float()}),
    ("`dry_breakers`", "[1, n] for several rows", {"dry_breakers": IDS[:1]}),
    ("`dry_breakers`", "wrong device", {"dry_breakers": IDS[0].to("meta")}),
    ("`dry_breakers`", "strings", {"dry_breakers": ["\n"]}),
    ("`dry_breakers`", "a set, a number", {"dry_breakers": 3}),
    ("`out`", "wrong dtype, shape or device", {"call": fs.filter_logits, "out": torch.zeros(B, V + 1)}),
    ("`out`", "not contiguous", {"call": fs.filter_logits, "out": torch.zeros(B, 2 * V)[:, ::2]}),
    ("`out`", "requires grad", {"call": fs.filter_logits, "out": torch.zeros(B, V, requires_grad=True)}),
    ("`out`", "memory of an input, or twice the same", {"call": fs.filter_logits, "out": X}),
    ("threads", "`set_num_threads` of 0, 4097", {"call": lambda _: fs.set_num_threads(0)}),
]

# Odd, and defined: what comes of it, and whether it does.
SERVED: list[tuple[str, str, str, Callable[[], torch.Tensor], Callable[[torch.Tensor], bool]]] = [
    (
        "logits",
        "require grad, are a parameter",
        "used as values; no gradient",
        plain(X.clone().requires_grad_()),
        lambda got: not got.requires_grad and torch.equal(got, X),
    ),
    (
        "logits",
        "rows apart, expanded, in shared memory",
        "served, not copied",
        plain(X.repeat(1, 2)[:, :V]),
        same_as(plain()),
    ),
    (
        "logits",
        "an array of NumPy, MLX, JAX, ..., read-only, in any byte order",
        "read where it lies, if torch can",
        plain(X.numpy().astype(">f4")),
        same_as(plain()),
    ),
    ("logits", "[0, V]", "empty results", plain(X[:0]), lambda got: got.shape == (0, V)),
    (
        "logits",
        'NaN, +inf, -inf with `on_invalid="flag"`',
        "token -1 and a status there; no other row changes",
        lambda: fs.sample(with_value(NAN), seed=1, on_invalid="flag").tokens[[0, 2]],
        same_as(lambda: fs.sample(X, seed=1).tokens[[0, 2]]),
    ),
    (
        "logits",
        "an inference tensor, in autocast, under any default device or dtype",
        "the same token as without",
        lambda: torch.inference_mode()(fs.sample)(X, seed=1).tokens,
        same_as(lambda: fs.sample(X, seed=1).tokens),
    ),
    ("`top_k`", "2^31, 2^64, V or more", "off", plain(top_k=2**64), same_as(plain())),
    (
        "parameters",
        "numpy scalars and arrays, read-only and reversed ones",
        "as Python numbers",
        plain(temperature=np.broadcast_to(np.float32(0.5), B), top_k=np.int64(3)),
        same_as(plain(temperature=0.5, top_k=3)),
    ),
    (
        "`seed`; `offset` as int64 tensor",
        "negative",
        "their 64 bits: -1 is 2^64 - 1",
        lambda: fs.sample(X, seed=-1, offset=torch.tensor(-1)).tokens,
        same_as(lambda: fs.sample(X, seed=2**64 - 1, offset=2**64 - 1).tokens),
    ),
    (
        "`bitmask`",
        "too short",
        "what lies past its last word is not allowed",
        plain(bitmask=MASK[:, :1]),
        lambda got: got.isfinite().sum(1).tolist() == [32] * B,
    ),
    (
        "`bitmask`",
        "too long",
        "words and bits past V are ignored",
        plain(bitmask=torch.cat([MASK, MASK], 1)),
        same_as(plain()),
    ),
    ("`bias`", "-inf", "the token is never drawn", plain(bias={7: -INF}), lambda got: bool((got[:, 7] == -INF).all())),
    (
        "`prompt_ids`, `output_ids`",
        "-1, V, 2^62: outside the vocabulary",
        "ignored, as padding",
        plain(output_ids=[[-1, V, 2**62]] * B, presence_penalty=1.0),
        same_as(plain()),
    ),
    (
        "`prompt_ids`, `output_ids`",
        "arrays; lists of lists, tensors, arrays and None",
        "as a padded tensor",
        plain(output_ids=[[7], None, np.array([7, 7])], frequency_penalty=1.0),
        lambda got: torch.equal(got[:, 7], X[:, 7] - torch.tensor([1.0, 0.0, 2.0])),
    ),
    ("logits", "[B, T, V] and more", "rows of the flattened table", plain(X[None]), same_as(lambda: plain()()[None])),
    (
        "`prompt_ids`, `output_ids`",
        "duplicates",
        "counted",
        plain(output_ids=[[7, 7]] * B, frequency_penalty=1.0),
        lambda got: torch.equal(got[:, 7], X[:, 7] - 2),
    ),
]


def answer(call: Callable[..., Any] = fs.sample, logits: Any = X, **kwargs: Any) -> str:
    """What a call says to what it refuses, as it stands in the table."""
    try:
        call(logits, **kwargs)
    except (TypeError, ValueError) as refusal:
        said = str(refusal).replace("|", "\\|")
        return f"{type(refusal).__name__}: {said if len(said) < 120 else said[:117] + '...'}"
    raise AssertionError(f"{kwargs} is not refused")


def table() -> str:
    lines = ["| argument | what is sent | what it gets |", "|---|---|---|"]
    lines += [f"| {name} | {what} | {answer(**how)} |" for name, what, how in REFUSED]
    lines += [f"| {name} | {what} | *served*: {gets} |" for name, what, gets, _, _ in SERVED]
    return "\n".join(lines) + "\n"


def test_the_documented_answers_are_the_answers() -> None:
    _, _, rest = DOCS.read_text().partition("<!-- table -->\n")
    assert rest.partition("\n\n")[0] + "\n" == table()


def test_what_is_served_is_served_so() -> None:
    for name, what, _, call, holds in SERVED:
        assert holds(call()), f"{name}: {what}"


def test_every_argument_is_in_the_table() -> None:
    named = " ".join(name for name, *_ in REFUSED)
    kinds = {"float": "float parameters", "int": "`top_k`", "bool": "`p_less`", "choice": "`ties`, `order`"}
    assert all(kinds[spec.kind] in named for _, spec in specs())
    for name in fs.sample.__kwdefaults__:
        assert f"`{name}`" in named, name


if __name__ == "__main__":
    print(table(), end="")
