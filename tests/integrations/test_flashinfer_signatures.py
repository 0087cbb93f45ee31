"""Every function has the signature of the installed FlashInfer: names, order, defaults and kinds of its parameters."""

from __future__ import annotations

import inspect

import pytest

from fastsample.integrations import flashinfer as ours

# `nox -s flashinfer` installs it; it is no dependency.
theirs = pytest.importorskip("flashinfer.sampling", reason="flashinfer-python is not installed (nox -s flashinfer)")


@pytest.mark.parametrize("name", ours.__all__)
def test_signature(name: str) -> None:
    mine, wanted = (list(inspect.signature(getattr(m, name)).parameters.values()) for m in (ours, theirs))
    assert [p.name for p in mine] == [p.name for p in wanted]
    assert [p.kind for p in mine] == [p.kind for p in wanted]
    assert [p.default for p in mine] == [p.default for p in wanted]


def test_no_sampling_function_is_missing() -> None:
    public = {
        name
        for name, value in vars(theirs).items()
        if inspect.isfunction(value) and value.__module__ == theirs.__name__ and not name.startswith(("_", "get_"))
    }
    assert public >= {"softmax", "sampling_from_probs"}, "the names were not found as expected"
    assert public - set(ours.__all__) == set()
