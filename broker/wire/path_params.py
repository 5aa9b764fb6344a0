"""Path parameters as JSON, with their types.

JSON has no UUIDs, and orjson has neither integers beyond 64 bits nor infinity (which Starlette's float convertor makes
of 400 digits). So a value other than a string is written as its type and its text. Integers are in hexadecimal, because
Python refuses to read more than 4300 decimal digits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from reprlib import repr as shortened
from typing import Any, Union, cast
from uuid import UUID

from ..errors import WireError

PathParam = Union[str, int, float, UUID]  # noqa: UP007 - it is evaluated, also on Python 3.10


def dump_params(params: Mapping[str, PathParam]) -> dict[str, str | tuple[str, str]]:
    """Return ``params`` as JSON values for `load_params`. Raises `WireError`: a value is not a `PathParam`."""
    return {name: value if type(value) is str else _dump_param(name, value) for name, value in params.items()}


def _dump_param(name: str, value: object) -> tuple[str, str]:
    if isinstance(value, int):
        return "int", f"{int(value):x}"
    if isinstance(value, float):
        return "float", float.__repr__(value)
    if isinstance(value, UUID):
        return "uuid", value.hex
    if isinstance(value, str):
        return "str", str(value)
    raise WireError(f"the path parameter {name!r} cannot travel: its convertor made a {type(value).__name__}")


_PARAMS: dict[str, Callable[[str], PathParam]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "uuid": UUID,
    "str": str,
}


def load_params(raw: Any) -> dict[str, PathParam]:
    """Read what `dump_params` wrote. Raises `WireError` for anything else."""
    if type(raw) is not dict:
        raise WireError(f"the header's 'params' cannot be a {type(raw).__name__}")
    params: dict[str, PathParam] = {}
    for name, value in cast("dict[str, Any]", raw).items():
        if type(value) is str:
            params[name] = value
            continue
        try:
            kind, text = value
            params[name] = _PARAMS[kind](text)
        except (TypeError, ValueError, KeyError, AttributeError):
            raise WireError(f"the path parameter {name!r} cannot be read from {shortened(value)}") from None
    return params
