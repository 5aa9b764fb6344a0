"""Python values as bytes, and back: the same rules for what a handle sends and for what a backend returns."""

from __future__ import annotations

import pickle
from typing import Any, cast

import orjson

from .errors import MalformedBody

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY


def encode(value: object, *, allow_pickle: bool = False) -> tuple[str, bytes]:
    """Return the codec of ``value`` and its bytes.

    None, ``str`` and bytes are themselves; anything else is JSON, with dataclasses, datetimes, UUIDs, numpy arrays,
    tuples and pydantic models; what JSON cannot hold is pickled where that is allowed. NaN and infinities become
    ``null``, as JSON has no word for them.

    Raises:
        TypeError: the value cannot travel; the message says why.
    """
    if value is None:
        return "none", b""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "bytes", bytes(cast("bytes", value))
    try:
        if isinstance(value, str):
            return "text", value.encode()
        return "json", dump_json(value)
    except (TypeError, UnicodeEncodeError) as e:
        if not allow_pickle:
            raise TypeError(f"a {name_of(type(value))} cannot be sent ({e})") from None
    try:
        return "pickle", pickle.dumps(value, protocol=5)
    except Exception as e:  # whatever the value's own code raises
        raise TypeError(f"a {name_of(type(value))} cannot be pickled ({type(e).__name__}: {e})") from e


def decode(codec: str, body: bytes, *, allow_pickle: bool = False) -> Any:
    """Return the value that `encode` wrote.

    Raises:
        MalformedBody: the bytes are not what the codec says, the codec is unknown, or it is ``pickle`` and that is not
            allowed.
    """
    try:
        if codec == "json":
            return orjson.loads(body)
        if codec == "none":
            return None
        if codec == "text":
            return body.decode()
        if codec == "bytes":
            return body
    except ValueError as e:
        raise MalformedBody(f"the body is not {codec}: {e}") from None
    if codec != "pickle":
        raise MalformedBody(f"the codec {codec!r} is unknown here")
    if not allow_pickle:
        raise MalformedBody("the body is pickled, and the backend was not created with config={'allow_pickle': True}")
    try:
        return pickle.loads(body)
    except Exception as e:
        raise MalformedBody(f"the body cannot be unpickled: {e}") from e


def dump_json(value: object) -> bytes:
    """Return ``value`` as JSON. Raises ``TypeError`` for what JSON cannot hold."""
    try:
        return orjson.dumps(value, _default, _OPTIONS)
    except TypeError:
        # Asked for from the start, it would make dictionaries with string keys slower too.
        return orjson.dumps(value, _default, _OPTIONS | orjson.OPT_NON_STR_KEYS)


def name_of(kind: type[Any]) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _default(value: Any) -> Any:
    if isinstance(value, tuple):  # a named one
        return list(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    # By their methods, to need none of the libraries: pydantic models; what numpy holds that orjson does not read, such
    # as arrays that are not contiguous; the tensors and series of other libraries.
    if not isinstance(value, type):
        if (dump := getattr(value, "model_dump", None)) is not None:
            return dump(mode="json")
        if (to_list := getattr(value, "tolist", None)) is not None:
            return to_list()
    kind: type[Any] = type(value)  # pyright: ignore[reportUnknownVariableType]
    raise TypeError(f"JSON cannot hold a {name_of(kind)}")
