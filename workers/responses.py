"""What a backend returned, as the bytes of a reply."""

from __future__ import annotations

import pickle
from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any, NamedTuple, cast

import orjson
from ray import cloudpickle
from starlette.responses import Response
from starlette.types import Message

from ..broker.wire import Pairs

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY


class Encoded(NamedTuple):
    """A result as a reply carries it."""

    status: int
    codec: str
    headers: Pairs
    body: bytes


def encode(result: Any, backend: str, allow_pickle: bool = False) -> Encoded:
    """Write what ``backend`` returned.

    NaN and infinities become ``null``, as in JavaScript: JSON has no word for them.

    Raises:
        TypeError: it cannot be written; the message says what can, and how to allow the rest.
        ValueError: it is a response with a status that HTTP does not have.
    """
    if result is None:
        return Encoded(200, "none", [], b"")
    if isinstance(result, str):
        try:
            return Encoded(200, "text", [], result.encode())
        except UnicodeEncodeError as e:
            return _pickled(result, backend, allow_pickle, e)
    if isinstance(result, (bytes, bytearray, memoryview)):
        return Encoded(200, "bytes", [], bytes(cast("bytes", result)))
    if isinstance(result, Response):
        return encode_response(result.status_code, result.raw_headers, result.body)
    if isinstance(result, (Generator, AsyncGenerator)):
        raise TypeError(
            f"backend {backend!r} returned a generator, which cannot be sent as it is: "
            "return a list, or a starlette StreamingResponse of strings or bytes"
        )
    if isinstance(result, Coroutine):
        result.close()  # else Python warns that nobody awaited it
        raise TypeError(
            f"backend {backend!r} returned a coroutine: what wraps its `async def` code must be `async def` too"
        )
    try:
        return Encoded(200, "json", [], _dumps(result))
    except TypeError as e:
        return _pickled(result, backend, allow_pickle, e)


def encode_response(status: int, headers: list[tuple[bytes, bytes]], body: bytes | memoryview) -> Encoded:
    """Write a whole HTTP response."""
    if not 200 <= status <= 599:
        raise ValueError(f"the status of a response must be 200 to 599, not {status}")
    pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
    return Encoded(int(status), "response", pairs, bytes(body))


def is_at_hand(result: object) -> bool:
    """Return whether `encode` can write ``result``; if not, it is a response that must be called as an ASGI app.

    Such are those that stream, read a file, or have a background task.
    """
    if not isinstance(result, Response):
        return True
    return type(result).__call__ is Response.__call__ and result.background is None


class Collector:
    """The ``send`` of an ASGI application, putting the messages together to one response."""

    def __init__(self) -> None:
        self._status = 200
        self._headers: list[tuple[bytes, bytes]] = []
        self._chunks: list[bytes] = []
        self.complete = False

    def take(self, message: Message) -> Encoded | None:
        """Add a message. Returns the response when it was the last one."""
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], list(message.get("headers", ()))
        elif message["type"] == "http.response.body" and not self.complete:
            self._chunks.append(bytes(message.get("body", b"")))
            if not message.get("more_body", False):
                self.complete = True
                return encode_response(self._status, self._headers, b"".join(self._chunks))
        return None


def _dumps(value: object) -> bytes:
    try:
        return orjson.dumps(value, _default, _OPTIONS)
    except TypeError:
        # Asked for from the start, it would make dictionaries with string keys slower too.
        return orjson.dumps(value, _default, _OPTIONS | orjson.OPT_NON_STR_KEYS)


def _default(value: Any) -> Any:
    """Return what orjson shall write for a ``value`` that it does not know."""
    if isinstance(value, tuple):  # a named one
        return list(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    # By their methods, to need none of the libraries: pydantic models; then what numpy holds that orjson does not read,
    # such as arrays that are not contiguous, and the tensors and series of other libraries.
    for convert in ("model_dump", "tolist"):
        method = getattr(value, convert, None)
        if method is not None and not isinstance(value, type):
            return method(mode="json") if convert == "model_dump" else method()
    raise TypeError(f"Type is not JSON serializable: {_name(cast('object', value))}")


def _pickled(result: object, backend: str, allow_pickle: bool, why_not: Exception) -> Encoded:
    if not allow_pickle:
        raise TypeError(
            f"backend {backend!r} returned a {_name(result)} that cannot be sent ({why_not}): return None, str, "
            "bytes, what JSON can hold or a starlette Response; "
            "or let Python handles have it by config={'allow_pickle': True}"
        ) from None
    try:
        body = pickle.dumps(result, protocol=5)
    except Exception:  # such as a class of the script that made the backend, which is not in a module here
        body = cast("bytes", cloudpickle.dumps(result))  # type: ignore[no-untyped-call]  # pyright: ignore[reportPrivateImportUsage, reportUnknownMemberType]
    return Encoded(200, "pickle", [], body)


def _name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
