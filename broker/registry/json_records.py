"""Reading of dataclasses from JSON objects, as the registry stores them.

Fields that a later release added are ignored; a missing field has its default. So the processes of one instance may be
of different releases while it is updated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from types import NoneType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import orjson

from ..errors import WireError

T = TypeVar("T")


def parse_objects(flat: list[bytes]) -> dict[str, dict[str, Any]]:
    """Return the JSON objects of a Redis hash: names and values in turn. Raises `WireError`."""
    objects: dict[str, dict[str, Any]] = {}
    for name, raw in zip(flat[::2], flat[1::2], strict=True):
        try:
            value = orjson.loads(raw)
        except ValueError as e:
            raise WireError(f"the registry's {name!r} is not JSON: {e}") from None
        if type(value) is not dict:
            raise WireError(f"the registry's {name!r} must be a JSON object, not {type(value).__name__}")
        objects[name.decode()] = cast("dict[str, Any]", value)
    return objects


def read_record(kind: type[T], name: str, raw: Mapping[str, Any]) -> T:
    """Return the record ``name`` as a ``kind``, which is a dataclass.

    Raises:
        WireError: a field without a default is missing, or a value has the wrong type.
    """
    values: dict[str, Any] = {}
    for field, (allowed, nested, is_required) in _schema(cast(Any, kind)).items():
        if field not in raw:
            if is_required:
                raise WireError(f"the registry's {name!r} has no {field!r}")
            continue
        value = raw[field]
        if allowed and type(value) not in allowed:
            raise WireError(f"the registry's {name!r} has a {type(value).__name__} as its {field!r}")
        if nested is not None and value is not None:
            value = read_record(nested, name, value)
        values[field] = tuple(cast("list[object]", value)) if type(value) is list and list in allowed else value
    return kind(**values)


_JSON_TYPES: Mapping[Any, tuple[type, ...]] = {float: (float, int), tuple: (list,)}
"""The types that JSON has for a field's type, where they differ."""


@lru_cache
def _schema(kind: type) -> dict[str, tuple[tuple[type, ...], type[Any] | None, bool]]:
    """Return for each field the types of its JSON value (none: any), its dataclass, and whether it must be there."""
    hints = get_type_hints(kind)
    schema: dict[str, tuple[tuple[type, ...], type[Any] | None, bool]] = {}
    for field in fields(cast(Any, kind)):
        hint = hints[field.name]
        options: tuple[Any, ...] = get_args(hint) if _is_union(hint) else (hint,)
        nested = next((option for option in options if is_dataclass(option)), None)
        allowed = () if Any in options else tuple(json for option in options for json in _json_types(option))
        is_required = field.default is MISSING and field.default_factory is MISSING
        schema[field.name] = allowed, cast("type[Any] | None", nested), is_required
    return schema


def _is_union(hint: Any) -> bool:
    return get_origin(hint) is Union or type(hint).__name__ == "UnionType"


def _json_types(hint: Any) -> tuple[type, ...]:
    if get_origin(hint) is Literal:
        return (str,)
    kind: Any = get_origin(hint) or hint
    if kind is NoneType or kind is None:
        return (NoneType,)
    return (dict,) if is_dataclass(kind) else _JSON_TYPES.get(kind, (kind,))
