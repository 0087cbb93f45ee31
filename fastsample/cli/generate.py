"""What a command needs before it can continue a prompt: texts, a model, ids, a grammar."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import fastsample as fs
from fastsample.backends import select
from fastsample.cli.output import INSTALL, RefusedError, note, told, utf8

_HUB_SECONDS = 2.0


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' advice and progress bars off the terminal."""
    advice = _library("transformers").utils.logging
    advice.set_verbosity(logging.CRITICAL)
    advice.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it reports each retry
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise RefusedError(f"generate needs {name}: {INSTALL}") from None


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
        fs.sample(logits, seed=0, backend=backend)  # finds what an environment variable asks of the engine


# The model -----------------------------------------------------------------------------------------------------------


def shipped_model() -> Path:
    """Folder of the model that comes with the package."""
    return Path(str(files("fastsample") / "models" / "tiny-gpt2"))


def find_model(model: str | None) -> tuple[str, bool]:
    """Where to load a model from (a folder or a name on the hub), and whether to do so without the network.

    A folder comes first, then the name of the shipped model, then the hub. Without a network huggingface_hub would
    retry for half a minute, so one request first finds out.
    """
    if model is None or (model == shipped_model().name and not os.path.isdir(model)):
        return str(shipped_model()), True
    if os.path.isdir(model):
        return model, True
    what = f"--model {model}: "
    if os.path.exists(model):
        raise RefusedError(f"{what}expected a folder, this is a file")
    if not model or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise RefusedError(f"{what}no such folder")
    hub = _library("huggingface_hub")
    try:
        cached = isinstance(hub.try_to_load_from_cache(model, "config.json"), str)
    except ValueError:
        raise RefusedError(f"{what}no such folder, and no name that a model on the hub could have") from None
    reason = _why_no_hub(hub)
    if reason is not None and not cached:
        raise RefusedError(f"{what}no folder of that name here, no model of it in the hub's cache, and {reason}")
    return model, reason is not None


def _why_no_hub(hub: Any) -> str | None:
    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception as error:  # from any HTTP library, or because the environment says offline
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"{hub.constants.ENDPOINT} cannot be reached: {lines[0]}"
    return None


def load(name: str, local: bool) -> tuple[Any, Any]:
    """The language model and its tokenizer, from what `find_model` found."""
    transformers = _library("transformers")
    # Nothing that comes with a model is executed: no code of its own (told so, transformers does not ask at the
    # terminal), no pickles.
    safe = {"local_files_only": local, "trust_remote_code": False}
    what = f"--model {name}: "
    # With broken files transformers and its libraries may raise anything.
    with told((Exception,), what):
        lm, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **safe
        )
    with told((Exception,), f"{what}its tokenizer: "):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **safe)
    if any(name.endswith("ForMaskedLM") for name in lm.config.architectures or []):
        raise RefusedError(f"{what}a masked language model; expected a causal one")
    _check_weights(what, found)
    _check_tokenizer(what, lm, tokenizer)
    if lm.dtype == torch.float16:
        lm = lm.float()  # CPUs are slow at float16
    # The command's options alone say how to sample.
    own = lm.generation_config
    lm.generation_config = transformers.GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    return lm.eval(), tokenizer


def _check_weights(what: str, found: dict[str, Any]) -> None:
    """Refuse missing weights, which transformers would replace by random ones."""
    if missing := sorted(found["missing_keys"]):
        raise RefusedError(f"{what}the file of weights lacks {len(missing)} that its config asks for: {missing[0]}")
    if mismatched := sorted(found["mismatched_keys"]):
        name, has, wants = mismatched[0]
        raise RefusedError(f"{what}weights of another shape than its config says: {name}, {[*has]} for {[*wants]}")


def _check_tokenizer(what: str, lm: Any, tokenizer: Any) -> None:
    """Refuse an empty tokenizer, which transformers makes for a folder without a tokenizer's files."""
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise RefusedError(f"{what}no tokenizer there (tokenizer.json and tokenizer_config.json, as a rule)")
    rows = lm.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:  # without added tokens, for which some models have no row
        raise RefusedError(f"{what}the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}: not its own")


def encode(prompt: str, lm: Any, tokenizer: Any, max_new_tokens: int) -> tuple[torch.Tensor, int]:
    """The prompt's ids [1, L], and how many tokens fit after them."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
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
