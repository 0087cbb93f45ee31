"""SamplingParams: every sampling parameter with its default, range and meaning, in one table.

The dataclass below *is* the table. Validation, the packed record that engines read, the command line's options, the
documentation, the integrations and the tests iterate over it. A new parameter is one more field here, at the end, where
no caller's positional argument changes its meaning, and one more member of `RowParams` in csrc/core/rows.h.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch

from fastsample.checks import CPU, INTEGERS, from_numpy, is_list, require_dense, to_float32

Values: TypeAlias = "float | Sequence[float] | np.ndarray[Any, Any] | torch.Tensor"
Ties: TypeAlias = Literal["first", "all"]
Order: TypeAlias = Literal["top_k_first", "min_p_first", "joint", "temperature_last"]

GREEDY_BELOW = 1e-5
"""A temperature below this (as float32) means greedy."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Spec:
    """What one parameter may be. Numbers are compared as the float32 (or int) that the engines will see."""

    kind: Literal["float", "int", "bool", "choice"]
    meaning: str
    low: float = -_FLOAT32_MAX
    high: float = _FLOAT32_MAX
    open_low: bool = False
    choices: tuple[str, ...] = ()
    off: str = ""  # the neutral value, where other libraries have another one
    counts: str = ""  # for a penalty: the ids without which it has no effect
    open_high: bool = False
    of_logits: bool = False  # measured on logits, so that it has no meaning for probabilities
    examples: tuple[Any, ...] = ()  # for tests: values that each change what is kept, or its logits,
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # with these fields beside them

    @property
    def range(self) -> str:
        """The range in words, for error messages and documentation."""
        if self.kind == "choice":
            return "one of " + ", ".join(repr(c) for c in self.choices)
        if self.kind == "bool":
            return "True or False"
        low = "" if self.low == -_FLOAT32_MAX else f"{_number(self.low)} {'<' if self.open_low else '<='} "
        high = "" if self.high in (_FLOAT32_MAX, _INT32_MAX) else f" {'<' if self.open_high else '<='} {_number(self.high)}"
        noun = "an integer" if self.kind == "int" else "a finite number"
        return noun if not low and not high else f"{noun}, {low}value{high}"

    @property
    def wanted(self) -> str:
        """The range as an error tells it, with the value that means off."""
        return f"{self.range}; {self.off} is off" if self.off else self.range

    def accepts(self, value: Any) -> Any:
        """Whether a number, or each element of a tensor, lies in the range (NaN does not)."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above & below


def _number(value: float) -> str:
    return "2^20" if value == 2**20 else f"{value:g}"


def _real(default: float, meaning: str, **bounds: Any) -> Any:
    return dataclasses.field(default=default, metadata={"spec": Spec("float", meaning, **bounds)})


def _integer(default: int, meaning: str, low: int, high: int = _INT32_MAX, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"spec": Spec("int", meaning, low, high, **more)})


def _flag(meaning: str, **more: Any) -> Any:
    spec = Spec("bool", meaning, 0, 1, examples=(True,), **more)
    return dataclasses.field(default=False, metadata={"spec": spec})


def _choice(meaning: str, *choices: str, **more: Any) -> Any:
    spec = Spec("choice", meaning, choices=choices, examples=choices[1:], **more)
    return dataclasses.field(default=choices[0], metadata={"spec": spec})


_DRY = {"dry_multiplier": 0.8, "dry_allowed_length": 1}

_Class = TypeVar("_Class")


def _names_near_misses(cls: type[_Class]) -> type[_Class]:
    """Make a class's constructor name the known fields when it gets an unknown one."""
    target: Any = cls
    known = target.__init__

    @functools.wraps(known)
    def init(self: Any, *values: Any, **fields: Any) -> None:
        check_names(fields)
        known(self, *values, **fields)

    target.__init__ = init
    return cls


