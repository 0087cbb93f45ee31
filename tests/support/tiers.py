"""The quick tier: what `pytest` runs unless it is asked for the slow tests too."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def quick_where_new(items: Iterable[T], aspects: Callable[[T], Iterable[Hashable]]) -> list[Any]:
    """Each item as a parameter of a test. One that has no aspect that an earlier one lacks is slow."""
    seen: set[Hashable] = set()
    parameters = []
    for item in items:
        new = set(aspects(item)) - seen
        seen |= new
        parameters.append(pytest.param(item, marks=() if new else pytest.mark.slow))
    return parameters
