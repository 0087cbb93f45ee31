"""Outputs: what can be asked of a call, the buffers that hold the answer, and the memory they lie in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from fastsample.checks import MAX_VOCAB, count, is_one_of, require_dense
from fastsample.params import SamplingParams

OnInvalid = Literal["raise", "flag"]
LogprobsMode = Literal["raw", "processed"]
InputKind = Literal["logits", "probs"]
KeptForm = Literal["count", "ids", "bitmask"]
Array: TypeAlias = "np.ndarray[Any, Any]"

STATUS = {1: "a NaN logit", 2: "a +inf logit", 3: "no logit above -inf (everything is masked)"}
"""What a non-zero status means, after bitmask, bias and penalties."""
WRONG: dict[InputKind, dict[int, str]] = {
    "logits": STATUS,
    "probs": {
        1: "a NaN probability",
        2: "a negative or infinite probability",
        3: "no probability above 0 (everything is masked)",
    },
}


class Options(NamedTuple):
    """What is asked of a sampling call, besides how its rows are sampled."""

    num_samples: int = 1
    logprobs: LogprobsMode | None = None
    top_logprobs: int = 0
    on_invalid: OnInvalid = "raise"
    backend: str = "auto"
    input: InputKind = "logits"
    kept: KeptForm | None = None
    kept_capacity: int = 0
    kept_mass: bool = False
    entropy: bool = False

    @property
    def kept_bitmask(self) -> bool:
        """Whether sets are wanted as bitmasks; ids of a limited number come beside one."""
        return self.kept == "bitmask" or self.kept_capacity > 0

    @property
    def without_size(self) -> str | None:
        """The option that must be given where outputs need a size before there are any."""
        return "kept_capacity" if self.kept == "ids" and not self.kept_capacity else None

    @property
    def of_rows(self) -> Options:
        """With which the rows of a verification are sampled; sets are listed once it is known what came out."""
        kept: KeptForm | None = "bitmask" if self.kept == "ids" else self.kept
        return self._replace(on_invalid="flag", kept=kept, kept_capacity=0)

    def checked(self) -> Options:
        """The options with plain integers, or an error that says what one should be. (`select` checks the backend.)"""
        num_samples = count("num_samples", self.num_samples, 1, 2**31 - 1)
        top_logprobs = count("top_logprobs", self.top_logprobs, 0, MAX_VOCAB)
        if self.logprobs is not None and not is_one_of(self.logprobs, "raw", "processed"):
            raise ValueError(f"logprobs = {self.logprobs!r}: expected None, 'raw' or 'processed'")
        if top_logprobs and self.logprobs is None:
            raise ValueError(f"top_logprobs = {top_logprobs}: needs logprobs='raw' or 'processed'")
        check_on_invalid(self.on_invalid)
        if not is_one_of(self.input, "logits", "probs"):
            raise ValueError(f"input = {self.input!r}: expected 'logits' or 'probs'")
        capacity = count("kept_capacity", self.kept_capacity, 0, MAX_VOCAB)
        if self.kept is not None and not is_one_of(self.kept, "count", "ids", "bitmask"):
            raise ValueError(f"kept = {self.kept!r}: expected None, 'count', 'ids' or 'bitmask'")
        if capacity and self.kept != "ids":
            raise ValueError(f"kept_capacity = {capacity}: needs kept='ids'")
        for name, value in (("kept_mass", self.kept_mass), ("entropy", self.entropy)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} = {value!r}: expected True or False")
        if num_samples is self.num_samples and top_logprobs is self.top_logprobs and capacity is self.kept_capacity:
            return self
        return self._replace(num_samples=num_samples, top_logprobs=top_logprobs, kept_capacity=capacity)


def check_on_invalid(on_invalid: str) -> None:
    if not is_one_of(on_invalid, "raise", "flag"):
        raise ValueError(f"on_invalid = {on_invalid!r}: expected 'raise' or 'flag'")


# The fields ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """One output: its buffer and when there is one."""

    name: str
    dtype: torch.dtype
    per: Literal["row", "draw", "top", "token", "pair", "word", "listed", "end"]  # what each row has one value for
    invalid: float | None  # what an invalid row holds; None where it differs from row to row
    wanted_by: str | None = None  # the option that asks for it; None where every call of its kind fills it

    def wanted(self, options: Options) -> bool:
        return self.wanted_by is None or bool(getattr(options, self.wanted_by))

    def shape(self, batch: Sequence[int], options: Options, vocab: int) -> tuple[int, ...]:
        """The buffer's shape; `batch` is all of the logits' shape but the vocabulary."""
        if self.per == "row":
            return tuple(batch)
        if self.per == "draw":
            return tuple(batch) if options.num_samples == 1 else (*batch, options.num_samples)
        if self.per == "word":
            return (*batch, -(-vocab // 32))
        if self.per in ("listed", "end"):  # of all rows together
            rows = prod(batch)
            return (rows * options.kept_capacity if self.per == "listed" else rows + 1,)
        return (*batch, options.top_logprobs if self.per == "top" else vocab)


FIELDS = (
    Field("status", torch.int32, "row", None),
    Field("tokens", torch.int64, "draw", -1),
    Field("filtered", torch.float32, "token", -torch.inf),
    Field("probabilities", torch.float32, "token", 0),
    Field("logprobs", torch.float32, "draw", torch.nan, "logprobs"),
    Field("ranks", torch.int64, "draw", 0, "logprobs"),
    Field("top_ids", torch.int64, "top", -1, "top_logprobs"),
    Field("top_logprobs", torch.float32, "top", torch.nan, "top_logprobs"),
    Field("weights", torch.int64, "pair", 0),
    Field("masses", torch.int64, "token", 0),
    Field("kept_count", torch.int32, "row", 0, "kept"),
    Field("kept_bitmask", torch.int32, "word", 0, "kept_bitmask"),
    Field("log_kept_mass", torch.float32, "row", torch.nan, "kept_mass"),
    Field("entropy", torch.float32, "row", torch.nan, "entropy"),
)
"""What an engine's run fills, in the order in which the native engines take their addresses."""
LISTED = (
    Field("kept_ids", torch.int32, "listed", None, "kept_capacity"),
    Field("kept_row_ptr", torch.int64, "end", None, "kept_capacity"),
)
"""What is listed after that (kept.py). Without a capacity there are no buffers before the sizes are known."""