@_names_near_misses
@dataclass(frozen=True, eq=False)
class SamplingParams:
    """How each row is sampled.

    Every field takes a scalar, which all rows share, or one value per row: a sequence or a 1-D tensor of length B.
    Values are rounded to float32 (`top_k` to int32; any `top_k` of the vocabulary's size or more is off) before their
    range is checked. Equal values make equal params, with equal hashes; a scalar is not equal to one value per row.

    Args:
        temperature: divides the logits; below 1e-5 the row is greedy. 0 <= T <= 2^20.
        top_k: keep the k highest logits (Fan et al. 2018); 0 keeps all.
        top_p: nucleus sampling (Holtzman et al. 2020): keep the shortest prefix of the ranking whose probability
            reaches p. 0 < p <= 1; 1 keeps all.
        min_p: keep tokens at least this fraction as probable as the most probable one (Nguyen et al. 2024).
            0 <= m <= 1; 0 keeps all.
        repetition_penalty: divide positive and multiply negative logits of tokens seen in the prompt or the output
            (CTRL, Keskar et al. 2019). > 0; 1 is neutral.
        frequency_penalty: subtract this times the token's count in the output (OpenAI API). Finite; 0 is neutral.
        presence_penalty: subtract this from tokens that occur in the output (OpenAI API). Finite; 0 is neutral.
        ties: what top-k does with logits equal to the k-th: "first" keeps exactly k, lower ids first; "all" keeps
            every one (Hugging Face).
        order: "top_k_first" (Hugging Face: top-k, top-p over what it kept, then min-p), "min_p_first" (vLLM: top-p over
            what top-k and min-p kept), "joint" (FlashInfer: each filter judges the whole row) or "temperature_last"
            (llama.cpp: filters at T = 1, typical before top-p; then the temperature).
        top_n_sigma: keep logits at most this many standard deviations below the highest (Tang et al. 2024). >= 0; 0
            keeps all.
        typical_p: locally typical sampling (Meister et al. 2022): keep the tokens whose information is closest to the
            entropy, until their probability reaches t. May leave out the most probable token. 0 < t <= 1; 1 keeps all.
        epsilon_cutoff: keep tokens of at least this probability (Hewitt et al. 2022). 0 <= e < 1; 0 keeps all.
        eta_cutoff: keep tokens of at least the probability min(e, sqrt(e) * exp(-entropy)) (Hewitt et al. 2022).
            0 <= e < 1; 0 keeps all.
        top_a: keep tokens of at least a times the square of the highest probability (KoboldAI). 0 <= a <= 1; 0 keeps
            all.
        p_less: keep tokens of at least the probability that two draws agree, the sum of all squares (Tan et al. 2025).
        xtc_probability: how likely a draw excludes the top choices (XTC, p-e-w 2024): where two or more tokens have the
            probability `xtc_threshold`, all of them but the least probable. 0 <= r <= 1; 0 is off.
        xtc_threshold: the probability of a top choice. 0 < t <= 1.
        dry_multiplier: DRY (p-e-w 2024) subtracts this times `dry_base` to the power of (length -
            `dry_allowed_length`) from a token that would extend a repetition of that length. >= 0; 0 is off.
        dry_base: >= 1.
        dry_allowed_length: repetitions that are shorter than this are free. >= 1.
        dry_range: how many of the last ids of prompt and output DRY looks at. >= 0; 0 means all.
        no_repeat_ngram_size: no n-gram of prompt and output occurs again (Hugging Face; Paulus et al. 2017). >= 0; 0 is
            off.

    Raises:
        TypeError: a value that is not a number, a choice that is not a string, or an unknown name.
        ValueError: a value out of range; the message names the parameter, the row and the value.
    """

    temperature: Values = _real(
        1.0, "divides the logits; below 1e-5 the row is greedy", low=0.0, high=2.0**20, examples=(0.5, 2.0, 0.0)
    )
    top_k: int | Values = _integer(0, "keep the k highest logits; 0 keeps all", low=0, off="0", examples=(2, 1))
    top_p: Values = _real(
        1.0,
        "keep the shortest ranked prefix with this probability",
        low=0.0,
        high=1.0,
        open_low=True,
        off="1",
        examples=(0.6, 0.9),
    )
    min_p: Values = _real(0.0, "keep tokens this probable relative to the best", low=0.0, high=1.0, examples=(0.4, 1.0))
    repetition_penalty: Values = _real(
        1.0,
        "shrinks logits of tokens in prompt or output",
        low=0.0,
        open_low=True,
        off="1",
        counts="prompt_ids or output_ids",
        examples=(1.5, 0.4),
    )
    frequency_penalty: Values = _real(
        0.0, "subtracted per occurrence in the output", counts="output_ids", examples=(0.3, -0.3)
    )
    presence_penalty: Values = _real(
        0.0, "subtracted from tokens in the output", counts="output_ids", examples=(0.3, -0.7)
    )
    ties: Ties | Sequence[Ties] = _choice("what top-k does with equal logits", "first", "all", beside={"top_k": 1})
    order: Order | Sequence[Order] = _choice(
        "what top-p and min-p are measured over",
        "top_k_first",
        "min_p_first",
        "joint",
        "temperature_last",
        beside={"temperature": 1.5, "top_k": 6, "top_p": 0.7, "min_p": 0.4},
    )
    top_n_sigma: Values = _real(
        0.0,
        "keep logits this many standard deviations from the highest; 0 keeps all",
        low=0.0,
        off="0",
        of_logits=True,
        examples=(0.5, 1.0),
    )
    typical_p: Values = _real(
        1.0,
        "keep the tokens closest to the entropy, with this probability",
        low=0.0,
        high=1.0,
        open_low=True,
        off="1",
        of_logits=True,
        examples=(0.2, 0.7),
    )
    epsilon_cutoff: Values = _real(
        0.0, "keep tokens of at least this probability", low=0.0, high=1.0, open_high=True, off="0", examples=(0.1, 0.04)
    )
    eta_cutoff: Values = _real(
        0.0,
        "keep tokens of at least this probability, less where the entropy is high",
        low=0.0,
        high=1.0,
        open_high=True,
        off="0",
        of_logits=True,
        examples=(0.9, 0.3),
    )
    top_a: Values = _real(
        0.0, "keep tokens of this times the square of the highest probability", low=0.0, high=1.0, examples=(1.0, 0.6)
    )
    p_less: bool | Values = _flag("keep tokens at least as probable as that two draws agree")
    xtc_probability: Values = _real(
        0.0,
        "how likely a draw excludes the top choices",
        low=0.0,
        high=1.0,
        off="0",
        examples=(1.0, 0.5),
        beside={"xtc_threshold": 0.1},
    )
    xtc_threshold: Values = _real(
        0.1,
        "the probability of a top choice, for XTC",
        low=0.0,
        high=1.0,
        open_low=True,
        examples=(0.2, 0.05),
        beside={"xtc_probability": 1.0},
    )
    dry_multiplier: Values = _real(
        0.0,
        "times a power of dry_base: subtracted from what extends a repetition",
        low=0.0,
        off="0",
        counts="prompt_ids or output_ids",
        examples=(0.8, 3.0),
        beside={"dry_allowed_length": 1},
    )
    dry_base: Values = _real(
        1.75, "how fast DRY grows with the length", low=1.0, examples=(1.0, 3.0), beside=_DRY
    )
    dry_allowed_length: int | Values = _integer(
        2, "shorter repetitions are free of DRY", low=1, examples=(3, 4), beside=_DRY
    )
    dry_range: int | Values = _integer(
        0, "how many of the last ids DRY looks at; 0 means all", low=0, off="0", examples=(3, 5), beside=_DRY
    )
    no_repeat_ngram_size: int | Values = _integer(
        0, "no n-gram occurs twice; 0 is off", low=0, off="0", counts="prompt_ids or output_ids", examples=(2, 1)
    )

    def __post_init__(self) -> None:
        for name, spec in specs():
            object.__setattr__(self, name, _normalise(name, spec, getattr(self, name)))

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, SamplingParams) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(value for _, value in self._values())

    def replace(self, **fields: Any) -> SamplingParams:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **fields)

    def per_row(self) -> dict[str, int]:
        """Number of values of each field that has one per row. ValueError where two fields disagree."""
        sizes = {name: len(v) for name, v in self._values() if isinstance(v, (torch.Tensor, tuple))}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"parameters have different numbers of rows: {sizes}")
        return sizes

    def pack(self) -> torch.Tensor:
        """The records that the engines read: int32 [B or 1, number of fields] on the CPU, floats as their bits."""
        rows = next(iter(self.per_row().values()), None)
        columns = [_code(spec, value) for (_, spec), (_, value) in zip(_SPECS, self._values(), strict=True)]
        shared = [0 if isinstance(column, (torch.Tensor, list)) else column for column in columns]
        bits = struct.unpack(_INTS, struct.pack(_RECORD, *shared))
        record = torch.tensor([bits], dtype=torch.int32, device=CPU)
        if rows is None:
            return record
        records = record.repeat(rows, 1)
        per_row = [i for i, column in enumerate(columns) if isinstance(column, (torch.Tensor, list))]
        write_columns(records, {_SPECS[i][0]: torch.as_tensor(columns[i], device=CPU) for i in per_row})
        return records

    def _values(self) -> Iterator[tuple[str, Any]]:
        return ((name, getattr(self, name)) for name, _ in _SPECS)

    def _key(self) -> tuple[Any, ...]:
        """The values in a form that compares and hashes: a column becomes a tuple, a scalar does not."""
        return tuple(tuple(v.tolist()) if isinstance(v, torch.Tensor) else v for _, v in self._values())


