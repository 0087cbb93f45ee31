"""Sampling rows of logits that are split over the ranks of a process group, without gathering them.

Each rank has the logits of a range of token ids, as the head of a tensor-parallel model leaves them. Every rank gets
the same outputs, equal to the bit to those of the whole row on one device: what ranks exchange are maxima, integer
sums, counts and the first tokens of each.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

import fastsample as fs
from fastsample.arrays import ArrayLike, as_tensor
from fastsample.checks import MAX_VOCAB, check_logits, count, require_tensor, whole
from fastsample.distributed.engine import SplitEngine
from fastsample.distributed.wire import Wire
from fastsample.inputs.masks import check_bitmask
from fastsample.outputs import SampleOutput
from fastsample.params import SamplingParams
from fastsample.traced import untraced
from fastsample.verified import VerifyOutput

Tensor = torch.Tensor

__all__ = ["ShardedSampler", "Split", "sample", "verify", "verify_tree"]


class Split:
    """How rows are split over ranks, and this rank's part in it.

    The first call compares what ranks must have in common: the split, shapes, parameters, seeds. Later calls do not.

    Args:
        vocab_start: the id of this rank's first token. Ranks have their tokens in the order of their ranks.
        vocab_size: V, of the whole rows. Columns past it, with which a vocabulary was padded, are left out.
        group: the ranks; None is the default group, or a single rank where there is none.
        backend: what does this rank's own work, as for `fastsample.sample`.

    Attributes:
        rounds, sent: how often ranks have exchanged messages so far, and bytes that this rank has sent to each other.
    """

    def __init__(
        self, vocab_start: int, vocab_size: int, *, group: dist.ProcessGroup | Wire | None = None, backend: str = "auto"
    ) -> None:
        vocab = count("vocab_size", vocab_size, 1, MAX_VOCAB)
        start = whole("vocab_start", vocab_start)
        if start < 0:
            raise ValueError(f"vocab_start = {start}: expected 0 or more")
        self._wire = group if isinstance(group, Wire) else Wire(group)
        self.engine = SplitEngine(self._wire, start, vocab, backend)
        self._memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @property
    def rounds(self) -> int:
        return self._wire.rounds

    @property
    def sent(self) -> int:
        return self._wire.sent

    def whole(self, logits: ArrayLike, mask: ArrayLike | None = None, seed: Any = 0) -> Tensor:
        """What stands for the whole rows in a call: it has their shape, and memory that nobody reads."""
        own: Any = as_tensor("logits", logits)
        table = self._table(own)
        if mask is not None:
            mask = check_bitmask(mask, table)
        self.engine.prepare(table, mask, seed is not None)
        return self._in_place_of(own)

    def whole_drafts(self, logits: Any, options: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `fastsample.verify`, in which whole rows stand for what drafts were drawn from.

        Args:
            logits: this rank's part of the target's rows, as `whole` takes them.
            options: where there are `draft_logits` or `draft_probs`, they are of the same columns.
        """
        found = dict(options)
        for name in ("draft_logits", "draft_probs"):
            if isinstance(own := as_tensor(name, options.get(name)), Tensor):
                table = self._table(own, name)
                if own.shape[-1] != logits.shape[-1]:
                    has = f"{logits.shape[-1]} columns, as this rank's logits have"
                    raise ValueError(f"{name}: expected {has}, got shape {list(own.shape)}")
                self.engine.prepare_drafts(table)
                found[name] = self._in_place_of(own)
        return found

    def _in_place_of(self, own: Tensor) -> Tensor:
        name = own.dtype, own.device
        if name not in self._memory:
            with torch.inference_mode(False):
                self._memory[name] = torch.empty(self.engine.vocab, dtype=own.dtype, device=own.device)
        return self._memory[name].expand(*own.shape[:-1], -1)

    def fresh_seed(self) -> int:
        """A seed from torch's default CPU generator on the first rank, for all."""
        own = torch.empty(1, dtype=torch.int64).random_()
        return int(self._wire.gather(own)[0])

    def _table(self, logits: Tensor, name: str = "logits") -> Tensor:
        if isinstance(logits, torch.Tensor) and logits.ndim and not logits.shape[-1]:
            require_tensor(name, logits, logits.device)
            return logits.detach().reshape(logits.shape[:-1].numel(), 0)
        return check_logits(logits, name=name).detach()


_splits: WeakKeyDictionary[Any, dict[Any, Split]] = WeakKeyDictionary()
_alone: dict[Any, Split] = {}


def _split(vocab_start: int, vocab_size: int, group: Any, backend: str) -> Split:
    """The split of earlier calls with the same arguments, which have compared what ranks have in common."""
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    known = _alone if group is None else _splits.setdefault(group, {})
    name = vocab_start, vocab_size, backend
    if name not in known:
        known[name] = Split(vocab_start, vocab_size, group=group, backend=backend)
    return known[name]


