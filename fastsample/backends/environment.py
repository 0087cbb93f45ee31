"""The environment variables that a choice of engine depends on."""

from __future__ import annotations

import os

VARIABLES = ("FASTSAMPLE_BACKEND", "TRITON_INTERPRET")

_KEYS = tuple(map(os.environ.encodekey, VARIABLES))


def seen() -> tuple[object, ...]:
    """Their values now, in a form that is only good for comparing.

    A lookup in `os.environ` takes more than a microsecond, since it encodes the name and decodes the value. The
    dictionary beneath follows every change that is made through `os.environ`.
    """
    values = getattr(os.environ, "_data", None)
    if type(values) is dict:
        backend, interpret = _KEYS
        return values.get(backend), values.get(interpret)
    return tuple(map(os.environ.get, VARIABLES))
