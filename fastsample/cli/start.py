"""From what a command was asked to a session: everything is checked before a model is loaded."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch

from fastsample.api import sample
from fastsample.backends import select
from fastsample.cli.model import find_model, load, quiet
from fastsample.cli.options import Asked
from fastsample.cli.output import RefusedError, note, told, utf8, working
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


# Text ----------------------------------------------------------------------------------------------------------------


def read_prompt(argument: str | None, file: str | None) -> str:
    """The prompt, from the argument or from a file; `-` is standard input. A file's last line break is left out."""
    if (argument is None) == (file is None):
        raise RefusedError("PROMPT: expected it as an argument (- reads standard input) or with --prompt-file")
    if argument is not None and argument != "-":
        return utf8("PROMPT", argument)
    if argument == "-" or file == "-":
        if sys.stdin is None:
            raise RefusedError("PROMPT: standard input is closed")
        with told((OSError, UnicodeError), "standard input: "):
            text = sys.stdin.buffer.read().decode("utf-8-sig")
    else:
        assert file is not None
        with told((OSError, UnicodeError), f"--prompt-file {file}: "):
            text = Path(file).read_bytes().decode("utf-8-sig")
    return re.sub(r"\r?\n\Z", "", text)


# What goes together ---------------------------------------------------------------------------------------------------


def grammar_texts(
    json_schema: Path | None,
    regex: str | None,
    choices: str | None,
    choice: Sequence[str] | None,
    grammar_backend: str | None,
) -> tuple[str | None, list[str]]:
    """The regular expression and the choices of a grammar, of which the options may ask for one."""
    picks = [utf8("--choice", c) for c in choice or []]
    picks += [] if choices is None else [c.strip() for c in utf8("--choices", choices).split(",")]
    asked = [json_schema is not None, regex is not None, bool(picks)]
    if sum(asked) > 1:
        raise RefusedError("--json-schema, --regex and --choices (or --choice): expected one of them")
    if grammar_backend is not None and not any(asked):
        raise RefusedError("--grammar-backend: expected --json-schema, --regex, --choices or --choice with it")
    return None if regex is None else utf8("--regex", regex), picks


def breaker_texts(dry_breaker: Sequence[str] | None, fields: dict[str, Any]) -> list[str]:
    """The texts that end a repetition; without DRY they would have no effect."""
    breakers = [utf8("--dry-breaker", b) for b in dry_breaker or []]
    if breakers and not fields["dry_multiplier"]:
        raise RefusedError("--dry-breaker: expected --dry-multiplier with it")
    return breakers


def check_engine(backend: str) -> None:
    """Refuse, before a model is loaded, an engine that cannot serve."""
    variable = "FASTSAMPLE_BACKEND: " if backend == "auto" and os.environ.get("FASTSAMPLE_BACKEND") else ""
    with told((TypeError, ValueError, RuntimeError), variable):
        logits = torch.zeros(1, 2)
        select(backend, logits)
        sample(logits, seed=0, backend=backend)  # finds what an environment variable asks of the engine


# Ids -----------------------------------------------------------------------------------------------------------------


def encode(prompt: str, lm: Any, tokenizer: Any, max_new_tokens: int, chat: bool = False) -> tuple[torch.Tensor, int]:
    """The prompt's ids [1, L], as a text or as a user's message, and how many tokens fit after them."""
    ids = _message(prompt, tokenizer) if chat else tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    if not ids.shape[1]:
        if prompt:
            raise RefusedError("the tokenizer makes no tokens of this prompt")
        start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
        if start is None:
            raise RefusedError("the prompt is empty, and this model has no token to start from")
        ids = torch.tensor([[start]])
    rows = lm.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= rows:
        token = tokenizer.convert_ids_to_tokens(int(ids.max()))
        raise RefusedError(f"the prompt holds the token {token!r} ({int(ids.max())}), and the model has {rows} tokens")
    context = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return ids, max_new_tokens
    room = context - ids.shape[1]
    if room < 1:
        raise RefusedError(f"the prompt has {ids.shape[1]} tokens and leaves no room in a context of {context}")
    if room < max_new_tokens:
        note(f"room for {room} of {max_new_tokens} tokens in a context of {context}")
    return ids, min(room, max_new_tokens)


def _message(text: str, tokenizer: Any) -> torch.Tensor:
    """The ids [1, L] of a chat in which a user says this, and the answer begins."""
    if not tokenizer.chat_template:
        raise RefusedError("--chat: this model has no chat template, so it was not trained to answer")
    with told((Exception,), "--chat: the model's chat template: "):  # it comes with the model, and may raise anything
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    ids: torch.Tensor = encoded["input_ids"]
    return ids.long()


def dry_breakers(tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """The argument of `fs_generate` that these texts stand for; none where there are none."""
    if not texts:
        return {}
    from fastsample.integrations.transformers.breakers import breaker_ids

    with told((TypeError, ValueError)):
        return {"dry_breakers": breaker_ids(texts, tokenizer, "--dry-breaker")}


# The grammar ---------------------------------------------------------------------------------------------------------


def load_grammar(
    tokenizer: Any, backend: str, json_schema: Path | None, regex: str | None, choices: Sequence[str]
) -> Any:
    """The grammar that the options ask for; None where they ask for none."""
    if json_schema is None and regex is None and not choices:
        return None
    from fastsample.integrations.grammar import GrammarCompiler

    refused = (ImportError, ValueError, TypeError, RuntimeError)
    with told(refused):
        compiler = GrammarCompiler(tokenizer, backend=backend)
    if json_schema is not None:
        with told((OSError, UnicodeError), "--json-schema: "):
            text = json_schema.read_text(encoding="utf-8-sig")
        with told(refused, f"--json-schema {json_schema}: "):
            return compiler.json_schema(text)
    with told(refused):
        return compiler.choices(choices) if regex is None else compiler.regex(regex)
