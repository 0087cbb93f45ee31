"""One step of `fs_generate`: its inputs besides the logits, the draw, and the state of each sequence after it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers.generation.logits_process import LogitsProcessor, NoRepeatNGramLogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from fastsample.api import filter_logits
from fastsample.inputs import Bias, pack_bias
from fastsample.inputs.penalties import active_penalties
from fastsample.integrations.grammar import GrammarBatch, GrammarError
from fastsample.integrations.transformers.conflicts import culprits, told
from fastsample.integrations.transformers.plan import Plan
from fastsample.integrations.transformers.results import asked_for
from fastsample.integrations.transformers.rows import repeated, siblings
from fastsample.outputs import STATUS, Options, SampleOutput
from fastsample.params import SamplingParams
from fastsample.sampler import Sampler

_NOTHING_LEFT = 3  # of STATUS


@dataclass
class Progress:
    """The state of the sequences before a step.

    Attributes:
        status: int32 [B], as in SampleOutput: why a sequence that could have no token was ended, or 0.
        done: bool [B], which sequences have ended; None before the first step.
        lengths: int64 [B], the number of ids of each sequence, prompt included, up to its end.
        reasons: the status in words, for the sequences that have one.
    """

    status: torch.Tensor
    done: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    reasons: dict[int, str] = field(default_factory=dict)

    @property
    def errors(self) -> list[str | None]:
        """The reason, or None, of each sequence."""
        return [self.reasons.get(row) for row in range(len(self.status))]

    def end(self, row: int, status: int, reason: str) -> None:
        """Note why a sequence ends; the first reason counts."""
        if row not in self.reasons:
            self.reasons[row] = reason
            self.status[row] = status


class Followed:
    """The grammars of a call. With on_invalid="flag", a sequence that its grammar cannot continue ends."""

    def __init__(self, batch: GrammarBatch, progress: Progress, flag: bool) -> None:
        self._batch, self._progress, self._flag = batch, progress, flag

    def bitmask(self, scores: torch.Tensor) -> torch.Tensor:
        """As in GrammarBatch; a sequence without a token has ended, and every token is then allowed."""
        while True:
            try:
                return self._batch.bitmask(scores)
            except GrammarError as error:
                self._end(error, _NOTHING_LEFT)

    def accept(self, tokens: list[int | None]) -> list[bool]:
        """Append a token to each sequence, None to those that have ended; returns which have ended."""
        try:
            self._batch.accept(tokens)
        except GrammarError as error:
            # A finished text that breaks its grammar is reported after all sequences have moved; otherwise none has.
            if not self._batch.ended[error.row]:
                raise
            self._end(error, 0)
        return self._batch.ended

    @property
    def truncated(self) -> list[bool]:
        """Per sequence: whether its text is not a whole text of its grammar."""
        while True:
            try:
                return self._batch.truncated
            except GrammarError as error:
                self._end(error, 0)

    def _end(self, error: GrammarError, status: int) -> None:
        if not self._flag:
            raise error
        self._progress.end(error.row, status, str(error))
        self._batch.end(error.row)


class Inputs:
    """A step's inputs besides the logits: the text so far where a parameter looks at it, masks and bias."""

    def __init__(
        self,
        plan: Plan,
        params: SamplingParams,
        grammar: Followed | None,
        prompt: torch.Tensor,
        copies: int,
        breakers: torch.Tensor | None = None,
    ) -> None:
        self._active = active_penalties(params)
        self._breakers = breakers if "dry_multiplier" in self._active else None  # int64 [L], or [B, L]
        self._ngrams = repeated(params, copies).no_repeat_ngram_size if copies > 1 else params.no_repeat_ngram_size
        self._plan, self._grammar = plan, grammar
        self._bias: Bias | None = None
        self._length = prompt.shape[1]
        self._prompt = prompt.repeat_interleave(copies, 0)
        if plan.ignored is not None:
            position = torch.arange(self._length, device=prompt.device)
            first = torch.as_tensor(plan.ignored, device=prompt.device).reshape(-1, 1)
            first = first.repeat_interleave(copies, 0) if len(first) > 1 else first
            self._prompt = self._prompt.masked_fill(position < first, -1)

    @property
    def needed(self) -> bool:
        """Whether greedy search needs any of them."""
        return bool(self._active) or self._grammar is not None or self._plan.bias is not None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, every: int = 1) -> dict[str, Any]:
        """The keyword arguments of a call, for every `every`-th row; empty if nothing is needed."""
        inputs: dict[str, Any] = {}
        if self._active:
            inputs["prompt_ids"] = self._prompt[::every]
            inputs["output_ids"] = input_ids[::every, self._length :]
        if self._breakers is not None:
            inputs["dry_breakers"] = self._breakers if self._breakers.ndim == 1 else self._breakers[::every]
        masks = list(self._masks(input_ids, scores).values())
        if masks:
            inputs["bitmask"] = (masks[0] if len(masks) == 1 else masks[0] & masks[1])[::every]
        if self._plan.bias is not None:
            table = scores[::every]
            if self._bias is None or len(self._bias.row_ptr) != len(table) + 1:
                self._bias = pack_bias(self._plan.bias, table)
            inputs["bias"] = self._bias
        return inputs

    def why_nothing_is_left(self, row: int, input_ids: torch.Tensor, scores: torch.Tensor) -> str:
        """Which options forbid a row every token, in words."""
        masks = self._masks(input_ids, scores)
        allowed = {name: _unpacked(mask[row], scores.shape[1]) for name, mask in masks.items()}
        if "no_repeat_ngram_size" in self._active:
            allowed["no_repeat_ngram_size"] = self._no_repeated_ngram(row, input_ids, scores)
        return told(row, culprits(row, input_ids[row, None], scores[row], self._plan.own, allowed))

    def _no_repeated_ngram(self, row: int, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """What the ban of repeated n-grams leaves a row, bool [V]."""
        size = int(torch.as_tensor(self._ngrams).expand(len(input_ids))[row])
        if size == 0:
            return torch.ones_like(scores[row], dtype=torch.bool)
        ids = torch.cat([self._prompt[row], input_ids[row, self._length :]])
        left: torch.Tensor = NoRepeatNGramLogitsProcessor(size)(
            ids[ids >= 0][None], torch.zeros_like(scores[row, None])
        )
        return left[0] > -torch.inf

    def _masks(self, input_ids: torch.Tensor, scores: torch.Tensor) -> dict[str, torch.Tensor]:
        """Bitmasks of allowed tokens, int32 [B, words], by the name of the option."""
        masks = {} if self._grammar is None else {"grammar": self._grammar.bitmask(scores)}
        return (
            masks
            if self._plan.allowed is None
            else masks | {"prefix_allowed_tokens_fn": self._allowed(input_ids, scores)}
        )

    def _allowed(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """What prefix_allowed_tokens_fn allows, as a bitmask."""
        rows, vocab = scores.shape
        bits = np.zeros((rows, -(-vocab // 32) * 32), dtype=np.uint8)
        for row, ids in enumerate(input_ids):
            allowed = self._plan.allowed(row, ids) if self._plan.allowed is not None else []
            bits[row, :vocab][torch.as_tensor(allowed, dtype=torch.int64).cpu().numpy()] = 1
        words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
        return torch.from_numpy(words).to(scores.device)


def _unpacked(words: torch.Tensor, vocab: int) -> torch.Tensor:
    """A row of a bitmask as bool [V]."""
    bits = np.unpackbits(words.cpu().numpy().view(np.uint8), bitorder="little")[:vocab]
    missing = np.zeros(vocab - len(bits), dtype=np.uint8)  # past the last word nothing is allowed
    return torch.from_numpy(np.concatenate([bits, missing])).to(words.device).bool()


class Clean(LogitsProcessor):
    """Runs first, and keeps the model's own logits for the log-probabilities."""

    scores: torch.Tensor

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        self.scores = scores.clone()  # some processors write to their input
        return scores


@dataclass(eq=False)
class Draw(LogitsProcessor):
    """Draws each sequence's token and returns scores that have their only maximum there.

    `generate` takes that maximum and uses nothing else of the scores, unless it collects them (output_scores). So one
    buffer of zeros with a single 1 per row serves every step, the filtered scores are kept separately, and the incoming
    scores are only read: transformers may hold a reference to them (output_logits).

    Attributes:
        params: per prompt if prompts branch, else per sequence.
        seeds, offsets: int64 bits, likewise.
        options: what is asked of each step.
        sampled: False takes the most probable token, as greedy search does.
        copies, first_copy: how many sequences a prompt branches into, and the number of the first of them.
        padding: the id given to a sequence that is ended because it can have no token; None makes that an error.
        apart: whether the sequences of a prompt may allow different first tokens.
        clean: holds the logits for "raw" log-probabilities when processors of transformers change them first.
        filtered: the filtered scores of each step, where they are collected.
        steps: what each step reported besides its tokens, where something was asked for.
    """

    params: SamplingParams
    inputs: Inputs
    seeds: torch.Tensor
    offsets: torch.Tensor
    progress: Progress
    options: Options
    sampled: bool = True
    copies: int = 1
    first_copy: int = 0
    padding: int | None = None
    apart: bool = False
    clean: Clean | None = None
    filtered: list[torch.Tensor] | None = None
    steps: list[SampleOutput] = field(default_factory=list)
    sampler: Sampler | None = None
    choice: torch.Tensor | None = None  # float32 [B, V]
    chosen: torch.Tensor | None = None  # int64 [B, 1], where it holds a 1

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        first = self.sampler is None and self.first_copy + self.copies > 1
        every = self.copies if first and not self.apart else 1
        inputs = self.inputs(input_ids, scores, every)
        if first:
            out = self._branch(scores[::every], inputs)
        else:
            self.sampler = self.sampler or self._new_sampler(self.params, self.seeds, self.offsets)
            out = self.sampler(scores, **inputs)
        tokens = out.tokens.reshape(-1, 1)
        if bool(out.status.any()):
            self._end_invalid(out.status.repeat_interleave(every), input_ids, scores)
            tokens = tokens.clamp(min=0)  # of sequences that have ended
        if self.progress.reasons:
            tokens = tokens.where(self.progress.status[:, None] == 0, self.padding or 0)
        if asked_for(self.options):
            own = None if out.logprobs is None else out.logprobs.flatten() if self.clean is None else self._raw(tokens)
            self.steps.append(replace(out, logprobs=own))
        if self.filtered is not None:
            backend = self.options.backend
            self.filtered.append(filter_logits(scores, self.params, backend=backend, on_invalid="flag", **inputs))
        return self._one_hot(tokens, scores)

    def _branch(self, scores: torch.Tensor, inputs: dict[str, Any]) -> SampleOutput:
        """The first step of prompts that branch: draw j is the j-th sequence's. Also makes the later steps' sampler."""
        every, numbers = self.first_copy + self.copies, slice(self.first_copy, None)
        own = siblings(self.seeds, every).view(-1, every)[:, numbers].flatten()
        params = repeated(self.params, self.copies)
        offsets = self.offsets.repeat_interleave(self.copies)
        self.sampler = self._new_sampler(params, own, offsets + 1)
        if not self.apart:
            out = self._new_sampler(self.params, self.seeds, self.offsets, every)(scores, **inputs)
            drawn = None if out.logprobs is None else out.logprobs[:, numbers]
            return replace(out, tokens=out.tokens[:, numbers], logprobs=drawn)
        seeds = self.seeds.repeat_interleave(self.copies)
        out = self._new_sampler(params, seeds, offsets, every)(scores, **inputs)
        draw = self.first_copy + torch.arange(len(seeds), device=scores.device)[:, None] % self.copies
        return SampleOutput(
            out.tokens.gather(1, draw), out.status, None if out.logprobs is None else out.logprobs.gather(1, draw)
        )

    def _new_sampler(
        self, params: SamplingParams, seeds: torch.Tensor, offsets: torch.Tensor, num_samples: int = 1
    ) -> Sampler:
        return Sampler(
            params if self.sampled else params.replace(temperature=0.0),
            batch_size=len(seeds),
            seed=seeds,
            offset=offsets,
            **self.options._replace(num_samples=num_samples, on_invalid="flag")._asdict(),
        )

    def _end_invalid(self, status: torch.Tensor, input_ids: torch.Tensor, scores: torch.Tensor) -> None:
        """Note which sequences can have no token, or raise. Sequences that have ended need none."""
        progress = self.progress
        over = progress.status != 0 if progress.done is None else progress.done | (progress.status != 0)
        rows = status.masked_fill(over, 0).nonzero()[:, 0].tolist()
        for row in rows:
            code = int(status[row])
            reason = f"row {row} has {STATUS[code]}"
            if code == _NOTHING_LEFT:
                reason = self.inputs.why_nothing_is_left(row, input_ids, scores)
            if self.padding is None:
                more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
                raise ValueError(f"{reason}{more}; on_invalid='flag' ends such a sequence and lets the others go on")
            progress.end(row, code, reason)

    def _raw(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self.clean is not None
        return self.clean.scores.log_softmax(-1).gather(1, tokens).flatten()

    def _one_hot(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.choice is None or self.chosen is None:
            self.choice = torch.zeros(scores.shape, device=scores.device)
        else:
            self.choice.scatter_(1, self.chosen, 0.0)
        self.chosen = tokens
        return self.choice.scatter_(1, tokens, 1.0)


class Criteria(StoppingCriteriaList):
    """The call's stopping criteria, given the filtered scores; also keeps the progress and the grammars up to date."""

    def __init__(
        self, criteria: StoppingCriteriaList, grammar: Followed | None, progress: Progress, pads: bool
    ) -> None:
        super().__init__(criteria)
        if pads:
            self.append(_Padding())
        self.grammar, self.progress = grammar, progress
        self.filtered: list[torch.Tensor] | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        progress = self.progress
        done = super().__call__(input_ids, scores if self.filtered is None else tuple(self.filtered), **kwargs)
        before = torch.zeros_like(done) if progress.done is None else progress.done
        lengths = torch.full_like(done, input_ids.shape[1], dtype=torch.int64)
        over = before
        if progress.reasons:  # for those ended in this step, the last id is padding
            over = before | (progress.status != 0)
            lengths -= (over & ~before).long()
            done = done | over
        progress.lengths = lengths if progress.lengths is None else torch.where(before, progress.lengths, lengths)
        if self.grammar is not None:
            tokens = zip(input_ids[:, -1].tolist(), over.tolist(), strict=True)
            ended = self.grammar.accept([None if is_over else token for token, is_over in tokens])
            done = done | torch.tensor(ended, device=done.device)
        progress.done = before | done
        return done  # type: ignore[no-any-return]


class _Padding(StoppingCriteria):
    """Ends nothing; because this attribute exists, `generate` pads sequences that have ended."""

    eos_token_id = None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]