class SampleArrays(NamedTuple):
    """A SampleOutput as NumPy arrays, with its names, shapes and dtypes."""

    tokens: Array
    status: Array
    logprobs: Array | None
    ranks: Array | None
    top_ids: Array | None
    top_logprobs: Array | None
    kept_count: Array | None
    kept_ids: Array | None
    kept_row_ptr: Array | None
    kept_bitmask: Array | None
    log_kept_mass: Array | None
    entropy: Array | None


class _ReadLater:
    """Outputs that become tensors when they are first read: those that have no value yet."""

    __slots__ = ("_layout", "_memory")  # what they are made of (reports.py); without it, they are None

    def leave(self, layout: Any, memory: bytearray, again: Sequence[str] = ()) -> None:
        """Let what has no value yet be made of this memory, and these be made again."""
        self._layout, self._memory = layout, memory
        for name in again:
            setattr(self, name, None)  # it may not have been read
            delattr(self, name)

    if not TYPE_CHECKING:  # for the checker, an output has its fields and no others

        def __getattr__(self, name: str) -> Any:
            if name == "_layout":
                return None
            if name not in type(self).__slots__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            value = None if self._layout is None else self._layout.tensor(name, self._memory)
            setattr(self, name, value)
            return value


@dataclass(slots=True, eq=False)
class SampleOutput(_ReadLater):
    """What `sample` returns. B rows, n = num_samples, N = top_logprobs; [B, n] is [B] when num_samples is 1.

    B stands for all of the logits' dimensions but the last: none for [V], [B, T] for [B, T, V].

    Two are equal where every field is, by value: shape, dtype and numbers (NaN equals NaN), wherever they lie.
    Comparing tensors on a GPU waits for it. Outputs have no hash, since calls with `out` change them. They can be
    copied, pickled, and loaded with `torch.load(weights_only=True)` once fastsample is imported. On a CPU, what is
    told of kept sets becomes a tensor when it is first read, so that what is not read costs next to nothing.

    Attributes:
        tokens: int64 [B] or [B, n]; -1 in invalid rows.
        status: int32 [B]; 0 valid, 1 NaN, 2 +inf, 3 nothing above -inf. Of probabilities: 1 NaN, 2 negative or
            infinite, 3 nothing above 0.
        logprobs: float32 like tokens; natural log-probability of each sampled token. NaN in invalid rows.
        ranks: int64 like tokens; 1 + number of tokens strictly above the sampled one. 0 in invalid rows.
        top_ids: int64 [B, N] in rank order; -1 past the last token that is kept ("processed") or above -inf ("raw"; of
            probabilities: above 0).
        top_logprobs: float32 [B, N]; -inf where top_ids is -1.
        kept_count: int32 [B], how many tokens are kept: those that `filter_logits` shows above -inf. 0 in invalid rows.
        kept_ids: int32, the kept ids of all rows, ascending in each; those of row i are
            `kept_ids[kept_row_ptr[i] : kept_row_ptr[i + 1]]`. With a capacity C it has C places per row, and -1 past
            the last id; a row that keeps more than C lists none. Fresh in every call without a capacity.
        kept_row_ptr: int64 [B + 1], or [number of rows + 1] where logits have more dimensions.
        kept_bitmask: int32 [B, ceil(V / 32)]; token j is kept where bit j % 32 of word j // 32 is 1 (what `bitmask`
            takes). 0 in invalid rows.
        log_kept_mass: float32 [B], the logarithm of the probability that the kept tokens have together before any
            filter, at the row's temperature; 0 in greedy rows, NaN in invalid ones.
        entropy: float32 [B], in nats, of the distribution that is drawn from; NaN in invalid rows.
    """

    tokens: torch.Tensor
    status: torch.Tensor
    logprobs: torch.Tensor | None = None
    ranks: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    kept_count: torch.Tensor | None = None
    kept_ids: torch.Tensor | None = None
    kept_row_ptr: torch.Tensor | None = None
    kept_bitmask: torch.Tensor | None = None
    log_kept_mass: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    def numpy(self) -> SampleArrays:
        """The same outputs as NumPy arrays: over the same memory on a CPU, copied (which waits) from a GPU."""
        return SampleArrays(*to_numpy(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SampleOutput):
            return NotImplemented
        return all(_same_values(getattr(self, name), getattr(other, name)) for name in self.__slots__)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, name) for name in self.__slots__)


