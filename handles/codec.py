"""Codec: Python values to bytes and back, by the same rules for handles and backends."""

from __future__ import annotations

import pickle
from typing import Any, cast

from ..broker.wire import exact_json
from .errors import MalformedBody
from .json_bounds import read_uncollected


def encode(value: object, *, allow_pickle: bool = False) -> tuple[str, bytes]:
    """Return the name of the codec for ``value``, and the encoded value.

    None, ``str`` and bytes have codecs of their own. Every other value is JSON, including dataclasses, datetimes,
    UUIDs, NumPy arrays, tuples and pydantic models. NaN, infinities and NaT become ``null``, because JSON has none of
    them. Integers of any size are exact. The keys of a mapping must be strings.

    Args:
        value: the value.
        allow_pickle: pickle a value that JSON cannot represent, instead of raising.

    Raises:
        TypeError: the value cannot be encoded; the message gives the reason.
    """
    if value is None:
        return "none", b""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "bytes", bytes(cast("bytes", value))
    try:
        if isinstance(value, str):
            try:
                return "text", value.encode()
            except UnicodeEncodeError:
                pass  # a lone surrogate, which JSON escapes
        return "json", exact_json.compact(exact_json.dumps(value))  # callers keep it until the reply arrives
    except TypeError as e:
        if not allow_pickle:
            raise TypeError(f"a {exact_json.name_of(type(value))} cannot be sent ({e})") from None
    try:
        return "pickle", pickle.dumps(value, protocol=5)
    except Exception as e:  # methods of the value may raise anything
        raise TypeError(f"a {exact_json.name_of(type(value))} cannot be pickled ({type(e).__name__}: {e})") from e


def decode(codec: str, body: bytes, *, allow_pickle: bool = False) -> Any:
    """Return the value that `encode` encoded as ``body``.

    Raises:
        MalformedBody: the bytes do not have the codec's format, the codec is unknown, or it is ``pickle`` and pickle is
            not allowed.
    """
    try:
        if codec == "json":
            return read_uncollected(exact_json.loads, body)
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


def load_json(raw: bytes, what: str = "the body") -> Any:
    """Return the value of a JSON text, as Python's ``json`` reads it.

    Args:
        raw: the text.
        what: its name in the error message.

    Raises:
        MalformedBody: the text is not JSON.
    """
    try:
        return exact_json.loads(raw)
    except ValueError as e:
        raise MalformedBody(f"{what} is not JSON: {e}" if raw else f"{what} is empty, not JSON") from None