def specs() -> tuple[tuple[str, Spec], ...]:
    """(name, Spec) of every parameter, in the order of the packed record."""
    return _SPECS


def write_columns(records: torch.Tensor, columns: Mapping[str, torch.Tensor | float | None]) -> None:
    """Put values that are known to be valid into packed records, int32 [B, number of fields] on any device.

    Args:
        columns: fields of SamplingParams, one value per row [B] or for all; None leaves a field as it is. Integers are
            at most 2^31 - 1; a choice is its position among the choices.
    """
    floats = records.view(torch.float32)
    for name, values in columns.items():
        if values is not None:
            at, kind = _COLUMNS[name]
            (floats if kind == "float" else records)[:, at] = values


def check_names(fields: Iterable[str], others: Iterable[str] = ()) -> None:
    """TypeError if a name is not a field of SamplingParams; `others` are the call's other arguments."""
    if not _NAMES.issuperset(fields):
        name = next(name for name in fields if name not in _NAMES)
        raise TypeError(unknown_name(name, others))


def unknown_name(name: str, others: Iterable[str] = ()) -> str:
    """The error message for a name that is not a field."""
    from difflib import get_close_matches

    known = [*(own for own, _ in _SPECS), *others]
    near = get_close_matches(name.lower(), known, 1) or [other for other in known if other.startswith(name.lower())]
    guess = f" (did you mean {near[0]}?)" if near and name not in known else ""  # else it is another call's argument
    return f"{name}{guess}: expected a field of SamplingParams: {', '.join(own for own, _ in _SPECS)}"