def to_numpy(out: Any) -> Iterator[Any]:
    """Every field of an output as an array, in their order."""
    for value in (getattr(out, name) for name in out.__slots__):
        yield None if value is None else value.numpy(force=True)


def _same_values(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    try:
        require_dense("a", a)
        require_dense("b", b)
    except ValueError:  # nothing to compare
        return False
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    b = b.to(a.device)
    return bool(((a == b) | ((a != a) & (b != b))).all())


torch.serialization.add_safe_globals([SampleOutput, SamplingParams])  # plain data, checked by its constructor

FIELD = {field.name: field for field in (*FIELDS, *LISTED)}
REPORTED = ("kept_count", "kept_bitmask", "log_kept_mass", "entropy")
"""What an engine may leave to be read later (reports.py)."""
SAMPLED = tuple(FIELD[name] for name in SampleOutput.__slots__)
"""Those of a SampleOutput, in its order."""


@lru_cache
def unrolled(each: str, names: tuple[str, ...], join: str) -> Any:
    """A function of a (and b) with an expression for each field, written out as dataclasses do: a loop takes twice as
    long, which matters in a step of a few microseconds. `each` is the expression, a format of the field's name."""
    return eval(f"lambda a, b=None: ({join.join(each.format(name) for name in names)})")


def listed(expressions: Sequence[str]) -> Any:
    """A function of a that gives a tuple of these, likewise."""
    return eval(f"lambda a: ({', '.join(expressions)},)")


def wanted(options: Options) -> tuple[str, ...]:
    """Names of the fields of a SampleOutput that have buffers before the call: all but exact lists of kept ids."""
    return _wanted(options._replace(num_samples=1, on_invalid="flag", backend="auto", input="logits"))


@lru_cache
def _wanted(options: Options) -> tuple[str, ...]:
    return tuple(field.name for field in SAMPLED if field.wanted(options))


# Invalid rows --------------------------------------------------------------------------------------------------------


def require_no_capture(status: torch.Tensor) -> None:
    """RuntimeError where statuses are to be read that a CUDA graph is being made of."""
    if status.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("on_invalid='raise' waits for the device, which no CUDA graph can; use on_invalid='flag'")


def raise_if_invalid(status: torch.Tensor, batch: Sequence[int] = (), kind: InputKind = "logits") -> None:
    """ValueError that names each invalid row (the first few) and what is wrong with it. Waits for the device.

    `batch`: the leading dimensions. Where there are several, a row's place among them is named too.
    """
    require_no_capture(status)
    bad = status.reshape(-1).nonzero()[:, 0].tolist()
    if bad:
        places = [f" {tuple(map(int, np.unravel_index(row, batch)))}" if len(batch) > 1 else "" for row in bad[:4]]
        shown = ", ".join(
            f"row {row}{place} has {WRONG[kind][int(status.reshape(-1)[row])]}"
            for row, place in zip(bad, places, strict=False)
        )
        more = f" and {len(bad) - 4} more rows are invalid" if len(bad) > 4 else ""
        raise ValueError(f"{kind}: {shown}{more}; on_invalid='flag' returns token -1 and a status instead")
