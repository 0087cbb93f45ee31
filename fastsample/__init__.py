"""fastsample: from logits to token, the same token to the bit on every engine."""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING

from fastsample.api import filter_logits, probabilities, sample
from fastsample.backends import engines
from fastsample.inputs import pack_bitmask
from fastsample.integrations.best_of_n import best_of_n
from fastsample.outputs import SampleOutput
from fastsample.params import SamplingParams
from fastsample.sampler import Sampler
from fastsample.threads import get_num_threads, set_num_threads
from fastsample.verification import verify, verify_tree
from fastsample.verified import VerifyOutput

if _TYPE_CHECKING:
    from fastsample.explanation import Explanation, explain

__version__ = _version("fastsample")

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


def __getattr__(name: str) -> object:
    """What is imported when it is first asked for."""
    if name in ("Explanation", "explain"):
        from fastsample import explanation

        return globals().setdefault(name, getattr(explanation, name))
    raise AttributeError(f"module 'fastsample' has no attribute {name!r}")
