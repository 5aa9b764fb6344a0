"""The messages of one response, checked as they come: their order, their types and the declared length."""

from __future__ import annotations

from typing import Any, cast

from starlette.types import Message

from ...broker.wire._fields import Pairs

_NO_CONTENT = (204, 304)
"""Statuses of responses without content, which may declare the length that another one would have."""


class ResponseMessages:
    """One response of an application, as far as it has been sent.

    A response whose body does not have the length that its head declares would be cut short, or run into the next one.
    It is an error, as in other servers, and no client takes it for complete.
    """

    def __init__(self, method: str) -> None:
        self.status = 0
        """0 until the response has begun."""
        self.headers: Pairs = []
        self.is_complete = False
        self._is_head = method == "HEAD"
        self._chunks: list[bytes] = []
        self._size = 0
        self._declared: int | None = None

    def add(self, message: Message) -> bytes | None:
        """Add a message. Returns the bytes of a body message, None for the head.

        Raises:
            RuntimeError: the message cannot follow those before it.
            TypeError, ValueError: a member of it is not what ASGI prescribes, or the body has not the declared length.
        """
        kind = message["type"]
        if kind == "http.response.body" and self.status and not self.is_complete:
            return self._add_body(message.get("body", b""), bool(message.get("more_body", False)))
        if kind != "http.response.start" or self.status:
            raise RuntimeError(f"an application cannot send {kind!r} {self._when()}")
        self._begin(message.get("status"), message.get("headers", ()))
        return None

    def whole_body(self) -> bytes:
        """Return what has been added, as one body."""
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    def forget_body(self) -> None:
        """Keep no bytes: from now on they are sent as they come."""
        self._chunks.clear()

    def keep(self, chunk: bytes) -> None:
        """Keep bytes for `whole_body`."""
        self._chunks.append(chunk)

    def check_ended(self) -> None:
        """Raise ``RuntimeError`` unless the response is complete: the application has returned."""
        if not self.is_complete:
            missing = "the end of its body" if self.status else "a response"
            raise RuntimeError(f"the application returned before it sent {missing}")

    def _when(self) -> str:
        if self.is_complete:
            return "after its response was complete"
        return "after http.response.start" if self.status else "before http.response.start"

    def _begin(self, status: Any, headers: Any) -> None:
        if not isinstance(status, int) or not 200 <= status <= 599:
            raise ValueError(f"the status of a response must be an int of 200 to 599, not {status!r}")
        pairs: Pairs = []
        for name, value in headers:
            if not isinstance(name, bytes) or not isinstance(value, bytes):
                raise TypeError(f"the names and values of headers must be bytes, not {name!r}: {value!r}")
            text = name.decode("latin-1").lower()
            pairs.append((text, value.decode("latin-1")))
            if text == "content-length":
                self._declare(value)
        self.status, self.headers = int(status), pairs
        if self._is_head or status in _NO_CONTENT:
            self._declared = None

    def _declare(self, value: bytes) -> None:
        if not value.isdigit() or len(value) > 18:
            raise ValueError(f"the content-length of a response must be a number of bytes, not {value!r}")
        declared = int(value)
        if self._declared not in (None, declared):
            raise ValueError(f"a response declares two lengths of its body: {self._declared} and {declared} bytes")
        self._declared = declared

    def _add_body(self, body: Any, more: bool) -> bytes:
        if not isinstance(body, bytes | bytearray | memoryview):
            raise TypeError(f"the body of a response must be bytes, not {type(body).__name__}")
        chunk = bytes(cast("bytes", body))
        self._size += len(chunk)
        declared = self._declared
        if declared is not None and (self._size > declared or (not more and self._size < declared)):
            what = "more than" if self._size > declared else "only"
            raise ValueError(
                f"a response declares a body of {declared} bytes and has {what} {min(self._size, declared)}"
            )
        self.is_complete = not more
        return chunk
