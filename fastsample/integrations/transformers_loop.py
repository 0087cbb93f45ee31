"""The decoding loop of `fs_generate`: transformers' own, but for the step that picks the tokens."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.utils import ALL_CACHE_NAMES

from fastsample.api import filter_logits
from fastsample.engines import LogprobsMode
from fastsample.integrations.grammar import Grammar, GrammarBatch, TruncatedWarning
from fastsample.integrations.transformers_plan import Plan, make_plan, refuse_other_loops, synced_gpus
from fastsample.params import SamplingParams
from fastsample.rows import Bias, Seed, pack_bias, pack_seeds, row_seeds
from fastsample.sampler import Sampler


class Streamer(Protocol):
    """What a streamer does; every BaseStreamer of transformers is one."""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's ids [B, L], then a step's token [B] at a time."""

    def end(self) -> None:
        """Generation is over."""


@dataclass
class Record:
    """What a call's sequences are besides their ids.

    Attributes:
        logprobs: float32 [B] for each step.
        lengths: ids of each sequence, prompt included, up to its end.
        truncated: per sequence, whether its text is no whole text of its grammar.
    """

    logprobs: list[torch.Tensor] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)


@dataclass
class Loop:
    """What `generate` calls as its custom_generate; see `fs_generate` for the first five fields."""

    seed: Seed | None
    streamer: Streamer | None
    backend: str
    grammar: Grammar | Sequence[Grammar | None] | None
    fields: dict[str, Any]
    copies: int = 1  # sequences that each prompt branches into at its first step
    logprobs: LogprobsMode | None = None
    record: Record | None = None

    def __call__(
        self,
        model: Any,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        config = copy.copy(generation_config)
        refuse_other_loops(model, config)
        sampled = bool(config.do_sample)
        plan = make_plan(logits_processor, input_ids.shape[1], self.fields, sampled)
        if "repetition_penalty" in self.fields:
            plan.ignored = _left_padding(model, model_kwargs)
        grammar = self._follow_grammar(len(input_ids) * self.copies, config)
        step = self._step(plan, grammar, input_ids, sampled)
        criteria = _Criteria(stopping_criteria, grammar, input_ids.shape[1])
        if isinstance(step, Draw) and config.return_dict_in_generate and config.output_scores:
            step.kept = criteria.kept = []
        config.do_sample = False  # the step leaves one token to choose, which greedy search then takes
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())  # as `generate` does with its own
        synced = {"synced_gpus": synced_gpus(model)}
        loop = type(model)._sample
        if self.copies > 1:
            model, input_ids, model_kwargs = _branch(model, input_ids, config, model_kwargs, self.copies)
        result = loop(
            model,
            input_ids,
            logits_processor=LogitsProcessorList([*plan.own, *([] if step is None else [step])]),
            stopping_criteria=criteria,
            generation_config=config,
            streamer=self.streamer,
            **synced | model_kwargs,
        )
        if isinstance(step, Draw) and step.kept is not None:
            result.scores = tuple(step.kept[: len(result.scores)])
        self._report(result, step, criteria)
        return result

    def _follow_grammar(self, rows: int, config: Any) -> GrammarBatch | None:
        if self.grammar is None:
            return None
        given = [self.grammar] * rows if isinstance(self.grammar, Grammar) else list(self.grammar)
        if len(given) != rows:
            raise ValueError(f"grammar: expected one or {rows} (one per sequence), got {len(given)}")
        stops = [] if config._eos_token_tensor is None else config._eos_token_tensor.tolist()
        batch = GrammarBatch(given, stops)
        if not stops and config._pad_token_tensor is None:
            # Sequences that their grammar has ended must be padded with something, where others go on.
            if batch.padding is None and rows > 1:
                raise ValueError("grammar: sequences of a batch end at different steps: give generate a pad_token_id")
            config._pad_token_tensor = torch.tensor(batch.padding or 0)
        return batch

    def _step(
        self, plan: Plan, grammar: GrammarBatch | None, input_ids: torch.Tensor, sampled: bool
    ) -> LogitsProcessor | None:
        """The processor that goes last; None where plain greedy search needs none."""
        params = SamplingParams(**plan.fields)
        inputs = _Inputs(plan, params, grammar, input_ids, self.copies)
        if sampled:
            return Draw(params, inputs, self.seed, self.backend, self.copies, self.logprobs)
        return _Filter(params, inputs, self.backend) if inputs.needed else None

    def _report(self, result: Any, step: LogitsProcessor | None, criteria: _Criteria) -> None:
        """Say what the ids do not: in the record, in the result, or as a warning."""
        grammar = criteria.grammar
        if self.record is not None and isinstance(step, Draw):
            self.record.logprobs = step.logprobs
            self.record.lengths = [] if criteria.lengths is None else criteria.lengths.tolist()
            self.record.truncated = [] if grammar is None else grammar.truncated
        elif grammar is not None and not isinstance(result, torch.Tensor):
            result.truncated = torch.tensor(grammar.truncated)
        elif grammar is not None and any(grammar.truncated):
            rows = ", ".join(str(row) for row, cut in enumerate(grammar.truncated) if cut)
            warnings.warn(
                f"generation ended before the grammar did: the text of sequence {rows} is truncated",
                TruncatedWarning,
                stacklevel=2,
            )