def _code(spec: Spec, value: Any) -> Any:
    """A validated value as the record holds it: a choice becomes its position among the choices."""
    if spec.kind != "choice":
        return value
    return [spec.choices.index(v) for v in value] if isinstance(value, tuple) else spec.choices.index(value)


def _normalise(name: str, spec: Spec, value: Any) -> Any:
    """The validated value: a number or a name, or per row a 1-D tensor or a tuple of names."""
    if type(value) in (float, int, str):  # the usual types first: abstract ones take longer to check
        return _scalar(name, spec, value, "")
    if isinstance(value, np.ndarray):
        value = from_numpy(value) if value.dtype.kind in "biuf" else value.tolist()
    if isinstance(value, torch.Tensor):
        require_dense(name, value)
        value = value.item() if value.ndim == 0 else value
    if isinstance(value, torch.Tensor):
        return _tensor(name, spec, value)
    if not is_list(value):
        return _scalar(name, spec, value, "")
    items = [_scalar(name, spec, item, f" (row {row})") for row, item in enumerate(value)]
    return tuple(items) if spec.kind == "choice" else torch.tensor(items, dtype=_dtype(spec), device=CPU)


_KINDS: dict[str, Any] = {
    "choice": str,
    "int": numbers.Integral,
    "float": numbers.Real,
    "bool": (bool, np.bool_, numbers.Integral),
}


def _scalar(name: str, spec: Spec, value: Any, where: str) -> Any:
    if not isinstance(value, _KINDS[spec.kind]) or (isinstance(value, (bool, np.bool_)) and spec.kind != "bool"):
        raise TypeError(f"{name} = {value!r}{where}: expected {spec.wanted}")
    if spec.kind == "choice":
        good = value in spec.choices
    else:
        number = to_float32(value) if spec.kind == "float" else min(int(value), _INT32_MAX)
        good = spec.accepts(number)
    if not good:
        raise ValueError(f"{name} = {value!r}{where}: expected {spec.wanted}")
    if spec.kind == "bool":
        return bool(value)
    return value if spec.kind == "choice" else number


def _tensor(name: str, spec: Spec, value: torch.Tensor) -> torch.Tensor:
    if value.ndim != 1:
        raise ValueError(f"{name}: expected a scalar or a 1-D tensor [B], got shape {tuple(value.shape)}")
    numeric = value.dtype in INTEGERS or (spec.kind == "float" and value.is_floating_point())
    numeric |= spec.kind == "bool" and value.dtype == torch.bool
    if spec.kind == "choice" or not numeric:
        raise TypeError(f"{name}: expected {spec.range} per row, got a tensor of {value.dtype}")
    # A copy: validated values must not change with the caller's tensor.
    wide = torch.float64 if spec.kind == "float" or value.dtype == torch.uint64 else torch.int64
    column = value.detach().to("cpu", wide, copy=True)
    column = column.float() if spec.kind == "float" else column.clamp(max=_INT32_MAX).to(torch.int64)
    good = spec.accepts(column)
    if not bool(good.all()):
        row = int((~good).nonzero()[0, 0])
        raise ValueError(f"{name} = {value[row].item()!r} (row {row}): expected {spec.wanted}")
    return column.to(_dtype(spec))


def _dtype(spec: Spec) -> torch.dtype:
    return torch.float32 if spec.kind == "float" else torch.int32


_SPECS: tuple[tuple[str, Spec], ...] = tuple((f.name, f.metadata["spec"]) for f in dataclasses.fields(SamplingParams))
_NAMES = frozenset(name for name, _ in _SPECS)
_COLUMNS = {name: (at, spec.kind) for at, (name, spec) in enumerate(_SPECS)}
_RECORD = "=" + "".join("f" if spec.kind == "float" else "i" for _, spec in _SPECS)
_INTS = "=" + "i" * len(_SPECS)
