"""SamplingParams: every sampling parameter with its default, range and meaning, in one table.

The dataclass below *is* the table. Validation, the packed record that engines read, the command line's options, the
documentation, the integrations and the tests iterate over it. A new parameter is one more field here, at the end, where
no caller's positional argument changes its meaning, and one more member of `RowParams` in csrc/core/rows.h.

To read the table takes no torch, for which the command line's help would wait: the first value imports it.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from fastsample.presets import PRESETS, preset_name
from fastsample.spec import Spec, choice, flag, integer, real

if TYPE_CHECKING:
    import torch

    from fastsample.arrays import ArrayLike

Values: TypeAlias = "float | Sequence[float] | ArrayLike"
Ties: TypeAlias = Literal["first", "all"]
Order: TypeAlias = Literal["top_k_first", "min_p_first", "joint", "temperature_last"]

GREEDY_BELOW = 1e-5
"""A temperature below this (as float32) means greedy."""

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

    temperature: Values = real(
        1.0, "divides the logits; below 1e-5 the row is greedy", low=0.0, high=2.0**20, examples=(0.5, 2.0, 0.0)
    )
    top_k: int | Values = integer(0, "keep the k highest logits; 0 keeps all", low=0, off="0", examples=(2, 1))
    top_p: Values = real(
        1.0,
        "keep the shortest ranked prefix with this probability",
        low=0.0,
        high=1.0,
        open_low=True,
        off="1",
        examples=(0.6, 0.9),
    )
    min_p: Values = real(0.0, "keep tokens this probable relative to the best", low=0.0, high=1.0, examples=(0.4, 1.0))
    repetition_penalty: Values = real(
        1.0,
        "shrinks logits of tokens in prompt or output",
        low=0.0,
        open_low=True,
        off="1",
        counts="prompt_ids or output_ids",
        examples=(1.5, 0.4),
    )
    frequency_penalty: Values = real(
        0.0, "subtracted per occurrence in the output", counts="output_ids", examples=(0.3, -0.3)
    )
    presence_penalty: Values = real(
        0.0, "subtracted from tokens in the output", counts="output_ids", examples=(0.3, -0.7)
    )
    ties: Ties | Sequence[Ties] = choice("what top-k does with equal logits", "first", "all", beside={"top_k": 1})
    order: Order | Sequence[Order] = choice(
        "what top-p and min-p are measured over",
        "top_k_first",
        "min_p_first",
        "joint",
        "temperature_last",
        beside={"temperature": 1.5, "top_k": 6, "top_p": 0.7, "min_p": 0.4},
    )
    top_n_sigma: Values = real(
        0.0,
        "keep logits this many standard deviations from the highest; 0 keeps all",
        low=0.0,
        off="0",
        of_logits=True,
        examples=(0.5, 1.0),
    )
    typical_p: Values = real(
        1.0,
        "keep the tokens closest to the entropy, with this probability",
        low=0.0,
        high=1.0,
        open_low=True,
        off="1",
        of_logits=True,
        examples=(0.2, 0.7),
    )
    epsilon_cutoff: Values = real(
        0.0,
        "keep tokens of at least this probability",
        low=0.0,
        high=1.0,
        open_high=True,
        off="0",
        examples=(0.1, 0.04),
    )
    eta_cutoff: Values = real(
        0.0,
        "keep tokens of at least this probability, less where the entropy is high",
        low=0.0,
        high=1.0,
        open_high=True,
        off="0",
        of_logits=True,
        examples=(0.9, 0.3),
    )
    top_a: Values = real(
        0.0, "keep tokens of this times the square of the highest probability", low=0.0, high=1.0, examples=(1.0, 0.6)
    )
    p_less: bool | Values = flag("keep tokens at least as probable as that two draws agree")
    xtc_probability: Values = real(
        0.0,
        "how likely a draw excludes the top choices",
        low=0.0,
        high=1.0,
        off="0",
        examples=(1.0, 0.5),
        beside={"xtc_threshold": 0.1},
    )
    xtc_threshold: Values = real(
        0.1,
        "the probability of a top choice, for XTC",
        low=0.0,
        high=1.0,
        open_low=True,
        examples=(0.2, 0.05),
        beside={"xtc_probability": 1.0},
    )
    dry_multiplier: Values = real(
        0.0,
        "times a power of dry_base: subtracted from what extends a repetition",
        low=0.0,
        off="0",
        counts="prompt_ids or output_ids",
        of_history=True,
        examples=(0.8, 3.0),
        beside={"dry_allowed_length": 1},
    )
    dry_base: Values = real(
        1.75, "how fast DRY grows with the length", low=1.0, of_history=True, examples=(1.0, 3.0), beside=_DRY
    )
    dry_allowed_length: int | Values = integer(
        2, "shorter repetitions are free of DRY", low=1, of_history=True, examples=(3, 4), beside=_DRY
    )
    dry_range: int | Values = integer(
        0,
        "how many of the last ids DRY looks at; 0 means all",
        low=0,
        off="0",
        of_history=True,
        examples=(3, 5),
        beside=_DRY,
    )
    no_repeat_ngram_size: int | Values = integer(
        0,
        "no n-gram occurs twice; 0 is off",
        low=0,
        off="0",
        counts="prompt_ids or output_ids",
        of_history=True,
        examples=(2, 1),
    )

    def __post_init__(self) -> None:
        from fastsample.values import normalise

        for name, spec in specs():
            object.__setattr__(self, name, normalise(name, spec, getattr(self, name)))

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, SamplingParams) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(value for _, value in self._values())

    @classmethod
    def preset(cls, name: str, **fields: Any) -> SamplingParams:
        """The parameters that people know by a name; `fields` override it.

        Args:
            name: "neutral" (everything off), "llama.cpp", "vllm", "huggingface" (the defaults of each) or
                "min-p + xtc + dry" (what its authors advise for prose). Case, spaces and punctuation do not matter.

        Raises:
            ValueError: no such preset; the message lists them.
        """
        return cls(**{**PRESETS[preset_name(name)], **fields})

    def replace(self, **fields: Any) -> SamplingParams:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **fields)

    def per_row(self) -> dict[str, int]:
        """Number of values of each field that has one per row. ValueError where two fields disagree."""
        sizes = {name: len(v) for name, v in self._values() if not isinstance(v, (float, int, str))}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"parameters have different numbers of rows: {sizes}")
        return sizes

    def pack(self) -> torch.Tensor:
        """The records that the engines read: int32 [B or 1, number of fields] on the CPU, floats as their bits."""
        import torch

        from fastsample.checks import CPU
        from fastsample.values import code

        rows = next(iter(self.per_row().values()), None)
        columns = [code(spec, value) for (_, spec), (_, value) in zip(_SPECS, self._values(), strict=True)]
        per_row = {i: column for i, column in enumerate(columns) if isinstance(column, (torch.Tensor, list))}
        shared = [0 if i in per_row else column for i, column in enumerate(columns)]
        bits = struct.unpack(_INTS, struct.pack(_RECORD, *shared))
        record = torch.tensor([bits], dtype=torch.int32, device=CPU)
        if rows is None:
            return record
        records = record.repeat(rows, 1)
        write_columns(records, {_SPECS[i][0]: torch.as_tensor(column, device=CPU) for i, column in per_row.items()})
        return records

    def _values(self) -> Iterator[tuple[str, Any]]:
        return ((name, getattr(self, name)) for name, _ in _SPECS)

    def _key(self) -> tuple[Any, ...]:
        """The values in a form that compares and hashes: a column becomes a tuple, a scalar does not."""
        return tuple(v if isinstance(v, (float, int, str, tuple)) else tuple(v.tolist()) for _, v in self._values())


def specs() -> tuple[tuple[str, Spec], ...]:
    """(name, Spec) of every parameter, in the order of the packed record."""
    return _SPECS


def write_columns(records: torch.Tensor, columns: Mapping[str, torch.Tensor | float | None]) -> None:
    """Put values that are known to be valid into packed records, int32 [B, number of fields] on any device.

    Args:
        columns: fields of SamplingParams, one value per row [B] or for all; None leaves a field as it is. Integers are
            at most 2^31 - 1; a choice is its position among the choices.
    """
    from torch import float32

    floats = records.view(float32)
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


_SPECS: tuple[tuple[str, Spec], ...] = tuple((f.name, f.metadata["spec"]) for f in dataclasses.fields(SamplingParams))
_NAMES = frozenset(name for name, _ in _SPECS)
_COLUMNS = {name: (at, spec.kind) for at, (name, spec) in enumerate(_SPECS)}
_RECORD = "=" + "".join("f" if spec.kind == "float" else "i" for _, spec in _SPECS)
_INTS = "=" + "i" * len(_SPECS)
