"""fastsample: from logits to token, the same token to the bit on every engine."""

import sys as _sys
from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from fastsample.api import filter_logits, probabilities, sample
    from fastsample.backends import engines
    from fastsample.explanation import Explanation, explain
    from fastsample.inputs import pack_bitmask
    from fastsample.integrations.best_of_n import best_of_n
    from fastsample.outputs import SampleOutput
    from fastsample.params import SamplingParams
    from fastsample.sampler import Sampler
    from fastsample.threads import get_num_threads, set_num_threads
    from fastsample.verification import verify, verify_tree
    from fastsample.verified import VerifyOutput

    __version__: str

__all__ = [
    "Explanation",
    "SampleOutput",
    "Sampler",
    "SamplingParams",
    "VerifyOutput",
    "best_of_n",
    "engines",
    "explain",
    "filter_logits",
    "get_num_threads",
    "pack_bitmask",
    "probabilities",
    "sample",
    "set_num_threads",
    "verify",
    "verify_tree",
]

_DEFINED_IN = {
    "api": ("filter_logits", "probabilities", "sample"),
    "backends": ("engines",),
    "inputs": ("pack_bitmask",),
    "integrations.best_of_n": ("best_of_n",),
    "outputs": ("SampleOutput",),
    "params": ("SamplingParams",),
    "sampler": ("Sampler",),
    "threads": ("get_num_threads", "set_num_threads"),
    "verification": ("verify", "verify_tree"),
    "verified": ("VerifyOutput",),
    "explanation": ("Explanation", "explain"),
}


def __getattr__(name: str) -> object:
    """What is imported when it is first asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return globals().setdefault(name, version("fastsample"))
    for module, names in _DEFINED_IN.items():
        if name in names:
            return globals().setdefault(name, getattr(_import_module(f"fastsample.{module}"), name))
    raise AttributeError(f"module 'fastsample' has no attribute {name!r}")


# Torch loads pickled outputs, and programs with our operators, once fastsample is imported. The command line's help
# shall not wait for torch, nor others for pictures.
if "_fastsample_cli" not in _sys.modules:
    for _name in __all__:
        if _name not in _DEFINED_IN["explanation"]:
            __getattr__(_name)