# The step ------------------------------------------------------------------------------------------------------------


class _Inputs:
    """What a step is told besides the logits: penalties' ids, masks and bias."""

    def __init__(
        self, plan: Plan, params: SamplingParams, grammar: GrammarBatch | None, prompt: torch.Tensor, copies: int
    ) -> None:
        names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        values = [(getattr(params, name), getattr(SamplingParams, name)) for name in names]
        self._counts = any(isinstance(value, torch.Tensor) or value != neutral for value, neutral in values)
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
        """Whether greedy search has to look at any of them."""
        return self._counts or self._grammar is not None or self._plan.bias is not None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, every: int = 1) -> dict[str, Any]:
        """The keyword arguments of a call for every so many rows; empty where nothing looks at them."""
        inputs: dict[str, Any] = {}
        if self._counts:
            inputs["prompt_ids"] = self._prompt[::every]
            inputs["output_ids"] = input_ids[::every, self._length :]
        masks = [] if self._grammar is None else [self._grammar.bitmask(scores)]
        masks += [] if self._plan.allowed is None else [self._allowed(input_ids, scores)]
        if masks:
            inputs["bitmask"] = (masks[0] if len(masks) == 1 else masks[0] & masks[1])[::every]
        if self._plan.bias is not None:
            table = scores[::every]
            if self._bias is None or len(self._bias.row_ptr) != len(table) + 1:
                self._bias = pack_bias(self._plan.bias, table)
            inputs["bias"] = self._bias
        return inputs

    def _allowed(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """What prefix_allowed_tokens_fn allows, as a bitmask."""
        rows, vocab = scores.shape
        bits = np.zeros((rows, -(-vocab // 32) * 32), dtype=np.uint8)
        for row, ids in enumerate(input_ids):
            allowed = self._plan.allowed(row, ids) if self._plan.allowed is not None else []
            if len(allowed) == 0:
                raise ValueError(f"prefix_allowed_tokens_fn: allows no token (row {row})")
            bits[row, :vocab][torch.as_tensor(allowed).cpu().numpy()] = 1
        words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
        return torch.from_numpy(words).to(scores.device)


class _Filter(LogitsProcessor):
    """Masks, bias and penalties alone, before greedy search."""

    def __init__(self, params: SamplingParams, inputs: _Inputs, backend: str) -> None:
        self.params, self.inputs, self.backend = params, inputs, backend

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        return filter_logits(scores, self.params, backend=self.backend, **self.inputs(input_ids, scores))


class Draw(LogitsProcessor):
    """Draws each sequence's token and returns scores that have their only maximum there.

    `generate` looks for that maximum and keeps nothing else of the scores, unless it collects them (output_scores). So
    one buffer of zeros and a single 1 per row serves every step, the clean scores are kept aside, and the scores that
    came in (of which transformers may hold a reference, as output_logits) are only read.
    """

    def __init__(
        self,
        params: SamplingParams,
        inputs: _Inputs,
        seed: Seed | None,
        backend: str,
        copies: int,
        logprobs: LogprobsMode | None,
    ) -> None:
        self.params, self.inputs, self.backend = params, inputs, backend
        self.seed, self.copies, self.mode = seed, copies, logprobs
        self.sampler: Sampler | None = None
        self.kept: list[torch.Tensor] | None = None
        self.logprobs: list[torch.Tensor] = []  # float32 [B] of each step, where asked for
        self.choice: torch.Tensor | None = None  # float32 [B, V]
        self.chosen: torch.Tensor | None = None  # int64 [B, 1], where it holds a 1

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        if self.sampler is None and self.copies > 1:
            every, sampler = self.copies, self._start(len(scores) // self.copies)
        else:
            self.sampler = sampler = self.sampler or self._start(len(scores))
            every = 1
        inputs = self.inputs(input_ids, scores, every)
        out = sampler(scores[::every], **inputs)
        if out.logprobs is not None:
            self.logprobs.append(out.logprobs.flatten())
        if self.kept is not None:
            self.kept.append(filter_logits(scores, self.params, backend=self.backend, **inputs))
        return self._one_hot(out.tokens.reshape(-1, 1), scores)

    def _start(self, rows: int) -> Sampler:
        """The sampler of all steps; where prompts branch, that of their first step, which makes that of the others."""
        seeds = pack_seeds(self.seed, rows)
        options: dict[str, Any] = {"logprobs": self.mode, "backend": self.backend}
        if self.copies > 1:
            # The first of a prompt's sequences goes on with its seed, as it would alone.
            own = torch.stack([row_seeds(seed % 2**64, self.copies) for seed in seeds.tolist()])
            own[:, 0] = seeds
            params = _repeated(self.params, self.copies)
            self.sampler = Sampler(params, batch_size=own.numel(), seed=own.flatten(), offset=1, **options)
        return Sampler(self.params, batch_size=rows, seed=seeds, num_samples=self.copies, **options)

    def _one_hot(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.choice is None or self.chosen is None:
            self.choice = torch.zeros(scores.shape, device=scores.device)
        else:
            self.choice.scatter_(1, self.chosen, 0.0)
        self.chosen = tokens
        return self.choice.scatter_(1, tokens, 1.0)


def _repeated(params: SamplingParams, copies: int) -> SamplingParams:
    """One value per sequence where there was one per prompt."""
    values = {name: getattr(params, name) for name in params.per_row()}
    lists = {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
    return params.replace(**{name: [v for v in values for _ in range(copies)] for name, values in lists.items()})


class _Criteria(StoppingCriteriaList):
    """The same stopping criteria, shown the clean scores; keeps count of lengths, and the grammars up to date."""

    def __init__(self, criteria: StoppingCriteriaList, grammar: GrammarBatch | None, prompt_length: int) -> None:
        super().__init__(criteria)
        if grammar is not None:
            self.append(_EndOfGrammar())
        self.grammar = grammar
        self.kept: list[torch.Tensor] | None = None
        self.lengths: torch.Tensor | None = None  # int64 [B]
        self.done: torch.Tensor | None = None  # bool [B]

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        done = super().__call__(input_ids, scores if self.kept is None else tuple(self.kept), **kwargs)
        before = torch.zeros_like(done) if self.done is None else self.done
        lengths = torch.full_like(done, input_ids.shape[1], dtype=torch.int64)
        self.lengths = lengths if self.lengths is None else torch.where(before, self.lengths, lengths)
        if self.grammar is not None:
            tokens = zip(input_ids[:, -1].tolist(), before.tolist(), strict=True)
            self.grammar.accept([None if over else token for token, over in tokens])
            done = done | torch.tensor(self.grammar.ended, device=done.device)
        self.done = before | done
        return done  # type: ignore[no-any-return]


class _EndOfGrammar(StoppingCriteria):
    """Ends nothing; that it has this attribute makes `generate` pad sequences which have ended."""

    eos_token_id = None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


# One prefill for several sequences -----------------------------------------------------------------------------------


def _branch(
    model: Any, input_ids: torch.LongTensor, config: Any, model_kwargs: dict[str, Any], copies: int
) -> tuple[Any, torch.LongTensor, dict[str, Any]]:
    """Run the prompts once; then what the loop needs to go on with so many copies of each."""
    outputs = model._prefill(input_ids, config, model_kwargs)
    outputs.logits = outputs.logits[:, -1:].repeat_interleave(copies, dim=0)
    for name in ALL_CACHE_NAMES:
        if (cache := outputs.get(name)) is not None:
            try:
                cache.batch_repeat_interleave(copies)
            except AttributeError:
                raise ValueError(
                    f"{type(cache).__name__} cannot be copied for each sequence; leave out cache_implementation"
                ) from None
    input_ids, model_kwargs = model._expand_inputs_for_generation(
        copies, model.config.is_encoder_decoder, input_ids, **model_kwargs
    )
    return _Prefilled(model, outputs), input_ids, model_kwargs


class _Prefilled:
    """A model whose prompts have been run."""

    def __init__(self, model: Any, outputs: Any) -> None:
        self._model, self._outputs = model, outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _prefill(self, *_: Any, **__: Any) -> Any:
        return self._outputs


def _left_padding(model: Any, model_kwargs: dict[str, Any]) -> torch.Tensor | None:
    """How many ids each sequence starts with that are padding, int64 [B], as `generate` counts them."""
    encoder_decoder = model.config.is_encoder_decoder
    mask = model_kwargs.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
    return None if mask is None else (mask != 0).int().argmax(dim=1)
