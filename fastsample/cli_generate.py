"""The work of `fastsample generate`: load a model, encode the prompt, print what it goes on with."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

import fastsample as fs
from fastsample.cli_output import INSTALL, RefusedError, print_table, told


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' advice and progress bars off the terminal."""
    advice = _transformers().utils.logging
    advice.set_verbosity(logging.CRITICAL)
    advice.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it reports each retry
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError:
        raise RefusedError(f"generate needs transformers: {INSTALL}") from None


def load(model: str) -> tuple[Any, Any]:
    """The language model and its tokenizer. Only a hub's name may reach for the network."""
    transformers = _transformers()
    name = model or str(shipped_model())
    local = not model or Path(model).is_dir()
    if not local and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise RefusedError(f"--model {model}: no such folder")
    # Nothing that comes with a model is executed: no code of its own (asked outright, transformers does not ask at the
    # terminal), no pickles.
    safe = {"local_files_only": local, "trust_remote_code": False}
    wrong = (OSError, ValueError, KeyError, ImportError, import_module("safetensors").SafetensorError)
    with told(wrong, f"--model {name}: "):
        lm = transformers.AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **safe).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **safe)
    if lm.dtype == torch.float16:
        lm = lm.float()  # CPUs are slow at float16
    # The command's options alone say how to sample.
    own = lm.generation_config
    lm.generation_config = transformers.GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    return lm, tokenizer


def shipped_model() -> Path:
    """Folder of the model that comes with the package."""
    return Path(str(files("fastsample") / "models" / "tiny-gpt2"))


def encode(prompt: str, lm: Any, tokenizer: Any, max_new_tokens: int) -> tuple[torch.Tensor, int]:
    """The prompt's ids [1, L] and the number of tokens there is room for after them."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    if not ids.shape[1]:
        start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
        if start is None:
            raise RefusedError("the prompt is empty, and this model has no token to start from")
        ids = torch.tensor([[start]])
    context = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return ids, max_new_tokens
    room = context - ids.shape[1]
    if room < 1:
        raise RefusedError(f"the prompt has {ids.shape[1]} tokens and leaves no room in a context of {context}")
    if room < max_new_tokens:
        print(f"fastsample: room for {room} of {max_new_tokens} tokens in a context of {context}", file=sys.stderr)
    return ids, min(room, max_new_tokens)


@dataclass
class Session:
    """A loaded model, an encoded prompt, and how to go on from it."""

    prompt: str
    lm: Any
    tokenizer: Any
    ids: torch.Tensor  # int64 [1, L]
    steps: int
    grammar: Any
    sampling: dict[str, Any]  # backend and SamplingParams fields

    def continue_(self, seed: int) -> bool:
        """Print one continuation as it comes; with a grammar, the new text alone. Returns whether it was truncated."""
        from fastsample.integrations.transformers import fs_generate

        if self.grammar is None:
            print(self.prompt, end="", flush=True)
        sample = fs_generate([seed], streamer=Writer(self.tokenizer), grammar=self.grammar, **self.sampling)
        with told((ValueError,)):
            out = self.lm.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                do_sample=True,
                max_new_tokens=self.steps,
                return_dict_in_generate=True,
                custom_generate=sample,
            )
        return self.grammar is not None and bool(out.truncated[0])

    def best_of(self, n: int, seed: int, vote: str) -> bool:
        """Print the best of n continuations, and all of them on stderr. Returns whether the best was truncated."""
        ballot = _last_match(vote) if vote else None
        options = {"tokenizer": self.tokenizer, "seed": [seed], "grammar": self.grammar, "max_new_tokens": self.steps}
        with told((ValueError,)):
            result = fs.best_of_n(self.lm, self.ids, n, vote=ballot, **options, **self.sampling)
        assert not isinstance(result, list)  # one prompt, one result
        best = result.best
        print(("" if self.grammar is not None else self.prompt) + best.text)
        rows = [("draw", "mean logprob", "tokens", *(["answer"] if vote else []), "text")]
        for c in result.candidates:
            answer = [str(c.answer)] if vote else []
            rows.append((str(c.index), f"{c.score:.3f}", str(len(c.tokens)), *answer, shorten(c.text, 60)))
        print_table(rows, header=True, stream=sys.stderr)
        if vote:
            winner = result.answer
            said = "no answer" if winner is None else f"{winner!r} has {result.votes[winner]} of {n} votes"
            print(f"fastsample: {said}", file=sys.stderr)
        return best.truncated


def _last_match(pattern: str) -> Callable[[str], str | None]:
    """What a text answers: its last match of the pattern (the first group, where there is one)."""
    with told((re.error,), f"--vote {pattern}: "):
        compiled = re.compile(pattern)

    def answer(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        return matches[-1][1 if compiled.groups else 0] if matches else None

    return answer


def load_grammar(tokenizer: Any, backend: str, json_schema: Path | None, regex: str, choices: str) -> Any:
    """The grammar that the options ask for; None where they ask for none."""
    given = [json_schema is not None, bool(regex), bool(choices)]
    if not any(given):
        return None
    if sum(given) > 1:
        raise RefusedError("--json-schema, --regex and --choices: expected one of them")
    from fastsample.integrations.grammar import GrammarCompiler

    with told((ImportError, ValueError, TypeError)):
        compiler = GrammarCompiler(tokenizer, backend=backend)
        if json_schema is not None:
            with told((OSError, UnicodeDecodeError), "--json-schema: "):
                text = json_schema.read_text(encoding="utf-8")
            with told((ValueError,), f"--json-schema {json_schema}: "):
                return compiler.json_schema(text)
        return compiler.regex(regex) if regex else compiler.choices(choices.split(","))


class Writer:
    """A streamer for `generate` that prints each token's text as soon as it is whole."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.printed: int | None = None  # characters of the decoded ids that are on the screen

    def put(self, ids: torch.Tensor) -> None:
        """The prompt, which is on the screen already, then one token at a time."""
        self.ids += ids.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if self.printed is None:
            self.printed = len(text)
        elif not text.endswith("\ufffd"):  # the first bytes of a character
            print(text[self.printed :], end="", flush=True)
            self.printed = len(text)

    def end(self) -> None:
        """Print what is left, whole or not."""
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        print(text[self.printed or 0 :], end="", flush=True)
