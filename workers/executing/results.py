"""Results of user code as the bytes of a reply."""

from __future__ import annotations

import pickle
from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any, NamedTuple

from starlette.responses import Response
from starlette.types import Message

from ...broker.wire._fields import Pairs
from ...handles.codec import encode as encode_value
from ..pickling import dumps


class Encoded(NamedTuple):
    """The fields of a reply that a result becomes."""

    status: int
    codec: str
    headers: Pairs
    body: bytes


def encode(result: Any, backend: str, allow_pickle: bool = False) -> Encoded:
    """Encode a result that ``backend`` returned: a Starlette response, or a value as in ``handles/codec.py``.

    Raises:
        TypeError: it cannot be encoded. The message names the types that can, and how to allow others.
        ValueError: it is a response with an invalid status.
    """
    if isinstance(result, Response):
        return encode_response(result.status_code, result.raw_headers, result.body)
    try:
        codec, body = encode_value(result)
    except TypeError as e:
        if isinstance(result, (Generator, AsyncGenerator)):
            raise TypeError(
                f"backend {backend!r} returned a generator, and its caller does not accept a streamed reply: call it "
                "over HTTP, with handle.options(stream=True) or `penstock call --stream`, or return a list; a method "
                "that takes batches cannot stream"
            ) from None
        if isinstance(result, Coroutine):
            result.close()  # else Python warns that it was never awaited
            raise TypeError(
                f"backend {backend!r} returned a coroutine: a wrapper of its `async def` code must be `async def` too"
            ) from None
        if not allow_pickle:
            raise TypeError(
                f"backend {backend!r} returned a value that cannot be sent: {e}; return None, str, bytes, a JSON value "
                "or a starlette Response, or allow pickled values for handles with config={'allow_pickle': True}"
            ) from None
        codec, body = "pickle", _pickled(result)
    return Encoded(200, codec, [], body)


def encode_response(status: int, headers: list[tuple[bytes, bytes]], body: bytes | memoryview) -> Encoded:
    """Encode a whole HTTP response."""
    return Encoded(_checked(status), "response", _pairs(headers), bytes(body))


def is_complete(result: object) -> bool:
    """Return whether `encode` can encode ``result`` at once.

    If not, it is a response that must be called as an ASGI application: one that streams, reads a file, or has a
    background task.
    """
    if not isinstance(result, Response):
        return True
    return type(result).__call__ is Response.__call__ and result.background is None


class Collector:
    """Combines the messages that an ASGI application sends into one response."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: Pairs = []
        self._chunks: list[bytes] = []
        self.complete = False

    def add(self, message: Message) -> Encoded | None:
        """Add a message. Returns the response if it was the last one, else None."""
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
    except Exception:  # such as a class of the script that created the backend, which no module here has
        return dumps(result)
