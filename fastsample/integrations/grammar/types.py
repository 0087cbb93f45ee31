"""The inputs of `GrammarCompiler.json_schema`, as a JSON Schema."""

from __future__ import annotations

import json
import re
import typing
from importlib import import_module
from typing import Any

from fastsample.integrations.grammar.values import load

EXPECTED = (
    "a JSON Schema (a dict, a bool, or a str of JSON), or a type that pydantic describes (a BaseModel, a dataclass, a "
    "TypedDict, an Enum, list[int], Literal['a', 'b'], a TypeAdapter)"
)


def schema_of(source: Any) -> Any:
    """The JSON Schema of this source, in JSON's own types.

    Raises:
        TypeError: not something that has a schema.
        ValueError: not JSON, or a type for which pydantic has no schema.
        ImportError: a type, but pydantic is not installed.
    """
    if isinstance(source, str):
        try:
            return load(source)
        except ValueError as error:
            raise ValueError(f"json_schema: not JSON: {error}") from None
    if isinstance(source, (dict, bool)):
        try:
            return load(json.dumps(source, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"json_schema: not a schema of JSON's types: {error}") from None
    if _is_type(source) or hasattr(source, "core_schema"):
        return load(json.dumps(_of_type(source), default=str))
    hint = f": give the class, {type(source).__name__}" if hasattr(type(source), "model_json_schema") else ""
    raise TypeError(f"json_schema: expected {EXPECTED}, got {type(source).__name__}{hint}")


def _is_type(source: Any) -> bool:
    """Whether this is a type, such as list[int] or a class."""
    forms = (typing.Any, typing.Dict, typing.List, typing.Tuple, typing.Set)  # noqa: UP006
    return (
        isinstance(source, type)
        or typing.get_origin(source) is not None
        or hasattr(source, "__supertype__")
        or hasattr(source, "__value__")
        or any(source is form for form in forms)
    )


def _of_type(source: Any) -> dict[str, Any]:
    """Pydantic's schema of a type, with decimals as numbers."""
    try:
        pydantic = import_module("pydantic")
        adapter_type: Any = pydantic.TypeAdapter
    except (ImportError, AttributeError):
        name = getattr(source, "__name__", repr(source))
        raise ImportError(
            f"json_schema: {name} needs pydantic: pip install 'pydantic>=2' (or give a JSON Schema as a dict)"
        ) from None
    generator = _generator(pydantic)
    try:
        adapter = source if isinstance(source, adapter_type) else adapter_type(source)
        schema: dict[str, Any] = adapter.json_schema(schema_generator=generator)
    except (pydantic.errors.PydanticUserError, NameError, TypeError) as error:
        field = _failing_field(source, adapter_type, generator)
        name = getattr(source, "__name__", repr(source))
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"json_schema: {name}{f' at properties.{field}' if field else ''}: {reason}") from None
    return schema


def _generator(pydantic: Any) -> Any:
    base = import_module("pydantic.json_schema").GenerateJsonSchema

    class Generator(base):  # type: ignore[misc, valid-type]
        """Pydantic's schemas, without the texts that its own validators refuse."""

        def decimal_schema(self, schema: Any) -> Any:
            made = super().decimal_schema(schema)  # a number, or any string at all
            return made.get("anyOf", [made])[0]

        def dict_schema(self, schema: Any) -> Any:
            made = super().dict_schema(schema)  # would allow names that the key type refuses
            values = made.get("additionalProperties", {})
            if schema.get("keys_schema", {}).get("type") == "int":
                made["patternProperties"] = {"^(?:0|-?[1-9][0-9]{0,14})$": values}
            return {**made, "additionalProperties": False} if "patternProperties" in made else made

        def url_schema(self, schema: Any) -> Any:
            schemes = schema.get("allowed_schemes")
            made = super().url_schema(schema)
            return {**made, "pattern": f"^(?:{'|'.join(map(re.escape, schemes))})://"} if schemes else made

        def complex_schema(self, schema: Any) -> Any:
            return self.handle_invalid_for_json_schema(schema, "a complex number, which JSON does not have")

    return Generator


def _failing_field(source: Any, adapter_type: Any, generator: Any) -> str | None:
    """The field of a model that has no schema, if there is one."""
    for name, field in getattr(source, "model_fields", {}).items():
        try:
            adapter_type(field.annotation).json_schema(schema_generator=generator)
        except Exception:  # the field's error is the model's error
            return str(name)
    return None
