"""Hugging Face transformers (>= 5): a fused logits processor, and the whole sampling step for `model.generate`.

    from fastsample.integrations.transformers import fs_generate
    model.generate(**inputs, do_sample=True, temperature=0.8, top_p=0.95, custom_generate=fs_generate(seed=7))

`generate` prepares a list of logits processors. The end of that list is what gets fused, so options, defaults and order
are transformers' own. Processors before the part that can be fused run unchanged.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from transformers.generation.logits_process import LogitsProcessor

from fastsample.api import filter_logits
from fastsample.inputs import Seed
from fastsample.integrations.grammar import Grammar, GrammarBatch, GrammarError
from fastsample.integrations.grammar.batch import per_row
from fastsample.integrations.transformers.breakers import Breakers
from fastsample.integrations.transformers.loop import Loop
from fastsample.integrations.transformers.plan import HISTORY
from fastsample.integrations.transformers.results import (
    Reported,
    SampledDecoderOnlyOutput,
    SampledEncoderDecoderOutput,
)
from fastsample.integrations.transformers.rows import Streamer, check_backend
from fastsample.outputs import KeptForm, LogprobsMode, OnInvalid
from fastsample.params import SamplingParams

__all__ = [
    "FastSampleLogitsProcessor",
    "GrammarLogitsProcessor",
    "Reported",
    "SampledDecoderOnlyOutput",
    "SampledEncoderDecoderOutput",
    "Streamer",
    "fs_generate",
]

P = ParamSpec("P")
R = TypeVar("R")


class FastSampleLogitsProcessor(LogitsProcessor):
    """Temperature and filters in one pass, with transformers' rules; the draw stays with `generate`.

    For code that takes logits processors only; `fs_generate` is faster and seeds each sequence. `generate` applies its
    own warpers after this one, and its default is top_k=50: pass it `top_k=0` and leave its other filters and
    temperature unset, or they act twice.

        model.generate(**inputs, do_sample=True, top_k=0, logits_processor=[FastSampleLogitsProcessor(top_p=0.9)])

    Args:
        temperature, top_k, top_p, min_p: as in SamplingParams, one value or one per sequence.
        backend: as for `fastsample.sample`.
        **fields: other filters, likewise, for example typical_p, top_n_sigma or order; `ties` is "all" unless given.

    Raises:
        TypeError, ValueError: bad parameter, or one that is no filter (penalties, DRY, n-grams, XTC); when called a row
            with a NaN, with +inf or with nothing above -inf.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        temperature: Any = 1.0,
        top_k: Any = 0,
        top_p: Any = 1.0,
        min_p: Any = 0.0,
        *,
        backend: str = "auto",
        **fields: Any,
    ) -> None:
        for name in fields:
            if name in HISTORY or name.startswith("xtc_"):
                raise ValueError(f"{name}: more than a filter; fs_generate has it")
        self.params = SamplingParams(temperature, top_k, top_p, min_p, **{"ties": "all"} | fields)
        check_backend(backend)
        self.backend = backend

    # transformers looks at the number of parameters: there must be exactly these two.
    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] divided by the temperature where a token is kept, -inf elsewhere; a new float32 tensor."""
        return filter_logits(scores, self.params, backend=self.backend)


class GrammarLogitsProcessor(LogitsProcessor):
    """Allows only tokens that continue a text of a grammar, for decoding loops that `fs_generate` does not serve.

    One object serves one call of `generate`, with sampling or beams. Prefer `fs_generate(grammar=...)` where it can be
    used: there the mask is part of the fused pass, and models without an end-of-sequence token are served too.

        model.generate(**inputs, num_beams=4, logits_processor=[GrammarLogitsProcessor(grammar, eos_token_id=0)])

    When the grammar has fewer texts than there are beams, beam search fills the rest with hypotheses that leave the
    grammar; they keep a score of -inf. `grammar.is_complete` tells which of the returned sequences are whole texts.

    Args:
        grammar: for every sequence, or one (or None) per sequence of the batch.
        eos_token_id: the model's end-of-sequence ids, one or several: allowed where a text is complete, and all that is
            allowed where it cannot go on.

    Raises:
        TypeError, ValueError: bad argument; when called: a number of rows that is not the number of grammars, or ids
            that do not continue those of the previous call.
        GrammarError (a ValueError with the row): the grammar and the other processors leave a row no token, a finished
            text breaks its grammar, or the grammar engine gave up.
    """

    supports_continuous_batching = False

    def __init__(self, grammar: Grammar | Sequence[Grammar | None], eos_token_id: int | Sequence[int]) -> None:
        rows = len(grammar) if isinstance(grammar, Sequence) else 1
        per_row(grammar, rows)  # anything else should fail here, not after the model's forward pass
        self._grammar = grammar
        eos = eos_token_id.tolist() if hasattr(eos_token_id, "tolist") else eos_token_id
        self._eos = list(eos) if isinstance(eos, Iterable) else [operator.index(eos)]
        if not self._eos:
            raise ValueError("eos_token_id: expected at least one")
        self._ids: torch.Tensor | None = None
        self._prompt = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] with -inf where a token is not allowed; a new float32 tensor."""
        if self._ids is None:
            self._prompt = input_ids.shape[1]
            self._batch = GrammarBatch(per_row(self._grammar, len(input_ids)), self._eos)
        elif input_ids.shape[1] != self._ids.shape[1] + 1 or len(input_ids) != len(self._ids):
            raise ValueError("GrammarLogitsProcessor: serves one call of generate; make another for the next")
        elif torch.equal(input_ids[:, :-1], self._ids):
            self._batch.accept(input_ids[:, -1], strict=False)
        else:  # beams have moved to other rows
            self._batch = self._batch.restarted()
            for tokens in input_ids[:, self._prompt :].T:
                self._batch.accept(tokens, strict=False)
        self._ids = input_ids
        return self._masked(scores)

    def _masked(self, scores: torch.Tensor) -> torch.Tensor:
        strayed = [row for row, away in enumerate(self._batch.strayed) if away]
        mask = self._batch.bitmask(scores)
        if strayed:
            if len(strayed) == len(scores):
                raise GrammarError("GrammarLogitsProcessor: every sequence has left its grammar", 0, b"")
            mask = mask.clone()
            mask[strayed] = -1  # hypotheses of score -inf may have nothing left; below
        try:
            left = filter_logits(scores, bitmask=mask)
        except ValueError as error:
            raise self._conflict(scores) or error from None
        if strayed:
            ends = left[strayed][:, self._eos]
            left[strayed] = -torch.inf
            left[torch.tensor(strayed)[:, None], torch.tensor(self._eos)] = ends
        return left

    def _conflict(self, scores: torch.Tensor) -> GrammarError | None:
        """The error of the first row where the other processors have forbidden all that the grammar allows."""
        for row, line in enumerate(scores):
            ids = self._batch.allowed(row)
            if ids is not None and bool(torch.isneginf(line[ids]).all()):
                shown = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
                return GrammarError(
                    f"grammar (row {row}): the processors before it forbid every token that it allows here ({shown})",
                    row,
                    self._batch.text(row),
                )
        return None


