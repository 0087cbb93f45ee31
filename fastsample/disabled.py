"""Functions that no trace enters. Importing this loads torch.compile's machinery, so eager calls never do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch


def disabled(function: Any, reason: str) -> Any:
    """`function`, which no trace enters; the reason is what fullgraph=True says, if this torch can say one."""
    disable: Any = torch.compiler.disable
    takes_reason = "reason" in inspect.signature(disable).parameters  # torch 2.7 and later
    return disable(function, reason=reason) if takes_reason else disable(function)


def _outside_of_a_graph(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return function(*arguments, **named)


eagerly: Any = cast(Any, torch.compiler.disable)(_outside_of_a_graph)
"""Calls its first argument with the others, outside of any graph."""
