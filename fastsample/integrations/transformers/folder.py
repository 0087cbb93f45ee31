"""fastsample for whoever loads a model's folder, without a change of their code.

    export("my-model", top_n_sigma=1.0)

transformers has a way for this: where a model's folder, or its repository on a hub, holds a file
`custom_generate/generate.py`, `from_pretrained(folder, trust_remote_code=True)` puts the function `generate` of that
file in the place of `model.generate`. So do `pipeline` and `transformers serve`, which load their models in that way.
`export` writes the file, and what the sampler is to do into generation_config.json, under "fastsample".
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, GenerationMixin

from fastsample.integrations.transformers import fs_generate
from fastsample.integrations.transformers.plan import HISTORY
from fastsample.params import SamplingParams

__all__ = ["export", "generate"]

KEY = "fastsample"
"""Where our options stand in generation_config.json."""

_FILES = {
    "generate.py": '"""fastsample draws the tokens; generation_config.json has its options, under "fastsample"."""\n\n'
    "from fastsample.integrations.transformers.folder import generate  # noqa: F401\n",
    "requirements.txt": "fastsample\ntransformers>=5\n",
}

_OBJECTS = ("grammar", "streamer", "tokenizer")
"""Arguments of fs_generate that no file can hold."""

_OF_DRAWS = {"seed", "offset", *(field.name for field in dataclasses.fields(SamplingParams))} - set(HISTORY)
"""Fields that greedy search does without."""


def export(folder: str | Path, **fields: Any) -> Path:
    """Make a model's folder one whose text fastsample draws, for everyone who loads it with trust_remote_code=True.

    Args:
        folder: of a model, as `save_pretrained` leaves it; or one without a model, made if it is not there, for a
            repository that `generate(custom_generate=...)` names. What it holds stays as it is, but for
            `custom_generate` and the entry "fastsample" of generation_config.json.
        **fields: what `fs_generate` takes and `generate` has no option for: seed, offset, dry_breakers, top_n_sigma,
            frequency_penalty, ... They replace those of an earlier export. What `generate` has an option for
            (temperature, top_p, do_sample, ...) stands in generation_config.json by itself. Without a seed each text is
            another one; `torch.manual_seed` makes them repeatable. With a seed, a prompt has the same continuation at
            every call.

    Returns:
        The folder's `custom_generate`.

    Raises:
        TypeError, ValueError: bad field, by its name.
        FileExistsError: the folder has a custom_generate of another kind.
    """
    _check(fields)
    folder = Path(folder)
    target = folder / "custom_generate"
    code = target / "generate.py"
    if code.exists() and KEY not in code.read_text(encoding="utf-8"):
        raise FileExistsError(f"{code}: there is one that is not fastsample's; move it away first")
    target.mkdir(parents=True, exist_ok=True)
    for name, text in _FILES.items():
        (target / name).write_text(text, encoding="utf-8")
    _write_options(folder, fields)
    return target


def generate(*args: Any, model: Any, **kwargs: Any) -> Any:
    """What stands in for `model.generate` of a model whose folder was exported: the same, drawn by `fs_generate`.

    Takes and returns what `model.generate` does; a streamer too, and `fastsample`, a dict of fields that replace those
    of generation_config.json for this call. A `custom_generate` of the caller's goes before the folder's.
    """
    given = inspect.signature(GenerationMixin.generate).bind(model, *args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    del given["self"]
    places = (model.generation_config, given.get("generation_config"), given)
    fields = {name: value for place in places for name, value in _options(place).items()}
    given.pop(KEY, None)
    if given.get("custom_generate") is None:
        _check(fields)
        if not next((found for place in reversed(places) if (found := _of(place, "do_sample")) is not None), False):
            fields = {name: value for name, value in fields.items() if name not in _OF_DRAWS}
        if "dry_breakers" in fields and given.get("tokenizer") is None:  # strings, perhaps
            fields["tokenizer"] = AutoTokenizer.from_pretrained(model.name_or_path)
        given["custom_generate"] = fs_generate(streamer=given.pop("streamer", None), **fields)
    return type(model).generate(model, **given)


def _of(place: Any, name: str) -> Any:
    """An option in a dict or a GenerationConfig, or None."""
    return place.get(name) if isinstance(place, dict) else getattr(place, name, None)


def _options(place: Any) -> dict[str, Any]:
    """Ours among the options in a dict or a GenerationConfig."""
    fields = _of(place, KEY)
    if fields is not None and not isinstance(fields, dict):
        raise TypeError(f"{KEY}: expected a dict of fs_generate's arguments, got {fields!r}")
    return fields or {}


def _check(fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if hasattr(GenerationConfig(), name):  # type: ignore[no-untyped-call]
            raise ValueError(f"{name}: is an option of generate's own: set it in generation_config.json beside {KEY!r}")
        if name in _OBJECTS:
            raise ValueError(f"{name}: no file can hold it; give it to fs_generate")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise TypeError(
                f"{name} = {value!r}: expected what JSON can hold: numbers, strings, lists of them"
            ) from None
    fs_generate(**fields)


def _write_options(folder: Path, fields: dict[str, Any]) -> None:
    path = folder / "generation_config.json"
    if path.exists():
        options = json.loads(path.read_text(encoding="utf-8"))
    elif not fields:
        return
    elif (folder / "config.json").exists():  # generate reads that one as long as there is no other
        options = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder)).to_diff_dict()
        del options["_from_model_config"]  # with it, what a GenerationConfig does not know is dropped
    else:
        options = {}
    options = {name: value for name, value in options.items() if name != KEY} | ({KEY: fields} if fields else {})
    path.write_text(json.dumps(options, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