def _to_be_called(function: Callable[P, R]) -> Callable[P, R]:
    """A helpful error when the function itself is passed as custom_generate, without being called."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if "generation_config" in kwargs:
            raise TypeError(
                "custom_generate=fs_generate: expected what fs_generate returns; call it: "
                "custom_generate=fs_generate() or fs_generate(seed=7)"
            )
        return function(*args, **kwargs)

    return checked


@_to_be_called
def fs_generate(
    seed: Seed | None = None,
    *,
    offset: Seed | Literal["prompt"] = 0,
    streamer: Streamer | None = None,
    backend: str = "auto",
    grammar: Grammar | Sequence[Grammar | None] | None = None,
    logprobs: LogprobsMode | None = None,
    on_invalid: OnInvalid = "raise",
    tokenizer: Any = None,
    dry_breakers: Breakers | None = None,
    kept: KeptForm | None = None,
    kept_mass: bool = False,
    entropy: bool = False,
    **fields: Any,
) -> Callable[..., Any]:
    """The argument `custom_generate` that gives the sampling step of `model.generate` to fastsample.

    Temperature, top-k, top-p, min-p, typical_p, epsilon_cutoff, eta_cutoff, a repetition penalty, no_repeat_ngram_size,
    single-token `sequence_bias`, `prefix_allowed_tokens_fn`, a grammar and the draw become one call per step. What
    transformers lacks (top-n-sigma, top-a, p-less, XTC, DRY, ...) is given here. Other options keep running as
    transformers' own processors, as do the options before them in the list, except those that only forbid tokens;
    docs/integrations/generate.md has the table. With do_sample=False, `generate` is plain greedy search.

    With `assistant_model`, `prompt_lookup_num_tokens`, `assistant_early_exit` or `use_mtp` several tokens are drafted
    for each run of the model, and the text is the one without them: what is kept of a draft is what would be drawn.

    A sequence's tokens depend on its logits, its seed and their position, and not on the batch, its slot, padding or
    earlier calls. (A model's logits may themselves differ in their last bits between batch shapes.)

    Whatever takes one value per sequence (seed, offset, grammar, dry_breakers, fields) also takes one value per prompt,
    when num_return_sequences asks for several sequences of each.

    Args:
        seed: an int s gives sequence i of the batch (after num_return_sequences) the seed
            splitmix64(splitmix64(s) + i); a list holds one seed per sequence, used as it is. With
            one seed p per prompt, the prompt's first sequence gets p and its j-th splitmix64(splitmix64(p) + j). None
            takes a fresh seed from torch's default CPU generator at each call of `generate`; `torch.manual_seed`
            makes that repeatable.
        offset: position of the first new token, an int or one per sequence, 0 <= offset < 2^64. "prompt" counts from
            the beginning of the text: a sequence's position is its number of ids so far, without padding. A text
            passed back to `generate` then continues with the random numbers it would have had in a single call; with 0
            it reuses those of its beginning. (Options that count new tokens still start over: frequency and presence
            penalties, grammars, min_new_tokens.)
        streamer: receives the prompt and then each token. Pass it here: `generate` does not hand on its own, so one
            given there is refused.
        backend: as for `fastsample.sample`.
        grammar: what the new text must match (see `fastsample.integrations.grammar`): one for every sequence, or one
            (or None) per sequence. A sequence ends when its text is complete and the model draws an end-of-sequence
            token; a model without such a token stops as soon as the text is complete. When generation ends earlier, the
            result says so with return_dict_in_generate=True (`truncated`, bool [B]); otherwise a TruncatedWarning does.
        logprobs: adds `logprobs` to the result (which takes return_dict_in_generate=True), float32 [B, new tokens]:
            the natural log-probability of each new token, NaN after a sequence's end. "raw" refers to the model's own
            logits, "processed" to the distribution that was drawn from.
        kept: adds to the result, likewise, which tokens were kept where each new token was drawn, for training: "count"
            `kept_count`, "ids" that, `kept_ids` and `kept_row_ptr`, "bitmask" `kept_count` and `kept_bitmask`; see
            `Reported`. Rows go sequence by sequence. Without a filter a set is the whole vocabulary.
        kept_mass, entropy: add `log_kept_mass` and `entropy` to the result, float32 [B, new tokens], as for
            `fastsample.sample`. For log_kept_mass, processors of transformers that run before the fused pass and set
            scores to -inf are masks, filters too.
        on_invalid: what to do with a sequence that can have no token (a NaN, +inf, or nothing above -inf, as when a
            grammar and min_new_tokens contradict each other). "raise" raises; "flag" ends that sequence, pads it, and
            lets the others go on. With "flag" and return_dict_in_generate=True the result has `status` (int32 [B], as
            in SampleOutput) and `errors` (a sentence or None per sequence); otherwise a warning names the sequence.
        tokenizer: for `stop_strings` and `dry_breakers`, when `generate` itself was given none.
        dry_breakers: what ends a repetition, for DRY: a list of token ids and strings, or one such list (or None) per
            sequence. A string stands for every token whose text contains it, and needs a tokenizer, byte-level BPE or
            SentencePiece; llama.cpp's are ["\\n", ":", "\\"", "*"].
        **fields: SamplingParams fields, one value or one per sequence; they replace `generate`'s. For example
            frequency_penalty=0.2, temperature=[0.2, 1.0], or xtc_probability=0.5. `ties` is "all" unless given.

    Returns:
        A callable for `custom_generate`, for any number of `generate` calls.

    Raises:
        TypeError, ValueError: bad argument, such as a breaker that no single token contains. From `generate`: a number
            of seeds, offsets, grammars, breakers or fields that is neither that of the sequences nor that of the
            prompts; strings for breakers, and no tokenizer; fields that would have no effect; logprobs, kept,
            kept_mass or entropy without return_dict_in_generate=True, which makes room for them; an
            option that fastsample does not serve (beams, contrastive, paged, ...); drafts for more than one sequence;
            or a sequence that can have no token. The message names the option, or the options that contradict each
            other.

    Warns:
        UserWarning: a seed or an offset has no effect, since do_sample=False draws nothing.
    """
    return Loop(
        seed,
        streamer,
        backend,
        grammar,
        fields,
        offset,
        tokenizer,
        logprobs,
        on_invalid,
        dry_breakers=dry_breakers,
        kept=kept,
        kept_mass=kept_mass,
        entropy=entropy,
    )
