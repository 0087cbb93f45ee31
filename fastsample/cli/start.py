"""From what a command was asked to a session: everything is checked before a model is loaded."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from fastsample.cli.generate import (
    breaker_texts,
    check_engine,
    dry_breakers,
    encode,
    grammar_texts,
    load_grammar,
    read_prompt,
)
from fastsample.cli.model import find_model, load, quiet
from fastsample.cli.options import Asked
from fastsample.cli.output import told, working
from fastsample.cli.session import Session
from fastsample.inputs import pack_seeds, splitmix64
from fastsample.params import SamplingParams


@contextmanager
def opened(asked: Asked, tokens: int, stops: Sequence[str] = ()) -> Iterator[Session]:
    """A session that draws up to `tokens` tokens, and ends a text before one of the stops."""
    text = read_prompt(asked.prompt, asked.prompt_file)
    regex, picks = grammar_texts(asked.json_schema, asked.regex, asked.choices, asked.choice, asked.grammar_backend)
    breakers = breaker_texts(asked.dry_breaker, asked.params)
    with told((TypeError, ValueError, RuntimeError)):
        SamplingParams(**asked.params)
        seed = secrets.randbits(64) if asked.seed is None else asked.seed
        seeds = seeds_of(seed)
    check_engine(asked.backend)
    with working("loading the model"):
        name, local = find_model(asked.model)
        with quiet():
            lm, tokenizer = load(name, local)
            grammar = load_grammar(tokenizer, asked.grammar_backend or "auto", asked.json_schema, regex, picks)
    ids, steps = encode(text, lm, tokenizer, tokens, asked.chat)
    sampling = {"backend": asked.backend, **asked.params, **dry_breakers(tokenizer, breakers)}
    with quiet():
        yield Session(text, asked.chat, lm, tokenizer, ids, steps, grammar, stops, sampling, seed, seeds)


def seeds_of(seed: int) -> Iterator[int]:
    """`row_seeds` of any number of continuations, one at a time."""
    pack_seeds(seed, 1)  # refuses what is no seed
    return (splitmix64(splitmix64(seed % 2**64) + number) for number in count())
