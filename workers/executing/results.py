"""Results of user code as the bytes of a reply."""

from __future__ import annotations

import pickle
from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any, NamedTuple, cast

from ray import cloudpickle
from starlette.responses import Response
from starlette.types import Message

from ...broker.wire._fields import Pairs
from ...handles.codec import encode as encode_value


class Encoded(NamedTuple):
    """A result as a reply carries it."""

    status: int
    codec: str
    headers: Pairs
    body: bytes


def encode(result: Any, backend: str, allow_pickle: bool = False) -> Encoded:
    """Write what ``backend`` returned.

    It is a Starlette response, or what handles can send (``handles/codec.py``).

    Raises:
        TypeError: it cannot be written; the message says what can, and how to allow the rest.
        ValueError: it is a response with a status that HTTP does not have.
    """
    if isinstance(result, Response):
        return encode_response(result.status_code, result.raw_headers, result.body)
    try:
        codec, body = encode_value(result)
    except TypeError as e:
        if isinstance(result, (Generator, AsyncGenerator)):
            raise TypeError(
                f"backend {backend!r} returned a generator, and its caller takes the answer only as a whole: "
                "ask over HTTP or by handle.options(stream=True), or return a list; what takes batches cannot stream"
            ) from None
        if isinstance(result, Coroutine):
            result.close()  # else Python warns that nobody awaited it
            raise TypeError(
                f"backend {backend!r} returned a coroutine: what wraps its `async def` code must be `async def` too"
            ) from None
        if not allow_pickle:
            raise TypeError(
                f"backend {backend!r} returned what cannot be sent: {e}; return None, str, bytes, what JSON can hold "
                "or a starlette Response, or let Python handles have it by config={'allow_pickle': True}"
            ) from None
        codec, body = "pickle", _pickled(result)
    return Encoded(200, codec, [], body)


def encode_response(status: int, headers: list[tuple[bytes, bytes]], body: bytes | memoryview) -> Encoded:
    """Write a whole HTTP response."""
    return Encoded(_checked(status), "response", _pairs(headers), bytes(body))


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
        self.status = 200
        self.headers: Pairs = []
        self._chunks: list[bytes] = []
        self.complete = False

    def add(self, message: Message) -> Encoded | None:
        """Add a message. Returns the response when it was the last one."""
        if message["type"] == "http.response.start":
            self.status, self.headers = _checked(message["status"]), _pairs(list(message.get("headers", ())))
        elif message["type"] == "http.response.body" and not self.complete:
            self._chunks.append(bytes(message.get("body", b"")))
            if not message.get("more_body", False):
                self.complete = True
                return Encoded(self.status, "response", self.headers, b"".join(self._chunks))
        return None


def _checked(status: int) -> int:
    if not 200 <= status <= 599:
        raise ValueError(f"the status of a response must be 200 to 599, not {status}")
    return int(status)


def _pairs(headers: list[tuple[bytes, bytes]]) -> Pairs:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def _pickled(result: object) -> bytes:
    try:
        return pickle.dumps(result, protocol=5)
    except Exception:  # such as a class of the script that made the backend, which is not in a module here
        return cast("bytes", cloudpickle.dumps(result))  # type: ignore[no-untyped-call]  # pyright: ignore[reportPrivateImportUsage, reportUnknownMemberType]
