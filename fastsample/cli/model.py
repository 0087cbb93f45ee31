"""Where a model comes from: the one that ships, a folder, a GGUF file, a name on a hub; and whether it is whole."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastsample.cli import gguf
from fastsample.cli.output import INSTALL, RefusedError, told

_HUB_SECONDS = 2.0


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' advice and progress bars off the terminal."""
    advice = library("transformers").utils.logging
    advice.set_verbosity(logging.CRITICAL)
    advice.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it reports each retry
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise RefusedError(f"generate needs {name}: {INSTALL}") from None


def shipped_model() -> Path:
    """Folder of the model that comes with the package."""
    return Path(str(files("fastsample") / "models" / "tiny-gpt2"))


def find_model(model: str | None) -> tuple[str, bool]:
    """Where to load a model from (a folder, a GGUF file or a name on the hub), and whether without the network.

    A folder comes first, then the names of the shipped model and of SmolLM2, a file, then the hub. Without a network
    huggingface_hub would retry for half a minute, so one request first finds out.
    """
    if model is None or (model == shipped_model().name and not os.path.isdir(model)):
        return str(shipped_model()), True
    if os.path.isdir(model):
        return model, True
    what = f"--model {model}: "
    if os.path.exists(model):
        with told((OSError,), what):
            found = gguf.is_gguf(model)
        if not found:
            raise RefusedError(f"{what}expected a folder or a GGUF file, this is another file")
        gguf.require(what)
        return model, True
    if model == gguf.SMOLLM2:
        return gguf.smollm2(), True
    if model.endswith(".gguf"):
        raise RefusedError(f"{what}no such file")
    if not model or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise RefusedError(f"{what}no such folder")
    hub = library("huggingface_hub")
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
    """The language model and its tokenizer, from what `find_model` found; in float32 where it was in float16."""
    transformers = library("transformers")
    what = f"--model {name}: "
    lm, found, tokenizer = _read(transformers, name, local, what)
    if any(name.endswith("ForMaskedLM") for name in lm.config.architectures or []):
        raise RefusedError(f"{what}a masked language model; expected a causal one")
    _check_weights(what, found)
    _check_tokenizer(what, lm, tokenizer)
    if str(lm.dtype) == "torch.float16":
        lm = lm.float()  # CPUs are slow at float16
    # The command's options alone say how to sample.
    own = lm.generation_config
    lm.generation_config = transformers.GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    return lm.eval(), tokenizer


def _read(transformers: Any, name: str, local: bool, what: str) -> tuple[Any, dict[str, Any], Any]:
    """The model, what was found of its weights, and the tokenizer.

    Nothing that comes with a model is executed: no code of its own (told so, transformers does not ask at the
    terminal), no pickles. With broken files transformers and its libraries may raise anything.
    """
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    is_file = os.path.isfile(name)
    with gguf.quick() if is_file else nullcontext():
        if is_file:
            name, options["gguf_file"] = gguf.place(name, what)
        weights = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        weights |= gguf.plain() if is_file else {}
        with told((Exception,), what):
            lm, found = transformers.AutoModelForCausalLM.from_pretrained(name, **weights, **options)
        with told((Exception,), f"{what}its tokenizer: "):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    return lm, found, tokenizer


def open_model(model: str | None = None) -> tuple[Any, Any]:
    """The language model that --model would name and its tokenizer; transformers says nothing meanwhile."""
    with quiet():
        return load(*find_model(model))


# Is it whole? --------------------------------------------------------------------------------------------------------


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
