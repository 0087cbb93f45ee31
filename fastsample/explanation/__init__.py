"""Why each token was drawn: `explain`, and the `Explanation` it returns. Imported when one of them is asked for."""

from __future__ import annotations

from typing import Any

import torch

from fastsample import call
from fastsample.arrays import ArrayLike
from fastsample.checks import count
from fastsample.explanation.result import Candidate, Cut, Draw, Edit, Explanation, Step
from fastsample.explanation.step import Words, explained, row_of
from fastsample.inputs import Allowed, BiasLike, BreakerIds, Rows, Seed, TokenIds, gather
from fastsample.outputs import Options
from fastsample.params import SamplingParams

__all__ = ["Candidate", "Cut", "Draw", "Edit", "Explanation", "Step", "explain"]


def explain(
    logits: ArrayLike,
    params: SamplingParams | None = None,
    *,
    seed: Seed | None = None,
    offset: Seed = 0,
    draw: int = 0,
    bitmask: ArrayLike | None = None,
    allowed_ids: Allowed | None = None,
    bias: BiasLike | None = None,
    prompt_ids: TokenIds | None = None,
    output_ids: TokenIds | None = None,
    dry_breakers: BreakerIds | None = None,
    top: int = 16,
    tokenizer: Any = None,
    prompt: str = "",
    **fields: Any,
) -> Explanation:
    """What `sample` does with each row, step by step: what edits logits, what each filter leaves out and why, the draw.

    The reference engine is asked, of which every other engine has the bits, so all numbers are those of the call of
    `sample` with the same arguments. A row of a model server's log is explained by its logits, parameters, seed and
    offset. This takes tens of milliseconds for a row of 50 000 logits, which the result holds, for its page.

    Args:
        logits, params, seed, offset, fields: as for `sample`; rows of [B, T, V] are those of the flattened table. An
            int seed gives row i its own; a log's seeds go in a tensor or a list, one per row.
        bitmask, allowed_ids, bias, prompt_ids, output_ids, dry_breakers: as for `sample`.
        draw: which of a row's draws, 0 <= j < 2^31: draw j is `tokens[:, j]` of `sample` with `num_samples` > j.
        top: how many of the most probable tokens of each row to tell of, 1 <= top; the one that was drawn is told of in
            any case.
        tokenizer: an object with `decode([id])`, such as a tokenizer of transformers, for the texts of tokens.
        prompt: the text before the tokens, for the page.

    Returns:
        Explanation, with a `Step` for each row. An invalid row has one too, whose status says what is wrong with it.

    Raises:
        TypeError, ValueError: bad argument; the message names it, the row and the value.
    """
    draw, top = count("draw", draw, 0, 2**31 - 1), count("top", top, 1, 2**20)
    if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
        raise TypeError(f"tokenizer: expected an object with decode([id]), got {type(tokenizer).__name__}")
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: expected a str, got {type(prompt).__name__}")
    words = Words(tokenizer)

    def steps(_: Any, table: torch.Tensor, rows: Rows) -> list[Step]:
        with torch.inference_mode():
            return [explained(table[i : i + 1], row_of(rows, i), i, draw, top, words) for i in range(len(table))]

    inputs = gather(bitmask, allowed_ids, bias, prompt_ids, output_ids, dry_breakers)
    options = Options(on_invalid="flag", backend="reference")
    made = call.make("tokens", logits, params, fields, seed, offset, inputs, options, None, use=steps)
    return Explanation(tuple(made), prompt)