@untraced
def sample(
    logits: ArrayLike,
    params: SamplingParams | None = None,
    *,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    bitmask_shard: ArrayLike | None = None,
    backend: str = "auto",
    seed: Any = None,
    **options: Any,
) -> SampleOutput:
    """`fastsample.sample` for rows that are split over ranks; every rank must make the same call.

    Args:
        logits: this rank's, [B, V_r], with 0 <= V_r; as for `fastsample.sample`.
        params: how to sample, the same on every rank.
        vocab_start, vocab_size, group, backend: as for `Split`.
        bitmask_shard: int32 [B, ceil(V_r / 32)] or [words]: a mask of this rank's own tokens, whose first bit is
            that of `vocab_start`. A `bitmask` is of the whole row.
        seed: as for `fastsample.sample`; None takes the fresh seeds of the first rank.
        **options: all other arguments of `fastsample.sample`, and fields of SamplingParams. Ids are global: those of
            `bias`, of `prompt_ids` and `output_ids`, of `dry_breakers` and `allowed_ids`.

    Returns:
        SampleOutput, the same on every rank.

    Raises:
        TypeError, ValueError: as for `fastsample.sample`; or in the first call, on every rank, that ranks differ.
        RuntimeError: a rank did not answer within the group's timeout.
    """
    split = _split(vocab_start, vocab_size, group, backend)
    rows = split.whole(logits, bitmask_shard, seed)
    return fs.sample(rows, params, seed=seed, backend=split.engine, **options)  # type: ignore[arg-type]


@untraced
def verify(
    logits: ArrayLike,
    draft_ids: Any,
    params: SamplingParams | None = None,
    *,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    seed: Any = None,
    **options: Any,
) -> VerifyOutput:
    """`fastsample.verify` for rows that are split over ranks, by any rule; every rank must make the same call.

    Args:
        logits: this rank's, [B, K + 1, V_r] or [N, V_r]; as for `fastsample.verify`.
        draft_ids: as for `fastsample.verify`; global ids, the same on every rank.
        params, vocab_start, vocab_size, group, backend, seed: as for `sample`.
        **options: all other arguments of `fastsample.verify`, and fields of SamplingParams. `draft_logits` or
            `draft_probs`, for the rules "chain" and "block", are this rank's part of what the drafts were drawn from,
            [B, K, V_r] or [sum(num_drafts), V_r]: the same columns as those of the logits. Probabilities are relative
            to their sum over all ranks.

    Returns:
        VerifyOutput, the same on every rank.

    Raises:
        TypeError, ValueError, RuntimeError: as for `sample` and `fastsample.verify`.
    """
    split = _split(vocab_start, vocab_size, group, backend)
    rows = split.whole(logits, None, seed)
    options = split.whole_drafts(logits, options)
    return fs.verify(rows, draft_ids, params, seed=seed, backend=split.engine, **options)  # type: ignore[arg-type]


@untraced
def verify_tree(
    logits: ArrayLike,
    draft_ids: Tensor,
    parents: Tensor,
    params: SamplingParams | None = None,
    *,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    seed: Any = None,
    **options: Any,
) -> VerifyOutput:
    """`fastsample.verify_tree` for rows that are split over ranks; as `sample`."""
    split = _split(vocab_start, vocab_size, group, backend)
    rows = split.whole(logits, None, seed)
    engine: Any = split.engine
    return fs.verify_tree(rows, draft_ids, parents, params, seed=seed, backend=engine, **options)


class ShardedSampler(fs.Sampler):
    """`fastsample.Sampler` for rows that are split over ranks.

    Args:
        params, batch_size: as for `fastsample.Sampler`.
        vocab_start, vocab_size, group, backend: as for `Split`.
        seed: as for `fastsample.Sampler`; None takes a fresh seed of the first rank.
        **options: all other arguments of `fastsample.Sampler`.

    It cannot be copied or pickled.
    """

    def __init__(
        self,
        params: SamplingParams | None = None,
        *,
        batch_size: int,
        vocab_start: int,
        vocab_size: int,
        seed: Any = None,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        self.split = Split(vocab_start, vocab_size, group=group, backend=backend)
        engine: Any = self.split.engine
        seed = self.split.fresh_seed() if seed is None else seed
        super().__init__(params, batch_size=batch_size, seed=seed, backend=engine, **options)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("ShardedSampler: cannot be copied or pickled, since it belongs to a process group")

    @untraced
    def __call__(self, logits: ArrayLike, *, bitmask_shard: ArrayLike | None = None, **inputs: Any) -> SampleOutput:
        """One step, as `fastsample.Sampler`'s, with this rank's logits [B, V_r]."""
        return super().__call__(self.split.whole(logits, bitmask_shard), **inputs)

    @untraced
    def verify(self, logits: ArrayLike, draft_ids: Any, **inputs: Any) -> VerifyOutput:
        """Verify drafts, as `fastsample.Sampler.verify`, with this rank's logits [B, K + 1, V_r]; as `verify`."""
        rows = self.split.whole(logits)
        return super().verify(rows, draft_ids, **self.split.whole_drafts(logits, inputs))
