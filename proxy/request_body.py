"""Request bodies: read as a whole, within limits of size, time and the proxy's memory budget."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from typing import Any

from starlette.types import Receive

from ..handles.errors import MalformedBody, PayloadTooLarge, PenstockError
from .http1.disconnects import ClientDisconnected


class SlowBody(PenstockError):
    """The client did not send its whole body in time."""

    status = 408

    def __init__(self, received: int, timeout_s: float) -> None:
        super().__init__(received, timeout_s)
        self.received, self.timeout_s = received, timeout_s

    def __str__(self) -> str:
        return f"only {self.received} bytes of the body arrived within {self.timeout_s:g} s"


def has_body(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether an HTTP/1.1 request has a body (RFC 9112, section 6.3).

    Without a body `receive` need not be called, which saves a turn of the event loop.
    """
    return b"content-length" in headers or b"transfer-encoding" in headers


def _no_budget(size: int) -> None:
    """Accept any size."""


async def read_body(
    receive: Receive,
    headers: Mapping[bytes, bytes],
    *,
    limit: int,
    timeout_s: float,
    reserve: Callable[[int], None] = _no_budget,
    check: Callable[[int], None] = _no_budget,
) -> bytes:
    """Return the whole body of a request.

    Args:
        receive: the ASGI callable of the request.
        headers: its headers, with names in lower case.
        limit: the largest body in bytes.
        timeout_s: seconds within which the body must be complete.
        reserve: called with the size of each piece before it is kept; an exception that it raises ends the reading.
        check: called with the declared length before anything is read; an exception that it raises ends the reading.

    Raises:
        PayloadTooLarge: the body is longer than ``limit``. A declared length is checked before anything is read.
        MalformedBody: the declared length is not a number.
        SlowBody: the body was incomplete after ``timeout_s``.
        ClientDisconnected: the client disconnected before the end of the body.
    """
    declared = headers.get(b"content-length")
    if declared is not None:
        if not declared.isdigit():
            raise MalformedBody(f"the content-length {declared.decode('latin-1')!r} is not a number")
        if len(declared) > 18 or int(declared) > limit:
            raise PayloadTooLarge(int(declared[:19]), limit)
        check(int(declared))
    deadline = _Deadline(timeout_s)
    chunks: list[bytes] = []
    size = 0
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise PayloadTooLarge(size, limit)
            reserve(len(chunk))
            chunks.append(chunk)
            if not message.get("more_body", False):
                return chunk if len(chunks) == 1 else b"".join(chunks)
    except asyncio.CancelledError:
        if deadline.uncancel():
            raise SlowBody(size, timeout_s) from None
        raise
    finally:
        deadline.cancel()


class _Deadline:
    """Cancels the running task after ``timeout_s`` seconds.

    ``asyncio.timeout`` needs Python 3.11, and before 3.12 ``wait_for`` starts a task for each awaited coroutine.
    """

    def __init__(self, timeout_s: float) -> None:
        task: asyncio.Task[Any] | None = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling_before = 0
        if sys.version_info >= (3, 11):
            self._cancelling_before = task.cancelling()
        self._has_expired = False
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._expire)

    def _expire(self) -> None:
        self._has_expired = True
        self._task.cancel()

    def uncancel(self) -> bool:
        """Return whether the cancellation came from this deadline alone; in that case undo it."""
        if not self._has_expired:
            return False
        if sys.version_info >= (3, 11):
            return self._task.uncancel() <= self._cancelling_before
        return True

    def cancel(self) -> None:
        self._timer.cancel()
